from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fewbit import ops
from fewbit.load.capture import load
from onnx_files import OPSETS, SIZE, Weights, axes, card, f32, i64, kinds, make, node, read, run

# ------------------------------------------------------------------------------------------ operators

TAIL = ["GlobalAvgPool", "Flatten"]
CONV = f32(6, 4, 3, 3)
CASES: list[tuple[str, list[NodeProto], Weights, list[str], int]] = [
    (
        "Conv",
        [node("Conv", "x w c", pads=[1, 1, 1, 1], strides=[2, 2])],
        {"w": CONV, "c": f32(6)},
        ["Conv"],
        6,
    ),
    ("Conv dilated", [node("Conv", "x w", dilations=[2, 1])], {"w": CONV}, ["Conv"], 6),
    ("Conv grouped", [node("Conv", "x w", group=4)], {"w": f32(8, 1, 3, 3)}, ["Conv"], 8),
    ("Conv sides", [node("Conv", "x w", pads=[0, 1, 1, 2])], {"w": CONV}, ["Conv"], 6),
    (
        "Conv SAME_UPPER",
        [node("Conv", "x w", auto_pad="SAME_UPPER", strides=[2, 2])],
        {"w": CONV},
        ["Conv"],
        6,
    ),
    (
        "Conv SAME_LOWER",
        [node("Conv", "x w", auto_pad="SAME_LOWER", strides=[2, 2])],
        {"w": CONV},
        ["Conv"],
        6,
    ),
    ("Conv VALID", [node("Conv", "x w", auto_pad="VALID")], {"w": CONV}, ["Conv"], 6),
    (
        "ConvTranspose",
        [node("ConvTranspose", "x w c", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1], group=2)],
        {"w": f32(4, 3, 3, 3), "c": f32(6)},
        ["ConvTranspose"],
        6,
    ),
    (
        "BatchNormalization",
        [node("BatchNormalization", "x s t m v", epsilon=1e-3)],
        {"s": f32(4), "t": f32(4), "m": f32(4), "v": abs(f32(4))},
        ["BatchNorm"],
        4,
    ),
    ("Relu", [node("Relu", "x")], {}, ["Relu"], 4),
    ("Clip to 6", [node("Clip", "x lo hi")], {"lo": np.float32(0), "hi": np.float32(6)}, ["Clip"], 4),
    ("Clip from 0", [node("Clip", "x lo")], {"lo": np.float32(0)}, ["Relu"], 4),
    ("Clip to 1", [node("Clip", "x - hi")], {"hi": np.float32(0.5)}, ["Clip"], 4),
    (
        "Max and Min",
        [node("Max", "x lo", "a"), node("Min", "hi a")],
        {"lo": np.float32(0), "hi": f32(1)},
        ["Relu", "Clip"],
        4,
    ),
    ("Min of channels", [node("Min", "s x")], {"s": f32(1, 4, 1, 1)}, ["Min"], 4),
    ("LeakyRelu", [node("LeakyRelu", "x", alpha=0.3)], {}, ["LeakyRelu"], 4),
    ("PRelu", [node("PRelu", "x s")], {"s": f32(4, 1, 1)}, ["PRelu"], 4),
    ("PRelu shared", [node("PRelu", "x s")], {"s": f32(1)}, ["PRelu"], 4),
    ("Elu", [node("Elu", "x", alpha=0.5)], {}, ["Elu"], 4),
    ("Sigmoid", [node("Sigmoid", "x")], {}, ["Sigmoid"], 4),
    ("HardSigmoid of torch", [node("HardSigmoid", "x", alpha=1 / 6)], {}, ["HardSigmoid"], 4),
    ("HardSigmoid of ONNX", [node("HardSigmoid", "x")], {}, ["Affine", "Clip"], 4),
    ("Tanh", [node("Tanh", "x")], {}, ["Tanh"], 4),
    ("Softplus", [node("Softplus", "x")], {}, ["Softplus"], 4),
    ("Softmax", [node("Softmax", "x", axis=-1)], {}, ["Softmax"], 4),
    ("LogSoftmax", [node("LogSoftmax", "x", axis=3)], {}, ["LogSoftmax"], 4),
    ("Add", [node("Relu", "x", "a"), node("Add", "x a")], {}, ["Relu", "Add"], 4),
    ("Sum of three", [node("Sum", "x x x")], {}, ["Add", "Add"], 4),
    ("Sub from a constant", [node("Sub", "c x")], {"c": f32(4, 1, 1)}, ["Affine"], 4),
    ("Mul by a constant", [node("Mul", "c x")], {"c": f32(1, 4, 1, 1)}, ["Affine"], 4),
    ("Div by a constant", [node("Div", "x c")], {"c": np.float32(3)}, ["Affine"], 4),
    ("Div", [node("Sigmoid", "x", "a"), node("Div", "x a")], {}, ["Sigmoid", "Div"], 4),
    ("Neg", [node("Neg", "x")], {}, ["Affine"], 4),
    (
        "MatMul",
        [node("Transpose", "x", "a", perm=[0, 1, 3, 2]), node("MatMul", "x a")],
        {},
        ["Permute", "MatMul"],
        4,
    ),
    (
        "MatMul with a weight",
        [node("MatMul", "x w", "a"), node("Add", "a c")],
        {"w": f32(8, 5), "c": f32(5)},
        ["Linear"],
        4,
    ),
    (
        "a factor and a term behind Conv",
        [node("Conv", "x w", "a"), node("Mul", "a s", "d"), node("Add", "d t")],
        {"w": CONV, "s": f32(1, 6, 1, 1), "t": f32(6, 1, 1)},
        ["Conv"],
        6,
    ),
    ("Concat", [node("Relu", "x", "a"), node("Concat", "x a x", axis=1)], {}, ["Relu", "Concat"], 12),
    (
        "Concat with zeros",
        [node("Relu", "x", "a"), node("Gather", "a i", "d", axis=1), node("Concat", "d x", axis=1)],
        {"i": i64(0, 1)},
        ["Relu", "Slice", "Concat"],
        6,
    ),
    ("LRN", [node("LRN", "x", size=3, alpha=0.1, beta=0.6, bias=2.0)], {}, ["LRN"], 4),
    (
        "MaxPool",
        [node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])],
        {},
        ["MaxPool"],
        4,
    ),
    ("MaxPool without stride", [node("MaxPool", "x", kernel_shape=[2, 2])], {}, ["MaxPool"], 4),
    (
        "MaxPool ceil",
        [node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)],
        {},
        ["MaxPool"],
        4,
    ),
    ("MaxPool dilated", [node("MaxPool", "x", kernel_shape=[2, 2], dilations=[2, 3])], {}, ["MaxPool"], 4),
    (
        "MaxPool SAME",
        [node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")],
        {},
        ["MaxPool"],
        4,
    ),
    (
        "MaxPool end",
        [node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])],
        {},
        ["MaxPool"],
        4,
    ),
    ("AveragePool", [node("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1])], {}, ["AvgPool"], 4),
    (
        "AveragePool count",
        [node("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)],
        {},
        ["AvgPool"],
        4,
    ),
    (
        "AveragePool SAME",
        [node("AveragePool", "x", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")],
        {},
        ["AvgPool"],
        4,
    ),
    (
        "AveragePool sides",
        [node("AveragePool", "x", kernel_shape=[3, 3], pads=[0, 1, 1, 0], count_include_pad=1)],
        {},
        ["Pad", "AvgPool"],
        4,
    ),
    ("AveragePool of all", [node("AveragePool", "x", kernel_shape=[8, 8])], {}, ["GlobalAvgPool"], 4),
    ("GlobalMaxPool", [node("GlobalMaxPool", "x")], {}, ["MaxPool"], 4),
    ("Transpose", [node("Transpose", "x", perm=[0, 3, 1, 2])], {}, ["Permute"], 8),
    (
        "Transpose twice",
        [node("Transpose", "x", "a", perm=[0, 2, 3, 1]), node("Transpose", "a", perm=[0, 3, 1, 2])],
        {},
        [],
        4,
    ),
    (
        "Slice",
        [node("Slice", "x s e a t")],
        {"s": i64(1, -6), "e": i64(2**62, 7), "a": i64(1, 2), "t": i64(1, 2)},
        ["Slice"],
        3,
    ),
    ("Gather list", [node("Gather", "x i", axis=1)], {"i": i64(2, 1, 0)}, ["Slice"] * 3 + ["Concat"], 3),
    ("Pad", [node("Pad", "x p v")], {"p": i64(0, 1, 0, 2, 0, 0, 1, 0), "v": np.float32(0.5)}, ["Pad"], 5),
    ("Pad of nothing", [node("Pad", "x p")], {"p": i64(*[0] * 8)}, [], 4),
    (
        "Identity, Dropout, Cast",
        [node("Identity", "x", "a"), node("Dropout", "a", "d"), node("Cast", "d", to=1)],
        {},
        ["Dropout"],
        4,
    ),
    (
        "Resize",
        [
            node(
                "Resize",
                "x - s",
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
        ],
        {"s": np.array([1, 1, 2, 3], np.float32)},
        ["Upsample"],
        4,
    ),
    (
        "Expand",
        [
            node("Sigmoid", "x", "a"),
            node("GlobalAveragePool", "a", "d"),
            node("Shape", "x", "s"),
            node("Expand", "d s", "e"),
            node("Mul", "x e"),
        ],
        {},
        ["Sigmoid", "GlobalAvgPool", "Mul"],
        4,
    ),
]


@pytest.mark.parametrize(
    ("nodes", "weights", "expected", "classes"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_each_operator(
    nodes: list[NodeProto], weights: Weights, expected: list[str], classes: int, tmp_path: Path
) -> None:
    net = read(make(nodes, weights, path=tmp_path / "m.onnx"), classes)
    tail = kinds(net)[len(expected) :]
    assert kinds(net)[: len(expected)] == expected
    assert tail == TAIL


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("batch", ["n", 1, 5])
def test_operators_that_changed_between_opsets(opset: int, batch: int | str, tmp_path: Path) -> None:
    mean, mean_weights = axes("ReduceMean", "x", [2, 3], opset, 18, keepdims=0)
    unsqueeze, weights = axes("Unsqueeze", "b", [2, 3], opset, 13)
    unsqueeze.output[0] = "u"
    squeeze, more = axes("Squeeze", "r", [-1], opset, 13)
    squeeze.output[0] = "q"
    split = (
        node("Split", "x", "s1 s2", axis=1, split=[1, 3])
        if opset < 13
        else node("Split", "x lengths", "s1 s2", axis=1)
    )
    nodes = [
        mean,
        unsqueeze,
        split,
        node("Mul", "s2 s1", "m"),
        node("Concat", "m s1", "c", axis=1),
        node("Add", "c u", "a"),
        node("Shape", "a", "shape"),
        node("Gather", "shape zero", "count", axis=0),
        *(
            [node("Unsqueeze", "count", "counts", axes=[0])]
            if opset < 13
            else [node("Unsqueeze", "count zeros", "counts")]
        ),
        node("Concat", "counts rest", "target", axis=0),
        node("Reshape", "a target", "r"),
        squeeze,
        node("Softmax", "q", "sm", axis=1 if opset >= 13 else 2),
        node("ReduceSum", "sm", "mx", axes=[2], keepdims=0)
        if opset < 13
        else node("ReduceSum", "sm two", "mx", keepdims=0),
        node("Gemm", "mx w c4", "y", alpha=0.5, beta=2.0),
    ]
    constants = {
        "zero": np.int64(0),
        "zeros": i64(0),
        "rest": i64(4, -1, 1),
        "two": i64(2),
        "lengths": i64(1, 3),
    }
    used = {name for n in nodes for name in n.input}
    constants = {k: v for k, v in constants.items() if k in used}
    path = make(
        nodes,
        {**mean_weights, **weights, **more, **constants, "w": f32(4, 7), "c4": f32(1, 7)},
        opset,
        batch=batch,
        pool=False,
        path=tmp_path / "m.onnx",
    )
    net = read(path, 7, batch=batch if isinstance(batch, int) else 5)
    assert kinds(net)[:2] == ["GlobalAvgPool", "Flatten"]
    with torch.no_grad():
        images = torch.rand((4, *SIZE))
        alone = torch.cat([net(image[None]) for image in images])
        torch.testing.assert_close(net(images), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "opset", "attributes", "expected"),
    [
        ("HardSwish", 14, {}, "HardSwish"),
        ("Mish", 18, {}, "Mish"),
        ("Gelu", 20, {"approximate": "tanh"}, "Gelu"),
        ("Gelu", 20, {}, "Gelu"),
        ("Swish", 24, {}, "Silu"),
    ],
)
def test_operators_of_newer_opsets(
    kind: str, opset: int, attributes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    net = read(make([node(kind, "x", **attributes)], {}, opset, path=tmp_path / "m.onnx"), 4)
    assert kinds(net)[0] == expected


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_written_out_gelu_is_one_layer(opset: int, order: int, tmp_path: Path) -> None:
    start = [
        node("Div", "x r", "a") if order else node("Mul", "x q", "a"),
        node("Erf", "a", "e"),
        node("Add", "e o", "s"),
    ]
    ends = (
        [node("Mul", "x s", "m"), node("Mul", "m h")],
        [node("Mul", "x h", "m"), node("Mul", "m s")],
        [node("Mul", "s h", "m"), node("Mul", "m x")],
    )
    numbers = {"r": np.float32(2**0.5), "q": np.float32(2**-0.5), "o": np.float32(1), "h": np.float32(0.5)}
    used = {name for n in (*start, *ends[order]) for name in n.input}
    weights = {k: v for k, v in numbers.items() if k in used}
    net = read(make([*start, *ends[order]], weights, opset, path=tmp_path / "m.onnx"), 4)
    assert kinds(net) == ["Gelu", *TAIL]
    assert net.layers()[0].name == "the.Mul_b"


def test_written_out_layer_norm_is_one_layer(tmp_path: Path) -> None:
    nodes = [
        node("ReduceMean", "x", "m", axes=[-1]),
        node("Sub", "x m", "d"),
        node("Pow", "d two", "p"),
        node("ReduceMean", "p", "v", axes=[-1]),
        node("Add", "v eps", "e"),
        node("Sqrt", "e", "s"),
        node("Div", "d s", "n"),
        node("Mul", "n w", "g"),
        node("Add", "g c"),
    ]
    weights = {"two": np.float32(2), "eps": np.float32(1e-4), "w": f32(8), "c": f32(8)}
    net = read(make(nodes, weights, 13, path=tmp_path / "m.onnx"), 4)
    assert kinds(net) == ["LayerNorm", *TAIL]
    assert net.layers()[0].module.eps == pytest.approx(1e-4)


def test_layer_normalization(tmp_path: Path) -> None:
    nodes = [node("LayerNormalization", "x w c", axis=2)]
    net = read(make(nodes, {"w": f32(8, 8), "c": f32(8, 8)}, path=tmp_path / "m.onnx"), 4)
    assert kinds(net) == ["LayerNorm", *TAIL]


def test_clip_and_constants_in_nodes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["lo"], value_float=0.0),
        helper.make_node("Constant", [], ["hi"], value=numpy_helper.from_array(np.float32(6), "t")),
        node("Clip", "x lo hi"),
    ]
    net = read(make(nodes, path=tmp_path / "m.onnx"), 4)
    clip = net.layers()[0].module
    assert isinstance(clip, ops.Clip)
    assert (clip.low, clip.high) == (0.0, 6.0)


def test_file_in_the_form_of_tensorflow(tmp_path: Path) -> None:
    """NHWC input, transposes around, SAME padding, MatMul and Add."""
    nodes = [
        node("Transpose", "x", "t", perm=[0, 3, 1, 2]),
        node("Conv", "t w", "a", auto_pad="SAME_UPPER", strides=[2, 2]),
        node("Min", "a six", "m"),
        node("Transpose", "m", "u", perm=[0, 2, 3, 1]),
        node("ReduceMean", "u", "p", axes=[1, 2], keepdims=0),
        node("MatMul", "p v", "q"),
        node("Add", "q c", "z"),
        node("Softmax", "z", "y", axis=-1),
    ]
    weights = {"w": CONV, "six": np.float32(6), "v": f32(6, 5), "c": f32(5)}
    path = make(nodes, weights, 13, size=(9, 8, 4), pool=False, path=tmp_path / "m.onnx")
    net = load(card(path, 5, (4, 9, 8)))
    images = torch.rand(3, 4, 9, 8)
    with torch.no_grad():
        wanted = run(path, images.permute(0, 2, 3, 1).contiguous())
        np.testing.assert_allclose(net(images).numpy(), wanted, rtol=1e-4, atol=1e-6)
    assert kinds(net) == ["Conv", "Clip", "Permute", "Mean", "Linear", "Softmax"]


def test_names_come_from_the_nodes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="/layer1/conv/Conv"),
        helper.make_node("Relu", ["a"], ["r"], name="/layer1/conv/Conv/act"),
        helper.make_node("Relu", ["r"], ["s"], name="layer1.conv.Conv"),
        helper.make_node("Sigmoid", ["s"], ["b"]),
    ]
    net = read(make(nodes, {"w": CONV}, path=tmp_path / "m.onnx"), 6)
    names = [layer.name for layer in net.layers()]
    assert names == ["layer1.conv.Conv", "layer1.conv.Conv_act", "layer1.conv.Conv_1", "b", "pool", "flat"]


def test_weights_are_parameters(tmp_path: Path) -> None:
    norm = {"s": f32(6), "t": f32(6), "m": f32(6), "v": abs(f32(6))}
    nodes = [node("Conv", "x w c", "a"), node("BatchNormalization", "a s t m v")]
    net = read(make(nodes, {"w": CONV, "c": f32(6), **norm}, path=tmp_path / "m.onnx"), 6)
    assert len(dict(net.graph.named_parameters())) == 4
    net.train()(torch.rand(2, *SIZE)).sum().backward()
    assert all(p.grad is not None for p in net.graph.parameters())


def test_float16_weights_behind_casts(tmp_path: Path) -> None:
    nodes = [node("Cast", "h", "w", to=TensorProto.FLOAT), node("Conv", "x w")]
    net = read(make(nodes, {"h": CONV.astype(np.float16)}, path=tmp_path / "m.onnx"), 6)
    assert net.layers()[0].module.weight.dtype == torch.float32


def test_four_axes_of_logits_are_flattened(tmp_path: Path) -> None:
    path = make(
        [node("Conv", "x w", "a"), node("GlobalAveragePool", "a", "y")],
        {"w": CONV},
        pool=False,
        path=tmp_path / "m.onnx",
    )
    net = load(card(path, 6))
    assert kinds(net) == ["Conv", *TAIL]
    assert net(torch.rand(2, *SIZE)).shape == (2, 6)


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    function = helper.make_function(
        "mine",
        "Act",
        ["i"],
        ["o"],
        [helper.make_node("Sigmoid", ["i"], ["g"]), helper.make_node("Mul", ["i", "g"], ["o"])],
        [helper.make_opsetid("", 17)],
    )
    path = make([node("Relu", "x")], path=tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.node[0].CopyFrom(helper.make_node("Act", ["x"], ["b"], domain="mine"))
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.save(model, path)
    assert kinds(read(path, 4)) == ["Sigmoid", "Mul", *TAIL]
