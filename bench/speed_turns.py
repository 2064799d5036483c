"""One case of `speed.py`: fewbit's candidates and the peers take turns on one network, batch and threads.

1. Fewbit's candidates alone: successive halving leaves the fastest few; those and the other ways to run them
   are halved once more.
2. Those and every peer, a few rounds: the fastest candidate is the answer, and the peers near the fastest one
   are finalists.
3. The answer and the finalists in several sittings, for each of which they are opened anew. Within a sitting
   the ratio is the median over its rounds; the figure is the median over sittings, and so is its interval.
   Where in memory a process happens to lie makes it a few percent faster or slower for as long as it lives
   (six copies of one ResNet-18 file spread over 9 %), which rounds alone would take for a difference.

The answer was chosen before the sittings. The best peer is the one that is fastest in them, which can only
lower the answer's ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, Protocol

from fewbit.engines.session import BlockTime, Setting
from fewbit.errors import EngineError
from fewbit.measure.host import usable_cores
from fewbit.measure.intervals import Interval, median_interval
from fewbit.measure.speed import Timed, Timing, measure_interleaved, survey
from fewbit.spec import Frozen

Form = Literal["float32", "bf16", "int8"]
_NEAR = 1.15
_FINALISTS = 3
_CANDIDATES = 3
_SURVEY_CALLS = 6
_SURVEY_BLOCKS = 15


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
        further: Other ways to run the same, that take part where it is among the fastest.
    """

    name: str
    how: str
    form: Form
    own: bool
    open: Callable[[], Opened]
    further: tuple[Entrant, ...] = ()


class Pace(Frozen):
    """How long to measure.

    Attributes:
        sittings: Of the answer and the finalists.
        rounds: Of each sitting, at least 3.
        first_rounds: Of everyone.
        block_s: Seconds of one block, or one call where that is longer.
        survey_s: Seconds for choosing among fewbit's candidates, or a few calls of each where that is longer.
        seed: Of the order in each round.
    """

    sittings: int = 6
    rounds: int = 4
    first_rounds: int = 5
    block_s: float = 0.2
    survey_s: float = 3.0
    seed: int = 0

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Pace:
        """Return the pace that a command's options ask for."""
        return cls(
            sittings=options["sittings"],
            rounds=options["rounds"],
            first_rounds=options["first_rounds"],
            block_s=options["block"],
            survey_s=_SURVEY_BLOCKS * options["block"],
            seed=options["seed"],
        )


