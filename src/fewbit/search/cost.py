"""What a network costs by its shapes alone: multiplications by kind of layer, and weights."""

from __future__ import annotations

from math import prod
from typing import Literal

import torch
from torch import nn

from fewbit import ops
from fewbit.export.sizes import Sizes
from fewbit.net import Layer, Net
from fewbit.place.targets import target
from fewbit.prepare.canonical import gated
from fewbit.prepare.replace_silu import ReplaceSiLU
from fewbit.search.trial import NetworkCost
from fewbit.sensitivity.sqnr import float_form
from fewbit.spec import Scheme
from fewbit.step import Context

Kind = Literal["dense", "pointwise", "depthwise"]

_IMAGES = 2  # `Sizes` tells the shapes for two images


def count_cost(net: Net) -> NetworkCost:
    """Count the multiplications of one image and the weights of a network.

    A convolution of weights (out, in / groups, rows, columns) takes
    ``out pixels * out * in / groups * rows * columns``; a transposed one the same of its input's pixels; a
    linear layer ``in * out`` for each of its rows; a product of activations ``rows * inner * columns``.
    Only matrix work is counted: no biases, additions, pools or activations. Nothing is timed.

    Args:
        net: Any captured network; it stays as it is.

    Returns:
        The counts. A layer that runs twice multiplies twice, but its weights count once.

    Example:
        >>> from fewbit.load.capture import capture
        >>> layers = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(72, 5)
        >>> cost = count_cost(capture(nn.Sequential(*layers), "separable", (4, 5, 5)))
        >>> cost.dense_macs, cost.pointwise_macs, cost.depthwise_macs, cost.weights, cost.silus
        (0, 648, 324, 428, 0)
    """
    sizes, macs = Sizes(net), {"dense": 0, "pointwise": 0, "depthwise": 0}
    weights: dict[int, int] = {}
    for layer in net.layers():
        kind = _kind_of(layer)
        if kind is None:
            continue
        macs[kind] += _macs(layer, sizes)
        weight = getattr(layer.module, "weight", None)
        if isinstance(weight, torch.Tensor):
            weights[id(weight)] = weight.numel()
    return NetworkCost(
        network=net.name,
        dense_macs=macs["dense"],
        pointwise_macs=macs["pointwise"],
        depthwise_macs=macs["depthwise"],
        weights=sum(weights.values()),
        silus=count_silus(net),
    )


def count_silus(net: Net) -> int:
    """Return how many SiLU of a network `replace_silu` would replace; the network stays as it is."""
    if not any(layer.kind == "Silu" or gated(net, layer.node) for layer in net.layers()):
        return 0
    context = Context(Scheme(), target("openvino"), lambda: iter(()))
    return ReplaceSiLU()(float_form(net).clone(), context).changed


def _kind_of(layer: Layer) -> Kind | None:
    module = layer.module
    if isinstance(module, nn.Linear | ops.MatMul):
        return "pointwise"
    if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return None
    if module.groups == module.in_channels > 1:
        return "depthwise"
    return "pointwise" if prod(module.kernel_size) == 1 else "dense"


def _macs(layer: Layer, sizes: Sizes) -> int:
    """Return the multiplications of one image in a layer."""
    module, made = layer.module, prod(sizes.of(layer.node))
    read = sizes.of(layer.node.all_input_nodes[0])
    if isinstance(module, nn.ConvTranspose2d):
        made, each = prod(read), module.out_channels // module.groups * prod(module.kernel_size)
    elif isinstance(module, nn.Conv2d):
        each = module.in_channels // module.groups * prod(module.kernel_size)
    else:
        each = read[-1]
    return made * each // _IMAGES
