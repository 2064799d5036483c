"""An activation and what its quantizer leaves of it."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from fewbit.doctor.decibels import ratio_db
from fewbit.place.quantizer import Quantizer
from fewbit.ranges.grid_search import SquaredError, search_histogram
from fewbit.ranges.histogram import DEFAULT_BINS, Histogram
from fewbit.ranges.range_finder import Range, range_of_extremes
from fewbit.sensitivity.records import Histogram as BinCounts

_TAIL = 0.999
_STEPS = 40


class RoundedActivation:
    """Statistics of one tensor, in constant memory: its moments, its tail, and the noise of its quantizer.

    Args:
        name: What errors call it.
        quantizer: What rounds it.
    """

    def __init__(self, name: str, quantizer: nn.Module) -> None:
        self._quantizer = quantizer
        self._values = Histogram(name, DEFAULT_BINS)
        self._powers = [0.0] * 4
        self._beyond = 0
        self._noise = self._clip_noise = 0.0

    def observe(self, x: Tensor) -> None:
        """Take in the float values of one batch."""
        self._values.observe(x)
        wide = x.double()
        square = wide.square()
        for place, power in enumerate((wide, square, square * wide, square.square())):
            self._powers[place] += float(power.sum())
        error = (self._quantizer(x) - x).double().square()
        self._noise += float(error.sum())
        if isinstance(self._quantizer, Quantizer):
            low, high = self._quantizer.range()
            half = float(self._quantizer.scale) / 2
            outside = (x < low - half) | (x > high + half)
            self._beyond += int(outside.sum())
            self._clip_noise += float(error[outside].sum())

    def histogram(self, bins: int = 64) -> BinCounts:
        """Return how its values lie, in equal bins between the smallest and the largest."""
        values = self._values.density()
        low, high = float(values.edges[0]), max(float(values.edges[-1]), float(values.edges[0]) + 1e-9)
        middle = (values.edges[:-1] + values.edges[1:]) / 2
        counts, _ = np.histogram(middle, bins, (low, high), weights=values.counts)
        zero = min(int(-low / (high - low) * bins), bins - 1) if low <= 0 <= high else 0
        counts[zero] += values.zeros
        return BinCounts(low=low, high=high, counts=tuple(int(count) for count in counts))

    def facts(self) -> dict[str, float]:
        """Return the fields of `LayerExam` that speak of it."""
        total = max(self._values.total, 1)
        found = {
            "kurtosis": kurtosis([power / total for power in self._powers]),
            "tail_ratio": tail_ratio(self._values),
            "clipped": self._beyond / total,
            "clip_share": self._clip_noise / self._noise if self._noise > 0 else 0.0,
        }
        return found | (self._gains(self._quantizer) if isinstance(self._quantizer, Quantizer) else {})

    def _gains(self, quantizer: Quantizer) -> dict[str, float]:
        """Return what min-max and least-error ranges would give on these values, in dB."""
        if self._noise <= 0:
            return {"minmax_gain_db": 0.0, "mse_gain_db": 0.0}
        spec = quantizer.spec
        error = SquaredError(self._values.density(), quantizer.qmax - quantizer.qmin)

        def gain(found: Range) -> float:
            noise = float(error.of(np.atleast_1d(found.low), np.atleast_1d(found.high))[0])
            return ratio_db(self._noise, noise)

        widest = range_of_extremes(self._values.low, self._values.high, spec)
        best = search_histogram(self._values, spec, _STEPS, "mse")
        return {"minmax_gain_db": gain(widest), "mse_gain_db": gain(best)}


def kurtosis(moments: list[float]) -> float:
    """Return the fourth central moment over the squared variance, 3 for a normal distribution.

    Args:
        moments: Means of x, x^2, x^3 and x^4; a constant has 0.

    >>> kurtosis([0.0, 1.0, 0.0, 3.0])
    3.0
    """
    m1, m2, m3, m4 = moments
    variance = m2 - m1**2
    if variance <= 1e-12 * max(m2, 1e-30):
        return 0.0
    return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2


def tail_ratio(values: Histogram, share: float = _TAIL) -> float:
    """Return the largest magnitude over that which a share of the values stays below; 1 where all are 0."""
    tail = values.magnitudes()
    reach = float(tail.edges[-1])
    if reach == 0:
        return 1.0
    below = tail.zeros + np.cumsum(tail.counts)
    place = int(np.searchsorted(below, share * tail.total))
    return reach / float(tail.edges[min(place, len(below) - 1) + 1])
