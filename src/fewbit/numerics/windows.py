"""Convolution and pooling: sums over windows, exact where the values are small integers.

Geometry is ONNX's: `pads` has the begins of all spatial axes, then the ends; the sequences have one entry a
spatial axis, of which there may be any number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from fewbit.numerics.integers import mean_codes

UNROLLED = 2**21  # numbers of unrolled input that one matrix product reads: they stay in a core's cache


def exact_float(bound: float) -> type[np.float32] | type[np.float64]:
    """Return the float type in which every sum of integers below `bound` is exact, in any order.

    >>> exact_float(2**24 - 1).__name__, exact_float(2**24).__name__
    ('float32', 'float64')
    """
    return np.float32 if bound < 2**24 else np.float64


def convolve(
    x: NDArray[Any],
    weight: NDArray[Any],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int = 1,
) -> NDArray[Any]:
    """Return the sums of a convolution, in the float type of its arguments; padding is 0.

    Integers in float arrays are summed exactly when `exact_float` allows the type. A sample's result does
    not depend on the batch.

    Args:
        x: ``(N, C, ...)``; of codes, with the zero point taken off.
        weight: ``(O, C / groups, ...)``.
        strides: Steps of the window.
        pads: Begins, then ends; at least 0.
        dilations: Distances of the weights.
        groups: Groups of channels.

    Returns:
        ``(N, O, ...)``.

    Raises:
        ValueError: The shapes do not fit.
    """
    dims = x.ndim - 2
    outputs, inner = weight.shape[:2]
    if x.shape[1] != inner * groups or outputs % groups:
        raise ValueError(f"input {x.shape} does not fit weight {weight.shape} with {groups} groups")
    padded = _pad(x, pads, 0)
    out_shape = _sizes(x.shape[2:], weight.shape[2:], strides, pads, dilations)
    if inner == 1 and groups > 1:
        return _convolve_depthwise(padded, weight, strides, dilations, out_shape)
    windows = _windows(padded, weight.shape[2:], strides, dilations)
    # (N, C, out..., kernel...) -> (N, C, kernel..., out...): rows of the unrolled matrix are terms of the
    # sum.
    windows = windows.transpose(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    matrix = weight.reshape(groups, outputs // groups, -1)
    result = np.empty((len(x), groups, outputs // groups, int(np.prod(out_shape))), x.dtype)
    per_row = int(np.prod(out_shape[1:]))
    rows = max(1, UNROLLED // (groups * matrix.shape[2] * per_row))
    for sample, start in itertools.product(range(len(x)), range(0, out_shape[0], rows)):
        at: tuple[Any, ...] = (sample, *[slice(None)] * (1 + dims), slice(start, start + rows))
        unrolled = windows[at].reshape(groups, matrix.shape[2], -1)
        to = result[sample, :, :, start * per_row : (start + rows) * per_row]
        if groups == 1:
            np.matmul(matrix[0], unrolled[0], out=to[0])
        else:
            np.matmul(matrix, unrolled, out=to)
    return result.reshape(len(x), outputs, *out_shape)


def convolve_floats(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int = 1,
) -> NDArray[np.float32]:
    """Return a float convolution: float64 inside, bias added, rounded once to float32.

    Args:
        x: ``(N, C, ...)``.
        weight: ``(O, C / groups, ...)``.
        bias: ``(O,)``.
        strides: Steps of the window.
        pads: Begins, then ends.
        dilations: Distances of the weights.
        groups: Groups of channels.

    Returns:
        ``(N, O, ...)``.
    """
    sums = convolve(x.astype(np.float64), weight.astype(np.float64), strides, pads, dilations, groups)
    if bias is not None:
        sums += bias.astype(np.float64).reshape(-1, *[1] * (x.ndim - 2))
    return sums.astype(np.float32)


def convolve_codes(
    x: NDArray[Any],
    x_zero_point: int,
    weight: NDArray[Any],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int = 1,
) -> NDArray[np.int64]:
    """Return the exact sums ``sum (qx - Zx) qw`` of a convolution of codes; a padded code is Zx.

    Args:
        x: Input codes ``(N, C, ...)``.
        x_zero_point: Zx.
        weight: Weight codes ``(O, C / groups, ...)``, zero point taken off where there is one.
        strides: Steps of the window.
        pads: Begins, then ends.
        dilations: Distances of the weights.
        groups: Groups of channels.

    Returns:
        ``(N, O, ...)``.
    """
    values = x.astype(np.int64) - x_zero_point
    terms = np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(axis=1)
    kind = exact_float(float(np.abs(values).max(initial=0)) * float(terms.max(initial=0)))
    sums = convolve(values.astype(kind), weight.astype(kind), strides, pads, dilations, groups)
    return sums.astype(np.int64)


def convolve_transposed(
    x: NDArray[Any],
    weight: NDArray[Any],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int = 1,
    output_padding: Sequence[int] | None = None,
) -> NDArray[Any]:
    """Return the sums of a transposed convolution, in the float type of its arguments.

    Args:
        x: ``(N, C, ...)``.
        weight: ``(C, O / groups, ...)``.
        strides: Steps of the output window.
        pads: Cut off the output: begins, then ends.
        dilations: Distances of the weights.
        groups: Groups of channels.
        output_padding: Added to the end of each axis.

    Returns:
        ``(N, O, ...)``.

    Raises:
        ValueError: The shapes do not fit.
    """
    kernel, dims = weight.shape[2:], x.ndim - 2
    if x.shape[1] != weight.shape[0] or x.shape[1] % groups:
        raise ValueError(f"input {x.shape} does not fit weight {weight.shape} with {groups} groups")
    extra = output_padding or [0] * dims
    full = [
        (size - 1) * step + (k - 1) * far + 1 + more
        for size, step, k, far, more in zip(x.shape[2:], strides, kernel, dilations, extra, strict=True)
    ]
    per_group = weight.shape[1]
    matrix = weight.reshape(groups, len(weight) // groups, -1).transpose(0, 2, 1)
    columns = np.matmul(matrix, x.reshape(len(x), groups, len(weight) // groups, -1))
    columns = columns.reshape(len(x), groups * per_group, *kernel, *x.shape[2:])
    result = np.zeros((len(x), groups * per_group, *full), x.dtype)
    for place in itertools.product(*map(range, kernel)):
        at = [
            slice(p * far, p * far + (size - 1) * step + 1, step)
            for p, far, size, step in zip(place, dilations, x.shape[2:], strides, strict=True)
        ]
        result[(slice(None), slice(None), *at)] += columns[(slice(None), slice(None), *place)]
    keep = [slice(pads[d], full[d] - pads[dims + d]) for d in range(dims)]
    return result[(slice(None), slice(None), *keep)]


def max_pool(
    x: NDArray[Any],
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int] | None = None,
    ceil_mode: bool = False,
) -> NDArray[Any]:
    """Return the largest value of each window, of codes or floats alike; padding never wins.

    Args:
        x: ``(N, C, ...)``.
        kernel: Size of the window.
        strides: Steps of the window.
        pads: Begins, then ends.
        dilations: Distances inside the window.
        ceil_mode: Keep a last window that reaches past the end, if it starts inside.

    Returns:
        ``(N, C, ...)`` of the type of `x`.
    """
    far = dilations or [1] * len(kernel)
    out_shape = _sizes(x.shape[2:], kernel, strides, pads, far, ceil_mode)
    lowest = -np.inf if np.issubdtype(x.dtype, np.floating) else np.iinfo(x.dtype).min
    padded = _pad(x, _reaching(x.shape[2:], kernel, strides, pads, far, out_shape), lowest)
    taps = _taps(padded, kernel, strides, far, out_shape)
    result = next(taps).copy()
    for tap in taps:
        np.maximum(result, tap, out=result)
    return result


def average_pool(
    x: NDArray[Any],
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    ceil_mode: bool = False,
    count_include_pad: bool = False,
    dilations: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """Return the mean of each window of floats: float64 sum over count, rounded once.

    Args:
        x: ``(N, C, ...)`` float32.
        kernel: Size of the window.
        strides: Steps of the window.
        pads: Begins, then ends.
        ceil_mode: Keep a last window that reaches past the end, if it starts inside.
        count_include_pad: Count padding (but never what lies past it) as zeros.
        dilations: Distances inside the window.

    Returns:
        ``(N, C, ...)`` float32.
    """
    values = np.asarray(x, np.float32).astype(np.float64)
    sums, counts = _window_sums(values, kernel, strides, pads, ceil_mode, count_include_pad, dilations)
    return np.asarray(sums / counts).astype(np.float32)


def average_pool_codes(
    x: NDArray[Any],
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    ceil_mode: bool = False,
) -> NDArray[np.int64]:
    """Return the mean code of each window, in integers; padding is not counted, the grid stays.

    Args:
        x: Codes ``(N, C, ...)``.
        kernel: Size of the window.
        strides: Steps of the window.
        pads: Begins, then ends.
        ceil_mode: Keep a last window that reaches past the end, if it starts inside.

    Returns:
        Codes ``(N, C, ...)`` as int64.

    >>> average_pool_codes(np.array([[[[10, 11], [12, 14]]]]), [2, 2], [2, 2], [0] * 4).tolist()
    [[[[12]]]]
    """
    sums, counts = _window_sums(x.astype(np.float64), kernel, strides, pads, ceil_mode, False, None)
    return mean_codes(sums.astype(np.int64), counts.astype(np.int64))


def pooled_size(
    size: int, kernel: int, stride: int, before: int, after: int, dilation: int = 1, ceil_mode: bool = False
) -> int:
    """Return how many windows fit along one axis.

    >>> pooled_size(6, 3, 2, 0, 0), pooled_size(6, 3, 2, 0, 0, ceil_mode=True)
    (2, 3)
    """
    free = size + before + after - dilation * (kernel - 1) - 1
    count = (-(-free // stride) if ceil_mode else free // stride) + 1
    # A window that would start in the padding at the end is left out.
    return count - 1 if ceil_mode and (count - 1) * stride >= size + before else count


def _convolve_depthwise(
    padded: NDArray[Any],
    weight: NDArray[Any],
    strides: Sequence[int],
    dilations: Sequence[int],
    out_shape: tuple[int, ...],
) -> NDArray[Any]:
    multiple = len(weight) // padded.shape[1]
    if multiple > 1:
        padded = np.repeat(padded, multiple, axis=1)
    result = np.zeros((len(padded), len(weight), *out_shape), padded.dtype)
    term = np.empty(result.shape[1:], padded.dtype)
    factors = weight.reshape(len(weight), -1).T.reshape(-1, len(weight), *[1] * len(out_shape))
    for sample, sums in zip(padded, result, strict=True):
        taps = _taps(sample[None], weight.shape[2:], strides, dilations, out_shape)
        for tap, factor in zip(taps, factors, strict=True):
            np.multiply(tap[0], factor, out=term)
            sums += term
    return result


def _window_sums(
    values: NDArray[np.float64],
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    dilations: Sequence[int] | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum each window, and count what it has."""
    far, dims, sizes = dilations or [1] * len(kernel), len(kernel), values.shape[2:]
    out_shape = _sizes(sizes, kernel, strides, pads, far, ceil_mode)
    padded = _pad(values, _reaching(sizes, kernel, strides, pads, far, out_shape), 0)
    taps = _taps(padded, kernel, strides, far, out_shape)
    sums = next(taps).copy()
    for tap in taps:
        sums += tap
    counts: NDArray[np.float64] = np.ones(())
    for d in range(dims):
        starts = np.arange(out_shape[d])[:, None] * strides[d] + np.arange(kernel[d]) * far[d]
        first, last = pads[d], pads[d] + sizes[d]
        if count_include_pad:
            first, last = 0, last + pads[dims + d]
        along = ((starts >= first) & (starts < last)).sum(axis=1)
        counts = counts[..., None] * along
    return sums, counts


