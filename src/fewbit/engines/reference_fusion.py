"""Which operators of a file an engine runs as one: they round once where the file says several times.

`fuse` rewrites a graph for one engine; the formulas of the new operators are in `reference_rounding`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fewbit.engines.reference_graph import Array, Graph, Node
from fewbit.engines.session import Rounding

# How many inputs each operator that may be fused has at most; all of them have codes.
_INPUTS = {"Conv": 3, "Gemm": 3, "MatMul": 2, "Add": 2, "Mul": 2, "GlobalAveragePool": 1}
_WITH_WEIGHTS = ("Conv", "Gemm", "MatMul")
_EIGHT_BIT = (np.uint8, np.int8)
_NORMS = ("LRN", "LRN by roots")

Found = tuple[Node, set[str]] | None  # the new node, and the values that vanish in it


@dataclass(frozen=True)
class _Uses:
    """Who makes and who reads each value."""

    makers: dict[str, Node]
    readers: Counter[str]
    constants: dict[str, Array]

    def alone(self, name: str) -> Node | None:
        """Return the maker of a value that only one operator reads."""
        return self.makers.get(name) if self.readers[name] == 1 else None

    def dequantized(self, name: str, one_grid: bool = False) -> bool:
        """Say whether a value comes straight out of DequantizeLinear, and perhaps from one 8-bit grid."""
        maker = self.makers.get(name)
        if maker is None or maker.kind != "DequantizeLinear" or maker.integer("block_size", 0):
            return False
        return not one_grid or self.eight_bit(maker)

    def eight_bit(self, node: Node) -> bool:
        """Say whether a QuantizeLinear or DequantizeLinear has one 8-bit grid that the file knows."""
        scale, zero_point = (self.constants.get(name) for name in (*node.inputs[1:], "")[:2])
        if scale is None or zero_point is None:
            return False
        return scale.size == 1 and zero_point.size == 1 and zero_point.dtype in _EIGHT_BIT


def fuse(graph: Graph, rounding: Rounding) -> Graph:
    """Return the graph as an engine runs it.

    Args:
        graph: An exported file's.
        rounding: Whose; "exact" leaves the graph as it is.

    Returns:
        The graph with its QuantizeLinear nodes, and what leads to them, replaced by nodes of kind
        "<engine>.<operator>": inputs of the operator, then scale and zero point of the output; the fused
        activation's bounds are the attributes `low` and `high`. In those of "openvino_amx" `signed` is
        1, and `signed_output` too where an operator reads the output.
    """
    if rounding == "exact":
        return graph
    graph = _ordered_first(graph)
    readers = Counter(name for node in graph.nodes for name in node.inputs if name)
    readers[graph.output] += 1
    uses = _Uses({name: n for n in graph.nodes for name in n.outputs}, readers, graph.constants)
    rewrite = _REWRITES[rounding]
    made: dict[str, Node] = {}
    gone: set[str] = set()
    for node in graph.nodes:
        found = rewrite(node, uses)
        if found is not None:
            new, swallowed = found
            if rounding == "openvino_amx":
                signed = {"signed": 1, "signed_output": int(_read_on(node.outputs[0], graph))}
                new = replace(new, attributes=new.attributes | signed)
            made[node.outputs[0]] = new
            gone |= swallowed
    nodes = [made.get(node.outputs[0], node) for node in graph.nodes if node.outputs[0] not in gone]
    return replace(graph, nodes=tuple(nodes))


def _ordered_first(graph: Graph) -> Graph:
    """Put the axes of codes in order before they are dequantized, not after: the same values.

    An engine reads codes in any order of axes, so a Transpose is nothing between them and its kernel.
    """
    readers = Counter(name for node in graph.nodes for name in node.inputs if name)
    makers = {node.outputs[0]: node for node in graph.nodes}
    swapped: dict[str, Node] = {}
    for node in graph.nodes:
        before = makers.get(node.inputs[0]) if node.kind == "Transpose" else None
        if before is None or before.kind != "DequantizeLinear" or readers[node.inputs[0]] != 1:
            continue
        scale = graph.constants.get(before.inputs[1])
        if scale is not None and scale.size == 1:
            codes = f"{before.inputs[0]}:ordered"
            swapped[before.outputs[0]] = replace(node, inputs=(before.inputs[0],), outputs=(codes,))
            swapped[node.outputs[0]] = replace(
                before, inputs=(codes, *before.inputs[1:]), outputs=node.outputs
            )
    return replace(graph, nodes=tuple(swapped.get(node.outputs[0], node) for node in graph.nodes))


def _read_on(name: str, graph: Graph) -> bool:
    """Say whether an operator reads a tensor's values, rather than that they leave the file."""
    return any(
        node.kind != "DequantizeLinear" or _read_on(node.outputs[0], graph)
        for node in graph.nodes
        if name in node.inputs
    )


