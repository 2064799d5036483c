"""Small networks as .onnx files, written node by node, that the tests of the engines share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

OUTPUT_STEP = 4 / 127


class Graph:
    """A file being written: each method adds a node and gives the name of its output."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(seed)

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def grid(self, x: str, name: str, scale: float, zero_point: int, dtype: Any = np.uint8) -> str:
        s, z = self.constant(f"{name}_s", np.float32(scale)), self.constant(f"{name}_z", dtype(zero_point))
        q = self.node("QuantizeLinear", [x, s, z], f"{name}_q")
        return self.node("DequantizeLinear", [q, s, z], f"{name}_dq")

    def weights(self, name: str, shape: tuple[int, ...], x_scale: float | None) -> list[str]:
        """Weight and bias: floats without a scale, else codes with their DequantizeLinear."""
        w = (self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        b = (self.rng.standard_normal(shape[0]) * 0.1).astype(np.float32)
        if x_scale is None:
            return [self.constant(f"{name}_w", w), self.constant(f"{name}_b", b)]
        scales = (np.abs(w).reshape(shape[0], -1).max(1) / 127).astype(np.float32)
        codes = np.clip(np.rint(w / scales.reshape(-1, *[1] * (w.ndim - 1))), -127, 127).astype(np.int8)
        unit = (scales * np.float32(x_scale)).astype(np.float32)
        return [
            self.dequantized(f"{name}_w", codes, scales),
            self.dequantized(f"{name}_b", np.rint(b / unit).astype(np.int32), unit),
        ]

    def dequantized(self, name: str, codes: np.ndarray, scales: np.ndarray) -> str:
        inputs = [
            self.constant(f"{name}_codes", codes),
            self.constant(f"{name}_scales", scales),
            self.constant(f"{name}_zeros", np.zeros(len(scales), codes.dtype)),
        ]
        return self.node("DequantizeLinear", inputs, f"{name}_dq", axis=0)

    def conv(
        self,
        x: str,
        name: str,
        shape: tuple[int, int],
        k: int = 3,
        group: int = 1,
        scale: float | None = None,
    ) -> str:
        inputs, outputs = shape
        given = self.weights(name, (outputs, inputs // group, k, k), scale)
        return self.node("Conv", [x, *given], name, kernel_shape=[k, k], pads=[k // 2] * 4, group=group)

    def classifier(self, x: str, inputs: int, scale: float | None = None) -> str:
        return self.node("Gemm", [x, *self.weights("fc", (10, inputs), scale)], "fc", transB=1)

    def write(self, path: Path, batch: int | str) -> Path:
        self.nodes[-1].output[0] = "logits"
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 16, 16])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        return path


def write_float(path: Path, batch: int | str = "N") -> Path:
    g = Graph()
    x = g.node("Relu", [g.conv("input", "conv1", (3, 16))], "relu1")
    x = g.node("Relu", [g.conv(x, "dw", (16, 16), group=16)], "relu_dw")
    x = g.node("Flatten", [g.node("GlobalAveragePool", [x], "gap")], "flat")
    g.classifier(x, 16)
    return g.write(path, batch)


def write_int8(path: Path, batch: int | str = "N") -> Path:
    g = Graph()
    x = g.grid("input", "in", 4 / 127, 128)
    x = g.node("Relu", [g.conv(x, "conv1", (3, 16), scale=4 / 127)], "relu1")
    shortcut = x = g.grid(x, "r1", 3 / 255, 0)
    x = g.node("Relu", [g.conv(x, "dw", (16, 16), group=16, scale=3 / 255)], "relu_dw")
    x = g.grid(x, "r2", 3 / 255, 0)
    x = g.grid(g.conv(x, "pw", (16, 16), k=1, scale=3 / 255), "r3", 4 / 127, 128)
    x = g.node("Relu", [g.node("Add", [x, shortcut], "add")], "relu_add")
    x = g.grid(x, "r4", 5 / 255, 0)
    branch = g.node("Relu", [g.conv(x, "branch", (16, 8), k=1, scale=5 / 255)], "relu_branch")
    x = g.node("Concat", [x, g.grid(branch, "r5", 5 / 255, 0)], "concat", axis=1)
    x = g.grid(x, "r6", 5 / 255, 0)
    x = g.grid(g.node("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2]), "r7", 5 / 255, 0)
    x = g.grid(g.node("GlobalAveragePool", [x], "gap"), "r8", 3 / 255, 0)
    x = g.grid(g.node("Flatten", [x], "flat"), "r9", 3 / 255, 0)
    g.grid(g.classifier(x, 24, scale=3 / 255), "out", OUTPUT_STEP, 128)
    return g.write(path, batch)


def write_mixed(path: Path, batch: int | str = "N") -> Path:
    """A file of which ONNX Runtime leaves five convolutions in float, each for another reason."""
    g = Graph()
    x = g.grid("input", "in", 4 / 127, 128)
    x = g.node("Relu", [g.conv(x, "symmetric", (3, 16), scale=4 / 127)], "relu1")
    x = g.grid(x, "r1", 3 / 127, 0, np.int8)
    bounds = [g.constant("low", np.float32(0)), g.constant("high", np.float32(6))]
    x = g.node("Clip", [g.conv(x, "wide", (16, 16), scale=3 / 127), *bounds], "clip")
    x = g.grid(x, "r2", 7 / 255, 0)
    x = g.node("Relu", [g.conv(x, "open", (16, 16), scale=7 / 255)], "relu2")
    codes = g.rng.integers(-127, 128, (16, 16, 1, 1)).astype(np.int8)
    weight = g.dequantized("weights_only_w", codes, np.full(16, 0.002, np.float32))
    x = g.node("Conv", [x, weight], "weights_only", kernel_shape=[1, 1])
    x = g.conv(x, "plain", (16, 16), k=1)
    x = g.node("Flatten", [g.node("GlobalAveragePool", [x], "gap")], "flat")
    x = g.grid(x, "r3", 3 / 255, 0)
    g.grid(g.classifier(x, 16, scale=3 / 255), "out", OUTPUT_STEP, 128)
    return g.write(path, batch)


@pytest.fixture(scope="session")
def builder() -> type[Graph]:
    """The class that writes a file node by node."""
    return Graph


@pytest.fixture(scope="session")
def write_net() -> dict[str, Callable[..., Path]]:
    """What writes each network: ``write_net["float"](path, batch="N")``."""
    return {"float": write_float, "int8": write_int8, "mixed": write_mixed}


@pytest.fixture(scope="session")
def files(
    tmp_path_factory: pytest.TempPathFactory, write_net: dict[str, Callable[..., Path]]
) -> dict[str, Path]:
    """The networks as files with an open batch."""
    folder = tmp_path_factory.mktemp("engines")
    return {name: write(folder / f"{name}.onnx") for name, write in write_net.items()}


@pytest.fixture
def images() -> np.ndarray:
    """Eleven images ``(11, 3, 16, 16)``."""
    return np.random.default_rng(1).standard_normal((11, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def step() -> float:
    """One step of the int8 file's output grid."""
    return OUTPUT_STEP
