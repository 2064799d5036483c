from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewbit.errors import DataError, RecipeError
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.quantizer import QuantConv2d, Quantizer
from fewbit.prepare.canonical import Canonical
from fewbit.recipe import (
    Prepared,
    Recipe,
    _batches_of,
    image_context,
    read_recipe,
    run_recipe,
    shipped_recipes,
)
from fewbit.spec import QuantSpec, Scheme
from fewbit.step import Context, Step, StepReport
from networks import make_context, make_images, make_net

STEPS = ({"use": "canonical"}, {"use": "fold_bn"}, {"use": "place"}, {"use": "calibrate"})


def recipe_of(*steps: str) -> Recipe:
    return Recipe(name="mine", steps=tuple({"use": step} for step in steps))


@pytest.mark.parametrize("name", shipped_recipes())
def test_each_shipped_recipe_is_named_after_its_file_and_runs(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.name == name and recipe.summary.endswith(".")
    net, reports = run_recipe(recipe, make_net("residual"), make_context())
    assert [report.step for report in reports] == [step["use"] for step in recipe.steps]
    assert all(report.seconds >= 0 for report in reports)
    assert net(make_images(2)).isfinite().all()
    assert ("calibrated" in net.facts) == (name != "float32")


def test_shipped_recipes_differ_and_are_in_order() -> None:
    recipes = shipped_recipes()
    assert list(recipes) == sorted(recipes)
    assert len({recipe.digest() for recipe in recipes.values()}) == len(recipes)
    assert {"float32", "int8", "int8-per-tensor", "int8-weights-only", "int8-dynamic"} <= set(recipes)


def test_a_recipe_comes_back_from_toml_and_json(tmp_path: Path) -> None:
    recipe = Recipe(
        name="mine",
        scheme=Scheme(weights=QuantSpec(bits=4, symmetric=True, signed=True)),
        steps=(
            {"use": "calibrate", "activations": "percentile", "activation_options": {"percentile": 99.9}},
        ),
    )
    path = tmp_path / "mine.toml"
    path.write_text(recipe.to_toml())
    assert read_recipe(str(path)) == recipe
    assert read_recipe(str(path)).digest() == recipe.digest()
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_the_callers_network_stays_as_it_is_even_in_training_mode() -> None:
    net = make_net("depthwise").train()
    before = {key: value.clone() for key, value in net.graph.state_dict().items()}
    names = [layer.name for layer in net.layers()]
    made, _ = run_recipe(read_recipe("int8"), net, make_context())
    assert all(torch.equal(value, before[key]) for key, value in net.graph.state_dict().items())
    assert [layer.name for layer in net.layers()] == names
    assert net.graph.training and not made.graph.training and net.facts == frozenset()


def test_same_seed_same_bits() -> None:
    found = [run_recipe(read_recipe("int8-mse"), make_net("gated"), make_context())[0] for _ in range(2)]
    states = [net.graph.state_dict() for net in found]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_an_unknown_recipe_is_told_with_the_nearest() -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe("int8-percentil")
    assert str(caught.value).startswith(
        "recipe 'int8-percentil' (did you mean 'int8-percentile'?): there are float32"
    )
    assert str(caught.value).endswith("or give a .toml file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 3", "key 'name' is 3: input should be a valid string"),
        ("summary = 'x'", "key 'name' is missing; add it"),
        ("name = 'x'\nstep = []", r"unknown key 'step' \(did you mean 'steps'\?\)"),
        ("name = 'x'\n[scheme]\nmode = 'statik'", "key 'scheme.mode' is 'statik'"),
        ("name = 'x'\nsteps = ['place']", "key 'steps.0' is 'place': input should be a valid dictionary"),
        ("name = ", "is not TOML"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_file_that_is_no_recipe_is_told(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=rf"recipe .*r\.toml: .*{message}"):
        read_recipe(str(path))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"none\.toml: cannot be read \(.*No such file.*\); give a \.toml file"
    ):
        read_recipe(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            {"use": "foldbn"},
            r"steps: no 'foldbn' \(did you mean 'fold_bn'\?\); there are canonical, zeroq, fold_bn",
        ),
        ({"activations": "mse"}, "recipe 'mine': step 1 has no 'use'; `fewbit methods` lists them"),
        ({"use": 3}, "recipe 'mine': step 1 has no 'use'"),
        (
            {"use": "calibrate", "activation": "mse"},
            r"recipe 'mine', step 'calibrate': unknown key 'activation' \(did you mean 'activations'\?\)",
        ),
        ({"use": "fold_bn", "eps": 1}, "recipe 'mine', step 'fold_bn': unknown key 'eps'; known here: none"),
    ],
)
def test_a_step_that_is_not_known_is_told_before_any_runs(step: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run_recipe(Recipe(name="mine", steps=(step,)), make_net("residual"), make_context())


def test_a_range_method_that_is_not_known_is_told() -> None:
    steps = (*STEPS[:3], {"use": "calibrate", "activations": "mze"})
    with pytest.raises(RecipeError, match=r"ranges: no 'mze' \(did you mean 'mse'\?\)"):
        run_recipe(Recipe(name="mine", steps=steps), make_net("residual"), make_context())
    steps = (*STEPS[:3], {"use": "calibrate", "activation_options": {"percentil": 1}})
    with pytest.raises(RecipeError, match="range method 'minmax': unknown key 'percentil'"):
        run_recipe(Recipe(name="mine", steps=steps), make_net("residual"), make_context())


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (("place",), "step 'place' needs a network that is canonical; put the step that gives it before"),
        (("canonical", "calibrate"), "step 'calibrate' needs a network that is placed; put the step that"),
        (
            ("canonical", "place", "fold_bn", "calibrate"),
            "step 'fold_bn' cannot follow the step that made the network placed; put it before",
        ),
        (("canonical", "place", "calibrate", "canonical"), "step 'canonical' cannot follow"),
        (("canonical", "place", "place"), "step 'place' cannot follow"),
    ],
)
def test_steps_out_of_order_are_told(steps: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe 'mine': {message}"):
        run_recipe(recipe_of(*steps), make_net("residual"), make_context())


def test_a_network_that_is_quantized_is_not_quantized_again() -> None:
    made, _ = run_recipe(read_recipe("int8"), make_net("residual"), make_context())
    with pytest.raises(RecipeError, match="'canonical' cannot follow the step that made the network placed"):
        run_recipe(read_recipe("int8"), made, make_context())


def test_an_exact_step_that_changes_the_logits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.prepare import fold_bn

    exact = fold_bn.affine_of
    monkeypatch.setattr(fold_bn, "affine_of", lambda norm: (1.1 * exact(norm)[0], exact(norm)[1]))
    with pytest.raises(
        RecipeError, match=r"step 'fold_bn' changed residual's logits by \d\.\de-\d\d; report it"
    ):
        run_recipe(read_recipe("float32"), make_net("residual"), make_context())


def test_without_images_it_says_what_to_do() -> None:
    context = replace(make_context(), batches=lambda: iter(()))
    with pytest.raises(DataError, match=r"calibration: no image came; give at least one with --data"):
        run_recipe(read_recipe("int8"), make_net("residual"), context)
    for name in ("float32", "int8-weights-only", "int8-dynamic"):
        run_recipe(read_recipe(name), make_net("residual"), context)


def test_which_recipes_use_images() -> None:
    using = {name for name, recipe in shipped_recipes().items() if recipe.uses_images}
    assert {"int8", "int8-equalized", "int8-mse", "int8-per-tensor"} <= using
    without = {
        "float32",
        "int8-dynamic",
        "int8-weights-only",
        "int8-dfq",
        "int8-zeroq",
        "w4a8-dfq",
        "w4a8-zeroq",
    }
    assert not without & using
    for mode, method, expected in (
        ("dynamic", "empirical", True),
        ("dynamic", "analytic", False),
        ("static", "analytic", True),
    ):
        steps = (*STEPS, {"use": "correct_bias", "method": method})
        assert Recipe(name="mine", scheme=Scheme(mode=mode), steps=steps).uses_images is expected  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["float32", "int8-dfq", "int8-zeroq", "int8-weights-only"])
