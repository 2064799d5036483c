"""Equalization and bias correction on MobileNet v1 0.25, which plain rounding destroys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fewbit.data.image_set import ImageSet
from fewbit.net import Net
from fewbit.recipe import Recipe, image_context, read_recipe, run_recipe

pytestmark = pytest.mark.needs_shared
NAME = "mobilenet_v1_025"
EXACT = ({"use": "canonical"}, {"use": "fold_bn"})


def logits(net: Net, images: ImageSet) -> NDArray[np.float32]:
    with torch.no_grad():
        return np.concatenate([net(torch.from_numpy(batch)).numpy() for batch in images.batches(20)])


@pytest.fixture
def seen(images_of: Callable[[str, int], ImageSet]) -> ImageSet:
    """Calibration images."""
    return images_of(NAME, 64)


@pytest.fixture
def unseen(seen: ImageSet, images_of: Callable[[str, int], ImageSet]) -> ImageSet:
    """Images that did not calibrate."""
    several = images_of(NAME, 150)
    return several.subset(np.flatnonzero(~np.isin(several.names, seen.names)))


@pytest.mark.parametrize("name", [NAME, "fdmobilenet_025", "mobilenet_v2", "squeezenet_v11"])
@pytest.mark.parametrize("caps", [False, True])
def test_equalization_keeps_the_float_network(
    name: str, caps: bool, net_of: Callable[[str], Net], images_of: Callable[[str, int], ImageSet]
) -> None:
    images = images_of(name, 16)
    steps: tuple[dict[str, Any], ...] = (*EXACT, {"use": "equalize", "caps": caps})
    made, reports = run_recipe(
        Recipe(name="test", steps=steps), net_of(name), image_context(images, "openvino")
    )
    expected, found = logits(net_of(name), images), logits(made, images)
    assert float(np.abs(found - expected).max()) < 1e-4 * float(np.abs(expected).max())
    assert (
        reports[-1].changed
        >= {NAME: 20, "fdmobilenet_025": 22, "mobilenet_v2": 30, "squeezenet_v11": 8}[name]
    )


@pytest.mark.parametrize(("recipe", "plain", "drop"), [
    ("int8-equalized", "int8", 0.04),
    ("int8-per-tensor-equalized", "int8-per-tensor", 0.06),
])  # fmt: skip
def test_it_is_rescued(
    recipe: str, plain: str, drop: float, net_of: Callable[[str], Net], seen: ImageSet, unseen: ImageSet
) -> None:
    net = net_of(NAME)
    exact = logits(net, unseen)
    top1 = float((exact.argmax(1) == unseen.targets).mean())
    agree = {}
    for name in (recipe, plain):
        made, _ = run_recipe(read_recipe(name), net, image_context(seen, "onnxruntime"))
        found = logits(made, unseen)
        agree[name] = float((found.argmax(1) == exact.argmax(1)).mean())
        if name == recipe:
            assert top1 - float((found.argmax(1) == unseen.targets).mean()) <= drop
    assert agree[recipe] > agree[plain] + 0.05
