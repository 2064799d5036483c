"""An activation's quantizer whose step is learned, with values dropped back to float at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbit.place.quantizer import Quantizer

_EDGE = 1e-4


class _RoundWithStep(torch.autograd.Function):
    """Round to the grid of a learned step where the mask is 1; pass values through where it is 0.

    ``y = S clamp(round(x / S), lo, hi)``; dy/dx = 1 inside the range, 0 outside; dy/dS = y / S - x / S
    inside, y / S outside. The two sums of the step's gradient are dot products, which cost least.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: float, high: float, mask: Tensor | None, rectifies: bool
    ) -> Tensor:
        scaled = x * (1 / step)
        rounded = scaled.clamp(low, high).round_().mul_(step)
        ctx.save_for_backward(scaled, rounded, step, mask)
        # Values rounded once already lie on the ends, and count as inside; what a ReLU makes 0 does not.
        ctx.ends = low - (0.0 if rectifies else _EDGE), high + _EDGE
        return rounded if mask is None else torch.lerp(x, rounded, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        scaled, rounded, step, mask = ctx.saved_tensors
        given = gradients[0]
        taken = given if mask is None else given * mask
        inside = torch.ops.aten.hardtanh_backward(taken, scaled, *ctx.ends)
        taken_row, rounded_row, inside_row, scaled_row = _rows(taken, rounded, inside, scaled)
        of_step = torch.dot(taken_row, rounded_row) / step - torch.dot(inside_row, scaled_row)
        of_x = inside if mask is None else (given - taken).add_(inside)
        return of_x, of_step.reshape(step.shape), None, None, None, None


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Return the values of tensors of one shape, all in the order in which those of the last lie in memory.

    A gradient need not lie as the values do that it belongs to; only then does this copy.
    """
    if tensors[-1].dim() == 4 and not tensors[-1].is_contiguous():
        return [x.permute(0, 2, 3, 1).reshape(-1) for x in tensors]
    return [x.reshape(-1) for x in tensors]


class LearnedStep(nn.Module):
    """Takes a quantizer's place while its step is learned.

    The step is the exponential of the parameter, so that it stays positive and a learning rate means the
    same for every tensor. The zero point, and with it the code of 0, stays.

    Args:
        quantizer: Whose grid it starts from; one scale for the tensor.

    Attributes:
        log_step: The parameter.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.log_step = nn.Parameter(quantizer.scale.detach().log())
        self.log_step.requires_grad_(not quantizer.spec.power_of_two)
        zero_point = float(quantizer.zero_point)
        self.low, self.high = quantizer.qmin - zero_point, quantizer.qmax - zero_point

    def forward(self, x: Tensor, mask: Tensor | None = None, rectifies: bool = False) -> Tensor:
        """Return x rounded, or only where the mask is 1; `rectifies`: in place of a ReLU too."""
        ends = self.low, self.high
        rounded: Tensor = _RoundWithStep.apply(x, self.log_step.exp(), *ends, mask, rectifies)  # type: ignore[no-untyped-call]
        return rounded

    @property
    def can_rectify(self) -> bool:
        """Whether no value below 0 passes, so that a ReLU in front of it does nothing."""
        return self.low >= 0

    def finish(self) -> None:
        """Give the quantizer the step that was learned."""
        if not self.quantizer.spec.power_of_two:
            self.quantizer.scale = self.log_step.detach().exp()


class Dropping:
    """Random masks of 0 and 1, float32, cut out of one long row of them.

    Drawing a fresh number for every value of every tensor in every iteration would take as long as the
    convolutions; a stretch from a random place of a row drawn once does not.

    Args:
        share: How many of the values are 1.
        generator: Draws.
        length: Of the row; a longer mask repeats it.
    """

    def __init__(self, share: float, generator: torch.Generator, length: int = 1 << 22) -> None:
        self._row = (torch.rand(length, generator=generator) < share).float()
        self._generator = generator

    def mask(self, like: Tensor) -> Tensor:
        """Return a mask of a tensor's shape, its channels last in memory where it has four axes."""
        count, length = like.numel(), len(self._row)
        row = self._row if count < length else self._row.repeat(count // length + 2)
        start = int(torch.randint(0, len(row) - count + 1, (1,), generator=self._generator))
        cut = row[start : start + count]
        if like.dim() == 4:
            images, channels, rows, columns = like.shape
            return cut.view(images, rows, columns, channels).permute(0, 3, 1, 2)
        return cut.view(like.shape)
