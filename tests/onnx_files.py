"""Small .onnx files for tests: a few nodes from images "x" to logits "y"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fewbit.load.capture import load
from fewbit.load.card import Card, card_from_options
from fewbit.net import Net

NEWEST = 26  # that ONNX Runtime 1.31 runs
OPSETS = (11, 13, 17, 21, NEWEST)
SIZE = (4, 8, 8)
Weights = dict[str, Any]
RNG = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def make(
    nodes: Sequence[NodeProto],
    weights: Weights | None = None,
    opset: int = 17,
    *,
    batch: int | str = "n",
    size: tuple[int, ...] = SIZE,
    pool: bool = True,
    path: Path,
) -> Path:
    """Write a model from "x" to "b"; behind that global pooling and Flatten, unless it ends in "y" itself."""
    end = [helper.make_node("GlobalAveragePool", ["b"], ["pooled"], name="pool")] * pool
    end += [helper.make_node("Flatten", ["pooled"], ["y"], name="flat")] * pool
    graph = helper.make_graph(
        [*nodes, *end],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = min(model.ir_version, 10)
    onnx.save(model, path)
    return path


def card(path: Path, classes: int, size: tuple[int, int, int] = SIZE) -> Card:
    """The card of a file; its images have 3 channels at load, these tests have 4."""
    made = card_from_options(str(path), classes=classes, size=[3, 8, 8], mean=[0] * 3, std=[1] * 3)
    return made.model_copy(update={"input": made.input.model_copy(update={"size": size})})


def run(path: Path, images: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": images.numpy()})[0]


def read(path: Path, classes: int, size: tuple[int, int, int] = SIZE, batch: int = 5) -> Net:
    """Load, and compare with ONNX Runtime on other images than the loader does."""
    net = load(card(path, classes, size))
    images = torch.randn((batch, *size), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        np.testing.assert_allclose(net(images).numpy(), run(path, images), rtol=1e-4, atol=1e-5)
    return net


def kinds(net: Net) -> list[str]:
    return [layer.kind for layer in net.layers()]


def node(kind: str, inputs: str, outputs: str = "b", **attributes: Any) -> NodeProto:
    names = [name if name != "-" else "" for name in inputs.split()]
    return helper.make_node(
        kind, names, outputs.split(), name=f"the/{kind}_{outputs.split()[0]}", **attributes
    )


def axes(
    kind: str, inputs: str, values: list[int], opset: int, since: int, **attributes: Any
) -> tuple[NodeProto, Weights]:
    """A node whose axes are an attribute before an opset and an input since."""
    if opset < since:
        return node(kind, inputs, axes=values, **attributes), {}
    return node(kind, f"{inputs} {kind}_axes", **attributes), {f"{kind}_axes": i64(*values)}
