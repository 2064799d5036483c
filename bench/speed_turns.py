"""One case of `speed.py`: fewbit's candidates and the peers take turns on one network, batch and threads.

1. Fewbit's candidates alone: successive halving leaves the fastest few.
2. Those and every peer, a few rounds: the fastest candidate is the answer, and the peers near the fastest one
   are finalists.
3. The answer and the finalists, many rounds. Ratios are taken within these rounds, in which the answer was
   not chosen; the best peer is the one that is fastest in them, which can only lower the answer's ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from fewbit.engines.session import BlockTime, Setting
from fewbit.errors import EngineError
from fewbit.measure.intervals import Interval
from fewbit.measure.speed import Timed, Timing, measure_interleaved, survey
from fewbit.spec import Frozen

Form = Literal["float32", "bf16", "int8"]
_NEAR = 1.15
_FINALISTS = 5
_CANDIDATES = 3
_SURVEY_CALLS = 6


class Opened(Timed, Protocol):
    """What takes turns, until it is closed."""

    def close(self) -> None:
        """End its process."""
        ...


@dataclass(frozen=True)
class Entrant:
    """One that wants to take part.

    Attributes:
        name: The tool and what it computes in.
        how: The setting that it runs in.
        form: What its matrix products compute in.
        own: It is fewbit's.
        open: Starts it; an EngineError says why it cannot take part.
    """

    name: str
    how: str
    form: Form
    own: bool
    open: Callable[[], Opened]


class Pace(Frozen):
    """How long to measure.

    Attributes:
        rounds: Of the answer and the finalists.
        first_rounds: Of everyone.
        block_s: Seconds of one block, or one call where that is longer.
        survey_s: Seconds for choosing among fewbit's candidates, or a few calls of each where that is longer.
        seed: Of the order in each round.
    """

    rounds: int = 20
    first_rounds: int = 5
    block_s: float = 0.2
    survey_s: float = 3.0
    seed: int = 0


@dataclass(frozen=True)
class Standing:
    """How an entrant did.

    Attributes:
        entrant: Which.
        timing: Its speed; none where it failed, or was dropped from the candidates before the rounds.
        failed: Why it failed.
        dropped: It was slower than fewbit's other candidates.
        ratio: How many times as fast the answer is, for a finalist.
        interval: 95 % interval of the ratio.
        answer: It is the answer.
    """

    entrant: Entrant
    timing: Timing | None = None
    failed: str = ""
    dropped: bool = False
    ratio: float | None = None
    interval: Interval | None = None
    answer: bool = False


@dataclass
class _Runner:
    """An entrant that was opened; the error that it raises stands."""

    place: int
    entrant: Entrant
    opened: Opened
    failed: str = ""

    @property
    def setting(self) -> Setting:
        return self.opened.setting

    def time_block(self, seconds: float) -> BlockTime:
        try:
            return self.opened.time_block(seconds)
        except EngineError as error:
            self.failed = str(error)
            raise


def measure_case(
    entrants: Sequence[Entrant], pace: Pace, tell: Callable[[str], None] = lambda _: None
) -> list[Standing]:
    """Let entrants take turns.

    Args:
        entrants: Fewbit's candidates and the peers.
        pace: How long to measure.
        tell: Told what is being done.

    Returns:
        One Standing an entrant: the answer first, then from the fastest on. Where no own one runs there is
        no answer, and no ratios.
    """
    found: dict[int, Standing] = {}
    with ExitStack() as stack:
        runners = []
        for place, entrant in enumerate(entrants):
            tell(f"opening {entrant.name}, {entrant.how}")
            try:
                runner = _Runner(place, entrant, entrant.open())
            except EngineError as error:
                found[place] = Standing(entrant, failed=str(error))
                continue
            stack.callback(runner.opened.close)
            runners.append(runner)
        tell("rounds")
        found |= _Turns(runners, pace).run()
    return sorted(found.values(), key=lambda s: (not s.answer, -_speed(s)))


def _speed(standing: Standing) -> float:
    return standing.timing.images_per_s if standing.timing is not None else 0.0


class _Turns:
    """The stages of one case."""

    def __init__(self, runners: list[_Runner], pace: Pace) -> None:
        self.pace = pace
        self.own = [runner for runner in runners if runner.entrant.own]
        self.peers = [runner for runner in runners if not runner.entrant.own]
        self.found: dict[int, Standing] = {}

    def run(self) -> dict[int, Standing]:
        """Return how each did, by its place."""
        self._choose()
        first = self._stage([*self.own, *self.peers], self.pace.first_rounds, None)
        own = [runner for runner in self.own if runner.place in first]
        if own:
            answer = max(own, key=lambda runner: first[runner.place].images_per_s)
            self._final(answer, [p for p in self.peers if p.place in first], first)
        return self.found

    def _choose(self) -> None:
        """Drop all but the fastest of fewbit's candidates."""
        if len(self.own) <= _CANDIDATES:
            return
        ranked = survey(
            self.own,
            self._survey_s(),
            _CANDIDATES,
            self.pace.seed,
            on_drop=lambda place: self.own[place].opened.close(),
        )
        for one in ranked:
            runner = self.own[one.place]
            if one.reason:
                slow = not runner.failed
                self.found[runner.place] = Standing(runner.entrant, failed=runner.failed, dropped=slow)
        self.own = [self.own[one.place] for one in ranked if not one.reason]

    def _survey_s(self) -> float:
        """Time for a few calls of each, guessed from the first that runs."""
        images = sum(runner.setting.batch * runner.setting.streams for runner in self.own)
        for runner in self.own:
            with suppress(EngineError):
                call = runner.opened.time_block(0.0)
                return max(self.pace.survey_s, _SURVEY_CALLS * images * call.seconds / call.images)
        return self.pace.survey_s

    def _stage(self, runners: list[_Runner], rounds: int, baseline: _Runner | None) -> dict[int, Timing]:
        """Time runners side by side; those that fail are left out, and the others start anew."""
        while left := [runner for runner in runners if not runner.failed]:
            place = left.index(baseline) if baseline in left else None
            try:
                timings = measure_interleaved(
                    left, rounds, self.pace.block_s, self.pace.seed, baseline=place, min_calls=1
                )
            except EngineError:
                gone = [runner for runner in left if runner.failed]
                self.found |= {r.place: Standing(r.entrant, failed=r.failed) for r in gone}
                continue
            found = {runner.place: timing for runner, timing in zip(left, timings, strict=True)}
            self.found |= {r.place: Standing(r.entrant, found[r.place]) for r in left}
            return found
        return {}

    def _final(self, answer: _Runner, peers: list[_Runner], first: dict[int, Timing]) -> None:
        """Time the answer against the peers near the fastest one."""
        peers = sorted(peers, key=lambda p: -first[p.place].images_per_s)
        fastest = first[peers[0].place].images_per_s if peers else 0.0
        near = [p for p in peers if first[p.place].images_per_s * _NEAR >= fastest][:_FINALISTS]
        timings = self._stage([answer, *near], self.pace.rounds, answer)
        if answer.failed:
            return
        self.found[answer.place] = replace(self.found[answer.place], answer=True)
        for peer in near:
            timing = timings.get(peer.place)
            if timing is not None and timing.ratio and timing.ratio_interval is not None:
                low, high = timing.ratio_interval.low, timing.ratio_interval.high
                self.found[peer.place] = replace(
                    self.found[peer.place],
                    ratio=1 / timing.ratio,
                    interval=Interval(low=1 / high, high=1 / low),
                )
