"""Between which values a tensor lies, told from BatchNorm statistics without images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fewbit import ops
from fewbit.improve.expectation import moments_of, spread
from fewbit.net import Layer, Net
from fewbit.place.quantizer import DynamicQuantizer, Quantizer
from fewbit.prepare.fold_bn import normal_of

_POINTS = 129
_FAR = 1e30


@dataclass(frozen=True)
class Span:
    """The ends of the values of each channel; infinite where nothing tells them.

    Attributes:
        low: float64 (C,), or () for all channels alike.
        high: The same shape.
    """

    low: Tensor
    high: Tensor

    def hull(self) -> Span:
        """Return one span that holds all channels."""
        return Span(self.low.min(), self.high.max())


UNKNOWN = Span(torch.tensor(-math.inf, dtype=torch.float64), torch.tensor(math.inf, dtype=torch.float64))


def between(narrow: Span, wide: Span) -> Span:
    """Return the geometric mean of the ends of two spans, 0 where they lie on either side of it.

    The wide one's ends hold where one of them is infinite.

    Example:
        >>> ends = [torch.tensor(end) for end in (-1.0, 2.0, -4.0, 8.0)]
        >>> found = between(Span(*ends[:2]), Span(*ends[2:]))
        >>> float(found.low), float(found.high)
        (-2.0, 4.0)
    """

    def middle(one: Tensor, other: Tensor) -> Tensor:
        found = other.sign() * (one * other).clamp(min=0).sqrt()
        return torch.where((one * other).isfinite(), found, other)

    return Span(middle(narrow.low, wide.low), middle(narrow.high, wide.high))


def spans_of(net: Net, deviations: float, image: float) -> dict[fx.Node, Span]:
    """Return the span of each tensor.

    What a BatchNorm told is spanned by mean +- a std. How much the terms of a sum depend on one another
    nothing tells; the span is the geometric mean of that of independent terms and that of terms that move
    together. An average spans what it is of: a channel may well be as large everywhere.

    Args:
        net: Folded; its quantizers are passed through.
        deviations: a.
        image: How far an image reaches from 0 where no card tells the range of its values.
    """
    narrow, wide = (_Walk(net, deviations, image, apart).spans for apart in (True, False))
    return {node: between(span, wide[node]) for node, span in narrow.items()}


class _Walk:
    """The span of each tensor, in the order in which they are made.

    Args:
        net: A folded network.
        deviations: How many standard deviations a span reaches.
        image: How far an image reaches where no card tells.
        apart: Terms of sums are independent; else they move together.
    """

    def __init__(self, net: Net, deviations: float, image: float, apart: bool) -> None:
        self.net, self.deviations, self.apart = net, deviations, apart
        self.moments = moments_of(net)
        source = net.image_node
        self.spans = {source: _of_image(net, image)}
        for layer in net.layers():
            self.spans[layer.node] = self._of(layer)

    def _of(self, layer: Layer) -> Span:
        read = [self.spans[source] for source in layer.node.args if isinstance(source, fx.Node)]
        normal = self.net.statistics.get(layer.name)
        if isinstance(layer.module, nn.BatchNorm1d | nn.BatchNorm2d):
            normal = normal_of(layer.module)
        if normal is not None:
            return self._about(normal.mean, normal.std)
        if isinstance(layer.module, nn.Conv2d | nn.Linear):
            return self._of_sums(layer.node, layer.module, read[0])
        if isinstance(layer.module, Quantizer | DynamicQuantizer):
            return read[0]
        if layer.kind == "Add":
            return self._of_add(layer.node, read)
        rule = _RULES.get(layer.kind)
        return UNKNOWN if rule is None else rule(layer.module, *read)

    def _about(self, mean: Tensor, std: Tensor) -> Span:
        return Span(mean - self.deviations * std, mean + self.deviations * std)

    def _of_add(self, node: fx.Node, read: Sequence[Span]) -> Span:
        moments = self.moments.get(node)
        if self.apart and moments is not None and moments.variance is not None:
            return self._about(moments.mean, moments.variance.sqrt())
        first, second = _matched(*read)
        return Span(first.low + second.low, first.high + second.high)

    def _of_sums(self, node: fx.Node, module: nn.Conv2d | nn.Linear, read: Span) -> Span:
        """Return the span of weighted sums that no BatchNorm speaks of."""
        if not bool((read.high - read.low).isfinite().all()):
            return UNKNOWN
        inputs = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
        if inputs % max(1, read.low.numel()):
            read = read.hull()
        source = node.args[0]
        assert isinstance(source, fx.Node)
        moments = self.moments.get(source)
        centre = (read.low + read.high) / 2 if moments is None else moments.mean
        reach = (read.high - read.low) / 2
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        weight = module.weight.detach().double()
        rows = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)

        def add(factors: Tensor, values: Tensor) -> Tensor:
            spreads = spread(module, values.reshape(-1)).reshape(groups, 1, -1)
            return (factors.sum(3) * spreads).sum(2).reshape(-1)

        middle = add(rows, centre)
        middle = middle if module.bias is None else middle + module.bias.detach().double()
        far = add(rows.square(), reach.square()).sqrt() if self.apart else add(rows.abs(), reach)
        return Span(middle - far, middle + far)


def _of_image(net: Net, image: float) -> Span:
    if net.image_range is None:
        reach = torch.full((net.input_size[0],), image, dtype=torch.float64)
        return Span(-reach, reach)
    low, high = (torch.tensor(end, dtype=torch.float64) for end in net.image_range)
    return Span(low, high)


def _matched(*spans: Span) -> list[Span]:
    """Return spans whose channels go together; hulls where their numbers of channels differ."""
    sizes = {span.low.numel() for span in spans} - {1}
    return [span.hull() for span in spans] if len(sizes) > 1 else list(spans)


def _same(module: nn.Module, span: Span) -> Span:
    return span


def _reshaped(module: nn.Module, span: Span) -> Span:
    assert isinstance(module, ops.Reshape)
    return span if len(module.shape) == 2 else span.hull()


def _averaged(module: nn.Module, span: Span) -> Span:
    assert isinstance(module, ops.Mean)
    return span if set(module.dims) <= {2, 3} else span.hull()


def _mixed(module: nn.Module, span: Span) -> Span:
    return span.hull()


def _joined(module: nn.Module, *spans: Span) -> Span:
    if isinstance(module, ops.Concat) and module.dim == 1 and all(span.low.dim() == 1 for span in spans):
        return Span(torch.cat([span.low for span in spans]), torch.cat([span.high for span in spans]))
    hulls = [span.hull() for span in spans]
    return Span(torch.stack([h.low for h in hulls]).min(), torch.stack([h.high for h in hulls]).max())


def _framed(module: nn.Module, span: Span) -> Span:
    assert isinstance(module, ops.Frame)
    values = module.values.double()
    if span.low.dim() == 0:
        values = torch.stack((values.min(), values.max()))
        return Span(torch.minimum(span.low, values[0]), torch.maximum(span.high, values[1]))
    return Span(torch.minimum(span.low, values), torch.maximum(span.high, values))


def _padded(module: nn.Module, span: Span) -> Span:
    assert isinstance(module, ops.Pad)
    before, after = module.pads[1]
    if any(module.pads[0]):
        span, before, after = span.hull(), 0, 0
    elif any(pair != (0, 0) for pair in module.pads[2:]):
        span = Span(span.low.clamp(max=module.value), span.high.clamp(min=module.value))
    if not before and not after:
        return span
    ends = (span.low, span.high)
    if span.low.dim() == 0:
        return Span(span.low.clamp(max=module.value), span.high.clamp(min=module.value))
    low, high = (nn.functional.pad(end, (before, after), value=module.value) for end in ends)
    return Span(low, high)


def _sliced(module: nn.Module, span: Span) -> Span:
    assert isinstance(module, ops.Slice)
    if 1 not in module.ranges or span.low.dim() == 0:
        return span
    start, stop, step = module.ranges[1]
    return Span(span.low[start:stop:step], span.high[start:stop:step])


def _product(module: nn.Module, *read: Span) -> Span:
    first, second = _matched(*read)
    corners = [a * b for a in (first.low, first.high) for b in (second.low, second.high)]
    if any(bool(corner.isnan().any()) for corner in corners):
        return UNKNOWN
    together = torch.stack(corners)
    return Span(together.amin(0), together.amax(0))


def _difference(module: nn.Module, *read: Span) -> Span:
    first, second = _matched(*read)
    return Span(first.low - second.high, first.high - second.low)


def _pointwise(module: nn.Module, span: Span) -> Span:
    """Return the span of a function of one value, looked at in many points."""
    low, high = span.low.clamp(-_FAR, _FAR), span.high.clamp(-_FAR, _FAR)
    share = torch.linspace(0, 1, _POINTS, dtype=torch.float64).reshape(-1, *[1] * low.dim())
    points = (low + share * (high - low)).float()
    points = points if points.dim() > 1 else points.unsqueeze(1)
    with torch.no_grad():
        values = module(points).double().reshape(_POINTS, *low.shape)
    return _finite(values.amin(0), values.amax(0))


def _prelu(module: nn.Module, span: Span) -> Span:
    assert isinstance(module, nn.PReLU)
    return _pointwise(module, span if module.num_parameters in (1, span.low.numel()) else span.hull())


def _finite(low: Tensor, high: Tensor) -> Span:
    """Return a span whose ends beyond all that is computed with are infinite."""
    return Span(
        torch.where(low < -_FAR / 2, -math.inf, low).double(),
        torch.where(high > _FAR / 2, math.inf, high).double(),
    )


def _minimum(module: nn.Module, span: Span) -> Span:
    assert isinstance(module, ops.Minimum)
    limits = module.limits.double().flatten()
    return Span(torch.minimum(span.low, limits), torch.minimum(span.high, limits))


def _affine(module: nn.Module, span: Span) -> Span:
    assert isinstance(module, ops.Affine)
    scale, shift = (
        torch.full((1,), plain, dtype=torch.float64) if value is None else value.detach().double()
        for value, plain in ((module.scale, 1.0), (module.shift, 0.0))
    )
    if any(value.numel() > 1 and value.dim() < 3 for value in (scale, shift)):
        span = span.hull()  # which axis it is of depends on the tensor
    scale, shift = scale.flatten(), shift.flatten()
    many = {value.numel() for value in (scale, shift, span.low)} - {1}
    if len(many) > 1:
        span = span.hull()
        scale, shift = (torch.stack((value.min(), value.max())) for value in (scale, shift))
        ends = torch.stack([e * s + t for e in (span.low, span.high) for s in scale for t in shift])
        return Span(ends.min(), ends.max())
    ends = torch.stack([span.low * scale + shift, span.high * scale + shift])
    return Span(ends.amin(0), ends.amax(0))


def _fixed(low: float, high: float) -> Callable[..., Span]:
    ends = [torch.tensor(end, dtype=torch.float64) for end in (low, high)]
    return lambda module, *read: Span(*ends)


_RULES: Mapping[str, Callable[..., Span]] = {
    **dict.fromkeys(("Identity", "Dropout", "DropPath", "Flatten", "Upsample"), _same),
    **dict.fromkeys(("MaxPool", "AvgPool", "GlobalAvgPool"), _same),
    "Mean": _averaged,
    "Reshape": _reshaped,
    "Permute": _mixed,
    "Concat": _joined,
    "Pad": _padded,
    "Frame": _framed,
    "Slice": _sliced,
    "Mul": _product,
    "Sub": _difference,
    "Min": _minimum,
    "Affine": _affine,
    "PRelu": _prelu,
    "Softmax": _fixed(0.0, 1.0),
    **dict.fromkeys(("Relu", "Clip", "LeakyRelu", "Elu", "Gelu", "Tanh", "Sigmoid"), _pointwise),
    **dict.fromkeys(("HardSigmoid", "Silu", "HardSwish", "Mish", "Softplus"), _pointwise),
}
