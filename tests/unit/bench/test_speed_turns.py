from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from fewbit.engines.session import BlockTime, Setting
from fewbit.errors import EngineCrashed, EngineError
from speed_turns import Entrant, Pace, Standing, choose_fastest, hold_sittings, measure_all, measure_case

PACE = Pace(sittings=6, rounds=3, first_rounds=3, block_s=0.0, survey_s=0.1)


@dataclass
class Made:
    """Runs at a set speed without running anything; fails after some blocks.

    Attributes:
        images_per_s: In the first process; each later one is as many times as fast as `luck` says.
    """

    images_per_s: float
    fails_after: int | None = None
    luck: tuple[float, ...] = (1.0,)
    setting: Setting = field(default_factory=lambda: Setting(batch=4))
    blocks: int = 0
    opened: int = 0
    closed: int = 0

    def open(self) -> Made:
        self.opened += 1
        return self

    def time_block(self, seconds: float) -> BlockTime:
        assert self.opened > self.closed, "it is timed after it was closed"
        self.blocks += 1
        if self.fails_after is not None and self.blocks > self.fails_after:
            raise EngineCrashed("made: crashed while timing it (SIGSEGV)")
        taken = 4 / (self.images_per_s * self.luck[(self.opened - 1) % len(self.luck)])
        return BlockTime(images=4, seconds=taken, latencies_ms=(1e3 * taken,))

    def close(self) -> None:
        self.closed = self.opened


@dataclass
class Field:
    """Entrants by name."""

    made: dict[str, Made] = field(default_factory=dict)
    entrants: list[Entrant] = field(default_factory=list)

    def add(self, name: str, made: Made) -> None:
        self.made[name] = made
        self.entrants.append(Entrant(name, "1 stream", "int8", name.startswith("fewbit"), made.open))

    def refuse(self, name: str, reason: str) -> None:
        def start() -> Made:
            raise EngineError(reason)

        self.entrants.append(Entrant(name, "1 stream", "int8", name.startswith("fewbit"), start))

    def measure(self, tell: Callable[[str], None] = lambda _: None, pace: Pace = PACE) -> dict[str, Standing]:
        return {s.entrant.name: s for s in measure_case(self.entrants, pace, tell)}


@pytest.fixture
def entered() -> Field:
    return Field()


def test_the_answer_stands_against_the_finalists(entered: Field) -> None:
    speeds = {"near": 100, "fewbit slow": 80, "fast": 110, "fewbit fast": 120, "far": 50}
    for name, images_per_s in speeds.items():
        entered.add(name, Made(images_per_s))
    told: list[str] = []
    found = entered.measure(told.append)
    assert list(found) == ["fewbit fast", "fast", "near", "fewbit slow", "far"]
    assert [s.answer for s in found.values()] == [True, False, False, False, False]
    assert found["fast"].ratio == pytest.approx(120 / 110) and found["near"].ratio == pytest.approx(1.2)
    assert found["near"].interval is not None and found["near"].interval.low == pytest.approx(1.2)
    assert found["far"].ratio is None and found["fewbit slow"].ratio is None
    rounds = {name: s.timing.rounds for name, s in found.items() if s.timing is not None}
    assert rounds == {"fewbit fast": 18, "fast": 18, "near": 18, "fewbit slow": 3, "far": 3}
    opened = {name: made.opened for name, made in entered.made.items()}
    assert opened == {"fewbit fast": 7, "fast": 7, "near": 7, "fewbit slow": 1, "far": 1}
    assert all(made.closed == made.opened for made in entered.made.values())
    sittings = [f"sitting {number} of 6" for number in range(1, 7)]
    assert told == [*(f"opening {name}, 1 stream" for name in speeds), "first rounds", *sittings]


def test_the_luck_of_a_process_is_in_the_interval(entered: Field) -> None:
    entered.add("peer", Made(100))
    entered.add("fewbit", Made(100, luck=(1.0, 1.10, 0.95, 1.0, 1.05, 0.9, 1.02)))
    found = entered.measure()
    peer, interval = found["peer"], found["peer"].interval
    assert peer.ratio == pytest.approx((1.0 + 1.02) / 2)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((0.9, 1.10))  # the sign test's of six values
    assert found["fewbit"].timing is not None
    assert found["fewbit"].timing.images_per_s == pytest.approx(101)


def test_a_single_sitting_has_the_interval_of_its_rounds(entered: Field) -> None:
    entered.add("peer", Made(100))
    entered.add("fewbit", Made(125))
    found = entered.measure(pace=PACE.model_copy(update={"sittings": 1}))
    assert found["peer"].ratio == pytest.approx(1.25)
    assert found["peer"].interval is not None and found["peer"].interval.low == pytest.approx(1.25)


def test_one_that_cannot_be_opened_says_why_and_the_others_go_on(entered: Field) -> None:
    entered.refuse("nncf", "python has no nncf")
    entered.add("fewbit", Made(10))
    entered.add("peer", Made(20))
    found = entered.measure()
    assert found["nncf"].failed == "python has no nncf" and found["nncf"].timing is None
    assert found["fewbit"].answer and found["peer"].ratio == pytest.approx(0.5)


