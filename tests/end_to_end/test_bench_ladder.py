from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from fewbit.place.quantizer import QuantConv2d, Quantizer, QuantLinear
from fewbit.recipe import Recipe, read_recipe, run_recipe
from networks import make_context, make_net

LADDER: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "ladder.py"))


def quick(recipe: Recipe) -> Recipe:
    """Return a recipe whose gradient steps take few iterations; the widths are theirs all the same."""
    steps = [
        fields | ({"iterations": 5} if hasattr(step, "iterations") else {})
        for fields, (_, step) in zip(recipe.steps, recipe.built_steps(), strict=True)
    ]
    return recipe.model_copy(update={"steps": tuple(steps)})


@pytest.mark.parametrize("method", sorted(LADDER["METHODS"]))
def test_every_rung_runs_at_the_widths_that_its_name_says(method: str) -> None:
    recipe = quick(LADDER["recipe_of"](f"{method}@w3a4"))
    net, _ = run_recipe(recipe, make_net("residual"), make_context("openvino"))
    layers = [m for m in net.graph.modules() if isinstance(m, QuantConv2d | QuantLinear)]
    assert [m.weight_quantizer.spec.bits for m in layers] == [8, 3, 3, 8]
    widths = {m.name: m.spec.bits for m in net.graph.modules() if isinstance(m, Quantizer) and not m.weight}
    assert widths.pop("input") == 8
    assert sorted(widths.values()) == [4] * (len(widths) - 1) + [8]  # what the classifier reads


def test_all_leaves_only_the_image_at_8_bits() -> None:
    net, _ = run_recipe(LADDER["recipe_of"]("mse@w4a4-all"), make_net("residual"), make_context("openvino"))
    quantizers = {m.name: m.spec.bits for m in net.graph.modules() if isinstance(m, Quantizer)}
    assert quantizers.pop("input") == 8 and set(quantizers.values()) == {4}


def test_a_rung_without_a_width_is_a_recipe_that_ships() -> None:
    assert LADDER["recipe_of"]("w4a4-reconstructed") == read_recipe("w4a4-reconstructed")
    assert LADDER["scheme_of"]("w4a4") == read_recipe("w4a4-reconstructed").scheme
    with pytest.raises(SystemExit, match="width 'w9a4': give w and a with 2 to 8 bits"):
        LADDER["recipe_of"]("comq@w9a4")


@pytest.mark.parametrize("name", ["int8-dfq", "int8-per-tensor-dfq", "int8-zeroq", "w4a8-dfq", "w4a8-zeroq"])
def test_a_recipe_that_needs_no_images_reads_them_where_it_is_told_to(name: str) -> None:
    shipped, twin = read_recipe(name), LADDER["recipe_of"](f"{name}+images")
    assert not shipped.uses_images and twin.uses_images
    assert twin.scheme == shipped.scheme and twin.name == f"{name}+images"
    kept = [step["use"] for step in shipped.steps if step["use"] != "zeroq"]
    assert [step["use"] for step in twin.steps] == [use.removesuffix("_norm") for use in kept]
    net, reports = run_recipe(twin, make_net("residual"), make_context("openvino"))
    assert "calibrated" in net.facts and net.images is None and len(reports) == len(twin.steps)