def _onnxruntime(node: Node, uses: _Uses) -> Found:
    """QLinearConv and the like: one operator with its QuantizeLinear, ReLU and Clip between being a clamp."""
    if node.kind in _NORMS:
        return replace(node, kind=f"onnxruntime.{node.kind}"), set()
    if node.kind == "Gemm" and _runs_on_codes(node, uses):  # where a QuantizeLinear follows, that takes it in
        return replace(node, kind="onnxruntime.GemmToFloat"), set()
    if node.kind != "QuantizeLinear" or not uses.eight_bit(node):
        return None
    maker, bounds, swallowed = _before_activations(node, uses)
    if maker is None or not _runs_on_codes(maker, uses):
        return None
    new = _fused(maker, f"onnxruntime.{maker.kind}", _inputs(maker), node, bounds)
    return new, swallowed | {maker.outputs[0]}


def _openvino(node: Node, uses: _Uses) -> Found:
    """A Conv with its FakeQuantize, and the sum of a Conv and a tensor of codes."""
    if node.kind in ("Conv", "Gemm") and _runs_on_codes(node, uses):
        return replace(node, kind=f"openvino.{node.kind}ToFloat"), set()
    of_five = (node.integer("size", 0), node.number("beta", 0.75)) == (5, 0.75)
    if node.kind == "LRN by roots" or (node.kind == "LRN" and of_five):
        return replace(node, kind=f"openvino.{node.kind}"), set()
    if node.kind != "QuantizeLinear" or not uses.eight_bit(node):
        return None
    maker, bounds, swallowed = _before_activations(node, uses)
    if maker is None or maker.kind in _NORMS:
        free = {"low": -np.inf, "high": np.inf}
        return replace(node, kind="openvino.QuantizeLinear", attributes=node.attributes | free), set()
    if maker.kind in ("Conv", "GlobalAveragePool") and _runs_on_codes(maker, uses):
        new = _fused(maker, f"openvino.{maker.kind}", _inputs(maker), node, bounds)
        return new, swallowed | {maker.outputs[0]}
    return _openvino_residual(maker, uses, node, bounds, swallowed) if maker.kind == "Add" else None


def _openvino_residual(
    add: Node, uses: _Uses, quantizer: Node, bounds: dict[str, float], swallowed: set[str]
) -> Found:
    """The sum of a Conv, perhaps with a pair behind it, and a tensor of codes."""
    for codes, sums in (add.inputs, add.inputs[::-1]):
        conv, gone = uses.alone(sums), swallowed | {add.outputs[0], sums}
        kind, pair = "openvino.Residual", tuple[str, ...]()
        if conv is not None and conv.kind == "Passes":
            kind, pair = "openvino.ResidualInKernel", (conv.inputs[1],)
            gone |= {conv.inputs[0]}
            conv = uses.alone(conv.inputs[0])
        if conv is None or conv.kind != "Conv" or not _runs_on_codes(conv, uses):
            continue
        if uses.dequantized(codes, one_grid=True):
            return _fused(conv, kind, (codes, *_inputs(conv), *pair), quantizer, bounds), gone
    return None


def _fused(main: Node, kind: str, inputs: tuple[str, ...], quantizer: Node, bounds: dict[str, float]) -> Node:
    return replace(
        main,
        kind=kind,
        inputs=(*inputs, *quantizer.inputs[1:3]),
        outputs=quantizer.outputs,
        attributes=main.attributes | bounds,
    )


def _before_activations(node: Node, uses: _Uses) -> tuple[Node | None, dict[str, float], set[str]]:
    """Return what is before the ReLU and Clip that a QuantizeLinear reads, their bounds, and their values."""
    low, high, swallowed = -np.inf, np.inf, set[str]()
    maker = uses.alone(node.inputs[0])
    while maker is not None and (bounds := _bounds(maker, uses)) is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
        swallowed.add(maker.outputs[0])
        maker = uses.alone(maker.inputs[0])
    return maker, {"low": low, "high": high}, swallowed


def _inputs(node: Node) -> tuple[str, ...]:
    """Return the inputs of an operator, those that it leaves out as empty names."""
    return (*node.inputs, *("",) * (_INPUTS[node.kind] - len(node.inputs)))


def _runs_on_codes(node: Node, uses: _Uses) -> bool:
    """Say whether an operator is one that integers are computed of: all its inputs have codes."""
    if node.kind not in _INPUTS or (node.number("alpha", 1.0), node.number("beta", 1.0)) != (1.0, 1.0):
        return False
    activations = 1 if node.kind in _WITH_WEIGHTS else len(node.inputs)
    return all(uses.dequantized(name, place < activations) for place, name in enumerate(node.inputs) if name)


def _bounds(node: Node, uses: _Uses) -> tuple[float, float] | None:
    """Return what ReLU or Clip limits to; none for another operator."""
    if node.kind == "Relu":
        return 0.0, np.inf
    if node.kind != "Clip" or any(name and name not in uses.constants for name in node.inputs[1:]):
        return None
    low, high = (float(uses.constants[name]) if name else None for name in (*node.inputs[1:], "", "")[:2])
    return -np.inf if low is None else low, np.inf if high is None else high


_REWRITES: dict[Rounding, Callable[[Node, _Uses], Found]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "openvino_amx": _openvino,
}
