"""Streaming moments of one tensor: count, mean, variance and extremes, in float64."""

from __future__ import annotations

import math

import torch

from fewbit.ranges.range_finder import extremes, flatten, nothing_observed

# One thread, and float64 within the cache.
_CHUNK = 16384


class Moments:
    """Mean and variance of all values so far.

    Each chunk of values has its own mean and its own sum of squared deviations, all in float64; two sets of
    values join by ``M2 = M2_a + M2_b + d^2 n_a n_b / n`` with d the difference of their means, so nothing
    cancels, however far the mean lies from zero.

    Source: T. F. Chan, G. H. Golub, R. J. LeVeque, Updating formulae and a pairwise algorithm for computing
        sample variances, 1979, Stanford report STAN-CS-79-773.

    Attributes:
        name: What errors call the tensor.
        total: Values so far.
        mean: Their mean.
        low: Smallest value.
        high: Largest value.

    >>> moments = Moments("x")
    >>> moments.observe(torch.tensor([1.0, 2.0]))
    >>> moments.observe(torch.tensor([6.0]))
    >>> moments.mean, round(moments.deviation ** 2, 6)
    (3.0, 4.666667)
    """

    __slots__ = ("_squares", "high", "low", "mean", "name", "total")

    def __init__(self, name: str) -> None:
        self.name = name
        self.total = 0
        self.mean = 0.0
        self._squares = 0.0
        self.low = math.inf
        self.high = -math.inf

    def observe(self, x: torch.Tensor) -> None:
        """Take in the values of one batch of any shape.

        Raises:
            NetworkError: A value is not finite.
        """
        if x.numel() == 0:
            return
        values = flatten(x)
        low, high = extremes(values, self.name)
        self.low, self.high = min(self.low, low), max(self.high, high)
        buffer = torch.empty(min(_CHUNK, values.numel()), dtype=torch.float64, device=values.device)
        for chunk in torch.split(values, _CHUNK):
            work = buffer[: chunk.numel()].copy_(chunk)
            mean = work.mean()
            work -= mean
            self._join(chunk.numel(), float(mean), float(work.dot(work)))

    @property
    def deviation(self) -> float:
        """The standard deviation of the values, not an estimate of a population's.

        Raises:
            DataError: No value was observed.
        """
        if self.total == 0:
            raise nothing_observed(self.name)
        return math.sqrt(self._squares / self.total)

    def _join(self, count: int, mean: float, squares: float) -> None:
        total = self.total + count
        difference = mean - self.mean
        self._squares += squares + difference**2 * self.total * count / total
        self.mean += difference * count / total
        self.total = total


def moments_of_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mean, standard deviation and mean absolute deviation, float64 (R,), of rows of weights (R, K).

    >>> mean, deviation, absolute = moments_of_rows(torch.tensor([[1.0, 2.0, 6.0]]))
    >>> float(mean), round(float(deviation) ** 2, 6), float(absolute)
    (3.0, 4.666667, 2.0)
    """
    centred = rows.double()
    mean = centred.mean(dim=1)
    centred -= mean[:, None]
    return mean, centred.square().mean(dim=1).sqrt(), centred.abs().mean(dim=1)
