from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.search.mixed.greedy import Greedy, choose_greedily, least_choice, uniform_choices
from fewbit.search.mixed.integer_program import solve
from fewbit.search.mixed.problem import Boundary, Option, Problem, Region
from fewbit.search.mixed.table import tabulate
from made_problems import chain, every_assignment, least, problems


def options_of(problem: Problem, limit: float) -> str:
    found = Greedy().search(problem, {"ms": limit})
    assert found is not None
    return " ".join(found.options.values())


def test_the_region_that_loses_least_for_what_it_saves_goes_first() -> None:
    # Loss per ms saved: 0.1, 0.4, 0.25.
    problem = chain([(0.1, 0.0), (0.4, 0.0), (0.5, 0.0)], [(1.0, 2.0), (1.0, 2.0), (1.0, 3.0)])
    assert options_of(problem, 7.0) == "bf16 bf16 bf16"
    assert options_of(problem, 6.0) == "int8 bf16 bf16"
    assert options_of(problem, 4.0) == "int8 bf16 int8"
    assert options_of(problem, 3.0) == "int8 int8 int8"
    assert Greedy().search(problem, {"ms": 2.9}) is None


def test_it_goes_down_the_lower_hull_of_a_region() -> None:
    # From float32 bf16 saves 1 for 0.5 and int8 saves 4 for 0.8: bf16 is above the hull.
    problem = chain([(0.8, 0.5, 0.0), (0.6, 0.0)], [(1.0, 4.0, 5.0), (1.0, 2.0)])
    assert options_of(problem, 3.0) == "int8 bf16"


def test_what_a_reorder_costs_is_in_the_price() -> None:
    # Alone, a saves 1 - 0.9 and c saves 2 - 0.9; without reorders a would be first.
    losses, ms = [(0.1, 0.0), (9.0, 0.0), (0.3, 0.0)], [(1.0, 2.0), (1.0, 1.5), (1.0, 3.0)]
    assert options_of(chain(losses, ms), 6.0) == "int8 bf16 bf16"
    assert options_of(chain(losses, ms, reorder_ms=0.9), 6.0) == "bf16 bf16 int8"


def test_neighbours_go_together_where_one_alone_saves_nothing() -> None:
    problem = chain([(0.1, 0.0)] * 6, [(1.0, 1.5)] * 6, reorder_ms=0.6)
    for limit in (8.9, 8.6, 7.0, 6.0):
        found, exact = Greedy().search(problem, {"ms": limit}), solve(problem, {"ms": limit})
        assert found is not None and exact is not None and found.within({"ms": limit})
        assert found.loss <= exact.loss + 0.2
    assert Greedy().search(problem, {"ms": 5.9}) is None


def test_blocks_may_be_as_long_as_it_takes() -> None:
    # One reorder costs more than nine regions save.
    problem = chain([(0.1, 0.0)] * 14, [(1.0, 1.1)] * 14, reorder_ms=0.95)
    ten = options_of(problem, 15.39).split()
    assert sorted(ten) == ["bf16"] * 4 + ["int8"] * 10 and ten in (sorted(ten), sorted(ten)[::-1])
    assert options_of(problem, 15.0).split() == ["int8"] * 14
    assert options_of(problem, 15.4).split() == ["bf16"] * 14
    longer = chain([(0.1, 0.0)] * 13 + [(9.0, 0.0)], [(1.0, 1.1)] * 14, reorder_ms=0.95)
    assert options_of(longer, 15.1).split() == ["int8"] * 13 + ["bf16"]


def test_what_still_fits_is_raised_again() -> None:
    # The small region goes first, which is not enough; once the large one has gone, there is room for it.
    problem = chain([(0.1, 0.0), (2.0, 0.0)], [(1.0, 2.0), (1.0, 9.0)])
    for limit in (3.0, 9.5):
        assert options_of(problem, limit) == "bf16 int8"
    assert options_of(problem, 10.0) == "int8 bf16"


