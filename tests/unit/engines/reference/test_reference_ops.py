"""Operators that move, select or map values, against ONNX Runtime."""

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

RNG = np.random.default_rng(0)


def test_codes_pass_through_what_only_moves_them(File, tmp_path):
    file = File(4, 6, 6)
    x = file.grid("input", 0.05, 90)
    x = file.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, pads=[1, 1, 0, 0])
    x = file.node("Pad", x, file.constant([0, 0, 1, 0, 0, 0, 0, 1], np.int64))
    x = file.node("Concat", x, file.node("Identity", x), axis=1)
    x = file.node(
        "Transpose", file.node("Reshape", x, file.constant([0, 2, 4, -1], np.int64)), perm=[0, 2, 1, 3]
    )
    out = file.quantize(x, 0.05, 90)
    batch = RNG.normal(0, 3, (2, 4, 6, 6)).astype(np.float32)
    session = file.open(tmp_path, out)
    recorded = session.run_recorded(batch)[out]
    assert recorded.dtype == np.uint8 and (recorded == file.run_onnxruntime(batch, out)[0]).all()
    assert {o.precision for o in session.placement().operators} == {"int8"}


def test_concat_of_two_grids(File, tmp_path):
    file = File(4, 3, 3)
    out = file.node("Concat", file.grid("input", 0.05, 90), file.grid("input", 0.02, 10), axis=1)
    x = RNG.normal(size=(2, 4, 3, 3)).astype(np.float32)
    assert (file.open(tmp_path, out).run(x) == file.run_onnxruntime(x, out)[0]).all()


def test_pad_by_another_value_is_float(File, tmp_path):
    file = File(1, 2, 2)
    fill, axes = file.constant(0.33, np.float32), file.constant([2, 3])
    out = file.node("Pad", file.grid("input", 0.5, 9), file.constant([1] * 4, np.int64), fill, axes)
    x = RNG.normal(size=(1, 1, 2, 2)).astype(np.float32)
    got = file.open(tmp_path, out).run(x)
    assert (got == file.run_onnxruntime(x, out)[0]).all() and got[0, 0, 0, 0] == np.float32(0.33)


