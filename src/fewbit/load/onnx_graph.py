"""The walk over an ONNX graph: constants are folded, every other node becomes layers of a Net."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx, nn

from fewbit.errors import ModelFileError, NetworkError, first_line, suggest
from fewbit.load.builder import Builder, Size
from fewbit.load.onnx_file import name_of, to_array
from fewbit.load.onnx_patterns import Patterns

Array = NDArray[Any]
OnnxConverter = Callable[..., Any]
OPERATORS: dict[str, OnnxConverter] = {}

_HINTS = {
    "Pow": "a normalisation or GELU of unusual form? export with opset_version=20",
    "Erf": "a GELU of unusual form? export with opset_version=20",
    "If": "export with constant folding",
    "Loop": "export without loops",
}


class FixedBatch(ModelFileError):
    """A node of the file works for its own number of images only."""


@dataclass(frozen=True)
class Constant:
    """A value that no image reaches.

    Attributes:
        runs: Its value in each run; the shape arithmetic on the number of images differs between them.
    """

    runs: tuple[Array, ...]


@dataclass(frozen=True)
class Op:
    """One ONNX node.

    Attributes:
        kind: Its operator.
        attributes: By name.
        outputs: How many of its outputs are read.
        opset: Version of the standard operators.
        readers: Operators that read its first output.
    """

    kind: str
    attributes: dict[str, Any]
    outputs: int
    opset: int
    readers: frozenset[str]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return self.attributes.get(name, default)


def operator(*kinds: str) -> Callable[[OnnxConverter], OnnxConverter]:
    """Enter the converter of ONNX operators."""

    def enter(converter: OnnxConverter) -> OnnxConverter:
        OPERATORS.update(dict.fromkeys(kinds, converter))
        return converter

    return enter


class OnnxBuilder(Builder):
    """Adds layers for one ONNX node, and runs each at once, so that the shapes are known.

    Attributes:
        runs: What each node of the new graph returned for each number of images tried.
    """

    def __init__(self, graph: Graph, root: fx.GraphModule, node: onnx.NodeProto) -> None:
        super().__init__(root, clean(name_of(node)), graph.sizes, None, graph.reserved)
        self.node, self.graph = f"operator {node.op_type}, node '{name_of(node)}'", graph

    @property
    def runs(self) -> dict[fx.Node, tuple[Tensor, ...]]:
        """What each node of the new graph returned in each run."""
        return self.graph.runs

    def add(self, module: nn.Module, *inputs: fx.Node, suffix: str = "", size: Size | None = None) -> fx.Node:
        """Add one layer, run it, and return its node."""
        module.eval()
        results = tuple(
            module(*(self.runs[node][run] for node in inputs)) for run in range(len(self.graph.batches))
        )
        node = super().add(module, *inputs, suffix=suffix, size=self.size_of([r.shape for r in results]))
        self.runs[node] = results
        return node

    def size_of(self, shapes: Sequence[Sequence[int]]) -> Size:
        """Tell the batch axis of a result from its shape in each run."""
        dims = tuple(shapes[0])
        axes = [
            axis for axis, n in enumerate(dims) if any(s[axis : axis + 1] != (n,) for s in map(tuple, shapes))
        ]
        if len(shapes) == 1:
            if not dims or dims[0] != self.graph.batches[0]:
                raise self.fixed(f"returns {dims}: axis 0 must stay the images' axis")
            return Size(dims)
        first, second = self.graph.batches
        if (
            len(axes) != 1
            or len(shapes[1]) != len(dims)
            or dims[axes[0]] * second != shapes[1][axes[0]] * first
        ):
            raise self.fixed(f"returns {dims} for {first} images and {tuple(shapes[1])} for {second}")
        return Size(dims, axes[0])

    def _free_name(self, suffix: str) -> str:
        """Choose a name that lies neither inside another layer nor around one."""
        parts = (f"{self.name}_{suffix}" if suffix else self.name).split(".")
        for end in range(len(parts) - 1, 0, -1):
            if ".".join(parts[:end]) in self.graph.layers:
                parts[end - 1 : end + 1] = [f"{parts[end - 1]}_{parts[end]}"]
        wanted = name = ".".join(parts)
        count = 0
        while name in self.reserved:
            count += 1
            name = f"{wanted}_{count}"
        self.graph.layers.add(name)
        pieces = name.split(".")
        self.reserved.update(".".join(pieces[:end]) for end in range(1, len(pieces) + 1))
        return name

    def array(self, value: Any, what: str) -> Array:
        """Return the value of a constant that is the same in each run."""
        first, *others = self.arrays(value, what)
        if any(not np.array_equal(first, other) for other in others):
            raise self.refuse(f"{what} that depends on the number of images")
        return first

    def arrays(self, value: Any, what: str) -> tuple[Array, ...]:
        """Return the value of a constant in each run."""
        if not isinstance(value, Constant):
            raise self.refuse(f"{what} that depends on the images")
        return value.runs

    def tensor(self, value: Any, what: str) -> Tensor:
        """Return a constant as a float32 tensor."""
        return torch.from_numpy(np.array(self.array(value, what), np.float32))

    def refuse(self, what: str) -> NetworkError:
        """Return the error for a form of an operator that no layer stands for."""
        return NetworkError(f"{self.node}: {what} is not supported")

    def fixed(self, what: str) -> FixedBatch:
        """Return the error for a node that does not keep the images apart."""
        return FixedBatch(f"{self.node}: {what}; export with a dynamic batch axis")


def clean(name: str) -> str:
    """Make a node's name the path of a layer.

    torch.fx writes paths into Python source, so nothing but letters, digits and `_ : -` stays.

    >>> clean("/layer1/layer1.0/conv1/Conv")
    'layer1.layer1.0.conv1.Conv'
    >>> clean('x"); import os')
    'x____import_os'
    """
    parts = re.split(r"[/.]+", name)
    return ".".join(re.sub(r"[^\w:-]", "_", part) for part in parts if part) or "node"


@dataclass
class Graph:
    """An ONNX graph on its way to a Net.

    Attributes:
        path: The file, for messages.
        opset: Version of the standard operators.
        batches: The numbers of images to try: two where the file's batch axis is open, else its own.
    """

    path: Path
    opset: int
    batches: tuple[int, ...]
    known: dict[str, Any] = field(default_factory=dict)
    sizes: dict[fx.Node, Size] = field(default_factory=dict)
    runs: dict[fx.Node, tuple[Tensor, ...]] = field(default_factory=dict)
    reserved: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)

    def build(self, proto: onnx.GraphProto, images: Sequence[Tensor], channels_last: bool) -> fx.GraphModule:
        """Convert a whole graph.

        Args:
            proto: With its weights in it.
            images: (N, C, H, W) for each run.
            channels_last: The file wants (N, H, W, C).

        Raises:
            ModelFileError: An operator is not supported, in general or in this form.
        """
        root = fx.GraphModule(nn.Module(), fx.Graph())
        for tensor in proto.initializer:
            self.known[tensor.name] = self._repeat(to_array(tensor, self.path))
        self._start(root, proto, images, channels_last)
        nodes = self._needed(proto)
        last_read = {name: at for at, node in enumerate(nodes) for name in node.input}
        readers: dict[str, set[str]] = {}
        for node in nodes:
            for name in node.input:
                readers.setdefault(name, set()).add(node.op_type)
        for at, node in enumerate(nodes):
            self._convert(root, node, frozenset(readers.get(node.output[0], ())))
            for name in {*node.input} - {proto.output[0].name}:
                if last_read[name] == at:
                    self._forget(name)
        output = self._logits(root, proto)
        root.graph.output(output)
        root.graph.eliminate_dead_code()
        root.delete_all_unused_submodules()
        root.graph.lint()
        root.recompile()
        return root

    def _repeat(self, array: Array) -> Constant:
        return Constant((array,) * len(self.batches))

    def _start(
        self, root: fx.GraphModule, proto: onnx.GraphProto, images: Sequence[Tensor], channels_last: bool
    ) -> None:
        from fewbit.load.onnx_file import inputs_of
        from fewbit.load.shapes import permute

        name = inputs_of(proto)[0].name
        node = root.graph.placeholder("input")
        self.runs[node] = tuple(images)
        entry = helper.make_node("Transpose", [name], [name], name=f"{name}_channels_last")
        builder = OnnxBuilder(self, root, entry)
        self.sizes[node] = builder.size_of([batch.shape for batch in images])
        self.known[name] = permute(builder, node, (0, 2, 3, 1)) if channels_last else node

    def _needed(self, proto: onnx.GraphProto) -> list[onnx.NodeProto]:
        """Return the nodes that the output depends on, in order."""

        def constant(name: str) -> Array | None:
            value = self.known.get(name)
            return value.runs[0] if isinstance(value, Constant) else None

        for node in proto.node:
            if node.op_type == "Constant":
                self.known[node.output[0]] = self._repeat(constant_of(node, self.path))
            elif node.op_type == "Identity" and isinstance(self.known.get(node.input[0]), Constant):
                self.known[node.output[0]] = self.known[node.input[0]]
        needed, nodes = {proto.output[0].name}, []
        for node in reversed(Patterns(proto.node, constant).joined()):
            if needed.intersection(node.output) and node.output[0] not in self.known:
                nodes.append(node)
                needed.update(name for name in node.input if name)
        return nodes[::-1]

    def _convert(self, root: fx.GraphModule, node: onnx.NodeProto, readers: frozenset[str]) -> None:
        inputs = [self.known[name] if name else None for name in node.input]
        while inputs and inputs[-1] is None:
            inputs.pop()
        if all(isinstance(value, Constant) or value is None for value in inputs):
            results: Any = self._fold(node, inputs)
        elif node.op_type in ("Shape", "Size"):
            results = self._shape(node, inputs[0])
        else:
            results = self._layers(root, node, inputs, readers)
        results = results if isinstance(results, list) else [results]
        for name, value in zip(node.output, results, strict=False):
            if name:
                self.known[name] = value

    def _layers(
        self, root: fx.GraphModule, node: onnx.NodeProto, inputs: list[Any], readers: frozenset[str]
    ) -> Any:
        converter = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        builder = OnnxBuilder(self, root, node)
        if converter is None:
            full = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            hint = (
                _HINTS.get(node.op_type) or f"docs/networks.md lists those that are{suggest(full, OPERATORS)}"
            )
            raise ModelFileError(
                f"{self.path}: operator {full}, node '{name_of(node)}', is not supported; {hint}"
            )
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        op = Op(node.op_type, attributes, sum(bool(name) for name in node.output), self.opset, readers)
        try:
            return converter(builder, op, *inputs)
        except FixedBatch as reason:
            raise FixedBatch(f"{self.path}: {reason}") from reason
        except NetworkError as reason:
            raise ModelFileError(
                f"{self.path}: {reason}; docs/networks.md lists the forms that are"
            ) from reason
        except (RuntimeError, ValueError, IndexError, TypeError) as reason:
            line = first_line(reason)
            raise ModelFileError(
                f"{self.path}: operator {node.op_type}, node '{name_of(node)}': does not fit its input "
                f"({line}); check the file with onnxruntime, and [input] size"
            ) from reason

    def _fold(self, node: onnx.NodeProto, inputs: list[Any]) -> list[Constant]:
        """Run a node on constants with ONNX's own reference implementation."""
        names = [name if name else "" for name in node.input]
        results: list[list[Array]] = []
        try:
            evaluator = ReferenceEvaluator(self._alone(node))
            for run in range(len(self.batches) if self._differs(inputs) else 1):
                feeds = {
                    n: value.runs[run] for n, value in zip(names, inputs, strict=False) if value is not None
                }
                results.append([np.asarray(value) for value in evaluator.run(None, feeds)])
        except Exception as reason:
            line = first_line(reason)
            raise ModelFileError(
                f"{self.path}: operator {node.op_type}, node '{name_of(node)}': cannot be computed ahead "
                f"({line}); export with constant folding"
            ) from reason
        if len(results) == 1:
            return [self._repeat(value) for value in results[0]]
        return [Constant(tuple(values)) for values in zip(*results, strict=True)]

    def _alone(self, node: onnx.NodeProto) -> onnx.ModelProto:
        """Return a model of one node."""
        inputs, outputs = (
            [onnx.ValueInfoProto(name=n) for n in names if n] for names in (node.input, node.output)
        )
        graph = helper.make_graph([node], "node", inputs, outputs)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])

    @staticmethod
    def _differs(inputs: list[Any]) -> bool:
        return any(value is not None and any(r is not value.runs[0] for r in value.runs) for value in inputs)

    def _shape(self, node: onnx.NodeProto, x: Any) -> Constant:
        shapes = [np.array(value.shape, np.int64) for value in self.runs[x]]
        if node.op_type == "Size":
            return Constant(tuple(np.array(shape.prod(), np.int64) for shape in shapes))
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        part = slice(attributes.get("start", 0), attributes.get("end"))
        return Constant(tuple(shape[part] for shape in shapes))

    def _forget(self, name: str) -> None:
        """Free the memory of a value that nobody reads again; its layers and size stay."""
        value = self.known.get(name)
        if isinstance(value, Constant):
            del self.known[name]
        elif isinstance(value, fx.Node) and not any(
            other is value for key, other in self.known.items() if key != name
        ):
            del self.known[name]
            self.runs.pop(value, None)

    def _logits(self, root: fx.GraphModule, proto: onnx.GraphProto) -> fx.Node:
        name = proto.output[0].name
        value = self.known.get(name)
        if not isinstance(value, fx.Node):
            raise ModelFileError(
                f"{self.path}: output '{name}' does not depend on the images; export it again"
            )
        size = self.sizes[value]
        if size.rank == 4 and size.dims[2:] == (1, 1) and size.batch == 0:
            flatten = helper.make_node("Flatten", [name], ["logits"], name="logits")
            return OnnxBuilder(self, root, flatten).add(nn.Flatten(1), value)
        if size.rank != 2 or size.batch != 0:
            raise ModelFileError(
                f"{self.path}: output '{name}' has shape {size.dims} for {self.batches[0]} images; "
                "a classifier returns logits (N, classes): export it so"
            )
        return value


def constant_of(node: onnx.NodeProto, path: Path) -> Array:
    """Return the value of a Constant node."""
    attribute = node.attribute[0]
    if attribute.HasField("t"):
        return to_array(attribute.t, path)
    value = helper.get_attribute_value(attribute)
    kind = np.float32 if attribute.name.startswith("value_float") else np.int64
    return np.array(value, kind)
