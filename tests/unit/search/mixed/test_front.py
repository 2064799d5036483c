from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import RecipeError
from fewbit.search.mixed import front as fronts
from fewbit.search.mixed.front import Front, front
from fewbit.search.mixed.integer_program import solve
from fewbit.search.mixed.problem import Assignment, Option, Problem, Region
from fewbit.search.mixed.table import tabulate
from fewbit.search.mixed.widths import width_problem
from fewbit.sensitivity.frontier import pareto_frontier
from hawq_v3 import hawq_problem, uniform
from made_problems import chain, every_assignment, problems

LOSSES = {"a": {2: 5, 4: 1, 8: 0.1}, "b": {2: 2, 4: 0.3, 8: 0.05}, "c": {2: 0.8, 4: 0.2, 8: 0.02}}
PARAMETERS = {"a": 100, "b": 400, "c": 1000}


def spots(points: tuple[Assignment, ...] | list[Assignment], cost: str = "ms") -> list[tuple[float, float]]:
    return [(round(one.value(cost), 6), round(one.loss, 6)) for one in points]


def undominated(values: list[tuple[float, float]]) -> list[tuple[float, float]]:
    kept: list[tuple[float, float]] = []
    for cost, loss in sorted(set(values)):
        if not kept or loss < kept[-1][1]:
            kept.append((cost, loss))
    return kept


def every_spot(problem: Problem, cost: str, **limits: float) -> list[tuple[float, float]]:
    """Return the (cost, loss) of each of the 2^16 assignments inside limits."""
    table = tabulate(problem)
    totals = table.totals(np.array(list(np.ndindex(*table.counts))))
    inside = (totals <= table.limits_of(limits) + 1e-9).all(1)
    found = totals[inside][:, [table.columns.index(cost), 0]].round(6)
    return [(float(c), float(loss)) for c, loss in np.unique(found, axis=0)]


@settings(deadline=None, max_examples=60)
@given(problems(), st.sampled_from(["ms", "kb"]), st.integers(2, 6))
def test_it_is_every_assignment_that_none_dominates(problem: Problem, cost: str, cap: int) -> None:
    expected = undominated(spots(every_assignment(problem), cost))
    every = front(problem, cost, points=None)
    assert every.complete and spots(every.points, cost) == expected
    roomy = front(problem, cost, points=len(expected) + 2)
    assert roomy.complete and roomy.points == every.points
    some = front(problem, cost, points=cap)
    assert len(some.points) == min(cap, len(expected)) and set(spots(some.points, cost)) <= set(expected)
    assert some.complete or cap <= len(expected)
    assert some.points[0] == every.points[0] and some.points[-1] == every.points[-1]


def test_the_worked_frontier_of_sizes() -> None:
    found = front(width_problem(LOSSES, PARAMETERS), "bytes")
    expected = pareto_frontier(list(LOSSES.values()), list(PARAMETERS.values()))
    assert [point.costs["bytes"] * 8 for point in found.points] == [one.size_bits for one in expected]
    assert [point.loss for point in found.points] == pytest.approx([one.cost for one in expected], rel=1e-9)
    assert found.complete and found.cost == "bytes" and found.programs >= 9 and found.seconds > 0


@pytest.mark.parametrize(("cost", "count"), [("mib", 29), ("bops", 24), ("ms", 41)])
def test_the_fronts_of_hawq_v3(cost: str, count: int) -> None:
    problem = hawq_problem()
    found = front(problem, cost)
    assert found.complete and len(found.points) == count
    assert spots(found.points, cost) == undominated(every_spot(problem, cost))
    assert found.points[0] == uniform(problem, "int4") and found.points[-1] == uniform(problem, "int8")
    assert front(problem, cost) == found


def test_a_capped_front_is_spread_over_the_whole_cost() -> None:
    problem = hawq_problem()
    every, some = front(problem, "ms"), front(problem, "ms", points=8)
    assert len(some.points) == 8 and not some.complete and set(spots(some.points)) < set(spots(every.points))
    costs = [point.costs["ms"] for point in some.points]
    apart = [high - low for low, high in itertools.pairwise(costs)]
    assert max(apart) < 2.5 * (costs[-1] - costs[0]) / 7


def test_equal_losses_are_not_walked_through_one_by_one() -> None:
    # Three to the eighth assignments have the loss 0 but only the cheapest of them counts.
    options = (Option("a", 0.0, {"ms": 1.0}), Option("b", 0.0, {"ms": 1.7}), Option("c", 0.0, {"ms": 2.9}))
    regions = tuple(Region(f"r{place}", options) for place in range(8))
    lossy = Region("last", (Option("a", 1.0, {"ms": 1.0}), Option("b", 0.0, {"ms": 2.0})))
    found = front(Problem((*regions, lossy)), points=None)
    assert spots(found.points) == [(9.0, 1.0), (10.0, 0.0)] and found.programs < 12


def test_what_is_best_within_a_limit() -> None:
    problem = hawq_problem()
    found = front(problem, "ms")
    assert found.within(4.24618) == solve(problem, {"ms": 4.24618})
    assert found.within(3.0) is None and found.within(99.0) == found.points[-1]


def test_other_limits_hold_along_the_front() -> None:
    problem = hawq_problem()
    found = front(problem, "ms", {"mib": 7.0})
    assert found.complete and all(point.within({"mib": 7.0}) for point in found.points)
    assert spots(found.points) == undominated(every_spot(problem, "ms", mib=7.0))
    tight = front(problem, "ms", {"ms": 4.0})
    assert tight.points[-1] == solve(problem, {"ms": 4.0})
    assert spots(tight.points) == [spot for spot in spots(front(problem).points) if spot[0] <= 4.0]
    assert front(problem, "ms", {"mib": 1.0}).points == ()


def test_one_point() -> None:
    found = front(chain([(1.0,), (0.0,)], [(1.0,), (2.0,)]))
    assert spots(found.points) == [(3.0, 1.0)] and found.complete


def test_the_time_does_not_make_fronts_different() -> None:
    points = (Assignment({}, 0.0, {}),)
    assert Front("ms", points, True, 1, 0.5) == Front("ms", points, True, 1, 0.7)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"points": 1}, "front: 1 points are too few; give 2 or more, or none for all"),
        ({"cost": "mss"}, "limits: there is no 'mss' (did you mean 'ms'?); there are loss, ms"),
        ({"limits": {"kb": 1.0}}, "limits: there is no 'kb'; there are loss, ms"),
    ],
)
def test_bad_input_is_told(given: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        fronts.front(chain([(1.0,)], [(1.0,)]), **given)
    assert str(caught.value) == told
