import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fewbit import numerics
from fewbit.errors import InputError

settings.register_profile("calm", deadline=None, max_examples=60)
calm = settings.get_profile("calm")

reals = st.floats(-1e6, 1e6, width=32)
code_ranges = st.sampled_from([(0, 255), (-128, 127), (-127, 127), (0, 15), (-7, 7), (0, 3)])


@pytest.mark.parametrize(
    ("bits", "scale", "zero_point", "codes", "values"),
    [
        (8, 0.0156863, 64, [0, 0, 64, 96, 143, 255], [-1.003922, -1.003922, 0, 0.501961, 1.239216, 2.996078]),
        (4, 0.2666667, 4, [0, 0, 4, 6, 9, 15], [-1.066667, -1.066667, 0, 0.533333, 1.333333, 2.933333]),
    ],
)
def test_asymmetric_example(bits, scale, zero_point, codes, values):
    qmax = 2**bits - 1
    s, z = numerics.affine_parameters(-1, 3, 0, qmax)
    assert s == pytest.approx(scale, rel=1e-5) and z == zero_point
    assert s.dtype == np.float32
    q = numerics.quantize([-1.2, -1, 0, 0.5, 1.2345, 3], s, z, 0, qmax)
    assert q.tolist() == codes
    assert numerics.dequantize(q, s, z) == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize(("bits", "unrounded"), [(8, 63.75), (4, 3.75)])
def test_zero_point_before_rounding(bits, unrounded):
    s, z = numerics.affine_parameters(-1, 3, 0, 2**bits - 1)
    assert 1 / float(s) == pytest.approx(unrounded, rel=1e-6) and z == round(unrounded)


def test_nudged_range():
    s, z = numerics.affine_parameters(-1, 3, 0, 255)
    ends = numerics.dequantize(np.array([0, 255], np.uint8), s, z)
    assert ends == pytest.approx([-1.0039216, 2.9960784], abs=1e-6)


def test_range_is_widened_to_zero():
    assert numerics.affine_parameters(2.1, 3.5, 0, 255) == numerics.affine_parameters(0, 3.5, 0, 255)
    assert numerics.affine_parameters(-3.5, -2.1, 0, 255)[1] == 255


def test_range_of_zero():
    for qmin, qmax, zero_point in [(0, 255, 0), (-128, 127, 0), (5, 9, 5)]:
        s, z = numerics.affine_parameters(0, 0, qmin, qmax)
        assert (s, z) == (1.0, zero_point)
        assert numerics.quantize([0.0], s, z, qmin, qmax)[0] == zero_point
    assert numerics.symmetric_scale(0, 0, 127) == 1.0


def test_scale_has_a_floor():
    assert numerics.affine_parameters(0, 1e-30, 0, 255)[0] == np.float32(1e-12)
    assert numerics.symmetric_scale(0, 1e-30, 127) == np.float32(1e-12)


def test_symmetric_range_has_an_exact_middle():
    # -low / S is 127.5 here; it is worked out before S is rounded, so the tie always goes to the even 128.
    tops = np.random.default_rng(0).uniform(0.01, 100, 1000)
    assert (numerics.affine_parameters(-tops, tops, 0, 255)[1] == 128).all()


def test_symmetric_scale():
    assert numerics.symmetric_scale(-3, 1, 127) == np.float32(3 / 127)
    assert numerics.symmetric_scale(-0.5, 3, 255, signed=False) == np.float32(3 / 255)
    both = numerics.symmetric_scale([-1, -2], [0.5, 4], 7)
    assert both.tolist() == [np.float32(1 / 7), np.float32(4 / 7)]


@pytest.mark.parametrize("bad", [(float("nan"), 1), (0, float("nan")), (float("-inf"), 0), (0, float("inf"))])
def test_not_finite_range_is_named(bad):
    message = r"^conv1\.weight: its range is \[.*\], not finite; look for NaN or infinity"
    with pytest.raises(InputError, match=message):
        numerics.affine_parameters(*bad, 0, 255, name="conv1.weight")
    with pytest.raises(InputError, match=message):
        numerics.symmetric_scale(*bad, 127, name="conv1.weight")


def test_upside_down_range_is_named():
    with pytest.raises(
        InputError, match=r"^x: its range is \[3, 1\], upside down; give the smallest value first$"
    ):
        numerics.affine_parameters(3, 1, 0, 255, name="x")


W = np.array([[0.10, -0.05, 0.02, 0.08], [2, -1, 0.5, 1.5]])