def test_the_least_time_within_a_loss() -> None:
    problem = chain([(0.1, 0.0), (0.4, 0.0), (0.5, 0.0)], [(1.0, 2.0), (1.0, 2.0), (1.0, 3.0)], 0.1)
    for limit in (0.0, 0.1, 0.5, 0.6, 1.0):
        found = Greedy().search(problem, {"loss": limit}, objective="ms")
        best = least(problem, {"loss": limit}, "ms")
        assert found is not None and best is not None and found.within({"loss": limit})
        assert best <= found.costs["ms"] <= best + 0.3


def test_it_starts_where_it_is_told_to() -> None:
    table = tabulate(chain([(0.2, 0.2), (0.0, 0.0)], [(2.0, 2.0), (1.0, 1.0)]))
    for start in ([0, 1], [1, 0]):
        found = choose_greedily(table, {"ms": 9.0}, start=np.array(start))
        assert found is not None and found.tolist() == start
    assert choose_greedily(table, {"ms": 2.9}) is None


def test_choices_that_need_no_search() -> None:
    regions = (
        Region("a", (Option("w2", 1.0, {"kb": 2.0}), Option("w4", 0.5, {"kb": 4.0}))),
        Region("b", (Option("w4", 0.5, {"kb": 1.0}), Option("w8", 0.5, {"kb": 9.0}))),
    )
    table = tabulate(Problem(regions))
    assert least_choice(table, {"loss": 1.0}).tolist() == [1, 0]
    assert least_choice(table, {"kb": 1.0}).tolist() == [0, 0]
    assert [choice.tolist() for choice in uniform_choices(table)] == [[0, 0], [1, 0], [0, 1]]


@settings(deadline=None, max_examples=100)
@given(problems(), st.data())
def test_with_one_limit_and_no_boundaries_it_finds_something_wherever_there_is(
    problem: Problem, data: st.DataObject
) -> None:
    plain = replace(problem, boundaries=())
    every = every_assignment(plain)
    limit = data.draw(st.sampled_from(every)).costs["ms"]
    found = Greedy().search(plain, {"ms": limit})
    best = least(plain, {"ms": limit})
    assert found is not None and best is not None and found in every and found.within({"ms": limit})
    assert found.loss >= best - 1e-9


def test_where_what_loses_least_leads_nowhere_it_goes_by_what_is_saved_alone() -> None:
    # From (bf16, bf16), the cheapest without the boundary, a to int8 is free of loss and a dead end.
    a = Region("a", (Option("int8", 0.0, {"ms": 2.0}), Option("bf16", 1.0, {"ms": 0.0})))
    b = Region("b", (Option("int8", 1.0, {"ms": 1.0}), Option("bf16", 0.0, {"ms": 0.0})))
    problem = Problem((a, b), (Boundary("a", "b", {("bf16", "bf16"): {"ms": 3.0}}),))
    found = Greedy().search(problem, {"ms": 1.0})
    assert found is not None and found.options == {"a": "bf16", "b": "int8"}


def test_its_answers_on_rows_with_reorders_are_near_the_exact_ones() -> None:
    rng = np.random.default_rng(1)
    worse = []
    for _ in range(20):
        losses = [(float(x), float(x) * 0.05, 0.0) for x in rng.lognormal(-3, 1.5, 12)]
        ms = [(float(x), float(x * 1.3), float(x * 2)) for x in rng.lognormal(0, 1, 12)]
        problem = chain(losses, ms, reorder_ms=0.3)
        limit = sum(t[0] + 0.4 * (t[2] - t[0]) for t in ms)
        found, exact = Greedy().search(problem, {"ms": limit}), solve(problem, {"ms": limit})
        assert found is not None and exact is not None
        worse.append(found.loss / exact.loss)
    assert min(worse) >= 1 - 1e-9 and float(np.median(worse)) < 1.3


@pytest.mark.parametrize("seed", [0, 1])
def test_no_chance_is_in_it(seed: int) -> None:
    problem = chain([(0.1, 0.0), (0.4, 0.0)], [(1.0, 2.0), (1.0, 2.0)])
    assert Greedy().search(problem, {"ms": 3.0}, seed) == Greedy().search(problem, {"ms": 3.0}, 7)
