"""Layers of codes against slow sums of Python integers, exactly, and against ONNX Runtime without fusing."""

import itertools

import numpy as np
import pytest
from onnx import TensorProto, helper

RNG = np.random.default_rng(0)


def slow_conv(x, w, strides, pads, dilations, groups):
    """Convolve centred codes, one Python integer at a time."""
    outputs, inner, *kernel = w.shape
    out = [
        (x.shape[2 + d] + pads[d] + pads[2 + d] - (kernel[d] - 1) * dilations[d] - 1) // strides[d] + 1
        for d in range(2)
    ]
    sums = np.zeros((len(x), outputs, *out), object)
    for n, o, i, j in np.ndindex(sums.shape):
        first = o // (outputs // groups) * inner
        for c, a, b in itertools.product(range(inner), range(kernel[0]), range(kernel[1])):
            row, column = (
                i * strides[0] + a * dilations[0] - pads[0],
                j * strides[1] + b * dilations[1] - pads[1],
            )
            if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                sums[n, o, i, j] += int(x[n, first + c, row, column]) * int(w[o, c, a, b])
    return sums


def rescaled(sums, x_scale, w_scale, bias=0.0):
    """The definition: float64, rounded once to float32."""
    unit = np.float64(np.float32(x_scale)) * np.asarray(w_scale, np.float32).astype(np.float64)
    channels = (1, -1, *[1] * (np.ndim(sums) - 2))
    return (np.asarray(sums, np.float64) * unit.reshape(channels) + np.reshape(bias, channels)).astype(
        np.float32
    )


