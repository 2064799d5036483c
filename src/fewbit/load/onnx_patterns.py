"""Layers that exporters of older opsets write out in many nodes become one node again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper

Constants = Callable[[str], NDArray[np.generic] | None]


class Patterns:
    """Finds written-out GELU and layer normalisation.

    Args:
        nodes: In the order in which they run.
        constant: Gives the value of a name, none where it depends on the images.
    """

    def __init__(self, nodes: Sequence[NodeProto], constant: Constants) -> None:
        self.nodes, self.constant = nodes, constant
        self.makers = {output: node for node in nodes for output in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def joined(self) -> list[NodeProto]:
        """Return the nodes, the last of each pattern replaced by the whole; its parts stay, unread."""
        found: dict[str, NodeProto] = {}
        for node in self.nodes:
            match = {"Erf": self._gelu, "Sqrt": self._layer_norm}.get(node.op_type)
            whole = match(node) if match is not None else None
            if whole is not None:
                found[whole.output[0]] = whole
        return [found.get(node.output[0], node) if node.output else node for node in self.nodes]

    def _gelu(self, erf: NodeProto) -> NodeProto | None:
        """0.5 x (1 + erf(x / sqrt 2)), its factors in any order."""
        scaled = self.makers.get(erf.input[0])
        if scaled is None or scaled.op_type not in ("Mul", "Div"):
            return None
        if scaled.op_type == "Mul":
            source = self._beside(scaled, 2**-0.5)
        else:
            source = str(scaled.input[0]) if self._is(scaled.input[1], 2**0.5) else None
        plus = self._reader(erf, "Add")
        if source is None or plus is None or self._beside(plus, 1.0) is None:
            return None
        last, factors = plus, []
        for _ in range(2):
            product = self._reader(last, "Mul")
            if product is None:
                break
            factors += [name for name in product.input if name != last.output[0]]
            last = product
            if self._is_half(factors, source):
                return helper.make_node("Gelu", [source], [last.output[0]], name=last.name)
        return None

    def _is_half(self, factors: list[str], source: str) -> bool:
        """Tell whether the factors make x / 2."""
        if len(factors) == 2:
            return source in factors and any(self._is(name, 0.5) for name in factors)
        half = self.makers.get(factors[0]) if len(factors) == 1 else None
        return half is not None and half.op_type == "Mul" and self._beside(half, 0.5) == source

    def _layer_norm(self, sqrt: NodeProto) -> NodeProto | None:
        """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) over the last axis, then weight and bias."""
        added = self.makers.get(sqrt.input[0])
        quotient = self._reader(sqrt, "Div")
        if added is None or added.op_type != "Add" or quotient is None:
            return None
        eps = next((v for v in map(self.constant, added.input) if v is not None and v.size == 1), None)
        variance = next((m for m in map(self.makers.get, added.input) if m is not None), None)
        if eps is None or variance is None or not self._over_last(variance):
            return None
        square, centred = self.makers.get(variance.input[0]), self.makers.get(quotient.input[0])
        if square is None or centred is None or centred.op_type != "Sub":
            return None
        power = square.op_type == "Pow" and self._is(square.input[1], 2.0)
        if not power and not (square.op_type == "Mul" and square.input[0] == square.input[1]):
            return None
        mean = self.makers.get(centred.input[1])
        if square.input[0] != centred.output[0] or mean is None or not self._over_last(mean):
            return None
        if mean.input[0] != centred.input[0]:
            return None
        return self._scaled(quotient, str(centred.input[0]), float(eps.reshape(())))

    def _scaled(self, quotient: NodeProto, source: str, eps: float) -> NodeProto | None:
        """Take the weight and bias after a normalisation in."""
        product = self._reader(quotient, "Mul")
        last = self._reader(product, "Add") if product is not None else None
        if product is None or last is None:
            return None
        weight = next((n for n in product.input if n != quotient.output[0]), "")
        bias = next((n for n in last.input if n != product.output[0]), "")
        if any((v := self.constant(name)) is None or v.ndim != 1 for name in (weight, bias)):
            return None
        inputs = [source, weight, bias]
        return helper.make_node(
            "LayerNormalization", inputs, [last.output[0]], name=last.name, axis=-1, epsilon=eps
        )

    def _over_last(self, node: NodeProto) -> bool:
        axes = axes_of(node, self.constant)
        keep = all(a.i for a in node.attribute if a.name == "keepdims")
        return node.op_type == "ReduceMean" and axes == [-1] and keep

    def _reader(self, node: NodeProto, op_type: str) -> NodeProto | None:
        """Return the only reader of a node, if it is of this operator."""
        found = self.readers.get(node.output[0], [])
        return found[0] if len(found) == 1 and found[0].op_type == op_type else None

    def _beside(self, node: NodeProto, value: float) -> str | None:
        """Return the input beside a constant of this value."""
        first, second = str(node.input[0]), str(node.input[1])
        if self._is(second, value):
            return first
        return second if self._is(first, value) else None

    def _is(self, name: str, value: float) -> bool:
        array = self.constant(name)
        return array is not None and array.size == 1 and abs(float(array.reshape(())) - value) < 1e-4


def axes_of(node: onnx.NodeProto, constant: Constants) -> list[int] | None:
    """Return the axes of a reduction, an attribute before opset 18."""
    for attribute in node.attribute:
        if attribute.name == "axes":
            return list(attribute.ints)
    value = constant(node.input[1]) if len(node.input) > 1 else None
    return None if value is None else [int(axis) for axis in value.reshape(-1)]
