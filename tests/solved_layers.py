"""A worked layer, and small networks with 3-bit weights before and after a method that chooses codes."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.improve.gram import LayerProblem
from fewbit.net import Net
from fewbit.recipe import Recipe, run_recipe
from fewbit.spec import QuantSpec, Scheme
from fewbit.step import Step
from networks import make_context, make_images, make_net

X = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, 0.4], [0.2, 0.1, 1.0], [1.0, 1.0, 0.3]], dtype=torch.float64)
W = torch.tensor([0.37, -0.62, 0.81], dtype=torch.float64)
STEPS = ({"use": "canonical"}, {"use": "fold_bn"}, {"use": "place"}, {"use": "calibrate", "weights": "mse"})
COARSE = Scheme(weights=QuantSpec(bits=3, symmetric=True, signed=True, granularity="channel"))


def of_layer(scale: float = 0.5, top: int = 2) -> LayerProblem:
    """Return the worked layer with codes from -top to top."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return LayerProblem((X.T @ X).unsqueeze(0), W.reshape(1, 1, 3), scale * one, -top * one, top * one)


def loss_of(codes: Tensor, scale: float) -> float:
    """Return || X w - S X q ||^2 of the worked layer."""
    return float((X @ (W - scale * codes.flatten().double())).square().sum())


def three_bit(name: str, step: Step | None, images: int = 64) -> tuple[Net, Net]:
    """Return a network with 3-bit weights before and after a step."""
    shown = make_images(images)
    net, _ = run_recipe(
        Recipe(name="test", scheme=COARSE, steps=STEPS), make_net(name), make_context(images=shown)
    )
    copy = net.clone()
    if step is not None:
        step(copy, make_context(images=shown))
    return net, copy


def output_error(name: str, net: Net) -> float:
    """Return how far the logits are from the float network's on other images."""
    images = make_images(64, seed=9)
    with torch.no_grad():
        exact = make_net(name)(images)
        return float((net(images) - exact).square().mean() / exact.var())
