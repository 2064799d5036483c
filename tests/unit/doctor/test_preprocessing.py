from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewbit.data.preprocess import normalize
from fewbit.doctor.judge import Judge
from fewbit.doctor.preprocessing import (
    Expectation,
    alternatives,
    check_preprocessing,
    look_at_input,
    pixels_of,
    prepare,
)
from fewbit.doctor.sample import Sample
from fewbit.load.capture import capture
from fewbit.load.card import InputSection
from networks import make_net

PLAIN = InputSection(size=(3, 4, 4), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
GRAY = InputSection(size=(1, 4, 4), mean=(0.5,), std=(0.25,))
STATISTICS = (np.array([120.0, 110.0, 100.0]), np.array([60.0, 61.0, 62.0]))


@given(
    scale=st.sampled_from([1.0, 255.0, 127.5]),
    mean=st.floats(-200, 200),
    std=st.floats(0.01, 300),
    seed=st.integers(0, 100),
)
def test_pixels_come_back_from_any_preprocessing(scale: float, mean: float, std: float, seed: int) -> None:
    section = InputSection(size=(3, 4, 4), scale=scale, mean=(mean, 0.0, 0.5), std=(std, 1.0, 0.25))
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    assert np.array_equal(pixels_of(torch.from_numpy(normalize(pixels, section)), section), pixels)


def test_images_are_prepared_another_way_exactly() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    sample = Sample.of_tensor(torch.from_numpy(normalize(pixels, PLAIN)), np.zeros(5, np.int64), batch=2)
    other = PLAIN.model_copy(update={"channels": "bgr", "scale": 1.0})
    found = torch.cat(list(prepare(sample, PLAIN, other)))
    assert torch.equal(found, torch.from_numpy(normalize(pixels[..., ::-1], other)))


def test_alternatives_are_all_different_and_none_is_the_cards() -> None:
    for section in (
        PLAIN,
        PLAIN.model_copy(update={"channels": "bgr"}),
        PLAIN.model_copy(update={"scale": 1.0}),
    ):
        found = [one.section for one in alternatives(section, STATISTICS)]
        assert section not in found and len({one.digest() for one in found}) == len(found) >= 7
        for one in found:
            InputSection.model_validate(one.model_dump())


def test_gray_has_no_channels_to_swap() -> None:
    found = alternatives(GRAY, (np.array([30.0]), np.array([80.0])))
    assert {one.section.channels for one in found} == {"gray"}
    own = next(one for one in found if "images' own" in one.action)
    assert (own.section.mean, own.section.std) == ((0.1176,), (0.3137,))


def test_swapped_channels_keep_their_own_mean_and_std() -> None:
    swapped = next(one for one in alternatives(PLAIN, STATISTICS) if one.action.startswith("channels"))
    assert (swapped.section.channels, swapped.section.mean) == ("bgr", (0.406, 0.456, 0.485))


def test_images_of_one_colour_have_no_std_to_divide_by() -> None:
    found = alternatives(PLAIN, (np.zeros(3), np.zeros(3)))
    assert not any("images' own" in one.action for one in found)


def test_the_input_and_its_first_batchnorm() -> None:
    net = make_net("residual")
    images = 2 * torch.randn((6, 3, 16, 16), generator=torch.Generator().manual_seed(0)) + 1
    facts = look_at_input(net, Sample.of_tensor(images, np.zeros(6, np.int64), batch=4))
    expected = images.double().transpose(0, 1).flatten(1)
    assert facts.mean == pytest.approx(expected.mean(1).tolist(), rel=1e-5)
    assert facts.std == pytest.approx(expected.std(1, correction=0).tolist(), rel=1e-5)
    assert facts.norm == "stem_bn"
    with torch.no_grad():
        fed = net.graph.get_submodule("stem")(images).double().transpose(0, 1).flatten(1)
    norm = net.graph.get_submodule("stem_bn")
    seen, mean = fed.var(1, correction=0), fed.mean(1)
    trained = norm.running_var.double()
    far = (mean - norm.running_mean.double()) ** 2
    gap = ((seen + far) / trained - 1 - (seen / trained).log()) / 2
    assert facts.norm_gap == pytest.approx(float(gap.median()), rel=1e-4)


def test_without_a_batchnorm_nothing_is_known_of_training() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    net = capture(model.eval(), "net", (3, 4, 4))
    facts = look_at_input(net, Sample.of_tensor(torch.zeros(2, 3, 4, 4), np.zeros(2, np.int64)))
    assert (facts.norm, facts.norm_gap, facts.std) == ("", None, (0.0, 0.0, 0.0))


class Bright:
    """Says class 1 where an image is brighter than mid gray, in the units of its own preprocessing."""

    def __init__(self, section: InputSection) -> None:
        self.middle = float((127.5 / section.scale - section.mean[0]) / section.std[0])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        score = (x.mean((1, 2, 3)) - self.middle) * 10
        return torch.stack([-score, score], 1)


def judged(network: Any, seen: InputSection, images: int = 64, right: float = 1.0) -> Judge:
    """Judge a network on images that are bright or dark, prepared as a section says."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, images)
    pixels = np.broadcast_to(levels[:, None, None, None], (images, 4, 4, 1)).astype(np.uint8)
    targets = (levels > 127.5).astype(np.int64)
    wrong = rng.random(images) >= right
    sample = Sample.of_tensor(
        torch.from_numpy(normalize(pixels, seen)), np.where(wrong, 1 - targets, targets)
    )
    return Judge(network, sample)


def check(network: Any, section: InputSection, judge: Judge, share: float | None = None) -> Any:
    facts = look_at_input(capture(nn.Flatten(), "net", (1, 4, 4)), judge.sample)
    return check_preprocessing(network, section, judge, Expectation(2, share), facts, lambda what, done: None)


def test_the_right_preprocessing_has_no_finding() -> None:
    network = Bright(GRAY)
    assert check(network, GRAY, judged(network, GRAY)) is None


def test_the_one_that_raises_accuracy_is_named() -> None:
    wrong, network = GRAY.model_copy(update={"scale": 1.0}), Bright(GRAY)
    found = check(network, wrong, judged(network, wrong))
    assert (
        found.remedies[0].helps and found.remedies[0].action == "scale = 255: mean and std are of 0..1 pixels"
    )
    assert found.remedies[0].after.accuracy.top1 == 1.0
    assert "no better than a guess among 2" in found.reason


def test_where_nothing_mends_it_that_is_told() -> None:
    network = Bright(GRAY)
    judge = judged(network, GRAY, right=0.5)
    found = check(network, GRAY, judge)
    assert not found.remedies[0].helps
    assert found.reason.endswith("no usual preprocessing mends it: check weights, labels and resize")


def test_far_under_the_card_is_told_and_as_expected_is_not() -> None:
    network = Bright(GRAY)
    judge = judged(network, GRAY, images=200, right=0.8)
    told = check(network, GRAY, judge, share=0.99)
    assert told.reason.startswith("the card expects 99.0% of the float network, which gets ")
    assert "the card expects" in [fact.name for fact in told.evidence]
    assert check(network, GRAY, judge, share=0.8) is None
    assert check(network, GRAY, judge) is None
