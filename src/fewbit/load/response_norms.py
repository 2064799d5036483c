"""Response normalizations that a file writes in several operators, taken together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, helper, numpy_helper

from fewbit.numerics import window_weights

_DOMAINS = ("", "ai.onnx")


class Norm(NamedTuple):
    """The operators of ``x (1 / (sqrt(s) sqrt(sqrt(s))))`` with s from a 1 x 1 convolution of ``x^2``."""

    x: str
    squares: NodeProto
    sums: NodeProto
    root: NodeProto
    second_root: NodeProto
    power: NodeProto
    reciprocal: NodeProto
    last: NodeProto

    @property
    def parts(self) -> tuple[NodeProto, ...]:
        """The operators, in the order in which they run."""
        return self[1:]


def find_norms(nodes: Sequence[NodeProto]) -> list[Norm]:
    """Find normalizations by how operators read each other; weights are not looked at."""
    wiring = _Wiring(nodes)
    found = (wiring.norm_of(node) for node in nodes if node.op_type == "Reciprocal")
    return [norm for norm in found if norm is not None]


def merge_norms(graph: GraphProto) -> frozenset[str]:
    """Write what `fewbit.export` wrote as seven operators as the one LRN that they are.

    ``x / (bias + alpha / size sum x^2)^(3/4)`` stands in a file as operators that engines compute faster than
    LRN. Those whose convolution sums something else are left as they are.

    Args:
        graph: With its weights in it. Changed in place.

    Returns:
        The outputs of the normalizations that were written anew.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    merged = dict[str, NodeProto]()
    for norm in find_norms(graph.node):
        window, offset = (constants.get(name) for name in norm.sums.input[1:])
        if window is None or offset is None:
            continue
        numbers = _numbers(numpy_helper.to_array(window), numpy_helper.to_array(offset))
        if numbers is not None:
            output = norm.last.output[0]
            merged[output] = helper.make_node("LRN", [norm.x], [output], name=norm.last.name, **numbers)
            for part in norm.parts[:-1]:
                merged.setdefault(part.output[0], part)
    whole = frozenset(name for name, node in merged.items() if node.op_type == "LRN")
    kept, read = list[NodeProto](), {value.name for value in graph.output}
    for node in reversed(graph.node):
        output = node.output[0] if node.output else ""
        if output in merged and output not in read:
            continue  # a part that nothing else reads
        new = merged.get(output, node)
        read.update(new.input)
        kept.append(new)
    if whole:
        kept.reverse()
        copies = [_copy(node) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)
    return whole


def _copy(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _numbers(window: NDArray[Any], offset: NDArray[Any]) -> dict[str, Any] | None:
    """Return the attributes of the LRN whose window a convolution sums, none where it sums another."""
    channels = len(window) if window.ndim else 0
    if not channels or window.shape != (channels, channels, 1, 1) or offset.shape != (channels,):
        return None
    if window.dtype != np.float32 or offset.dtype != np.float32 or (offset != offset[0]).any():
        return None
    rows, columns = np.nonzero(window[:, :, 0, 0])
    if not len(rows):
        return None
    size = int((rows - columns).max() + (columns - rows).max()) + 1
    near = np.float32(window[0, 0, 0, 0] * np.float32(size))
    for alpha in (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))):
        if np.array_equal(window, window_weights(channels, size, float(alpha))):
            return {"size": size, "alpha": float(alpha), "beta": 0.75, "bias": float(offset[0])}
    return None


class _Wiring:
    """Who makes and who reads each value."""

    def __init__(self, nodes: Sequence[NodeProto]) -> None:
        self.makers = {output: node for node in nodes for output in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def norm_of(self, reciprocal: NodeProto) -> Norm | None:
        """Return the normalization that a Reciprocal is a part of, none where it is of none."""
        power = self._maker(reciprocal, 0, "Mul")
        roots = [] if power is None else [self._maker(power, place, "Sqrt") for place in (0, 1)]
        for first, second in (roots, roots[::-1]) if len(roots) == 2 else ():
            if power is None or first is None or second is None or second.input[0] != first.output[0]:
                continue
            sums = self._maker(first, 0, "Conv")
            squares = self._maker(sums, 0, "Mul") if sums is not None and _is_pointwise(sums) else None
            if sums is None or squares is None or squares.input[0] != squares.input[1]:
                continue
            x = squares.input[0]
            for last in self.readers.get(reciprocal.output[0], []):
                if last.op_type == "Mul" and sorted(last.input) == sorted([x, reciprocal.output[0]]):
                    return Norm(x, squares, sums, first, second, power, reciprocal, last)
        return None

    def _maker(self, node: NodeProto, place: int, kind: str) -> NodeProto | None:
        found = self.makers.get(node.input[place]) if len(node.input) > place else None
        return found if found is not None and found.op_type == kind and found.domain in _DOMAINS else None


def _is_pointwise(conv: NodeProto) -> bool:
    """Say whether a convolution with a bias reads one place of the image at a time, and all channels."""
    steps = {a.name: list(a.ints) or [a.i] for a in conv.attribute if a.name != "auto_pad"}
    ones = all(set(steps.get(name, [1])) == {1} for name in ("kernel_shape", "strides", "dilations", "group"))
    return ones and len(conv.input) == 3 and not any(steps.get("pads", []))
