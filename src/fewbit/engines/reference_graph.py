"""Reading an exported file for the reference interpreter: nodes, constants, tensors that keep their codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from fewbit import numerics
from fewbit.errors import EngineError
from fewbit.load.response_norms import merge_norms
from fewbit.spec import PASSES, ImageInput

Array = NDArray[Any]

OLDEST_OPSET, NEWEST_OPSET = 13, 23
KEPT_CODES = 2**23  # codes of weights whose float form is kept between runs


@dataclass(frozen=True, eq=False)
class Coded:
    """What DequantizeLinear gives: real values that still know their codes.

    Attributes:
        codes: The stored integers.
        scale: float32, one or one for each index along `axis`.
        zero_point: int64, of the shape of `scale`.
        axis: The axis of the parameters; none where there is one pair.
    """

    codes: Array
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int64]
    axis: int | None

    @cached_property
    def floats(self) -> NDArray[np.float32]:
        """The real values."""
        return numerics.dequantize(self.codes, self.scale, self.zero_point, self.axis)

    @property
    def reach(self) -> int:
        """Largest magnitude that any code of this type has once the zero point is off."""
        limits = np.iinfo(self.codes.dtype)
        return int(max(limits.max - self.zero_point.min(), self.zero_point.max() - limits.min))

    def moved(self, codes: Array) -> Coded:
        """Return other codes of the same one grid."""
        return Coded(codes, self.scale, self.zero_point, self.axis)

    @cached_property
    def transposed(self) -> Coded:
        """The tensor with its axes in reverse order."""
        axis = None if self.axis is None else self.codes.ndim - 1 - self.axis
        return Coded(self.codes.T, self.scale, self.zero_point, axis)

    def same_grid(self, other: Coded) -> bool:
        """Say whether both tensors have the same one grid."""
        return (
            self.axis is None
            and other.axis is None
            and self.codes.dtype == other.codes.dtype
            and bool(self.scale == other.scale)
            and bool(self.zero_point == other.zero_point)
        )

    def centred(self, kind: type[np.float32] | type[np.float64]) -> Array:
        """Return codes minus zero point as floats, which hold them exactly."""
        if kind not in self._kept:
            offset = self.zero_point.astype(kind)
            if self.axis is not None:
                shape = [1] * self.codes.ndim
                shape[self.axis] = -1
                offset = offset.reshape(shape)
            values = np.asarray(np.subtract(self.codes, offset, dtype=kind))
            if self.codes.size > KEPT_CODES:
                return values
            self._kept[kind] = values
        return self._kept[kind]

    def largest_sum(self, axes: tuple[int, ...]) -> float:
        """Return the largest sum of magnitudes over some axes, zero point taken off."""
        if axes not in self._sums:
            magnitudes = np.abs(self.centred(np.float32))
            self._sums[axes] = float(magnitudes.sum(axis=axes, dtype=np.float64).max(initial=0))
        return self._sums[axes]

    @cached_property
    def _kept(self) -> dict[type, Array]:
        return {}

    @cached_property
    def _sums(self) -> dict[tuple[int, ...], float]:
        return {}


Value = Array | Coded


def floats(value: Value) -> Array:
    """Return the real values of a dequantized tensor; any other array as it is."""
    return value.floats if isinstance(value, Coded) else value


@dataclass(frozen=True)
class Node:
    """One operator of the file."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    opset: int

    def integer(self, name: str, default: int) -> int:
        """Return an attribute that is a whole number."""
        return int(self.attributes.get(name, default))

    def number(self, name: str, default: float) -> float:
        """Return an attribute that is a float."""
        return float(self.attributes.get(name, default))

    def text(self, name: str, default: str) -> str:
        """Return an attribute that is a text."""
        found = self.attributes.get(name, default)
        return found.decode() if isinstance(found, bytes) else str(found)

    def integers(self, name: str, default: Sequence[int]) -> list[int]:
        """Return an attribute that is a list of whole numbers."""
        return [int(n) for n in self.attributes.get(name, default)]

    def error(self, reason: object) -> EngineError:
        """Return an error that names the operator and the node."""
        return EngineError(f"operator {self.kind} of node '{self.name}': {reason}")


