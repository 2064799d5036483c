"""Quantizing, and the layers that are sums of products: in exact integers wherever both inputs have codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbit import numerics
from fewbit.engines.reference_graph import Array, Coded, Node, Value, floats

Arguments = Sequence[Value | None]
Operator = Callable[[Node, Arguments], Value | tuple[Value, ...]]

# Kinds of fused operators that are convolutions inside.
CONVOLUTIONS = ("Conv", "ConvToFloat", "Residual", "ResidualInKernel")

NARROW_RANGES = {"int4": (-8, 7), "uint4": (0, 15), "int2": (-2, 1), "uint2": (0, 3)}


def quantize_linear(node: Node, arguments: Arguments) -> Array:
    """QuantizeLinear: real values to codes."""
    x, scale, zero_point = _given(arguments, 3)
    if node.integer("block_size", 0):
        raise node.error("quantizes in blocks, which is not known here; use per channel scales")
    kind = np.dtype(np.uint8) if zero_point is None else zero_point.dtype
    axis = None if scale.size == 1 else node.integer("axis", 1)
    offset = np.zeros((), np.int64) if zero_point is None else zero_point.astype(np.int64)
    if isinstance(x, Coded) and axis is None and kind == x.codes.dtype:
        own = Coded(x.codes, scale.reshape(()), offset.reshape(()), None)
        if x.same_grid(own):  # quantizing a grid's own values gives their codes back
            return x.codes
    codes = numerics.quantize(floats(x), scale, offset, *_code_range(kind), axis, node.outputs[0])
    return codes if kind.name in NARROW_RANGES else codes.astype(kind, copy=False)


def dequantize_linear(node: Node, arguments: Arguments) -> Value:
    """DequantizeLinear: codes to real values that keep their codes."""
    x, scale, zero_point = _given(arguments, 3)
    codes = floats(x)
    if codes.dtype.name in NARROW_RANGES:
        codes = codes.astype(np.int8)
    if not np.issubdtype(codes.dtype, np.integer):
        raise node.error(f"reads codes of type {codes.dtype}; only integers are known here")
    offset = np.zeros(scale.shape, np.int64) if zero_point is None else zero_point.astype(np.int64)
    block = node.integer("block_size", 0)
    axis = node.integer("axis", 1)
    if block:
        return _dequantize_blocks(codes, scale, offset, axis, block)
    if scale.size == 1:
        return Coded(codes, scale.reshape(()), offset.reshape(()), None)
    return Coded(codes, scale, offset, axis % codes.ndim)


def dynamic_quantize_linear(node: Node, arguments: Arguments) -> tuple[Value, ...]:
    """DynamicQuantizeLinear: one uint8 grid from the whole tensor, as the operator is defined."""
    x = floats(_given(arguments, 1)[0])
    low, high = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
    scale = np.float32(1) if low == high else np.float32(np.float32(high - low) / np.float32(255))
    zero_point = np.uint8(np.clip(np.rint(np.float32(0 - low / scale)), 0, 255))
    codes = numerics.quantize(x, scale, zero_point, 0, 255, name=node.outputs[0])
    return codes, np.asarray(scale), np.asarray(zero_point)


def conv(node: Node, arguments: Arguments) -> Value:
    """Conv: exact sums of codes, rescaled; in float64 rounded once where an input is float."""
    x, w, b = _given(arguments, 3)
    geometry = conv_geometry(node, shape_of(x), shape_of(w)[2:])
    groups = node.integer("group", 1)
    if not conv_in_integers(node, arguments):
        bias = None if b is None else floats(b)
        return numerics.convolve_floats(floats(x), floats(w), bias, *geometry, groups)
    sums, bound = _conv_sums(node, x, w)
    return _rescale(node, sums, x, w, b, bound, 1)


def conv_transpose(node: Node, arguments: Arguments) -> Value:
    """ConvTranspose: as `conv`; the weights' output axis is 1."""
    x, w, b = _given(arguments, 3)
    kernel, groups = shape_of(w)[2:], node.integer("group", 1)
    dims = len(kernel)
    strides, dilations = node.integers("strides", [1] * dims), node.integers("dilations", [1] * dims)
    extra, pads = node.integers("output_padding", [0] * dims), node.integers("pads", [0] * 2 * dims)
    if node.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in node.attributes:
        raise node.error("takes its padding from auto_pad or output_shape; export it with pads")
    geometry = (strides, pads, dilations, groups, extra)
    if not conv_transpose_in_integers(node, arguments):
        left, right = floats(x).astype(np.float64), floats(w).astype(np.float64)
        sums = numerics.convolve_transposed(left, right, *geometry)
        return numerics.rescale_accumulator(sums, 1.0, 1.0, bias=None if b is None else floats(b))
    bound = x.reach * w.largest_sum((0, *range(2, w.codes.ndim)))
    sums = numerics.convolve_transposed(x.centred(np.float64), w.centred(np.float64), *geometry)
    if w.axis is not None and groups > 1:
        w = Coded(w.codes, np.tile(w.scale, groups), np.tile(w.zero_point, groups), 1)
    return _rescale(node, sums, x, w, b, bound, 1)


