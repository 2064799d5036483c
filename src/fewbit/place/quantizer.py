"""Quantizers: what rounds a tensor to its grid in the torch simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewbit import ops
from fewbit.errors import RecipeError
from fewbit.numerics import affine_parameters, symmetric_scale
from fewbit.spec import QuantSpec


class _StraightThrough(torch.autograd.Function):
    """Round to the grid forward; backward pass the gradient where the value was inside the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
        codes = torch.round(x / scale) + zero_point
        ctx.save_for_backward((codes >= qmin) & (codes <= qmax))
        return (codes.clamp(qmin, qmax) - zero_point) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    if torch.is_grad_enabled():
        rounded: Tensor = _StraightThrough.apply(x, scale, zero_point, qmin, qmax)  # type: ignore[no-untyped-call]
        return rounded
    # The same bits in one piece of memory, and no look at which values were inside the range.
    return (x / scale).round_().add_(zero_point).clamp_(qmin, qmax).sub_(zero_point).mul_(scale)


class Quantizer(nn.Module):
    """Rounds a tensor to a uniform grid, r = S (clamp(round(x / S) + Z, qmin, qmax) - Z).

    Rounding is to nearest, ties to even, in float32, as ONNX QuantizeLinear does. The gradient passes
    straight through inside the range.

    Args:
        spec: The grid.
        name: The tensor that it quantizes, for messages.
        axis: Of the channels where the scale is per channel.
        weight: It quantizes a weight: codes stay signed even where no value is negative.

    Attributes:
        scale: float32, shape () or (channels,).
        zero_point: float32 with whole values, the same shape.
        qmin, qmax: Codes used.
        unsigned: Codes are stored as uint8, else int8.
        ready: It has a grid.
        fixed: Its grid is given by what the tensor is; no method may move it.
        enabled: Off, it passes its input through.
        assigned: Codes that a method chose for a weight, in place of those nearest to it; or none.
    """

    scale: Tensor
    zero_point: Tensor
    assigned: Tensor | None
    fixed: bool = False

    def __init__(self, spec: QuantSpec, name: str, axis: int = 0, weight: bool = False) -> None:
        super().__init__()
        self.spec, self.name, self.axis, self.weight = spec, name, axis, weight
        self.qmin, self.qmax = spec.code_range()
        self.unsigned = not spec.signed
        self.ready, self.enabled = False, True
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))
        self.register_buffer("assigned", None)

    def set_range(self, low: Any, high: Any) -> None:
        """Take the grid that covers [low, high]; arrays for a scale per channel.

        A symmetric grid of an activation that is never negative takes unsigned codes.
        """
        low64, high64 = np.asarray(low, np.float64), np.asarray(high, np.float64)
        if not (np.isfinite(low64).all() and np.isfinite(high64).all()):
            raise RecipeError(
                f"tensor '{self.name}': range [{low}, {high}] is not finite; check the images and weights"
            )
        if self.spec.symmetric:
            self.unsigned = not self.weight and bool((low64 >= 0).all())
            self.qmin, self.qmax = self.spec.code_range(unsigned=self.unsigned)
            if self.spec.bits == 8 and not self.unsigned and not self.weight:
                self.qmin = -128  # QuantizeLinear saturates at the end of int8
            scale = symmetric_scale(
                low64, high64, self.qmax, not self.unsigned, self.name, self.spec.power_of_two
            )
            self._take(scale, np.zeros_like(scale))
        else:
            limits = self.qmin, self.qmax, self.name, self.spec.power_of_two
            self._take(*affine_parameters(low64, high64, *limits))

    def _take(self, scale: Any, zero_point: Any) -> None:
        device = self.scale.device
        self.scale = torch.as_tensor(np.asarray(scale, np.float32), device=device)
        self.zero_point = torch.as_tensor(np.asarray(zero_point, np.float32), device=device)
        self.ready, self.assigned = True, None

    def assign(self, codes: Tensor, scale: Tensor | None = None) -> None:
        """Take the codes of a weight from a method instead of rounding it to nearest.

        The weight itself stays in float, so that the float network can still be run.

        Args:
            codes: Whole numbers from qmin to qmax in the weight's shape.
            scale: The scale that they go with, where it is another one: float32 of the old one's shape.

        Raises:
            RecipeError: A code is none of the grid's, or the scale is none that the spec allows.
        """
        rounded = codes.detach().round()
        if self.ready and self.scale.dim() and (not codes.dim() or codes.shape[self.axis] != len(self.scale)):
            raise RecipeError(
                f"tensor '{self.name}': codes of shape {tuple(codes.shape)} do not fit its {len(self.scale)} "
                "scales; give them in the weight's shape"
            )
        if not bool(((rounded >= self.qmin) & (rounded <= self.qmax)).all()):
            raise RecipeError(
                f"tensor '{self.name}': codes from {float(codes.min())} to {float(codes.max())} are not "
                f"all from {self.qmin} to {self.qmax}; clamp them"
            )
        if scale is not None:
            if self.spec.power_of_two and not bool((torch.frexp(scale).mantissa == 0.5).all()):
                raise RecipeError(
                    f"tensor '{self.name}': its scales are powers of two, and this method moves them; "
                    "set power_of_two = false for the weights"
                )
            self.scale = scale.detach().reshape(self.scale.shape).float()
        self.assigned = rounded.float()

    def _spread(self, value: Tensor, rank: int) -> Tensor:
        if value.dim() == 0:
            return value
        shape = [1] * rank
        shape[self.axis] = -1
        return value.reshape(shape)

    def grid(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return (scale, zero point) shaped to broadcast over a tensor of that rank."""
        if not self.ready:
            raise RecipeError(f"tensor '{self.name}': has no grid yet; put the step 'calibrate' before")
        return self._spread(self.scale, rank), self._spread(self.zero_point, rank)

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of x, float32 with whole values."""
        scale, zero_point = self.grid(x.dim())
        if self.assigned is not None:
            return self.assigned
        return (torch.round(x / scale) + zero_point).clamp(self.qmin, self.qmax)

    def forward(self, x: Tensor) -> Tensor:
        """Return x rounded to the grid; x itself when off."""
        if not self.enabled:
            return x
        scale, zero_point = self.grid(x.dim())
        if self.assigned is not None:
            return (self.assigned - zero_point) * scale
        return _rounded(x, scale, zero_point, self.qmin, self.qmax)

    def range(self) -> tuple[float, float]:
        """Return the lowest and highest value of the grid."""
        low = (self.qmin - self.zero_point) * self.scale
        high = (self.qmax - self.zero_point) * self.scale
        return float(low.min()), float(high.max())

    def limits(self, low: float = -math.inf, high: float = math.inf) -> tuple[int, int]:
        """Return the smallest and largest code of values clipped to [low, high]; one scale for the tensor.

        Rounding keeps the order, so clamping the codes to these limits does the same as clipping the values.
        """
        ends = self.codes(torch.tensor([low, high], device=self.scale.device))
        return int(ends[0]), int(ends[1])

    def extra_repr(self) -> str:
        """Show the grid."""
        return (
            f"{self.name}, {self.spec.bits} bits, {'u' if self.unsigned else 's'}[{self.qmin}, {self.qmax}]"
        )


class PixelQuantizer(Quantizer):
    """Rounds pixels to the whole numbers 0 ... 255 that they are, whatever the Scheme and the images say.

    Args:
        name: The tensor that it quantizes, for messages.
    """

    fixed = True

    def __init__(self, name: str) -> None:
        super().__init__(QuantSpec(), name)
        self._take(1.0, 0.0)

    def set_range(self, low: Any, high: Any) -> None:
        """Keep the grid."""


class DynamicQuantizer(nn.Module):
    """Rounds each sample to a grid of its own, S_n = max |x_n| / qmax, taken at run time.

    Parameters are never taken over the batch: they would carry one sample's values into another's result.
    Codes are symmetric, so that a padded zero is the code 0 (or 128 in the unsigned container) for every
    sample alike.

    Source: Foerster et al., "Quantamination", 2026, arXiv 2604.26505 (why per sample).
    """

    def __init__(self, spec: QuantSpec, name: str) -> None:
        super().__init__()
        self.spec, self.name, self.enabled = spec, name, True
        self.qmax = 2 ** (spec.bits - 1) - 1

    def scales(self, x: Tensor) -> Tensor:
        """Return one scale for each sample, shaped to broadcast over x."""
        peaks = x.detach().abs().flatten(1).amax(1).cpu().numpy()
        scales = symmetric_scale(-peaks, peaks, self.qmax, True, self.name)
        return torch.as_tensor(scales, device=x.device).reshape(-1, *[1] * (x.dim() - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return x with each sample rounded to its own grid."""
        if not self.enabled:
            return x
        return _rounded(x, self.scales(x), torch.zeros((), device=x.device), -self.qmax, self.qmax)


class QuantConv2d(ops.Conv2d):
    """A convolution whose weight is rounded to a grid.

    Attributes:
        float_bias: The bias that goes with the weight in float; methods change only the bias that goes with
            the rounded one.
    """

    float_bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, spec: QuantSpec, name: str) -> None:
        super().__init__(conv, ops.pads_of(conv))
        self.register_buffer("float_bias", None if self.bias is None else self.bias.detach().clone())
        self.weight_quantizer = Quantizer(spec, f"{name}.weight", weight=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of (N, C, H, W) with the rounded weight."""
        bias = self.bias if self.weight_quantizer.enabled else self.float_bias
        return ops.convolve(x, self.weight_quantizer(self.weight), bias, self)


class QuantLinear(nn.Linear):
    """A matrix product whose weight is rounded to a grid.

    Attributes:
        float_bias: As for a convolution.
    """

    float_bias: Tensor | None

    def __init__(self, linear: nn.Linear, spec: QuantSpec, name: str) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("float_bias", None if self.bias is None else self.bias.detach().clone())
        self.training = linear.training
        self.weight_quantizer = Quantizer(spec, f"{name}.weight", weight=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W' + b with the rounded weight, (N, I) -> (N, O)."""
        bias = self.bias if self.weight_quantizer.enabled else self.float_bias
        return nn.functional.linear(x, self.weight_quantizer(self.weight), bias)


QuantLayer = QuantConv2d | QuantLinear
