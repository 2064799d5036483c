from __future__ import annotations

import math
from typing import Any

import pytest

from fewbit.errors import RecipeError
from fewbit.search.mixed.problem import Assignment, Boundary, Option, Problem, Region, Tie, evaluate

A = Region("a", (Option("int8", 0.5, {"ms": 1.0, "kb": 1.0}), Option("float32", 0.0, {"ms": 3.0, "kb": 4.0})))
B = Region(
    "b", (Option("int8", 0.25, {"ms": 2.0, "kb": 2.0}), Option("float32", 0.0, {"ms": 5.0, "kb": 8.0}))
)
C = Region("c", (Option("int8", 1.0, {"ms": 0.5, "kb": 1.0}), Option("bf16", 0.125, {"ms": 0.75, "kb": 2.0})))
REORDER = Boundary("a", "b", {("int8", "float32"): {"ms": 0.25}, ("float32", "int8"): {"ms": 0.5}})


def test_an_assignment_sums_base_regions_and_boundaries() -> None:
    problem = Problem((A, B, C), (REORDER,), base_costs={"ms": 10.0})
    assert problem.costs == ("ms", "kb") and problem.columns == ("loss", "ms", "kb")
    mixed = evaluate(problem, {"c": "bf16", "a": "int8", "b": "float32"})
    assert mixed == Assignment(
        {"a": "int8", "b": "float32", "c": "bf16"}, 0.625, {"ms": 10 + 1 + 5 + 0.75 + 0.25, "kb": 11.0}
    )
    assert list(mixed.options) == ["a", "b", "c"]
    other = evaluate(problem, {"a": "float32", "b": "int8", "c": "int8"})
    assert other.costs == {"ms": 10 + 3 + 2 + 0.5 + 0.5, "kb": 7.0}
    same = evaluate(problem, {"a": "int8", "b": "int8", "c": "int8"})
    assert same.costs == {"ms": 13.5, "kb": 4.0} and same.loss == 1.75


def test_sums_are_rounded_once_whatever_the_order() -> None:
    values = (1e16, 1.0, -1e16)
    regions = [Region(name, (Option("x", v, {"ms": v}),)) for name, v in zip("abc", values, strict=True)]
    found = evaluate(Problem(tuple(regions), base_costs={"ms": 0.5}), dict.fromkeys("abc", "x"))
    assert (found.loss, found.costs["ms"]) == (1.0, 1.5)


def test_limits_are_held_to_rounding() -> None:
    found = Assignment({}, 0.3, {"ms": 4.0})
    assert found.within({}) and found.within({"ms": 4.0, "loss": 0.3})
    assert found.within({"ms": 4.0 - 1e-13}) and not found.within({"ms": 4.0 - 1e-9})
    assert not found.within({"ms": 5.0, "loss": 0.29})
    assert found.value("loss") == 0.3 and found.value("ms") == 4.0


def test_ties_that_share_a_region_are_one_group_in_the_order_of_regions() -> None:
    d = Region("d", A.options)
    problem = Problem((A, B, d), ties=(Tie(("d", "a")), Tie(("a", "b"))))
    assert problem.groups == (("a", "b", "d"),)
    assert Problem((A, B, d), ties=(Tie(("d", "a")),)).groups == (("a", "d"), ("b",))
    assert Problem((A, B, d), ties=(Tie(("d", "a")), Tie(("a", "d")))).groups == (("a", "d"), ("b",))


def test_what_a_group_may_have_is_what_all_its_regions_may() -> None:
    problem = Problem((A, C), ties=(Tie(("a", "c")),))
    assert problem.options_of(("a", "c")) == ("int8",)
    assert Problem((A, B), fixed={"a": "float32"}).options_of(("a",)) == ("float32",)
    tied = Problem((A, B), ties=(Tie(("a", "b")),), fixed={"b": "float32"})
    assert tied.options_of(tied.groups[0]) == ("float32",)


