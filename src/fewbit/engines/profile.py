"""How long each operator of an opened file takes, as the engine's own profiler counts it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Protocol, runtime_checkable

from fewbit.engines.session import Images, PlacedOperator
from fewbit.spec import Frozen

# Calls that are not counted: the first ones fetch memory and choose kernels.
WARM_CALLS = 3


class Flow(Frozen):
    """Where the values of an operator come from, and in which form they leave it.

    Attributes:
        sources: Places, among the operators of the profile, of those whose results it reads.
        makes: Type of its first result as the engine tells it: "int8", "uint8", "float32", "bf16", ...
        layout: Order of the result's axes in memory as the engine writes it ("acdb"), where it tells.
        kernel: Name of the kernel, where the engine tells.
    """

    sources: tuple[int, ...] = ()
    makes: str = ""
    layout: str = ""
    kernel: str = ""


class OperatorTime(PlacedOperator):
    """One operator of the graph that an engine executes, and what it costs.

    Attributes:
        ms: Milliseconds of one call of the file, the mean over the calls profiled; 0 for what the engine does
            without running anything (a Reshape in place).
        flow: What it reads and makes.
    """

    ms: float = 0.0
    flow: Flow = Flow()


class Taken(Frozen):
    """What a profiler says of one operator.

    Attributes:
        name: Its name in the engine's graph; empty where it has none.
        kind: The engine's operator type.
        ms: Milliseconds of one call.
        precision: What it runs in, for one that the placement leaves out.
    """

    name: str
    kind: str
    ms: float
    precision: str = "float32"


@runtime_checkable
class Profiled(Protocol):
    """A session that can say how long each of its operators takes."""

    def profile(self, images: Images, calls: int) -> tuple[OperatorTime, ...]:
        """Open the file again with the engine's profiler on, and run it.

        Args:
            images: One batch of the setting's size, of the type that the file takes.
            calls: Calls to count, after `WARM_CALLS` others.

        Returns:
            Every operator that runs, with the mean of its time. One call runs at a time, with the threads of
            one stream, and the profiler costs a little itself, so the times add up to about the latency.
        """
        ...


def join_times(
    placed: Iterable[PlacedOperator], taken: Iterable[Taken], flows: Iterable[Flow] = ()
) -> tuple[OperatorTime, ...]:
    """Give the operators of a placement their times, and their flows where these are told.

    Operators are matched by name; those without one, by their order among the nameless of their kind. What
    the placement leaves out as part of another operator (dequantizers of weights) follows behind under its
    own name.

    Example:
        >>> conv = PlacedOperator(name="c", layers=("conv",), kind="Conv", precision="int8", matrix=True)
        >>> taken = [Taken(name="c", kind="Conv", ms=2.0), Taken(name="w", kind="Cast", ms=1)]
        >>> found = join_times([conv], taken)
        >>> [(o.name, o.layers, o.ms) for o in found]
        [('c', ('conv',), 2.0), ('w', (), 1.0)]
    """
    named: dict[str, Taken] = {}
    nameless: dict[str, list[Taken]] = {}
    for one in taken:
        if one.name:
            named[one.name] = one
        else:
            nameless.setdefault(one.kind, []).append(one)
    found = []
    for operator, flow in zip_longest(placed, flows):
        assert operator is not None
        if operator.name:
            match = named.pop(operator.name, None)
        else:
            waiting = nameless.get(operator.kind)
            match = waiting.pop(0) if waiting else None
        ms = match.ms if match is not None else 0.0
        found.append(OperatorTime(**operator.model_dump(), ms=ms, flow=flow or Flow()))
    rest = [*named.values(), *(one for waiting in nameless.values() for one in waiting)]
    found += [
        OperatorTime(name=o.name, kind=o.kind, precision=o.precision, ms=o.ms) for o in rest if o.ms > 0
    ]
    return tuple(found)
