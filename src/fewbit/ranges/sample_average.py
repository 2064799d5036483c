"""Sample average: the mean over the images of each image's extremes."""

from __future__ import annotations

import math

import torch

from fewbit.ranges.minmax import MinMax
from fewbit.ranges.range_finder import Range, extremes, flatten, nothing_observed, range_of_extremes
from fewbit.spec import Frozen, QuantSpec


class SampleAverage(Frozen):
    """The mean over the images of each image's smallest and largest value.

    ``low = mean_n min(0, min x_n)``, ``high = mean_n max(0, max x_n)``; symmetric: ``a`` the larger magnitude
    of the two. It clips mildly what only some images reach; neither the order of the images nor the cut into
    batches matters.

    Source: R. Krishnamoorthi, Quantizing deep convolutional networks for efficient inference: a whitepaper,
        2018, arXiv 1806.08342 (activation ranges from statistics of a few batches).
    Differs: averaged over single images, all of equal weight; zero counts as a value of each image, for the
        grid has to hold it.

    >>> finder = SampleAverage().start()
    >>> finder.observe(torch.tensor([[0.0, 6.0], [-1.0, 4.0]]))
    >>> finder.find(QuantSpec())
    Range(low=-0.5, high=5.0)
    """

    def start(self, name: str = "tensor") -> SampleAverageFinder:
        """Begin to observe one tensor."""
        return SampleAverageFinder(name)

    def of_weights(self, rows: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ends (R,) of each row of weights (R, K): one sample, so min-max."""
        return MinMax().of_weights(rows, spec)


class SampleAverageFinder:
    """Three numbers a tensor."""

    __slots__ = ("highs", "images", "lows", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.lows = 0.0
        self.highs = 0.0
        self.images = 0

    def observe(self, x: torch.Tensor) -> None:
        """Take in the images of one batch (N, ...); raises `NetworkError` where a value is not finite."""
        if x.numel() == 0:
            return
        x = x.reshape(1) if x.dim() == 0 else x
        images = flatten(x).reshape(len(x), -1)
        # Not aminmax along an axis: it takes fifteen times as long.
        lows, highs = images.amin(1).clamp(max=0), images.amax(1).clamp(min=0)
        low, high = (float(end.double().sum()) for end in (lows, highs))
        if not (math.isfinite(low) and math.isfinite(high)):
            extremes(flatten(x), self.name)
        self.lows += low
        self.highs += high
        self.images += len(x)

    def find(self, spec: QuantSpec) -> Range:
        """Return the range for a grid; raises `DataError` where nothing was observed."""
        if self.images == 0:
            raise nothing_observed(self.name)
        return range_of_extremes(self.lows / self.images, self.highs / self.images, spec)
