"""Milliseconds by cause: the operators of a profile sorted by what they are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewbit.engines.profile import OperatorTime

if TYPE_CHECKING:
    from fewbit.engines.exported import ExportedGraph

CAUSES = (
    "first convolution",
    "1x1",
    "3x3",
    "depthwise",
    "other convolutions",
    "classifier",
    "pools",
    "residual adds",
    "activations",
    "concat, shuffle",
    "input conversion",
    "quantize, reorder",
    "rest",
)
# What an operator of a file is for; an engine's operator is for the first of these that it stands for.
_OF_NODES = {
    "residual adds": {"Add", "Sum"},
    "pools": {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"},
    "activations": {
        *("Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Mul", "Div", "Gelu", "LeakyRelu", "PRelu"),
        *("Elu", "Mish", "Tanh", "Softplus", "Min", "Max"),
    },
    "concat, shuffle": {
        *("Concat", "Transpose", "Reshape", "Slice", "Split", "Flatten", "Gather", "Squeeze", "Unsqueeze"),
        *("Pad", "Expand"),
    },
}
# What the engines' own operators are for where no operator of the file is told.
_CONVERTS = {
    *("Reorder", "ReorderInput", "ReorderOutput", "Convert", "Cast", "Transpose", "QuantizeLinear"),
    *("DequantizeLinear", "FakeQuantize", "Quantize", "Subgraph"),
}
_OF_KERNELS: dict[tuple[int, ...], str] = {(1, 1): "1x1", (3, 3): "3x3"}
_ACTS = {"HardSigmoid", "Mul", "Sigmoid", "QLinearMul", "QLinearSigmoid", "Eltwise"}


@dataclass(frozen=True)
class Matrix:
    """A convolution or a matrix product of a file.

    Attributes:
        kernel: Its sides; none for a matrix product.
        group: Groups of a convolution.
        channels: Output channels.
        first: No other comes before it in the file.
    """

    kernel: tuple[int, ...]
    group: int
    channels: int
    first: bool


@dataclass(frozen=True)
class Parts:
    """What the operators of a file are, by name.

    Attributes:
        kinds: Operator type of each.
        matrices: The convolutions and matrix products.
    """

    kinds: Mapping[str, str]
    matrices: Mapping[str, Matrix]


def read_parts(path: Path) -> Parts:
    """Read what the operators of an exported file are."""
    from fewbit.engines.exported import ExportedGraph  # onnx takes long to import

    return parts_of(ExportedGraph(path))


def parts_of(exported: ExportedGraph) -> Parts:
    """Return what the operators of an exported file are."""
    matrices: dict[str, Matrix] = {}
    for name, node in exported.nodes.items():
        if exported.is_matrix(name):
            weight = exported.shape(node.input[1])
            group = next((a.i for a in node.attribute if a.name == "group"), 1)
            kernel = weight[2:] if node.op_type.startswith("Conv") else ()
            matrices[name] = Matrix(kernel, group, weight[0] if weight else 0, not matrices)
    kinds = {n: "LRN" if exported.is_norm(n) else node.op_type for n, node in exported.nodes.items()}
    return Parts(kinds, matrices)


def cause_of(operator: OperatorTime, parts: Parts, started: bool) -> str:
    """Say what an operator is for.

    Args:
        operator: One operator of a profile.
        parts: Of the file that was profiled.
        started: A convolution ran before it: what converts before that converts the image.
    """
    for layer in operator.layers:
        if layer in parts.matrices:
            return _cause_of_matrix(parts.matrices[layer])
    kinds = {parts.kinds.get(layer, "") for layer in operator.layers}
    if kinds == {"LRN"}:
        return "rest"
    for cause, members in _OF_NODES.items():
        if kinds & members:
            return cause
    if operator.matrix:
        return "other convolutions"
    if operator.kind in _ACTS:
        return "activations"
    if operator.kind in _CONVERTS or kinds & {"Cast", "QuantizeLinear", "DequantizeLinear"}:
        return "quantize, reorder" if started else "input conversion"
    return "rest"


def _cause_of_matrix(matrix: Matrix) -> str:
    if not matrix.kernel:
        return "classifier"
    if matrix.first:
        return "first convolution"
    if matrix.group > 1:
        return "depthwise" if matrix.group == matrix.channels else "other convolutions"
    return _OF_KERNELS.get(matrix.kernel, "other convolutions")


def sum_by_cause(operators: Iterable[OperatorTime], parts: Parts) -> dict[str, float]:
    """Return the milliseconds of every cause that takes any, in the order of `CAUSES`."""
    sums = dict.fromkeys(CAUSES, 0.0)
    started = False
    for operator in operators:
        sums[cause_of(operator, parts, started)] += operator.ms
        started = started or operator.matrix
    return {cause: ms for cause, ms in sums.items() if ms > 0}
