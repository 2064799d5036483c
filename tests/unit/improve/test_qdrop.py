from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibrated import (
    STEPS,
    calibrated,
    context_of,
    cost_of,
    matrices,
    same_bits,
    scheme_of,
    state_of,
    tensor_error,
    two_weights,
)
from fewbit.errors import RecipeError
from fewbit.improve.brecq import BRECQ
from fewbit.improve.qdrop import QDrop
from fewbit.improve.units import split_into_blocks
from fewbit.load.capture import capture
from fewbit.net import Net, name_of
from fewbit.place.quantizer import Quantizer
from fewbit.recipe import Recipe, run_recipe
from fewbit.spec import Scheme
from networks import CLASSES, NETWORKS, SIZE, make_context, make_images
from solved_layers import output_error

QUICK: dict[str, Any] = {"iterations": 120, "batch": 12}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_brings_the_networks_output_nearer(name: str) -> None:
    net = calibrated(name)
    before = output_error(name, net)
    QDrop(**QUICK)(net, context_of(32))
    assert output_error(name, net) < 0.8 * before


@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_it_brings_all_tensors_nearer_where_activations_are_coarse_too(name: str) -> None:
    scheme = scheme_of(3, 4)
    net = calibrated(name, scheme)
    before = tensor_error(net)
    QDrop(**QUICK)(net, context_of(32, scheme=scheme))
    assert tensor_error(net) < 0.9 * before


def test_rounding_steps_and_biases_are_learned_together() -> None:
    net = calibrated()
    before = state_of(net)
    QDrop(**QUICK)(net, context_of())
    after = state_of(net)
    moved = {key for key in before if not torch.equal(after[key], before[key])}
    learned = [layer.module for layer in net.layers() if isinstance(layer.module, Quantizer)]
    assert {f"{name}.bias" for name in matrices(net)} <= moved
    assert any(key.startswith("quantizers.") for key in moved) and len(learned) > 3
    assert all(key.endswith(("bias", "scale")) and not key.endswith("float_bias") for key in moved)
    assert not any("weight_quantizer.scale" in key for key in moved)
    assert all(layer.weight_quantizer.assigned is not None for layer in matrices(net).values())


def test_it_finds_the_best_rounding_of_two_weights() -> None:
    net, context = two_weights()
    QDrop(regularization=0.3)(net, replace(context, seed=1))
    assert cost_of(net) == pytest.approx(0.088, rel=1e-5)


# The share of rounded values


class Parallel(nn.Module):
    """Two branches from the image to the logits: one unit that holds the whole network."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, CLASSES, 3, padding=1)
        self.c = nn.Conv2d(3, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.b(F.relu(self.a(x))) + self.c(x), 1)


def parallel(scheme: Scheme) -> Net:
    torch.manual_seed(0)
    net = capture(Parallel().eval(), "parallel", SIZE, CLASSES * 256)
    recipe = Recipe(name="test", scheme=scheme, steps=STEPS)
    made, _ = run_recipe(recipe, net, make_context(images=make_images(24)))
    (unit,) = split_into_blocks(made)
    # A block's output is rounded whatever the share; here nothing rounds the logits.
    assert not any(isinstance(made.layer(name_of(node)).module, Quantizer) for node in unit.outputs)
    return made


def test_with_nothing_rounded_it_is_brecq_with_float_activations_bit_for_bit() -> None:
    scheme = scheme_of(3, 3)
    common: dict[str, Any] = {"iterations": 40, "batch": 8}
    alone = {"lr_step": 0.0, "lr_bias": 0.0}
    states = []
    for step in (
        QDrop(share=0.0, **common, **alone),
        BRECQ(step_iterations=0, **common),
        QDrop(share=1.0, **common, **alone),
    ):
        net = parallel(scheme)
        step(net, context_of(scheme=scheme))
        states.append(state_of(net))
    assert same_bits(states[0], states[1])
    assert not same_bits(states[0], states[2])


def test_the_choice_of_images_does_not_depend_on_the_share() -> None:
    seen: dict[float, list[Tensor]] = {}
    plain = torch.randint

    def drawn(*given: Any, **more: Any) -> Tensor:
        found = plain(*given, **more)
        if len(given) > 2 and given[2] == (8,):
            seen[share].append(found)
        return found

    for share in (0.0, 0.7):
        seen[share] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randint", drawn)
            QDrop(share=share, iterations=3, batch=8)(calibrated(), context_of())
    assert len(seen[0.0]) == 9
    assert all(torch.equal(a, b) for a, b in zip(seen[0.0], seen[0.7], strict=True))


@pytest.mark.parametrize(
    ("key", "value"), [("share", 1.5), ("share", -0.1), ("lr_bias", -1.0), ("group", 0), ("beta_end", 0.0)]
)
def test_hyperparameters_have_limits(key: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"qdrop: key '{key}' is {value}: input should be"):
        QDrop.from_data({key: value}, "qdrop")
