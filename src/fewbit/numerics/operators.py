"""Operators outside the integer sums: float64 inside, rounded once to float32.

Each takes float32 arrays and returns float32. Attributes (alpha, epsilon, ...) are float32 too, as an ONNX
file stores them. A result does not depend on the other samples of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]


def rescale_accumulator(
    accumulator: NDArray[Any],
    x_scale: ArrayLike,
    w_scale: ArrayLike,
    bias_codes: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    axis: int = 1,
) -> Floats:
    """Return what a layer of integers puts out: ``float32(float64(acc + q_bias) (Sx Sw[o]) + bias)``.

    Args:
        accumulator: Exact sums ``(N, O, ...)`` of any number type.
        x_scale: Scale of the input, one or one a sample ``(N,)``.
        w_scale: Scale of the weights, one or ``(O,)``.
        bias_codes: ``(O,)`` int32 with scale Sx Sw[o], added to the sums.
        bias: ``(O,)`` float, added in float64 before the rounding.
        axis: Where the output channels are in `accumulator`.

    Returns:
        float32 of the shape of `accumulator`.

    >>> rescale_accumulator(np.array([[100, -50]]), 0.5, [0.25, 1.0], bias_codes=[4, 0]).tolist()
    [[13.0, -25.0]]
    """
    channels = [1] * accumulator.ndim
    channels[axis] = -1
    samples = [-1] + [1] * (accumulator.ndim - 1)
    sx = np.asarray(x_scale, np.float32).astype(np.float64)
    sw = np.asarray(w_scale, np.float32).astype(np.float64)
    unit = sx.reshape(samples if sx.size > 1 else ()) * sw.reshape(channels if sw.size > 1 else ())
    sums = accumulator.astype(np.float64)
    if bias_codes is not None:
        sums += np.asarray(bias_codes, np.float64).reshape(channels)
    sums *= unit
    if bias is not None:
        sums += np.asarray(bias, np.float64).reshape(channels)
    return sums.astype(np.float32)


def linear(
    x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Floats:
    """Return a float layer ``alpha x weight^T + beta bias``: float64 inside, rounded once.

    Args:
        x: ``(N, I)`` or ``(..., I)``.
        weight: ``(O, I)``.
        bias: ``(O,)``.
        alpha: Of an ONNX Gemm.
        beta: Of an ONNX Gemm.

    Returns:
        ``(N, O)`` or ``(..., O)``.
    """
    # One product a row: the last bit of a large product may depend on how many rows it has.
    sums = np.matmul(_wide(x)[..., None, :], _wide(weight).T)[..., 0, :] * _attribute(alpha)
    return _narrow(sums if bias is None else sums + _attribute(beta) * _wide(bias))


def add(x: ArrayLike, y: ArrayLike) -> Floats:
    """Return x + y."""
    return _narrow(_wide(x) + _wide(y))


def subtract(x: ArrayLike, y: ArrayLike) -> Floats:
    """Return x - y."""
    return _narrow(_wide(x) - _wide(y))


def multiply(x: ArrayLike, y: ArrayLike) -> Floats:
    """Return x y."""
    return _narrow(_wide(x) * _wide(y))


def divide(x: ArrayLike, y: ArrayLike) -> Floats:
    """Return x / y."""
    return _narrow(_wide(x) / _wide(y))


def relu(x: ArrayLike) -> Floats:
    """Return max(x, 0); exact."""
    return np.maximum(np.asarray(x, np.float32), np.float32(0))


def clip(x: ArrayLike, low: ArrayLike | None = None, high: ArrayLike | None = None) -> Floats:
    """Return min(max(x, low), high); exact. ReLU6 is ``clip(x, 0, 6)``."""
    values = np.asarray(x, np.float32)
    if low is not None:
        values = np.maximum(values, np.asarray(low, np.float32))
    return values if high is None else np.minimum(values, np.asarray(high, np.float32))


def leaky_relu(x: ArrayLike, alpha: float = 0.01) -> Floats:
    """Return x where x >= 0, else alpha x."""
    values = _wide(x)
    return _narrow(np.where(values >= 0, values, _attribute(alpha) * values))


def prelu(x: ArrayLike, slope: ArrayLike) -> Floats:
    """Return x where x >= 0, else slope x; the slope broadcasts to x."""
    values = _wide(x)
    return _narrow(np.where(values >= 0, values, _wide(slope) * values))


def elu(x: ArrayLike, alpha: float = 1.0) -> Floats:
    """Return x where x >= 0, else alpha (exp(x) - 1)."""
    values = _wide(x)
    return _narrow(np.where(values >= 0, values, _attribute(alpha) * np.expm1(np.minimum(values, 0))))


def sigmoid(x: ArrayLike) -> Floats:
    """Return 1 / (1 + exp(-x))."""
    return _narrow(_sigmoid(_wide(x)))


def hard_sigmoid(x: ArrayLike, alpha: float = 0.2, beta: float = 0.5) -> Floats:
    """Return max(0, min(1, alpha x + beta)); torch's Hardsigmoid has alpha = 1 / 6."""
    return _narrow(np.clip(_attribute(alpha) * _wide(x) + _attribute(beta), 0.0, 1.0))