CONVOLUTIONS = [
    # inputs, outputs, groups, kernel, strides, pads, dilations
    (3, 4, 1, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    (3, 4, 1, (3, 2), (2, 1), (0, 1, 2, 0), (1, 1)),
    (4, 6, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    (4, 6, 1, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1)),
    (4, 6, 2, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    (5, 5, 5, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    (3, 6, 3, (3, 3), (1, 1), (0, 1, 1, 0), (1, 2)),
]


def conv_file(File, case, x_zero, x_dtype, w_dtype, per_channel, bias):
    inputs, outputs, groups, kernel, strides, pads, dilations = case
    file = File(inputs, 7, 8)
    limits = np.iinfo(w_dtype)
    codes = RNG.integers(limits.min, limits.max + 1, (outputs, inputs // groups, *kernel)).astype(w_dtype)
    w_scale = RNG.uniform(0.001, 0.01, outputs).astype(np.float32) if per_channel else np.float32(0.004)
    zeros = (
        RNG.integers(100, 150, np.shape(w_scale)) if w_dtype == np.uint8 else np.zeros(np.shape(w_scale), int)
    )
    x_dq = file.grid("input", 0.03, x_zero, x_dtype)
    given = [x_dq, file.weight(codes, w_scale, 0, np.asarray(zeros, w_dtype))]
    b_codes = RNG.integers(-5000, 5000, outputs).astype(np.int32)
    b_floats = RNG.normal(size=outputs).astype(np.float32)
    if bias == "codes":
        unit = np.asarray(np.float32(0.03) * w_scale, np.float32)
        given.append(file.dequantize(file.constant(b_codes), unit, np.zeros(unit.shape), np.int32, axis=0))
    elif bias == "floats":
        given.append(file.constant(b_floats))
    geometry = {"strides": strides, "pads": pads, "dilations": dilations, "group": groups}
    out = file.node("Conv", *given, name="conv", kernel_shape=kernel, **geometry)
    centred = codes.astype(int) - np.reshape(zeros, (-1, 1, 1, 1))

    def expected(x):
        info = np.iinfo(x_dtype)
        q = np.clip(np.rint(x / np.float32(0.03)) + x_zero, info.min, info.max).astype(int) - x_zero
        sums = slow_conv(q, centred, strides, pads, dilations, groups)
        if bias == "codes":
            sums = sums + b_codes.astype(object).reshape(1, -1, 1, 1)
        return rescaled(sums, 0.03, w_scale, b_floats.astype(float) if bias == "floats" else 0.0)

    return file, out, expected


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize(
    ("x_zero", "x_dtype", "w_dtype", "per_channel", "bias"),
    [
        (0, np.uint8, np.int8, True, "codes"),
        (117, np.uint8, np.int8, True, "floats"),
        (-9, np.int8, np.int8, False, "codes"),
        (117, np.uint8, np.uint8, True, None),
        (117, np.uint8, np.uint8, False, "codes"),
    ],
)
def test_conv_is_the_exact_sum(File, tmp_path, case, x_zero, x_dtype, w_dtype, per_channel, bias):
    file, out, expected = conv_file(File, case, x_zero, x_dtype, w_dtype, per_channel, bias)
    x = RNG.normal(0, 2, (2, *file.shape)).astype(np.float32)
    got = file.open(tmp_path, out).run(x)
    assert got.dtype == np.float32 and (got == expected(x)).all()
    # ONNX Runtime sums floats instead.
    theirs = file.run_onnxruntime(x, out)[0]
    np.testing.assert_allclose(got, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    # Quantized, the two are one step apart at most, and seldom that.
    codes = file.quantize(out, float(np.abs(theirs).max()) / 127, 128)
    ours, theirs = file.open(tmp_path, codes).run_recorded(x)[codes], file.run_onnxruntime(x, codes)[0]
    apart = np.abs(ours.astype(int) - theirs.astype(int))
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_auto_pad(File, tmp_path, mode):
    file = File(3, 7, 8)
    w = file.constant(RNG.normal(size=(4, 3, 3, 4)), np.float32)
    out = file.node("Conv", "input", w, auto_pad=mode, strides=[2, 3])
    x = RNG.normal(size=(2, 3, 7, 8)).astype(np.float32)
    theirs = file.run_onnxruntime(x, out)[0]
    np.testing.assert_allclose(file.open(tmp_path, out).run(x), theirs, rtol=1e-5, atol=1e-5)


def test_weights_alone_in_codes_stay_float(File, tmp_path):
    file = File(3, 6, 6)
    codes, scale = RNG.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8), RNG.uniform(0.01, 0.02, 4)
    out = file.node("Conv", "input", file.weight(codes, scale), name="conv")
    x = RNG.normal(size=(2, 3, 6, 6)).astype(np.float32)
    session = file.open(tmp_path, out)
    np.testing.assert_allclose(session.run(x), file.run_onnxruntime(x, out)[0], rtol=1e-4, atol=1e-5)
    (operator,) = session.placement().float_matrix_operators()
    assert (operator.name, operator.precision) == ("conv", "float32")
    assert operator.why == "an input has no codes, or a scale that does not factor out"


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", ["codes", "floats", None])
def test_gemm(File, tmp_path, transposed, bias):
    file = File(20)
    codes, scale = (
        RNG.integers(-127, 128, (20, 6)).astype(np.int8),
        RNG.uniform(0.01, 0.02, 6).astype(np.float32),
    )
    b_codes, b_floats = RNG.integers(-999, 999, 6).astype(np.int32), RNG.normal(size=6).astype(np.float32)
    given = [file.grid("input", 0.02, 100)]
    given.append(file.weight(codes.T.copy() if transposed else codes, scale, 0 if transposed else 1))
    if bias == "codes":
        unit = np.float32(0.02) * scale
        given.append(file.dequantize(file.constant(b_codes), unit, np.zeros(6), np.int32, axis=0))
    elif bias == "floats":
        given.append(file.constant(b_floats))
    out = file.node("Gemm", *given, transB=transposed)
    x = RNG.normal(size=(3, 20)).astype(np.float32)
    q = np.clip(np.rint(x / np.float32(0.02)) + 100, 0, 255).astype(int) - 100
    sums = q @ codes.astype(int) + (b_codes if bias == "codes" else 0)
    session = file.open(tmp_path, out)
    got = session.run(x)
    assert (got == rescaled(sums, 0.02, scale, b_floats.astype(float) if bias == "floats" else 0.0)).all()
    assert not session.placement().float_matrix_operators()
    np.testing.assert_allclose(got, file.run_onnxruntime(x, out)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "attributes", [{"transB": 1}, {"transB": 1, "alpha": 0.5, "beta": 2.0}, {"transA": 1, "transB": 1}]
)
@pytest.mark.parametrize("integers", [True, False])
def test_gemm_in_other_forms(File, tmp_path, attributes, integers):
    file = File(20)
    x = file.grid("input", 0.02, 100) if integers else "input"
    x = file.node("Transpose", x, perm=[1, 0]) if "transA" in attributes else x
    w = file.weight(RNG.integers(-127, 128, (6, 20)).astype(np.int8), 0.02)
    out = file.node("Gemm", x, w, file.constant(RNG.normal(size=(3, 6)), np.float32), **attributes)
    batch = RNG.normal(size=(3, 20)).astype(np.float32)
    session = file.open(tmp_path, out)
    np.testing.assert_allclose(session.run(batch), file.run_onnxruntime(batch, out)[0], rtol=1e-4, atol=1e-4)
    assert session.placement().float_matrix_operators()  # a bias a row does not go into the sums


def test_matmul_and_transposed_weights(File, tmp_path):
    file = File(5, 20)
    codes, scale = (
        RNG.integers(-127, 128, (6, 20)).astype(np.int8),
        RNG.uniform(0.01, 0.02, 6).astype(np.float32),
    )
    weight = file.node("Transpose", file.weight(codes, scale), perm=[1, 0])
    out = file.node("MatMul", file.grid("input", 0.02, 100), weight)
    x = RNG.normal(size=(3, 5, 20)).astype(np.float32)
    q = np.clip(np.rint(x / np.float32(0.02)) + 100, 0, 255).astype(int) - 100
    unit = np.float64(np.float32(0.02)) * scale.astype(float)
    session = file.open(tmp_path, out)
    assert (session.run(x) == ((q @ codes.T.astype(int)) * unit).astype(np.float32)).all()
    assert session.placement().operators[-1].precision == "int8"


def test_matmul_of_two_activations(File, tmp_path):
    file = File(4, 6)
    a, b = file.grid("input", 0.02, 100), file.grid("input", 0.03, -3, np.int8)
    out = file.node("MatMul", a, file.node("Transpose", b, perm=[0, 2, 1]))
    x = RNG.normal(size=(3, 4, 6)).astype(np.float32)
    session = file.open(tmp_path, out)
    np.testing.assert_allclose(session.run(x), file.run_onnxruntime(x, out)[0], rtol=1e-4, atol=1e-5)
    assert session.placement().operators[-1].precision == "int8"


def test_matmul_of_float_activations(File, tmp_path):
    file = File(4, 6)
    out = file.node("MatMul", "input", file.node("Transpose", "input", perm=[0, 2, 1]))
    x = RNG.normal(size=(3, 4, 6)).astype(np.float32)
    np.testing.assert_allclose(
        file.open(tmp_path, out).run(x), x @ x.transpose(0, 2, 1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("integers", [True, False])
def test_conv_transpose(File, tmp_path, groups, integers):
    file = File(4, 5, 5)
    codes, scale = RNG.integers(-127, 128, (4, 3, 3, 2)).astype(np.int8), RNG.uniform(0.01, 0.02, 3)
    x = file.grid("input", 0.02, 100) if integers else "input"
    b = file.constant(RNG.normal(size=3 * groups), np.float32)
    geometry = {"strides": [2, 1], "pads": [1, 0, 1, 1], "output_padding": [1, 0], "group": groups}
    out = file.node("ConvTranspose", x, file.weight(codes, scale, 1), b, **geometry)
    batch = RNG.normal(size=(2, 4, 5, 5)).astype(np.float32)
    session = file.open(tmp_path, out)
    np.testing.assert_allclose(session.run(batch), file.run_onnxruntime(batch, out)[0], rtol=1e-4, atol=1e-4)
    assert session.placement().operators[-1].precision == ("int8" if integers else "float32")


def test_conv_integer_and_matmul_integer(File, tmp_path):
    file = File(3, 6, 6)
    codes, scale, zero = file.node("DynamicQuantizeLinear", "input", outputs=3)
    w = file.constant(RNG.integers(-127, 128, (4, 3, 3, 3)), np.int8)
    sums = file.node("ConvInteger", codes, w, zero, pads=[1, 1, 1, 1])
    flat = file.node("Reshape", codes, file.constant([0, -1], np.int64))
    b, b_zero = file.constant(RNG.integers(0, 256, (108, 5)), np.uint8), file.constant(7, np.uint8)
    product = file.node("MatMulInteger", flat, b, zero, b_zero)
    real = file.node("Mul", file.node("Cast", sums, to=TensorProto.FLOAT), scale)
    x = RNG.normal(size=(2, 3, 6, 6)).astype(np.float32)
    names = [codes, scale, zero, sums, product, real]
    for name, theirs in zip(names, file.run_onnxruntime(x, *names), strict=True):
        assert (file.open(tmp_path, name).run(x) == theirs).all(), name
    session = file.open(tmp_path, real)
    assert (session.run_recorded(x)[codes] == file.run_onnxruntime(x, codes)[0]).all()
    assert not session.placement().float_matrix_operators()


def test_dynamic_quantization_of_zeros(File, tmp_path):
    file = File(4)
    codes, scale, _ = file.node("DynamicQuantizeLinear", "input", outputs=3)
    x = np.zeros((1, 4), np.float32)
    assert (file.open(tmp_path, codes).run(x) == 0).all() and file.open(tmp_path, scale).run(x) == 1


def test_per_sample_quantization_of_a_conv(File, tmp_path):
    # QuantizeLinear along axis 0 with scales worked out in the graph: one grid a sample.
    file = File(3, 6, 6)
    top = file.node("ReduceMax", file.node("Abs", "input"), file.constant([1, 2, 3], np.int64), keepdims=0)
    scale = file.node("Div", top, file.constant(127, np.float32))
    zero = file.node("Cast", file.node("Mul", top, file.constant(0, np.float32)), to=TensorProto.INT8)
    codes = file.node("QuantizeLinear", "input", scale, zero, axis=0)
    weight = file.weight(RNG.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8), RNG.uniform(0.01, 0.02, 4))
    out = file.node("Conv", file.node("DequantizeLinear", codes, scale, zero, axis=0), weight, pads=[1] * 4)
    x = (RNG.normal(size=(3, 3, 6, 6)) * [[[[1]]], [[[5]]], [[[0.1]]]]).astype(np.float32)
    session = file.open(tmp_path, out)
    got = session.run(x)
    assert session.placement().operators[-1].precision == "int8"
    np.testing.assert_allclose(got, file.run_onnxruntime(x, out)[0], rtol=1e-4, atol=1e-4)
    other = x.copy()
    other[1:] *= 100
    assert (session.run(other)[0] == got[0]).all() and (session.run(x[:1])[0] == got[0]).all()


@pytest.mark.parametrize(
    ("dtype", "top"), [(np.uint8, 255), (np.int8, 127), (np.uint16, 65535), (np.int16, 32767)]
)
def test_quantizers_equal_onnxruntime(File, tmp_path, dtype, top):
    file = File(4, 50)
    scales = [0.1, 0.37, 3.0, 0.001]
    codes = file.quantize("input", scales, [0, 1, 5, top], dtype, axis=1)
    real = file.dequantize(codes, scales, [0, 1, 5, top], dtype, axis=1)
    x = RNG.normal(0, 30, (2, 4, 50)).astype(np.float32)
    x[0, 0, :4] = [0.05, 0.15, -0.05, 1e9]
    session = file.open(tmp_path, real)
    theirs = file.run_onnxruntime(x, codes, real)
    assert (session.run_recorded(x)[codes] == theirs[0]).all() and (session.run(x) == theirs[1]).all()


def test_quantizing_again_on_another_grid(File, tmp_path):
    file = File(60)
    first = file.grid("input", 0.1, 100)
    same, other = file.quantize(first, 0.1, 100), file.quantize(first, 0.17, -3, np.int8)
    x = RNG.normal(0, 10, (2, 60)).astype(np.float32)
    for name, theirs in zip([same, other], file.run_onnxruntime(x, same, other), strict=True):
        assert (file.open(tmp_path, name).run_recorded(x)[name] == theirs).all()


def int4_file(File, codes):
    file = File(8)
    file.constants.append(helper.make_tensor("w4", TensorProto.INT4, codes.shape, codes.ravel().tolist()))
    return file


def test_int4_weights(File, tmp_path):
    codes, scale = RNG.integers(-8, 8, (8, 3)), RNG.uniform(0.1, 0.2, 3).astype(np.float32)
    file = int4_file(File, codes)
    weight = file.node("DequantizeLinear", "w4", file.constant(scale), axis=1)
    out = file.node("MatMul", file.grid("input", 0.02, 100), weight)
    x = RNG.normal(size=(2, 8)).astype(np.float32)
    session = file.open(tmp_path, out)
    np.testing.assert_allclose(session.run(x), file.run_onnxruntime(x, out)[0], rtol=1e-4, atol=1e-5)
    assert not session.placement().float_matrix_operators()


def test_weights_in_blocks_are_floats(File, tmp_path):
    codes, scale = RNG.integers(-8, 8, (8, 3)), RNG.uniform(0.1, 0.2, (2, 3)).astype(np.float32)
    file = int4_file(File, codes)
    weight = file.node("DequantizeLinear", "w4", file.constant(scale), axis=0, block_size=4)
    out = file.node("MatMul", file.grid("input", 0.02, 100), weight)
    x = RNG.normal(size=(2, 8)).astype(np.float32)
    session = file.open(tmp_path, out)
    np.testing.assert_allclose(session.run(x), file.run_onnxruntime(x, out)[0], rtol=1e-4, atol=1e-5)
    assert len(session.placement().float_matrix_operators()) == 1


def test_activations_of_four_bits(File, tmp_path):
    file = File(50)
    scale, zero = file.constant(0.2, np.float32), "z4"
    file.constants.append(helper.make_tensor("z4", TensorProto.UINT4, [], [5]))
    codes = file.node("QuantizeLinear", "input", scale, zero)
    out = file.node("DequantizeLinear", codes, scale, zero)
    x = RNG.normal(0, 3, size=(2, 50)).astype(np.float32)
    session = file.open(tmp_path, out)
    assert (session.run(x) == file.run_onnxruntime(x, out)[0]).all()
    recorded = session.run_recorded(x)[codes]
    assert recorded.min() == 0 and recorded.max() == 15
