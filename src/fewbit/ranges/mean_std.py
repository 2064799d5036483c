"""Mean and standard deviation: the range within some deviations of the mean."""

from __future__ import annotations

import torch
from pydantic import Field

from fewbit.ranges.minmax import MinMax
from fewbit.ranges.moments import Moments, moments_of_rows
from fewbit.ranges.range_finder import Range, range_of_extremes
from fewbit.spec import Frozen, QuantSpec


class MeanStd(Frozen):
    """The range within some standard deviations of the mean, and within the extremes.

    ``low = max(min x, mean - n std)``, ``high = min(max x, mean + n std)``, n = `deviations`; symmetric:
    ``a = max(|low|, |high|)``. Mean and standard deviation are those of all values, exact zeros included, in
    float64. Useful is n = 3 to 6: for Gaussian values of 4 and 8 bits 2.56 and 3.92 are best, and what has a
    longer tail, such as values after a ReLU, wants more.

    Source: R. Banner, Y. Nahshan, D. Soudry, Post-training 4-bit quantization of convolutional networks for
        rapid-deployment, 2019, arXiv 1810.05723 (2 std, as the point of comparison); M. Nagel et al.,
        Data-Free Quantization through Weight Equalization and Bias Correction, 2019, arXiv 1906.04721 (6 std,
        from BatchNorm).
    Differs: the statistics are those of the values observed; never wider than the values, and zero lies
        within.

    Attributes:
        deviations: Standard deviations on each side of the mean.

    >>> finder = MeanStd(deviations=1).start()
    >>> finder.observe(torch.tensor([-3.0, -1.0, 1.0, 3.0]))
    >>> round(finder.find(QuantSpec()).high, 6)
    2.236068
    """

    deviations: float = Field(6.0, gt=0, le=100)

    def start(self, name: str = "tensor") -> MeanStdFinder:
        """Begin to observe one tensor."""
        return MeanStdFinder(name, self)

    def of_weights(self, rows: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ends (R,) of each row of weights (R, K)."""
        mean, deviation, _ = moments_of_rows(rows)
        reach = self.deviations * deviation
        return clip_rows(rows, mean - reach, mean + reach, spec)


def clip_rows(
    rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float32 ends (R,) of rows of weights (R, K) cut to `low` and `high`, zero within."""
    least, greatest = torch.aminmax(rows, dim=1)
    ends = torch.stack([torch.maximum(least, low.to(rows)), torch.minimum(greatest, high.to(rows))], dim=1)
    return MinMax().of_weights(ends, spec)


class MeanStdFinder:
    """Five numbers a tensor."""

    __slots__ = ("method", "moments")

    def __init__(self, name: str, method: MeanStd) -> None:
        self.method = method
        self.moments = Moments(name)

    def observe(self, x: torch.Tensor) -> None:
        """Take in the values of one batch; raises `NetworkError` where one is not finite."""
        self.moments.observe(x)

    def find(self, spec: QuantSpec) -> Range:
        """Return the range for a grid; raises `DataError` where nothing was observed."""
        seen = self.moments
        reach = self.method.deviations * seen.deviation
        return range_of_extremes(max(seen.low, seen.mean - reach), min(seen.high, seen.mean + reach), spec)
