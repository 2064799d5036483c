import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit import numerics
from fewbit.errors import InputError
from fewbit.numerics.integers import Affine

calm = settings(deadline=None, max_examples=100)
int32s = st.integers(-(2**31), 2**31 - 1)


def round_half_away(value: Fraction) -> int:
    return math.copysign(1, value) * math.floor(abs(value) + Fraction(1, 2)) if value else 0


@pytest.mark.parametrize(
    ("factor", "m", "n"),
    [
        (0.002, 1099511628, 8),
        (0.75, 1610612736, 0),
        (0.0003, 1319413953, 11),
        (0.2, 1717986918, 2),
        (0.5, 1073741824, 0),
        (0.1 / (2**20 * 0.06), 1789569707, 19),
        (0.0, 0, 0),
        (1.0, 1073741824, -1),
        (1 - 2**-40, 1073741824, -1),  # rounds up to 2^31, which is written as 2^30 with one shift less
        (6.0, 1610612736, -3),
    ],
)
def test_multiplier(factor, m, n):
    assert numerics.quantized_multiplier(factor) == (m, n)


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_bad_multiplier(bad):
    with pytest.raises(
        InputError, match=rf"^multiplier: is {bad}; it must be a finite number of at least 0$"
    ):
        numerics.quantized_multiplier(bad)


@calm
@given(st.floats(1e-9, 1e6))
def test_multiplier_keeps_30_bits(factor):
    m, n = numerics.quantized_multiplier(factor)
    assert 2**30 <= m < 2**31
    assert abs(Fraction(m) / 2**31 / Fraction(2) ** n - Fraction(factor)) <= Fraction(factor) / 2**30


def test_multiply_example():
    x = [12345, -12345, 250, -250, 750, -750, 249, 251]
    y = numerics.multiply_by_quantized_multiplier(x, *numerics.quantized_multiplier(0.002))
    # 24.69; 0.5 and 1.5 are ties that go away from zero.
    assert y.tolist() == [25, -25, 1, -1, 2, -2, 0, 1]


def test_rounding_right_shift():
    assert numerics.rounding_right_shift([-5, -3, -1, 1, 3, 5], 1).tolist() == [-3, -2, -1, 1, 2, 3]
    assert numerics.rounding_right_shift([-25, 25], 1).tolist() == [-13, 13]  # not -12
    assert numerics.rounding_right_shift([-7, 7], 0).tolist() == [-7, 7]


@calm
@given(int32s, st.integers(0, 40))
def test_rounding_right_shift_is_exact(x, n):
    assert numerics.rounding_right_shift(x, n) == round_half_away(Fraction(x, 2**n))


@calm
@given(int32s, int32s)
def test_high_multiply_is_exact(x, m):
    product = x * m
    nudged = product + (2**30 if product >= 0 else 1 - 2**30)
    expected = min(math.trunc(Fraction(nudged, 2**31)), 2**31 - 1)
    assert numerics.saturating_doubling_high_multiply(x, m) == expected


def test_high_multiply_saturates():
    assert numerics.saturating_doubling_high_multiply(-(2**31), -(2**31)) == 2**31 - 1


@calm
@given(st.integers(-(2**30), 2**30), st.floats(1e-8, 0.999))
def test_fixed_point_is_within_one_of_exact(x, factor):
    m, n = numerics.quantized_multiplier(factor)
    got = int(numerics.multiply_by_quantized_multiplier(x, m, n))
    assert abs(got - round_half_away(Fraction(x * m, 2 ** (31 + n)))) <= 1
    assert abs(got - x * factor) <= 1.0


@calm
@given(st.integers(-(2**20), 2**20), st.floats(1, 500))
def test_factors_above_one(x, factor):
    got = int(numerics.multiply_by_quantized_multiplier(x, *numerics.quantized_multiplier(factor)))
    assert abs(got - x * factor) <= 1.0


def test_left_shift_saturates():
    assert numerics.multiply_by_quantized_multiplier([2**30, -(2**30)], 2**30, -3).tolist() == [
        2**30,
        -(2**30),
    ]
    assert numerics.multiply_by_quantized_multiplier([1, 0], 2**30, -40).tolist() == [2**30, 0]


def test_worked_layer():
    q1 = np.array([[10, 200, 128], [0, 255, 130]])
    w = np.array([[50, -30], [-127, 64], [3, 100]])
    bias = numerics.quantize_bias([0.5, -0.25], 0.02, [0.01, 0.005])
    assert (q1 @ w).tolist() == [[-24516, 25300], [-31995, 29320]]
    assert w.sum(axis=0).tolist() == [-74, 134]
    sums = numerics.multiply_matrices(q1, 128, w) + bias
    assert sums.tolist() == [[-12544, 5648], [-20023, 9668]]
    factors = [0.02 * s / 0.1 for s in (0.01, 0.005)]
    assert [numerics.quantized_multiplier(f) for f in factors] == [(1099511628, 8), (1099511628, 9)]
    codes = np.stack([numerics.requantize(sums[:, o], factors[o], 100, 0, 255) for o in range(2)], axis=1)
    assert codes.tolist() == [[75, 106], [60, 110]]
    real = numerics.rescale_accumulator(sums, 0.02, [0.01, 0.005])
    assert real == pytest.approx(np.array([[-2.5088, 0.5648], [-4.0046, 0.9668]]), abs=1e-6)
    assert numerics.quantize(real, 0.1, 100, 0, 255).tolist() == codes.tolist()
    low, high = numerics.clamp_range(0, 6, 0.1, 100, 0, 255)
    assert numerics.requantize(sums[:, 0], factors[0], 100, low, high).tolist() == [100, 100]


