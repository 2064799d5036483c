"""Percentile: the range that leaves out a fixed share of the values at each tail."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from pydantic import Field, field_validator

from fewbit.ranges.histogram import DEFAULT_BINS, Density, Histogram, check_bins
from fewbit.ranges.range_finder import Range, range_of_extremes
from fewbit.spec import Frozen, QuantSpec


class Percentile(Frozen):
    """The range between percentiles of the values.

    Asymmetric: `percentile` % of the values are at most ``high``, and as many are at least ``low``, each tail
    by itself. Symmetric with signed codes: `percentile` % of the ``|x|`` are at most ``a``. The rule is
    nearest rank: of n values in ascending order, number ``n - floor(n (100 - percentile) / 100)``, counted in
    exact arithmetic. Values are taken to be spread evenly within their histogram bin, so an end is off by
    less than a bin: at most ``max |x| / (bins / 2)``. Percentile 100 is min-max, exactly.

    Source: H. Wu et al., Integer Quantization for Deep Learning Inference: Principles and Empirical
        Evaluation, 2020, arXiv 2004.09602.
    Differs: taken from a histogram of all values, in one pass. A tensor of which more than `percentile` % are
        exactly zero takes its extremes, for the percentile would make all of it zero.

    Attributes:
        percentile: Share of the values kept, in percent.
        bins: Histogram bins on each side of zero: a power of two, 1024 to 16384.

    >>> finder = Percentile(percentile=99.9).start()
    >>> finder.observe(torch.cat([torch.arange(1, 1000) / 1000, torch.tensor([50.0])]))
    >>> abs(finder.find(QuantSpec()).high - 0.999) < 64 / 4096
    True
    """

    percentile: float = Field(99.99, gt=50, le=100)
    bins: int = Field(DEFAULT_BINS, ge=1024, le=16384)

    _bins = field_validator("bins")(check_bins)

    def start(self, name: str = "tensor") -> PercentileFinder:
        """Begin to observe one tensor."""
        return PercentileFinder(name, self)

    def of_weights(self, rows: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ends (R,) of each row of weights (R, K) by the nearest rank of its K values, exactly."""
        rank = rows.shape[1] - self.above(rows.shape[1])
        if spec.symmetric:
            magnitude = rows.abs()
            reach = torch.kthvalue(magnitude, rank, dim=1).values
            reach = torch.where(reach > 0, reach, magnitude.amax(1))
            return -reach, reach
        high = torch.kthvalue(rows, rank, dim=1).values.clamp(min=0)
        low = -torch.kthvalue(-rows, rank, dim=1).values.clamp(min=0)
        empty = low == high
        return torch.where(empty, rows.amin(1).clamp(max=0), low), torch.where(
            empty, rows.amax(1).clamp(min=0), high
        )

    def above(self, total: int) -> int:
        """Return how many of `total` values lie above the percentile.

        >>> Percentile(percentile=99.9).above(1000)
        1
        """
        return math.floor((100 - Fraction(repr(self.percentile))) * total / 100)


class PercentileFinder:
    """A histogram a tensor."""

    __slots__ = ("histogram", "method")

    def __init__(self, name: str, method: Percentile) -> None:
        self.method = method
        self.histogram = Histogram(name, method.bins)

    def observe(self, x: torch.Tensor) -> None:
        """Take in the values of one batch; raises `NetworkError` where one is not finite."""
        self.histogram.observe(x)

    def find(self, spec: QuantSpec) -> Range:
        """Return the range for a grid; raises `DataError` where nothing was observed."""
        values = self.histogram.density()
        above = self.method.above(values.total)
        negative = self.histogram.low < 0
        if spec.symmetric and spec.signed and negative:
            reach = _value_below(self.histogram.magnitudes(), above)
            low, high = -reach, reach
        else:
            high = _value_below(values.above_zero(), above)
            low = -_value_below(values.mirrored().above_zero(), above)
        if low == high:
            low, high = self.histogram.low, self.histogram.high
        return range_of_extremes(low, high, spec)


def _value_below(tail: Density, above: int) -> float:
    """Return the value of a tail that ends at zero which `above` of its values exceed; 0 where too few do."""
    rank = int(tail.counts.sum()) - above
    if rank <= 0:
        return 0.0
    ranks = np.cumsum(tail.counts)
    bin_ = int(np.searchsorted(ranks, rank))
    share = 1 - (int(ranks[bin_]) - rank) / int(tail.counts[bin_])
    left, right = float(tail.edges[bin_]), float(tail.edges[bin_ + 1])
    return right if share == 1 else left + share * (right - left)
