from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibrated import (
    at_unit,
    calibrated,
    context_of,
    cost_of,
    matrices,
    same_bits,
    scheme_of,
    state_of,
    two_weights,
)
from fewbit.errors import RecipeError
from fewbit.improve.brecq import BRECQ, fisher
from fewbit.improve.reconstruct import Problem
from fewbit.improve.units import split_into_layers
from fewbit.net import Net
from fewbit.place.quantizer import Quantizer
from networks import NETWORKS, make_images, make_net
from solved_layers import output_error

QUICK: dict[str, Any] = {"iterations": 120, "step_iterations": 30, "batch": 12}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_brings_the_networks_output_nearer(name: str) -> None:
    net = calibrated(name)
    before = output_error(name, net)
    BRECQ(**QUICK)(net, context_of(32))
    assert output_error(name, net) < 0.8 * before


@pytest.mark.parametrize("more", [{"weighting": "fisher"}, {"units": "layer"}, {"group": 1}], ids=str)
def test_every_way_brings_the_networks_output_nearer(more: dict[str, Any]) -> None:
    net = calibrated("depthwise")
    before = output_error("depthwise", net)
    BRECQ(**QUICK, **more)(net, context_of(32))
    assert output_error("depthwise", net) < 0.8 * before


def test_the_first_stage_learns_rounding_and_leaves_steps_and_biases() -> None:
    net = calibrated()
    before = state_of(net)
    BRECQ(**QUICK | {"step_iterations": 0})(net, context_of())
    after = state_of(net)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {key for key in after if key not in before} == {
        f"{name}.weight_quantizer.assigned" for name in matrices(net)
    }


def test_the_second_stage_learns_steps_and_leaves_codes() -> None:
    both, first = calibrated(), calibrated()
    BRECQ(**QUICK)(both, context_of())
    BRECQ(**QUICK | {"lr_step": 0.0})(first, context_of())
    stem = (matrices(both)["stem"].weight_quantizer, matrices(first)["stem"].weight_quantizer)
    assert stem[0].assigned is not None and stem[1].assigned is not None
    assert torch.equal(stem[0].assigned, stem[1].assigned)  # what is before it is the same in both
    learned, kept = state_of(both), state_of(first)
    moved = {key for key in kept if "quantizers." in key and not torch.equal(learned[key], kept[key])}
    assert "quantizers.relu.scale" in moved and "quantizers.relu_1.scale" in moved
    assert all(key.endswith(".scale") for key in moved)
    weights = [key for key in kept if key.endswith(("weight_quantizer.scale", "bias"))]
    assert all(torch.equal(learned[key], kept[key]) for key in weights)


def test_learned_steps_help_where_activations_are_coarse() -> None:
    scheme = scheme_of(weights=8, activations=3)
    context = context_of(64, scheme=scheme)
    errors = []
    for steps in (0, 150):
        net = calibrated("depthwise", scheme)
        BRECQ(iterations=1, step_iterations=steps, batch=16, lr_step=0.02)(net, context)
        errors.append(output_error("depthwise", net))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("weighting", ["mse", "fisher"])
def test_it_finds_the_best_rounding_of_two_weights(weighting: str) -> None:
    net, context = two_weights()
    BRECQ(regularization=0.3, weighting=weighting)(net, replace(context, seed=2))  # type: ignore[arg-type]
    assert cost_of(net) == pytest.approx(0.088, rel=1e-5)


# The Fisher matrix


