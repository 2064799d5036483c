"""What the installed engines really run in integers on this host: asked with small files, not assumed."""

from __future__ import annotations

import importlib.metadata
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fewbit.engines.process import EngineProcess
from fewbit.engines.saturation import saturates
from fewbit.engines.session import EngineName, Setting
from fewbit.errors import EngineError
from fewbit.spec import Frozen

_CASES = ("convolution", "depthwise", "matrix product", "bf16 convolution")


class Probed(Frozen):
    """One engine on this host.

    Attributes:
        engine: Its name.
        version: The installed version.
        precisions: For each kind of operator, what it ran in ("int8", "float32", "bf16") or why it did not.
        sums: How it adds products of u8 and s8 here: "exact", "saturating", or why that is not known.
    """

    engine: EngineName
    version: str
    precisions: dict[str, str]
    sums: str = ""


def probe_engines() -> tuple[Probed, ...]:
    """Run a small file for each kind of operator on each engine, in a child process."""
    found = []
    engines: tuple[EngineName, ...] = ("onnxruntime", "openvino")
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines:
            precisions = {case: _precision(engine, case, Path(folder)) for case in _CASES}
            version, sums = importlib.metadata.version(engine), _sums(engine)
            found.append(Probed(engine=engine, version=version, precisions=precisions, sums=sums))
    return tuple(found)


def _sums(engine: EngineName) -> str:
    try:
        return "saturating" if saturates(engine) else "exact"
    except EngineError as reason:
        return f"none: {reason}"


def _precision(engine: EngineName, case: str, folder: Path) -> str:
    path = folder / f"{case.replace(' ', '-')}.onnx"
    if not path.exists():
        onnx.save(_model(case), path)
    wide = case.startswith("bf16")
    setting = Setting(engine=engine, float_precision="bf16" if wide else "float32")
    try:
        with EngineProcess(engine, timeout_s=30) as process:
            session = process.open(path, setting)
            operators = [o for o in session.placement().operators if o.matrix]
    except EngineError as reason:
        return f"none: {reason}"
    return operators[0].precision if operators else "none: no matrix operator was left"


def _model(case: str) -> onnx.ModelProto:
    if case.startswith("bf16"):
        return _float_convolution()
    nodes, constants = _pair("x", "input"), [_scalar("scale", 0.05), _scalar("zero", 0, np.uint8)]
    rng = np.random.default_rng(0)
    shape = {"depthwise": (32, 1, 3, 3), "convolution": (32, 32, 3, 3)}.get(case, (32, 32))
    weight = rng.integers(-127, 128, shape).astype(np.int8)
    constants += [
        numpy_helper.from_array(weight, "w:q"),
        _scalar("w_scale", 0.01),
        _scalar("w_zero", 0, np.int8),
    ]
    nodes.append(helper.make_node("DequantizeLinear", ["w:q", "w_scale", "w_zero"], ["w"], "w"))
    if case == "matrix product":
        nodes.append(helper.make_node("Gemm", ["x", "w"], ["y"], "y", transB=1))
    else:
        group = 32 if case == "depthwise" else 1
        nodes.append(helper.make_node("Conv", ["x", "w"], ["y"], "y", pads=[1] * 4, group=group))
    nodes.append(helper.make_node("Relu", ["y"], ["r"], "r"))
    nodes += _pair("logits", "r")
    return _wrap(nodes, constants, [1, 32] if case == "matrix product" else [1, 32, 16, 16])


def _float_convolution() -> onnx.ModelProto:
    weight = np.random.default_rng(0).normal(size=(32, 32, 3, 3)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["input", "w"], ["logits"], "logits", pads=[1] * 4)]
    return _wrap(nodes, [numpy_helper.from_array(weight, "w")], [1, 32, 16, 16])


def _pair(name: str, source: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [source, "scale", "zero"], [f"{name}:q"], f"{name}:q"),
        helper.make_node("DequantizeLinear", [f"{name}:q", "scale", "zero"], [name], f"{name}:dq"),
    ]


def _scalar(name: str, value: float, dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def _wrap(
    nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], shape: list[int]
) -> onnx.ModelProto:
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "probe", [image], [logits], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
