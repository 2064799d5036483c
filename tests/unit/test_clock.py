from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from fewbit.clock import Clock, PhaseTime, each_timed, phase


def by_name(clock: Clock) -> dict[tuple[str, str], PhaseTime]:
    return {(one.stage, one.phase): one for one in clock.phases()}


def test_a_second_belongs_to_the_innermost_phase() -> None:
    begin = time.perf_counter()
    with Clock("run") as clock, phase("outer"):
        time.sleep(0.02)
        for _ in range(2):
            with phase("inner"):
                time.sleep(0.04)
    whole, found = time.perf_counter() - begin, by_name(clock)
    assert list(found) == [("run", "run"), ("outer", "outer"), ("outer", "inner")]
    assert found["outer", "inner"].seconds >= 0.08 and found["outer", "inner"].times == 2
    assert 0.02 <= found["outer", "outer"].seconds < found["outer", "inner"].seconds
    assert sum(one.seconds for one in clock.phases()) == pytest.approx(whole, abs=0.02)


def test_processor_seconds_are_those_of_the_phase() -> None:
    with Clock("run") as clock:
        with phase("sleeps"):
            time.sleep(0.05)
        with phase("works"):
            end = time.process_time() + 0.05
            while time.process_time() < end:
                pass
    found = by_name(clock)
    assert found["works", "works"].cpu_s >= 0.05 > found["sleeps", "sleeps"].cpu_s


def test_children_are_read_and_never_counted_downwards() -> None:
    readings = iter([1.0, 1.0, 3.0, 2.0, 4.0, 4.0, 4.0])  # between its end and its reaping a child is nowhere
    with Clock("run", lambda: next(readings)) as clock:
        with phase("a"):
            pass
        assert next(readings) == 4.0
    assert sum(one.child_cpu_s for one in clock.phases()) == 3.0


def test_an_error_ends_its_phase() -> None:
    with Clock("run") as clock:
        with pytest.raises(ValueError, match="mine"), phase("a"):
            raise ValueError("mine")
        with phase("b"):
            pass
    assert list(by_name(clock)) == [("run", "run"), ("a", "a"), ("b", "b")]


def test_the_wait_for_items_is_counted_and_the_work_on_them_is_not() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    with Clock("run") as clock, phase("work"):
        for _ in each_timed(slow(), "wait"):
            time.sleep(0.05)
    found = by_name(clock)
    assert 0.06 <= found["work", "wait"].seconds < 0.15 <= found["work", "work"].seconds
    assert list(each_timed([None, 1], "wait")) == [None, 1]


def test_without_a_clock_and_in_other_threads_nothing_is_counted() -> None:
    @phase("b")
    def work() -> int:
        return 1

    assert work() == 1
    with Clock("run") as clock:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert list(by_name(clock)) == [("run", "run")]
    assert work() == 1


def test_an_earlier_run_is_added() -> None:
    with Clock("run") as first, phase("a"):
        pass
    with Clock("run", earlier=first.phases()) as second, phase("a"):
        pass
    one, both = by_name(first)["a", "a"], by_name(second)["a", "a"]
    assert both.times == 2 and both.seconds > one.seconds