def test_asymmetric_weights_example():
    q1 = np.array([[10, 200, 128], [0, 255, 130]], np.uint8)
    w = np.array([[57, 0], [0, 71], [10, 107]], np.uint8)
    assert numerics.multiply_matrices(q1, 128, w, 7).tolist() == [[-6404, 5434], [-7283, 9224]]


@calm
@given(st.integers(0, 2**32 - 1))
def test_four_terms_equal_the_direct_sum(seed):
    rng = np.random.default_rng(seed)
    m, k, n = rng.integers(1, 9, 3)
    a, b = rng.integers(0, 256, (m, k)).astype(np.uint8), rng.integers(-128, 128, (k, n)).astype(np.int8)
    za, zb = int(rng.integers(0, 256)), rng.integers(-128, 128, n)
    direct = (a.astype(np.int64) - za) @ (b.astype(np.int64) - zb)
    assert (numerics.multiply_matrices(a, za, b, zb) == direct).all()


def test_residual_add_example():
    grids = Affine(0.02, 10), Affine(0.05, 3), Affine(0.06, 5)
    wide = numerics.add_codes([110, 0, 255], [43, 0, 255], *grids, -1000, 1000)
    assert wide.tolist() == [72, -1, 297]  # 71.667, -0.833
    assert numerics.add_codes([110, 0, 255], [43, 0, 255], *grids, 0, 255).tolist() == [72, 0, 255]
    # Between: both inputs at the scale T / 2^20, with T = 2 max(S1, S2) = 0.1.
    for code, grid in ((110, grids[0]), (43, grids[1])):
        m, n = numerics.quantized_multiplier(grid.scale / 0.1)
        shifted = (code - grid.zero_point) << 20
        assert numerics.multiply_by_quantized_multiplier(shifted, m, n) == 20971520


@calm
@given(st.integers(0, 2**32 - 1))
def test_residual_add_is_within_one_of_floats(seed):
    rng = np.random.default_rng(seed)
    first, second, out = (Affine(float(rng.uniform(0.001, 1)), int(rng.integers(0, 256))) for _ in range(3))
    a, b = rng.integers(0, 256, (2, 50))
    real = first.scale * (a - first.zero_point) + second.scale * (b - second.zero_point)
    exact = real / out.scale + out.zero_point
    got = numerics.add_codes(a, b, first, second, out, -(2**31), 2**31 - 1)
    # Half a code, and the relative error of three multipliers of 31 bits.
    assert (np.abs(got - exact) <= 0.51 + np.abs(exact) * 1e-5).all()


def test_concat_by_requantizing():
    source, target = Affine(0.02, 10), Affine(0.05, 30)
    codes = np.arange(256)
    moved = numerics.requantize(
        codes - source.zero_point, source.scale / target.scale, target.zero_point, 0, 255
    )
    exact = (codes - 10) * 0.4 + 30
    # Two roundings: of 0.8 x to a whole number, then of its half.
    assert (np.abs(moved - np.clip(exact, 0, 255)) <= 0.75 + 1e-6).all()


def test_elementwise_product():
    grids = Affine(0.02, 10), Affine(1 / 256, 0), Affine(0.03, 40)
    a, b = np.meshgrid(np.arange(0, 256, 5), np.arange(0, 256, 5))
    real = 0.02 * (a - 10) * b / 256 / 0.03 + 40
    assert (np.abs(numerics.multiply_codes(a, b, *grids, -1000, 1000) - real) <= 0.5 + 1e-6).all()


def test_mean_of_codes():
    assert numerics.mean_codes([10 + 11 + 12 + 14, -10 - 11 - 12 - 13], 4).tolist() == [12, -12]
    assert numerics.mean_codes([7, -7, 3], [2, 2, 3]).tolist() == [4, -4, 1]


def test_accumulator_bound():
    s8 = (-127, 127)
    assert (
        numerics.accumulator_bound(66311, (0, 255), 0, s8)
        < 2**31
        <= numerics.accumulator_bound(66312, (0, 255), 0, s8)
    )
    full = (-128, 127)
    assert numerics.accumulator_bound(65793, (0, 255), 0, full) < 2**31
    assert numerics.accumulator_bound(65794, (0, 255), 0, full) >= 2**31
    # An int16 accumulator of 255 * 127 holds one term.
    assert (
        numerics.accumulator_bound(1, (0, 255), 0, s8)
        < 2**15
        <= numerics.accumulator_bound(2, (0, 255), 0, s8)
    )
    assert numerics.accumulator_bound(10, (0, 255), 128, (0, 255), 7, bias=-5) == 10 * 128 * 248 + 5


def test_accumulator_that_overflows_is_named():
    numerics.check_accumulator(2**31 - 1, "fc")
    message = (
        "^fc: its sums may reach 2147483648, more than an int32 accumulator holds; keep this layer in float$"
    )
    with pytest.raises(InputError, match=message):
        numerics.check_accumulator(2**31, "fc")