ONE_INPUT = {
    "Relu": {},
    "LeakyRelu": {"alpha": 0.2},
    "Elu": {"alpha": 1.5},
    "Sigmoid": {},
    "HardSigmoid": {"alpha": 1 / 6, "beta": 0.5},
    "HardSwish": {},
    "Tanh": {},
    "Erf": {},
    "Gelu": {},
    "Mish": {},
    "Softplus": {},
    "Softmax": {"axis": 1},
    "LogSoftmax": {"axis": 1},
    "Exp": {},
    "Abs": {},
    "Neg": {},
    "Round": {},
    "Floor": {},
    "Ceil": {},
    "GlobalAveragePool": {},
    "GlobalMaxPool": {},
    "LRN": {"size": 5, "alpha": 0.01, "beta": 0.75, "bias": 2.0},
    "Flatten": {},
    "Identity": {},
    "Shape": {"start": 1},
    "DepthToSpace": {"blocksize": 2},
}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", ONE_INPUT)
def test_operator_of_one_input(File, tmp_path, kind, quantized):
    file = File(4, 4, 5, opset=22)
    x = file.grid("input", 0.04, 131) if quantized else "input"
    out = file.node(kind, x, **ONE_INPUT[kind])
    batch = RNG.normal(0, 3, (2, 4, 4, 5)).astype(np.float32)
    theirs = file.run_onnxruntime(batch, out)[0]
    np.testing.assert_allclose(file.open(tmp_path, out).run(batch), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Sum"])
def test_operator_of_two_inputs(File, tmp_path, kind):
    file = File(4, 4, 5)
    x = file.node("Abs", file.grid("input", 0.04, 131))
    out = file.node(kind, x, file.constant(RNG.uniform(0.5, 2, (4, 1, 1)), np.float32))
    batch = RNG.normal(size=(2, 4, 4, 5)).astype(np.float32)
    theirs = file.run_onnxruntime(batch, out)[0]
    np.testing.assert_allclose(file.open(tmp_path, out).run(batch), theirs, rtol=1e-6)


def with_constants(file):
    """Operators with constants beside the input, and shapes worked out in the graph."""
    c = file.constant
    positive = file.node("Exp", "input")
    statistics = [c(RNG.uniform(0.5, 2, 4), np.float32) for _ in range(4)]
    sizes = file.node("Shape", "input")
    batch = file.node("Gather", sizes, c(0))
    wanted = file.node("Concat", file.node("Unsqueeze", batch, c([0])), c([-1]), axis=0)
    half = file.node("Div", file.node("Gather", sizes, c(1)), c(2))
    ones = file.node("ConstantOfShape", sizes, value=numpy_helper.from_array(np.ones(1, np.float32)))
    zero = file.node("Constant", value_float=0.0)
    yield file.node("Clip", "input", c(-0.5, np.float32), c(0.7, np.float32))
    yield file.node("Clip", "input", "", c(0.7, np.float32))
    yield file.node("PRelu", "input", c(RNG.uniform(0, 1, (4, 1, 1)), np.float32))
    yield file.node("BatchNormalization", "input", *statistics, epsilon=1e-3)
    yield file.node(
        "LayerNormalization", "input", c(RNG.normal(size=7), np.float32), c(np.ones(7), np.float32)
    )
    yield file.node("Reshape", "input", wanted)
    yield file.node("Reshape", "input", c([0, 2, -1]))
    yield file.node("Slice", "input", c([0]), file.node("Unsqueeze", half, c([0])), c([1]))
    yield file.node("Slice", "input", c([-1, 4]), c([-100, 0]), c([2, 3]), c([-2, -1]))
    yield file.node("Slice", "input", c([1, 0]), c([2**40, -1]), c([1, -1]))
    yield from file.node("Split", "input", c([1, 3]), outputs=2, axis=1)
    yield from file.node("Split", "input", outputs=4, axis=3, num_outputs=4)
    yield file.node("Gather", "input", c([[2, 0], [-1, 1]]), axis=1)
    yield file.node("Squeeze", file.node("ReduceMax", "input", c([2, 3])), c([2, 3]))
    yield file.node("ReduceMean", "input", c([-1, 1]), keepdims=0)
    yield file.node("ReduceMean", "input", noop_with_empty_axes=1)
    yield file.node("ReduceSum", "input", c([1]))
    yield file.node("ReduceMin", "input")
    yield file.node("Expand", file.node("ReduceMean", "input", c([2])), sizes)
    yield file.node("Tile", "input", c([1, 2, 1, 3]))
    yield file.node("Where", file.node("Greater", "input", zero), "input", ones)
    yield file.node("Where", file.node("Not", file.node("Less", "input", zero)), ones, "input")
    yield file.node("Cast", "input", to=TensorProto.INT32)
    yield file.node("Cast", file.node("Equal", ones, ones), to=TensorProto.UINT8)
    yield file.node("Dropout", "input")
    yield file.node("Sqrt", positive)
    yield file.node("Log", positive)
    yield file.node("Reciprocal", positive)
    yield file.node("Gelu", "input", approximate="tanh")
    yield file.node("DepthToSpace", "input", blocksize=2, mode="CRD")
    yield file.node("Pad", "input", c([0, 0, 1, 2, 0, 0, 2, 1]), mode="reflect")
    yield file.node("Pad", "input", c([0, 0, 1, 2, 0, 0, 2, 1]), mode="edge")


def test_operators_with_constants(File, tmp_path):
    file = File(4, 4, 7)
    names = list(with_constants(file))
    x = RNG.normal(size=(3, 4, 4, 7)).astype(np.float32)
    for name, theirs in zip(names, file.run_onnxruntime(x, *names), strict=True):
        got = file.open(tmp_path, name).run(x)
        assert got.shape == theirs.shape, name
        np.testing.assert_allclose(got, theirs, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("opset", [13, 17])
def test_older_opsets_take_axes_as_attributes(File, tmp_path, opset):
    file = File(4, 4, 6, opset=opset)
    names = [
        file.node("ReduceMean", "input", axes=[2, 3], keepdims=0),
        file.node("ReduceMax", "input", axes=[1]),
        file.node("Split", "input", outputs=2, axis=1)[1],
    ]
    x = RNG.normal(size=(3, 4, 4, 6)).astype(np.float32)
    for name, theirs in zip(names, file.run_onnxruntime(x, *names), strict=True):
        np.testing.assert_allclose(file.open(tmp_path, name).run(x), theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize("pads", [[0] * 4, [1, 0, 0, 1]])
def test_pools(File, tmp_path, include, ceil, pads):
    file = File(2, 7, 8)
    geometry = {"kernel_shape": [3, 2], "strides": [2, 2], "pads": pads, "ceil_mode": ceil}
    mean = file.node("AveragePool", file.grid("input", 0.05, 90), count_include_pad=include, **geometry)
    top = file.node("MaxPool", file.grid("input", 0.05, 90), **geometry)
    x = RNG.normal(size=(2, 2, 7, 8)).astype(np.float32)
    theirs = file.run_onnxruntime(x, mean, top)
    np.testing.assert_allclose(file.open(tmp_path, mean).run(x), theirs[0], rtol=1e-6, atol=1e-6)
    assert (file.open(tmp_path, top).run(x) == theirs[1]).all()


@pytest.mark.parametrize("frame", ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"])
@pytest.mark.parametrize("nearest", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_resize(File, tmp_path, frame, nearest):
    file = File(2, 4, 5)
    settings = {"coordinate_transformation_mode": frame, "nearest_mode": nearest}
    by_scale = file.node("Resize", "input", "", file.constant([1, 1, 2, 1.5], np.float32), **settings)
    by_size = file.node("Resize", "input", "", "", file.constant([1, 2, 3, 10]), **settings)
    x = RNG.normal(size=(1, 2, 4, 5)).astype(np.float32)
    for name, theirs in zip([by_scale, by_size], file.run_onnxruntime(x, by_scale, by_size), strict=True):
        assert (file.open(tmp_path, name).run(x) == theirs).all()
