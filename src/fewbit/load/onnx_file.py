"""Reading an .onnx file: what must hold of it before its graph is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import external_data_helper, inliner, numpy_helper

from fewbit.errors import ModelFileError, first_line
from fewbit.load.response_norms import merge_norms

OLDEST_OPSET = 11
_DOMAINS = ("", "ai.onnx")
QUANTIZED = {
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"),
    *("QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearConcat", "QGemm", "MatMulNBits"),
    *("QLinearGlobalAveragePool", "QLinearAveragePool", "QLinearSigmoid", "QLinearLeakyRelu"),
}


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read an .onnx file with float weights, its functions inlined and its external data loaded.

    Response normalizations that fewbit wrote in several operators are one operator again.

    Args:
        path: The file.

    Returns:
        A model of one float32 input of four axes and one output.

    Raises:
        ModelFileError: It is missing or damaged, its opset is too old, it keeps data outside its folder,
            is quantized already, or has several inputs or outputs.
    """
    model = _parse(path)
    _check_opset(model, path)
    _load_external(model, path)
    if model.functions:
        model = inliner.inline_local_functions(model)
    for end in model.graph.output:
        end.type.tensor_type.shape.SetInParent()  # many files leave it out, which the checker alone minds
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as reason:
        if "exceeds maximum protobuf size" not in str(reason):
            line = first_line(reason)
            raise ModelFileError(f"{path}: is damaged or no valid ONNX ({line}); export it again") from reason
    for node in model.graph.node:
        if node.op_type in QUANTIZED:
            raise ModelFileError(
                f"{path}: is already quantized (operator {node.op_type}, node '{name_of(node)}'); "
                "give the float32 file that it was made from"
            )
    _check_ends(model.graph, path)
    merge_norms(model.graph)
    return model


def _parse(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError as reason:
        raise ModelFileError(f"{path}: there is no such file; correct the path of the .onnx file") from reason
    except OSError as reason:
        raise ModelFileError(f"{path}: cannot be read ({reason.strerror or reason})") from reason
    except Exception as reason:  # protobuf's error classes differ between its versions
        raise ModelFileError(f"{path}: is damaged or cut short, or no ONNX file; export it again") from reason
    words = [w for node in model.graph.node for w in (node.name, node.op_type, *node.input, *node.output)]
    words += [value.name for value in (*model.graph.initializer, *model.graph.input, *model.graph.output)]
    if not model.graph.node or not all(isinstance(word, str) for word in words):  # bytes: not UTF-8
        raise ModelFileError(f"{path}: is damaged or no ONNX file (no readable nodes); export it again")
    return model


def _check_opset(model: onnx.ModelProto, path: Path) -> None:
    opset = opset_of(model)
    newest = onnx.defs.onnx_opset_version()
    if opset < OLDEST_OPSET:
        raise ModelFileError(
            f"{path}: has opset {opset}; {OLDEST_OPSET} to {newest} are read: export it again with "
            "opset_version=17, or convert it with onnx.version_converter"
        )
    if opset > newest:
        raise ModelFileError(
            f"{path}: has opset {opset}; {OLDEST_OPSET} to {newest} are read with onnx {onnx.__version__}: "
            "install a newer onnx, or export with an older opset"
        )


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the standard operators."""
    return max((entry.version for entry in model.opset_import if entry.domain in _DOMAINS), default=0)


def name_of(node: onnx.NodeProto) -> str:
    """Return what to call a node: its name, else that of its output."""
    return node.name or (node.output[0] if node.output else node.op_type)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    """Read tensors kept in other files, which must lie in the folder of the .onnx file."""
    folder = path.parent.resolve()
    for tensor in _tensors(model):
        if not external_data_helper.uses_external_data(tensor):
            continue
        entry = {pair.key: pair.value for pair in tensor.external_data}
        location = entry.get("location", "")
        place = folder / location
        if not location or not place.resolve().is_relative_to(folder) or place.resolve() != place.absolute():
            raise ModelFileError(
                f"{path}: tensor '{tensor.name}' keeps its data in '{location}', outside the file's folder "
                "or behind a link; put the data beside the .onnx file and export it again"
            )
        if not place.is_file():
            raise ModelFileError(
                f"{path}: tensor '{tensor.name}' keeps its data in '{location}', which is missing; "
                "put that file beside the .onnx file"
            )
        end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        if place.stat().st_size < end:
            raise ModelFileError(
                f"{path}: tensor '{tensor.name}' needs {end} bytes of '{location}', which has "
                f"{place.stat().st_size}; copy that file again"
            )
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except (onnx.checker.ValidationError, ValueError, OSError) as reason:
            line = first_line(reason)
            raise ModelFileError(
                f"{path}: the data of tensor '{tensor.name}' cannot be read ({line})"
            ) from reason
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _check_ends(graph: onnx.GraphProto, path: Path) -> None:
    inputs, outputs = inputs_of(graph), list(graph.output)
    for what, ends in (("inputs", inputs), ("outputs", outputs)):
        if len(ends) != 1:
            names = ", ".join(f"'{end.name}'" for end in ends) or "none"
            raise ModelFileError(
                f"{path}: has {len(ends)} {what} ({names}); a classifier has one: images in, logits out; "
                "export it so"
            )
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type != onnx.TensorProto.FLOAT:
        known = {number: word.lower() for word, number in onnx.TensorProto.DataType.items()}
        kind = known.get(tensor.elem_type, "of no known type")
        raise ModelFileError(
            f"{path}: input '{inputs[0].name}' is {kind}; float32 is read: export the float32 network"
        )
    if len(tensor.shape.dim) != 4:
        raise ModelFileError(
            f"{path}: input '{inputs[0].name}' has {len(tensor.shape.dim)} axes; images have 4 (N, C, H, W): "
            "export it so"
        )


def inputs_of(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs that are no weights."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def input_dims(graph: onnx.GraphProto) -> list[int | None]:
    """Return the four sides of the input; none where the file leaves one open."""
    dims = inputs_of(graph)[0].type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims]


def to_array(tensor: onnx.TensorProto, path: Path) -> NDArray[np.generic]:
    """Return a tensor as an array; float16, bfloat16 and float64 as float32.

    Raises:
        ModelFileError: It is damaged, or has a NaN or infinite weight.
    """
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as reason:
        raise ModelFileError(
            f"{path}: tensor '{tensor.name}' is damaged ({reason}); export it again"
        ) from reason
    if tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE):
        array = array.astype(np.float32)
    return array
