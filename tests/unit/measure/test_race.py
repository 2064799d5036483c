from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fewbit.measure.accuracy import Predictions, TopK
from fewbit.measure.intervals import empirical_bernstein
from fewbit.measure.race import Race, race_order


def said(right: NDArray[np.bool_], right5: NDArray[np.bool_] | None = None) -> Predictions:
    return Predictions(right, right if right5 is None else right5, np.zeros(len(right), np.int64))


def pair(
    total: int, losses: int, gains: int, seed: int, accuracy: float = 0.8
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What float32 and another network get right, in a random order."""
    split = int(total * accuracy)
    before = np.arange(total) < split
    after = before.copy()
    after[:losses] = False
    after[split : split + gains] = True
    order = race_order(total, seed)
    return before[order], after[order]


def run(race: Race, right: NDArray[np.bool_], chunk: int = 100) -> int | None:
    """Feed until it is hopeless; return the images it took, none where it never was."""
    for start in range(0, len(right), chunk):
        if race.feed(said(right[start : start + chunk])) == "hopeless":
            return race.seen
    return None


def test_order_is_a_permutation_by_seed() -> None:
    order = race_order(1000, seed=3)
    assert np.array_equal(order, race_order(1000, seed=3))
    assert not np.array_equal(order, race_order(1000, seed=4))
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


@pytest.mark.parametrize(("budget", "runs"), [("drop", 2000), ("error", 2000)])
def test_false_drops_stay_within_the_risk(budget: str, runs: int) -> None:
    """J.3: a network exactly at its limit, looked at after every chunk, over 2000 runs."""
    risk, false = 0.05, 0
    for seed in range(runs):
        before, after = pair(1000, losses=30, gains=20, seed=seed)
        race = (
            Race.of_drop(0.01, said(before), risk=risk)
            if budget == "drop"
            else Race.of_errors(1 - after.mean(), 1000, risk=risk)
        )
        false += run(race, after) is not None
    assert false / runs <= risk + 2 * math.sqrt(risk * (1 - risk) / runs)


@given(st.integers(0, 10**6), st.integers(1, 60))
def test_curtailment_alone_never_drops_what_is_inside(seed: int, chunk: int) -> None:
    before, after = pair(200, losses=10, gains=8, seed=seed)
    assert run(Race.of_drop(0.01, said(before), risk=1e-300), after, chunk) is None
    assert run(Race.of_errors(1 - after.mean(), 200, risk=1e-300), after, chunk) is None


def test_curtailment_of_errors_is_exact() -> None:
    right = np.ones(100, np.bool_)
    right[::2] = False
    race = Race.of_errors(limit=0.2, total=100, risk=1e-300)
    # Budget 20 errors in 100: the 21st error is image 41.
    assert race.feed(said(right[:40])) == "continue"
    assert race.feed(said(right[40:41])) == "hopeless"
    assert race.reason == "top-1 error 0.5122 after 41 of 100 images: surely above 0.2"


def test_curtailment_of_a_drop_knows_what_can_be_gained() -> None:
    before = np.ones(100, np.bool_)
    before[-3:] = False
    race = Race.of_drop(0.01, said(before), risk=1e-300)
    after = before.copy()
    after[:5] = False
    # One loss allowed and three images to gain: the fifth loss is one too many.
    assert race.feed(said(after[:4])) == "continue"
    assert race.feed(said(after[4:5])) == "hopeless"
    assert race.reason == "top-1 drop 1.0000 after 5 of 100 images: surely above 0.01"


def test_it_needs_far_fewer_images_than_empirical_bernstein() -> None:
    taken = []
    for seed in range(5):
        before, after = pair(5000, losses=500, gains=100, seed=seed)
        taken.append(run(Race.of_drop(0.01, said(before)), after))
        loss = before.astype(int) - after
        looks = range(100, 5001, 100)
        risks = [0.01 / (t * (t + 1)) for t in range(1, 51)]
        bounds = [
            loss[:n].mean() - empirical_bernstein(loss[:n], 2, risk)
            for n, risk in zip(looks, risks, strict=True)
        ]
        stops = [n for n, bound in zip(looks, bounds, strict=True) if bound > 0.01]
        assert taken[-1] is not None and stops and taken[-1] < stops[0] / 2
    assert np.median(taken) <= 600


def test_the_verdict_does_not_depend_on_the_chunks() -> None:
    before, after = pair(2000, losses=200, gains=20, seed=1)
    ends = []
    for chunk in (1, 7, 100):
        race = Race.of_drop(0.01, said(before))
        taken = run(race, after, chunk)
        assert taken is not None
        ends.append((race.reason, -(-taken // 100)))
    assert len(set(ends)) == 1


def test_top5_and_good_networks_run_to_the_end() -> None:
    before, after = pair(500, losses=2, gains=2, seed=0)
    k: TopK = 5
    race = Race.of_drop(0.01, said(~before, before), k=k)
    assert run(race, after) is None
    assert (race.seen, race.loss, race.verdict, race.reason) == (500, 0, "continue", "")
    assert race.feed(said(after[:0])) == "continue"
    with pytest.raises(ValueError, match="501 images fed to a race over 500"):
        race.feed(said(after[:1]))
