"""How fast networks run on a machine that others use too: interleaved rounds, ratios, intervals.

All candidates take turns in every round, in random order, so what slows the machine slows all of them; the
ratio of two candidates is taken within a round, and the figure is the median over rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from fewbit.engines.session import BlockTime, Setting
from fewbit.errors import EngineError
from fewbit.measure.intervals import Interval, median_interval
from fewbit.spec import Frozen

_LEAST_ROUNDS = 3
Goal = Literal["throughput", "latency"]


class Timed(Protocol):
    """Something whose speed can be measured: `fewbit.engines.process.RemoteSession` is one."""

    @property
    def setting(self) -> Setting:
        """How it runs."""
        ...

    def time_block(self, seconds: float) -> BlockTime:
        """Run calls for about `seconds`, at least one a stream."""
        ...


class Timing(Frozen):
    """The speed of one candidate.

    Attributes:
        setting: How it ran.
        images_per_s: Median over rounds.
        interval: 95 % interval of that median.
        ms_per_batch_p50: Median time of one call.
        ms_per_batch_p95: 95th percentile of it.
        rounds: How many rounds were measured.
        ms_interval: 95 % interval of the median time of one call, over rounds.
        ratio: Its speed over the baseline's, median over rounds; none without a baseline.
        ratio_interval: 95 % interval of the ratio.
        against: The baseline's name.
    """

    setting: Setting
    images_per_s: float
    interval: Interval
    ms_per_batch_p50: float
    ms_per_batch_p95: float | None = None
    rounds: int
    ms_interval: Interval | None = None
    ratio: float | None = None
    ratio_interval: Interval | None = None
    against: str = ""


def measure_interleaved(
    candidates: Sequence[Timed],
    rounds: int = 20,
    block_s: float = 0.2,
    seed: int = 0,
    *,
    baseline: int | None = 0,
    against: str = "",
    min_calls: int = 20,
    budget_s: float | None = None,
    confidence: float = 0.95,
) -> list[Timing]:
    """Time candidates side by side.

    Args:
        candidates: What to time, all opened; the same one twice measures the noise (see `measure_noise`).
        rounds: Blocks of each candidate, at least 3. At least 20 for claims below 10 %; 6 are the least for
            an interval that supposes no distribution.
        block_s: Seconds of one block, where `budget_s` allows.
        seed: Of the order in each round.
        baseline: Place of the candidate that the ratios are against; none for no ratios.
        against: The baseline's name, kept in every Timing.
        min_calls: Calls of one block, where `budget_s` allows.
        budget_s: Seconds for everything; blocks get shorter first, then rounds fewer, but not under three.
        confidence: Of the intervals.

    Returns:
        One Timing a candidate, in their order.

    Raises:
        EngineError: A candidate failed.
    """
    start = time.perf_counter()
    rng = np.random.default_rng(seed)
    call_s = [_warm_up(candidate, block_s / 2) for candidate in candidates]
    left = None if budget_s is None else budget_s - (time.perf_counter() - start)
    share = None if left is None else max(0.0, left) / (rounds * max(1, len(candidates)))
    blocks_s = [max(block_s, min_calls * call) for call in call_s]
    if share is not None:
        blocks_s = [min(block, share) for block in blocks_s]
    blocks: list[list[BlockTime]] = [[] for _ in candidates]
    for done in range(max(rounds, _LEAST_ROUNDS)):
        elapsed = time.perf_counter() - start
        if budget_s is not None and done >= _LEAST_ROUNDS and elapsed + _round_s(blocks, done) > budget_s:
            break
        for place in rng.permutation(len(candidates)):
            blocks[place].append(candidates[place].time_block(blocks_s[place]))
    base = None if baseline is None else blocks[baseline]
    return [
        _timing(candidate.setting, taken, base, against, confidence)
        for candidate, taken in zip(candidates, blocks, strict=True)
    ]


def _warm_up(candidate: Timed, seconds: float) -> float:
    """Run what is not counted; return the seconds between two calls."""
    candidate.time_block(0.0)
    block = candidate.time_block(seconds)
    return block.seconds / len(block.latencies_ms)


def _round_s(blocks: Sequence[Sequence[BlockTime]], done: int) -> float:
    return sum(block.seconds for taken in blocks for block in taken) / done


def _timing(
    setting: Setting,
    blocks: Sequence[BlockTime],
    base: Sequence[BlockTime] | None,
    against: str,
    confidence: float,
) -> Timing:
    rates = [block.images_per_s for block in blocks]
    latencies = [ms for block in blocks for ms in block.latencies_ms]
    ratios = None
    if base is not None:
        ratios = [rate / other.images_per_s for rate, other in zip(rates, base, strict=True)]
    return Timing(
        setting=setting,
        images_per_s=statistics.median(rates),
        interval=median_interval(rates, confidence),
        ms_per_batch_p50=statistics.median(latencies),
        ms_per_batch_p95=float(np.quantile(latencies, 0.95)),
        rounds=len(blocks),
        ms_interval=median_interval([statistics.median(block.latencies_ms) for block in blocks], confidence),
        ratio=None if ratios is None else statistics.median(ratios),
        ratio_interval=None if ratios is None else median_interval(ratios, confidence),
        against=against,
    )


def measure_noise(
    candidate: Timed, rounds: int = 20, block_s: float = 0.2, seed: int = 0, budget_s: float | None = None
) -> Interval:
    """Time a candidate against itself (an A/A test).

    Returns:
        The interval of the ratio: it should contain 1, and no effect smaller than its width can be claimed.
    """
    second = measure_interleaved([candidate, candidate], rounds, block_s, seed, budget_s=budget_s)[1]
    assert second.ratio_interval is not None
    return second.ratio_interval


class Surveyed(Frozen):
    """One candidate of a survey.

    Attributes:
        place: Its place among the candidates given.
        setting: How it ran.
        images_per_s: Median over its rounds; 0 where it did not run.
        ms_per_batch: Median time of one call; 0 where it did not run.
        rounds: Blocks it was given.
        reason: Why it did not reach the end: slower than others, or the engine's error; empty for finalists.
    """

    place: int
    setting: Setting
    images_per_s: float = 0.0
    ms_per_batch: float = 0.0
    rounds: int = 0
    reason: str = ""


def survey(
    candidates: Sequence[Timed],
    budget_s: float,
    keep: int = 1,
    seed: int = 0,
    *,
    goal: Goal = "throughput",
    on_drop: Callable[[int], None] | None = None,
) -> list[Surveyed]:
    """Find the fastest of many candidates quickly, by successive halving.

    Each stage has the same time: every candidate left gets interleaved blocks, then the slower half goes. The
    result is a ranking to choose by, not a claim; time the finalists with `measure_interleaved`.

    Args:
        candidates: What to choose from; one that fails is dropped, not raised.
        budget_s: Seconds for everything. Every candidate gets a call while there is time.
        keep: How many finalists.
        seed: Of the order in each round.
        goal: What is better: more images a second, or less time of one call.
        on_drop: Called with the place of each candidate dropped, to close it.

    Returns:
        All candidates, the best first; finalists have no `reason`.

    Source: K. Jamieson, A. Talwalkar, "Non-stochastic best arm identification and hyperparameter
        optimization",
    2016, arXiv 1502.07943.
    Differs: two rounds a stage, ranked by the median of all of a candidate's blocks.
    """
    run = _Survey(candidates, time.perf_counter() + budget_s, np.random.default_rng(seed), goal, on_drop)
    run.warm_up()
    stages = max(1, int(np.ceil(np.log2(max(1, len(run.left)) / keep))) + 1)
    for stage in range(stages):
        run.stage((run.deadline - time.perf_counter()) / (stages - stage))
        run.halve(max(keep, (len(run.left) + 1) // 2) if stage < stages - 1 else keep)
    return run.ranking()


class _Survey:
    """The state of one survey."""

    def __init__(
        self,
        candidates: Sequence[Timed],
        deadline: float,
        rng: np.random.Generator,
        goal: Goal,
        on_drop: Callable[[int], None] | None,
    ) -> None:
        self.candidates, self.deadline, self.rng, self.goal, self.on_drop = (
            candidates,
            deadline,
            rng,
            goal,
            on_drop,
        )
        self.left = list(range(len(candidates)))
        self.first: dict[int, BlockTime] = {}
        self.blocks: dict[int, list[BlockTime]] = {place: [] for place in self.left}
        self.reasons: dict[int, str] = {}

    def warm_up(self) -> None:
        """Give every candidate one call; it counts only until the candidate has a block."""
        for place in map(int, self.rng.permutation(self.left)):
            if self.first and time.perf_counter() >= self.deadline:
                self._drop(place, "no time left to try it")
            elif (block := self._time(place, 0.0)) is not None:
                self.first[place] = block

    def stage(self, seconds: float) -> None:
        """Give every candidate left two blocks, while there is time."""
        block_s = max(0.0, seconds) / (2 * max(1, len(self.left)))
        for _ in range(2):
            for place in map(int, self.rng.permutation(self.left)):
                if time.perf_counter() < self.deadline and (block := self._time(place, block_s)) is not None:
                    self.blocks[place].append(block)

    def halve(self, count: int) -> None:
        """Keep the best `count`."""
        for place in sorted(self.left, key=self._order)[count:]:
            self._drop(place, "slower than others")

    def ranking(self) -> list[Surveyed]:
        """Return all, the best first."""
        places = sorted(self.blocks, key=lambda p: (p in self.reasons, -len(self.blocks[p]), self._order(p)))
        return [self._surveyed(place) for place in places]

    def _time(self, place: int, seconds: float) -> BlockTime | None:
        try:
            return self.candidates[place].time_block(seconds)
        except EngineError as error:
            self.first.pop(place, None)
            self.blocks[place] = []
            self._drop(place, str(error))
            return None

    def _drop(self, place: int, reason: str) -> None:
        self.left.remove(place)
        self.reasons[place] = reason
        if self.on_drop is not None:
            self.on_drop(place)

    def _seen(self, place: int) -> list[BlockTime]:
        return self.blocks[place] or [self.first[place]] if place in self.first else []

    def _order(self, place: int) -> tuple[float, int]:
        if not self._seen(place):
            return float("inf"), place
        return (self._ms(place) if self.goal == "latency" else -self._rate(place)), place

    def _rate(self, place: int) -> float:
        return statistics.median(block.images_per_s for block in self._seen(place))

    def _ms(self, place: int) -> float:
        return statistics.median(ms for block in self._seen(place) for ms in block.latencies_ms)

    def _surveyed(self, place: int) -> Surveyed:
        ran = bool(self._seen(place))
        return Surveyed(
            place=place,
            setting=self.candidates[place].setting,
            images_per_s=self._rate(place) if ran else 0.0,
            ms_per_batch=self._ms(place) if ran else 0.0,
            rounds=len(self.blocks[place]),
            reason=self.reasons.get(place, ""),
        )
