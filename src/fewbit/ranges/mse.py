"""MSE: the range whose grid has the least mean squared error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator

from fewbit.errors import RecipeError
from fewbit.ranges.histogram import DEFAULT_BINS, Density, Histogram, check_bins
from fewbit.ranges.minmax import MinMax
from fewbit.ranges.range_finder import Range, range_of_extremes
from fewbit.spec import Frozen, QuantSpec

_Floats = NDArray[np.float64]
_Error = Callable[[_Floats, _Floats], _Floats]  # factors of both ends, each (candidates, rows), to errors
_Score = Callable[[_Floats], _Floats]  # factors (candidates, rows) to errors (candidates, rows)
_GOLDEN = (5**0.5 - 1) / 2
_NARROWINGS = 10  # of a bracket two grid steps wide: to 1.6 % of a step
_CHUNK = 32768  # weights judged together: one thread, within the cache


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
        parts = torch.split(rows, max(1, _CHUNK // rows.shape[1]))
        ends = [_ends_of_rows(part, spec, self.steps) for part in parts]
        return torch.cat([low for low, _ in ends]), torch.cat([high for _, high in ends])


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
        values = self.histogram.density()
        whole = range_of_extremes(self.histogram.low, self.histogram.high, spec)
        low, high = float(np.min(whole.low)), float(np.max(whole.high))
        if low == high:
            return whole
        levels = _levels(spec, unsigned=low == 0)
        mirrored = spec.symmetric and low < 0
        if mirrored:  # a grid that mirrors itself errs on |x| as on x
            values, low = self.histogram.magnitudes(), 0.0
        error = SquaredError(values, levels)
        each_end = not mirrored and low < 0 < high
        ends = _search(
            lambda a, b: error.of(low * a[:, 0], high * b[:, 0])[:, None], 1, each_end, self.method.steps
        )
        high *= float(ends[1, 0])
        return Range(low=-high if mirrored else low * float(ends[0, 0]), high=high)


class SquaredError:
    """The squared error of grids over a density, from its cumulated moments: cost does not grow with values.

    Args:
        density: The values; they lie evenly within each bin, the exact zeros have no error.
        levels: Steps of the grid: its codes less one.
    """

    def __init__(self, density: Density, levels: int) -> None:
        edges, counts = density.edges, density.counts.astype(np.float64)
        left, right = edges[:-1], edges[1:]
        bins = (counts, counts * (left + right) / 2, counts * (left**2 + left * right + right**2) / 3)
        self._moments = [np.concatenate([[0.0], np.cumsum(moment)]) for moment in bins]
        self._edges, self._counts, self._widths = edges, counts, np.diff(edges)
        self._levels = levels

    def of(self, low: _Floats, high: _Floats) -> _Floats:
        """Return the summed squared error (C,) of the grids over ``[low, high]``, each end (C,)."""
        scale = ((high - low) / self._levels)[:, None]
        zero = np.clip(np.rint(-low[:, None] / scale), 0, self._levels)
        values = (np.arange(self._levels + 1) - zero) * scale
        number, first, second = self._within(values[:, :-1] + scale / 2)
        return np.asarray((second - 2 * values * first + values**2 * number).sum(1))

    def _within(self, borders: _Floats) -> list[_Floats]:
        bin_ = np.clip(np.searchsorted(self._edges, borders, side="right") - 1, 0, len(self._counts) - 1)
        left = self._edges[bin_]
        reach = np.clip(borders - left, 0, self._widths[bin_])
        share = self._counts[bin_] * reach / np.maximum(self._widths[bin_], np.finfo(np.float64).tiny)
        right = left + reach
        partial = (share, share * (left + right) / 2, share * (left**2 + left * right + right**2) / 3)
        cells = []
        for moment, part in zip(self._moments, partial, strict=True):
            below = moment[bin_] + part
            cells.append(np.diff(below, axis=1, prepend=0.0, append=moment[-1]))
        return cells


def _levels(spec: QuantSpec, unsigned: bool) -> int:
    """Return the steps of the grid on the side that is searched: above zero only for a mirrored grid."""
    least, greatest = spec.code_range(unsigned)
    levels = greatest - (0 if spec.symmetric else least)
    if levels < 1:
        raise RecipeError(
            f"mse: {spec.bits}-bit symmetric signed codes hold nothing but 0; give 2 bits or more"
        )
    return levels


def _ends_of_rows(rows: torch.Tensor, spec: QuantSpec, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = MinMax().of_weights(rows, spec)
    levels, least, greatest = _levels(spec, unsigned=False), *spec.code_range()
    negated, work = -rows, torch.empty_like(rows)

    def error(of_low: _Floats, of_high: _Floats) -> _Floats:
        left, right = low * low.new_tensor(of_low), high * high.new_tensor(of_high)
        scales = right / levels if spec.symmetric else (right - left) / levels
        scales = torch.where(scales > 0, scales, 1.0)[:, :, None]
        found = torch.empty(scales.shape[:2], device=rows.device)
        for number, scale in enumerate(scales):
            torch.div(rows, scale, out=work).round_()
            if spec.symmetric:
                work.clamp_(least, greatest)
            else:
                zero = (least - left[number, :, None] / scale).round_().clamp_(least, greatest)
                work.add_(zero).clamp_(least, greatest).sub_(zero)
            torch.linalg.vector_norm(torch.addcmul(negated, work, scale, out=work), dim=1, out=found[number])
        return found.double().square().cpu().numpy()

    ends = _search(error, len(rows), not spec.symmetric, steps)
    return low * low.new_tensor(ends[0]), high * high.new_tensor(ends[1])


def _search(error: _Error, rows: int, each_end: bool, steps: int) -> _Floats:
    """Return the factors (2, rows) of the low and of the high end that give each row the least error."""
    ends = np.ones((2, rows))
    best = error(ends[:1], ends[1:])[0]

    def improve(start: _Floats, which: list[int], candidates: int) -> None:
        nonlocal ends, best

        def score(factor: _Floats) -> _Floats:
            factors = np.repeat(start[:, None], len(factor), axis=1)
            factors[which] = factor
            return error(factors[0], factors[1])

        factor, least = _best_factor(score, rows, candidates)
        found = start.copy()
        found[which] = factor
        ends, best = np.where(least < best, found, ends), np.minimum(least, best)

    improve(ends, [0, 1], steps)
    if each_end:
        fewer = -(-steps // 4)
        improve(np.ones((2, rows)), [1], fewer)
        improve(np.ones((2, rows)), [0], fewer)
        improve(ends, [1], fewer)
        improve(ends, [0], fewer)
    return ends


def _best_factor(score: _Score, rows: int, steps: int) -> tuple[_Floats, _Floats]:
    """Return the factor (rows,) of least error and that error: the best of a grid, then golden section."""
    grid = np.repeat(np.arange(1, steps + 1)[:, None] / steps, rows, axis=1)
    errors = score(grid)
    at = np.argmin(errors, axis=0)
    factor, least = grid[at, 0], errors[at, np.arange(rows)]
    left, right = np.maximum(factor - 1 / steps, 0.5 / steps), np.minimum(factor + 1 / steps, 1.0)
    inner = [right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)]
    inner_errors = [score(point[None])[0] for point in inner]
    for narrowing in range(_NARROWINGS + 1):
        for point, error in zip(inner, inner_errors, strict=True):
            factor, least = np.where(error < least, point, factor), np.minimum(error, least)
        if narrowing == _NARROWINGS:
            break
        go_left = inner_errors[0] < inner_errors[1]
        left, right = np.where(go_left, left, inner[0]), np.where(go_left, inner[1], right)
        fresh = np.where(go_left, right - _GOLDEN * (right - left), left + _GOLDEN * (right - left))
        error = score(fresh[None])[0]
        inner = [np.where(go_left, fresh, inner[1]), np.where(go_left, inner[0], fresh)]
        inner_errors = [np.where(go_left, error, inner_errors[1]), np.where(go_left, inner_errors[0], error)]
    return factor, least
