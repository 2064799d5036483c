"""Searching the ends of a range for the least error of its grid: of a histogram, or of rows of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fewbit.errors import RecipeError
from fewbit.numerics import round_up_to_power_of_two
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
    """The squared error of grids over a density, in closed form: cost does not grow with the values.

    With N(b) the values below b and ``G(b)`` its integral, ``G(b) = sum over x < b of (b - x)``, a grid of
    step S whose largest value is v errs by::

        sum (x - v)^2 - 2 S sum over the borders b between two codes of G(b)

    Args:
        density: The values; they lie evenly within each bin, the exact zeros have no error.
        levels: Steps of the grid: its codes less one.
        power_of_two: Grids have the least step that covers their range and is a power of two.
    """

    def __init__(self, density: Density, levels: int, power_of_two: bool = False) -> None:
        edges, counts = density.edges, density.counts.astype(np.float64)
        left, right, widths = edges[:-1], edges[1:], np.diff(edges)
        below = np.concatenate([[0.0], np.cumsum(counts)])
        integral = np.concatenate([[0.0], np.cumsum((below[:-1] + counts / 2) * widths)])
        heights = np.divide(counts, widths, out=np.zeros_like(counts), where=widths > 0)
        # One stretch before the first edge and one behind the last.
        self._edges, self._begins = edges, np.concatenate([edges[:1], edges])
        self._below, self._integral = np.concatenate([[0.0], below]), np.concatenate([[0.0], integral])
        self._halves = np.concatenate([[0.0], heights / 2, [0.0]])
        self._number = float(below[-1])
        self._first = float((counts * (left + right) / 2).sum())
        self._second = float((counts * (left**2 + left * right + right**2) / 3).sum())
        self._levels, self._power_of_two = levels, power_of_two

    def of(self, low: Floats, high: Floats) -> Floats:
        """Return the summed squared error (C,) of the grids over ``[low, high]``, each end (C,)."""
        scale = _steps((high - low) / self._levels, self._power_of_two)
        zero = np.clip(np.rint(-low / scale), 0, self._levels)
        top = (self._levels - zero) * scale
        borders = (np.arange(self._levels) + 0.5 - zero[:, None]) * scale[:, None]
        shared = self._at(borders)[0].sum(1)
        whole = self._second - 2 * top * self._first + top**2 * self._number
        return np.asarray(whole - 2 * scale * shared)

    def best_scale(self, low: float, high: float) -> float:
        """Return the step of least error for the codes that the grid over ``[low, high]`` gives.

        ``S = sum (q x) / sum (q q)``, q the code less the zero point; NaN where every value has the code 0.
        """
        scale = (high - low) / self._levels
        codes = np.arange(self._levels + 1) - np.clip(np.rint(-low / scale), 0, self._levels)
        borders = (codes[:-1] + 0.5) * scale
        integral, number = self._at(borders)
        first = np.diff(borders * number - integral, prepend=0.0, append=self._first)
        weight = float((codes**2 * np.diff(number, prepend=0.0, append=self._number)).sum())
        return float((codes * first).sum()) / weight if weight > 0 else np.nan

    def _at(self, borders: Floats) -> tuple[Floats, Floats]:
        """Return G and N at each border."""
        at = np.searchsorted(self._edges, borders, side="right")
        reach = borders - self._begins.take(at)
        inside = self._halves.take(at) * reach
        number = self._below.take(at)
        return self._integral.take(at) + (number + inside) * reach, number + 2 * inside


class PowerError:
    """The error ``|Q(x) - x|^power`` of grids over a density, by its integral over each bin.

    With F the odd function ``F(t) = sign(t) |t|^(power + 1) / (power + 1)``, code q(e) and value v(e) of an
    edge e and step S, the integral up to e is ``F(e - v(e)) + 2 q(e) F(S / 2)``: each border between two
    codes adds the same.

    Args:
        density: The values; they lie evenly within each bin, the exact zeros have no error.
        levels: Steps of the grid: its codes less one.
        power: Power of the error, at least 1.
        power_of_two: Grids have the least step that covers their range and is a power of two.
    """

    def __init__(self, density: Density, levels: int, power: float, power_of_two: bool = False) -> None:
        counts, widths = density.counts.astype(np.float64), np.diff(density.edges)
        points = np.flatnonzero((widths <= 0) & (counts > 0))
        self._points = density.edges[:-1][points], counts[points]
        heights = np.divide(counts, widths, out=np.zeros_like(counts), where=widths > 0)
        drops = -np.diff(heights, prepend=0.0, append=0.0)  # how much less dense it is behind each edge
        used = np.flatnonzero(drops)
        self._edges, self._drops = density.edges[used], drops[used]
        self._levels, self._power, self._power_of_two = levels, power, power_of_two

    def of(self, low: Floats, high: Floats) -> Floats:
        """Return the summed error (C,) of the grids over ``[low, high]``, each end (C,)."""
        many = max(1, _DENSE // (len(self._edges) + 1))
        parts = [self._of(low[i : i + many], high[i : i + many]) for i in range(0, len(low), many)]
        return np.concatenate(parts)

    def _of(self, low: Floats, high: Floats) -> Floats:
        scale = _steps((high - low) / self._levels, self._power_of_two)[:, None]
        zero = np.clip(np.rint(-low[:, None] / scale), 0, self._levels)
        found = self._integral(self._edges, scale, zero) @ self._drops
        points, counts = self._points
        if len(points):
            found += np.abs(self._residue(points, scale, zero)[0]) ** self._power @ counts
        return np.asarray(found)

    def _integral(self, edges: Floats, scale: Floats, zero: Floats) -> Floats:
        residue, codes = self._residue(edges, scale, zero)
        above = self._power + 1
        return (np.copysign(np.abs(residue) ** above, residue) + 2 * codes * (scale / 2) ** above) / above

    def _residue(self, edges: Floats, scale: Floats, zero: Floats) -> tuple[Floats, Floats]:
        codes = np.clip(np.rint(edges / scale), -zero, self._levels - zero)
        return edges - codes * scale, codes


def _steps(covering: Floats, power_of_two: bool) -> Floats:
    return round_up_to_power_of_two(covering) if power_of_two else covering


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
    error: SquaredError | PowerError = SquaredError(seen.density, seen.levels, spec.power_of_two)
    if power != 2:
        error = PowerError(seen.density, seen.levels, power, spec.power_of_two)
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
        if spec.power_of_two:
            scales = scales.new_tensor(round_up_to_power_of_two(scales.cpu().numpy()))
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
