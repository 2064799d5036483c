"""Moving average: the extremes of groups of images, averaged with fading weights."""

from __future__ import annotations

import math

import torch
from pydantic import Field

from fewbit.ranges.minmax import MinMax
from fewbit.ranges.range_finder import Range, extremes, flatten, nothing_observed, range_of_extremes
from fewbit.spec import Frozen, QuantSpec


class MovingAverage(Frozen):
    """An exponential moving average of the extremes of groups of images.

    For each group of `images_per_update` images: ``v <- momentum * v + (1 - momentum) * v_group``, separately
    for the smallest and the largest value; v starts as the first group's. Single outliers are clipped.

    Source: B. Jacob et al., Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference, 2018, arXiv 1712.05877, section 3.1 (activations).
    Differs: the groups are counted in images, not in batches, so the cut of the images into batches does not
        matter (their order does); a last, smaller group counts as a whole one.

    Attributes:
        momentum: Weight of the past.
        images_per_update: Images of one group; the first axis of what is observed counts images.

    >>> finder = MovingAverage(momentum=0.9, images_per_update=1).start()
    >>> finder.observe(torch.tensor([[0.0, 6.0], [0.0, 5.0], [0.0, 8.0], [0.0, 5.5]]))
    >>> round(finder.find(QuantSpec()).high, 6)
    6.049
    """

    momentum: float = Field(0.9, ge=0, lt=1)
    images_per_update: int = Field(32, ge=1)

    def start(self, name: str = "tensor") -> MovingAverageFinder:
        """Begin to observe one tensor."""
        return MovingAverageFinder(name, self)

    def of_weights(self, rows: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ends (R,) of each row of weights (R, K): one group seen once, so min-max."""
        return MinMax().of_weights(rows, spec)


class MovingAverageFinder:
    """The averages, and the extremes of the group under way."""

    __slots__ = ("averages", "group", "images", "method", "name")

    def __init__(self, name: str, method: MovingAverage) -> None:
        self.name = name
        self.method = method
        self.averages: tuple[float, float] | None = None
        self.group = (math.inf, -math.inf)
        self.images = 0

    def observe(self, x: torch.Tensor) -> None:
        """Take in the images of one batch (N, ...); raises `NetworkError` where a value is not finite."""
        if x.numel() == 0:
            return
        x = x.reshape(1) if x.dim() == 0 else x
        done = 0
        while done < len(x):
            part = x[done : done + self.method.images_per_update - self.images]
            low, high = extremes(flatten(part), self.name)
            self.group = min(self.group[0], low), max(self.group[1], high)
            self.images += len(part)
            done += len(part)
            if self.images == self.method.images_per_update:
                self.averages = self._with_group()
                self.group, self.images = (math.inf, -math.inf), 0

    def find(self, spec: QuantSpec) -> Range:
        """Return the range for a grid; raises `DataError` where nothing was observed."""
        averages = self._with_group() if self.images else self.averages
        if averages is None:
            raise nothing_observed(self.name)
        return range_of_extremes(*averages, spec)

    def _with_group(self) -> tuple[float, float]:
        if self.averages is None:
            return self.group
        past = self.method.momentum
        low, high = (past * v + (1 - past) * g for v, g in zip(self.averages, self.group, strict=True))
        return low, high
