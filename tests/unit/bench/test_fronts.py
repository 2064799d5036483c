"""How fronts are judged, on measurements made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fewbit.data.demo import demo_cards
from fewbit.measure.region_latency import RegionLatency
from fewbit.registry import ROWS
from fewbit.search.mixed_precision import problem_of
from fronts import Judged, _children, by_sensitivity, by_tables, compare, volume
from fronts_table import SOLVER, dominates

A, B, C, D = ((bool(i & 2), bool(i & 1)) for i in range(4))


def judged(speeds: list[float], losses: list[float], noise: float = 0.001, spread: float = 0.0) -> Judged:
    """Return what was measured of four choices, the losses of each with the same noise on each image."""
    rng, made = np.random.default_rng(0), Judged.__new__(Judged)
    made.places = {choice: place for place, choice in enumerate((A, B, C, D)[: len(speeds)])}
    drift = rng.uniform(0.5, 2.0, (7, 3, 1))  # of the machine: the same for all in a round
    luck = 1 + spread * rng.standard_normal((7, 1, len(speeds)))  # of a file in a sitting
    made.rates = np.array(speeds) * drift * luck * (1 + noise * rng.standard_normal((7, 3, len(speeds))))
    images = rng.uniform(0.5, 1.5, 200)
    made.kl = np.array(losses)[:, None] * images + noise * rng.standard_normal((len(losses), 200))
    made.changed = np.zeros(len(speeds))
    return made


def test_the_area_is_that_of_the_staircase() -> None:
    assert volume(np.array([1.0, 3.0]), np.array([0.0, 1.0]), (0.0, 2.0)) == 4.0
    inner = volume(np.array([1.0, 3.0, 0.5, 2.9]), np.array([0.0, 1.0, 0.5, 1.5]), (0.0, 2.0))
    assert inner == 4.0  # what others beat adds nothing
    rng = np.random.default_rng(1)
    speed, loss = rng.random(6), rng.random(6)
    grid = (np.arange(400) + 0.5) / 400
    reached = ((grid[:, None, None] < speed) & (grid[None, :, None] > loss)).any(-1)
    assert volume(speed, loss, (0.0, 1.0)) == pytest.approx(reached.mean(), abs=0.01)


def test_who_beats_whom_in_spite_of_a_machine_that_drifts() -> None:
    seen = judged([1.0, 1.2, 1.2, 0.9], [0.5, 0.4, 0.6, 0.3])
    sure = seen.beats(True)
    assert sure.tolist() == [
        [False, False, False, False],
        [True, False, False, False],  # faster than the first and loses less
        [False, False, False, False],  # as fast as the second, loses more; faster than the first, loses more
        [False, False, False, False],
    ]
    assert (seen.beats(False) | ~sure).all()  # what is sure is so by the medians too


def test_where_files_lie_in_memory_is_no_speed() -> None:
    first, second = (judged([1.0, 1.01], [0.5, 0.4], spread=s).beats(True) for s in (0.0, 0.05))
    assert first[1, 0] and not second.any()


def test_differences_within_the_noise_beat_nobody_surely() -> None:
    seen = judged([1.0, 1.001], [0.5, 0.4999], noise=0.2)
    assert not seen.beats(True).any() and seen.beats(False).sum() <= 1


def test_rows_are_counted_against_the_solvers() -> None:
    seen = judged([1.0, 1.2, 1.3, 0.9], [0.5, 0.4, 0.6, 0.3])
    took = dict.fromkeys((SOLVER, "good", "bad"), (60.0, 0.1))
    found = {SOLVER: [A, D], "good": [B, C], "bad": [A]}
    rows = {row["row"]: row for row in compare(seen, found, took, [A], 0)}
    assert rows["good"]["beats_solver"] == 1 and rows["good"]["beaten_by_solver"] == 0
    assert rows[SOLVER]["beats_solver"] == rows["bad"]["beats_solver"] == 0
    assert rows["good"]["volume"] > rows[SOLVER]["volume"] > rows["bad"]["volume"]
    assert dominates(rows["good"]) and not dominates(rows["bad"]) and not dominates(rows[SOLVER])
    assert rows[SOLVER]["more_volume"] == 0.0 and not any(row["beats_all"] for row in rows.values())
    (_, only) = compare(seen, {SOLVER: [A, D], "good": [B]}, took, [D], 0)
    assert only["beats_all"] and dominates(only), "what everybody has cannot save a front"
    assert not dominates(only | {"beats_all": False, "more_volume_interval95": [-0.1, 0.3]})
    for row in rows.values():
        low, high = row["volume_interval95"]
        assert low <= row["volume"] <= high <= 1 and row["measuring_s"] == 60.0
    again = compare(seen, found, took, [A], 0)
    assert list(rows.values()) == again  # same seed, same intervals


def test_what_all_sittings_share_is_not_surer_for_more_of_them() -> None:
    """The error of the images is common to all sittings."""
    seen, took = judged([1.0, 1.2], [0.5, 0.45]), dict.fromkeys((SOLVER, "other"), (60.0, 0.1))
    seen.kl = np.abs(np.array([[0.5], [0.45]]) + np.random.default_rng(1).normal(0, 0.4, (2, 40)))
    widths = []
    for times in (1, 4):
        seen.rates = np.tile(seen.rates, (times, 1, 1))
        (_, row) = compare(seen, {SOLVER: [A], "other": [B]}, took, [], 0)
        low, high = row["more_volume_interval95"]
        widths.append(high - low)
    assert 0.8 < widths[1] / widths[0] < 1.25 and widths[0] > 0.05


def test_children_are_new_and_differ() -> None:
    known = {A: np.array([1.0, 0.5]), D: np.array([0.8, 0.9])}
    made = _children(known, np.random.default_rng(0))
    assert set(made) <= {B, C} and len(set(made)) == len(made)
    assert _children({c: np.zeros(2) for c in (A, B, C, D)}, np.random.default_rng(0)) == []


def test_what_loses_most_is_left_in_float_first() -> None:
    found = by_sensitivity({"a": 0.1, "b": 0.9, "c": 0.5}, 4)
    assert found == [
        (False, False, False),
        (False, True, False),
        (False, True, True),
        (True, True, True),
    ]


@pytest.mark.parametrize("row", ROWS["search"])
def test_every_row_hands_over_different_choices_within_the_number(row: str) -> None:
    neighbours = tuple((place, place + 1) for place in range(5))
    latency = RegionLatency(
        regions=tuple("abcdef"),
        base_ms=4.0,
        float_ms=(0.3, 0.5, 0.1, 0.9, 0.2, -0.1),
        boundaries=neighbours,
        boundary_ms=(0.05,) * 5,
    )
    losses = dict(zip("abcdef", (0.5, 0.1, 0.3, 0.2, 0.05, 0.01), strict=True))
    problem = problem_of(latency, losses)
    found = by_tables(problem, row, 4, 0)
    assert 1 <= len(found) <= 4 and len(set(found)) == len(found)
    assert all(len(choice) == 6 for choice in found)


@pytest.mark.slow
def test_it_runs_on_the_demo_and_keeps_to_the_seconds() -> None:
    script = Path(__file__).resolve().parents[3] / "bench" / "fronts.py"
    card = next(path for path in demo_cards() if "depthwise" in path.name)
    few = ["--seconds", "3", "--points", "2", "--sittings", "6", "--rounds", "1", "--images", "32"]
    command = [
        sys.executable,
        str(script),
        str(card),
        *few,
        "--seen-images",
        "16",
        "--calibration-images",
        "16",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=550)
    (found,) = json.loads(done.stdout)
    rows = {row["row"]: row for row in found["rows"]}
    extra = {"integer_program, uncorrected", "by sensitivity", "evolve, measured"}
    assert set(rows) == {*ROWS["search"], *extra}
    assert found["images"] == 32 and found["judged"] == len(found["choices"]) <= 2 + 2 * len(rows)
    assert (found["sittings"], found["rounds"]) == (6, 1)
    assert all(1 <= row["points"] <= 2 and 0 < row["volume"] <= 1 for row in rows.values())
    by = {name for choice in found["choices"] for name in choice["by"]}
    assert by == set(rows) and found["evaluated_by_evolve"] >= 1
    assert all(len(choice["in_float"]) == found["regions"] for choice in found["choices"])
