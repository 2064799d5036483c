"""KL: the threshold whose clipped and coarsened histogram tells least from the whole one."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, field_validator

from fewbit.errors import RecipeError
from fewbit.ranges.histogram import DEFAULT_BINS, Histogram, check_bins
from fewbit.ranges.range_finder import Range, range_of_extremes
from fewbit.spec import Frozen, QuantSpec

_BLOCK = 256  # thresholds judged together
_TIE = 1e-12


class KL(Frozen):
    """The threshold of least relative entropy between the histogram and its clipped, coarsened copy.

    Of the histogram h of ``|x|`` with bins of width w, each threshold ``(i + 1/2) w`` is tried. P is
    ``h[0:i]`` with all that lies beyond added to its last bin; Q is ``h[0:i]`` in as many groups as the grid
    has levels, each group's count spread evenly over its non-empty bins;
    ``D(i) = sum P ln(P / Q)``, both of sum 1. The last i of least D gives the threshold T, and the range is
    ``[max(low, -T), min(high, T)]``, symmetric ``[-T, T]``.

    For activations only: weights are too few, and a network's logits must not be clipped (`calibrate` never
    does). With few values D is mostly noise, so a tensor of fewer than `values_per_bin` for each bin up to
    the largest takes min-max; exact zeros do not count.

    Source: S. Migacz, 8-bit Inference with TensorRT, GPU Technology Conference 2017.
    Differs: the histogram has 1/2 to 1 times `bins` bins, of a width that is a power of two; D comes from
        cumulated sums, the same numbers in a fraction of the time; a threshold whose last bin is empty while
        values lie beyond has D infinite. A tensor that is never negative has as many groups as levels,
        2^bits, where TensorRT has 128. Min-max for few values.

    Attributes:
        unsigned_groups: Groups of a tensor that is never negative: "all" levels (2^bits) or "half" of them.
        values_per_bin: Values that a histogram needs, on average over its bins; 0 takes what comes.
        bins: Histogram bins on each side of zero: a power of two, 1024 to 16384.

    >>> finder = KL().start()
    >>> finder.observe(torch.randn(100000, generator=torch.Generator().manual_seed(0)))
    >>> 2.5 < finder.find(QuantSpec(symmetric=True, signed=True)).high < 4.5
    True
    """

    unsigned_groups: Literal["all", "half"] = "all"
    values_per_bin: float = Field(8.0, ge=0)
    bins: int = Field(DEFAULT_BINS, ge=1024, le=16384)

    _bins = field_validator("bins")(check_bins)

    def start(self, name: str = "tensor") -> KLFinder:
        """Begin to observe one tensor."""
        return KLFinder(name, self)

    def of_weights(self, rows: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse: weights are too few for a histogram.

        Raises:
            RecipeError: Always.
        """
        raise RecipeError(
            "kl: finds ranges of activations only, for a weight tensor has too few values for its histogram; "
            "give weights another method, such as 'mse'"
        )


class KLFinder:
    """A histogram a tensor."""

    __slots__ = ("histogram", "method")

    def __init__(self, name: str, method: KL) -> None:
        self.method = method
        self.histogram = Histogram(name, method.bins)

    def observe(self, x: torch.Tensor) -> None:
        """Take in the values of one batch; raises `NetworkError` where one is not finite."""
        self.histogram.observe(x)

    def find(self, spec: QuantSpec) -> Range:
        """Return the range for a grid; raises `DataError` where nothing was observed."""
        counts = self.histogram.magnitudes().counts
        low, high = self.histogram.low, self.histogram.high
        half = low < 0 or self.method.unsigned_groups == "half"
        groups = max(2 ** (spec.bits - 1 if half else spec.bits), 1)
        few = counts.sum() < max(self.method.values_per_bin * len(counts), 1)
        if few or len(counts) < max(groups, 2):
            return range_of_extremes(low, high, spec)
        counts[0] = counts[1]  # what is almost zero would outweigh all else after a ReLU
        divergences = relative_entropies(counts, groups)
        last = int(np.flatnonzero(divergences <= divergences.min() + _TIE)[-1])
        threshold = (groups + last + 0.5) * self.histogram.width
        return range_of_extremes(max(low, -threshold), min(high, threshold), spec)


def relative_entropies(counts: ArrayLike, groups: int) -> NDArray[np.float64]:
    """Return ``D(i)`` for i = `groups` to the number of bins, float64; infinite where Q is 0 and P is not.

    With S and E the count and the non-empty bins of a group, t what lies beyond i and C what does not::

        N D(i) = sum p ln p - sum_groups S ln(S / E) - t ln(S_last / E_last) + N ln(C / N)

    so each i costs one term a group, from cumulated sums, and not one a bin. Where groups are short, the
    thresholds share most of them, and each is worked out once.

    Args:
        counts: Values in each bin, from zero up (B,), the last one not 0.
        groups: Levels of the grid, 1 to B.

    >>> toy = [40, 30, 20, 12, 8, 5, 3, 2, 1, 0, 0, 0, 0, 0, 0, 1]
    >>> relative_entropies(toy, 4)[:3].round(7).tolist()
    [0.0782185, 0.0280233, 0.0230844]
    """
    h = np.asarray(counts, np.float64)
    bins = len(h)
    below, filled, entropy = (np.concatenate([[0.0], np.cumsum(terms)]) for terms in (h, h > 0, _x_log_x(h)))
    total = below[-1]
    longest = -(-bins // groups)
    shared = longest * bins < groups * (bins - groups)
    if shared:  # groups by their length and first bin
        firsts = np.arange(bins)
        lasts = np.minimum(firsts + np.arange(longest + 1)[:, None], bins)
        known, known_logarithms = _terms(below[lasts] - below[firsts], filled[lasts] - filled[firsts])
    found = []
    for start in range(groups, bins + 1, _BLOCK):
        ends = np.arange(start, min(start + _BLOCK, bins + 1))
        borders = np.arange(groups + 1) * ends[:, None] // groups
        if shared:
            which = np.diff(borders, axis=1)
            which *= bins
            which += borders[:, :-1]
            terms, logarithm = known.take(which, mode="clip"), known_logarithms.take(which[:, -1])
        else:
            terms, logarithms = _terms(np.diff(below[borders], axis=1), np.diff(filled[borders], axis=1))
            logarithm = logarithms[:, -1]
        last, beyond = h[ends - 1], total - below[ends]
        of_p = entropy[ends - 1] + _x_log_x(last + beyond)
        of_q = terms.sum(1) + beyond * logarithm
        with np.errstate(divide="ignore"):
            sums = np.log(below[ends] / total)
        found.append(np.where((last == 0) & (beyond > 0), np.inf, (of_p - of_q) / total + sums))
    return np.concatenate(found)


def _terms(inside: NDArray[np.float64], bins: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Return ``S ln(S / E)`` and ``ln(S / E)`` of groups of S values in E bins that are not empty."""
    level = np.divide(inside, bins, out=np.zeros_like(inside), where=bins > 0)
    logarithm = np.log(level, out=np.zeros_like(level), where=level > 0)
    return inside * logarithm, logarithm


def _x_log_x(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(x * np.log(x, out=np.zeros_like(x), where=x > 0))