def hard_swish(x: ArrayLike) -> Floats:
    """Return x max(0, min(1, x / 6 + 0.5)), with 1 / 6 in float32 as in ONNX HardSwish."""
    values = _wide(x)
    return _narrow(values * np.clip(_attribute(1 / 6) * values + 0.5, 0.0, 1.0))


def silu(x: ArrayLike) -> Floats:
    """Return x sigmoid(x) as a file has it: Sigmoid, then Mul, each rounded."""
    return multiply(x, sigmoid(x))


def mish(x: ArrayLike) -> Floats:
    """Return x tanh(log(1 + exp(x)))."""
    values = _wide(x)
    return _narrow(values * np.tanh(np.logaddexp(0.0, values)))


def softplus(x: ArrayLike) -> Floats:
    """Return log(1 + exp(x))."""
    return _narrow(np.logaddexp(0.0, _wide(x)))


def tanh(x: ArrayLike) -> Floats:
    """Return the hyperbolic tangent."""
    return _narrow(np.tanh(_wide(x)))


def erf(x: ArrayLike) -> Floats:
    """Return the error function."""
    return _narrow(_special().erf(_wide(x)))


def gelu(x: ArrayLike, approximate: str = "none") -> Floats:
    """Return x Phi(x), Phi the normal distribution; its usual form by tanh with ``approximate="tanh"``."""
    values = _wide(x)
    if approximate == "tanh":
        # 0.5 (1 + tanh u) = sigmoid(2 u), which does not cancel for negative u.
        return _narrow(values * _sigmoid(np.sqrt(8 / np.pi) * (values + 0.044715 * values**3)))
    return _narrow(values * _special().ndtr(values))


def softmax(x: ArrayLike, axis: int = -1) -> Floats:
    """Return exp(x) over its sum along `axis`."""
    values = np.moveaxis(_wide(x), axis, -1)
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return _narrow(np.moveaxis(powers / _sum_last(powers)[..., None], -1, axis))


def log_softmax(x: ArrayLike, axis: int = -1) -> Floats:
    """Return the logarithm of `softmax`, without its underflow."""
    values = np.moveaxis(_wide(x), axis, -1)
    values = values - values.max(axis=-1, keepdims=True)
    return _narrow(np.moveaxis(values - np.log(_sum_last(np.exp(values)))[..., None], -1, axis))


def mean(x: ArrayLike, axes: Sequence[int], keepdims: bool = True) -> Floats:
    """Return the mean over some axes; over (2, 3) of ``(N, C, H, W)`` it is global average pooling."""
    values = _wide(x)
    averages = _sum_over(values, axes) / np.prod([values.shape[axis] for axis in axes], dtype=np.int64)
    return _narrow(np.expand_dims(averages, _positive(axes, values.ndim)) if keepdims else averages)


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike,
    beta: ArrayLike,
    mean: ArrayLike,
    variance: ArrayLike,
    epsilon: float = 1e-5,
) -> Floats:
    """Return ``gamma (x - mean) / sqrt(variance + epsilon) + beta`` along axis 1, of running statistics."""
    values = _wide(x)
    shape = [1, -1] + [1] * (values.ndim - 2)
    factor = _wide(gamma) / np.sqrt(_wide(variance) + _attribute(epsilon))
    centred = values - _wide(mean).reshape(shape)
    return _narrow(centred * factor.reshape(shape) + _wide(beta).reshape(shape))