def test_limits_and_objectives_of_nothing_are_told() -> None:
    problem = Problem((A, B))
    problem.check_limits({"ms": 1.0, "loss": math.inf, "kb": -1.0}, "kb")
    with pytest.raises(RecipeError) as caught:
        problem.check_limits({"mss": 1.0})
    assert str(caught.value) == "limits: there is no 'mss' (did you mean 'ms'?); there are loss, ms, kb"
    for value, text in ((math.nan, "nan"), (-math.inf, "-inf")):
        with pytest.raises(RecipeError) as caught:
            problem.check_limits({"ms": value})
        assert str(caught.value) == f"limits: that of 'ms' is {text}; give a number, or inf for no limit"
    with pytest.raises(RecipeError, match=r"^objective: there is no 'speed'; there are loss, ms, kb$"):
        problem.check_limits({}, "speed")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"regions": ()}, "problem: has no region; give at least one"),
    ({"regions": (A, A)}, "problem: region 'a' stands there twice; give each once"),
    ({"regions": (Region("x", ()),)}, "region 'x': has no option; give at least one"),
    (
        {"regions": (Region("x", (A.options[0], A.options[0])),)},
        "region 'x': option 'int8' stands there twice; give each once",
    ),
    (
        {"regions": (A, Region("x", (Option("int8", 0.0, {"ms": 1.0}),)))},
        "region 'x', option 'int8': has the costs ms and the first option ms, kb; give all the same",
    ),
    (
        {"regions": (A, Region("x", (Option("int8", 0.0, {}),)))},
        "region 'x', option 'int8': has the costs none and the first option ms, kb; give all the same",
    ),
    (
        {"regions": (Region("x", (Option("int8", 0.0, {"loss": 1.0}),)),)},
        "problem: a cost is called 'loss', as the loss is; give it another name",
    ),
    (
        {"regions": (Region("x", (Option("int8", math.nan, {"ms": 1.0}),)),)},
        "region 'x', option 'int8': loss is nan; give a finite number",
    ),
    (
        {"regions": (Region("x", (Option("int8", 0.0, {"ms": math.inf}),)),)},
        "region 'x', option 'int8': ms is inf; give a finite number",
    ),
    (
        {"base_costs": {"mss": 1.0}},
        "base costs: there is no 'mss' (did you mean 'ms'?); there are ms, kb",
    ),
    ({"base_costs": {"ms": math.nan}}, "base costs: ms is nan; give a finite number"),
    (
        {"boundaries": (Boundary("a", "a", {}),)},
        "boundary a - a: lies between a region and itself; give two regions",
    ),
    (
        {"boundaries": (Boundary("a", "z", {}),)},
        "boundary a - z: there is no region 'z'; give one of the problem's",
    ),
    (
        {"boundaries": (Boundary("a", "b", {("int8", "float"): {"ms": 1.0}}),)},
        "boundary a - b: region 'b' has no option 'float' (did you mean 'float32'?); it has int8, float32",
    ),
    (
        {"boundaries": (Boundary("a", "b", {("int8", "int8"): {"loss": 1.0}}),)},
        "boundary a - b, int8 - int8: there is no 'loss'; there are ms, kb",
    ),
    (
        {"boundaries": (Boundary("a", "b", {("int8", "int8"): {"ms": -math.inf}}),)},
        "boundary a - b, int8 - int8: ms is -inf; give a finite number",
    ),
    ({"ties": (Tie(("a",)),)}, "tie of a: ties no two regions; give two or more"),
    ({"ties": (Tie(()),)}, "tie of nothing: ties no two regions; give two or more"),
    ({"ties": (Tie(("a", "q")),)}, "tie of a, q: there is no region 'q'; give one of the problem's"),
    ({"fixed": {"q": "int8"}}, "fixed 'q': there is no region 'q'; give one of the problem's"),
    ({"fixed": {"a": "bf16"}}, "fixed 'a': region 'a' has no option 'bf16'; it has int8, float32"),
    (
        {"ties": (Tie(("a", "b")),), "fixed": {"a": "int8", "b": "float32"}},
        "tied regions a, b: no option is open to all of them (a: int8; b: float32); give them one in common",
    ),
    (
        {"ties": (Tie(("b", "c")),), "fixed": {"c": "bf16"}},
        (
            "tied regions b, c: no option is open to all of them (b: int8, float32; c: bf16); "
            "give them one in common"
        ),
    ),
]


@pytest.mark.parametrize(("given", "told"), WRONG, ids=[told.partition(";")[0] for _, told in WRONG])
def test_a_wrong_problem_is_told(given: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Problem(**{"regions": (A, B, C), **given})
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"a": "int8"}, "assignment: region 'b' has no option; give one of float32"),
        (
            {"a": "int8", "b": "float32", "q": "int8"},
            "assignment: there is no region 'q'; give one of the problem's",
        ),
        (
            {"a": "int4", "b": "float32"},
            "assignment: region 'a' has no option 'int4' (did you mean 'int8'?); it has int8, float32",
        ),
        (
            {"a": "int8", "b": "int8"},
            "assignment: region 'b' has int8 and is fixed to float32; give that",
        ),
        (
            {"a": "int8", "b": "float32"},
            "assignment: tied regions have a int8, b float32; give them the same option",
        ),
    ],
)
def test_a_wrong_assignment_is_told(options: dict[str, str], told: str) -> None:
    problem = Problem((A, B), ties=(Tie(("a", "b")),), fixed={"b": "float32"})
    with pytest.raises(RecipeError) as caught:
        evaluate(problem, options)
    assert str(caught.value) == told


def test_a_problem_without_costs_has_a_loss_only() -> None:
    problem = Problem((Region("x", (Option("int8", 0.5, {}), Option("float32", 0.0, {}))),))
    assert evaluate(problem, {"x": "int8"}) == Assignment({"x": "int8"}, 0.5, {})
    with pytest.raises(RecipeError, match=r"^base costs: there is no 'ms'; there are no costs$"):
        Problem(problem.regions, base_costs={"ms": 1.0})
