from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings

from fewbit.search.mixed.problem import Boundary, Option, Problem, Region, Tie
from fewbit.search.mixed.table import tabulate
from made_problems import chain, every_assignment, problems


@settings(deadline=None, max_examples=50)
@given(problems())
def test_totals_are_those_of_the_assignments(problem: Problem) -> None:
    table = tabulate(problem)
    choices = np.array(list(np.ndindex(*table.counts)))
    totals = table.totals(choices)
    every = every_assignment(problem)
    assert len(every) == len(choices)
    for choice, total, expected in zip(choices, totals, every, strict=True):
        assert table.assignment(choice) == expected
        assert total == pytest.approx([expected.value(name) for name in problem.columns], abs=1e-9)
    assert (totals >= table.least() - 1e-9).all()
    apart = totals.max(0) - totals.min(0)
    assert (apart <= table.spread() + 1e-9).all() and (table.spread() > 0).all()


def test_ties_merge_and_inner_boundaries_become_the_group_s() -> None:
    options = (Option("int8", 1.0, {"ms": 1.0}), Option("float32", 0.0, {"ms": 2.0}))
    regions = tuple(Region(name, options) for name in "abc")
    reorder = {("int8", "float32"): {"ms": 8.0}, ("int8", "int8"): {"ms": 4.0}}
    problem = Problem(
        regions,
        (Boundary("a", "b", reorder), Boundary("c", "a", reorder), Boundary("b", "c", reorder)),
        (Tie(("a", "b")),),
        base_costs={"ms": 16.0},
    )
    table = tabulate(problem)
    assert table.groups == (("a", "b"), ("c",)) and table.pairs.tolist() == [[0, 1]]
    assert table.values[0].tolist() == [[2.0, 2.0 + 4.0], [0.0, 4.0]]
    # c reads nothing of a group in float32 for b - c, and is read by it in int8 for c - a.
    assert table.pair_values[0, :, :, 1].tolist() == [[8.0, 8.0], [8.0, 0.0]]
    assert table.base.tolist() == [0.0, 16.0] and table.columns == ("loss", "ms")


def test_groups_with_fewer_options_are_padded_and_fixed_ones_have_one() -> None:
    a = Region("a", tuple(Option(name, 1.0, {}) for name in ("w2", "w4", "w8")))
    b = Region("b", (Option("w4", -1.0, {}), Option("w2", -2.0, {})))
    table = tabulate(Problem((a, b), fixed={"a": "w8"}))
    assert table.names == (("w8",), ("w4", "w2")) and table.counts.tolist() == [1, 2]
    assert table.allowed().tolist() == [[True, False], [True, True]]
    assert table.spread().tolist() == [1.0] and table.least().tolist() == [-1.0]
    assert tabulate(Problem((a,), fixed={"a": "w8"})).spread().tolist() == [1.0]


def test_boundaries_that_cost_nothing_are_left_out_and_parallel_ones_added() -> None:
    problem = chain([(1.0, 0.5), (1.0, 0.5)], [(1.0, 2.0), (1.0, 2.0)], reorder_ms=0.25)
    both = Problem(problem.regions, problem.boundaries * 2)
    assert tabulate(both).pair_values[0, :, :, 1].tolist() == [[0.0, 0.5], [0.5, 0.0]]
    free = Boundary("a", "b", {("int8", "bf16"): {"ms": 0.0}})
    assert tabulate(Problem(problem.regions, (free,))).pairs.shape == (0, 2)


def test_columns_without_a_limit_are_not_limited() -> None:
    table = tabulate(chain([(1.0,)], [(1.0,)]))
    assert table.limits_of({"ms": 2.0}).tolist() == [math.inf, 2.0]
