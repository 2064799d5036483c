from __future__ import annotations

import ctypes
import itertools
import math
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import FewbitError, RecipeError
from fewbit.search.mixed import integer_program
from fewbit.search.mixed.integer_program import IntegerProgram, Program, solve
from fewbit.search.mixed.problem import Boundary, Option, Problem, Region
from fewbit.search.mixed.table import tabulate
from fewbit.search.mixed.widths import width_problem
from fewbit.sensitivity.frontier import cheapest_within, pareto_frontier
from hawq_v3 import DATA, gain, hawq_problem, int8_layers, uniform
from made_problems import chain, every_assignment, problems


@settings(deadline=None, max_examples=200)
@given(problems(), st.data())
def test_it_is_the_best_of_all_with_several_limits_and_any_objective(
    problem: Problem, data: st.DataObject
) -> None:
    every = every_assignment(problem)
    objective = data.draw(st.sampled_from(problem.columns))
    limited = data.draw(st.sets(st.sampled_from([c for c in problem.columns if c != objective])))
    shift = data.draw(st.sampled_from([0.0, 0.5, -0.25]))
    limits = {
        name: data.draw(st.sampled_from([one.value(name) for one in every])) + shift
        for name in sorted(limited)
    }
    inside = [one for one in every if one.within(limits)]
    found = solve(problem, limits, objective)
    if not inside:
        assert found is None
        return
    assert found is not None and found in every and found.within(limits)
    best = min(one.value(objective) for one in inside)
    assert found.value(objective) == pytest.approx(best, abs=1e-7)
    if len(limits) == 1:
        (name,) = limits
        equal = [one for one in inside if one.value(objective) <= best + 1e-9]
        assert found.value(name) == pytest.approx(min(one.value(name) for one in equal), abs=1e-7)


@pytest.mark.parametrize("case", DATA["optima"], ids=lambda case: f"{case['cost']}-{case['share']}")
def test_the_published_data_of_hawq_v3(case: dict[str, Any]) -> None:
    problem = hawq_problem()
    low, high = uniform(problem, "int4"), uniform(problem, "int8")
    cost = case["cost"]
    limit = low.costs[cost] + case["share"] * (high.costs[cost] - low.costs[cost])
    assert limit == pytest.approx(case["limit"], abs=5e-6)
    found = solve(problem, {cost: limit})
    assert found is not None and int8_layers(found) == case["int8"]
    assert found.costs[cost] == pytest.approx(case["value"], abs=5e-6)
    assert gain(problem, found) == pytest.approx(case["gain"], abs=5e-7)


def test_the_totals_of_hawq_v3() -> None:
    problem = hawq_problem()
    low, high = uniform(problem, "int4"), uniform(problem, "int8")
    assert gain(problem, high) == pytest.approx(1.303455, abs=5e-7)
    expected = {
        "mib": (5.3203125, 10.640625),
        "bops": (26.492928, 105.971712),
        "ms": (3.14867227, 5.34368732),
    }
    for cost, (least, most) in expected.items():
        assert (low.costs[cost], high.costs[cost]) == pytest.approx((least, most), rel=1e-9)


def test_sizes_are_those_of_the_dynamic_program() -> None:
    losses = {"a": {2: 5, 4: 1, 8: 0.1}, "b": {2: 2, 4: 0.3, 8: 0.05}, "c": {2: 0.8, 4: 0.2, 8: 0.02}}
    parameters = {"a": 100, "b": 400, "c": 1000}
    problem = width_problem(losses, parameters)
    frontier = pareto_frontier(list(losses.values()), list(parameters.values()))
    for bits in range(3000, 12001, 400):
        found = solve(problem, {"bytes": bits / 8})
        expected = cheapest_within(frontier, bits)
        assert found is not None and found.loss == pytest.approx(expected.cost, rel=1e-9)
        assert tuple(int(name[1:]) for name in found.options.values()) == expected.bits
    assert solve(problem, {"bytes": 2999 / 8}) is None


def test_fourteen_regions_in_a_row_with_reorders_at_and_beside_what_they_cost() -> None:
    rng = np.random.default_rng(0)
    for _ in range(6):
        losses = [(float(x), 0.0) for x in rng.lognormal(-3, 1.5, 14)]
        ms = [(float(x), float(x * rng.uniform(1.2, 2))) for x in rng.lognormal(0, 1, 14)]
        table = tabulate(chain(losses, ms, reorder_ms=0.3))
        totals = table.totals(np.array(list(itertools.product((0, 1), repeat=14))))
        for shift in (0.0, 1e-9, -1e-9, 1e-3):
            limit = float(rng.choice(totals[:, 1])) + shift
            best = totals[totals[:, 1] <= limit + 1e-12 * limit, 0].min()
            found = solve(table.problem, {"ms": limit})
            assert found is not None and found.within({"ms": limit})
            assert found.loss == pytest.approx(best, abs=1e-8)


def test_a_region_alone_does_not_pay_for_its_reorders_but_a_block_does() -> None:
    problem = chain([(0.1, 0.0)] * 5, [(1.0, 2.0)] * 5, reorder_ms=0.6)
    assert solve(problem, {"ms": 9.9}) == solve(problem, {"ms": 9.6})  # the end of the row pays one reorder
    one_end, all_int8 = solve(problem, {"ms": 9.6}), solve(problem, {"ms": 5.0})
    assert one_end is not None and sorted(one_end.options.values()) == ["bf16"] * 4 + ["int8"]
    assert one_end.options["a"] != one_end.options["e"] and one_end.costs["ms"] == 9.6
    assert all_int8 is not None and set(all_int8.options.values()) == {"int8"}


