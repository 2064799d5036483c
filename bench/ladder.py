"""The ladder of post-training methods at every width, as recipes: `comq@w4a4`, `nearest@w4a8-all`.

Behind the @ stand the bits of weights and activations. The first and the last layer (their weights and what
they read) have 8 bits unless `-all` follows; the image always has, as its pixels do.
`w4a8-dfq+images` is a shipped recipe that needs no images, calibrated on the given ones.
"""

from __future__ import annotations

import re
from typing import Any

from fewbit.recipe import Recipe, read_recipe
from fewbit.spec import QuantSpec, Rule, Scheme

_BEST = {"use": "calibrate", "weights": "mse", "activations": "mse"}
METHODS: dict[str, tuple[dict[str, Any], ...]] = {
    "nearest": ({"use": "place"}, {"use": "calibrate"}),
    "mse": ({"use": "place"}, _BEST),
    "requant": ({"use": "place"}, {"use": "calibrate", "weights": "requant", "activations": "mse"}),
    "equalized": ({"use": "equalize"}, {"use": "place"}, _BEST),
    "corrected": ({"use": "place"}, _BEST, {"use": "correct_bias"}),
    "equalized-corrected": ({"use": "equalize"}, {"use": "place"}, _BEST, {"use": "correct_bias"}),
    "qdrop-tuned": ({"use": "place"}, _BEST, {"use": "qdrop"}, {"use": "tune_scales"}),
    "gptq": ({"use": "place"}, _BEST, {"use": "gptq"}),
    "obq": ({"use": "place"}, _BEST, {"use": "obq"}),
    "comq": ({"use": "place"}, _BEST, {"use": "comq"}),
    "adaround": ({"use": "place"}, _BEST, {"use": "adaround"}),
    "brecq-layer": ({"use": "place"}, _BEST, {"use": "brecq", "units": "layer"}),
    "brecq": ({"use": "place"}, _BEST, {"use": "brecq"}),
    "brecq-fisher": ({"use": "place"}, _BEST, {"use": "brecq", "weighting": "fisher"}),
    "comq-fitted": ({"use": "place"}, _BEST, {"use": "comq"}, {"use": "fit_ranges"}),
    "comq-tuned": ({"use": "place"}, _BEST, {"use": "comq"}, {"use": "tune_scales"}),
    "qdrop": ({"use": "place"}, _BEST, {"use": "qdrop"}),
}


def weights(bits: int) -> QuantSpec:
    """Return the grid of weights: symmetric, a scale a channel."""
    return QuantSpec(bits=bits, symmetric=True, signed=True, granularity="channel")


def scheme_of(width: str) -> Scheme:
    """Return the Scheme of a width such as w4a8 or w4a4-all."""
    found = re.fullmatch(r"w([2-8])a([2-8])(-all)?", width)
    if found is None:
        raise SystemExit(f"width '{width}': give w and a with 2 to 8 bits, as w4a8 or w4a8-all")
    bits, activations = int(found[1]), int(found[2])
    rules = [Rule(match="input", activations=QuantSpec(bits=8))]
    if not found[3]:
        rules.append(Rule(match="first", weights=weights(8)))
        rules.append(Rule(match="last", weights=weights(8), inputs=QuantSpec(bits=8)))
    return Scheme(weights=weights(bits), activations=QuantSpec(bits=activations), rules=tuple(rules))


def recipe_of(text: str) -> Recipe:
    """Return a rung such as `comq@w4a4`, a shipped recipe by its name, with `+images` too, or a .toml's."""
    if text.endswith("+images"):
        return _with_images(read_recipe(text.removesuffix("+images"))).model_copy(update={"name": text})
    method, at, width = text.partition("@")
    if not at:
        return read_recipe(text)
    steps = ({"use": "canonical"}, {"use": "fold_bn"})
    if method in METHODS:
        return Recipe(name=text, scheme=scheme_of(width), steps=steps + METHODS[method])
    return read_recipe(method).model_copy(update={"name": text, "scheme": scheme_of(width)})


def _with_images(recipe: Recipe) -> Recipe:
    """Return a data-free recipe with calibration on images, and all else as it is."""
    instead = {"calibrate_norm": "calibrate"}
    steps = tuple(
        {key: value for key, value in step.items() if (key, value) != ("images", False)}
        | {"use": instead.get(step["use"], step["use"])}
        for step in recipe.steps
        if step["use"] != "zeroq"
    )
    return recipe.model_copy(update={"steps": steps})
