"""Scale and zero point from a range; real values to codes and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewbit.errors import InputError

SCALE_FLOOR = 1e-12
_SAME_POWER = 2.0**-20  # what ends rounded to float32 may add to a scale that was a power of two


def round_up_to_power_of_two(scale: ArrayLike) -> NDArray[np.float64]:
    """Return the least power of two that is not below each scale, but for a millionth of it.

    >>> round_up_to_power_of_two([0.2, 0.25, 0.26]).tolist()
    [0.25, 0.25, 0.5]
    """
    mantissa, exponent = np.frexp(np.asarray(scale, np.float64))
    return np.asarray(np.ldexp(1.0, np.where(mantissa <= 0.5 + _SAME_POWER / 2, exponent - 1, exponent)))


def affine_parameters(
    low: ArrayLike,
    high: ArrayLike,
    qmin: int,
    qmax: int,
    name: str = "tensor",
    power_of_two: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scale and zero point of an asymmetric grid.

    With the range widened to hold 0: ``S = (high - low) / (qmax - qmin)``, ``Z = clamp(rint(qmin - low /
    S))``, ties to even. A range of nothing but 0 has S = 1 and Z = clamp(0).

    Args:
        low: Smallest value, a number or one a channel.
        high: Largest value, of the same shape.
        qmin: Smallest code.
        qmax: Largest code.
        name: What to call the tensor in an error.
        power_of_two: Round the scale up to a power of two; then ``Z = clamp(rint(qmin - low / S))``.

    Returns:
        The scale (float32, at least 1e-12) and the zero point (int64), each of the shape of `low`.

    Raises:
        InputError: The range is NaN, infinite or upside down.

    >>> scale, zero_point = affine_parameters(-1.0, 3.0, 0, 255)
    >>> round(float(scale), 7), int(zero_point)
    (0.0156863, 64)
    """
    low_, high_ = _range(low, high, name)
    width = high_ - low_
    scale = np.where(width > 0, np.maximum(width / (qmax - qmin), SCALE_FLOOR), 1.0)
    # As a share of the range, not low / S: a symmetric range then always meets the tie in its middle.
    share = -low_ / np.where(width > 0, width, 1.0)
    if power_of_two:
        scale = round_up_to_power_of_two(scale)
        share = -low_ / scale / (qmax - qmin)
    zero_point = np.clip(np.where(width > 0, np.rint(qmin + (qmax - qmin) * share), 0), qmin, qmax)
    return scale.astype(np.float32), zero_point.astype(np.int64)


def symmetric_scale(
    low: ArrayLike,
    high: ArrayLike,
    qmax: int,
    signed: bool = True,
    name: str = "tensor",
    power_of_two: bool = False,
) -> NDArray[np.float32]:
    """Return the scale of a symmetric grid, whose zero point is 0.

    Signed codes: ``S = max(|low|, |high|) / qmax``, for the restricted range -qmax..qmax and the full one
    alike. Unsigned codes: ``S = high / qmax``; values below 0 saturate. A range of nothing but 0 has S = 1.

    Args:
        low: Smallest value, a number or one a channel.
        high: Largest value, of the same shape.
        qmax: Largest code.
        signed: Codes have a sign.
        name: What to call the tensor in an error.
        power_of_two: Round the scale up to a power of two.

    Returns:
        The scale, float32, at least 1e-12, of the shape of `low`.

    Raises:
        InputError: The range is NaN, infinite or upside down.

    >>> float(symmetric_scale(-1.0, 2.0, 127)) == float(np.float32(2 / 127))
    True
    """
    low_, high_ = _range(low, high, name)
    largest = np.maximum(-low_, high_) if signed else high_
    scale = np.where(largest > 0, np.maximum(largest / qmax, SCALE_FLOOR), 1.0)
    return (round_up_to_power_of_two(scale) if power_of_two else scale).astype(np.float32)


