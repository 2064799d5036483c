"""Channel shuffles written into the order of the channels of the convolutions around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit import ops
from fewbit.net import Net, Normal, add_layer

_SWAP = (0, 2, 1, 3, 4)
_EACH_ALONE = frozenset(
    {
        *("Relu", "Clip", "Silu", "HardSwish", "Sigmoid", "HardSigmoid", "LeakyRelu", "Elu", "Gelu", "Mish"),
        *("Tanh", "Softplus", "MaxPool", "AvgPool", "BatchNorm"),
    }
)
_Channel = tuple[fx.Node, int]


def unshuffle(net: Net) -> int:
    """Remove channel shuffles, with the concatenations and halvings around them, and compute the same.

    A shuffle (Reshape, Permute, Reshape), a concatenation and a slice only say which channel of which tensor
    comes where. So each convolution behind them can read a concatenation of slices of the tensors that the
    channels come from, if those tensors hold the channels that one reader takes side by side. Their order is
    that of the rows of the convolution that makes them, and the reader's columns follow. In ShuffleNetV2
    every channel is then copied once, where each block copied all of them three times.

    The network computes the same but for the order of sums in float; on codes it is exact. What is not made
    by convolutions, or is read by anything else, keeps its shuffles.

    Args:
        net: Changed in place.

    Returns:
        Shuffles removed.
    """
    modules = {layer.node: layer.module for layer in net.layers()}
    if not any(isinstance(m, ops.Permute) and m.dims == _SWAP for m in modules.values()):
        return 0
    routes = _Routes(net, modules)
    removed = 0
    for part in routes.parts():
        plan = _plan(routes, part)
        if plan is not None:
            _apply(net, plan)
            removed += sum(node in routes.shuffles for node in part)
    net.refresh()
    return removed


class _Shapes(fx.Interpreter):
    """Runs a network on one image and keeps the shape of each value."""

    def __init__(self, net: Net) -> None:
        super().__init__(net.graph)
        self.extra_traceback = False  # an error stays one line
        self.found: dict[fx.Node, tuple[int, ...]] = {}
        with torch.no_grad():
            self.run(net.example())

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = tuple(value.shape)
        return value


class _Routes:
    """The layers that only move channels, and where each channel of theirs comes from.

    Attributes:
        sources: For each such layer's value (N, C, H, W), the tensor and the channel behind each of its own.
        inside: All such layers, those within a shuffle too.
        shuffles: The last layer of each shuffle.
    """

    def __init__(self, net: Net, modules: Mapping[fx.Node, nn.Module]) -> None:
        self.modules, self.shapes = modules, _Shapes(net).found
        self.sources: dict[fx.Node, list[_Channel]] = {}
        self.inside: set[fx.Node] = set()
        self.shuffles: set[fx.Node] = set()
        for node, module in modules.items():
            if len(self.shapes.get(node, ())) != 4:
                continue
            if isinstance(module, ops.Concat) and module.dim in (1, -3):
                parts = [read for read in node.args if isinstance(read, fx.Node)]
                self._enter(node, [one for part in parts for one in self._of(part)])
            elif isinstance(module, ops.Slice) and set(module.ranges) == {1}:
                self._enter(node, self._of(node.all_input_nodes[0])[slice(*module.ranges[1])])
            elif shuffled := self._shuffled(node):
                image, groups = shuffled
                read = self._of(image)
                count = len(read) // groups
                self._enter(node, [read[i % groups * count + i // groups] for i in range(len(read))])
                self.inside |= {node.all_input_nodes[0], node.all_input_nodes[0].all_input_nodes[0]}
                self.shuffles.add(node)

    def _enter(self, node: fx.Node, sources: list[_Channel]) -> None:
        self.sources[node] = sources
        self.inside.add(node)

    def _of(self, node: fx.Node) -> list[_Channel]:
        return self.sources.get(node) or [(node, i) for i in range(self.shapes[node][1])]

    def _shuffled(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """Return what a shuffle reads and its groups, where a layer is the last of one."""
        chain = [node]
        for kind in (ops.Reshape, ops.Permute, ops.Reshape):
            if not isinstance(self.modules.get(chain[-1]), kind):
                return None
            chain.append(chain[-1].all_input_nodes[0])
        last, swap, first, image = chain
        if self.modules[swap].dims != _SWAP or len(first.users) != 1 or len(swap.users) != 1:
            return None
        before, between, after = (self.shapes[value] for value in (image, first, last))
        groups = between[1]
        whole = (before[0], groups, before[1] // groups, *before[2:])
        return (image, groups) if before == after and between == whole else None

    def parts(self) -> list[list[fx.Node]]:
        """Return the connected groups of these layers that hold a shuffle."""
        seen, found = set[fx.Node](), []
        for shuffle in (node for node in self.modules if node in self.shuffles):
            part, waiting = set[fx.Node](), [shuffle]
            while waiting:
                node = waiting.pop()
                if node in part or node in seen:
                    continue
                if node in self.inside:
                    part.add(node)
                    waiting += node.all_input_nodes
                waiting += [user for user in node.users if user in self.inside and user not in part]
            seen |= part
            if part:
                found.append([node for node in self.modules if node in part])
        return found


@dataclass
class _Plan:
    """What changes.

    Attributes:
        orders: For each tensor that channels come from, its channels in their new order.
        makers: The layers whose parameters carry that order.
        reads: For each value that is read, the pieces (tensor, start, stop) that it is put together from.
        readers: For each value that is read, the layers behind it that carry its order, and that order.
    """

    orders: dict[fx.Node, list[int]]
    makers: dict[fx.Node, list[fx.Node]]
    reads: dict[fx.Node, list[tuple[fx.Node, int, int]]]
    readers: dict[fx.Node, tuple[list[fx.Node], list[int]]]


def _plan(routes: _Routes, part: Sequence[fx.Node]) -> _Plan | None:
    """Say how to do without a group of shuffles; none where something cannot follow."""
    ends = [node for node in part if node in routes.sources and set(node.users) - routes.inside]
    taken = [one for end in ends for one in routes.sources[end]]
    tensors = [node for node in routes.shapes if node in {source for source, _ in taken}]
    makers = {node: _makers(routes, node) for node in tensors}
    behind = {end: _behind(routes, end) for end in ends}
    if not all(makers.values()) or not all(behind.values()) or len(set(taken)) < len(taken):
        return None
    place = {one: number for number, end in enumerate(ends) for one in routes.sources[end]}
    orders = {
        node: _in_order([place.get((node, i), len(ends)) for i in range(routes.shapes[node][1])])
        for node in tensors
    }
    plan = _Plan(orders, {n: c for n, c in makers.items() if c}, {}, {})
    for number, end in enumerate(ends):
        pieces, joined = [], []
        for node in tensors:
            own = [i for i, c in enumerate(orders[node]) if place.get((node, c)) == number]
            if own:
                pieces.append((node, own[0], own[-1] + 1))
                joined += [(node, orders[node][i]) for i in own]
        where = {one: i for i, one in enumerate(routes.sources[end])}
        plan.reads[end] = pieces
        plan.readers[end] = behind[end] or [], [where[one] for one in joined]
    return plan


def _in_order(places: Sequence[int]) -> list[int]:
    """Return the channels sorted by the reader that takes them."""
    return sorted(range(len(places)), key=lambda i: (places[i], i))


def _makers(routes: _Routes, node: fx.Node) -> list[fx.Node] | None:
    """Return the layers from a tensor up to the convolution that makes it, if its rows may be reordered."""
    if set(node.users) - routes.inside:
        return None
    chain = [node]
    while not _mixes(routes.modules.get(chain[-1])):
        if not _keeps_apart(routes.modules.get(chain[-1])):
            return None
        chain.append(chain[-1].all_input_nodes[0])
        if len(chain[-1].users) != 1:
            return None
    return chain


def _behind(routes: _Routes, node: fx.Node) -> list[fx.Node] | None:
    """Return the layers behind a value down to the convolutions that may reorder their columns."""
    found: list[fx.Node] = []
    waiting = [user for user in node.users if user not in routes.inside]
    while waiting:
        user = waiting.pop()
        module = routes.modules.get(user)
        if user in routes.inside:
            return None
        if not _mixes(module):
            if not _keeps_apart(module):
                return None
            waiting += list(user.users)
        if user not in found:
            found.append(user)
    return found


def _mixes(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1


def _keeps_apart(module: nn.Module | None) -> bool:
    """Tell whether each channel of a layer's result depends on the same channel of its input alone."""
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels == module.out_channels
    return module is not None and ops.kind_of(module) in _EACH_ALONE


