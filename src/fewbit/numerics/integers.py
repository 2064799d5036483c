"""Fixed point: the arithmetic of an engine that has no floats.

A product of two roundings (the high multiply, then the shift) is normative here, as in gemmlowp; one exact
rounding may differ from it by one code at ties.

Source: B. Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference, 2018, arXiv 1712.05877.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewbit.errors import InputError

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
ADD_SHIFT = 20  # bits of headroom that inputs of a sum get


class Affine(NamedTuple):
    """Scale and zero point of one tensor."""

    scale: float
    zero_point: int


def quantized_multiplier(factor: float) -> tuple[int, int]:
    """Write a positive factor as ``m 2^-31 2^-n`` with m an int32 in [2^30, 2^31).

    Args:
        factor: ``Sx Sw / Sy`` of a layer, mostly below 1.

    Returns:
        m and n; n is negative for factors of 1 and more. 0 gives (0, 0).

    Raises:
        InputError: The factor is negative, NaN or infinite.

    >>> quantized_multiplier(0.002)
    (1099511628, 8)
    """
    if not math.isfinite(factor) or factor < 0:
        raise InputError(f"multiplier: is {factor}; it must be a finite number of at least 0")
    mantissa, exponent = math.frexp(factor)
    m = round(mantissa * 2**31)
    if m == 2**31:
        m, exponent = 2**30, exponent + 1
    return m, -exponent if m else 0


def saturating_doubling_high_multiply(x: ArrayLike, m: int) -> NDArray[np.int64]:
    """Return ``x m / 2^31`` rounded to nearest: SRDHM; ``(-2^31)^2`` saturates to 2^31 - 1.

    Args:
        x: int32 values.
        m: An int32.

    Returns:
        int32 values, as int64.
    """
    product = np.asarray(x, np.int64) * m
    # Division toward zero of the nudged product: an arithmetic shift would round negative ones down.
    up = (product + 2**30) >> 31
    down = -((2**30 - 1 - product) >> 31)
    return np.minimum(np.where(product >= 0, up, down), INT32_MAX)


def rounding_right_shift(x: ArrayLike, n: int) -> NDArray[np.int64]:
    """Return ``x / 2^n`` rounded to nearest, ties away from zero.

    >>> rounding_right_shift([-5, -3, -1, 1, 3, 5], 1).tolist()
    [-3, -2, -1, 1, 2, 3]
    """
    values = np.asarray(x, np.int64)
    mask = (1 << n) - 1
    threshold = (mask >> 1) + (values < 0)
    return (values >> n) + ((values & mask) > threshold)


def multiply_by_quantized_multiplier(x: ArrayLike, m: int, n: int) -> NDArray[np.int64]:
    """Return ``x m 2^-31 2^-n`` in integers: MBQM.

    Args:
        x: int32 values.
        m: Of `quantized_multiplier`.
        n: Of `quantized_multiplier`; a negative one shifts left first, saturating.

    Returns:
        int32 values, as int64.

    >>> multiply_by_quantized_multiplier([12345, -12345, 250, 249], 1099511628, 8).tolist()
    [25, -25, 1, 0]
    """
    values = np.asarray(x, np.int64)
    if n < 0:
        # A left shift of 31 or more saturates all but 0, and 2^31 * 2^31 still fits int64.
        values = np.clip(values * (1 << min(-n, 31)), INT32_MIN, INT32_MAX)
    return rounding_right_shift(saturating_doubling_high_multiply(values, m), min(max(n, 0), 62))


def requantize(x: ArrayLike, factor: float, zero_point: int, qmin: int, qmax: int) -> NDArray[np.int64]:
    """Return output codes of accumulators: ``clamp(MBQM(x, factor) + Z)``.

    Codes of another grid are requantized the same way: x = q - Z of that grid, factor = its scale over the
    new one.

    Args:
        x: int32 accumulators, zero point taken off.
        factor: ``Sx Sw / Sy``.
        zero_point: Of the output.
        qmin: Smallest code, or the fused activation's (`clamp_range`).
        qmax: Largest code.

    Returns:
        Codes as int64.
    """
    return np.clip(
        multiply_by_quantized_multiplier(x, *quantized_multiplier(factor)) + zero_point, qmin, qmax
    )


def add_codes(
    first: ArrayLike,
    second: ArrayLike,
    first_grid: Affine,
    second_grid: Affine,
    out: Affine,
    qmin: int,
    qmax: int,
) -> NDArray[np.int64]:
    """Return the codes of a residual sum, in integers.

    Both inputs are brought to the scale ``2 max(S1, S2) / 2^20``, added, and brought to the output's.

    Args:
        first: Codes.
        second: Codes.
        first_grid: Scale and zero point of `first`.
        second_grid: Of `second`.
        out: Of the sum.
        qmin: Smallest code, or the fused activation's.
        qmax: Largest code.

    Returns:
        Codes as int64.

    >>> grids = Affine(0.02, 10), Affine(0.05, 3), Affine(0.06, 5)
    >>> add_codes([110, 0, 255], [43, 0, 255], *grids, 0, 255).tolist()
    [72, 0, 255]
    """
    twice = 2 * max(first_grid.scale, second_grid.scale)
    total: NDArray[np.int64] = np.zeros((), np.int64)
    for codes, grid in ((first, first_grid), (second, second_grid)):
        shifted = (np.asarray(codes, np.int64) - grid.zero_point) << ADD_SHIFT
        total = total + multiply_by_quantized_multiplier(shifted, *quantized_multiplier(grid.scale / twice))
    return requantize(total, twice / (2**ADD_SHIFT * out.scale), out.zero_point, qmin, qmax)


def multiply_codes(
    first: ArrayLike,
    second: ArrayLike,
    first_grid: Affine,
    second_grid: Affine,
    out: Affine,
    qmin: int,
    qmax: int,
) -> NDArray[np.int64]:
    """Return the codes of an elementwise product in integers (arguments: see `add_codes`)."""
    product = (np.asarray(first, np.int64) - first_grid.zero_point) * (
        np.asarray(second, np.int64) - second_grid.zero_point
    )
    return requantize(product, first_grid.scale * second_grid.scale / out.scale, out.zero_point, qmin, qmax)


def mean_codes(sums: ArrayLike, counts: ArrayLike) -> NDArray[np.int64]:
    """Return means of codes that share one grid: ``(sum +- count / 2) / count``, toward zero.

    Args:
        sums: Sums of codes.
        counts: How many codes each sum has, paddings left out.

    Returns:
        Codes as int64; ties go away from zero.

    >>> mean_codes([47, -46], 4).tolist()
    [12, -12]
    """
    total, count = np.asarray(sums, np.int64), np.asarray(counts, np.int64)
    return np.asarray(np.sign(total) * ((np.abs(total) + count // 2) // count), np.int64)


def multiply_matrices(
    a: NDArray[Any], a_zero_point: int, b: NDArray[Any], b_zero_point: ArrayLike = 0
) -> NDArray[np.int64]:
    """Return ``sum_k (a_ik - Za)(b_kj - Zb)`` by the four terms that an integer engine computes.

    ``sum a b - Za sum_k b - Zb sum_k a + K Za Zb``: the second is known before the run, the third is needed
    only for asymmetric weights.

    Args:
        a: Codes ``(M, K)``.
        a_zero_point: Za.
        b: Codes ``(K, N)``.
        b_zero_point: Zb, one or ``(N,)``.

    Returns:
        ``(M, N)``, exact.
    """
    left, right, zb = a.astype(np.int64), b.astype(np.int64), np.asarray(b_zero_point, np.int64)
    columns, rows = right.sum(axis=0), left.sum(axis=1, keepdims=True)
    inner = left.shape[1]
    return np.asarray(left @ right - a_zero_point * columns - rows * zb + inner * a_zero_point * zb, np.int64)


def accumulator_bound(
    inner: int,
    x_range: tuple[int, int],
    x_zero_point: int,
    w_range: tuple[int, int],
    w_zero_point: int = 0,
    bias: int = 0,
) -> int:
    """Return the largest magnitude that a sum of products of codes can reach, whatever the codes.

    ``K max|qx - Zx| max|qw - Zw| + |b|``.

    Args:
        inner: K, terms of the sum.
        x_range: Smallest and largest input code.
        x_zero_point: Zx.
        w_range: Smallest and largest weight code.
        w_zero_point: Zw.
        bias: Largest magnitude of a bias code.

    Returns:
        The bound; int32 holds the sum when it is below 2^31.

    >>> [accumulator_bound(k, (0, 255), 0, (-127, 127)) < 2**31 for k in (66311, 66312)]
    [True, False]
    """
    x_largest = max(x_range[1] - x_zero_point, x_zero_point - x_range[0])
    w_largest = max(w_range[1] - w_zero_point, w_zero_point - w_range[0])
    return inner * x_largest * w_largest + abs(bias)


def check_accumulator(bound: float, name: str) -> None:
    """Refuse a layer whose sums may not fit an int32 accumulator.

    Args:
        bound: Of `accumulator_bound`, or a tighter one.
        name: The layer.

    Raises:
        InputError: The bound is 2^31 or more.
    """
    if bound >= 2**31:
        raise InputError(
            f"{name}: its sums may reach {bound:.0f}, more than an int32 accumulator holds; "
            "keep this layer in float"
        )
