"""Mean and variance of each channel of a tensor, from what folded BatchNorms said, without images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fewbit import ops
from fewbit.net import Layer, Net
from fewbit.place.quantizer import DynamicQuantizer, Quantizer
from fewbit.prepare.fold_bn import normal_of

_SAME = frozenset({"Identity", "Dropout", "DropPath", "Flatten", "Reshape", "Frame"})
_SAME_MEAN = frozenset({"AvgPool", "GlobalAvgPool", "Upsample", "Mean"})
_SMALLEST = 1e-30
_PHOTOGRAPH = 0.45, 0.25  # mean and deviation of photographs, as fractions from black to white


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
    """Return E[x] of each input channel of each convolution and matrix product where it can be told."""
    known = moments_of(net)
    return {
        layer.node: spread(layer.module, known[source].mean)
        for layer in net.layers()
        if isinstance(layer.module, nn.Conv2d | nn.Linear)
        and (source := layer.node.all_input_nodes[0]) in known
    }


def moments_of(net: Net) -> dict[fx.Node, Moments]:
    """Return the moments of each tensor where they can be told.

    The image has the mean and deviation of photographs. Terms of sums count as independent; zero padding is
    not looked at.
    """
    image = net.image_node
    known = {image: image_moments(net)}
    for layer in net.layers():
        sources = [known.get(source) for source in layer.node.all_input_nodes]
        read = [source for source in sources if source is not None]
        found = _moments(net, layer, read, known) if len(read) == len(sources) else _of_layer(net, layer)
        if found is not None:
            known[layer.node] = found
    return known


def image_moments(net: Net) -> Moments:
    """Return the moments of an image: those of photographs, or 0 and 1 where no card tells what black is."""
    if net.image_range is None:
        zeros = torch.zeros(net.input_size[0], dtype=torch.float64)
        return Moments(zeros, torch.ones_like(zeros))
    low, high = (torch.tensor(end, dtype=torch.float64) for end in net.image_range)
    mean, deviation = _PHOTOGRAPH
    return Moments(low + mean * (high - low), (deviation * (high - low)) ** 2)


def _of_layer(net: Net, layer: Layer) -> Moments | None:
    """Return what a BatchNorm says of a layer's output: one folded into the layer, or the layer itself."""
    normal = net.statistics.get(layer.name)
    if isinstance(layer.module, nn.BatchNorm2d | nn.BatchNorm1d):
        normal = normal_of(layer.module)
    return None if normal is None else Moments(normal.mean, normal.std**2)


def _of_sums(module: nn.Conv2d | nn.Linear, read: Moments) -> Moments:
    """Return the moments of weighted sums of independent inputs."""
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    weight = module.weight.detach().double()
    rows = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)

    def add(values: Tensor, factors: Tensor) -> Tensor:
        return (factors.sum(3) * spread(module, values).reshape(groups, 1, -1)).sum(2).reshape(-1)

    mean = add(read.mean, rows)
    mean = mean if module.bias is None else mean + module.bias.detach().double()
    return Moments(mean, None if read.variance is None else add(read.variance, rows.square()))


def _moments(
    net: Net, layer: Layer, read: Sequence[Moments], known: Mapping[fx.Node, Moments]
) -> Moments | None:
    """Return the moments of a layer's output, all of whose inputs are known."""
    module = layer.module
    told = _of_layer(net, layer)
    if told is not None:
        return told
    if isinstance(module, nn.Conv2d | nn.Linear):
        return _of_sums(module, read[0])
    if isinstance(module, Quantizer | DynamicQuantizer) or layer.kind in _SAME:
        return read[0]
    if isinstance(module, ops.Affine):
        return _shifted(module, read[0])
    if layer.kind in _SAME_MEAN:
        keeps = not isinstance(module, ops.Mean) or set(module.dims) <= {2, 3}
        return Moments(read[0].mean) if keeps else None
    variances = [moments.variance for moments in read if moments.variance is not None]
    if layer.kind == "Concat" and isinstance(module, ops.Concat) and module.dim == 1:
        mean = torch.cat([moments.mean for moments in read])
        return Moments(mean, torch.cat(variances) if len(variances) == len(read) else None)
    if layer.kind == "Add" and len(read) == 2 and read[0].mean.shape == read[1].mean.shape:
        total = variances[0] + variances[1] if len(variances) == 2 else None
        return Moments(read[0].mean + read[1].mean, total)
    if isinstance(module, ops.Pad | ops.Slice):
        return _moved(module, read[0])
    if isinstance(module, ops.Minimum):
        return _capped(net, layer.node, module, known)
    if variances and isinstance(module, nn.ReLU):
        return clipped(read[0])
    if variances and isinstance(module, ops.Clip):
        return clipped(read[0], module.low, module.high)
    return None


def _shifted(module: ops.Affine, read: Moments) -> Moments | None:
    """Return the moments of channels that are scaled and shifted, each by a number of its own."""
    factors = []
    for value, none in ((module.scale, 1.0), (module.shift, 0.0)):
        found = torch.tensor([none]) if value is None else value.detach().flatten()
        if found.numel() not in (1, len(read.mean)):
            return None
        factors.append(found.double())
    scale, shift = factors
    variance = None if read.variance is None else read.variance * scale.square()
    return Moments(read.mean * scale + shift, variance)


def _moved(module: ops.Pad | ops.Slice, read: Moments) -> Moments:
    """Return the moments of padded channels, which hold one value, or of those that a slice takes."""
    variance = None
    if isinstance(module, ops.Slice):
        start, stop, step = module.ranges.get(1, (0, None, 1))
        if read.variance is not None:
            variance = read.variance[start:stop:step]
        return Moments(read.mean[start:stop:step], variance)
    before, after = module.pads[1]
    if read.variance is not None:
        variance = F.pad(read.variance, (before, after))
    return Moments(F.pad(read.mean, (before, after), value=module.value), variance)


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


def spread(module: nn.Conv2d | nn.Linear, values: Tensor) -> Tensor:
    """Return one value for each input of a layer; a matrix product may read n values a channel."""
    inputs = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
    return values.repeat_interleave(inputs // len(values))