@pytest.mark.parametrize("after", [0, 1, 3, 9, 20])
def test_a_peer_that_crashes_has_its_row_and_the_others_start_anew(entered: Field, after: int) -> None:
    entered.add("crashing", Made(1000, fails_after=after))
    entered.add("peer", Made(100))
    entered.add("fewbit", Made(110))
    found = entered.measure()
    assert found["crashing"].failed == "made: crashed while timing it (SIGSEGV)"
    assert found["crashing"].timing is None and found["crashing"].ratio is None
    assert found["fewbit"].answer
    if after < 5:  # it crashed in the first rounds: the peer became a finalist
        assert found["peer"].ratio == pytest.approx(1.1)


def test_of_many_candidates_the_fastest_are_kept_and_the_others_closed_at_once(entered: Field) -> None:
    for speed in (10, 40, 20, 30, 60, 50):
        entered.add(f"fewbit {speed}", Made(speed))
    entered.add("fewbit broken", Made(99, fails_after=1))
    entered.add("peer", Made(30))
    found = entered.measure()
    assert next(iter(found)) == "fewbit 60" and found["fewbit 60"].answer
    assert {name for name, s in found.items() if s.dropped} == {"fewbit 10", "fewbit 20", "fewbit 30"}
    assert found["fewbit broken"].failed.startswith("made: crashed") and not found["fewbit broken"].dropped
    assert found["fewbit 40"].timing is not None and found["fewbit 10"].timing is None
    assert found["peer"].ratio == pytest.approx(2.0)


def test_further_ways_of_the_fastest_candidates_take_part(entered: Field) -> None:
    for speed in (10, 40, 20, 30):
        entered.add(f"fewbit {speed}", Made(speed))
    further = {speed: (Made(speed + 15), Made(speed - 5)) for speed in (10, 40)}
    entered.entrants = [
        replace(
            entrant,
            further=tuple(
                Entrant(f"{entrant.name} {way}", "1 stream", "int8", True, made.open)
                for way, made in enumerate(further.get(int(entrant.name.split()[1]), ()))
            ),
        )
        for entrant in entered.entrants
    ]
    entered.add("peer", Made(50))
    found = entered.measure()
    assert found["fewbit 40 0"].answer and found["peer"].ratio == pytest.approx(1.1)
    assert "fewbit 40 1" in found and "fewbit 10 0" not in found  # 10 was dropped: its ways were never opened
    assert further[10][0].opened == 0 and all(made.closed == made.opened for made in further[40])


def test_without_an_own_one_that_runs_there_is_no_answer(entered: Field) -> None:
    entered.refuse("fewbit", "refused")
    entered.add("peer", Made(10))
    found = entered.measure()
    assert not any(s.answer for s in found.values()) and found["peer"].ratio is None
    assert found["peer"].timing is not None


def test_without_a_peer_the_answer_has_its_speed(entered: Field) -> None:
    entered.add("fewbit", Made(10))
    found = entered.measure()
    assert found["fewbit"].answer and found["fewbit"].timing is not None
    assert found["fewbit"].timing.images_per_s == pytest.approx(10)


def test_an_answer_that_crashes_in_the_final_is_none(entered: Field) -> None:
    entered.add("fewbit", Made(100, fails_after=7))
    entered.add("peer", Made(10))
    found = entered.measure()
    assert found["fewbit"].failed and not found["fewbit"].answer and found["peer"].ratio is None


def test_the_fastest_way_is_found_and_a_failing_one_is_passed_over(entered: Field) -> None:
    entered.refuse("refused", "no such kernel")
    entered.add("slow", Made(50))
    entered.add("fast", Made(100))
    entered.add("dies", Made(500, fails_after=1))
    entered.add("dies late", Made(500, fails_after=6))
    best = choose_fastest(entered.entrants, 0.2, 0)
    assert best.entrant.name == "fast" and not best.failed
    assert all(made.closed == made.opened for made in entered.made.values())
    assert choose_fastest(entered.entrants[:1], 0.2, 0).failed == "no such kernel"


def test_all_take_turns_once_with_ratios_to_the_baseline(entered: Field) -> None:
    for name, images_per_s in {"a": 100, "b": 50, "c": 200}.items():
        entered.add(name, Made(images_per_s))
    entered.add("dies", Made(500, fails_after=3))
    found = measure_all(entered.entrants, 4, 1, PACE)
    assert [s.entrant.name for s in found] == ["a", "b", "c", "dies"]
    assert [s.timing and s.timing.ratio for s in found] == [pytest.approx(2), pytest.approx(1), 4.0, None]
    assert "SIGSEGV" in found[3].failed and all(m.closed == m.opened for m in entered.made.values())


def test_sittings_alone_take_the_answer_as_settled(entered: Field) -> None:
    entered.add("fewbit slow", Made(100))
    entered.add("near", Made(110, luck=(1.0, 0.5)))
    found = hold_sittings(entered.entrants, 0, PACE)
    assert found[0].answer and found[0].ratio is None
    assert found[1].ratio == pytest.approx((100 / 110 + 100 / 55) / 2)
    assert found[1].interval is not None and found[1].interval.high == pytest.approx(100 / 55)
    assert [made.opened for made in entered.made.values()] == [6, 6]
