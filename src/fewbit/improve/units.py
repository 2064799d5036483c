"""Cutting a network into the pieces that are reconstructed one after the other: layers, or blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from fewbit.net import Net, name_of
from fewbit.place.quantizer import QuantConv2d, Quantizer, QuantLayer, QuantLinear

_ACTIVATIONS = frozenset(
    {
        "Relu",
        "Clip",
        "Min",
        "Silu",
        "HardSwish",
        "Sigmoid",
        "HardSigmoid",
        "LeakyRelu",
        "PRelu",
        "Gelu",
        "Elu",
    }
)
_MOST_LAYERS = 16


@dataclass(frozen=True)
class Unit:
    """A stretch of a network that is optimised as one.

    Attributes:
        nodes: What it computes, in the order in which it runs.
        inputs: What it reads from before.
        outputs: What is read after it.
        layers: Its convolutions and matrix products with a weight grid, by their node.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    layers: dict[fx.Node, QuantLayer]

    @property
    def name(self) -> str:
        """Return the names of its first and last layer."""
        names = [name_of(node) for node in (self.layers or self.nodes)]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def split_into_layers(net: Net) -> list[Unit]:
    """Return one unit a convolution or matrix product, with all that comes before the next one.

    A layer's unit ends behind its activation, the sum that it goes into and the quantizer behind these, so
    what is compared with the float network is what the next layer reads.
    """
    nodes = _called(net)
    starts = [i for i, node in enumerate(nodes) if node in _matrices(net, nodes)]
    return [_unit(net, nodes[a:b]) for a, b in pairwise([0, *starts[1:], len(nodes)]) if a < b]


def split_into_blocks(net: Net, group: int = 2) -> list[Unit]:
    """Return the stretches between the places where a single tensor carries everything.

    In a residual network these are its residual blocks, in GoogLeNet its inception modules, in MobileNetV2
    its inverted residuals. Where layers follow each other in a row, `group` of them make a unit; the first
    and the last layer of the network stay by themselves. A stretch of more than 16 layers (a dense block)
    falls into its layers.

    Args:
        net: Placed.
        group: How many layers in a row make one unit.
    """
    nodes = _called(net)
    matrices = _matrices(net, nodes)
    ends = [i for i in range(len(nodes) - 1) if _is_narrow(net, nodes, i)]
    parts = [nodes[a:b] for a, b in pairwise([0, *[end + 1 for end in ends], len(nodes)]) if a < b]
    merged: list[list[fx.Node]] = []
    for part in _with_layers(parts, matrices):
        if sum(node in matrices for node in part) <= _MOST_LAYERS:
            merged.append(part)
            continue
        starts = [i for i, node in enumerate(part) if node in matrices]
        merged += [part[a:b] for a, b in pairwise([0, *starts[1:], len(part)])]
    order = [node for node in nodes if node in matrices]
    alone = {order[0], order[-1]} if order else set()
    return [_unit(net, part) for part in _grouped(merged, matrices, alone, group)]


def whole_network(net: Net) -> list[Unit]:
    """Return the network as a single unit, whose output is the logits."""
    return [_unit(net, _called(net))]


def _called(net: Net) -> list[fx.Node]:
    return [node for node in net.graph.graph.nodes if node.op == "call_module"]


def _matrices(net: Net, nodes: Iterable[fx.Node]) -> dict[fx.Node, QuantLayer]:
    found = {}
    for node in nodes:
        module = net.graph.get_submodule(str(node.target))
        if isinstance(module, QuantConv2d | QuantLinear):
            found[node] = module
    return found


def _unit(net: Net, part: Sequence[fx.Node]) -> Unit:
    own = set(part)
    read = (source for node in part for source in node.all_input_nodes if source not in own)
    outputs = tuple(node for node in part if any(user not in own for user in node.users))
    return Unit(tuple(part), tuple(dict.fromkeys(read)), outputs, _matrices(net, part))


def _is_narrow(net: Net, nodes: Sequence[fx.Node], index: int) -> bool:
    """Tell whether one tensor carries everything behind a node, and nothing that belongs to it follows."""
    before = set(nodes[: index + 1])
    after = set(nodes[index + 1 :])
    carried = {s for node in after for s in node.all_input_nodes if s in before or s.op == "placeholder"}
    following = nodes[index + 1]
    module = net.graph.get_submodule(str(following.target))
    # A quantizer of fixed steps belongs to what makes its tensor, one that takes them anew to its reader.
    belongs = isinstance(module, Quantizer) or net.layer(name_of(following)).kind in _ACTIVATIONS
    return len(carried) == 1 and not belongs


def _with_layers(parts: Sequence[list[fx.Node]], matrices: dict[fx.Node, QuantLayer]) -> list[list[fx.Node]]:
    """Join what has no layer of its own to what follows it; at the end, to what comes before."""
    joined: list[list[fx.Node]] = []
    waiting: list[fx.Node] = []
    for part in parts:
        waiting = waiting + part
        if any(node in matrices for node in part):
            joined.append(waiting)
            waiting = []
    if waiting and joined:
        joined[-1] = joined[-1] + waiting
    elif waiting:
        joined.append(waiting)
    return joined


def _grouped(
    parts: Sequence[list[fx.Node]], matrices: dict[fx.Node, QuantLayer], alone: set[fx.Node], group: int
) -> Iterator[list[fx.Node]]:
    """Yield single layers in a row together, `group` at a time."""
    row: list[fx.Node] = []
    for part in parts:
        own = [node for node in part if node in matrices]
        if len(own) != 1 or own[0] in alone:
            if row:
                yield row
            row = []
            yield part
            continue
        row = row + part
        if sum(node in matrices for node in row) >= group:
            yield row
            row = []
    if row:
        yield row