def row_errors(codes, scale, axis=None):
    return ((W - numerics.dequantize(codes, scale, 0, axis)) ** 2).sum(axis=1)


def test_granularity_example_int8():
    s = numerics.symmetric_scale(W.min(), W.max(), 127)
    q = numerics.quantize(W, s, 0, -127, 127)
    assert s == pytest.approx(0.0157480, rel=1e-5)
    assert q.tolist() == [[6, -3, 1, 5], [127, -64, 32, 95]]
    assert row_errors(q, s) == pytest.approx([5.8e-5, 9.3e-5], rel=0.01)
    s = numerics.symmetric_scale(W.min(axis=1), W.max(axis=1), 127)
    q = numerics.quantize(W, s, 0, -127, 127, axis=0)
    assert s == pytest.approx([0.000787402, 0.0157480], rel=1e-5)
    assert q[0, [0, 2, 3]].tolist() == [127, 25, 102] and q[0, 1] in (-63, -64)


def test_granularity_example_int4():
    s = numerics.symmetric_scale(W.min(), W.max(), 7)
    q = numerics.quantize(W, s, 0, -7, 7)
    assert s == pytest.approx(0.2857143) and not q[0].any()
    assert row_errors(q, s)[0] == pytest.approx(0.0193)
    s = numerics.symmetric_scale(W.min(axis=1), W.max(axis=1), 7)
    q = numerics.quantize(W, s, 0, -7, 7, axis=0)
    assert s == pytest.approx([0.0142857, 0.2857143], rel=1e-5)
    assert q[0, [0, 2, 3]].tolist() == [7, 1, 6] and q[0, 1] in (-3, -4)
    assert row_errors(q, s, 0)[0] == pytest.approx(0.000116, rel=0.01)


@pytest.mark.parametrize(
    ("group", "scales", "error"), [(8, [0.571429], 0.197449), (4, [0.0285714, 0.571429], 0.122755)]
)
def test_group_example(group, scales, error):
    v = np.array([0.1, -0.2, 0.05, 0.15, 4, -3, 1, 2]).reshape(-1, group)
    s = numerics.symmetric_scale(v.min(axis=1), v.max(axis=1), 7)
    q = numerics.quantize(v, s, 0, -7, 7, axis=0)
    assert s == pytest.approx(scales, rel=1e-5)
    if group == 4:
        # 0.1 / (0.2 / 7) and 2 / (4 / 7) are ties of 3.5 but for the rounding of float32.
        assert q[0, 0] in (3, 4) and q[1, 3] in (3, 4)
        assert q.ravel()[1:7].tolist() == [-7, 2, 5, 7, -5, 2]
    assert ((v - numerics.dequantize(q, s, 0, axis=0)) ** 2).sum() == pytest.approx(error, rel=1e-4)


def test_bias():
    # Worked layer of the specification: S1 = 0.02, S2 = (0.01, 0.005).
    assert numerics.quantize_bias([0.5, -0.25], 0.02, [0.01, 0.005]).tolist() == [2500, -2500]
    codes = numerics.quantize_bias([1e9, -1e9], 1e-3, 1e-3)
    assert codes.dtype == np.int32 and codes.tolist() == [2**31 - 1, -(2**31)]
    with pytest.raises(InputError, match=r"^bias: has NaN, which has no code; look for NaN in the weights$"):
        numerics.quantize_bias([np.nan], 1, 1)


def test_fused_clamp():
    assert numerics.clamp_range(0, 6, 0.1, 100, 0, 255) == (100, 160)
    assert numerics.clamp_range(0, np.inf, 0.1, 100, 0, 255) == (100, 255)
    assert numerics.clamp_range(-np.inf, np.inf, 0.1, 100, 0, 255) == (0, 255)
    assert numerics.clamp_range(0, 6, 0.01, 100, 0, 255) == (100, 255)