def test_a_limit_on_the_loss_and_the_least_time() -> None:
    problem = hawq_problem()
    dear = solve(problem, {"ms": 4.24618})
    assert dear is not None
    back = solve(problem, {"loss": dear.loss}, "ms")
    assert back is not None and back.costs["ms"] == dear.costs["ms"] and back.options == dear.options
    both = solve(problem, {"ms": 4.24618, "mib": 7.0})
    assert both is not None and both.within({"ms": 4.24618, "mib": 7.0}) and both.loss >= dear.loss


def test_limits_that_bind_nothing_or_everything() -> None:
    problem = chain([(1.0, 0.0)], [(1.0, 2.0)])
    for limits in ({}, {"ms": math.inf}, {"loss": 0.0}):
        found = solve(problem, limits)
        assert found is not None and found.options == {"a": "bf16"}
    assert solve(problem, {"ms": 0.5}) is None
    with pytest.raises(RecipeError, match="limits: there is no 'kb'; there are loss, ms"):
        solve(problem, {"kb": 1.0})
    with pytest.raises(RecipeError, match="objective: there is no 'speed'; there are loss, ms"):
        solve(problem, {}, "speed")


def test_a_gap_stops_within_its_share() -> None:
    problem = hawq_problem()
    best, near = solve(problem, {"ms": 4.0}), IntegerProgram(gap=0.2).search(problem, {"ms": 4.0})
    assert best is not None and near is not None and near.within({"ms": 4.0})
    least = uniform(problem, "int8").loss
    assert best.loss <= near.loss <= least + (best.loss - least) * 1.25


def test_what_only_the_tolerance_lets_pass_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    # The slack is made so wide that the solver offers what costs 2.1, 3.1 and 3.2 at a limit of 2.05.
    problem = chain([(4.0, 1.0), (2.0, 0.5)], [(1.0, 2.1), (1.0, 1.1)])
    program = Program(tabulate(problem))
    monkeypatch.setattr(integer_program, "_SLACKS", (1.0, -1e-6))
    found = program.least("loss", ["ms"], {"ms": 2.05})
    assert found is not None and found.costs["ms"] == 2.0 and program.solved >= 4
    assert program.least("loss", ["ms"], {"ms": 1.9}) is None
    monkeypatch.setattr(integer_program, "_PATIENCE", 2)
    again = Program(tabulate(problem))
    assert again.least("loss", ["ms"], {"ms": 2.05}) == found and again.solved >= 3


def test_a_crowd_of_nearly_equal_losses_takes_no_more_programs() -> None:
    # 2^12 assignments lose 1e-9 to 1e-6 of the range more than the best: too little to be told from it, or
    # just enough.
    for tiny in (1e-9, 1e-8, 3e-8, 1e-7, 1e-6):
        losses = [(tiny * (1 + 0.01 * place), 0.0) for place in range(12)] + [(1.0, 0.0)]
        problem = chain(losses, [(1.0, 1.0 + 0.1 * place) for place in range(13)], reorder_ms=0.01)
        program = Program(tabulate(problem))
        found = program.least("loss", ["ms"], {"ms": 100.0})
        assert found is not None and found.loss <= 1.1e-7 and program.solved <= 8


def test_infeasible_is_asked_for_twice_and_giving_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = integer_program.milp, list[bool]()

    def wrong(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["options"]["presolve"])
        if asked[-1]:
            return SimpleNamespace(x=None, status=2, message="infeasible")
        return real(*args, **kwargs)

    monkeypatch.setattr(integer_program, "milp", wrong)
    problem = chain([(1.0, 0.0)], [(1.0, 2.0)])
    found = solve(problem, {"ms": 1.5})
    assert found is not None and found.options == {"a": "int8"} and asked == [True, False] * 2
    gone = SimpleNamespace(x=None, status=4, message="Numerical difficulties.")
    monkeypatch.setattr(integer_program, "milp", lambda *args, **kwargs: gone)
    with pytest.raises(FewbitError) as caught:
        solve(problem, {"ms": 1.5})
    assert str(caught.value) == (
        "integer program of 1 regions: HiGHS gave up (Numerical difficulties); "
        "take the row 'evolve', or a gap above 0"
    )


def test_what_the_solver_prints_does_not_reach_the_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = integer_program.milp

    def chatty(*args: Any, **kwargs: Any) -> Any:
        ctypes.CDLL(None).puts(b"left in by its authors")
        os.write(1, b"at once")
        return real(*args, **kwargs)

    monkeypatch.setattr(integer_program, "milp", chatty)
    assert solve(chain([(1.0, 0.0)], [(1.0, 2.0)]), {}) is not None
    print("after")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "after\n"


def test_one_region_with_one_option() -> None:
    problem = Problem((Region("a", (Option("x", 1.0, {}),)),))
    found = solve(problem, {})
    assert found is not None and found.options == {"a": "x"}
    two = Problem(
        (Region("a", (Option("x", 1.0, {"ms": 1.0}),)), Region("b", (Option("x", 1.0, {"ms": 1.0}),))),
        (Boundary("a", "b", {("x", "x"): {"ms": 5.0}}),),
    )
    found = solve(two, {"ms": 7.0})
    assert found is not None and found.costs["ms"] == 7.0
    assert solve(two, {"ms": 6.9}) is None
