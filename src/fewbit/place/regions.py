"""Regions: the layers of a network whose precision changes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from torch import fx

from fewbit.net import Layer, Net
from fewbit.place.place import MATRIX, fused_residuals
from fewbit.place.targets import Target

_POOLS = frozenset({"GlobalAvgPool", "Mean"})


@dataclass(frozen=True)
class Region:
    """Layers whose precision changes together.

    Attributes:
        name: The name of its first convolution or matrix product.
        layers: Names of its layers, in the order in which they run.
    """

    name: str
    layers: tuple[str, ...]


def regions_of(net: Net, target: Target) -> tuple[Region, ...]:
    """Cut a network into regions, each layer into exactly one.

    Each convolution or matrix product begins one. What follows without weights of its own (the activation
    that its kernel fuses, pools, moves) belongs to the layer that makes its input; with several inputs, to
    the one that runs last, but a sum that the engine computes inside a convolution's kernel to that
    convolution. What stands before all of them belongs to its first reader. A gate made from a pooled tensor
    (squeeze-and-excite) belongs with its convolutions to the layer whose output it gates.

    Args:
        net: In float, canonical.
        target: Whose kernels count.

    Returns:
        In the order of the layers that begin them. A network without any convolution or matrix product is
        one region.

    Example:
        >>> from torch import nn
        >>> from fewbit.load.capture import capture
        >>> from fewbit.place.targets import TARGETS
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> net = capture(model.eval(), "net", (3, 2, 2))
        >>> [region.layers for region in regions_of(net, TARGETS["openvino"])]
        [('0', '1', '2'), ('3',)]
    """
    layers = net.layers()
    order = {layer.node: place for place, layer in enumerate(layers)}
    matrices = {layer.node for layer in layers if layer.kind in MATRIX}
    residuals, gated = fused_residuals(net, target), _gated(layers)
    owner: dict[fx.Node, fx.Node] = {}
    for node in order:
        read = [residuals[node]] if node in residuals else node.all_input_nodes
        makers = [owner[source] for source in read if source in owner]
        if gated.get(node) in owner:
            owner[node] = owner[gated[node]]
        elif node in matrices:
            owner[node] = node
        elif makers:
            owner[node] = max(makers, key=order.__getitem__)
    for node in reversed(order):
        if node not in owner:
            readers = [owner[user] for user in node.users if user in owner]
            owner[node] = min(readers, key=order.__getitem__, default=layers[0].node)
    members: dict[fx.Node, list[str]] = {node: [] for node in order}
    for layer in layers:
        members[owner[layer.node]].append(layer.name)
    return tuple(Region(layers[order[node]].name, tuple(names)) for node, names in members.items() if names)


def _gated(layers: Sequence[Layer]) -> dict[fx.Node, fx.Node]:
    """Return, for each layer of a gate made from a pooled tensor, the tensor that it gates."""
    kinds = {layer.node: layer.kind for layer in layers}
    found: dict[fx.Node, fx.Node] = {}
    for layer in layers:
        if layer.kind != "Mul":
            continue
        for gated, gate in permutations(layer.node.all_input_nodes, 2):
            between = _between(gated, gate)
            first = between & set(gated.users)
            if first and all(kinds[node] in _POOLS for node in first):
                found |= dict.fromkeys(between, gated)
    return found


def _between(first: fx.Node, last: fx.Node) -> set[fx.Node]:
    """Return the nodes from behind one to another; none where these read anything else besides."""
    found: set[fx.Node] = set()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node is first or node in found:
            continue
        if node.op != "call_module":
            return set()
        found.add(node)
        waiting += node.all_input_nodes
    return found
