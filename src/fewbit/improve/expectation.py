"""Mean and variance of each channel of a tensor, from what folded BatchNorms said, without images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fewbit import ops
from fewbit.net import Layer, Net
from fewbit.place.quantizer import DynamicQuantizer, Quantizer

_SAME = frozenset({"Identity", "Dropout", "DropPath", "Flatten", "Reshape"})
_SAME_MEAN = frozenset({"AvgPool", "GlobalAvgPool", "Upsample", "Mean"})
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Moments:
    """What is known of a tensor's channels, float64 (C,).

    Attributes:
        mean: Expected value.
        variance: Of each value about it; none where only the mean is known.
    """

    mean: Tensor
    variance: Tensor | None = None


def clipped(before: Moments, low: float = 0.0, high: float | Tensor = math.inf) -> Moments:
    """Return the moments of min(max(x, low), high) of a normal x; a ReLU by default.

    With A = (low - m) / s, B = (high - m) / s, and phi, Phi the standard normal density and distribution::

        E[y]   = low Phi(A) + high (1 - Phi(B)) + m (Phi(B) - Phi(A)) + s (phi(A) - phi(B))
        E[y^2] = low^2 Phi(A) + high^2 (1 - Phi(B)) + (m^2 + s^2) (Phi(B) - Phi(A))
                 + s (m + low) phi(A) - s (m + high) phi(B)

    Source: Nagel et al., 2019, arXiv 1906.04721, appendix C.

    Example:
        >>> found = clipped(Moments(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 9.0])))
        >>> [round(x, 6) for x in found.mean.tolist()]
        [0.398942, 2.453359]
    """
    assert before.variance is not None
    m, s = before.mean.double(), before.variance.double().sqrt().clamp(min=_SMALLEST)
    high = torch.as_tensor(high, dtype=torch.float64).expand_as(m)
    below, above = (low - m) / s, (high - m) / s
    under, over = torch.special.ndtr(below), torch.special.ndtr(-above)
    inside = torch.special.ndtr(above) - under
    edge_low, edge_high = _density(below), _density(above)
    top = torch.where(high.isinf(), 0.0, high)
    mean = low * under + top * over + m * inside + s * (edge_low - edge_high)
    square = low**2 * under + top**2 * over + (m**2 + s**2) * inside
    square = square + s * (m + low) * edge_low - s * (m + top) * edge_high
    return Moments(mean, (square - mean**2).clamp(min=0))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def expected_inputs(net: Net) -> dict[fx.Node, Tensor]:
    """Return E[x] of each input channel of each convolution and matrix product where it can be told.

    The image counts as 0 on average, as normalisation makes it. Zero padding is not looked at.
    """
    known: dict[fx.Node, Moments] = {}
    image = next(node for node in net.graph.graph.nodes if node.op == "placeholder")
    known[image] = Moments(torch.zeros(net.input_size[0], dtype=torch.float64))
    inputs: dict[fx.Node, Tensor] = {}
    for layer in net.layers():
        sources = [known.get(source) for source in layer.node.all_input_nodes]
        read = [source for source in sources if source is not None]
        if isinstance(layer.module, nn.Conv2d | nn.Linear) and read:
            inputs[layer.node] = _spread(layer.module, read[0].mean)
        found = _moments(net, layer, read, known) if len(read) == len(sources) else _of_layer(net, layer)
        if found is not None:
            known[layer.node] = found
    return inputs


def _of_layer(net: Net, layer: Layer) -> Moments | None:
    """Return what a folded BatchNorm said of a layer's output."""
    normal = net.statistics.get(layer.name)
    if normal is None or not isinstance(layer.module, nn.Conv2d | nn.Linear):
        return None
    return Moments(normal.mean, normal.std**2)


def _moments(
    net: Net, layer: Layer, read: Sequence[Moments], known: Mapping[fx.Node, Moments]
) -> Moments | None:
    """Return the moments of a layer's output, all of whose inputs are known."""
    module = layer.module
    if isinstance(module, nn.Conv2d | nn.Linear):
        return _of_layer(net, layer)
    if isinstance(module, Quantizer | DynamicQuantizer) or layer.kind in _SAME:
        return read[0]
    if layer.kind in _SAME_MEAN:
        return Moments(read[0].mean)
    variances = [moments.variance for moments in read if moments.variance is not None]
    if layer.kind == "Concat" and isinstance(module, ops.Concat) and module.dim == 1:
        mean = torch.cat([moments.mean for moments in read])
        return Moments(mean, torch.cat(variances) if len(variances) == len(read) else None)
    if layer.kind == "Add" and len(read) == 2 and read[0].mean.shape == read[1].mean.shape:
        total = variances[0] + variances[1] if len(variances) == 2 else None
        return Moments(read[0].mean + read[1].mean, total)
    if isinstance(module, ops.Minimum):
        return _capped(net, layer.node, module, known)
    if variances and isinstance(module, nn.ReLU):
        return clipped(read[0])
    if variances and isinstance(module, ops.Clip):
        return clipped(read[0], module.low, module.high)
    return None


def _capped(
    net: Net, node: fx.Node, minimum: ops.Minimum, known: Mapping[fx.Node, Moments]
) -> Moments | None:
    """Return the moments behind a clip from 0 and the minimum behind it, which cut the same normal."""
    source = node.all_input_nodes[0]
    while source.op == "call_module":
        module = net.graph.get_submodule(str(source.target))
        before = known.get(source.all_input_nodes[0])
        if isinstance(module, ops.Clip) and before is not None and before.variance is not None:
            return clipped(before, module.low, minimum.limits.double().flatten().clamp(max=module.high))
        if not isinstance(module, Quantizer | DynamicQuantizer):
            return None
        source = source.all_input_nodes[0]
    return None


def _spread(module: nn.Conv2d | nn.Linear, mean: Tensor) -> Tensor:
    """Return one mean for each input of a layer; a matrix product may read n values a channel."""
    inputs = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
    return mean.repeat_interleave(inputs // len(mean))
