"""What a range is, and what every method that finds one offers."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from pydantic import model_validator

from fewbit.errors import DataError, NetworkError
from fewbit.spec import Frozen, QuantSpec


class Range(Frozen):
    """The interval of real values that a grid covers; zero always lies in it.

    Attributes:
        low: Lower end, at most 0; exactly 0 for a tensor that is never negative. One number a tensor, or
            one an output channel (weights).
        high: Upper end, at least 0; as many numbers as `low`.

    Zero has to be representable (padding, ReLU), so the ends of one-sided data are moved to it. Of a
    symmetric grid with signed codes ``low == -high``.

    >>> Range(low=-1, high=3)
    Range(low=-1.0, high=3.0)
    """

    low: float | tuple[float, ...]
    high: float | tuple[float, ...]

    @model_validator(mode="after")
    def _holds_zero(self) -> Range:
        low, high = _ends(self.low), _ends(self.high)
        if len(low) != len(high) or isinstance(self.low, tuple) != isinstance(self.high, tuple):
            raise ValueError(f"low has {len(low)} ends and high {len(high)}; give as many of each")
        if any(end > 0 for end in low) or any(end < 0 for end in high):
            raise ValueError("low must be at most 0 and high at least 0, for zero must be representable")
        return self


def _ends(ends: float | tuple[float, ...]) -> tuple[float, ...]:
    return ends if isinstance(ends, tuple) else (ends,)


class RangeFinder(Protocol):
    """What one tensor has shown so far, in memory that does not grow with the number of images."""

    def observe(self, x: torch.Tensor) -> None:
        """Take in the values of one batch.

        Args:
            x: Values of any shape, images along the first axis, on any device. Nothing of it is kept.

        Raises:
            NetworkError: A value is not finite.
        """
        ...

    def find(self, spec: QuantSpec) -> Range:
        """Return the range for a grid, from all batches so far; observing may go on afterwards.

        Raises:
            DataError: No value was observed.
        """
        ...


class RangeMethod(Protocol):
    """How ranges are found: frozen hyperparameters; a row of the registry's table ``ranges``."""

    def start(self, name: str = "tensor") -> RangeFinder:
        """Begin to observe one activation tensor; `name` is what errors call it."""
        ...

    def of_weights(self, rows: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the low and high ends (R,) of each row of float32 weights (R, K).

        Raises:
            RecipeError: The method finds ranges of activations only.
        """
        ...


def extremes(x: torch.Tensor, name: str) -> tuple[float, float]:
    """Return the smallest and largest value of a tensor that has values, in one pass.

    Raises:
        NetworkError: A value is not finite.
    """
    smallest, largest = torch.aminmax(x)
    low, high = float(smallest), float(largest)
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int(x.numel() - torch.isfinite(x).sum())
        raise NetworkError(
            f"{name}: {bad} of {x.numel()} values are not finite (NaN or infinite); "
            "check the network's weights and the card's scale, mean and std"
        )
    return low, high


def flatten(x: torch.Tensor) -> torch.Tensor:
    """Return all values as one float32 row, in memory order so that nothing is copied where possible."""
    x = x.detach()
    if x.dtype != torch.float32:
        x = x.to(torch.float32)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(-1)


def range_of_extremes(low: float, high: float, spec: QuantSpec) -> Range:
    """Return the least range of a spec that holds both ends and zero.

    Asymmetric: ``[min(low, 0), max(high, 0)]``. Symmetric with signed codes: ``[-a, a]`` with
    ``a = max(|low|, |high|)``. Symmetric and never negative, or with unsigned codes: ``[0, max(high, 0)]``.

    >>> range_of_extremes(2.1, 3.5, QuantSpec())
    Range(low=0.0, high=3.5)
    >>> range_of_extremes(-1, 3, QuantSpec(symmetric=True, signed=True))
    Range(low=-3.0, high=3.0)
    """
    low, high = (low if low < 0 else 0.0), (high if high > 0 else 0.0)
    if not spec.symmetric:
        return Range(low=low, high=high)
    if low == 0.0 or not spec.signed:
        return Range(low=0.0, high=high)
    reach = max(-low, high)
    return Range(low=-reach, high=reach)


def nothing_observed(name: str) -> DataError:
    """Return the error of a tensor without a single value."""
    return DataError(f"{name}: no value was observed, so it has no range; calibrate with at least one image")
