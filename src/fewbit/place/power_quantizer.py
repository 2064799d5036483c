"""The quantizer of weights on a power grid: codes that a table turns into floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbit.errors import RecipeError
from fewbit.grids import power
from fewbit.place.quantizer import Quantizer
from fewbit.spec import QuantSpec


class PowerQuantizer(Quantizer):
    """Rounds a weight to a power grid: code q stands for ``S T[q]`` with ``T[q] = sign(q) |q|^(1 / p)``.

    Rounding is to nearest in the transformed weight ``|w|^p``, in which the codes are uniform; p and S are
    found together, a pair for the tensor or for each output channel.

    Args:
        spec: Symmetric, of the grid "power".
        name: The tensor that it quantizes, for messages.
        axis: Of the channels where the grids are per channel.

    Attributes:
        exponent: p, float32 of the shape of `scale`.
        step: ``S^p``, the step between the transformed weights, float32 of the shape of `scale`.
    """

    exponent: Tensor
    step: Tensor

    def __init__(self, spec: QuantSpec, name: str, axis: int = 0) -> None:
        super().__init__(spec, name, axis, weight=True)
        self.register_buffer("exponent", torch.ones(()))
        self.register_buffer("step", torch.ones(()))

    def set_range(self, low: Any, high: Any) -> None:
        """Refuse: a range has no exponent.

        Raises:
            RecipeError: Always.
        """
        raise RecipeError(
            f"tensor '{self.name}': is on a power grid, which no range gives; "
            'give calibrate weights = "requant", or the weights grid = "uniform"'
        )

    def set_power(self, exponent: Tensor, step: Tensor) -> None:
        """Take a grid.

        Args:
            exponent: p, above 0, at most 1: one, or one a channel (C,).
            step: Of the transformed weights, of the shape of `exponent`.
        """
        self.exponent, self.step = exponent.detach().float(), step.detach().float()
        self._take(self.step.double().pow(1 / self.exponent.double()), torch.zeros_like(self.step))

    def grid(self, rank: int) -> tuple[Tensor, Tensor]:
        """Refuse: the values are no multiples of the scale.

        Raises:
            RecipeError: Always.
        """
        raise RecipeError(
            f"tensor '{self.name}': is on a power grid, and this method wants uniform values; "
            'give the weights grid = "uniform"'
        )

    def tables(self) -> tuple[Tensor, Tensor]:
        """Return the tables T of the exponents that are used, and which of them each channel has.

        Returns:
            float32 (tables, levels), the values of the codes qmin to qmax at scale 1; int64 of the shape of
            `scale`.
        """
        used, which = torch.unique(self.exponent, return_inverse=True)
        rows = [torch.from_numpy(power(self.spec, float(p))) for p in used]
        return torch.stack(rows).float(), which

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of x, float32 with whole values."""
        if not self.ready:
            raise RecipeError(f"tensor '{self.name}': has no grid yet; put the step 'calibrate' before")
        if self.assigned is not None:
            return self.assigned
        exponent, step = (self._spread(value.double(), x.dim()) for value in (self.exponent, self.step))
        codes = (x.double().abs().pow(exponent) / step).round().clamp(max=self.qmax)
        return torch.copysign(codes, x.double()).float()

    def forward(self, x: Tensor) -> Tensor:
        """Return x rounded to the grid; x itself when off. No gradient passes."""
        if not self.enabled:
            return x
        tables, which = self.tables()
        codes = self.codes(x).long() - self.qmin
        rows = torch.broadcast_to(self._spread(which, x.dim()), x.shape)
        return tables[rows, codes] * self._spread(self.scale, x.dim())

    def range(self) -> tuple[float, float]:
        """Return the lowest and highest value of the grid."""
        tables, which = self.tables()
        top = float((tables[which, -1] * self.scale).max())
        return -top, top
