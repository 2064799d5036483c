"""AdaRound's soft rounding: each weight learns whether it goes up or down."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fewbit.place.quantizer import QuantLayer

ZETA, GAMMA = 1.1, -0.1
_EDGE = 1e-4
_LEAN = 0.45


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Return h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), zeta = 1.1, gamma = -0.1.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
    arXiv 2004.10568.

    Example:
        >>> round(float(rectified_sigmoid(torch.tensor(0.0))), 6)
        0.5
    """
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def starting_v(fraction: Tensor) -> Tensor:
    """Return V with h(V) = fraction, so that soft rounding starts at the weight itself.

    Example:
        >>> [round(v, 6) for v in starting_v(torch.tensor([0.1, 0.25, 0.9])).tolist()]
        [-1.609438, -0.887303, 1.609438]
    """
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def undecided(h: Tensor, beta: float) -> Tensor:
    """Return the regulariser, the sum of 1 - |2 h - 1|^beta: 0 once each weight is all up or all down.

    Example:
        >>> round(float(undecided(torch.tensor([0.1]), 8.0)), 6)
        0.832228
    """
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def annealed(progress: float, start: float, end: float, warm_up: float) -> float:
    """Return beta after a share of the iterations: `start` during the warm-up, then down a cosine to `end`.

    Example:
        >>> [round(annealed(t, 20.0, 2.0, 0.2), 6) for t in (0.2, 0.6, 1.0)]
        [20.0, 11.0, 2.0]
    """
    along = max(0.0, (progress - warm_up) / (1 - warm_up)) if warm_up < 1 else 0.0
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * along))


class SoftRounding(nn.Module):
    """The weight of one layer while its rounding is learned, and its bias.

    ``W~ = S (clamp(floor(W / S) + h(V) + Z, qmin, qmax) - Z)``.

    Args:
        layer: Has a weight grid. Where a step before has chosen codes it starts at them: each weight is first
            moved to where it would round to its code, and may still go to the code beside it.

    Attributes:
        v: One value a weight.
        bias: Learned too where somebody asks; None where the layer has none.
    """

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.layer = layer
        quantizer = layer.weight_quantizer
        scale, zero_point = quantizer.grid(layer.weight.dim())
        low, high = quantizer.qmin - zero_point, quantizer.qmax - zero_point
        steps = torch.maximum(torch.minimum(layer.weight.detach() / scale, high), low)
        if quantizer.assigned is not None:
            chosen = quantizer.assigned - zero_point
            steps = torch.maximum(torch.minimum(steps, chosen + _LEAN), chosen - _LEAN)
            steps = torch.maximum(torch.minimum(steps, high), low)
        # At the upper end of the grid there is nothing above; the weight starts all up from one below.
        self._floor = torch.minimum(torch.floor(steps), high - 1)
        self._scale = scale
        self.v = nn.Parameter(starting_v((steps - self._floor).clamp(_EDGE, 1 - _EDGE)))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def up(self) -> Tensor:
        """Return h(V), how far up each weight goes, from 0 to 1."""
        return rectified_sigmoid(self.v)

    def forward(self, up: Tensor) -> Tensor:
        """Return the soft weight, given h(V)."""
        return (self._floor + up) * self._scale

    def finish(self) -> float:
        """Round each weight to the side that it leans to; return the share of those that leant to neither."""
        with torch.no_grad():
            up = self.up()
            _, zero_point = self.layer.weight_quantizer.grid(self.v.dim())
            self.layer.weight_quantizer.assign(self._floor + (up >= 0.5) + zero_point)
            if self.bias is not None:
                self.layer.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
            return float(((up > 0.05) & (up < 0.95)).float().mean())


class FixedCodes(nn.Module):
    """The weight of one layer whose codes stay, while its scales and its bias are learned.

    Args:
        layer: Has a weight grid.

    Attributes:
        log_gain: Logarithm of what the scales are multiplied by, in the scale's shape.
        bias: As in `SoftRounding`.
    """

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.layer = layer
        quantizer = layer.weight_quantizer
        _, zero_point = quantizer.grid(layer.weight.dim())
        self._codes = quantizer.codes(layer.weight.detach())
        self._steps = self._codes - zero_point
        self.log_gain = nn.Parameter(torch.zeros_like(quantizer.scale))
        self.log_gain.requires_grad_(not quantizer.spec.power_of_two)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, up: Tensor | None = None) -> Tensor:
        """Return the weight."""
        quantizer = self.layer.weight_quantizer
        scale = quantizer.scale * self.log_gain.exp()
        return self._steps * (scale.reshape(-1, *[1] * (self._steps.dim() - 1)) if scale.dim() else scale)

    def finish(self) -> float:
        """Give the layer the scales and the bias that were learned."""
        quantizer = self.layer.weight_quantizer
        fixed = quantizer.spec.power_of_two
        quantizer.assign(self._codes, None if fixed else quantizer.scale * self.log_gain.detach().exp())
        if self.bias is not None:
            self.layer.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return 0.0
