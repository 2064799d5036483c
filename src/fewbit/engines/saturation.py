"""Whether an engine sums products of u8 and s8 exactly on this processor: asked with a file, not assumed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fewbit.engines.limit import onednn_limit
from fewbit.engines.process import EngineProcess
from fewbit.engines.session import EngineName, Setting
from fewbit.errors import EngineError

_INPUTS, _OUTPUTS = 64, 32
_STEPS = 100


def may_saturate(lacks_vnni: bool) -> bool:
    """Tell whether it is worth asking: the processor lacks VNNI, or oneDNN is told to do without.

    Args:
        lacks_vnni: See `fewbit.measure.host.Host.saturates_u8s8`.
    """
    return lacks_vnni or onednn_limit() != "ALL"


def saturating_engines(engines: Sequence[EngineName], lacks_vnni: bool) -> tuple[EngineName, ...]:
    """Return the engines that do not sum exactly here; those that do not run at all are left out."""
    if not may_saturate(lacks_vnni):
        return ()
    found = []
    for engine in engines:
        with suppress(EngineError):
            if saturates(engine):
                found.append(engine)
    return tuple(found)


def saturates(engine: EngineName) -> bool:
    """Tell whether pairs of products go through 16 bits, as without VNNI: 2 x 255 x 127 does not fit.

    A convolution of the largest codes is run in a process of its own; a sum that saturated is about half of
    the exact one. Weights of 7 bits cannot saturate: 2 x 255 x 63 = 32,130 fits 16 bits. Depthwise
    convolutions, whose kernels do not sum pairs, were seen to be exact on every instruction set.

    Raises:
        EngineError: The engine cannot be imported, or does not run the file.
    """
    with tempfile.TemporaryDirectory() as folder, EngineProcess(engine, timeout_s=60) as process:
        path = Path(folder) / "sums.onnx"
        onnx.save(_model(), path)
        images = np.full((1, _INPUTS, 4, 4), 255, np.float32)
        found = process.open(path, Setting(engine=engine)).run(images)
    steps = np.abs(found) / (_INPUTS * 255 * 127 / _STEPS)
    return bool((steps < 0.9 * _STEPS).any())


def _model() -> onnx.ModelProto:
    """Return a file that rounds, convolves with +-127 alone, and rounds to hundredths of the exact sum."""
    weight = np.full((_OUTPUTS, _INPUTS, 1, 1), 127, np.int8)
    weight[1::2] = -127
    step = np.float32(_INPUTS * 255 * 127 / _STEPS)
    constants = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "weight:q": weight,
        "weight.zero": np.int8(0),
        "step": step,
        "middle": np.uint8(128),
    }
    rows = (
        ("QuantizeLinear", ["input", "one", "zero"], "x:q"),
        ("DequantizeLinear", ["x:q", "one", "zero"], "x"),
        ("DequantizeLinear", ["weight:q", "one", "weight.zero"], "weight"),
        ("Conv", ["x", "weight"], "y"),
        ("QuantizeLinear", ["y", "step", "middle"], "y:q"),
        ("DequantizeLinear", ["y:q", "step", "middle"], "logits"),
    )
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [output], output) for kind, inputs, output in rows],
        "sums",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", _INPUTS, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", _OUTPUTS, 4, 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
