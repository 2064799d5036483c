"""Response normalizations that a file writes in several operators, taken together again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, helper, numpy_helper

from fewbit.numerics import window_weights
from fewbit.spec import NORM

_NUMBERS = {"size": 0, "alpha": 1e-4, "beta": 0.75, "bias": 1.0}
_KINDS = ["Mul", "Conv", "Sqrt", "Sqrt", "Mul", "Reciprocal", "Mul"]


def merge_norms(graph: GraphProto) -> frozenset[str]:
    """Write what `fewbit.export` wrote as seven marked operators as the one LRN that they are.

    ``x / (bias + alpha / size sum x^2)^(3/4)`` stands in a file as ``x (1 / (sqrt(s) sqrt(sqrt(s))))`` with s
    from a 1 x 1 convolution of x^2, which engines compute several times as fast. Operators that are marked
    but do not compute this, with the numbers of the last one's mark, are left as they are.

    Args:
        graph: With its weights in it. Changed in place.

    Returns:
        The outputs of the normalizations that were written anew.
    """
    marks = {node.output[0]: mark for node in graph.node if (mark := norm_of(node))}
    parts: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        if node.output[0] in marks:
            mark = marks[node.output[0]]
            parts.setdefault(node.name if mark.startswith("{") else mark, []).append(node)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    weights = {
        value: numpy_helper.to_array(constants[value])
        for nodes in parts.values()
        for node in nodes
        for value in node.input
        if value in constants
    }
    merged, gone = dict[str, NodeProto](), set[str]()
    for nodes in parts.values():
        numbers = _read(marks[nodes[-1].output[0]])
        if numbers is None or not _computes(nodes, numbers, weights):
            continue
        last = nodes[-1]
        merged[last.output[0]] = helper.make_node(
            "LRN", [last.input[0]], list(last.output), name=last.name, **numbers
        )
        gone |= {node.output[0] for node in nodes[:-1]}
    kept = [merged.get(node.output[0], node) for node in graph.node if node.output[0] not in gone]
    del graph.node[:]
    graph.node.extend(kept)
    return frozenset(merged)


def norm_of(node: NodeProto) -> str:
    """Return the mark of an operator that is a part of a response normalization, else an empty text."""
    return next((entry.value for entry in node.metadata_props if entry.key == NORM), "")


def _read(mark: str) -> dict[str, Any] | None:
    try:
        numbers = json.loads(mark)
    except ValueError:
        return None
    if not isinstance(numbers, dict) or numbers.keys() != _NUMBERS.keys():
        return None
    fits = all(isinstance(numbers[name], type(value)) for name, value in _NUMBERS.items())
    return numbers if fits and numbers["size"] > 0 else None


def _computes(
    nodes: list[NodeProto], numbers: Mapping[str, Any], weights: Mapping[str, NDArray[Any]]
) -> bool:
    """Say whether marked operators, in their order, are the normalization of these numbers."""
    if [node.op_type for node in nodes] != _KINDS:
        return False
    squares, sums, root, second, power, inverse, last = nodes
    x = squares.input[0]
    wired = (
        (squares.input, [x, x]),
        (sums.input[:1], squares.output),
        (root.input, sums.output),
        (second.input, root.output),
        (power.input, [root.output[0], second.output[0]]),
        (inverse.input, power.output),
        (last.input, [x, inverse.output[0]]),
    )
    if any(list(given) != list(wanted) for given, wanted in wired) or len(sums.input) != 3:
        return False
    window, offset = (weights.get(name) for name in sums.input[1:])
    if window is None or offset is None or window.ndim != 4 or numbers["beta"] != 0.75:
        return False
    wanted = window_weights(len(window), numbers["size"], numbers["alpha"])
    return np.array_equal(window, wanted) and bool((offset == np.float32(numbers["bias"])).all())
