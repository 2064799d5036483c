"""Ranges of least error to a power."""

import numpy as np
import pytest
import torch

from fewbit.ranges import find_weight_range
from fewbit.ranges.grid_search import PowerError, SquaredError
from fewbit.ranges.lp_norm import LpNorm
from fewbit.ranges.mse import MSE
from fewbit.spec import QuantSpec

GAUSS = np.random.RandomState(0).randn(4096)
WIDTHS = [2, 3, 4, 6, 8]


def symmetric(bits):
    return QuantSpec(bits=bits, symmetric=True, signed=True)


def error_of(x, low, high, spec, power):
    """The mean error to a power, by its definition."""
    qmin, qmax = spec.code_range(unsigned=low >= 0)
    if spec.symmetric:
        scale, zero = high / qmax, 0
    else:
        scale = (high - low) / (qmax - qmin)
        zero = np.clip(np.rint(qmin - low / scale), qmin, qmax)
    return float(
        (np.abs((np.clip(np.rint(x / scale) + zero, qmin, qmax) - zero) * scale - x) ** power).mean()
    )


def observe(x, method):
    finder = method.start()
    finder.observe(torch.as_tensor(np.asarray(x), dtype=torch.float32))
    return finder


def from_histogram(x, spec, method):
    found = observe(x, method).find(spec)
    return found.low, found.high


def from_weights(x, spec, method):
    found = find_weight_range(torch.as_tensor(np.asarray(x))[None], spec, 0, method)
    return found.low, found.high


@pytest.mark.parametrize("power", [1.0, 2.0, 2.4, 4.0])
@pytest.mark.parametrize("bits", WIDTHS)
def test_integrals_equal_the_definition(bits, power):
    finder = observe(GAUSS + 0.7, MSE(bins=16384))
    error = PowerError(finder.histogram.density(), 2**bits - 1, power)
    low, high = np.array([-1.0, -2.0, -0.1]), np.array([2.0, 5.0, 9.0])
    by_hand = [
        error_of(GAUSS + 0.7, a, b, QuantSpec(bits=bits), power) for a, b in zip(low, high, strict=True)
    ]
    assert error.of(low, high) / 4096 == pytest.approx(by_hand, rel=0.01)


@pytest.mark.parametrize("bits", WIDTHS)
def test_power_two_is_the_squared_error(bits):
    density = observe(GAUSS, MSE()).histogram.density()
    low, high = np.linspace(-3, -0.5, 7), np.linspace(1, 3.8, 7)
    squared = SquaredError(density, 2**bits - 1).of(low, high)
    assert PowerError(density, 2**bits - 1, 2.0).of(low, high) == pytest.approx(squared, rel=1e-9)
    for spec in (symmetric(bits), QuantSpec(bits=bits)):
        assert from_histogram(GAUSS, spec, LpNorm(power=2)) == from_histogram(GAUSS, spec, MSE())
        assert from_weights(GAUSS, spec, LpNorm(power=2)) == from_weights(GAUSS, spec, MSE())


@pytest.mark.parametrize("find", [from_histogram, from_weights])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_least_of_all_symmetric_ranges(find, bits):
    low, high = find(GAUSS, symmetric(bits), LpNorm())
    reach = np.abs(GAUSS).max()
    best = min(error_of(GAUSS, -a, a, symmetric(bits), 2.4) for a in np.linspace(0.05, 1, 400) * reach)
    assert low == -high
    assert error_of(GAUSS, low, high, symmetric(bits), 2.4) <= best * 1.002


@pytest.mark.parametrize("find", [from_histogram, from_weights])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_near_the_best_of_all_pairs_of_ends(find, bits):
    x, spec = GAUSS / (1 + np.exp(-GAUSS)), QuantSpec(bits=bits)
    pairs = [(a * x.min(), b * x.max()) for a in np.linspace(0.05, 1, 20) for b in np.linspace(0.05, 1, 40)]
    best = min(error_of(x, *ends, spec, 2.4) for ends in pairs)
    assert error_of(x, *find(x, spec, LpNorm()), spec, 2.4) <= 1.03 * best


@pytest.mark.parametrize("find", [from_histogram, from_weights])
def test_a_larger_power_clips_less(find):
    highs = [find(GAUSS, symmetric(3), LpNorm(power=p))[1] for p in (1, 2, 2.4, 4, 8)]
    assert highs == sorted(highs) and highs[0] < 0.7 * highs[-1]


def test_values_of_one_bin_without_width():
    # The smallest value lies exactly on the border of its bin: a bin of width 0 that holds it.
    x = np.array([-1.0, *GAUSS.clip(-0.9, 0.9)], np.float32)
    density = observe(x, LpNorm()).histogram.density()
    found = PowerError(density, 15, 2.4).of(np.array([-0.5]), np.array([0.9]))
    assert found[0] / len(x) == pytest.approx(error_of(x, -0.5, 0.9, QuantSpec(bits=4), 2.4), rel=0.01)


def test_exact_zeros_have_no_error():
    x = np.maximum(GAUSS, 0)
    many = np.concatenate([x, np.zeros(10**5)])
    spec = QuantSpec(bits=4)
    assert from_histogram(many, spec, LpNorm()) == from_histogram(x[x > 0], spec, LpNorm())
