"""Searching the ends of a range for the least error of its grid: of a histogram, or of rows of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fewbit.errors import RecipeError
from fewbit.ranges.histogram import Density, Histogram
from fewbit.ranges.minmax import MinMax
from fewbit.ranges.range_finder import Range, range_of_extremes
from fewbit.spec import QuantSpec

Floats = NDArray[np.float64]
Error = Callable[[Floats, Floats], Floats]  # factors of both ends, each (candidates, rows), to errors
Ends = tuple[torch.Tensor, torch.Tensor]  # low and high ends (R,) of rows of weights
Score = Callable[[Floats], Floats]  # factors (candidates, rows) to errors (candidates, rows)
_GOLDEN = (5**0.5 - 1) / 2
_CHUNK = 32768  # weights judged together: one thread, within the cache
_DENSE = 65536  # edges judged together


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

    def of(self, low: Floats, high: Floats) -> Floats:
        """Return the summed squared error (C,) of the grids over ``[low, high]``, each end (C,)."""
        scale = ((high - low) / self._levels)[:, None]
        zero = np.clip(np.rint(-low[:, None] / scale), 0, self._levels)
        values = (np.arange(self._levels + 1) - zero) * scale
        number, first, second = self._within(values[:, :-1] + scale / 2)
        return np.asarray((second - 2 * values * first + values**2 * number).sum(1))

    def best_scale(self, low: float, high: float) -> float:
        """Return the step of least error for the codes that the grid over ``[low, high]`` gives.

        ``S = sum (q x) / sum (q q)``, q the code less the zero point; NaN where every value has the code 0.
        """
        scale = (high - low) / self._levels
        codes = np.arange(self._levels + 1) - np.clip(np.rint(-low / scale), 0, self._levels)
        number, first, _ = self._within(((codes[:-1] + 0.5) * scale)[None])
        weight = float((codes**2 * number).sum())
        return float((codes * first).sum()) / weight if weight > 0 else np.nan

    def _within(self, borders: Floats) -> list[Floats]:
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


class PowerError:
    """The error ``|Q(x) - x|^power`` of grids over a density, by its integral over each bin.

    With F the odd function ``F(t) = sign(t) |t|^(power + 1) / (power + 1)``, code q(e) and value v(e) of an
    edge e and step S, the integral up to e is ``F(e - v(e)) + 2 q(e) F(S / 2)``: each border between two
    codes adds the same.

    Args:
        density: The values; they lie evenly within each bin, the exact zeros have no error.
        levels: Steps of the grid: its codes less one.
        power: Power of the error, at least 1.
    """

    def __init__(self, density: Density, levels: int, power: float) -> None:
        counts = density.counts.astype(np.float64)
        widths = np.diff(density.edges)
        used = np.flatnonzero(counts)
        narrow = widths[used] <= 0
        self._points = density.edges[:-1][used[narrow]], counts[used[narrow]]
        spread = used[~narrow]
        self._left, self._right = density.edges[spread], density.edges[spread + 1]
        self._heights = counts[spread] / widths[spread]
        self._levels, self._power = levels, power

    def of(self, low: Floats, high: Floats) -> Floats:
        """Return the summed error (C,) of the grids over ``[low, high]``, each end (C,)."""
        many = max(1, _DENSE // (len(self._left) + 1))
        parts = [self._of(low[i : i + many], high[i : i + many]) for i in range(0, len(low), many)]
        return np.concatenate(parts)

    def _of(self, low: Floats, high: Floats) -> Floats:
        scale = ((high - low) / self._levels)[:, None]
        zero = np.clip(np.rint(-low[:, None] / scale), 0, self._levels)
        whole = self._integral(self._right, scale, zero) - self._integral(self._left, scale, zero)
        points, counts = self._points
        alone = np.abs(self._residue(points, scale, zero)[0]) ** self._power
        return np.asarray(whole @ self._heights + alone @ counts)

    def _integral(self, edges: Floats, scale: Floats, zero: Floats) -> Floats:
        residue, codes = self._residue(edges, scale, zero)
        above = self._power + 1
        return (np.sign(residue) * np.abs(residue) ** above + 2 * codes * (scale / 2) ** above) / above

    def _residue(self, edges: Floats, scale: Floats, zero: Floats) -> tuple[Floats, Floats]:
        codes = np.clip(np.rint(edges / scale), -zero, self._levels - zero)
        return edges - codes * scale, codes


@dataclass(frozen=True)
class Observed:
    """One tensor, as the grid of a spec sees it.

    Attributes:
        density: Its values; of a grid that mirrors itself their magnitudes, for it errs on both alike.
        low: Lower end of the range that holds every value; 0 of a mirrored grid.
        high: Upper end.
        mirrored: Signed codes, symmetric: the range is ``[-high, high]``.
        levels: Steps of the grid between `low` and `high`.
    """

    density: Density
    low: float
    high: float
    mirrored: bool
    levels: int

    def range(self, low: float, high: float) -> Range:
        """Return the range of two ends."""
        return Range(low=-high if self.mirrored else low, high=high)


def observed(histogram: Histogram, spec: QuantSpec, method: str) -> Observed:
    """Return how a grid sees a tensor; `method` is what errors are called by.

    Raises:
        DataError: No value was observed.
        RecipeError: The grid has no step.
    """
    values = histogram.density()
    whole = range_of_extremes(histogram.low, histogram.high, spec)
    low, high = float(np.min(whole.low)), float(np.max(whole.high))
    levels = levels_of(spec, low == 0, method)
    mirrored = spec.symmetric and low < 0
    if mirrored:
        values, low = histogram.magnitudes(), 0.0
    return Observed(values, low, high, mirrored, levels)


def levels_of(spec: QuantSpec, unsigned: bool, method: str) -> int:
    """Return the steps of a grid; of a mirrored grid those above zero.

    Raises:
        RecipeError: There is none.
    """
    least, greatest = spec.code_range(unsigned)
    levels = greatest - (0 if spec.symmetric else least)
    if levels < 1:
        raise RecipeError(
            f"{method}: {spec.bits}-bit symmetric signed codes hold nothing but 0; give 2 bits or more"
        )
    return levels


def search_histogram(
    histogram: Histogram, spec: QuantSpec, steps: int, method: str, power: float = 2.0
) -> Range:
    """Return the range of a tensor with the least error ``|Q(x) - x|^power``; raises like `observed`."""
    seen = observed(histogram, spec, method)
    low, high = seen.low, seen.high
    if low == high:
        return seen.range(low, high)
    error: SquaredError | PowerError = SquaredError(seen.density, seen.levels)
    if power != 2:
        error = PowerError(seen.density, seen.levels, power)
    ends = search_ends(
        lambda a, b: error.of(low * a[:, 0], high * b[:, 0])[:, None], 1, low < 0 < high, steps
    )
    return seen.range(low * float(ends[0, 0]), high * float(ends[1, 0]))


def search_rows(rows: torch.Tensor, spec: QuantSpec, steps: int, method: str, power: float = 2.0) -> Ends:
    """Return the ends (R,) of each row of weights (R, K) of least error; raises like `levels_of`."""
    ends = []
    for part in split_rows(rows):
        low, high = MinMax().of_weights(part, spec)
        error = error_of_rows(part, low, high, spec, method, power)
        factors = search_ends(error, len(part), not spec.symmetric, steps)
        ends.append((low * low.new_tensor(factors[0]), high * high.new_tensor(factors[1])))
    return torch.cat([low for low, _ in ends]), torch.cat([high for _, high in ends])


def split_rows(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut rows of weights (R, K) into parts that stay in the cache."""
    return torch.split(rows, max(1, _CHUNK // rows.shape[1]))


def error_of_rows(
    rows: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    spec: QuantSpec,
    method: str,
    power: float = 2.0,
) -> Error:
    """Return the error of the grids between factors of the ends (R,) of rows of weights (R, K)."""
    levels, least, greatest = levels_of(spec, False, method), *spec.code_range()
    negated, work = -rows, torch.empty_like(rows)

    def error(of_low: Floats, of_high: Floats) -> Floats:
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
            torch.addcmul(negated, work, scale, out=work)
            if power == 2:
                torch.linalg.vector_norm(work, dim=1, out=found[number])
            else:
                torch.sum(work.abs_().pow_(power), dim=1, out=found[number])
        found = found.double()
        return np.asarray((found.square() if power == 2 else found).cpu().numpy())

    return error


def search_ends(error: Error, rows: int, each_end: bool, steps: int) -> Floats:
    """Return the factors (2, rows) of the low and of the high end that give each row the least error."""
    ends = np.ones((2, rows))
    best = error(ends[:1], ends[1:])[0]

    def improve(start: Floats, which: list[int], candidates: int) -> None:
        nonlocal ends, best

        def score(factor: Floats) -> Floats:
            factors = np.repeat(start[:, None], len(factor), axis=1)
            factors[which] = factor
            return error(factors[0], factors[1])

        factor, least = best_factor(score, rows, candidates)
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


def best_factor(score: Score, rows: int, steps: int, narrowings: int = 10) -> tuple[Floats, Floats]:
    """Return the factor (rows,) of least error and that error: the best of a grid, then golden section.

    Args:
        score: Errors (candidates, rows) of factors (candidates, rows).
        rows: Tensors searched at once.
        steps: Factors of the grid: ``k / steps``, k = 1 to `steps`.
        narrowings: Of a bracket two grid steps wide; 10 leave 1.6 % of a step.
    """
    grid = np.repeat(np.arange(1, steps + 1)[:, None] / steps, rows, axis=1)
    errors = score(grid)
    at = np.argmin(errors, axis=0)
    factor, least = grid[at, 0], errors[at, np.arange(rows)]
    left, right = np.maximum(factor - 1 / steps, 0.5 / steps), np.minimum(factor + 1 / steps, 1.0)
    inner = [right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)]
    inner_errors = [score(point[None])[0] for point in inner]
    for narrowing in range(narrowings + 1):
        for point, error in zip(inner, inner_errors, strict=True):
            factor, least = np.where(error < least, point, factor), np.minimum(error, least)
        if narrowing == narrowings:
            break
        go_left = inner_errors[0] < inner_errors[1]
        left, right = np.where(go_left, left, inner[0]), np.where(go_left, inner[1], right)
        fresh = np.where(go_left, right - _GOLDEN * (right - left), left + _GOLDEN * (right - left))
        error = score(fresh[None])[0]
        inner = [np.where(go_left, fresh, inner[1]), np.where(go_left, inner[0], fresh)]
        inner_errors = [np.where(go_left, error, inner_errors[1]), np.where(go_left, inner_errors[0], error)]
    return factor, least