def _sizes(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    ceil_mode: bool = False,
) -> tuple[int, ...]:
    dims = len(sizes)
    out = tuple(
        pooled_size(sizes[d], kernel[d], strides[d], pads[d], pads[dims + d], dilations[d], ceil_mode)
        for d in range(dims)
    )
    if min(out) < 1:
        raise ValueError(f"a window of {tuple(kernel)} does not fit an input of {tuple(sizes)}")
    return out


def _reaching(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    out_shape: Sequence[int],
) -> list[int]:
    """Return pads of which the ends hold the last window whole."""
    dims = len(sizes)
    reach = [(out_shape[d] - 1) * strides[d] + (kernel[d] - 1) * dilations[d] + 1 for d in range(dims)]
    ends = [max(pads[dims + d], reach[d] - sizes[d] - pads[d]) for d in range(dims)]
    return [*pads[:dims], *ends]


def _pad(x: NDArray[Any], pads: Sequence[int], value: float) -> NDArray[Any]:
    if not any(pads):
        return x
    dims = x.ndim - 2
    sizes = [pads[d] + x.shape[2 + d] + pads[dims + d] for d in range(dims)]
    padded = np.full((*x.shape[:2], *sizes), value, x.dtype)
    inside = [slice(pads[d], pads[d] + x.shape[2 + d]) for d in range(dims)]
    padded[(slice(None), slice(None), *inside)] = x
    return padded


def _windows(
    padded: NDArray[Any], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> NDArray[Any]:
    """Return a view ``(N, C, out..., kernel...)``."""
    dims = len(kernel)
    spans = tuple((k - 1) * far + 1 for k, far in zip(kernel, dilations, strict=True))
    view = sliding_window_view(padded, spans, axis=tuple(range(2, 2 + dims)))
    steps = [slice(None, None, step) for step in (*strides, *dilations)]
    return view[(slice(None), slice(None), *steps)]


def _taps(
    padded: NDArray[Any],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    out_shape: Sequence[int],
) -> Iterator[NDArray[Any]]:
    """Yield, for each place in the window, what all windows have there: views ``(N, C, out...)``."""
    for place in itertools.product(*map(range, kernel)):
        at = [
            slice(p * far, p * far + (size - 1) * step + 1, step)
            for p, far, size, step in zip(place, dilations, out_shape, strides, strict=True)
        ]
        yield padded[(slice(None), slice(None), *at)]
