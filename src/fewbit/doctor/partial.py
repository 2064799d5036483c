"""Running a quantized network with some of its quantizers on and the others off."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.errors import RecipeError
from fewbit.net import Layer, Net
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLinear

Values = dict[fx.Node, Tensor]

_MATRIX = ("Conv", "Linear")


class Partial:
    """Runs a quantized network in which every rounding can be switched on by itself.

    A switch is a node of the graph: a layer whose weight is rounded, or a quantizer of an activation. A
    quantizer that several tensors share has one switch for each of them. A layer that is off computes with
    the weight and the bias of the float network, before any correction.

    Args:
        exact: The network as it was before quantizers were placed: prepared, in float.
        net: Quantized from it; both stay as they are.

    Raises:
        RecipeError: A layer with a rounded weight is not in the float network.
    """

    def __init__(self, exact: Net, net: Net) -> None:
        self.layers = net.layers()
        self.image = net.image_node
        self._end = next(node for node in net.graph.graph.nodes if node.op == "output").args[0]
        self._by_node = {layer.node: layer for layer in self.layers}
        known = {layer.name: layer.module for layer in exact.layers()}
        self._off = {layer.node: _float_of(layer, known, net.name) for layer in self.layers}

    def exact(self, images: Tensor) -> Values:
        """Return the value of every node with everything off."""
        values: Values = {self.image: images}
        with torch.no_grad():
            for layer in self.layers:
                values[layer.node] = self._call(self._off[layer.node], layer.node, values, {})
        return values

    def changed(self, values: Mapping[fx.Node, Tensor], on: Collection[fx.Node]) -> Values:
        """Return the values that differ from `values` once some switches are on; only they are computed."""
        found: Values = {}
        with torch.no_grad():
            for layer in self.layers:
                node = layer.node
                if node in on or any(source in found for source in node.all_input_nodes):
                    module = layer.module if node in on else self._off[node]
                    found[node] = self._call(module, node, values, found)
        return found

    def logits(self, values: Mapping[fx.Node, Tensor], changed: Mapping[fx.Node, Tensor]) -> Tensor:
        """Return the logits (N, classes)."""
        assert isinstance(self._end, fx.Node)
        return changed[self._end] if self._end in changed else values[self._end]

    def every_switch(self) -> frozenset[fx.Node]:
        """Return all switches: with them on, the network is the quantized one."""
        return frozenset(layer.node for layer in self.layers if _rounds(layer.module))

    def switches(self, layer: Layer) -> tuple[fx.Node, ...]:
        """Return the switches that belong to one layer: of its weight and of its result.

        Of a concatenation also those of its inputs, where they share its quantizer. A layer that only moves
        values which are rounded already has none.
        """
        own = [layer.node] if _rounds(layer.module) else []
        behind = self.quantizers(self.tail(layer))
        shared = {str(node.target) for node in behind}
        before = [node for node in layer.node.all_input_nodes if str(node.target) in shared]
        if layer.kind == "Concat":
            own += before
        elif before:
            return ()
        return (*own, *behind)

    def tail(self, layer: Layer) -> fx.Node:
        """Return where a layer's result is complete: behind the activation that its kernel fuses."""
        node = layer.node
        while not self.quantizers(node):
            users = list(node.users)
            after = self._by_node.get(users[0]) if len(users) == 1 else None
            if after is None or after.kind in _MATRIX or len(after.node.all_input_nodes) > 1:
                return layer.node
            node = after.node
        return node

    def quantizers(self, node: fx.Node) -> list[fx.Node]:
        """Return the quantizer nodes that read a node."""
        found = [self._by_node[user] for user in node.users if user in self._by_node]
        return [layer.node for layer in found if isinstance(layer.module, Quantizer | DynamicQuantizer)]

    def layer_of(self, node: fx.Node) -> Layer | None:
        """Return the layer that a node computes; none for the image."""
        return self._by_node.get(node)

    def _call(
        self, module: nn.Module, node: fx.Node, values: Mapping[fx.Node, Tensor], found: Values
    ) -> Tensor:
        read = [source for source in node.args if isinstance(source, fx.Node)]
        result: Any = module(*[found[source] if source in found else values[source] for source in read])
        return result  # type: ignore[no-any-return]


def _rounds(module: nn.Module) -> bool:
    return isinstance(module, QuantConv2d | QuantLinear | Quantizer | DynamicQuantizer)


def _float_of(layer: Layer, exact: Mapping[str, nn.Module], name: str) -> nn.Module:
    if isinstance(layer.module, Quantizer | DynamicQuantizer):
        return nn.Identity()
    if isinstance(layer.module, QuantConv2d | QuantLinear):
        if layer.name not in exact:
            raise RecipeError(
                f"{name}: layer '{layer.name}' is quantized but not in the float network; "
                "give the network that the quantizers were placed in"
            )
        return exact[layer.name]
    return layer.module