def test_fold_batch_norm_example():
    w, b = numerics.fold_batch_norm([[0.5, -1]], [0.1], [2], [0.3], [0.4], [0.25], 1e-5)
    assert w[0] == pytest.approx([1.99996, -3.99992], abs=5e-6)
    assert b[0] == pytest.approx(-0.899976, abs=1e-6)
    assert w[0] @ [1, 2] + b[0] == pytest.approx(-6.899856, abs=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("with_bias", [True, False])
def test_fold_batch_norm_equals_batch_norm(axis, with_bias):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(5, 5, 1, 1))
    conv_bias = rng.normal(size=5) if with_bias else None
    gamma, beta, mean, variance = (
        rng.normal(size=5),
        rng.normal(size=5),
        rng.normal(size=5),
        rng.uniform(0.1, 2, 5),
    )
    folded, bias = numerics.fold_batch_norm(w, conv_bias, gamma, beta, mean, variance, 1e-5, axis)
    subscripts = "oikl,i->o" if axis == 0 else "iokl,i->o"
    x = rng.normal(size=5)
    plain = np.einsum(subscripts, w, x) + (0 if conv_bias is None else conv_bias)
    expected = gamma * (plain - mean) / np.sqrt(variance + 1e-5) + beta
    assert np.einsum(subscripts, folded, x) + bias == pytest.approx(expected, abs=1e-12)


def test_dynamic_example_per_sample():
    # The attacker's values do not depend on the victim's beside them; over the batch they would.
    attacker, first, second = [0.1, 0.37, -0.25, 0.9], [0.2, 1, -0.3, 0.5], [0.2, 4, -0.3, 0.5]
    seen = []
    for victim in (first, second):
        x = np.array([attacker, victim], np.float32)
        s, z = numerics.sample_parameters(x, 0, 255)
        seen.append(numerics.dequantize(numerics.quantize(x, s, z, 0, 255, axis=0), s, z, axis=0)[0])
    assert (seen[0] == seen[1]).all()
    assert seen[0] == pytest.approx([0.099216, 0.369804, -0.248039, 0.901961], abs=1e-6)
    whole = []
    for victim, expected in (
        (first, [0.101961, 0.372157, -0.249804, 0.902353]),
        (second, [0.101176, 0.370980, -0.252941, 0.893725]),
    ):
        x = np.array([attacker, victim], np.float32)
        s, z = numerics.affine_parameters(x.min(), x.max(), 0, 255)
        whole.append(numerics.dequantize(numerics.quantize(x, s, z, 0, 255), s, z)[0])
        assert whole[-1] == pytest.approx(expected, abs=1e-6)
    assert (whole[0] != whole[1]).any()


def test_dynamic_refuses_nan():
    with pytest.raises(InputError, match=r"^input: its range is .*not finite"):
        numerics.sample_parameters(np.array([[1.0, np.nan]], np.float32), 0, 255, name="input")


@pytest.mark.parametrize(
    ("qmin", "qmax", "dtype"),
    [(0, 255, np.uint8), (0, 3, np.uint8), (-128, 127, np.int8), (-7, 7, np.int8), (0, 65535, np.int32)],
)
def test_code_dtype(qmin, qmax, dtype):
    assert numerics.code_dtype(qmin, qmax) is dtype
    assert numerics.quantize([1.0], 1.0, 0, qmin, qmax).dtype == dtype


def test_ties_go_to_even():
    x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert numerics.quantize(x, 1, 0, -128, 127).tolist() == [-2, -2, 0, 0, 2, 2]
    # The tie is broken before the zero point is added.
    assert numerics.quantize(x, 1, 1, -128, 127).tolist() == [-1, -1, 1, 1, 3, 3]


def test_infinity_saturates_and_nan_is_refused():
    assert numerics.quantize([-np.inf, np.inf, 3e38], 1e-12, 7, 0, 255).tolist() == [0, 255, 255]
    with pytest.raises(
        InputError, match=r"^logits: has NaN, which has no code; look for NaN in the weights or"
    ):
        numerics.quantize([0, np.nan], 1, 0, 0, 255, name="logits")


def test_parameters_must_fit_the_axis():
    message = r"^w: has shape \(2, 3\) and parameters \(2,\) along axis 1; give one value, or one for each"
    with pytest.raises(InputError, match=message):
        numerics.quantize(np.zeros((2, 3)), [1.0, 2.0], 0, 0, 255, axis=1, name="w")
    with pytest.raises(InputError, match=r"along axis None"):
        numerics.quantize(np.zeros((2, 3)), [1.0, 2.0], 0, 0, 255)


def test_wide_codes_are_rounded_once():
    codes = np.array([2**24 + 1, -(2**31)], np.int32)
    expected = [
        np.float32((2**24 + 1) * np.float64(np.float32(0.1))),
        np.float32(-(2**31) * np.float64(np.float32(0.1))),
    ]
    assert numerics.dequantize(codes, 0.1, 0).tolist() == expected


