from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fewbit.engines.exported import ExportedGraph, image_size
from fewbit.errors import EngineError


def exported(net: Any, tmp_path: Path) -> ExportedGraph:
    """Read back what a builder made, unfinished as it is."""
    graph = helper.make_graph(
        net.nodes, "part", [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info(net.nodes[-1].output[0], TensorProto.FLOAT, None)], net.constants,
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "part.onnx")
    return ExportedGraph(tmp_path / "part.onnx")


def test_names_are_found_through_what_engines_append(builder: Any, tmp_path: Path) -> None:
    net = builder()
    net.node("Relu", [net.conv("input", "block/conv", (3, 4))], "relu")
    graph = exported(net, tmp_path)
    assert graph.find("block/conv") == "block/conv"
    assert graph.find("block/conv_token_12") == "block/conv"
    assert graph.find("relu_out_nchwc") == "relu"
    assert graph.find("block/conv/WithoutBiases/DequantizationMultiply") == "block/conv"
    assert graph.find("Multiply_1234") is None
    assert graph.find("") is None


def test_a_residual_sum_belongs_to_the_later_of_its_producers(builder: Any, tmp_path: Path) -> None:
    net = builder()
    first = net.node("Relu", [net.conv("input", "first", (3, 3))], "relu1")
    second = net.conv(first, "second", (3, 3))
    net.node("Relu", [net.node("Add", [first, second], "add")], "relu2")
    graph = exported(net, tmp_path)
    kinds = ["ReorderInput", "Conv", "Conv", "ReorderOutput"]
    tokens = [["x"], ["relu1_out_nchwc"], ["second_nchwc"], ["ReorderOutput", "relu2_out"]]
    assert graph.owners(kinds, tokens) == [(), ("first", "relu1"), ("second", "add", "relu2"), ()]


def test_a_node_without_a_name_is_called_after_its_output(builder: Any, tmp_path: Path) -> None:
    net = builder()
    net.node("Relu", ["input"], "relu")
    net.nodes[0].name = ""
    assert list(exported(net, tmp_path).nodes) == ["relu_out"]


def reason(net: Any, tmp_path: Path, name: str = "conv") -> str:
    return exported(net, tmp_path).why_float(name)


def quantized_conv(net: Any) -> str:
    value = net.grid("input", "input", 0.1, 128)
    return net.conv(value, "conv", (3, 4), scale=0.1)


def test_reasons_of_convolutions(builder: Any, tmp_path: Path) -> None:
    net = builder()
    net.grid(quantized_conv(net), "conv", 0.1, 128)
    assert reason(net, tmp_path) == ""

    net = builder()
    net.conv(net.grid("input", "input", 0.1, 128), "conv", (3, 4))
    assert reason(net, tmp_path) == "its weights are not quantized"

    net = builder()
    value = net.grid("input", "input", 0.1, 128)
    weights, _ = net.weights("conv", (4, 3, 3, 3), 0.1)
    net.node("Conv", [value, weights, net.constant("bias", np.zeros(4, np.float32))], "conv")
    assert reason(net, tmp_path) == "its bias is float"

    net = builder()
    quantized_conv(net)
    assert reason(net, tmp_path) == "no QuantizeLinear after it"

    net = builder()
    value = quantized_conv(net)
    net.node("HardSigmoid", [value], "gate")
    net.grid(value, "conv", 0.1, 128)
    assert reason(net, tmp_path) == "its output is read in float too"

    net = builder()
    limits = [net.node("Constant", [], "zero", value=onnx.numpy_helper.from_array(np.float32(0)))]
    limits.append(net.node("Constant", [], "six", value=onnx.numpy_helper.from_array(np.float32(6))))
    net.grid(net.node("Clip", [quantized_conv(net), *limits], "clip"), "clip", 6.5 / 255, 0)
    assert (
        reason(net, tmp_path)
        == "the Clip after it stays, because its QuantizeLinear reaches 6.5, above the Clip's 6"
    )


def test_reasons_of_other_operators(builder: Any, tmp_path: Path) -> None:
    net = builder()
    value = net.grid("input", "input", 0.1, 128)
    net.grid(net.node("HardSigmoid", [value], "gate"), "gate", 0.1, 0)
    assert reason(net, tmp_path, "gate") == "the engine took no integer kernel for this HardSigmoid"

    net = builder()
    value = net.grid("input", "input", 0.1, 128)
    net.node("Sigmoid", [value], "gate")
    assert reason(net, tmp_path, "gate") == "no QuantizeLinear after it"

    net = builder()
    value = net.grid("input", "input", 0.1, 128)
    net.node("Mul", [value, net.node("Sigmoid", [value], "gate")], "mul")
    assert reason(net, tmp_path, "mul") == "its input gate_out is not quantized"
    assert reason(net, tmp_path, "gate") == "no QuantizeLinear after it"

    net = builder()
    codes = net.node(
        "QuantizeLinear", ["input", net.constant("s", np.float32(0.1)), net.constant("z", np.uint8(128))], "q"
    )
    net.node("ConvInteger", [codes, net.constant("w", np.ones((4, 3, 3, 3), np.int8))], "conv")
    assert reason(net, tmp_path) == "the engine has no integer kernel for ConvInteger"


def test_only_quantizers(builder: Any, tmp_path: Path) -> None:
    net = builder()
    net.node("Relu", [net.grid("input", "input", 0.1, 128)], "relu")
    graph = exported(net, tmp_path)
    assert graph.only_quantizes(["input_q"]) == "QuantizeLinear"
    assert graph.only_quantizes(["Subtract_7", "input_dq"]) == "DequantizeLinear"
    assert graph.only_quantizes(["input_dq", "relu"]) == ""
    assert graph.only_quantizes([]) == ""


def test_image_size(files: dict[str, Path], tmp_path: Path) -> None:
    assert image_size(files["float"]) == (3, 16, 16)
    free = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, "H", "W"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["y"])], "g", [free], [out])
    onnx.save(helper.make_model(graph), tmp_path / "free.onnx")
    with pytest.raises(
        EngineError, match=r"^free.onnx: its input input has no fixed image size; export it with one$"
    ):
        image_size(tmp_path / "free.onnx")
