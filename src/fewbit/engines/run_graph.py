"""The graph that an engine runs, beside the file that it comes from: who feeds whom, and for which node."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from fewbit.engines.exported import PASSED, QUANTIZING, ExportedGraph
from fewbit.engines.profile import OperatorTime
from fewbit.engines.session import CONVERTING

_QUANTIZERS = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})


class RunGraph:
    """The operators of a profile as a graph; they are called by their places in it.

    Args:
        exported: The file that was profiled.
        operators: The profile.

    Attributes:
        exported: See above.
        operators: See above.
        readers: For each operator, those that read its result.
        layers: For each operator, the nodes of the file that it stands for. One that the engine made itself
            (a part of a HardSwish) stands for the nodes between those that its neighbours stand for.
    """

    def __init__(self, exported: ExportedGraph, operators: Sequence[OperatorTime]) -> None:
        self.exported, self.operators = exported, tuple(operators)
        self.readers: list[list[int]] = [[] for _ in operators]
        for place, operator in enumerate(operators):
            for source in operator.flow.sources:
                self.readers[source].append(place)
        self._owned = {layer for operator in operators for layer in operator.layers}
        self.layers = [self._layers(place) for place in range(len(operators))]
        self._purpose = _float_by_choice(exported)

    def sources(self, place: int) -> Sequence[int]:
        """Return the operators whose results an operator reads."""
        return self.operators[place].flow.sources

    def is_converting(self, place: int) -> bool:
        """Say whether an operator only converts, moves or relabels values."""
        return self.operators[place].kind in CONVERTING

    def is_outside(self, place: int) -> bool:
        """Say whether an operator is none of the graph's: a dequantizer of constants."""
        return not self.operators[place].flow.makes

    def asks_integers(self) -> bool:
        """Say whether the file quantizes anything that is no constant."""
        return any(node.op_type in _QUANTIZERS for node in self.exported.nodes.values())

    def by_choice(self, place: int) -> bool:
        """Say whether the file leaves in float what an operator stands for.

        It does where the weights are floats, and for whatever no quantizer parts from such a layer.
        """
        return bool(self.layers[place]) and all(name in self._purpose for name in self.layers[place])

    def names(self, place: int) -> tuple[str, ...]:
        """Return the nodes that an operator stands for, a quantizer's own name among them."""
        if self.layers[place]:
            return self.layers[place]
        found = self.exported.find(self.operators[place].name)
        return (found,) if found is not None else ()

    def converts_input(self) -> frozenset[int]:
        """Return the operators that do nothing but convert the image, before anything works on it."""
        found: set[int] = set()
        for place in range(len(self.operators)):
            ready = found.issuperset(self.sources(place))
            if ready and self.is_converting(place) and not self.is_outside(place):
                found.add(place)
        return frozenset(found)

    def beyond(self, place: int, forward: bool) -> Iterator[int]:
        """Yield the nearest operators before or behind one that do more than convert."""
        waiting, seen = [place], {place}
        while waiting:
            here = waiting.pop(0)
            for other in self.readers[here] if forward else self.sources(here):
                if other in seen:
                    continue
                seen.add(other)
                if self.is_converting(other):
                    waiting.append(other)
                else:
                    yield other

    def reader_of_constant(self, place: int) -> int | None:
        """Return the operator that reads what a dequantizer of constants makes."""
        found = self.exported.find(self.operators[place].name)
        for follower in self.exported.followers(found) if found is not None else ():
            for other, layers in enumerate(self.layers):
                if follower in layers:
                    return other
        return None

    def _layers(self, place: int) -> tuple[str, ...]:
        operator = self.operators[place]
        if operator.layers or self.is_converting(place) or self.is_outside(place):
            return operator.layers
        first = self._named(place, self.sources)
        last = self._named(place, self.readers.__getitem__)
        behind = self._reach(first, last, self.exported.followers)
        before = self._reach(last, first, self._makers)
        between = (behind & before) - first - last
        free = between - self._owned or between  # a part of what another operator is named after
        return tuple(n for n in self.exported.nodes if n in free and self._works(n))

    def _works(self, name: str) -> bool:
        return self.exported.nodes[name].op_type not in PASSED

    def _named(self, place: int, neighbours: Callable[[int], Iterable[int]]) -> set[str]:
        """Return the nodes of the nearest operators in one direction that the file knows by name."""
        found, waiting, seen = set[str](), [place], {place}
        while waiting:
            for other in neighbours(waiting.pop()):
                if other in seen:
                    continue
                seen.add(other)
                operator = self.operators[other]
                node = self.exported.find(operator.name)
                if node is not None:
                    found.add(node)
                elif operator.layers:
                    found.update(operator.layers)
                else:
                    waiting.append(other)
        return found

    def _reach(
        self, start: Collection[str], stop: Collection[str], step: Callable[[str], Iterable[str]]
    ) -> set[str]:
        found, waiting = set[str](), list(start)
        while waiting:
            for name in step(waiting.pop()):
                if name not in found:
                    found.add(name)
                    if name not in stop:
                        waiting.append(name)
        return found

    def _makers(self, name: str) -> list[str]:
        makers = (self.exported.maker(value) for value in self.exported.nodes[name].input)
        return [maker for maker in makers if maker is not None]


def _float_by_choice(exported: ExportedGraph) -> frozenset[str]:
    """Return the nodes that no quantizer parts from a layer whose weights are floats.

    A layer with quantized weights is not among them, and ends such a part.
    """
    quantized = {
        name
        for name, node in exported.nodes.items()
        if exported.is_matrix(name) and exported.is_quantized(node.input[1])
    }
    waiting = [n for n in exported.nodes if exported.is_matrix(n) and n not in quantized]
    found = set(waiting)
    while waiting:
        name = waiting.pop()
        makers = (exported.maker(value) for value in exported.nodes[name].input)
        for other in [*exported.followers(name), *(m for m in makers if m is not None)]:
            passes = exported.nodes[other].op_type not in QUANTIZING and other not in quantized
            if passes and other not in found:
                found.add(other)
                waiting.append(other)
    return frozenset(found)
