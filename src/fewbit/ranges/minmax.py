"""Min-max: the range that holds every observed value."""

from __future__ import annotations

import math

import torch

from fewbit.ranges.range_finder import Range, extremes, flatten, nothing_observed, range_of_extremes
from fewbit.spec import Frozen, QuantSpec


class MinMax(Frozen):
    """The smallest and the largest value of all batches.

    ``low = min(0, min x)``, ``high = max(0, max x)``; symmetric: ``a = max |x|``. Nothing is clipped, so one
    outlier coarsens the grid of all other values. The cut of the data into batches does not matter.

    Source: B. Jacob et al., Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference, 2018, arXiv 1712.05877, section 3 (weights).
    Differs: nothing.

    >>> finder = MinMax().start()
    >>> finder.observe(torch.tensor([-1.0, 3.0]))
    >>> finder.find(QuantSpec())
    Range(low=-1.0, high=3.0)
    """

    def start(self, name: str = "tensor") -> MinMaxFinder:
        """Begin to observe one tensor."""
        return MinMaxFinder(name)

    def of_weights(self, rows: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ends (R,) of each row of weights (R, K); symmetric ones lie at ``-+max |w|``."""
        low, high = torch.aminmax(rows, dim=1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        if spec.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        return low, high


class MinMaxFinder:
    """Two numbers a tensor."""

    __slots__ = ("high", "low", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.low = math.inf
        self.high = -math.inf

    def observe(self, x: torch.Tensor) -> None:
        """Take in the values of one batch; raises `NetworkError` where one is not finite."""
        if x.numel() == 0:
            return
        low, high = extremes(flatten(x), self.name)
        self.low, self.high = min(self.low, low), max(self.high, high)

    def find(self, spec: QuantSpec) -> Range:
        """Return the range for a grid; raises `DataError` where nothing was observed."""
        if self.low > self.high:
            raise nothing_observed(self.name)
        return range_of_extremes(self.low, self.high, spec)
