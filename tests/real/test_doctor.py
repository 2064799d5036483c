"""The doctor on real networks: MobileNet v1 0.25, which one scale a tensor destroys, and ResNet-20."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fewbit.data.image_set import ImageSet
from fewbit.doctor.diagnose import Images, diagnose
from fewbit.doctor.records import Diagnosis
from fewbit.doctor.sample import Sample
from fewbit.load.card import Card
from fewbit.net import Net
from fewbit.recipe import read_recipe

pytestmark = pytest.mark.needs_shared


@pytest.fixture
def examined(
    net_of: Callable[[str], Net],
    card_of: Callable[[str], Card],
    images_of: Callable[[str, int], ImageSet],
) -> Callable[[str, str], Diagnosis]:
    """Return the diagnosis of a network by a recipe, calibrated on 32 images, judged on 96 others."""

    def look(name: str, recipe: str) -> Diagnosis:
        sample = Sample.of_set(images_of(name, 128))
        order = np.random.default_rng(0).permutation(128)
        images = Images(sample.subset(order[:32]), sample.subset(order[32:]))
        card = card_of(name)
        assert card.expected is not None
        expected = card.expected.top1_correct / card.expected.images
        return diagnose(net_of(name), read_recipe(recipe), images, section=card.input, expected=expected)

    return look


def test_mobilenet_with_a_scale_a_tensor(examined: Callable[[str, str], Diagnosis]) -> None:
    found = examined("mobilenet_v1_025", "int8-per-tensor")
    finding = found.findings[0]
    assert finding.cause == "depthwise_range_spread" and finding.layer.endswith(".dw")
    assert found.quality.accuracy.top1 < 0.1 < 0.45 < found.float_accuracy.top1
    for remedy in finding.remedies:
        assert remedy.helps and remedy.after.accuracy.top1 > found.float_accuracy.top1 - 0.15
        assert remedy.versus.p_value() < 1e-6
    assert finding.remedies[0].after.agreement is not None and finding.remedies[0].after.agreement > 0.75


def test_mobilenet_with_a_scale_a_channel_has_biased_rounding_left(
    examined: Callable[[str, str], Diagnosis],
) -> None:
    found = examined("mobilenet_v1_025", "int8")
    assert [finding.cause for finding in found.findings] == ["biased_rounding"]
    remedy = found.findings[0].remedies[0]
    assert remedy.helps and remedy.after.kl is not None and found.quality.kl is not None
    assert remedy.after.kl < found.quality.kl / 3
    assert remedy.after.agreement is not None and found.quality.agreement is not None
    assert remedy.after.agreement > found.quality.agreement + 0.05


def test_resnet20_is_well(examined: Callable[[str, str], Diagnosis]) -> None:
    assert examined("resnet20", "int8").findings == ()