def test_a_recipe_that_uses_no_images_is_shown_none(name: str) -> None:
    """Images that it saw would have to be kept from evaluating its file, and are not."""

    def batches() -> Iterator[Tensor]:
        raise AssertionError("an image was asked for")

    recipe = read_recipe(name)
    steps = tuple({**s, "iterations": 1} if s["use"] == "zeroq" else s for s in recipe.steps)
    recipe = recipe.model_copy(update={"steps": steps})
    made, _ = run_recipe(recipe, make_net("depthwise"), replace(make_context(), batches=batches))
    other, _ = run_recipe(recipe, make_net("depthwise"), replace(make_context(), batches=lambda: iter(())))
    states = made.graph.state_dict(), other.graph.state_dict()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_images_of_the_network_take_the_place_of_real_ones() -> None:
    net = make_net("residual")
    net.images = make_images(5, seed=7)
    made, _ = run_recipe(read_recipe("int8"), net, make_context())
    expected, _ = run_recipe(read_recipe("int8"), make_net("residual"), make_context(images=net.images))
    states = made.graph.state_dict(), expected.graph.state_dict()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_large_images_of_the_network_come_a_few_at_a_time() -> None:
    assert [len(batch) for batch in _batches_of(torch.zeros(9, 3, 224, 224))] == [8, 1]
    assert [len(batch) for batch in _batches_of(torch.zeros(40, 3, 32, 32))] == [32, 8]