def gemm(node: Node, arguments: Arguments) -> Value:
    """Gemm: a product of matrices with a bias, as `conv`."""
    a, b, c = _given(arguments, 3)
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    left: Any = _transposed(a) if node.integer("transA", 0) else a
    right: Any = b if node.integer("transB", 0) else _transposed(b)  # (O, I) from here on
    if gemm_in_integers(node, arguments):
        sums, bound = _matmul_sums(left, right.transposed)
        return _rescale(node, sums, left, right, c, bound, 1)
    return numerics.linear(floats(left), floats(right), None if c is None else floats(c), alpha, beta)


def matmul(node: Node, arguments: Arguments) -> Value:
    """MatMul: as `gemm`, without a bias, of stacks of matrices."""
    a, b = _given(arguments, 2)
    if matmul_in_integers(node, arguments):
        sums, bound = _matmul_sums(a, b)
        return _rescale(node, sums, a, b, None, bound, -1)
    left, right = floats(a), floats(b)
    if right.ndim == 2:
        return numerics.linear(left, right.T)
    return np.asarray(np.matmul(left.astype(np.float64), right.astype(np.float64)), np.float32)


def accumulate(node: Node, arguments: Arguments) -> tuple[Array, Coded, Coded]:
    """Return the exact sums of a Conv, Gemm or MatMul (the end of the node's kind) with the bias in them.

    Args:
        node: The layer.
        arguments: Input and weights with codes, and a bias whose codes are in the unit of the sums, or none.

    Returns:
        The sums, the input and the weights.
    """
    x, w, b = _given(arguments, 3)
    kind = node.kind.rpartition(".")[2]
    gemm = kind.startswith("Gemm")
    left = x.transposed if gemm and node.integer("transA", 0) else x
    right = w.transposed if gemm and node.integer("transB", 0) else w
    sums, bound = _conv_sums(node, x, w) if kind in CONVOLUTIONS else _matmul_sums(left, right)
    if b is not None:
        unit = x.scale.astype(np.float64) * w.scale.astype(np.float64)
        if not np.allclose(b.scale, unit, rtol=1e-6, atol=0):
            raise node.error("its bias has not the unit of its sums; run this file with rounding exact")
        bound += float(np.abs(b.codes.astype(np.float64)).max(initial=0))
        # In float64: the sums' own type may be just wide enough without the bias.
        sums = sums + b.codes.astype(np.float64).reshape(-1, *[1] * (sums.ndim - 2))
    if bound >= 2**31:
        numerics.check_accumulator(float(np.abs(sums).max(initial=0)), node.name)
    return sums, x, w


def conv_integer(node: Node, arguments: Arguments) -> Array:
    """ConvInteger: sums of codes as int32; the weights may have one zero point an output channel."""
    x, w, x_zero, w_zero = _given(arguments, 4)
    geometry = conv_geometry(node, x.shape, w.shape[2:])
    offset = np.zeros((), np.int64) if w_zero is None else w_zero.astype(np.int64)
    weight = w.astype(np.int64) - offset.reshape(-1, *[1] * (w.ndim - 1))
    zero = 0 if x_zero is None else int(x_zero.reshape(()))
    sums = numerics.convolve_codes(x, zero, weight, *geometry, node.integer("group", 1))
    numerics.check_accumulator(float(np.abs(sums).max(initial=0)), node.name)
    return sums.astype(np.int32)


def matmul_integer(node: Node, arguments: Arguments) -> Array:
    """MatMulInteger: sums of codes as int32; zero points may be one a row, and one a column."""
    a, b, a_zero, b_zero = _given(arguments, 4)
    left, right = a.astype(np.float64), b.astype(np.float64)
    if a_zero is not None:
        left -= a_zero.astype(np.float64) if a_zero.ndim != 1 else a_zero.astype(np.float64)[:, None]
    if b_zero is not None:
        right -= b_zero.astype(np.float64)
    sums = np.asarray(left @ right)
    numerics.check_accumulator(float(np.abs(sums).max(initial=0)), node.name)
    return sums.astype(np.int32)


def conv_in_integers(_node: Node, arguments: Arguments) -> bool:
    """Say whether a Conv is a sum of integers: scales factor out of it."""
    return _factors(arguments, 0)


def conv_transpose_in_integers(_node: Node, arguments: Arguments) -> bool:
    """Say whether a ConvTranspose is a sum of integers."""
    return _factors(arguments, 1)


def gemm_in_integers(node: Node, arguments: Arguments) -> bool:
    """Say whether a Gemm is a sum of integers."""
    a, b, c = _given(arguments, 3)
    output_axis = 0 if node.integer("transB", 0) else 1
    plain = node.number("alpha", 1.0) == 1.0 and node.number("beta", 1.0) == 1.0
    rows = not node.integer("transA", 0) or (isinstance(a, Coded) and a.axis is None)
    one_bias = c is None or np.prod(shape_of(c)) in (1, shape_of(b)[output_axis])
    return plain and rows and one_bias and _factors(arguments, output_axis)


