"""Changes of a recipe: the remedies that fewbit has, each as a function of the recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fewbit.recipe import Recipe
from fewbit.spec import QuantSpec, Rule

EIGHT_BIT_WEIGHTS = QuantSpec(bits=8, symmetric=True, signed=True, granularity="channel")
EIGHT_BITS = QuantSpec(bits=8)


@dataclass(frozen=True)
class Change:
    """One change of a recipe.

    Attributes:
        action: What to do, in words.
        lines: The same as lines of the recipe's TOML.
        apply: Returns the changed recipe.
    """

    action: str
    lines: str
    apply: Callable[[Recipe], Recipe]


def uses(recipe: Recipe, step: str) -> bool:
    """Tell whether a recipe has a step."""
    return any(entry.get("use") == step for entry in recipe.steps)


def scale_a_channel() -> Change:
    """Give weights a scale a channel in place of one a tensor."""

    def apply(recipe: Recipe) -> Recipe:
        def channelwise(spec: QuantSpec) -> QuantSpec:
            return spec.model_copy(update={"granularity": "channel"})

        rules = tuple(
            rule if rule.weights is None else rule.model_copy(update={"weights": channelwise(rule.weights)})
            for rule in recipe.scheme.rules
        )
        changes = {"weights": channelwise(recipe.scheme.weights), "rules": rules}
        return recipe.model_copy(update={"scheme": recipe.scheme.model_copy(update=changes)})

    return Change("a scale a channel for weights", '[scheme.weights]\ngranularity = "channel"', apply)


def equalize(caps: bool, correct: bool) -> Change:
    """Equalize weights across layers, and correct biases where asked."""
    step: dict[str, Any] = {"use": "equalize"} | ({"caps": True} if caps else {})
    action = "equalize weights across layers" + (" and correct biases" if correct else "")
    lines = "\n".join(steps_toml(one) for one in (step, *([{"use": "correct_bias"}] if correct else [])))

    def apply(recipe: Recipe) -> Recipe:
        if not uses(recipe, "equalize"):
            recipe = put_before(recipe, "place", step)
        return correct_bias().apply(recipe) if correct else recipe

    return Change(action, lines, apply)


def correct_bias() -> Change:
    """Correct biases on the calibration images, as the last step."""
    step = {"use": "correct_bias"}

    def apply(recipe: Recipe) -> Recipe:
        if uses(recipe, "correct_bias"):
            return recipe
        return recipe.model_copy(update={"steps": (*recipe.steps, step)})

    return Change("correct biases on the calibration images", steps_toml(step), apply)


def take_ranges(method: str, of: str = "activations") -> Change:
    """Find the ranges of activations or of weights by another method."""
    words = {"minmax": "min-max", "mse": "least-error", "percentile": "percentile"}

    def change(entry: Mapping[str, Any]) -> dict[str, Any]:
        if entry.get("use") != "calibrate":
            return dict(entry)
        dropped = f"{of.removesuffix('s')}_options"
        return {**{key: value for key, value in entry.items() if key != dropped}, of: method}

    def apply(recipe: Recipe) -> Recipe:
        return recipe.model_copy(update={"steps": tuple(change(entry) for entry in recipe.steps)})

    lines = steps_toml({"use": "calibrate", of: method})
    return Change(f"{words.get(method, method)} ranges of {of}", lines, apply)


def keep_float(layers: Sequence[str]) -> Change:
    """Leave layers in float."""
    rules = [{"match": layer, "keep_float": True} for layer in layers]
    return Change(
        f"leave {in_words(layers)} in float",
        "\n".join(rule_toml(rule) for rule in rules),
        lambda recipe: recipe.with_float(list(layers)),
    )


def eight_bits(layers: Sequence[str]) -> Change:
    """Give the weights of layers, and what they read, 8 bits; "input" stands for the image."""
    made = [
        Rule(match=layer, activations=EIGHT_BITS)
        if layer == "input"
        else Rule(match=layer, weights=EIGHT_BIT_WEIGHTS, inputs=EIGHT_BITS)
        for layer in layers
    ]

    def apply(recipe: Recipe) -> Recipe:
        scheme = recipe.scheme.model_copy(update={"rules": (*made, *recipe.scheme.rules)})
        return recipe.model_copy(update={"scheme": scheme})

    lines = [rule_toml(_written(rule)) for rule in made]
    return Change(f"8 bits for {in_words(layers)}", "\n".join(lines), apply)


def _written(rule: Rule) -> dict[str, Any]:
    """Return what of a rule differs from the defaults, and every width."""
    parts = rule.model_dump(exclude_defaults=True)
    for key in ("weights", "activations", "inputs"):
        if key in parts:
            parts[key] = {"bits": getattr(rule, key).bits, **parts[key]}
    return parts


def put_before(recipe: Recipe, step: str, entry: Mapping[str, Any]) -> Recipe:
    """Return a recipe with a step put before another one."""
    place = next(i for i, known in enumerate(recipe.steps) if known.get("use") == step)
    steps = (*recipe.steps[:place], dict(entry), *recipe.steps[place:])
    return recipe.model_copy(update={"steps": steps})


def in_words(layers: Sequence[str], most: int = 3) -> str:
    """Name some layers.

    >>> in_words(["a"]), in_words(["a", "b"]), in_words(["a", "b", "c", "d", "e"])
    ('a', 'a and b', 'a, b and 3 more')
    """
    if len(layers) <= most:
        return " and ".join(filter(None, (", ".join(layers[:-1]), layers[-1])))
    return f"{', '.join(layers[: most - 1])} and {len(layers) - most + 1} more"


def steps_toml(entry: Mapping[str, Any]) -> str:
    """Write a step as TOML."""
    return "\n".join(["[[steps]]", *(f"{key} = {_value(value)}" for key, value in entry.items())])


def rule_toml(entry: Mapping[str, Any]) -> str:
    """Write a rule as TOML."""
    return "\n".join(["[[scheme.rules]]", *(f"{key} = {_value(value)}" for key, value in entry.items())])


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)