def test_with_float_puts_its_rules_first() -> None:
    recipe = read_recipe("int8").with_float(["fc"]).with_float(["conv1", "conv2"])
    assert [rule.match for rule in recipe.scheme.rules] == ["conv1", "conv2", "fc"]
    assert all(rule.keep_float for rule in recipe.scheme.rules)
    assert recipe.digest() != read_recipe("int8").digest()
    made, _ = run_recipe(recipe, make_net("residual"), make_context())
    kept = {
        layer.name: isinstance(layer.module, QuantConv2d) for layer in made.layers() if layer.kind == "Conv"
    }
    assert kept == {"stem": True, "conv1": False, "conv2": False}
    assert read_recipe("int8").with_float([]) == read_recipe("int8")


def test_the_schemes_of_recipe_and_context_are_the_recipes() -> None:
    context = replace(make_context(), scheme=Scheme(weights=QuantSpec(bits=2, symmetric=True, signed=True)))
    made, _ = run_recipe(read_recipe("int8"), make_net("residual"), context)
    assert made.layer("stem").module.weight_quantizer.spec.bits == 8  # type: ignore[union-attr]


def test_progress_names_the_step_and_rises_to_one() -> None:
    told: list[tuple[str, float]] = []
    context = replace(make_context(), advance=lambda step, fraction: told.append((step, fraction)))
    run_recipe(read_recipe("int8"), make_net("residual"), context)
    assert [step for step, fraction in told if fraction == 1.0] == [
        "canonical",
        "fold_bn",
        "place",
        "calibrate",
    ]
    assert all(0 <= fraction <= 1 for _, fraction in told)


def test_the_base_of_all_steps_is_no_method() -> None:
    with pytest.raises(RecipeError, match="Step: is no method; use one that `fewbit methods` lists"):
        Step()(make_net("residual"), make_context())


def test_a_context_of_no_images_gives_none_and_of_images_small_batches() -> None:
    assert list(image_context(None, "onnxruntime").batches()) == []
    with pytest.raises(RecipeError, match=r"target 'onnxruntim' \(did you mean 'onnxruntime'\?\)"):
        image_context(None, "onnxruntim")


def test_shipped_files_hold_no_more_than_their_recipe() -> None:
    for path in Path(__file__).parents[2].glob("src/fewbit/recipes/*.toml"):
        text = tomllib.loads(path.read_text())
        assert set(text) <= set(Recipe.model_fields), path


