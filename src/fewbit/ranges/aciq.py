"""ACIQ: the clipping range that is best for values of a known distribution, and bits shared by channels."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, field_validator
from scipy.optimize import brentq
from scipy.special import lambertw

from fewbit.errors import RecipeError
from fewbit.ranges.grid_search import Floats, SquaredError, error_of_rows, levels_of, observed, split_rows
from fewbit.ranges.histogram import DEFAULT_BINS, Density, Histogram, check_bins
from fewbit.ranges.mean_std import clip_rows
from fewbit.ranges.minmax import MinMax
from fewbit.ranges.moments import Moments, moments_of_rows
from fewbit.ranges.range_finder import Range, range_of_extremes
from fewbit.spec import Frozen, QuantSpec

Prior = Literal["laplace", "gauss"]
_HALVINGS = 60


class ACIQ(Frozen):
    """The clipping range that is best for values of a Laplace or Gauss distribution.

    The expected squared error of M bits over ``[mean - alpha, mean + alpha]`` is

    - Laplace, b the mean absolute deviation: ``2 b^2 exp(-alpha / b) + alpha^2 / (3 4^M)``,
    - Gauss: ``(s^2 + alpha^2) erfc(alpha / (s sqrt 2)) - sqrt(2 / pi) alpha s exp(-alpha^2 / (2 s^2)) +
      alpha^2 / (3 4^M)``, s the standard deviation,

    and alpha is where it is least. A tensor that is never negative takes ``[0, max(mean, 0) + alpha]`` with
    the alpha of M + 1 bits: half the range is worth one bit. "mixed" tries both distributions and min-max,
    and keeps the range of least measured error.

    Source: R. Banner, Y. Nahshan, D. Soudry, Post-training 4-bit quantization of convolutional networks for
        rapid-deployment, 2019, arXiv 1810.05723.
    Differs: the optimum is solved for, not read from a table; never wider than the values, and zero lies
        within; symmetric ranges are ``[-a, a]``, a the larger magnitude of the two ends; "mixed" measures the
        error on a histogram of all images (of weights on the weights); one range a tensor of activations.

    Attributes:
        prior: "laplace", "gauss" or "mixed".
        bins: Histogram bins on each side of zero: a power of two, 1024 to 16384.

    >>> finder = ACIQ(prior="gauss").start()
    >>> finder.observe(torch.randn(100000, generator=torch.Generator().manual_seed(0)))
    >>> found = finder.find(QuantSpec(bits=4, symmetric=True, signed=True))
    >>> abs(found.high - 2.559) < 0.02
    True
    """

    prior: Literal["laplace", "gauss", "mixed"] = "mixed"
    bins: int = Field(DEFAULT_BINS, ge=1024, le=16384)

    _bins = field_validator("bins")(check_bins)

    @property
    def priors(self) -> tuple[Prior, ...]:
        """The distributions to try."""
        return ("laplace", "gauss") if self.prior == "mixed" else (self.prior,)

    def start(self, name: str = "tensor") -> ACIQFinder:
        """Begin to observe one tensor."""
        return ACIQFinder(name, self)

    def of_weights(self, rows: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ends (R,) of each row of weights (R, K) by the moments of its K values."""
        levels_of(spec, False, "aciq")
        ends = [self._of_part(part, spec) for part in split_rows(rows)]
        return torch.cat([low for low, _ in ends]), torch.cat([high for _, high in ends])

    def _of_part(self, rows: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        mean, deviation, absolute = moments_of_rows(rows)
        one_sided = (rows.amin(1) >= 0) & (not spec.symmetric)
        found = []
        for prior in self.priors:
            unit = absolute if prior == "laplace" else deviation
            two, one = (best_clip(prior, spec.bits + more) for more in (0, 1))
            reach = torch.where(one_sided, one * unit, two * unit)
            low = torch.where(one_sided, 0.0, mean - reach)
            high = torch.where(one_sided, mean.clamp(min=0), mean) + reach
            found.append(clip_rows(rows, low, high, spec))
        if self.prior != "mixed":
            return found[0]
        found.append(MinMax().of_weights(rows, spec))
        errors = []
        for low, high in found:
            whole = np.ones((1, len(rows)))
            errors.append(error_of_rows(rows, low, high, spec, "aciq")(whole, whole)[0])
        best = torch.as_tensor(np.argmin(errors, axis=0), device=rows.device)[None]
        lows, highs = (torch.stack(ends).gather(0, best)[0] for ends in zip(*found, strict=True))
        return lows, highs


class ACIQFinder:
    """Exact moments and a histogram a tensor."""

    __slots__ = ("histogram", "method", "moments")

    def __init__(self, name: str, method: ACIQ) -> None:
        self.method = method
        self.moments = Moments(name)
        self.histogram = Histogram(name, method.bins)

    def observe(self, x: torch.Tensor) -> None:
        """Take in the values of one batch; raises `NetworkError` where one is not finite."""
        self.moments.observe(x)
        self.histogram.observe(x)

    def find(self, spec: QuantSpec) -> Range:
        """Return the range for a grid; raises `DataError` where nothing was observed."""
        seen = observed(self.histogram, spec, "aciq")
        whole = seen.range(seen.low, seen.high)
        if seen.low == seen.high:
            return whole
        found = [self._range(prior, spec) for prior in self.method.priors]
        if self.method.prior != "mixed":
            return found[0]
        found.append(whole)
        error = SquaredError(seen.density, seen.levels, spec.power_of_two)
        lows = np.array([0.0 if seen.mirrored else one.low for one in found], np.float64)
        best = int(np.argmin(error.of(lows, np.array([one.high for one in found], np.float64))))
        return found[best]

    def _range(self, prior: Prior, spec: QuantSpec) -> Range:
        seen = self.moments
        unit = seen.deviation
        if prior == "laplace":
            unit = mean_absolute_deviation(self.histogram.density(), seen.mean)
        if seen.low >= 0:
            high = max(seen.mean, 0.0) + best_clip(prior, spec.bits + 1) * unit
            return range_of_extremes(0.0, min(high, seen.high), spec)
        reach = best_clip(prior, spec.bits) * unit
        low, high = max(seen.mean - reach, seen.low), min(seen.mean + reach, seen.high)
        return range_of_extremes(low, high, spec)


def mean_absolute_deviation(values: Density, mean: float) -> float:
    """Return ``E|x - mean|`` of values that lie evenly within each bin, exact zeros at zero."""
    left, right, counts = values.edges[:-1], values.edges[1:], values.counts
    # Of a bin in which the mean lies, each part has its own sign: |l|^2 + |r|^2 over twice the width.
    away = np.abs((left + right) / 2 - mean)
    inside = (left < mean) & (mean < right)
    parts = ((mean - left) ** 2 + (right - mean) ** 2) / (2 * np.where(inside, right - left, 1.0))
    total = float((counts * np.where(inside, parts, away)).sum()) + values.zeros * abs(mean)
    return total / values.total


@lru_cache(maxsize=64)
def best_clip(prior: Prior, bits: int) -> float:
    """Return ``alpha / b`` (Laplace) or ``alpha / s`` (Gauss) of least expected error.

    Laplace: ``a exp(a) = 3 4^M``, so a is Lambert's W of ``3 4^M``. Gauss: the root of
    ``a erfc(a / sqrt 2) - 2 phi(a) + a / (3 4^M)``, phi the normal density.

    >>> round(best_clip("laplace", 4), 4), round(best_clip("gauss", 4), 4)
    (5.0286, 2.5591)
    """
    if prior == "laplace":
        return float(lambertw(3 * 4.0**bits).real)

    def slope(a: float) -> float:
        density = math.exp(-(a**2) / 2) / math.sqrt(2 * math.pi)
        return a * math.erfc(a / math.sqrt(2)) - 2 * density + a / (3 * 4.0**bits)

    return float(brentq(slope, 0.0, 20.0, xtol=1e-12))


def expected_error(prior: Prior, clip: float, bits: int) -> float:
    """Return the expected squared error of a clip, both in units of b (Laplace) or s (Gauss).

    The density within a step is taken to be even, so real grids err somewhat more at few bits.

    >>> round(expected_error("laplace", best_clip("laplace", 4), 4), 7)
    0.0460215
    """
    rounding = clip**2 / (3 * 4.0**bits)
    if prior == "laplace":
        return 2 * math.exp(-clip) + rounding
    beyond = (1 + clip**2) * math.erfc(clip / math.sqrt(2))
    return beyond - math.sqrt(2 / math.pi) * clip * math.exp(-(clip**2) / 2) + rounding


def levels_of_channels(scales: ArrayLike, bits: float) -> Floats:
    """Return how many levels each channel deserves: ``C 2^bits a_c^(2/3) / sum_k a_k^(2/3)``, float64 (C,).

    Args:
        scales: Range, mean absolute or standard deviation a_c of each channel (C,), at least 0.
        bits: Bits a channel on average, in levels.

    Raises:
        RecipeError: There is no scale above 0, or one is negative or not finite.

    >>> levels_of_channels([0.1, 0.2, 0.8, 1.6], 4).round(3).tolist()
    [4.947, 7.853, 19.788, 31.412]
    """
    a = np.asarray(scales, np.float64)
    if a.ndim != 1 or not np.isfinite(a).all() or (a < 0).any() or not (a > 0).any():
        raise RecipeError(
            f"scales of channels: came in shape {a.shape}; give one finite scale a channel, none negative, "
            "at least one above 0"
        )
    share = (a / a.max()) ** (2 / 3)
    return np.asarray(len(a) * 2.0**bits * share / share.sum())


def allocate_bits(scales: ArrayLike, mean_bits: float, most: int = 8) -> NDArray[np.int64]:
    """Return the bits of each channel (C,): those of least total error whose mean is `mean_bits`.

    ``bits_c = round(log2 levels_c)`` within 0 to `most`, with the levels of `levels_of_channels` for the
    largest M at which the mean does not exceed `mean_bits`.

    Source: R. Banner, Y. Nahshan, D. Soudry, 2019, arXiv 1810.05723, section 4.
    Differs: M is found by bisection, not by a fixed-point iteration; where channels of equal scale leave no M
        that meets the mean, it stays below.

    Args:
        scales: As in `levels_of_channels`.
        mean_bits: Mean to reach, 0 to `most`.
        most: Most bits of a channel.

    Raises:
        RecipeError: As in `levels_of_channels`, or `mean_bits` lies outside 0 to `most`.

    >>> allocate_bits([0.1, 0.2, 0.8, 1.6], 4).tolist()
    [3, 3, 5, 5]
    """
    if not 0 <= mean_bits <= most:
        raise RecipeError(f"mean_bits: is {mean_bits}; give 0 to {most}, the most bits of a channel")
    levels = levels_of_channels(scales, 0.0)
    logarithms = np.log2(levels, out=np.full(len(levels), -np.inf), where=levels > 0)

    def bits(shift: float) -> NDArray[np.int64]:
        return np.clip(np.rint(logarithms + shift), 0, most).astype(np.int64)

    finite = logarithms[np.isfinite(logarithms)]
    low, high = -1.0 - float(finite.max()), most + 1.0 - float(finite.min())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if bits(middle).mean() <= mean_bits else (low, middle)
    return bits(low)
