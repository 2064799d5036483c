"""GELU as exporters of older opsets write it: 0.5 x (1 + erf(x / sqrt 2)) in five nodes becomes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

Constants = Callable[[str], NDArray[np.generic] | None]


def join_gelus(nodes: Sequence[onnx.NodeProto], constant: Constants) -> list[onnx.NodeProto]:
    """Replace each written-out GELU by one Gelu node; its parts stay, unread.

    Args:
        nodes: In the order in which they run.
        constant: Gives the value of a name, none where it depends on the images.
    """
    makers = {output: node for node in nodes for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, onnx.NodeProto] = {}
    for node in nodes:
        if node.op_type == "Erf":
            match = _match(node, makers, readers, constant)
            if match is not None:
                last, source = match
                gelu = onnx.helper.make_node("Gelu", [source], [last.output[0]], name=last.name)
                found[last.output[0]] = gelu
    return [found.get(node.output[0], node) if node.output else node for node in nodes]


def _match(
    erf: onnx.NodeProto,
    makers: dict[str, onnx.NodeProto],
    readers: dict[str, list[onnx.NodeProto]],
    constant: Constants,
) -> tuple[onnx.NodeProto, str] | None:
    """Return the last node of the GELU around an Erf, and the name of its input."""
    scaled = makers.get(erf.input[0])
    if scaled is None:
        return None
    source = _other(scaled, constant, 2**-0.5) if scaled.op_type == "Mul" else None
    if scaled.op_type == "Div" and _is(constant(scaled.input[1]), 2**0.5):
        source = scaled.input[0]
    plus = _only(readers, erf.output[0], "Add")
    if source is None or plus is None or _other(plus, constant, 1.0) != erf.output[0]:
        return None
    product = _only(readers, plus.output[0], "Mul")
    if product is None:
        return None
    factors = [name for name in product.input if name != plus.output[0]]
    if len(factors) != 1:
        return None
    half = makers.get(factors[0])
    if half is not None and half.op_type == "Mul" and _other(half, constant, 0.5) == source:
        return product, source
    last = _only(readers, product.output[0], "Mul")
    if last is None:
        return None
    if factors[0] == source and _other(last, constant, 0.5) == product.output[0]:
        return last, source
    if _is(constant(factors[0]), 0.5) and set(last.input) == {product.output[0], source}:
        return last, source
    return None


def _only(readers: dict[str, list[onnx.NodeProto]], name: str, op_type: str) -> onnx.NodeProto | None:
    found = readers.get(name, [])
    return found[0] if len(found) == 1 and found[0].op_type == op_type else None


def _other(node: onnx.NodeProto, constant: Constants, value: float) -> str | None:
    """Return the input beside a constant of this value."""
    first, second = str(node.input[0]), str(node.input[1])
    if _is(constant(second), value):
        return first
    return second if _is(constant(first), value) else None


def _is(array: NDArray[np.generic] | None, value: float) -> bool:
    return array is not None and array.size == 1 and bool(abs(float(array.reshape(())) - value) < 1e-4)
