"""What holds for every step of the registry; a new row is tested by being there."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.cli.lists import describe
from fewbit.errors import RecipeError
from fewbit.net import Net
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLinear
from fewbit.recipe import Recipe, run_recipe
from fewbit.registry import ROWS, find
from fewbit.step import Step, StepReport
from networks import WHOLE_RANGE, make_context, make_images, make_net, networks_for

ROADS = ("canonical", "fold_bn", "place", "calibrate")
STEPS = tuple(ROWS["steps"])


def road_to(name: str) -> tuple[str, ...]:
    """Return the steps that bring a network to where this one may run, and the step itself."""
    step: type[Step] = find("steps", name)
    steps: list[str] = []
    facts: set[str] = set()
    for before in ROADS:
        if step.needs <= facts:
            break
        steps.append(before)
        facts |= find("steps", before).gives
    assert step.needs <= facts, f"no step gives what {name} needs: {step.needs - facts}"
    return (*steps, name)


def recipe_of(steps: tuple[str, ...]) -> Recipe:
    """Return a recipe of steps; what holds for them does so after few iterations."""
    few = {step: {"iterations": 20} for step in steps if "iterations" in find("steps", step).model_fields}
    return Recipe(name="contract", steps=tuple({"use": step} | few.get(step, {}) for step in steps))


def net_for(name: str, network: str = "residual") -> Net:
    """Return a network that tells the range of its images where a step asks for it."""
    return make_net(network, image_range=WHOLE_RANGE if name == "fold_input" else None)


def made(name: str, network: str = "residual") -> tuple[Net, tuple[StepReport, ...]]:
    return run_recipe(recipe_of(road_to(name)), net_for(name, network), make_context())


def switch_off(net: Net) -> Net:
    """Return the network with every quantizer off."""
    for layer in net.layers():
        if isinstance(layer.module, Quantizer | DynamicQuantizer):
            layer.module.enabled = False
        if isinstance(layer.module, QuantConv2d | QuantLinear):
            layer.module.weight_quantizer.enabled = False
    return net


def outputs(net: Net, images: Tensor) -> Tensor:
    with torch.no_grad():
        return net(images)


@pytest.fixture(params=STEPS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_its_hyperparameters_come_back_from_toml_and_json(name: str) -> None:
    step: type[Step] = find("steps", name)
    plain = step()
    assert step.from_toml(plain.to_toml()) == plain
    assert step.from_data(json.loads(plain.model_dump_json())) == plain
    assert step.from_toml(plain.to_toml()).digest() == plain.digest()


def test_it_says_what_it_is_and_where_it_is_from(name: str) -> None:
    what, source = describe(find("steps", name))
    assert what.endswith(".") and len(what) < 110
    text = inspect.getdoc(find("steps", name)) or ""
    if name not in ("canonical", "place", "calibrate"):  # these are the frame, not a published method
        assert source and "arXiv" in source and "Differs:" in text


def test_each_hyperparameter_is_explained(name: str) -> None:
    step: type[Step] = find("steps", name)
    text = inspect.getdoc(step) or ""
    assert all(f"{field}:" in text for field in step.model_fields)


def test_its_needs_are_enforced(name: str) -> None:
    step: type[Step] = find("steps", name)
    if not step.needs:
        assert run_recipe(recipe_of((name,)), make_net("residual"), make_context())[1][0].step == name
        return
    with pytest.raises(RecipeError, match=f"step '{name}' needs a network that is"):
        run_recipe(recipe_of((name,)), make_net("residual"), make_context())


def test_its_facts_are_there_afterwards(name: str) -> None:
    net, reports = made(name)
    assert find("steps", name).gives <= net.facts
    assert reports[-1].step == name and reports[-1].changed >= 0


def test_the_callers_network_is_untouched(name: str) -> None:
    net = net_for(name)
    before = {key: value.clone() for key, value in net.graph.state_dict().items()}
    text, images = repr(net), make_images(3)
    logits = outputs(net, images)
    run_recipe(recipe_of(road_to(name)), net, make_context())
    assert repr(net) == text
    assert all(torch.equal(value, before[key]) for key, value in net.graph.state_dict().items())
    assert torch.equal(outputs(net, images), logits)


def test_same_seed_same_bits(name: str) -> None:
    network = networks_for(name)[-1]
    states: list[dict[str, Any]] = [made(name, network)[0].graph.state_dict() for _ in range(2)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_with_all_quantizers_off_the_network_computes_what_it_did(name: str) -> None:
    for network in sorted(set(networks_for(name)) - {"branches"}):
        net, _ = made(name, network)
        expected = outputs(make_net(network), make_images(4))
        found = outputs(switch_off(net), make_images(4))
        # What takes rounding back off the biases leaves there as much as rounding did.
        # What puts another function in the place of one says how far it is from it.
        share = 0.02 if {"corrected", "approximated"} & net.facts else 1e-5
        assert float((found - expected).abs().max()) < share * float(expected.abs().max()) + 1e-6


def test_numbers_stay_float32_and_any_batch_goes_through(name: str) -> None:
    net, _ = made(name)
    if "placed" in net.facts and "calibrated" not in net.facts:
        switch_off(net)
    kinds = {value.dtype for value in net.graph.state_dict().values()}
    assert kinds <= {torch.float32, torch.int64}
    images = make_images(5)
    whole = outputs(net, images)
    assert whole.dtype == torch.float32 and whole.shape == (5, 5)
    for batch in (1, 2):
        parts = torch.cat([outputs(net, part) for part in images.split(batch)])
        assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-4)
