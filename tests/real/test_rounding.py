"""The reference engine with an engine's rounding: that engine's codes, end to end and bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from fewbit.engines.process import EngineProcess
from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.measure.host import describe_host, rounding_of
from real_names import ENGINES

pytestmark = [
    pytest.mark.needs_shared,
    pytest.mark.skipif(
        "avx512_vnni" not in describe_host().isa,
        reason="the formulas are those of the engines' AVX-512 VNNI kernels, which this processor lacks",
    ),
]
NETWORKS = ["resnet20", "mobilenet_v2", "squeezenet_v11"]
# Where more outputs leave the engine's graph as it is; in OpenVINO's mobilenet_v2 they do not.
READABLE = [
    (name, engine)
    for name in NETWORKS
    for engine in ENGINES
    if (name, engine) != ("mobilenet_v2", "openvino")
]


def open_dequantized(path: Path, folder: Path) -> tuple[Path, dict[str, str], dict[str, NDArray[np.generic]]]:
    """Write the same file with every dequantized activation among its outputs that no sum reads.

    A further reader of one side of a sum would keep the sum out of OpenVINO's convolution. Real values, not
    codes: an output of codes would make OpenVINO keep them in the type of the file, where it otherwise holds
    all of them as uint8 and so rounds differently.

    Returns:
        The file, the value to read for each tensor of codes, and the file's constants.
    """
    model = onnx.load(path)
    constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    quantized = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    summed = {name for node in model.graph.node if node.op_type == "Add" for name in node.input}
    readers = {
        node.input[0]: node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantized
        if node.output[0] not in summed
    }
    assert len(readers) > len(quantized) / 3
    for value in readers.values():
        model.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    everything = folder / f"dequantized-{path.name}"
    onnx.save(model, everything)
    return everything, readers, constants


def run_all(
    engine: str, path: Path, names: list[str], images: NDArray[np.float32]
) -> list[NDArray[np.float32]]:
    """Return outputs that the engine itself computes."""
    if engine == "onnxruntime":
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return list(session.run(names, {"input": images}))
    results = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)
    return [np.array(results[name]) for name in names]


@pytest.mark.parametrize(("name", "engine"), READABLE)
def test_every_code_is_the_engines_end_to_end(
    name: str, engine: str, quantized: Callable[..., object], tmp_path: Path
) -> None:
    made = quantized(name, engine)
    images = next(iter(made.images.batches(8)))
    path, readers, constants = open_dequantized(made.path, tmp_path)
    logits, *values = run_all(engine, path, ["logits", *readers.values()], images)
    with EngineProcess(engine) as process:
        plain = process.open(made.path, Setting(engine=engine, batch=8)).run(images)
    np.testing.assert_array_equal(logits, plain)  # the extra outputs changed nothing
    setting = Setting(engine="reference", rounding=rounding_of(engine, describe_host()))
    record = Reference().open(made.path, setting).run_recorded(images)
    quantizers = {n.output[0]: n for n in onnx.load(made.path).graph.node if n.op_type == "QuantizeLinear"}
    for (tensor, _), value in zip(readers.items(), values, strict=True):
        scale, zero_point = (constants[part] for part in quantizers[tensor].input[1:3])
        codes = np.rint(value / scale.astype(np.float64)) + zero_point
        np.testing.assert_array_equal(record[tensor], codes, err_msg=tensor)
    np.testing.assert_allclose(record["logits"], logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_the_engines(
    name: str, engine: str, quantized: Callable[..., object], images_of: Callable[..., object]
) -> None:
    made, images = quantized(name, engine), images_of(name, 200 if name == "resnet20" else 64)
    found = []
    for runner in (engine, "reference"):
        with EngineProcess(runner) as process:
            setting = Setting(engine=runner, batch=16, rounding=rounding_of(engine, describe_host()))
            found.append(process.open(made.path, setting).logits(images.batches(16)))
    # One code that differed anywhere would show here as far more than a float's rounding.
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-4)
