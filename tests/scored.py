"""Small networks ready for a sensitivity: folded, with their regions, grids and labelled images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.regions import Region, regions_of
from fewbit.place.targets import TARGETS
from fewbit.recipe import read_recipe, run_recipe
from fewbit.sensitivity.curvature import rounding_error
from fewbit.sensitivity.one_region import rounded_layer
from fewbit.sensitivity.score import LabelledBatch, Sensitivities
from fewbit.spec import QuantSpec
from networks import make_context, make_images, make_net

WIDTHS = tuple(QuantSpec(bits=bits, symmetric=True, signed=True, granularity="channel") for bits in (2, 4, 8))


def folded(name: str) -> Net:
    """Return one of the small networks as the recipe `float32` leaves it, but undecided between its classes.

    As drawn they name one class for every image. The logits are moved to a mean of 0 and a deviation of 2.
    """
    net, _ = run_recipe(read_recipe("float32"), make_net(name), make_context())
    head = net.layers()[-1].module
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        logits = net(make_images(64, seed=9))
        factor = 2 / logits.std(0)
        head.weight.mul_(factor.unsqueeze(1))
        head.bias.sub_(logits.mean(0)).mul_(factor)
    return net


def tiny(*layers: nn.Module, size: tuple[int, int, int] = (1, 3, 3), classes: int = 3, seed: int = 0) -> Net:
    """Return a network of a few layers with drawn weights."""
    model = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return capture(model.eval(), "tiny", size, classes).with_facts("canonical", "folded")


def regions(net: Net) -> tuple[Region, ...]:
    return regions_of(net, TARGETS["onnxruntime"])


def answers(net: Net, images: Tensor) -> Tensor:
    """Return the class that the network names for each image."""
    with torch.no_grad():
        return net(images).argmax(1)


def labelled(net: Net, images: int = 6, batch: int = 4, seed: int = 1) -> list[LabelledBatch]:
    """Return images with the network's own answers as their labels."""
    shown = make_images(images, seed)
    pairs = zip(shown.split(batch), answers(net, shown).split(batch), strict=True)
    return [(one, labels) for one, labels in pairs]


def pictures(net: Net, images: int, seed: int = 1) -> Tensor:
    """Return random images of a network's size."""
    return torch.randn((images, *net.input_size), generator=torch.Generator().manual_seed(seed))


def trace_of(found: Sensitivities, net: Net, name: str) -> float:
    """Return the trace that the loss of a layer, a region by itself, was made with."""
    module = rounded_layer(net.layer(name), WIDTHS[0], "minmax")
    return found.losses[name][0] * module.weight.numel() / rounding_error(module)
