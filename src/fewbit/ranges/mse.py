"""MSE: the range whose grid has the least mean squared error."""

from __future__ import annotations

import torch
from pydantic import Field, field_validator

from fewbit.ranges.grid_search import search_histogram, search_rows
from fewbit.ranges.histogram import DEFAULT_BINS, Histogram, check_bins
from fewbit.ranges.range_finder import Range
from fewbit.spec import Frozen, QuantSpec


class MSE(Frozen):
    """The clipping range of least mean squared error.

    ``argmin over [low, high] of sum_i h_i (Q(x_i) - x_i)^2``, where Q rounds to the spec's grid over
    ``[low, high]`` with its integer zero point. Each end is tried at ``k / steps`` of the extreme, k = 1 to
    `steps`, and refined by golden section around the best. An asymmetric range scales both ends together,
    then each end alone, then each end of the best of these, with a quarter of the steps. Min-max is among the
    candidates, so the result is never worse.

    Source: Y. Choukroun et al., Low-bit Quantization of Neural Networks for Efficient Inference, 2019,
        arXiv 1902.06822 (OMSE); golden section: B. Yang et al., Quantization Range Estimation for
        Convolutional Neural Networks, 2025, arXiv 2510.04044.
    Differs: activations are judged on a histogram in closed form, their values spread evenly within each bin
        and the exact zeros free of error; weights are judged one by one.

    Attributes:
        steps: Candidates for each end.
        bins: Histogram bins on each side of zero: a power of two, 1024 to 16384.

    >>> finder = MSE().start()
    >>> finder.observe(torch.randn(10000, generator=torch.Generator().manual_seed(0)))
    >>> found = finder.find(QuantSpec(bits=3, symmetric=True, signed=True))
    >>> 1.7 < found.high < 2.2
    True
    """

    steps: int = Field(100, ge=10, le=1000)
    bins: int = Field(DEFAULT_BINS, ge=1024, le=16384)

    _bins = field_validator("bins")(check_bins)

    def start(self, name: str = "tensor") -> MSEFinder:
        """Begin to observe one tensor."""
        return MSEFinder(name, self)

    def of_weights(self, rows: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ends (R,) of each row of weights (R, K) that give its K values the least error."""
        return search_rows(rows, spec, self.steps, "mse")


class MSEFinder:
    """A histogram a tensor."""

    __slots__ = ("histogram", "method")

    def __init__(self, name: str, method: MSE) -> None:
        self.method = method
        self.histogram = Histogram(name, method.bins)

    def observe(self, x: torch.Tensor) -> None:
        """Take in the values of one batch; raises `NetworkError` where one is not finite."""
        self.histogram.observe(x)

    def find(self, spec: QuantSpec) -> Range:
        """Return the range for a grid; raises `DataError` where nothing was observed."""
        return search_histogram(self.histogram, spec, self.method.steps, "mse")
