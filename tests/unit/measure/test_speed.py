from __future__ import annotations

import time

import numpy as np
import pytest

from fewbit.engines.session import BlockTime, Setting
from fewbit.errors import EngineError
from fewbit.measure.speed import Surveyed, Timing, measure_interleaved, measure_noise, survey


class Clock:
    """A machine whose speed drifts: time passes only where a block runs."""

    def __init__(self, seed: int = 0, noise: float = 0.02, drift: float = 0.0) -> None:
        self.now = 0.0
        self.noise, self.drift = noise, drift
        self.rng = np.random.default_rng(seed)
        self.ran: list[str] = []

    def slowness(self) -> float:
        return float(np.exp(self.drift * np.sin(self.now / 3) + self.noise * self.rng.standard_normal()))


class Candidate:
    def __init__(
        self, clock: Clock, name: str, call_s: float, batch: int = 1, streams: int = 1, fails: bool = False
    ) -> None:
        self.clock, self.name, self.call_s, self.fails = clock, name, call_s, fails
        self.setting = Setting(batch=batch, streams=streams)
        self.asked: list[float] = []

    def time_block(self, seconds: float) -> BlockTime:
        if self.fails:
            raise EngineError(f"{self.name}: openvino crashed")
        self.asked.append(seconds)
        self.clock.ran.append(self.name)
        call_s = self.call_s * self.clock.slowness()
        calls = max(1, round(seconds / call_s))
        taken = calls * call_s
        self.clock.now += taken
        return BlockTime(
            images=calls * self.setting.batch * self.setting.streams,
            seconds=taken,
            latencies_ms=(call_s * 1e3,) * calls * self.setting.streams,
        )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    return made


def test_ratio_survives_a_machine_that_drifts(clock: Clock) -> None:
    clock.drift = 0.7
    slow, fast = Candidate(clock, "slow", 0.010), Candidate(clock, "fast", 0.005)
    first, second = measure_interleaved([slow, fast], against="slow")
    assert second.ratio == pytest.approx(2.0, rel=0.03)
    assert second.ratio_interval is not None and 2.0 in second.ratio_interval
    assert second.ratio_interval.high - second.ratio_interval.low < 0.15
    # The absolute figure is as uncertain as the machine.
    assert second.interval.high / second.interval.low > 1.2
    assert (first.ratio, second.against, second.rounds) == (1.0, "slow", 20)