@dataclass(frozen=True)
class Graph:
    """An exported file.

    Attributes:
        name: The file's name.
        nodes: In an order in which they can run.
        constants: Weights and the like by name.
        input: Name of the only input.
        input_shape: Its sizes; none where the file leaves one open.
        takes: Its type.
        output: Name of the first output.
    """

    name: str
    nodes: tuple[Node, ...]
    constants: dict[str, Array]
    input: str
    input_shape: tuple[int | None, ...]
    output: str
    takes: ImageInput = "float32"


def read_graph(path: Path, passes: bool = True) -> Graph:
    """Read a file.

    Args:
        path: An .onnx file, external data beside it where it has any.
        passes: The engine does not round at marked pairs; see `fewbit.export.residual_sums`.

    Returns:
        Its graph.

    Raises:
        EngineError: It cannot be read, has another opset, or other than one input.
    """
    try:
        model = onnx.load(path)
    except (OSError, ValueError, DecodeError, onnx.checker.ValidationError) as reason:
        raise EngineError(f"{path}: cannot be read as ONNX ({reason}); export it again") from reason
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise EngineError(
            f"{path}: has opset {opset}; the reference interpreter reads {OLDEST_OPSET} to {NEWEST_OPSET}"
        )
    graph = model.graph
    norms = merge_norms(graph)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    inputs = [entry for entry in graph.input if entry.name not in constants]
    if len(inputs) != 1 or not graph.output:
        raise EngineError(
            f"{path}: has {len(inputs)} inputs and {len(graph.output)} outputs; it must have one each"
        )
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else None for dim in inputs[0].type.tensor_type.shape.dim
    )
    if passes:
        nodes = _read_nodes(graph.node, opset, constants)
    else:
        nodes = [_read_node(proto, index, opset) for index, proto in enumerate(graph.node)]
    nodes = [replace(n, kind="LRN by roots") if n.outputs[0] in norms else n for n in nodes]
    pixels = inputs[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    takes: ImageInput = "uint8" if pixels else "float32"
    return Graph(path.name, tuple(nodes), constants, inputs[0].name, shape, graph.output[0].name, takes)


def _read_nodes(protos: Sequence[onnx.NodeProto], opset: int, constants: dict[str, Array]) -> list[Node]:
    """Read all nodes; a marked pair becomes one node "Passes" of its value and its scale."""
    nodes, pairs = [], dict[str, tuple[str, ...]]()
    for index, proto in enumerate(protos):
        node = _read_node(proto, index, opset)
        if not any(entry.key == PASSES for entry in proto.metadata_props):
            nodes.append(node)
        elif node.kind == "QuantizeLinear" and _is_signed_grid(node.inputs[1:], constants):
            pairs[node.outputs[0]] = node.inputs
        elif node.kind == "DequantizeLinear" and (pair := _pair_before(node, pairs)):
            nodes.append(replace(node, kind="Passes", inputs=pair[:2]))
        else:
            raise node.error(
                f"is marked '{PASSES}' and is no pair of QuantizeLinear and DequantizeLinear to one grid of "
                "int8 with zero point 0; export the file again"
            )
    return nodes


def _pair_before(node: Node, pairs: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the inputs of the marked QuantizeLinear that a node of the same grid reads, else nothing."""
    pair = pairs.get(node.inputs[0], ()) if node.inputs else ()
    return pair if pair[1:] == node.inputs[1:] else ()


def _is_signed_grid(inputs: Sequence[str], constants: dict[str, Array]) -> bool:
    """Tell whether scale and zero point are those of one grid of int8 around 0."""
    if len(inputs) != 2 or any(name not in constants or constants[name].size != 1 for name in inputs):
        return False
    scale, zero_point = (constants[name] for name in inputs)
    return scale.dtype == np.float32 and zero_point.dtype == np.int8 and not zero_point.any()


def _read_node(proto: onnx.NodeProto, index: int, opset: int) -> Node:
    attributes: dict[str, Any] = {}
    for attribute in proto.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        attributes[attribute.name] = (
            onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
        )
    kind = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"
    name = proto.name or f"{proto.op_type}_{index}"
    return Node(name, kind, tuple(proto.input), tuple(proto.output), attributes, opset)
