"""Where the time of a long run goes: seconds and processor seconds, phase by phase.

A phase is a piece of code: `with phase("export"):`, or a function decorated with `@phase("export")`. Phases
nest; a second belongs to the innermost one alone, so all of them add up to the run. Code with phases costs a
look at a variable where no `Clock` runs. A clock belongs to the thread that started it: what other threads do
beside counts as processor time of the phase in which they did it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

from fewbit.spec import Frozen

Item = TypeVar("Item")


class PhaseTime(Frozen):
    """What one phase took in one stage.

    Attributes:
        stage: The outermost phase around it.
        phase: Its name; that of the stage for what no inner phase claims.
        seconds: On the wall.
        cpu_s: Processor seconds of this process, all its threads.
        child_cpu_s: Processor seconds of the processes that it started.
        times: How often it began.
    """

    stage: str
    phase: str
    seconds: float
    cpu_s: float
    child_cpu_s: float
    times: int


class _Reading(NamedTuple):
    wall_s: float
    cpu_s: float
    child_cpu_s: float


class Clock:
    """Counts while it is entered; `phases` may be asked for at any time.

    Args:
        name: Of the stage and phase in which it counts what no phase claims.
        child_cpu_s: Returns the processor seconds that child processes have used so far.
        earlier: What runs before this one took; goes on from there.

    Example:
        >>> with Clock("run") as clock:
        ...     with phase("trial"):
        ...         with phase("export"):
        ...             pass
        >>> [(p.stage, p.phase, p.times) for p in clock.phases()]
        [('run', 'run', 1), ('trial', 'trial', 1), ('trial', 'export', 1)]
    """

    def __init__(
        self,
        name: str,
        child_cpu_s: Callable[[], float] = lambda: 0.0,
        earlier: Sequence[PhaseTime] = (),
    ) -> None:
        self._name, self._child_cpu_s = name, child_cpu_s
        self._spent: dict[tuple[str, str], list[float]] = {}
        self.add(earlier)
        self._within: list[str] = []
        self._since = self._read()

    def __enter__(self) -> Clock:
        self._token = _running.set(self)
        self._since = self._read()
        self._count((self._name, self._name))
        return self

    def __exit__(self, *_: object) -> None:
        self._settle()
        _running.reset(self._token)

    def add(self, earlier: Sequence[PhaseTime]) -> None:
        """Count what an earlier run took too."""
        for one in earlier:
            spent = self._spent.setdefault((one.stage, one.phase), [0.0, 0.0, 0.0, 0.0])
            for place, more in enumerate((one.seconds, one.cpu_s, one.child_cpu_s, one.times)):
                spent[place] += more

    def begin(self, name: str) -> None:
        """Let a phase begin inside the present one."""
        self._settle()
        self._within.append(name)
        self._count(self._key())

    def end(self) -> None:
        """Let the present phase end."""
        self._settle()
        self._within.pop()

    def phases(self) -> tuple[PhaseTime, ...]:
        """Return what each phase took so far, in the order in which they first began."""
        self._settle()
        return tuple(
            PhaseTime(stage=stage, phase=name, seconds=s, cpu_s=cpu, child_cpu_s=child, times=int(times))
            for (stage, name), (s, cpu, child, times) in self._spent.items()
        )

    def _key(self) -> tuple[str, str]:
        return (self._within[0], self._within[-1]) if self._within else (self._name, self._name)

    def _count(self, key: tuple[str, str]) -> None:
        self._spent.setdefault(key, [0.0, 0.0, 0.0, 0.0])[3] += 1

    def _settle(self) -> None:
        """Give what went by since the last change to the present phase."""
        # Between the end of a process and the reaping of it, its seconds are nowhere: never count downwards.
        now = _Reading(*map(max, self._since, self._read()))
        spent = self._spent.setdefault(self._key(), [0.0, 0.0, 0.0, 0.0])
        for place, (before, after) in enumerate(zip(self._since, now, strict=True)):
            spent[place] += after - before
        self._since = now

    def _read(self) -> _Reading:
        return _Reading(time.perf_counter(), time.process_time(), self._child_cpu_s())


_running: ContextVar[Clock | None] = ContextVar("fewbit clock", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count what happens inside as a phase, where a clock runs."""
    clock = _running.get()
    if clock is None:
        yield
        return
    clock.begin(name)
    try:
        yield
    finally:
        clock.end()


def each_timed(items: Iterable[Item], name: str) -> Iterator[Item]:
    """Yield items; the wait for each is a phase, what is done with it is not."""
    source, end = iter(items), object()
    while True:
        with phase(name):
            item = next(source, end)
        if item is end:
            return
        yield item  # type: ignore[misc]  # it is an Item, the end was handled
