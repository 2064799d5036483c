"""The exported file beside the graph that an engine made of it: what became of each node, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper

from fewbit.engines.session import CONVERTING
from fewbit.errors import EngineError
from fewbit.load.response_norms import find_norms

MATRIX = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_INTEGER_MATRIX = frozenset({"ConvInteger", "MatMulInteger"})
QUANTIZING = frozenset({"QuantizeLinear", "DequantizeLinear"})
PASSED = QUANTIZING | {"Constant"}
_ACTIVATIONS = frozenset({"Relu", "Clip"})
# What ONNX Runtime fuses into a float convolution, which then has the activation's name.
_FUSED_BEHIND = _ACTIVATIONS | {"Sigmoid", "HardSigmoid", "Tanh", "LeakyRelu"}
# What engines append to the names of nodes that they rewrite.
_SUFFIX = re.compile(r"(_token_\d+|_bn_nchwc|_nchwc)$")
_SMALL = 4096


class ExportedGraph:
    """The nodes of an exported file by name; weights are not read.

    A node without a name is called after its first output.
    """

    def __init__(self, path: Path) -> None:
        graph = onnx.load(path, load_external_data=False).graph
        self.nodes: dict[str, NodeProto] = {node.name or node.output[0]: node for node in graph.node}
        self._constants = {c.name: c for c in graph.initializer}
        self._maker = {value: name for name, node in self.nodes.items() for value in node.output}
        self._readers: dict[str, list[str]] = {}
        for name, node in self.nodes.items():
            for value in node.input:
                self._readers.setdefault(value, []).append(name)
        self._results = {value.name for value in graph.output}
        self._norms = {part.name or part.output[0] for norm in find_norms(graph.node) for part in norm.parts}

    def is_matrix(self, name: str) -> bool:
        """Say whether a node is a convolution or matrix product of the network's weights."""
        return self.nodes[name].op_type in MATRIX and name not in self._norms

    def is_norm(self, name: str) -> bool:
        """Say whether a node is a part of a response normalization."""
        return name in self._norms or self.nodes[name].op_type == "LRN"

    def all_norm(self, names: Sequence[str]) -> bool:
        """Say whether an engine's operator, of these nodes, does nothing but normalize responses."""
        return bool(names) and all(map(self.is_norm, names))

    def maker(self, value: str) -> str | None:
        """Return the node that makes a value, none for an input or a constant."""
        return self._maker.get(value)

    def followers(self, name: str) -> list[str]:
        """Return the nodes that read what a node makes."""
        return [reader for value in self.nodes[name].output for reader in self._readers.get(value, [])]

    def is_quantized(self, value: str) -> bool:
        """Say whether a value comes out of a DequantizeLinear."""
        maker = self._maker.get(value)
        return maker is not None and self.nodes[maker].op_type == "DequantizeLinear"

    def zero_point(self, value: str) -> NDArray[np.generic] | None:
        """Return the zero point of the codes that a value comes from, none where there is none."""
        if not self.is_quantized(value):
            return None
        inputs = self.nodes[self._maker[value]].input
        return self._constant(inputs[2]) if len(inputs) > 2 else None

    def shape(self, value: str) -> tuple[int, ...]:
        """Return the shape of the constant that a value is made of; empty where there is none."""
        while value not in self._constants and value in self._maker:
            value = self.nodes[self._maker[value]].input[0]
        return tuple(self._constants[value].dims) if value in self._constants else ()

    def find(self, token: str) -> str | None:
        """Return the node that an engine's name for a node or value comes from, none where unknown."""
        while token:
            if token in self.nodes:
                return token
            if token in self._maker:
                return self._maker[token]
            shorter = _SUFFIX.sub("", token)
            token = shorter if shorter != token else token.rpartition("/")[0]
        return None

    def owners(self, kinds: Sequence[str], tokens: Sequence[Iterable[str]]) -> list[tuple[str, ...]]:
        """Say which nodes each operator of an engine stands for.

        Args:
            kinds: The engine's type of each operator, in the order in which they run.
            tokens: The names that the engine gives for each.

        Returns:
            For each operator its nodes, quantizers left out. A node that no operator names (a ReLU that
            became the clamp of a requantization, a Flatten that vanished, an Add inside a convolution)
            belongs to the last operator that makes one of its inputs; a convolution that is named after its
            activation, to that. An operator that only converts stands for no work.
        """
        owner: dict[str, int] = {}
        for place, (kind, given) in enumerate(zip(kinds, tokens, strict=True)):
            for found in filter(None, map(self.find, given)):
                made = self.nodes[found].op_type
                if made not in PASSED and (kind not in CONVERTING or made in CONVERTING):
                    owner.setdefault(found, place)
        for name, node in self.nodes.items():
            if name in owner or node.op_type in PASSED:
                continue
            matrix = node.op_type in MATRIX
            absorbing = self._owner_behind(name, owner) if matrix else self._owner_before(node, owner)
            if absorbing is not None:
                owner[name] = absorbing
        return [tuple(n for n in self.nodes if owner.get(n) == place) for place in range(len(kinds))]

    def only_quantizes(self, tokens: Iterable[str]) -> str:
        """Return "QuantizeLinear" or "DequantizeLinear" where an operator is nothing else, else ""."""
        kinds = {self.nodes[found].op_type for found in map(self.find, tokens) if found is not None}
        return next(iter(kinds)) if len(kinds) == 1 and kinds <= QUANTIZING else ""

    def _owner_behind(self, name: str, owner: dict[str, int]) -> int | None:
        for follower in self.followers(name):
            if self.nodes[follower].op_type in _FUSED_BEHIND and follower in owner:
                return owner[follower]
        return None

    def _owner_before(self, node: NodeProto, owner: dict[str, int]) -> int | None:
        places = []
        for value in node.input:
            maker = self._maker.get(value)
            while maker is not None and self.nodes[maker].op_type in QUANTIZING:
                maker = self._maker.get(self.nodes[maker].input[0])
            if maker is not None and maker in owner:
                places.append(owner[maker])
        return max(places, default=None)

    def why_float(self, name: str) -> str:
        """Say what in the file keeps a node from running in integers; an empty text where nothing does."""
        node = self.nodes[name]
        if node.op_type in _INTEGER_MATRIX:
            return f"the engine has no integer kernel for {node.op_type}"
        if self.is_norm(name):
            return "engines normalize responses in float"
        if node.op_type not in MATRIX:
            return self._why_other_float(node)
        values, weights = self.is_quantized(node.input[0]), self.is_quantized(node.input[1])
        if not values:
            return (
                "weights only: its input is not quantized"
                if weights
                else "its input and weights are not quantized"
            )
        if not weights:
            return "its weights are not quantized"
        if len(node.input) > 2 and node.input[2] and not self.is_quantized(node.input[2]):
            return "its bias is float"
        return self._why_not_requantized(name)

    def _why_other_float(self, node: NodeProto) -> str:
        read = [value for value in node.input if value and value not in self._constants]
        loose = [value for value in read if not self.is_quantized(value)]
        if loose:
            return (
                "its input is not quantized"
                if len(loose) == len(read)
                else f"its input {loose[0]} is not quantized"
            )
        if not self._quantized_by(node.output[0]):
            return "no QuantizeLinear after it"
        return f"the engine took no integer kernel for this {node.op_type}"

    def _why_not_requantized(self, name: str) -> str:
        """Follow the output of a convolution with quantized input and weights through its activation."""
        node, activation = self.nodes[name], ""
        readers = self.followers(name)
        if len(readers) == 1 and self.nodes[readers[0]].op_type in _ACTIVATIONS:
            node = self.nodes[readers[0]]
            activation = node.op_type
            readers = self.followers(readers[0])
        kinds = [self.nodes[reader].op_type for reader in readers]
        behind = f" and its {activation}" if activation else ""
        if "QuantizeLinear" not in kinds:
            reader = f", but {kinds[0]}" if kinds else ""
            return f"no QuantizeLinear after it{behind}{reader}"
        if len(readers) > 1 or node.output[0] in self._results:
            return f"its output{behind} is read in float too"
        return self._why_not_clamped(node, self.nodes[readers[0]]) if activation else ""

    def _why_not_clamped(self, activation: NodeProto, quantizer: NodeProto) -> str:
        """Say why an activation is not the clamp of the quantizer behind it."""
        scale, zero = self._constant(quantizer.input[1]), self._constant(quantizer.input[2])
        if scale is None or zero is None or scale.size != 1:
            return ""
        codes = np.iinfo(zero.dtype.name)
        low = (codes.min - int(zero.flat[0])) * float(scale.flat[0])
        high = (codes.max - int(zero.flat[0])) * float(scale.flat[0])
        if low < 0:
            return (
                f"the {activation.op_type} after it stays, because its QuantizeLinear has zero point "
                f"{int(zero.flat[0])} and not {codes.min}"
            )
        limit = self._constant(activation.input[2]) if len(activation.input) > 2 else None
        if limit is not None and high > float(limit.flat[0]) * (1 + 1e-6):
            return (
                f"the Clip after it stays, because its QuantizeLinear reaches {high:.6g}, "
                f"above the Clip's {float(limit.flat[0]):.6g}"
            )
        return ""

    def _quantized_by(self, value: str) -> bool:
        return any(self.nodes[r].op_type == "QuantizeLinear" for r in self._readers.get(value, []))

    def _constant(self, value: str) -> NDArray[np.generic] | None:
        tensor = self._constants.get(value)
        if tensor is None:
            maker = self.nodes.get(self._maker.get(value, ""))
            if maker is None or maker.op_type != "Constant" or not maker.attribute:
                return None
            tensor = maker.attribute[0].t
        if np.prod(tensor.dims, dtype=np.int64) > _SMALL or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return np.asarray(numpy_helper.to_array(tensor))


def image_size(path: Path) -> tuple[int, ...]:
    """Return (C, H, W) of the first input of an ONNX file.

    Raises:
        EngineError: The file leaves it open.
    """
    stat = path.stat()
    return _image_size(path, stat.st_mtime_ns, stat.st_size)


@lru_cache
def _image_size(path: Path, *_version: int) -> tuple[int, ...]:
    graph = onnx.load(path, load_external_data=False).graph
    constants = {c.name for c in graph.initializer}
    value = next(v for v in graph.input if v.name not in constants)
    size = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)[1:]
    if not size or min(size) < 1:
        raise EngineError(f"{path.name}: its input {value.name} has no fixed image size; export it with one")
    return size
