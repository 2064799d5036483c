"""Small networks with their grids, where methods that learn begin, and what to compare afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.improve.reconstruct import Problem, reconstruct
from fewbit.improve.units import Unit, split_into_blocks
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLinear
from fewbit.recipe import Recipe, run_recipe
from fewbit.spec import QuantSpec, Scheme
from fewbit.step import Context, Step
from networks import make_context, make_images, make_net

STEPS = ({"use": "canonical"}, {"use": "fold_bn"}, {"use": "place"}, {"use": "calibrate", "weights": "mse"})
IMAGES = 24


def scheme_of(weights: int = 3, activations: int = 8, mode: str = "static") -> Scheme:
    """Return a scheme of some bits, weights with a scale per channel."""
    spec = {"bits": weights, "symmetric": True, "signed": True, "granularity": "channel"}
    return Scheme.from_data({"mode": mode, "weights": spec, "activations": {"bits": activations}})


def context_of(
    images: int = IMAGES,
    seed: int = 0,
    scratch: Path | None = None,
    engine: str = "onnxruntime",
    limit_bytes: int = 1 << 30,
    scheme: Scheme | None = None,
    advance: Callable[[str, float], None] | None = None,
) -> Context:
    """Return a context of random images."""
    return replace(
        make_context(engine, make_images(images), seed),
        scheme=scheme or scheme_of(),
        scratch=scratch,
        memory_limit_bytes=limit_bytes,
        advance=advance,
    )


def calibrated(name: str = "residual", scheme: Scheme | None = None, engine: str = "onnxruntime") -> Net:
    """Return a network with all its grids."""
    recipe = Recipe(name="test", scheme=scheme or scheme_of(), steps=STEPS)
    return run_recipe(recipe, make_net(name), make_context(engine, make_images(IMAGES)))[0]


def state_of(net: Net) -> dict[str, Tensor]:
    """Return everything that a network computes with."""
    return {key: value.clone() for key, value in net.graph.state_dict().items()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def matrices(net: Net) -> dict[str, QuantConv2d | QuantLinear]:
    """Return the layers with a weight grid, by name."""
    return {
        layer.name: layer.module
        for layer in net.layers()
        if isinstance(layer.module, QuantConv2d | QuantLinear)
    }


def coarse(bits: int = 3, **more: Any) -> QuantSpec:
    """Return the grid of weights with a scale per channel."""
    given = {"bits": bits, "symmetric": True, "signed": True, "granularity": "channel", **more}
    return QuantSpec.from_data(given)


def at_unit(
    net: Net,
    name: str,
    what: Callable[[Problem], None],
    context: Context | None = None,
    split: Callable[[Net], list[Unit]] = split_into_blocks,
) -> None:
    """Do something at one unit, the units before it being rounded to nearest."""
    done: list[str] = []

    def solve(problem: Problem) -> str:
        if problem.unit.name == name:
            what(problem)
            done.append(name)
        return ""

    reconstruct(Step(), "test", net, context or context_of(), split(net), IMAGES, solve)
    assert done == [name]


def values_of(net: Net, images: Tensor) -> dict[str, Tensor]:
    """Run a network and return the value of every node by the node's name."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for node in net.graph.graph.nodes:
            if node.op == "placeholder":
                found[node.name] = images
            elif node.op == "call_module":
                module = net.graph.get_submodule(str(node.target))
                found[node.name] = module(*[found[source.name] for source in node.all_input_nodes])
    return found


def in_float(net: Net) -> Net:
    """Return a copy with every quantizer off."""
    made = net.clone()
    for module in made.graph.modules():
        if isinstance(module, Quantizer | DynamicQuantizer):
            module.enabled = False
    return made


def tensor_error(net: Net) -> float:
    """Return how far all tensors are from the float network's on other images, as a share of their spread."""
    images = make_images(32, seed=9)
    exact, found = values_of(in_float(net), images), values_of(net, images)
    spread = {name: float(value.var()) for name, value in exact.items() if float(value.var()) > 0}
    errors = [float((found[name] - exact[name]).square().mean()) / one for name, one in spread.items()]
    return sum(errors) / len(errors)


H = torch.tensor([[1.0, 0.9], [0.9, 1.0]])


def two_weights() -> tuple[Net, Context]:
    """Return a layer of two weights, both 0.4 of a step, that nearest rounding gets wrong, and its images.

    Its error is dw^T H dw: 0.608 where both go down, 0.088 where one goes up.
    """
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.4)
    net = capture(nn.Sequential(nn.Flatten(), layer), "two", (2, 1, 1), 1)
    images = (2**0.5 * torch.linalg.cholesky(H).T).repeat(16, 1).reshape(32, 2, 1, 1)
    context = replace(make_context(images=images), scheme=scheme_of(mode="weights_only"))
    recipe = Recipe(name="two", scheme=context.scheme, steps=STEPS)
    placed, _ = run_recipe(recipe, net, context)
    (quantizer,) = (layer.weight_quantizer for layer in matrices(placed).values())
    quantizer.scale = torch.ones_like(quantizer.scale)
    return placed, context


def cost_of(net: Net) -> float:
    """Return dw^T H dw of the layer of two weights."""
    (layer,) = matrices(net).values()
    error = (layer.weight_quantizer(layer.weight) - 0.4).detach()
    return float(error @ H @ error.T)
