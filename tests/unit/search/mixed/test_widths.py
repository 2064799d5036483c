from __future__ import annotations

import pytest

from fewbit.errors import RecipeError
from fewbit.search.mixed.problem import Tie, evaluate
from fewbit.search.mixed.widths import width_problem


def test_bytes_are_parameters_times_bits_and_options_go_up() -> None:
    problem = width_problem(
        {"a": {8: 0.1, 2: 5.0}, "b": {4: 1.0}}, {"a": 12, "b": 3, "unused": 5}, [Tie(("a", "b"))][:0]
    )
    assert [option.name for option in problem.regions[0].options] == ["w2", "w8"]
    found = evaluate(problem, {"a": "w2", "b": "w4"})
    assert found.loss == 6.0 and found.costs == {"bytes": 4.5}


def test_ties_are_kept_and_bad_input_is_told() -> None:
    losses = {"a": {2: 1.0, 4: 0.5}, "b": {4: 1.0}}
    assert width_problem(losses, {"a": 1, "b": 1}, [Tie(("a", "b"))]).groups == (("a", "b"),)
    with pytest.raises(
        RecipeError, match=r"^widths: layer 'b' has no number of parameters; give that of every layer$"
    ):
        width_problem(losses, {"a": 1})
    with pytest.raises(RecipeError, match="region 'a': has no option; give at least one"):
        width_problem({"a": {}}, {"a": 1})
    with pytest.raises(RecipeError, match="problem: has no region"):
        width_problem({}, {})