@dataclass(frozen=True)
class Standing:
    """How an entrant did.

    Attributes:
        entrant: Which.
        timing: Its speed; none where it failed, or was dropped from the candidates before the rounds.
        failed: Why it failed.
        dropped: It was slower than fewbit's other candidates.
        ratio: How many times as fast the answer is, for a finalist: median over sittings.
        interval: 95 % interval of the ratio, over sittings.
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
    everyone = dict(enumerate(entrants))
    found: dict[int, Standing] = {}
    with ExitStack() as stack:

        def open_further(entrant: Entrant) -> list[_Runner]:
            places = {len(everyone) + at: further for at, further in enumerate(entrant.further)}
            everyone.update(places)
            return _open_all(places, stack, found, tell)

        runners = _open_all(everyone, stack, found, tell)
        tell("first rounds")
        answer, near = _Stages(runners, pace, found, open_further).run()
    if answer is not None:
        chosen = {place: everyone[place] for place in (answer, *near)}
        _Sittings(chosen, answer, pace, found).run(tell)
    return sorted(found.values(), key=lambda s: (not s.answer, -_speed(s)))


def measure_all(
    entrants: Sequence[Entrant],
    rounds: int,
    baseline: int | None,
    pace: Pace,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Standing]:
    """Let all entrants take turns in one sitting.

    Args:
        entrants: Who takes part.
        rounds: How many.
        baseline: The place of the one that ratios of speed are to.
        pace: How long to measure.
        tell: Told what is being done.

    Returns:
        One Standing an entrant, in their order; its timing has the ratio.
    """
    found: dict[int, Standing] = {}
    with ExitStack() as stack:
        runners = _open_all(dict(enumerate(entrants)), stack, found, tell)
        timings = _time(runners, rounds, pace, pace.seed, baseline, found)
    found |= {place: Standing(entrants[place], timing) for place, timing in timings.items()}
    return [found[place] for place in range(len(entrants))]


def hold_sittings(
    entrants: Sequence[Entrant], answer: int, pace: Pace, tell: Callable[[str], None] = lambda _: None
) -> list[Standing]:
    """Let entrants take turns in sittings alone, where who the answer is has been settled before.

    Args:
        entrants: Who takes part.
        answer: The place of the answer among them.
        pace: How long to measure.
        tell: Told what is being done.

    Returns:
        One Standing an entrant, in their order; no ratios where the answer fails.
    """
    found = {place: Standing(entrant) for place, entrant in enumerate(entrants)}
    _Sittings(dict(enumerate(entrants)), answer, pace, found).run(tell)
    return [found[place] for place in range(len(entrants))]


def choose_fastest(entrants: Sequence[Entrant], seconds: float, seed: int) -> Standing:
    """Return the fastest of entrants; where none runs, one that says why.

    Args:
        entrants: One or more.
        seconds: For all of them, or a few calls of each where that is longer.
        seed: Of their order in each round.
    """
    found: dict[int, Standing] = {}
    with ExitStack() as stack:
        runners = _open_all(dict(enumerate(entrants)), stack, found, lambda _: None)
        ranked = survey(runners, _survey_s(runners, seconds), 1, seed) if runners else []
        best = next((one for one in ranked if one.images_per_s and not runners[one.place].failed), None)
        failed = [found[place].failed for place in sorted(found)] + [runner.failed for runner in runners]
    if best is None:
        return Standing(entrants[0], failed=next(filter(None, failed), "it was not tried"))
    return Standing(runners[best.place].entrant)


def _open_all(
    entrants: Mapping[int, Entrant],
    stack: ExitStack,
    found: dict[int, Standing],
    tell: Callable[[str], None],
) -> list[_Runner]:
    """Open entrants by place until the stack closes, a few at once; those that fail are found to have."""

    def start(place: int, entrant: Entrant) -> _Runner | Standing:
        try:
            runner = _Runner(place, entrant, entrant.open())
        except EngineError as error:
            return Standing(entrant, failed=str(error))
        stack.callback(runner.opened.close)
        return runner

    for entrant in entrants.values():
        tell(f"opening {entrant.name}, {entrant.how}")
    with ThreadPoolExecutor(usable_cores()) as pool:
        started = dict(zip(entrants, pool.map(start, entrants, entrants.values()), strict=True))
    found.update({place: one for place, one in started.items() if isinstance(one, Standing)})
    return [one for one in started.values() if isinstance(one, _Runner)]


def _time(
    runners: list[_Runner],
    rounds: int,
    pace: Pace,
    seed: int,
    baseline: int | None,
    found: dict[int, Standing],
) -> dict[int, Timing]:
    """Time runners side by side; those that fail are found to have, and the others start anew."""
    while left := [runner for runner in runners if not runner.failed]:
        places = [runner.place for runner in left]
        place = places.index(baseline) if baseline in places else None
        try:
            timings = measure_interleaved(left, rounds, pace.block_s, seed, baseline=place, min_calls=1)
        except EngineError:
            gone = [runner for runner in left if runner.failed]
            found |= {r.place: Standing(r.entrant, failed=r.failed) for r in gone}
            continue
        return dict(zip(places, timings, strict=True))
    return {}


def _survey_s(runners: Sequence[_Runner], least_s: float) -> float:
    """Return the time for a few calls of each, guessed from the first that runs, or more."""
    images = sum(runner.setting.batch * runner.setting.streams for runner in runners)
    for runner in runners:
        with suppress(EngineError):
            call = runner.opened.time_block(0.0)
            return max(least_s, _SURVEY_CALLS * images * call.seconds / call.images)
    return least_s


def _speed(standing: Standing) -> float:
    return standing.timing.images_per_s if standing.timing is not None else 0.0


class _Stages:
    """The first two stages of a case."""

    def __init__(
        self,
        runners: list[_Runner],
        pace: Pace,
        found: dict[int, Standing],
        open_further: Callable[[Entrant], list[_Runner]],
    ) -> None:
        self.pace, self.found, self.open_further = pace, found, open_further
        self.own = [runner for runner in runners if runner.entrant.own]
        self.peers = [runner for runner in runners if not runner.entrant.own]

    def run(self) -> tuple[int | None, list[int]]:
        """Return the places of the answer and of the finalists."""
        self._choose()
        everyone = [*self.own, *self.peers]
        first = _time(everyone, self.pace.first_rounds, self.pace, self.pace.seed, None, self.found)
        for runner in everyone:
            if runner.place in first:
                self.found[runner.place] = Standing(runner.entrant, first[runner.place])
        speeds = {place: timing.images_per_s for place, timing in first.items()}
        own = [runner.place for runner in self.own if runner.place in speeds]
        peers = sorted((p.place for p in self.peers if p.place in speeds), key=lambda place: -speeds[place])
        near = [place for place in peers if speeds[place] * _NEAR >= speeds[peers[0]]]
        return max(own, key=lambda place: speeds[place], default=None), near[:_FINALISTS]

    def _choose(self) -> None:
        """Drop all but the fastest of fewbit's candidates, then of these and their further ways."""
        self._halve()
        self.own += [further for runner in tuple(self.own) for further in self.open_further(runner.entrant)]
        self._halve()

    def _halve(self) -> None:
        if len(self.own) <= _CANDIDATES:
            return
        ranked = survey(
            self.own,
            _survey_s(self.own, self.pace.survey_s),
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


class _Sittings:
    """The answer and the finalists, opened anew for every sitting."""

    def __init__(
        self, entrants: dict[int, Entrant], answer: int, pace: Pace, found: dict[int, Standing]
    ) -> None:
        self.entrants, self.answer, self.pace, self.found = entrants, answer, pace, found
        self.taken: dict[int, list[Timing]] = {place: [] for place in entrants}

    def run(self, tell: Callable[[str], None]) -> None:
        """Sit as often as the pace says; one that fails is out."""
        for sitting in range(self.pace.sittings):
            tell(f"sitting {sitting + 1} of {self.pace.sittings}")
            with ExitStack() as stack:
                runners = _open_all(self._left(), stack, self.found, lambda _: None)
                seed = self.pace.seed + sitting
                timings = _time(runners, self.pace.rounds, self.pace, seed, self.answer, self.found)
            for place, timing in timings.items():
                self.taken[place].append(timing)
            if self.answer not in self._left():
                return
        for place, entrant in self._left().items():
            self.found[place] = self._standing(entrant, place)

    def _left(self) -> dict[int, Entrant]:
        return {place: entrant for place, entrant in self.entrants.items() if not self.found[place].failed}

    def _standing(self, entrant: Entrant, place: int) -> Standing:
        taken = self.taken[place]
        speed, interval = _over_sittings([t.images_per_s for t in taken], taken[0].interval)
        timing = taken[0].model_copy(
            update={
                "images_per_s": speed,
                "interval": interval,
                "ms_per_batch_p50": median(t.ms_per_batch_p50 for t in taken),
                "rounds": sum(t.rounds for t in taken),
            }
        )
        if place == self.answer:
            return Standing(entrant, timing, answer=True)
        within = taken[0].ratio_interval
        assert within is not None  # the answer was there in every sitting
        ratio, interval = _over_sittings(
            [1 / t.ratio for t in taken if t.ratio], Interval(low=1 / within.high, high=1 / within.low)
        )
        return Standing(entrant, timing, ratio=ratio, interval=interval)


def _over_sittings(values: Sequence[float], within: Interval) -> tuple[float, Interval]:
    """Return the median and its interval; that of a single sitting is the one within it."""
    return median(values), median_interval(values) if len(values) > 1 else within
