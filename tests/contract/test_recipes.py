"""What holds for every recipe that ships; a new file is tested by being there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewbit.export.onnx_out import export_onnx
from fewbit.net import Net
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLinear
from fewbit.place.targets import TARGETS, target
from fewbit.recipe import Recipe, read_recipe, run_recipe, shipped_recipes
from networks import CLASSES, NETWORKS, make_context, make_images, make_net, networks_for

RECIPES = tuple(shipped_recipes())


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return read_recipe(str(request.param))


@pytest.fixture(params=TARGETS)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def takes(recipe: Recipe, network: str) -> None:
    """Skip a network without BatchNorm where the recipe reads one; it refuses, see the steps' own tests."""
    if network not in networks_for(*(step["use"] for step in recipe.steps)):
        pytest.skip("no BatchNorm to read")


def coarseness(recipe: Recipe) -> int:
    """Return how many times as far as those of 8 bits codes of weights lie from one another."""
    return int(2 ** (8 - recipe.scheme.weights.bits))


def made(recipe: Recipe, network: str, engine: str) -> Net:
    takes(recipe, network)
    return run_recipe(recipe, make_net(network), make_context(engine))[0]


def outputs(net: Net, images: Tensor) -> Tensor:
    with torch.no_grad():
        return net(images)


def test_it_comes_back_from_toml_and_json(recipe: Recipe) -> None:
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_data(json.loads(recipe.model_dump_json())) == recipe
    assert Recipe.from_toml(recipe.to_toml()).digest() == recipe.digest()


def test_it_says_what_it_is_for_in_one_line(recipe: Recipe) -> None:
    assert recipe.summary.endswith(".") and "\n" not in recipe.summary


@pytest.mark.parametrize("network", NETWORKS)
def test_the_callers_network_is_untouched(recipe: Recipe, engine: str, network: str) -> None:
    takes(recipe, network)
    net = make_net(network)
    before = {key: value.clone() for key, value in net.graph.state_dict().items()}
    text = repr(net)
    run_recipe(recipe, net, make_context(engine))
    assert repr(net) == text and net.facts == frozenset()
    assert all(torch.equal(value, before[key]) for key, value in net.graph.state_dict().items())


@pytest.mark.parametrize("network", ["branches", "gated", "depthwise"])
def test_same_seed_same_bytes(recipe: Recipe, engine: str, network: str, tmp_path: Path) -> None:
    found = set()
    for number in range(2):
        export_onnx(made(recipe, network, engine), tmp_path / f"{number}.onnx", target(engine))
        found.add(hashlib.sha256((tmp_path / f"{number}.onnx").read_bytes()).hexdigest())
    assert len(found) == 1


@pytest.mark.parametrize("network", NETWORKS)
def test_with_all_quantizers_off_it_is_the_float_network(recipe: Recipe, engine: str, network: str) -> None:
    net = made(recipe, network, engine)
    for layer in net.layers():
        if isinstance(layer.module, Quantizer | DynamicQuantizer):
            layer.module.enabled = False
        if isinstance(layer.module, QuantConv2d | QuantLinear):
            layer.module.weight_quantizer.enabled = False
    expected = outputs(make_net(network), make_images(4))
    gap = (outputs(net, make_images(4)) - expected).abs().max()
    # Corrected biases hold what rounding took.
    share = 0.02 * coarseness(recipe) if "corrected" in net.facts else 1e-5
    assert float(gap) < share * float(expected.abs().max()) + 1e-6


@pytest.mark.parametrize("network", NETWORKS)
def test_it_stays_near_the_float_network(recipe: Recipe, engine: str, network: str) -> None:
    expected = outputs(make_net(network), make_images(8))
    gap = (outputs(made(recipe, network, engine), make_images(8)) - expected).abs().max()
    assert float(gap) < 0.1 * min(coarseness(recipe), 4) * float(expected.abs().max())


@pytest.mark.parametrize("network", ["depthwise", "gated"])
def test_any_batch_goes_through_and_images_do_not_meet(recipe: Recipe, engine: str, network: str) -> None:
    net = made(recipe, network, engine)
    whole = outputs(net, make_images(5))
    assert whole.shape == (5, CLASSES) and whole.dtype == torch.float32
    alone = torch.cat([outputs(net, image) for image in make_images(5).split(1)])
    step = float(whole.max() - whole.min()) / 255
    assert float((alone - whole).abs().max()) <= step


def test_layers_kept_in_float_are_float(recipe: Recipe, engine: str) -> None:
    kept = made(recipe.with_float(["conv1", "last"]), "residual", engine) if recipe.places else None
    if kept is None:
        assert recipe.name == "float32"
        return
    quantized = {x.name for x in kept.layers() if isinstance(x.module, QuantConv2d | QuantLinear)}
    assert quantized == {"stem", "conv2"}
