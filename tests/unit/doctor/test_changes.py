from __future__ import annotations

import tomllib
from collections.abc import Callable

import pytest

from fewbit.doctor.changes import (
    Change,
    correct_bias,
    eight_bits,
    equalize,
    in_words,
    keep_float,
    scale_a_channel,
    take_ranges,
)
from fewbit.recipe import Recipe, read_recipe
from fewbit.spec import QuantSpec, Rule

EVERY: list[Callable[[], Change]] = [
    scale_a_channel,
    lambda: equalize(caps=True, correct=True),
    lambda: equalize(caps=False, correct=False),
    correct_bias,
    lambda: take_ranges("mse"),
    lambda: take_ranges("mse", "weights"),
    lambda: keep_float(["a", "b"]),
    lambda: eight_bits(["a", "input"]),
]


@pytest.mark.parametrize("make", EVERY)
def test_a_change_is_told_as_toml_and_leaves_the_recipe_it_was_given(make: Callable[[], Change]) -> None:
    recipe, change = read_recipe("int8-per-tensor"), make()
    before = recipe.to_toml()
    changed = change.apply(recipe)
    assert recipe.to_toml() == before and changed != recipe
    assert change.apply(changed).steps == changed.steps
    parsed, whole = tomllib.loads(change.lines), tomllib.loads(changed.to_toml())
    for step in parsed.get("steps", ()):
        assert any(step.items() <= known.items() for known in whole["steps"])
    for rule in parsed.get("scheme", {}).get("rules", ()):
        Rule.model_validate(rule)
        assert any(known["match"] == rule["match"] for known in whole["scheme"]["rules"])
    assert Recipe.from_toml(changed.to_toml()) == changed


def steps(recipe: Recipe) -> list[object]:
    return [step["use"] for step in recipe.steps]


def test_steps_come_where_they_belong() -> None:
    made = equalize(caps=True, correct=True).apply(read_recipe("int8"))
    assert steps(made) == ["canonical", "fold_bn", "equalize", "place", "calibrate", "correct_bias"]
    assert made.steps[2]["caps"] is True
    assert made.built_steps()
    known = read_recipe("int8-equalized")
    assert equalize(caps=False, correct=True).apply(known) == known


def test_a_scale_a_channel_reaches_the_rules_too() -> None:
    recipe = read_recipe("int8-per-tensor")
    rule = Rule(match="a", weights=QuantSpec(bits=4, symmetric=True, signed=True))
    scheme = recipe.scheme.model_copy(update={"rules": (rule, Rule(match="b", keep_float=True))})
    made = scale_a_channel().apply(recipe.model_copy(update={"scheme": scheme}))
    assert made.scheme.weights.granularity == "channel"
    assert made.scheme.rules[0].weights is not None
    assert (made.scheme.rules[0].weights.granularity, made.scheme.rules[0].weights.bits) == ("channel", 4)


def test_other_ranges_drop_the_options_of_the_old_ones() -> None:
    recipe = read_recipe("int8-percentile")
    options = {"activation_options": {"percentile": 99.0}, "weights": "mse", "weight_options": {"steps": 50}}
    recipe = recipe.model_copy(update={"steps": (*recipe.steps[:-1], {**recipe.steps[-1], **options})})
    made = take_ranges("minmax").apply(recipe).steps[-1]
    assert made == {
        "use": "calibrate",
        "activations": "minmax",
        "weights": "mse",
        "weight_options": {"steps": 50},
    }
    made = take_ranges("minmax", "weights").apply(recipe).steps[-1]
    assert (
        made["weights"] == "minmax" and "weight_options" not in made and made["activations"] == "percentile"
    )


def test_eight_bits_go_to_weights_and_what_they_read() -> None:
    change = eight_bits(["a", "input"])
    first, second = change.apply(read_recipe("int8")).scheme.rules
    assert (first.match, second.match) == ("a", "input")
    assert first.weights is not None and first.inputs is not None and first.activations is None
    assert (first.weights.bits, first.inputs.bits) == (8, 8)
    assert second.activations == QuantSpec(bits=8) and second.weights is None
    assert "weights = { bits = 8, symmetric = true" in change.lines


def test_layers_in_words() -> None:
    assert in_words(list("abc")) == "a, b and c"
    assert in_words(list("abcd"), 2) == "a and 3 more"