def matmul_in_integers(_node: Node, arguments: Arguments) -> bool:
    """Say whether a MatMul is a sum of integers."""
    b = arguments[1]
    return isinstance(b, Coded) and b.codes.ndim >= 2 and _factors(arguments, b.codes.ndim - 1)


IN_INTEGERS: dict[str, Callable[[Node, Arguments], bool]] = {
    "Conv": conv_in_integers,
    "ConvTranspose": conv_transpose_in_integers,
    "Gemm": gemm_in_integers,
    "MatMul": matmul_in_integers,
    "ConvInteger": lambda _node, _arguments: True,
    "MatMulInteger": lambda _node, _arguments: True,
}

LAYERS: dict[str, Operator] = {
    "QuantizeLinear": quantize_linear,
    "DequantizeLinear": dequantize_linear,
    "DynamicQuantizeLinear": dynamic_quantize_linear,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
    "ConvInteger": conv_integer,
    "MatMulInteger": matmul_integer,
}


def conv_geometry(
    node: Node, x_shape: Sequence[int], kernel: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Return strides, pads and dilations of a window operator, auto_pad worked out."""
    dims = len(kernel)
    strides, dilations = node.integers("strides", [1] * dims), node.integers("dilations", [1] * dims)
    mode = node.text("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return strides, node.integers("pads", [0] * 2 * dims), dilations
    if mode == "VALID":
        return strides, [0] * 2 * dims, dilations
    begins, ends = [], []
    for d in range(dims):
        size = x_shape[2 + d]
        reach = (-(-size // strides[d]) - 1) * strides[d] + (kernel[d] - 1) * dilations[d] + 1
        total = max(0, reach - size)
        small = total // 2
        begins.append(small if mode == "SAME_UPPER" else total - small)
        ends.append(total - begins[-1])
    return strides, begins + ends, dilations


def _conv_sums(node: Node, x: Coded, w: Coded) -> tuple[Array, float]:
    """Return the sums of a convolution, and a bound of their magnitude."""
    bound = x.reach * w.largest_sum(tuple(range(1, w.codes.ndim)))
    kind = numerics.exact_float(bound)
    geometry = conv_geometry(node, x.codes.shape, w.codes.shape[2:])
    return numerics.convolve(x.centred(kind), w.centred(kind), *geometry, node.integer("group", 1)), bound


def _matmul_sums(a: Coded, b: Coded) -> tuple[Array, float]:
    """Return the sums of a product of matrices, and a bound of their magnitude."""
    bound = a.reach * b.largest_sum((b.codes.ndim - 2,))
    kind = numerics.exact_float(bound)
    return a.centred(kind) @ b.centred(kind), bound


def _transposed(value: Value) -> Value:
    return value.transposed if isinstance(value, Coded) else value.T


def shape_of(value: Value) -> tuple[int, ...]:
    """Return the shape of a value without dequantizing it."""
    return value.codes.shape if isinstance(value, Coded) else value.shape


def _given(arguments: Arguments, count: int) -> list[Any]:
    return [*arguments, *[None] * count][:count]


def _code_range(kind: np.dtype[Any]) -> tuple[int, int]:
    if kind.name in NARROW_RANGES:
        return NARROW_RANGES[kind.name]
    limits = np.iinfo(kind)
    return int(limits.min), int(limits.max)


def _factors(arguments: Arguments, output_axis: int) -> bool:
    """Both have codes: one scale a tensor or sample of the first, a tensor or output of the second."""
    x, w = arguments[0], arguments[1]
    if not (isinstance(x, Coded) and isinstance(w, Coded)):
        return False
    return x.axis in (None, 0) and w.axis in (None, output_axis)


def _rescale(
    node: Node, sums: Array, x: Coded, w: Coded, b: Value | None, bound: float, axis: int
) -> NDArray[np.float32]:
    """Turn sums of codes to floats; the bias is an integer where its grid is the sums' own."""
    codes: Array | None = None
    if isinstance(b, Coded) and x.axis is None and not b.zero_point.any():
        unit = x.scale.astype(np.float64) * w.scale.astype(np.float64)
        if np.allclose(b.scale, unit, rtol=1e-6, atol=0):
            codes = b.codes
            bound += float(np.abs(codes.astype(np.float64)).max(initial=0))
    # The bound holds for any input; only where it is too large is it worth to look at the sums.
    if bound >= 2**31:
        total = sums if codes is None else sums + codes.reshape(-1, *[1] * (sums.ndim - 2))
        numerics.check_accumulator(float(np.abs(total).max(initial=0)), node.name)
    bias = None if b is None or codes is not None else floats(b)
    return numerics.rescale_accumulator(sums, x.scale, w.scale, codes, bias, axis)


def _dequantize_blocks(codes: Array, scale: Array, zero_point: Array, axis: int, block: int) -> Array:
    size = codes.shape[axis]
    keep = [slice(None)] * codes.ndim
    keep[axis] = slice(size)
    steps = np.repeat(scale.astype(np.float64), block, axis)[tuple(keep)]
    offsets = np.repeat(zero_point, block, axis)[tuple(keep)]
    return np.asarray((codes.astype(np.int64) - offsets) * steps, np.float32)