def layer_norm(
    x: ArrayLike, gamma: ArrayLike, beta: ArrayLike | None = None, axis: int = -1, epsilon: float = 1e-5
) -> Floats:
    """Return x normalized over the axes from `axis` on, times gamma, plus beta."""
    values = _wide(x)
    axes = tuple(range(axis % values.ndim, values.ndim))
    count = np.prod([values.shape[a] for a in axes], dtype=np.int64)
    centred = values - np.expand_dims(_sum_over(values, axes) / count, axes)
    variance = np.expand_dims(_sum_over(centred * centred, axes) / count, axes)
    normal = centred / np.sqrt(variance + _attribute(epsilon)) * _wide(gamma)
    return _narrow(normal if beta is None else normal + _wide(beta))


def local_response_norm(
    x: ArrayLike, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Floats:
    """Return ``x / (bias + alpha / size sum x^2)^beta``, the sum over `size` channels around each.

    Args:
        x: ``(N, C, ...)``.
        size: Channels of the window: (size - 1) // 2 before, size // 2 after.
        alpha: Weight of the sum.
        beta: The power.
        bias: Torch calls it k.

    Returns:
        float32 of the shape of `x`.
    """
    values = _wide(x)
    squares = values * values
    sums = np.zeros_like(values)
    channels = values.shape[1]
    for offset in range(-((size - 1) // 2), size // 2 + 1):
        to = slice(max(0, -offset), channels - max(0, offset))
        of = slice(max(0, offset), channels + min(0, offset))
        sums[:, to] += squares[:, of]
    return _narrow(values * (_attribute(bias) + _attribute(alpha) / size * sums) ** -_attribute(beta))


def window_weights(channels: int, size: int, alpha: float) -> Floats:
    """Return the 1 x 1 convolution that sums what is around each channel for `local_response_norm`.

    Returns:
        float32 ``(C, C, 1, 1)``: ``alpha / size`` from channel j to c where ``-((size - 1) // 2) <= j - c <=
        size // 2``, else 0.

    Example:
        >>> window_weights(3, 3, 0.75)[:, :, 0, 0].tolist()
        [[0.25, 0.25, 0.0], [0.25, 0.25, 0.25], [0.0, 0.25, 0.25]]
    """
    places = np.arange(channels)
    ahead = places - places[:, None]
    inside = (ahead >= -((size - 1) // 2)) & (ahead <= size // 2)
    return np.asarray(inside * (np.float32(alpha) / np.float32(size)), np.float32)[:, :, None, None]


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1.0, small) / (1.0 + small)


def _special() -> ModuleType:
    # Imported here: scipy is slow to import, and an engine's process must start fast.
    from scipy import special

    return cast(ModuleType, special)


def _sum_over(values: NDArray[np.float64], axes: Sequence[int]) -> NDArray[np.float64]:
    """Sum over axes in an order that the other axes and the memory layout do not change."""
    axes = _positive(axes, values.ndim)
    rest = [axis for axis in range(values.ndim) if axis not in axes]
    moved = values.transpose([*rest, *axes])
    return _sum_last(moved.reshape([values.shape[axis] for axis in rest] + [-1]))


def _sum_last(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.ascontiguousarray(values).sum(axis=-1))


def _positive(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    return tuple(axis % ndim for axis in axes)


def _wide(x: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(x, np.float32).astype(np.float64)


def _narrow(x: NDArray[np.float64]) -> Floats:
    return x.astype(np.float32)


def _attribute(value: float) -> float:
    """Widen an attribute from the float32 that a file stores."""
    return float(np.float32(value))