@pytest.mark.parametrize(("bits", "decibels"), [(4, 22.92), (8, 48.10)])
def test_noise_of_a_uniform_signal(bits, decibels):
    x = np.random.default_rng(0).uniform(-1, 1, 400_000)
    qmax = 2 ** (bits - 1) - 1
    s = numerics.symmetric_scale(-1, 1, qmax)
    error = x - numerics.dequantize(numerics.quantize(x, s, 0, -qmax, qmax), s, 0)
    assert 10 * np.log10((x**2).sum() / (error**2).sum()) == pytest.approx(decibels, abs=0.03)
    assert (error**2).mean() == pytest.approx(float(s) ** 2 / 12, rel=0.01)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_six_decibels_a_bit(bits):
    # All 2^b levels of a full-scale uniform signal, each in the middle of its cell.
    x = np.random.default_rng(0).uniform(0, 1, 400_000)
    levels = 2**bits
    error = x - (np.floor(x * levels) + 0.5) / levels
    found = 10 * np.log10(((x - 0.5) ** 2).sum() / (error**2).sum())
    assert found == pytest.approx(6.0206 * bits, abs=0.02)
    s, z = numerics.affine_parameters(-0.5, 0.5 - 1 / levels, 0, levels - 1)
    codes = numerics.quantize(np.floor(x * levels) / levels - 0.5, s, z, 0, levels - 1)
    assert (codes == np.floor(x * levels)).all()


def test_rounding_up_to_a_power_of_two():
    scales = [1.0, 1.0000001, 1.1, 2 - 1e-9, 2.0, 3e-5, 0.3 / 7 * 7 / 0.3]
    assert numerics.round_up_to_power_of_two(scales).tolist() == [1, 1, 2, 2, 2, 2**-15, 1]
    for exponent in range(-40, 20):
        power = 2.0**exponent
        assert numerics.round_up_to_power_of_two(np.float32(power * 7) / np.float64(7)) == power
        assert numerics.round_up_to_power_of_two(power * 1.0001) == 2 * power
    s, z = numerics.affine_parameters([-1, 0, -3], [3, 0, 0], 0, 15, power_of_two=True)
    assert s.tolist() == [0.5, 1, 0.25] and z.tolist() == [2, 0, 12] and s.dtype == np.float32
    assert numerics.symmetric_scale([-1, 0], [3, 0.1], 7, power_of_two=True).tolist() == [0.5, 0.015625]


@calm
@given(reals, reals, code_ranges, arrays(np.float32, 40, elements=reals))
def test_quantizing_is_idempotent_monotone_and_near(one, two, codes, x):
    qmin, qmax = codes
    s, z = numerics.affine_parameters(min(one, two), max(one, two), qmin, qmax)
    x = np.sort(np.append(x, [0.0, one, two]).astype(np.float32))
    q = numerics.quantize(x, s, z, qmin, qmax)
    y = numerics.dequantize(q, s, z)
    assert q.min() >= qmin and q.max() <= qmax
    assert (np.diff(q.astype(int)) >= 0).all() and (np.diff(y) >= 0).all()
    assert (numerics.quantize(y, s, z, qmin, qmax) == q).all()
    assert (y[x == 0] == 0).all()
    low, high = numerics.dequantize(np.array([qmin, qmax], np.int32), s, z)
    inside = (x >= low) & (x <= high)
    # Half a step, and the rounding of float32 in x / S and (q - Z) S.
    assert (np.abs(x - y)[inside] <= s * (0.5 + 256 * 2**-23)).all()


@calm
@given(arrays(np.float32, (3, 8), elements=reals), code_ranges)
def test_symmetric_per_channel_holds_its_ends(w, codes):
    qmin, qmax = codes
    signed = qmin < 0
    w = w if signed else np.abs(w)
    s = numerics.symmetric_scale(w.min(axis=1), w.max(axis=1), qmax, signed)
    q = numerics.quantize(w, s, 0, -qmax if signed else 0, qmax, axis=0)
    y = numerics.dequantize(q, s, 0, axis=0)
    assert (np.abs(w - y) <= s[:, None] * (0.5 + 256 * 2**-23)).all()
    for row in range(3):
        assert (numerics.quantize(w[row], s[row], 0, -qmax if signed else 0, qmax) == q[row]).all()


@calm
@given(arrays(np.float32, (4, 6), elements=reals))
def test_sample_parameters_are_those_of_each_sample_alone(x):
    s, z = numerics.sample_parameters(x, 0, 255)
    for n in range(4):
        alone = numerics.sample_parameters(x[n : n + 1], 0, 255)
        assert (alone[0][0], alone[1][0]) == (s[n], z[n])
