"""The error that rounding a weight brings into its layer's output, and how much of it is a mean shift."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class OutputShift:
    """Sums over the images of one layer's output channels, exact and with the weight rounded."""

    def __init__(self) -> None:
        self._count = 0
        zero = torch.zeros((), dtype=torch.float64)
        self._error = self._error_square = self._value = self._value_square = zero

    def add(self, exact: Tensor, rounded: Tensor, axis: int) -> None:
        """Take in one batch of outputs; the channels lie on `axis`."""
        values = exact.double().transpose(0, axis).flatten(1)
        error = rounded.double().transpose(0, axis).flatten(1) - values
        self._count += values.shape[1]
        self._error = self._error + error.sum(1)
        self._error_square = self._error_square + error.square().sum(1)
        self._value = self._value + values.sum(1)
        self._value_square = self._value_square + values.square().sum(1)

    def facts(self) -> dict[str, float]:
        """Return the fields of `LayerExam` that speak of it.

        With m_o the mean error of channel o and v_o the variance of its exact values::

            shift = sqrt( sum m_o^2 / sum v_o )      shift_share = sum m_o^2 / sum mean error_o^2
        """
        shifted = float((self._error / self._count).square().sum())
        power = float((self._error_square / self._count).sum())
        mean = self._value / self._count
        variance = float((self._value_square / self._count - mean.square()).clamp(min=0).sum())
        return {
            "shift": math.sqrt(shifted / variance) if variance > 0 else 0.0,
            "shift_share": min(1.0, shifted / power) if power > 0 else 0.0,
        }
