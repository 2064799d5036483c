"""Power grids: symmetric grids of weights whose values lie closer together near zero; for storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fewbit.errors import RecipeError
from fewbit.ranges.grid_search import Floats, Score, best_factor, levels_of, split_rows
from fewbit.spec import QuantSpec

EXPONENTS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class PowerGrids:
    """One grid a row of weights: code q stands for ``sign(q) |q step|^(1 / exponent)``.

    The codes are uniform in the transformed weight ``u = sign(w) |w|^exponent``; with exponent 1 the grid is
    the uniform one. With any other an integer engine cannot multiply the codes: it has to look each up in a
    table of the ``2 top + 1`` values, or the file holds the codes and they become floats when it is loaded.

    Attributes:
        exponent: Float64 (R,), above 0, at most 1.
        step: Of the transformed weights, float64 (R,).
        top: Largest code; the smallest is ``-top``.
        error: Sum of squared errors of the weights themselves, float64 (R,).
    """

    exponent: torch.Tensor
    step: torch.Tensor
    top: int
    error: torch.Tensor

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the codes of rows of weights (R, K), int8."""
        u = rows.double().abs().pow(self.exponent[:, None])
        codes = (u / self.step[:, None]).round_().clamp_(max=self.top)
        return torch.copysign(codes, rows.double()).to(torch.int8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weights (R, K) of codes, float32."""
        u = codes.double() * self.step[:, None]
        return torch.copysign(u.abs().pow(1 / self.exponent[:, None]), u).float()


def find_power_grids(
    rows: torch.Tensor, spec: QuantSpec, exponents: Sequence[float] = EXPONENTS, steps: int = 100
) -> PowerGrids:
    """Return the power grid of least squared error of each row of weights.

    ``argmin over p, alpha of ||w - T^-1(Q(T(w); alpha max |T(w)|))||^2`` with ``T(w) = sign(w) |w|^p``: the
    error is that of the weights, not of the transformed ones. alpha is found as `requant` does.

    Source: B. Yang et al., Quantization Range Estimation for Convolutional Neural Networks, 2025,
        arXiv 2510.04044 (weights quantized in a transformed space).
    Differs: the power family of transforms is ours, the paper's own was not at hand; per channel too.

    Args:
        rows: Weights (R, K), one grid a row.
        spec: Symmetric; its bits are those of a code.
        exponents: To choose from, each above 0 and at most 1.
        steps: Factors alpha of the guarding grid.

    Raises:
        RecipeError: The spec is not symmetric or has no step, or an exponent is out of its bounds.

    >>> w = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    >>> spec = QuantSpec(bits=4, symmetric=True, signed=True)
    >>> plain, power = find_power_grids(w, spec, [1.0]), find_power_grids(w, spec)
    >>> float(power.exponent[0]) < 1 and bool(power.error < 0.95 * plain.error)
    True
    """
    if not spec.symmetric:
        raise RecipeError("power grid: is symmetric about zero; give a spec with symmetric = true")
    if not exponents or not all(0 < p <= 1 for p in exponents):
        raise RecipeError(f"power grid: exponents are {list(exponents)}; give some above 0, at most 1")
    top = levels_of(spec.model_copy(update={"signed": True}), False, "power grid")
    parts = [_of_part(part, top, exponents, steps) for part in split_rows(rows)]
    exponent, step, error = (torch.cat(column) for column in zip(*parts, strict=True))
    return PowerGrids(exponent, step, top, error)


def _of_part(
    rows: torch.Tensor, top: int, exponents: Sequence[float], steps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    magnitudes = rows.abs().double()
    least = magnitudes.new_full((len(rows),), torch.inf)
    exponent, step = torch.ones_like(least), torch.ones_like(least)
    for p in sorted(exponents, reverse=True):  # of equal errors the grid nearest to the uniform one
        u = magnitudes.pow(p)
        whole = u.amax(1) / top
        whole = torch.where(whole > 0, whole, 1.0)
        factor, error = best_factor(_error(magnitudes, u, whole, top, p), len(rows), steps)
        found = torch.as_tensor(error, device=rows.device)
        better = found < least
        least = torch.where(better, found, least)
        exponent = torch.where(better, torch.full_like(exponent, p), exponent)
        step = torch.where(better, whole * torch.as_tensor(factor, device=rows.device), step)
    return exponent, step, least


def _error(magnitudes: torch.Tensor, u: torch.Tensor, whole: torch.Tensor, top: int, p: float) -> Score:
    table = torch.arange(top + 1, dtype=torch.float64, device=u.device).pow(1 / p)

    def error(factors: Floats) -> Floats:
        found = []
        for factor in torch.as_tensor(factors, device=u.device):
            step = (whole * factor)[:, None]
            codes = (u / step).round_().clamp_(max=top).long()
            away = table[codes].mul_(step.pow(1 / p)).sub_(magnitudes)
            found.append(away.square_().sum(1))
        return np.asarray(torch.stack(found).cpu().numpy())

    return error
