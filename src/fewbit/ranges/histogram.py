"""A streaming histogram of one tensor: constant memory, exact counts, the same for every cut into batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fewbit.ranges.range_finder import extremes, flatten, nothing_observed

# torch hands elementwise work on at most this many values to one thread: no waiting for busy cores between
# the short operations, and all of it stays in the cache.
_CHUNK = 32768
# Widths below 2^-120 would need a factor that float32 does not have.
_LEAST_EXPONENT = -120

DEFAULT_BINS = 4096


def check_bins(bins: int) -> int:
    """Return a number of bins that is a power of two; for validation of hyperparameters."""
    if bins & (bins - 1):
        raise ValueError(f"must be a power of two, such as {DEFAULT_BINS}, for bins merge in pairs")
    return bins


@dataclass(frozen=True)
class Density:
    """How the values lie: spread evenly within each bin, except for those that are exactly zero.

    Attributes:
        edges: Ends of the bins, float64 (n + 1,), ascending from the smallest to the largest value; zero is
            one of them where values lie on both sides.
        counts: Values in each bin without the exact zeros, int64 (n,).
        zeros: Values that are exactly zero.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    zeros: int

    @property
    def total(self) -> int:
        """All values, the zeros too."""
        return int(self.counts.sum()) + self.zeros

    def above_zero(self) -> Density:
        """Return the part above zero, without the exact zeros."""
        first = int(np.searchsorted(self.edges, 0.0))
        return Density(self.edges[first:], self.counts[first:], 0)

    def mirrored(self) -> Density:
        """Return how the values ``-x`` lie."""
        return Density(-self.edges[::-1], self.counts[::-1], self.zeros)


class Histogram:
    """Counts of values in bins of equal width, on both sides of zero.

    The value x falls in bin ``trunc(x / width)``, where the width is the least power of two with
    ``max |x| < bins * width``: bins 1, 2, ... hold ``[width, 2 width)``, ``[2 width, 3 width)``, ..., bins
    -1, -2, ... the same mirrored, and bin 0 holds ``(-width, width)``. When a larger value comes, the width
    doubles and pairs of bins merge. All of it is exact in float32, so the counts depend only on the values,
    never on their order or on the cut into batches. Between ``bins / 2`` and ``bins`` bins are in use on the
    side of the value of largest magnitude, so a bin is at most ``max |x| / (bins / 2)`` wide.

    Attributes:
        name: What errors call the tensor.
        bins: Bins on each side of zero, a power of two.
        width: Width of a bin; 0 as long as every value was zero.
        counts: int64 (2 * bins - 1,); bin i is at ``i + bins - 1``; bin 0 counts exact zeros too.
        zeros: Values that are exactly zero.
        total: Values so far.
        low: Smallest value so far.
        high: Largest value so far.

    >>> histogram = Histogram("x", bins=1024)
    >>> histogram.observe(torch.tensor([0.0, 1.0, -0.5]))
    >>> histogram.width, histogram.zeros, histogram.low, histogram.high
    (0.001953125, 1, -0.5, 1.0)
    """

    __slots__ = ("bins", "counts", "high", "low", "name", "total", "width", "zeros")

    def __init__(self, name: str, bins: int) -> None:
        self.name = name
        self.bins = bins
        self.width = 0.0
        self.counts: NDArray[np.int64] = np.zeros(2 * bins - 1, dtype=np.int64)
        self.zeros = 0
        self.total = 0
        self.low = math.inf
        self.high = -math.inf

    def observe(self, x: torch.Tensor) -> None:
        """Count the values of one batch of any shape.

        Raises:
            NetworkError: A value is not finite.
        """
        if x.numel() == 0:
            return
        values = flatten(x)
        low, high = extremes(values, self.name)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.total += values.numel()
        reach = max(-low, high)
        if reach == 0:
            self.zeros += values.numel()
            self.counts[self.bins - 1] += values.numel()
            return
        self._widen(reach)
        counts, zeros = _count(values, 1 / self.width, self.bins, signed=low < 0)
        self.counts[-len(counts) :] += counts
        self.zeros += zeros

    def density(self) -> Density:
        """Return how the values lie.

        Bin 0 is split at zero where values lie on both sides of it; the outermost bins end at the extremes.

        Raises:
            DataError: No value was observed.
        """
        if self.total == 0:
            raise nothing_observed(self.name)
        first, last = (math.trunc(end / self.width) if self.width else 0 for end in (self.low, self.high))
        counts = self.counts[first + self.bins - 1 : last + self.bins].copy()
        index = np.arange(first, last + 2)
        edges = self.width * (index - (index < 1)).astype(np.float64)
        if first <= 0 <= last:
            counts[-first] -= self.zeros
            if self.low < 0 < self.high:
                half = int(counts[-first]) // 2
                counts = np.insert(counts, -first, half)
                counts[1 - first] -= half
                edges = np.insert(edges, 1 - first, 0.0)
        edges[0], edges[-1] = self.low, self.high
        return Density(edges, counts, self.zeros)

    def magnitudes(self) -> Density:
        """Return how the values' magnitudes ``|x|`` lie; raises like `density`."""
        if self.total == 0:
            raise nothing_observed(self.name)
        reach = max(-self.low, self.high)
        last = math.trunc(reach / self.width) if self.width else 0
        centre = self.bins - 1
        counts = self.counts[centre : centre + last + 1].copy()
        counts[1:] += self.counts[centre - last : centre][::-1]
        counts[0] -= self.zeros
        edges = self.width * np.arange(last + 2, dtype=np.float64)
        edges[-1] = reach
        return Density(edges, counts, self.zeros)

    def _widen(self, reach: float) -> None:
        _, exponent = math.frexp(reach)  # reach < 2^exponent, and 2^(exponent - 1) <= reach
        width = 2.0 ** max(exponent - int(math.log2(self.bins)), _LEAST_EXPONENT)
        if width <= self.width:
            return
        if self.width:
            factor = int(min(width / self.width, 2 * self.bins))
            old = np.arange(1 - self.bins, self.bins)
            merged = np.zeros_like(self.counts)
            np.add.at(merged, np.trunc(old / factor).astype(np.int64) + self.bins - 1, self.counts)
            self.counts[:] = merged
        self.width = width


def _count(values: torch.Tensor, factor: float, bins: int, signed: bool) -> tuple[NDArray[np.int64], int]:
    offset = bins - 1 if signed else 0
    counts = torch.zeros(offset + bins, dtype=torch.int64, device=values.device)
    buffer = torch.empty(min(_CHUNK, values.numel()), dtype=torch.float32, device=values.device)
    nonzero = torch.zeros((), dtype=torch.float64, device=values.device)
    for chunk in torch.split(values, _CHUNK):
        work = buffer[: chunk.numel()]
        codes = torch.mul(chunk, factor, out=work).to(torch.int16)
        counts += torch.bincount(codes.add_(offset) if signed else codes, minlength=offset + bins)
        # Not count_nonzero: it branches on each value, ten times slower after a ReLU.
        nonzero += torch.ne(chunk, 0, out=work).sum()
    return counts.cpu().numpy(), values.numel() - int(nonzero)
