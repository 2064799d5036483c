"""Exported files opened up: every quantized tensor among the outputs, as an engine itself puts it out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
from numpy.typing import NDArray

from fewbit.spec import PASSES


def open_all(path: Path, folder: Path) -> tuple[Path, list[str]]:
    """Write the same file with every quantized tensor among its outputs.

    Without its marked pairs: with a further reader in front of a sum OpenVINO adds outside of the convolution
    and would round there. `test_residual_sums` and `test_rounding` look at the pairs.
    """
    model = onnx.load(path)
    drop_passed(model)
    types = {constant.name: constant.data_type for constant in model.graph.initializer}
    names = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            names.append(node.output[0])
            info = onnx.helper.make_tensor_value_info(node.output[0], types[node.input[2]], None)
            model.graph.output.append(info)
    everything = folder / f"all-{path.name}"
    onnx.save(model, everything)
    return everything, names


def drop_passed(model: onnx.ModelProto) -> None:
    """Take out the pairs that a file's engine passes values through."""
    same, kept = dict[str, str](), []
    for node in model.graph.node:
        if any(entry.key == PASSES for entry in node.metadata_props):
            same[node.output[0]] = same.get(node.input[0], node.input[0])
            continue
        node.input[:] = [same.get(name, name) for name in node.input]
        kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def run_all(
    engine: str, path: Path, names: list[str], images: NDArray[np.float32]
) -> list[NDArray[np.generic]]:
    """Return the logits and the codes that the engine itself puts out, on one thread."""
    wanted = ["logits", *names]
    if engine == "onnxruntime":
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return list(session.run(wanted, {"input": images}))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    results = compiled(images)
    return [np.array(results[name]) for name in wanted]
