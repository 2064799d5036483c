"""Sets of values that codes stand for, and the way between codes and values.

A grid is one function: it gives, for each code of a `QuantSpec` from the smallest to the largest, the value
that the code stands for at scale 1 and zero point 0. A new set of values (powers of two, ternary, ...) is
one such function and one row of `GRIDS`.

A value x of a tensor with scale S and zero point Z goes to the nearest ``S (v - Z)``, v a value of the grid;
Z is 0 except for the uniform grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewbit.errors import RecipeError, suggest
from fewbit.spec import QuantSpec

Grid = Callable[[QuantSpec, bool], NDArray[np.float64]]


def uniform(spec: QuantSpec, unsigned: bool = False) -> NDArray[np.float64]:
    """Return the whole numbers from qmin to qmax.

    >>> uniform(QuantSpec(bits=2)).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    qmin, qmax = spec.code_range(unsigned)
    return np.arange(qmin, qmax + 1, dtype=np.float64)


def power(spec: QuantSpec, exponent: float) -> NDArray[np.float64]:
    """Return ``sign(q) |q|^(1 / exponent)`` of each code q: values that lie closer together near zero.

    A grid of its own kind, for its values depend on more than the spec: `fewbit.ranges.power_grid` finds the
    exponent.

    Args:
        spec: Symmetric.
        exponent: Above 0, at most 1, which gives the whole numbers.

    >>> power(QuantSpec(bits=3, symmetric=True, signed=True), 0.5).tolist()
    [-9.0, -4.0, -1.0, 0.0, 1.0, 4.0, 9.0]
    """
    codes = uniform(spec)
    return np.asarray(np.sign(codes) * np.abs(codes) ** (1 / exponent))


GRIDS: dict[str, Grid] = {"uniform": uniform}


def find_grid(name: str) -> Grid:
    """Return the grid of a name.

    Raises:
        RecipeError: There is none.
    """
    if name not in GRIDS:
        raise RecipeError(f"grid: no '{name}'{suggest(name, GRIDS)}; there are {', '.join(GRIDS)}")
    return GRIDS[name]


def grid_values(
    spec: QuantSpec, scale: ArrayLike, zero_point: ArrayLike = 0, unsigned: bool = False
) -> NDArray[np.float64]:
    """Return every value that a tensor of this spec may take, from smallest to largest.

    Args:
        spec: The grid's name and bits.
        scale: One scale, or one a channel ``(C,)``.
        zero_point: Of the shape of `scale`, or one.
        unsigned: The tensor is never negative (see `QuantSpec.signed`).

    Returns:
        ``(levels,)``, or ``(C, levels)``.

    >>> grid_values(QuantSpec(bits=2), 0.5, 1).tolist()
    [-0.5, 0.0, 0.5, 1.0]
    """
    units = find_grid(spec.grid)(spec, unsigned)
    steps, offsets = np.asarray(scale, np.float64)[..., None], np.asarray(zero_point, np.float64)[..., None]
    return (units - offsets) * steps


def encode(
    x: ArrayLike, spec: QuantSpec, scale: ArrayLike, zero_point: ArrayLike = 0, unsigned: bool = False
) -> NDArray[np.int64]:
    """Return the code of the nearest value of the grid; halfway between two, the even code.

    The division by the scale is in float32, so on the uniform grid this equals `fewbit.numerics.quantize`.

    Args:
        x: Real values, not NaN.
        spec: The grid's name and bits.
        scale: What broadcasts to `x`.
        zero_point: What broadcasts to `x`.
        unsigned: The tensor is never negative.

    Returns:
        Codes of the shape of `x`.

    >>> encode([-9.0, 0.25, 0.75, 9.0], QuantSpec(bits=4, signed=True), 0.5).tolist()
    [-8, 0, 2, 7]
    """
    units = find_grid(spec.grid)(spec, unsigned)
    qmin, _ = spec.code_range(unsigned)
    steps = np.asarray(np.asarray(x, np.float32) / np.asarray(scale, np.float32), np.float64)
    wanted = steps + np.asarray(zero_point, np.float64)
    middles = (units[1:] + units[:-1]) / 2
    below = np.searchsorted(middles, wanted, side="left")
    above = np.searchsorted(middles, wanted, side="right")
    # On a middle the two differ by one; the even code of the two is taken.
    return np.asarray(np.where((below + qmin) % 2 == 0, below, above) + qmin, np.int64)


def decode(
    codes: NDArray[Any], spec: QuantSpec, scale: ArrayLike, zero_point: ArrayLike = 0, unsigned: bool = False
) -> NDArray[np.float32]:
    """Return the values of codes, rounded once to float32.

    Args:
        codes: Codes of the spec's range.
        spec: The grid's name and bits.
        scale: What broadcasts to `codes`.
        zero_point: What broadcasts to `codes`.
        unsigned: The tensor is never negative.

    Returns:
        float32 of the shape of `codes`.

    Raises:
        RecipeError: A code is outside the range.

    >>> decode(np.array([0, 4, 15]), QuantSpec(bits=4), 0.5, 4).tolist()
    [-2.0, 0.0, 5.5]
    """
    units = find_grid(spec.grid)(spec, unsigned)
    qmin, qmax = spec.code_range(unsigned)
    places = np.asarray(codes, np.int64) - qmin
    if places.size and not (places.min() >= 0 and places.max() < len(units)):
        raise RecipeError(
            f"codes: reach from {np.min(codes)} to {np.max(codes)}, outside {qmin} to {qmax}; "
            "quantize them first"
        )
    steps = np.asarray(scale, np.float32).astype(np.float64)
    return np.asarray((units[places] - np.asarray(zero_point, np.float64)) * steps, np.float32)