def _apply(net: Net, plan: _Plan) -> None:
    for node, order in plan.orders.items():
        for maker in plan.makers[node]:
            _reorder_rows(net, str(maker.target), order)
    for readers, order in plan.readers.values():
        for reader in readers:
            module = net.graph.get_submodule(str(reader.target))
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                module.weight = _taken(module.weight, order, 1)
            else:
                _reorder_rows(net, str(reader.target), order)
    for end, pieces in plan.reads.items():
        value = _join(net, end, pieces, plan.orders)
        for user in list(end.users):
            user.replace_input_with(end, value)


def _join(
    net: Net,
    end: fx.Node,
    pieces: Iterable[tuple[fx.Node, int, int]],
    orders: Mapping[fx.Node, Sequence[int]],
) -> fx.Node:
    """Add the slices and the concatenation that stand for a value."""
    parts: list[fx.Node] = []
    with net.graph.graph.inserting_before(end):
        for node, start, stop in pieces:
            whole = (start, stop) == (0, len(orders[node]))
            module = ops.Slice({1: (start, stop, 1)})
            parts.append(node if whole else add_layer(net.graph, f"{end.target}.{len(parts)}", module, node))
        if len(parts) == 1:
            return parts[0]
        return add_layer(net.graph, f"{end.target}.concat", ops.Concat(1), *parts)


def _reorder_rows(net: Net, name: str, order: Sequence[int]) -> None:
    """Reorder the channels that a layer makes."""
    module: Any = net.graph.get_submodule(name)
    for key in ("weight", "bias"):
        value = getattr(module, key, None)
        if value is not None:
            setattr(module, key, _taken(value, order, 0))
    for key in ("running_mean", "running_var"):
        value = getattr(module, key, None)
        if value is not None:
            setattr(module, key, value[list(order)].clone())
    if name in net.statistics:
        told = net.statistics[name]
        net.statistics[name] = Normal(told.mean[list(order)], told.std[list(order)])


def _taken(value: Tensor, order: Sequence[int], axis: int) -> nn.Parameter:
    places = torch.tensor(list(order), device=value.device)
    return nn.Parameter(value.detach().index_select(axis, places), value.requires_grad)