def sample_parameters(
    x: NDArray[np.floating], qmin: int, qmax: int, name: str = "tensor"
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scale and zero point of each sample of a batch: what dynamic quantization uses.

    Parameters taken over the batch would make one image's result depend on the images beside it, and so tell
    about them; these reduce over every axis but the first.

    Args:
        x: ``(N, ...)``.
        qmin: Smallest code.
        qmax: Largest code.
        name: What to call the tensor in an error.

    Returns:
        Scale (float32) and zero point (int64), each ``(N,)``.

    Raises:
        InputError: A value is NaN or infinite.

    Source: C. Foerster et al., Quantamination, 2026, arXiv 2604.26505.
    """
    rows = np.asarray(x).reshape(len(x), -1)
    return affine_parameters(rows.min(axis=1), rows.max(axis=1), qmin, qmax, name)


def code_dtype(qmin: int, qmax: int) -> type[np.uint8] | type[np.int8] | type[np.int32]:
    """Return the type that stores codes qmin..qmax: uint8, int8, or int32 where neither holds them.

    >>> code_dtype(0, 255).__name__, code_dtype(-127, 127).__name__
    ('uint8', 'int8')
    """
    if qmin >= 0 and qmax <= 255:
        return np.uint8
    return np.int8 if qmin >= -128 and qmax <= 127 else np.int32


def quantize(
    x: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    name: str = "tensor",
) -> NDArray[Any]:
    """Return codes, as ONNX QuantizeLinear does: ``saturate(rint(x / S) + Z)`` in float32, ties to even.

    Args:
        x: Real values.
        scale: One scale, or one for each index along `axis`.
        zero_point: Of the shape of `scale`, or one.
        qmin: Smallest code.
        qmax: Largest code.
        axis: The axis of per channel parameters (0 of ``(N, ...)`` for per sample ones).
        name: What to call the tensor in an error.

    Returns:
        Codes of type `code_dtype`, of the shape of `x`. Widen them before any arithmetic: uint8 wraps around.

    Raises:
        InputError: A value is NaN, or the parameters do not fit the axis.

    >>> quantize([-1.2, -1, 0, 0.5, 1.2345, 3], 4 / 255, 64, 0, 255).tolist()
    [0, 0, 64, 96, 143, 255]
    """
    values = np.asarray(x, np.float32)
    with np.errstate(over="ignore"):
        codes = np.asarray(values / _along(np.asarray(scale, np.float32), axis, values, name))
    np.rint(codes, out=codes)
    codes += _along(np.asarray(zero_point, np.float32), axis, values, name)
    np.clip(codes, qmin, qmax, out=codes)
    if codes.size and np.isnan(codes.min()):
        raise InputError(
            f"{name}: has NaN, which has no code; look for NaN in the weights or images that produced it"
        )
    return codes.astype(code_dtype(qmin, qmax))


def dequantize(
    codes: NDArray[Any],
    scale: ArrayLike,
    zero_point: ArrayLike,
    axis: int | None = None,
    name: str = "tensor",
) -> NDArray[np.float32]:
    """Return real values, as ONNX DequantizeLinear does: ``(q - Z) S`` rounded once to float32.

    Args:
        codes: Codes of any integer type.
        scale: One scale, or one for each index along `axis`.
        zero_point: Of the shape of `scale`, or one.
        axis: The axis of per channel parameters.
        name: What to call the tensor in an error.

    Returns:
        float32 of the shape of `codes`.

    Raises:
        InputError: The parameters do not fit the axis.

    >>> dequantize(np.array([0, 64, 255], np.uint8), 0.5, 64).tolist()
    [-32.0, 0.0, 95.5]
    """
    # A difference of codes of 16 bits or fewer is exact in float32, so the product rounds once there too.
    wide = np.float32 if codes.dtype.itemsize <= 2 else np.float64
    offset = _along(np.asarray(zero_point).astype(wide), axis, codes, name)
    values = np.asarray(np.subtract(codes, offset, dtype=wide))
    values *= _along(np.asarray(scale, np.float32).astype(wide), axis, codes, name)
    return values.astype(np.float32, copy=False)


def quantize_bias(bias: ArrayLike, x_scale: ArrayLike, w_scale: ArrayLike) -> NDArray[np.int32]:
    """Return the int32 codes of a bias: ``rint(b / (Sx Sw[o]))``, ties to even, saturated; zero point 0.

    Args:
        bias: ``(O,)``.
        x_scale: Scale of the layer's input.
        w_scale: Scale of the weights, one or ``(O,)``.

    Returns:
        ``(O,)``.

    Raises:
        InputError: A bias is NaN.

    >>> quantize_bias([0.5, -0.25], 0.02, [0.01, 0.005]).tolist()
    [2500, -2500]
    """
    unit = np.asarray(x_scale, np.float32).astype(np.float64) * np.asarray(w_scale, np.float32).astype(
        np.float64
    )
    codes = np.rint(np.asarray(bias, np.float64) / unit)
    if np.isnan(codes).any():
        raise InputError("bias: has NaN, which has no code; look for NaN in the weights")
    limits = np.iinfo(np.int32)
    return np.clip(codes, limits.min, limits.max).astype(np.int32)


def clamp_range(
    low: float, high: float, scale: float, zero_point: int, qmin: int, qmax: int
) -> tuple[int, int]:
    """Return the codes that a fused activation clamps to: ReLU is (0, inf), ReLU6 is (0, 6).

    >>> clamp_range(0, 6, 0.1, 100, 0, 255)
    (100, 160)
    >>> clamp_range(0, float("inf"), 0.1, 100, 0, 255)
    (100, 255)
    """
    bounds = np.clip(np.rint(np.array([low, high]) / scale) + zero_point, qmin, qmax)
    return int(bounds[0]), int(bounds[1])


def fold_batch_norm(
    weight: ArrayLike,
    bias: ArrayLike | None,
    gamma: ArrayLike,
    beta: ArrayLike,
    mean: ArrayLike,
    variance: ArrayLike,
    epsilon: float,
    axis: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return weight and bias of a convolution that does the BatchNorm after it too.

    ``s = gamma / sqrt(variance + epsilon)``, ``W' = s W``, ``b' = beta + s (b - mean)``, in float64.

    Args:
        weight: ``(O, I / g, kh, kw)``, or with the output channels on another axis.
        bias: ``(O,)``, or none for zeros.
        gamma: ``(O,)``, and so the next three.
        beta: Shift.
        mean: Running mean.
        variance: Running variance.
        epsilon: Of the BatchNorm.
        axis: The output axis: 0, or 1 of a transposed convolution.

    Returns:
        The weight and the bias, float64.
    """
    factor = np.asarray(gamma, np.float64) / np.sqrt(np.asarray(variance, np.float64) + epsilon)
    values = np.asarray(weight, np.float64)
    shift = np.asarray(mean, np.float64) if bias is None else np.asarray(mean, np.float64) - np.asarray(bias)
    return values * _along(factor, axis, values, "BatchNorm"), np.asarray(beta, np.float64) - factor * shift


def _range(low: ArrayLike, high: ArrayLike, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low_, high_ = np.asarray(low, np.float64), np.asarray(high, np.float64)
    shown = f"its range is [{np.min(low_):g}, {np.max(high_):g}]"
    if not (np.isfinite(low_).all() and np.isfinite(high_).all()):
        raise InputError(f"{name}: {shown}, not finite; look for NaN or infinity in the weights or images")
    if (low_ > high_).any():
        raise InputError(f"{name}: {shown}, upside down; give the smallest value first")
    return np.minimum(low_, 0.0), np.maximum(high_, 0.0)


def _along(values: NDArray[Any], axis: int | None, x: NDArray[Any], name: str) -> NDArray[Any]:
    """Shape per channel values to broadcast along one axis of `x`; a single value is left alone."""
    if values.size == 1:
        return values.reshape(())
    if axis is None or not -x.ndim <= axis < x.ndim or values.shape != (x.shape[axis],):
        raise InputError(
            f"{name}: has shape {x.shape} and parameters {values.shape} along axis {axis}; "
            "give one value, or one for each index of that axis"
        )
    shape = [1] * x.ndim
    shape[axis] = values.size
    return values.reshape(shape)
