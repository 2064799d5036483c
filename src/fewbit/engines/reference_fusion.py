"""Which operators of a file an engine runs as one: they round once where the file says several times.

`fuse` rewrites a graph for one engine; the formulas of the new operators are in `reference_rounding`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fewbit.engines.reference_graph import Graph, Node
from fewbit.engines.session import Rounding

# How many inputs each operator that may be fused has at most, and how many of them have codes.
_INPUTS = {"Conv": 3, "Gemm": 3, "MatMul": 2, "Add": 2, "Mul": 2, "GlobalAveragePool": 1}
_WITH_CODES = {"Conv": 3, "Gemm": 3, "MatMul": 2, "Add": 2, "Mul": 2, "GlobalAveragePool": 1}
_MATRIX = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class _Uses:
    """Who makes and who reads each value."""

    makers: dict[str, Node]
    readers: Counter[str]
    constants: dict[str, np.ndarray]  # type: ignore[type-arg]

    def alone(self, name: str) -> Node | None:
        """Return the maker of a value that only one operator reads."""
        return self.makers.get(name) if self.readers[name] == 1 else None

    def dequantized(self, name: str) -> bool:
        """Say whether a value comes straight out of DequantizeLinear."""
        maker = self.makers.get(name)
        return maker is not None and maker.kind == "DequantizeLinear"


def fuse(graph: Graph, rounding: Rounding) -> Graph:
    """Return the graph as an engine runs it.

    Args:
        graph: An exported file's.
        rounding: Whose; "exact" leaves the graph as it is.

    Returns:
        The graph with its QuantizeLinear nodes, and what leads to them, replaced by nodes of kind
        "<engine>.<operator>": inputs of the operator, then scale and zero point of the output; the fused
        activation's bounds are the attributes `low` and `high`.
    """
    if rounding == "exact":
        return graph
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
            made[node.outputs[0]] = new
            gone |= swallowed
    nodes = [made.get(node.outputs[0], node) for node in graph.nodes if node.outputs[0] not in gone]
    return replace(graph, nodes=tuple(nodes))


def _onnxruntime(node: Node, uses: _Uses) -> tuple[Node, set[str]] | None:
    """QLinearConv and the like: one operator with its QuantizeLinear, ReLU and Clip between being a clamp."""
    if node.kind == "Gemm":
        return _float_gemm(node, uses)
    if node.kind == "LRN":
        return replace(node, kind="onnxruntime.LRN"), set()
    if node.kind != "QuantizeLinear":
        return None
    maker, bounds, swallowed = _before_activations(node, uses)
    if maker is None or not _runs_on_codes(maker, uses):
        return None
    new = replace(
        maker,
        kind=f"onnxruntime.{maker.kind}",
        inputs=(*_inputs(maker), *node.inputs[1:3]),
        outputs=node.outputs,
        attributes=maker.attributes | bounds,
    )
    return new, swallowed | {maker.outputs[0]}


def _openvino(node: Node, uses: _Uses) -> tuple[Node, set[str]] | None:
    """A Conv with its FakeQuantize, and the sum of a Conv and a tensor of codes."""
    if node.kind in ("Conv", "Gemm") and _runs_on_codes(node, uses):
        return replace(node, kind=f"openvino.{node.kind}ToFloat"), set()
    if node.kind == "LRN" and (node.integer("size", 0), node.number("beta", 0.75)) == (5, 0.75):
        return replace(node, kind="openvino.LRN"), set()
    if node.kind != "QuantizeLinear":
        return None
    maker, bounds, swallowed = _before_activations(node, uses)
    if maker is None or maker.kind == "LRN":
        attributes = node.attributes | {"low": -np.inf, "high": np.inf}
        return replace(node, kind="openvino.QuantizeLinear", attributes=attributes), set()
    swallowed |= {maker.outputs[0]}
    if maker.kind == "Conv" and _runs_on_codes(maker, uses):
        inputs = (*_inputs(maker), *node.inputs[1:3])
        new = replace(maker, kind="openvino.Conv", inputs=inputs, outputs=node.outputs)
        return replace(new, attributes=maker.attributes | bounds), swallowed
    if maker.kind == "Add":
        for codes, floats in (maker.inputs, maker.inputs[::-1]):
            conv = uses.alone(floats)
            if conv is not None and conv.kind == "Conv" and uses.dequantized(codes) and _runs_on_codes(conv, uses):
                inputs = (codes, *_inputs(conv), *node.inputs[1:3])
                new = replace(conv, kind="openvino.Residual", inputs=inputs, outputs=node.outputs)
                return replace(new, attributes=conv.attributes | bounds), swallowed | {floats}
    return None


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


def _float_gemm(node: Node, uses: _Uses) -> tuple[Node, set[str]] | None:
    """The last layer, whose output stays float."""
    read = uses.makers.values()
    quantized = any(n.kind == "QuantizeLinear" and n.inputs[0] == node.outputs[0] for n in read)
    if quantized or not _runs_on_codes(node, uses):
        return None
    return replace(node, kind="onnxruntime.GemmToFloat"), set()


def _runs_on_codes(node: Node, uses: _Uses) -> bool:
    """Say whether all inputs that have to have codes have them."""
    if node.kind not in _INPUTS:
        return False
    return all(uses.dequantized(name) for name in node.inputs[: _WITH_CODES[node.kind]] if name)


def _bounds(node: Node, uses: _Uses) -> tuple[float, float] | None:
    """Return what ReLU or Clip limits to; none for another operator."""
    if node.kind == "Relu":
        return 0.0, np.inf
    if node.kind != "Clip" or any(name and name not in uses.constants for name in node.inputs[1:]):
        return None
    low, high = (float(uses.constants[name]) if name else None for name in (*node.inputs[1:], "", "")[:2])
    return -np.inf if low is None else low, np.inf if high is None else high


_REWRITES: dict[Rounding, Callable[[Node, _Uses], tuple[Node, set[str]] | None]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
