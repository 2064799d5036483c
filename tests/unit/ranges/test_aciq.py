"""Ranges of least expected error, and bits shared by channels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import RecipeError
from fewbit.ranges import find_weight_range
from fewbit.ranges.aciq import (
    ACIQ,
    allocate_bits,
    best_clip,
    expected_error,
    levels_of_channels,
    mean_absolute_deviation,
)
from fewbit.ranges.histogram import Histogram
from fewbit.spec import QuantSpec

LAPLACE = [1.8628, 2.8307, 3.8972, 5.0286, 6.2048, 7.4131, 8.6456, 9.8968]
GAUSS = [1.2399, 1.7106, 2.1516, 2.5591, 2.9362, 3.2869, 3.6151, 3.9240]
LAPLACE_ERROR = [0.599643, 0.284878, 0.119702, 0.0460215, 0.0165718, 0.00567877, 0.00187252, 0.00059885]
GAUSS_ERROR = [0.215010, 0.0871485, 0.0314294, 0.0104933, 0.00332259, 0.00101292, 0.00030022, 0.00008708]
TABLE = [("laplace", LAPLACE, LAPLACE_ERROR, 11.1627), ("gauss", GAUSS, GAUSS_ERROR, 4.2163)]


def symmetric(bits):
    return QuantSpec(bits=bits, symmetric=True, signed=True)


def observe(x, **hyperparameters):
    finder = ACIQ(**hyperparameters).start("conv1")
    finder.observe(torch.as_tensor(np.asarray(x), dtype=torch.float32))
    return finder


def draw(prior, seed=0, count=200000):
    rng = np.random.default_rng(seed)
    return (rng.laplace(size=count) if prior == "laplace" else rng.standard_normal(count)).astype(np.float32)


@pytest.mark.parametrize(("prior", "clips", "errors", "ninth"), TABLE)
def test_worked_table(prior, clips, errors, ninth):
    found = [best_clip(prior, bits) for bits in range(1, 10)]
    assert found == pytest.approx([*clips, ninth], abs=5.1e-5)
    assert [expected_error(prior, clip, bits + 1) for bits, clip in enumerate(found[:8])] == pytest.approx(
        errors, rel=5e-5
    )


@pytest.mark.parametrize("prior", ["laplace", "gauss"])
@pytest.mark.parametrize("bits", range(1, 10))
def test_no_other_clip_errs_less(prior, bits):
    clip = best_clip(prior, bits)
    least = expected_error(prior, clip, bits)
    assert all(expected_error(prior, clip * f, bits) > least for f in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0))


def test_measured_errors_have_their_least_near_the_clip():
    x = np.random.RandomState(1).laplace(size=10**6)

    def error(clip, levels=16):
        step = 2 * clip / levels  # 2^M levels at bin centres
        codes = np.clip(np.floor(x / step), -levels // 2, levels // 2 - 1)
        return float((((codes + 0.5) * step - x) ** 2).mean())

    clips = np.arange(3.5, 7, 0.1)
    errors = [error(clip) for clip in clips]
    assert clips[int(np.argmin(errors))] == pytest.approx(5.03, abs=0.25)
    assert error(5.03) == pytest.approx(0.0505, abs=5e-5)  # not the 0.0460 of the formula
    # The expectation, of which 10^6 samples miss 5e-4: each cell's share, then the tail to the last centre.
    step = 2 * 5.03 / 16
    cell = 2 - step + step**2 / 4 - math.exp(-step) * (2 + step + step**2 / 4)
    inner = cell * (1 - math.exp(-5.03)) / (1 - math.exp(-step))
    expected = inner + math.exp(-5.03) * (2 + step + step**2 / 4)
    assert expected == pytest.approx(0.0509909, abs=1e-7)
    assert error(5.03) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("prior", "clips", "errors", "ninth"), TABLE)
def test_ranges_of_both_signs(prior, clips, errors, ninth):
    x = draw(prior) + np.float32(0.25)
    unit = np.abs(x - x.mean()).mean() if prior == "laplace" else x.std()
    for bits in (3, 4):
        reach, finder = clips[bits - 1] * float(unit), observe(x, prior=prior)
        found = finder.find(QuantSpec(bits=bits))
        assert found.low == pytest.approx(float(x.mean()) - reach, rel=1e-4)
        assert found.high == pytest.approx(float(x.mean()) + reach, rel=1e-4)
        mirrored = finder.find(symmetric(bits))
        assert mirrored.high == -mirrored.low == pytest.approx(float(x.mean()) + reach, rel=1e-4)


@pytest.mark.parametrize(("prior", "clips", "errors", "ninth"), TABLE)
def test_ranges_of_what_is_never_negative(prior, clips, errors, ninth):
    x = np.maximum(draw(prior), 0)
    unit = np.abs(x - x.mean()).mean() if prior == "laplace" else x.std()
    for spec in (QuantSpec(bits=4), symmetric(4)):
        found = observe(x, prior=prior).find(spec)
        assert found.low == 0
        assert found.high == pytest.approx(float(x.mean() + clips[4] * unit), rel=1e-4)  # 5-bit constant
    high = observe(x, prior=prior).find(QuantSpec(bits=8)).high
    assert high == pytest.approx(min(float(x.mean() + ninth * unit), float(x.max())), rel=1e-4)


def error_of(x, low, high, levels):
    step = (high - low) / levels
    zero = np.rint(-low / step)
    return float((((np.clip(np.rint(x / step) + zero, 0, levels) - zero) * step - x) ** 2).mean())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", ["laplace", "gauss", "uniform", "relu"])
def test_mixed_keeps_the_best(shape, bits):
    x = draw("gauss" if shape == "relu" else shape.replace("uniform", "gauss"), 2, 20000)
    x = {"relu": np.maximum(x, 0), "uniform": np.clip(x, -0.5, 0.5)}.get(shape, x)
    spec = QuantSpec(bits=bits)
    ranges = [(min(float(x.min()), 0.0), float(x.max()))]
    for prior in ("laplace", "gauss"):
        found = observe(x, prior=prior).find(spec)
        ranges.append((found.low, found.high))
    errors = [error_of(x, *ends, 2**bits - 1) for ends in ranges]
    mixed = observe(x).find(spec)
    assert error_of(x, mixed.low, mixed.high, 2**bits - 1) <= min(errors) * 1.01
    weights = find_weight_range(torch.tensor(x), spec, 0, ACIQ())
    assert error_of(x, weights.low, weights.high, 2**bits - 1) <= min(errors) * 1.01


def test_mixed_takes_min_max_where_nothing_lies_far_out():
    x = np.linspace(-1, 1, 10001)
    assert observe(x).find(QuantSpec()).high == pytest.approx(1.0)
    laplace = observe(draw("laplace")).find(QuantSpec(bits=4))
    assert 4 < laplace.high < 6 and laplace == observe(draw("laplace"), prior="laplace").find(
        QuantSpec(bits=4)
    )


@pytest.mark.parametrize("prior", ["laplace", "gauss"])
def test_weights_by_the_moments_of_each_channel(prior):
    rows = torch.tensor(np.stack([draw(prior, 3, 3000) * 2, draw(prior, 4, 3000) + 1, np.zeros(3000)]))
    rows = rows.float()
    x = rows.double().numpy()
    unit = np.abs(x - x.mean(1, keepdims=True)).mean(1) if prior == "laplace" else x.std(1)
    spec = QuantSpec(bits=4, symmetric=True, signed=True, granularity="channel")
    found = find_weight_range(rows, spec, 0, ACIQ(prior=prior))
    assert found.high == pytest.approx(list(np.abs(x.mean(1)) + best_clip(prior, 4) * unit), rel=1e-6)
    asymmetric = QuantSpec(bits=4, signed=True, granularity="channel")
    above = find_weight_range(rows.abs(), asymmetric, 0, ACIQ(prior=prior))
    y = np.abs(x)
    unit = np.abs(y - y.mean(1, keepdims=True)).mean(1) if prior == "laplace" else y.std(1)
    highs = np.minimum(y.mean(1) + best_clip(prior, 5) * unit, y.max(1))
    assert above.low == (0, 0, 0) and above.high == pytest.approx(list(highs), rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(0, 0.9))
def test_mean_absolute_deviation_from_a_histogram(seed, shift, zeros):
    rng = np.random.default_rng(seed)
    x = np.where(rng.random(3000) < zeros, 0, rng.standard_normal(3000) + shift).astype(np.float32)
    histogram = Histogram("x", 4096)
    histogram.observe(torch.tensor(x))
    mean = float(x.astype(np.float64).mean())
    bin_ = float(np.abs(x).max()) / 2048
    found = mean_absolute_deviation(histogram.density(), mean)
    assert found == pytest.approx(np.abs(x - mean).mean(), abs=bin_ / 10)


def test_one_bit_symmetric_codes_are_refused():
    text = "^aciq: 1-bit symmetric signed codes hold nothing but 0; give 2 bits or more$"
    with pytest.raises(RecipeError, match=text):
        observe([-1.0, 1.0]).find(symmetric(1))
    with pytest.raises(RecipeError, match=text):
        find_weight_range(torch.ones(3), symmetric(1), 0, "aciq")


def test_worked_levels_and_bits():
    levels = levels_of_channels([0.1, 0.2, 0.8, 1.6], 4)
    assert levels == pytest.approx([4.947, 7.853, 19.788, 31.412], abs=5.1e-4)
    assert np.log2(levels) == pytest.approx([2.307, 2.973, 4.307, 4.973], abs=5.1e-4)
    assert np.rint(np.log2(levels)).tolist() == [2, 3, 4, 5]  # mean 3.5: M has to rise
    assert allocate_bits([0.1, 0.2, 0.8, 1.6], 3.5).tolist() == [2, 3, 4, 5]
    assert allocate_bits([0.1, 0.2, 0.8, 1.6], 4).tolist() == [3, 3, 5, 5]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=64), st.integers(0, 32))
def test_bits_meet_their_mean_and_follow_the_scales(scales, quarters):
    target = quarters / 4
    bits = allocate_bits(scales, target)
    assert bits.min() >= 0 and bits.max() <= 8 and bits.mean() <= target
    order = np.argsort(scales)
    assert (np.diff(bits[order]) >= 0).all()
    # One more channel's bit would pass the mean, unless several channels gain theirs together.
    fractions = (np.log2(levels_of_channels(scales, 0)) + 0.5) % 1
    if len(scales) > 1 and np.diff(np.sort(np.append(fractions, fractions.min() + 1))).min() > 1e-6:
        assert bits.mean() > target - 1 / len(scales) - 1e-9


def test_bits_of_equal_scales_stay_below_the_mean():
    assert allocate_bits([1, 1, 1], 4.5).tolist() == [4, 4, 4]
    assert allocate_bits([0, 1], 4).tolist() == [0, 8]
    assert allocate_bits([3], 8).tolist() == [8] and allocate_bits([3, 4], 0).tolist() == [0, 0]


def test_equal_errors_a_value_in_every_channel():
    # Steps a_c / levels_c: the levels hold the error per level equal, a^2 / levels^3.
    a = np.array([0.1, 0.2, 0.8, 1.6])
    per_level = a**2 / levels_of_channels(a, 4) ** 3
    assert per_level == pytest.approx(np.full(4, per_level[0]))
    assert levels_of_channels(a, 4).sum() == pytest.approx(4 * 16)


@pytest.mark.parametrize("scales", [[], [0.0], [1.0, -1.0], [1.0, math.nan], [[1.0]]])
def test_wrong_scales_are_told(scales):
    with pytest.raises(RecipeError, match=r"^scales of channels: came in shape .*; give one finite scale a"):
        allocate_bits(scales, 4)


def test_a_mean_out_of_reach_is_told():
    with pytest.raises(RecipeError, match=r"^mean_bits: is 9; give 0 to 8, the most bits of a channel$"):
        allocate_bits([1.0], 9)