def test_quantizers_of_a_made_network_are_ready() -> None:
    made, _ = run_recipe(read_recipe("int8"), make_net("branches"), make_context("openvino"))
    quantizers = [layer.module for layer in made.layers() if isinstance(layer.module, Quantizer)]
    assert quantizers and all(quantizer.ready for quantizer in quantizers)
    assert isinstance(made(make_images(1)), Tensor)


@pytest.mark.parametrize("name", ["first", "last", "a*", "b[0]", "c?"])
def test_a_layer_left_in_float_is_meant_by_its_name_alone(name: str) -> None:
    layers = {
        key: nn.Conv2d(3, 3, 1) for key in ("stem", "last", "first", "ab", "a*", "b[0]", "b0", "c?", "cd")
    }
    model = nn.Sequential()
    for key, layer in layers.items():
        model.add_module(key, layer)
    model.add_module("flat", nn.Flatten())
    net, _ = run_recipe(
        read_recipe("int8").with_float((name,)), capture(model, "named", (3, 16, 16)), make_context()
    )
    left = [layer.name for layer in net.layers() if type(layer.module) is nn.Conv2d]
    assert left == [name]


def test_other_widths_go_before_the_recipes_own_rules_and_keep_the_grid() -> None:
    recipe = read_recipe("w4a8-reconstructed").with_widths({"conv1": 3, "fc": 8})
    assert [(r.match, r.weights and r.weights.bits) for r in recipe.scheme.rules[:2]] == [
        ("conv1", 3),
        ("fc", 8),
    ]
    assert recipe.scheme.rules[2:] == read_recipe("w4a8-reconstructed").scheme.rules
    assert recipe.scheme.rules[0].weights == recipe.scheme.weights.model_copy(update={"bits": 3})
    kept = recipe.with_float(["conv1"])
    assert kept.scheme.rules[0].keep_float and kept.scheme.rules[0].match == "conv1"
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    steps = read_recipe("int8-percentile").with_widths({"fc": 4}).steps
    assert steps[-1] == {"use": "calibrate", "activations": "percentile", "weights": "mse"}


@pytest.mark.parametrize("name", ["float32", "int8", "int8-equalized", "int8-dfq"])
def test_a_prepared_network_gives_the_same_bits(name: str) -> None:
    context, net = make_context("openvino"), make_net("depthwise")
    net.image_range = ((-2.0,) * 3, (2.0,) * 3)
    prepared = Prepared(net)
    for recipe in (read_recipe(name), read_recipe(name).with_pixels()):
        once, again = prepared.run(recipe, context), prepared.run(recipe, context)
        expected, _ = run_recipe(recipe, net, context)
        for made in (once, again):
            assert made.facts == expected.facts and str(made.graph.graph) == str(expected.graph.graph)
            state = made.graph.state_dict()
            assert list(state) == list(expected.graph.state_dict())
            assert all(torch.equal(state[key], value) for key, value in expected.graph.state_dict().items())


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_what_is_prepared_does_not_depend_on_what_ran_before(engine: str) -> None:
    context, net = make_context(engine), make_net("branches")
    names = ["int8", "int8-weights-only", "int8-dynamic", "float32"]
    expected = {name: str(run_recipe(read_recipe(name), net, context)[0].graph.graph) for name in names}
    for order in (names, names[::-1]):
        prepared = Prepared(net)
        for name in order:
            assert str(prepared.run(read_recipe(name), context).graph.graph) == expected[name]


def test_exact_steps_are_run_once_for_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    call = Canonical.__call__

    def counted(self: Canonical, net: Net, context: Context) -> StepReport:
        ran.append(context.target.name)
        return call(self, net, context)

    monkeypatch.setattr(Canonical, "__call__", counted)
    prepared = Prepared(make_net("residual"))
    for engine in ("openvino", "openvino", "onnxruntime"):
        for recipe in ("int8", "int8-percentile"):
            prepared.run(read_recipe(recipe), make_context(engine))
    assert ran == ["openvino", "onnxruntime"]