def switched(net: Net, on: bool, only: set[str]) -> Net:
    """Return a copy with the quantizers of some nodes on or off, and the others the other way."""
    made = net.clone()
    for layer in made.layers():
        wanted = on if layer.node.name in only else not on
        if isinstance(layer.module, Quantizer):
            layer.module.enabled = wanted
        elif hasattr(layer.module, "weight_quantizer"):
            layer.module.weight_quantizer.enabled = wanted
    return made


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_its_factors_are_squared_gradients_of_the_logits_divergence(limit: int) -> None:
    """The whole network run twice: in float, and with all up to the unit rounded."""
    net, images = calibrated(), make_images(24)
    found: list[Tensor] = []

    def look(problem: Problem) -> None:
        factors = fisher(problem)
        assert factors is not None
        found.append(factors(torch.arange(24)))
        found.append(factors(torch.tensor([5, 0])))
        names.update(node.name for node in (*stem, *problem.unit.nodes))
        outputs.append(problem.unit.outputs[0].name)

    names: set[str] = set()
    outputs: list[str] = []
    stem = [
        node
        for node in net.graph.graph.nodes
        if node.name in ("quantizers_input_1", "stem", "quantizers_relu")
    ]
    at_unit(net, "conv1 to conv2", look, context_of(limit_bytes=limit))

    exact = switched(net, False, {node.name for node in net.graph.graph.nodes})
    half = switched(net, True, names)
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    half.graph.get_submodule(outputs[0].replace("quantizers_", "quantizers.")).register_forward_hook(keep)
    wanted, logits = exact(images).log_softmax(1).detach(), half(images).log_softmax(1)
    loss = (wanted.exp() * (wanted - logits)).sum()
    (gradient,) = torch.autograd.grad(loss, kept)
    reference = gradient.square() / gradient.square().mean()
    torch.testing.assert_close(found[0], reference, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1], reference[[5, 0]], rtol=1e-3, atol=1e-4)
    assert float(found[0].mean()) == pytest.approx(1, rel=1e-4)


def test_what_makes_the_logits_or_has_several_outputs_is_not_weighted() -> None:
    found: dict[str, bool] = {}

    def look(problem: Problem) -> None:
        found[problem.unit.name] = fisher(problem) is not None

    for name in ("stem", "conv1 to conv2", "fc"):
        at_unit(calibrated(), name, look)
    at_unit(calibrated("branches"), "a", look, split=split_into_layers)
    assert found == {"stem": True, "conv1 to conv2": True, "fc": False, "a": False}


def test_the_weighting_follows_what_the_logits_listen_to() -> None:
    """Where the classifier hears one channel only, only that one counts."""
    deaf = make_net("residual")
    made = calibrated()
    with torch.no_grad():
        for net in (deaf, made):
            weight = net.graph.get_submodule("fc").weight
            weight[:, 1:] = 0  # type: ignore[index, operator]
    found: list[Tensor] = []

    def look(problem: Problem) -> None:
        factors = fisher(problem)
        assert factors is not None
        found.append(factors(torch.arange(24)))

    at_unit(made, "conv1 to conv2", look)
    shares = found[0].mean((0, 2, 3))
    assert float(shares[0]) == pytest.approx(16, rel=1e-4) and float(shares[1:].abs().max()) == 0


def test_the_factors_are_gone_when_the_unit_is_done() -> None:
    seen: list[bool] = []
    plain = BRECQ._learn

    class Looking(BRECQ):
        def _solve(self, problem: Problem) -> str:
            note = super()._solve(problem)
            seen.append("fisher" in problem.exact)
            return note

        def _learn(self, problem: Problem, *more: Any) -> str:
            seen.append("fisher" in problem.exact)
            return plain(self, problem, *more)

    Looking(weighting="fisher", iterations=2, step_iterations=1, batch=4)(calibrated(), context_of())
    assert seen == [True, False, True, False, False, False]


def test_weighting_changes_what_is_learned() -> None:
    states = []
    for weighting in ("mse", "fisher"):
        net = calibrated()
        BRECQ(weighting=weighting, iterations=60, step_iterations=0, batch=8)(net, context_of())  # type: ignore[arg-type]
        states.append(state_of(net))
    assert not same_bits(*states)


@pytest.mark.parametrize(
    ("key", "value"), [("units", "net"), ("weighting", "kl"), ("step_iterations", -1), ("group", 0)]
)
def test_hyperparameters_have_limits(key: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"brecq: key '{key}' is {value!r}: input should be"):
        BRECQ.from_data({key: value}, "brecq")