def test_rounds_are_in_random_order_by_seed_and_blocks_long_enough(clock: Clock) -> None:
    a, b = Candidate(clock, "a", 0.002), Candidate(clock, "b", 0.050)
    measure_interleaved([a, b], rounds=12, block_s=0.2, seed=5)
    # Warm-up: one call and half a block each. Then 0.2 s, or 20 calls where those take longer.
    assert a.asked[2:] == [0.2] * 12
    assert b.asked[2:] == pytest.approx([1.0] * 12, rel=0.1)
    rounds = [tuple(clock.ran[i : i + 2]) for i in range(4, len(clock.ran), 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")}
    orders = []
    for seed in (5, 5, 6):
        clock.ran.clear()
        measure_interleaved([a, b], rounds=12, seed=seed)
        orders.append(tuple(clock.ran))
    assert orders[0] == orders[1] != orders[2]


def test_figures_of_one_candidate(clock: Clock) -> None:
    clock.noise = 0.0
    alone = Candidate(clock, "alone", 0.010, batch=8, streams=2)
    (timing,) = measure_interleaved([alone], rounds=6, baseline=None)
    assert timing.images_per_s == pytest.approx(1600)
    assert timing.ms_per_batch_p50 == pytest.approx(10) == timing.ms_per_batch_p95
    assert timing.interval.low == pytest.approx(1600) == timing.interval.high
    assert (timing.ratio, timing.ratio_interval, timing.rounds) == (None, None, 6)
    assert Timing.model_validate_json(timing.model_dump_json()) == timing


def test_a_budget_shortens_blocks_then_rounds(clock: Clock) -> None:
    a, b = Candidate(clock, "a", 0.001), Candidate(clock, "b", 0.001)
    start = clock.now
    short = measure_interleaved([a, b], budget_s=2.0)
    assert clock.now - start <= 2.1
    assert short[0].rounds >= 18
    slow = Candidate(clock, "slow", 1.0)
    start = clock.now
    few = measure_interleaved([a, slow], budget_s=8.0)
    assert clock.now - start <= 8.5
    assert 3 <= few[1].rounds <= 7
    least = measure_interleaved([slow], budget_s=0.1)[0]
    assert least.rounds == 3 and least.interval.low < least.images_per_s < least.interval.high


def test_noise_is_the_interval_of_a_candidate_against_itself(clock: Clock) -> None:
    a = Candidate(clock, "a", 0.005)
    found = measure_noise(a)
    assert 1.0 in found
    clock.noise = 0.2
    wider = measure_noise(a)
    assert wider.high - wider.low > 3 * (found.high - found.low)


def test_noise_intervals_contain_one_as_often_as_they_claim() -> None:
    hits = 0
    for seed in range(200):
        clock = Clock(seed=seed, noise=0.1)
        hits += 1.0 in measure_noise(Candidate(clock, "a", 0.005), seed=seed)
    assert hits >= 182


def test_a_failing_candidate_is_raised(clock: Clock) -> None:
    with pytest.raises(EngineError, match="b: openvino crashed"):
        measure_interleaved([Candidate(clock, "a", 0.01), Candidate(clock, "b", 0.01, fails=True)])


def test_survey_finds_the_fastest_of_many(clock: Clock) -> None:
    clock.noise = 0.05
    calls_s = [0.008 + 0.001 * i for i in range(24)]
    order = np.random.default_rng(3).permutation(24)
    candidates = [Candidate(clock, str(i), calls_s[order[i]], batch=8) for i in range(24)]
    dropped: list[int] = []
    start = clock.now
    found = survey(candidates, budget_s=20.0, keep=3, on_drop=dropped.append)
    assert clock.now - start <= 21
    assert order[found[0].place] <= 1
    assert [s.reason for s in found[:3]] == [""] * 3
    assert {s.reason for s in found[3:]} == {"slower than others"}
    assert sorted(dropped) == sorted(s.place for s in found[3:])
    assert sorted(s.place for s in found) == list(range(24))
    assert found[0].rounds > found[-1].rounds == 2
    spent = [sum(c.asked) for c in candidates]
    assert spent[found[0].place] > 4 * spent[found[-1].place]


def test_survey_goals(clock: Clock) -> None:
    single, wide = Candidate(clock, "single", 0.004), Candidate(clock, "wide", 0.010, batch=8)
    assert survey([single, wide], budget_s=5)[0].place == 1
    assert survey([single, wide], budget_s=5, goal="latency")[0].place == 0


def test_survey_drops_what_fails(clock: Clock) -> None:
    candidates = [
        Candidate(clock, "a", 0.01),
        Candidate(clock, "b", 0.001, fails=True),
        Candidate(clock, "c", 0.02),
    ]
    dropped: list[int] = []
    found = survey(candidates, budget_s=5, keep=2, on_drop=dropped.append)
    assert [s.place for s in found] == [0, 2, 1]
    assert found[2] == Surveyed(place=1, setting=candidates[1].setting, reason="b: openvino crashed")
    assert dropped == [1]
    assert survey([candidates[1]], budget_s=1)[0].reason == "b: openvino crashed"
    assert survey([], budget_s=1) == []


def test_survey_keeps_its_time_with_slow_candidates(clock: Clock) -> None:
    candidates = [Candidate(clock, str(i), 1.0 + i) for i in range(8)]
    start = clock.now
    found = survey(candidates, budget_s=10.0)
    assert clock.now - start <= 18
    assert found[0].images_per_s > 0
    assert found[0].reason == ""
    assert any(s.reason == "no time left to try it" for s in found)


def test_survey_is_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(seed: int) -> tuple[list[int], list[str]]:
        clock = Clock(seed=1, noise=0.2)
        monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
        candidates = [Candidate(clock, str(i), 0.01 + 0.002 * i) for i in range(9)]
        return [s.place for s in survey(candidates, budget_s=5, seed=seed)], clock.ran

    assert once(2) == once(2)
    assert once(2)[1] != once(3)[1]
