"""What holds for every search over precisions of the registry; a new row is tested by being there."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.cli.lists import describe
from fewbit.errors import RecipeError
from fewbit.registry import ROWS, find
from fewbit.search.mixed.problem import Assignment, Problem, Tie, evaluate
from fewbit.search.mixed.searcher import Searcher
from fewbit.spec import Frozen
from hawq_v3 import DATA, gain, hawq_problem, int8_layers
from made_problems import chain, every_assignment, least, problems

ROW_NAMES = tuple(ROWS["search"])
EXAMPLES = {"differentiable": 5, "evolve": 20}
QUICK: dict[str, dict[str, Any]] = {"differentiable": {"steps": 40}, "evolve": {"generations": 20}}


@pytest.fixture(params=ROW_NAMES)
def row(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(row: str, quick: bool = True) -> Searcher:
    found: Searcher = find("search", row).from_data(QUICK.get(row, {}) if quick else {})
    return found


def test_its_hyperparameters_come_back_from_toml_and_json(row: str) -> None:
    kind: type[Frozen] = find("search", row)
    plain = kind()
    assert kind.from_toml(plain.to_toml()) == plain
    assert kind.from_data(json.loads(plain.model_dump_json())) == plain
    with pytest.raises(RecipeError, match="unknown key 'budgets'"):
        kind.from_data({"budgets": 1})


def test_it_says_what_it_is_where_it_is_from_and_how_it_differs(row: str) -> None:
    kind: type[Frozen] = find("search", row)
    what, source = describe(kind)
    text = inspect.getdoc(kind) or ""
    assert what.endswith(".") and "arXiv" in source and "Differs:" in text and ">>>" in text
    assert all(f"{field}:" in text for field in kind.model_fields)


def test_answers_hold_limits_ties_and_what_is_fixed_and_none_is_beyond_the_best(row: str) -> None:
    search = make(row)

    @settings(deadline=None, max_examples=EXAMPLES.get(row, 60), derandomize=True)
    @given(problems(), st.data())
    def check(problem: Problem, data: st.DataObject) -> None:
        every = every_assignment(problem)
        objective = data.draw(st.sampled_from(problem.columns))
        others = sorted(name for name in problem.columns if name != objective)
        names = data.draw(st.lists(st.sampled_from(others), unique=True))
        limits = {name: data.draw(st.sampled_from(every)).value(name) for name in names}
        found, best = search.search(problem, limits, 0, objective), least(problem, limits, objective)
        if best is None:
            assert found is None
        elif row == "integer_program" or (len(limits) < 2 and not problem.boundaries):
            assert found is not None
        if found is not None and best is not None:
            assert found == evaluate(problem, found.options)  # ties and fixed regions are checked there
            assert found in every and found.within(limits)
            assert found.value(objective) >= best - 1e-7
            assert row != "integer_program" or found.value(objective) <= best + 1e-7

    check()


def test_evolution_is_never_worse_than_greedy_search() -> None:
    greedy, evolve = make("greedy"), make("evolve")

    @settings(deadline=None, max_examples=40, derandomize=True)
    @given(problems(), st.data(), st.integers(0, 9))
    def check(problem: Problem, data: st.DataObject, seed: int) -> None:
        limits = {"ms": data.draw(st.sampled_from(every_assignment(problem))).costs["ms"]}
        plain, bred = greedy.search(problem, limits, seed), evolve.search(problem, limits, seed)
        assert plain is None or (bred is not None and bred.loss <= plain.loss)

    check()


def test_the_same_seed_gives_the_same_answer(row: str) -> None:
    problem = hawq_problem()
    search = make(row)
    assert search.search(problem, {"ms": 4.1}, 3) == search.search(problem, {"ms": 4.1}, 3)
    assert search.search(problem, {"ms": 4.1}, 3) == make(row).search(hawq_problem(), {"ms": 4.1}, 3)


def test_the_problem_stays_as_it_was(row: str) -> None:
    problem = hawq_problem()
    make(row).search(problem, {"mib": 8.0})
    assert problem == hawq_problem()


@pytest.mark.parametrize("case", DATA["optima"], ids=lambda case: f"{case['cost']}-{case['share']}")
def test_the_published_data_of_hawq_v3(row: str, case: dict[str, Any]) -> None:
    problem = hawq_problem()
    limits = {case["cost"]: case["limit"]}
    found = make(row, quick=False).search(problem, limits)
    assert found is not None and found.within(limits)
    for tie in problem.ties:
        assert len({found.options[layer] for layer in tie.regions}) == 1
    share = gain(problem, found) / case["gain"]
    if row == "integer_program":
        assert int8_layers(found) == case["int8"]
    # Gradients follow a relaxation, whose rounded answer the papers do not promise to be near the best.
    assert 0.9 if row == "differentiable" else 0.99 <= share < 1 + 1e-6


def test_what_no_assignment_meets_gives_none(row: str) -> None:
    problem = hawq_problem()
    for limits in ({"ms": 3.1}, {"mib": 6.0, "ms": 3.0}, {"loss": 0.0}):
        assert make(row).search(problem, limits) is None
    tied = Problem(problem.regions, ties=(Tie(tuple(region.name for region in problem.regions)),))
    answer = make(row).search(tied, {"ms": 5.0})
    assert answer is not None and set(answer.options.values()) == {"int4"}


def test_several_limits_hold_at_once(row: str) -> None:
    problem = hawq_problem()
    limits = {"ms": 4.3, "mib": 7.5, "bops": 70.0}
    found = make(row).search(problem, limits)
    best = make("integer_program").search(problem, limits)
    assert found is not None and best is not None and found.within(limits)
    assert gain(problem, found) >= 0.9 * gain(problem, best)


def test_without_limits_the_objective_alone_counts(row: str) -> None:
    problem = chain([(1.0, 0.5, 0.25), (3.0, 2.0, 1.0)], [(1.0, 2.0, 3.0), (1.0, 2.0, 3.0)], reorder_ms=0.1)
    precise = make(row).search(problem, {})
    fast = make(row).search(problem, {"ms": math.inf}, objective="ms")
    assert precise == Assignment({"a": "float32", "b": "float32"}, 1.25, {"ms": 6.0})
    assert fast == Assignment({"a": "int8", "b": "int8"}, 4.0, {"ms": 2.0})


def test_one_assignment_is_the_only_answer(row: str) -> None:
    problem = chain([(1.0,), (3.0,)], [(1.0,), (2.0,)])
    found = make(row).search(problem, {"ms": 3.0})
    assert found == Assignment({"a": "int8", "b": "int8"}, 4.0, {"ms": 3.0})


def test_limits_and_objectives_of_nothing_are_told(row: str) -> None:
    problem = hawq_problem()
    with pytest.raises(RecipeError) as caught:
        make(row).search(problem, {"mss": 1.0})
    assert str(caught.value) == (
        "limits: there is no 'mss' (did you mean 'ms'?); there are loss, mib, bops, ms"
    )
    with pytest.raises(RecipeError, match="objective: there is no 'speed'; there are loss, mib, bops, ms"):
        make(row).search(problem, {}, objective="speed")
    with pytest.raises(RecipeError, match="limits: that of 'ms' is nan; give a number, or inf for no limit"):
        make(row).search(problem, {"ms": math.nan})
