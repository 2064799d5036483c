"""REQuant: one clipping factor of least squared error, by a guarded golden section or by alternation."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from fewbit.ranges.grid_search import (
    Ends,
    Error,
    Floats,
    Observed,
    SquaredError,
    best_factor,
    error_of_rows,
    levels_of,
    observed,
    split_rows,
)
from fewbit.ranges.histogram import DEFAULT_BINS, Histogram, check_bins
from fewbit.ranges.minmax import MinMax
from fewbit.ranges.power_grid import EXPONENTS, PowerGrids, find_power_grids
from fewbit.ranges.range_finder import Range
from fewbit.spec import Frozen, QuantSpec

_GOLDEN_WIDTH = 1e-3
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_MOST_ALTERNATIONS = 100


class REQuant(Frozen):
    """One factor of both ends, in (0, 1], of least squared error.

    ``alpha* = argmin over alpha of ||W - Q(W; alpha low, alpha high)||^2``. The error is convex only between
    the factors at which a code changes, so a grid ``alpha = k / steps`` finds the valley, one of two local
    solvers goes down in it, and the best of solver, grid and alpha = 1 is kept:

    - "golden": golden section between the neighbours of the best grid point, to a width of 0.001.
    - "alternation": for fixed codes q the best step is ``S = (q.w) / (q.q)``; then new codes, until none
      changes. No step of it makes the error larger.

    Source: B. Yang et al., Quantization Range Estimation for Convolutional Neural Networks, 2025,
        arXiv 2510.04044; alternation: S. P. Lloyd, Least squares quantization in PCM, 1982, for a uniform
        grid.
    Differs: per channel and for activations too (a histogram in closed form); asymmetric ranges keep the
        ratio of their ends; guarded by a grid, for the error has more than one valley; powers of two are
        not alternated. The paper's transformed weight space is that of weights with grid = "power", whose
        exponent is searched together with the factor (`fewbit.ranges.power_grid`).

    Attributes:
        refine: The local solver: "golden" or "alternation".
        steps: Factors of the guarding grid.
        exponents: Of power grids, to choose from; each above 0 and at most 1.
        bins: Histogram bins on each side of zero: a power of two, 1024 to 16384.

    >>> finder = REQuant().start()
    >>> finder.observe(torch.randn(10000, generator=torch.Generator().manual_seed(0)))
    >>> found = finder.find(QuantSpec(bits=3, symmetric=True, signed=True))
    >>> 1.7 < found.high < 2.2
    True
    """

    refine: Literal["golden", "alternation"] = "golden"
    steps: int = Field(40, ge=10, le=1000)
    exponents: tuple[float, ...] = EXPONENTS
    bins: int = Field(DEFAULT_BINS, ge=1024, le=16384)

    _bins = field_validator("bins")(check_bins)

    def start(self, name: str = "tensor") -> REQuantFinder:
        """Begin to observe one tensor."""
        return REQuantFinder(name, self)

    def of_weights(self, rows: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ends (R,) of each row of weights (R, K) that give its K values the least error."""
        ends = [self._of_part(part, spec) for part in split_rows(rows)]
        return torch.cat([low for low, _ in ends]), torch.cat([high for _, high in ends])

    def _of_part(self, rows: torch.Tensor, spec: QuantSpec) -> Ends:
        low, high = MinMax().of_weights(rows, spec)
        error = error_of_rows(rows, low, high, spec, "requant")
        factor = self.best(error, len(rows))
        if self.refine == "alternation" and not spec.power_of_two:
            start = factor
            factor = _alternate_rows(rows, low, high, factor, spec)
            better = error(factor[None], factor[None])[0] <= error(start[None], start[None])[0]
            factor = np.where(better, factor, start)  # float32 may round a tie the other way
        return low * low.new_tensor(factor), high * high.new_tensor(factor)

    def power_grids(self, rows: torch.Tensor, spec: QuantSpec) -> PowerGrids:
        """Return the power grid of each row of weights (R, K); raises as `find_power_grids`."""
        return find_power_grids(rows, spec, self.exponents, self.steps)

    def best(self, error: Error, rows: int) -> Floats:
        """Return the factor (rows,) of least error before any alternation."""
        narrowings = math.ceil(math.log(_GOLDEN_WIDTH * self.steps / 2) / math.log(_GOLDEN_RATIO))
        if self.refine == "alternation":
            narrowings = 0
        factor, least = best_factor(lambda f: error(f, f), rows, self.steps, max(0, narrowings))
        whole = np.ones((1, rows))
        return np.where(least < error(whole, whole)[0], factor, 1.0)


class REQuantFinder:
    """A histogram a tensor."""

    __slots__ = ("histogram", "method")

    def __init__(self, name: str, method: REQuant) -> None:
        self.method = method
        self.histogram = Histogram(name, method.bins)

    def observe(self, x: torch.Tensor) -> None:
        """Take in the values of one batch; raises `NetworkError` where one is not finite."""
        self.histogram.observe(x)

    def find(self, spec: QuantSpec) -> Range:
        """Return the range for a grid; raises `DataError` where nothing was observed."""
        seen = observed(self.histogram, spec, "requant")
        if seen.low == seen.high:
            return seen.range(seen.low, seen.high)
        error = SquaredError(seen.density, seen.levels, spec.power_of_two)
        factor = float(
            self.method.best(lambda a, b: error.of(seen.low * a[:, 0], seen.high * b[:, 0])[:, None], 1)[0]
        )
        if self.method.refine == "alternation" and not spec.power_of_two:
            factor = _alternate(error, seen, factor)
        return seen.range(seen.low * factor, seen.high * factor)


def _alternate(error: SquaredError, seen: Observed, factor: float) -> float:
    """Return the factor at which the codes and their best step agree; at most 1, as min-max is."""
    whole = (seen.high - seen.low) / seen.levels
    for _ in range(_MOST_ALTERNATIONS):
        step = error.best_scale(seen.low * factor, seen.high * factor)
        better = min(step / whole, 1.0)
        if not better > 0 or math.isclose(better, factor, rel_tol=1e-6):
            break
        factor = better
    return factor


def _alternate_rows(
    rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, factor: Floats, spec: QuantSpec
) -> Floats:
    """Return the factors (R,) at which the codes of each row and their best step agree; at most 1."""
    levels, least, greatest = levels_of(spec, False, "requant"), *spec.code_range()
    whole = (high if spec.symmetric else high - low)[:, None].double() / levels
    whole = torch.where(whole > 0, whole, 1.0)
    zero = torch.zeros_like(whole)
    if not spec.symmetric:
        zero = (least - low[:, None].double() / whole).round_().clamp_(least, greatest)
    values, factors = rows.double(), torch.as_tensor(factor, device=rows.device)[:, None]
    codes = torch.zeros_like(values)
    for _ in range(_MOST_ALTERNATIONS):
        fresh = (values / (whole * factors)).round_().add_(zero).clamp_(least, greatest).sub_(zero)
        if torch.equal(fresh, codes):
            break
        codes = fresh
        weight = codes.square().sum(1, keepdim=True)
        step = (codes * values).sum(1, keepdim=True) / weight
        factors = torch.where(weight > 0, (step / whole).clamp(max=1.0), factors)
    return np.asarray(factors[:, 0].cpu().numpy())
