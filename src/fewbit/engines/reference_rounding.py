"""How an engine rounds: its own float32 formulas in place of the normative ones, code for code.

Source: ONNX Runtime 1.31, onnxruntime/core/mlas/lib (quantize.cpp, intrinsics/avx2/qladd_avx2.cpp, qlmul.cpp,
qlgavgpool.cpp), core/providers/cpu/quantization/qlinearconv.cc, contrib_ops/cpu/quantization/quant_gemm.cc.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbit.engines.reference_graph import Array, Coded, Node, floats
from fewbit.engines.reference_layers import Arguments, Operator, accumulate

Floats = NDArray[np.float32]


def fused_multiply_add(x: Array, y: Array, z: Array) -> Floats:
    """Return ``x y + z`` rounded once to float32, as one instruction does.

    The product of two float32 is exact in float64, so only the sum is rounded twice, which shows where it
    lies within 2^-53 of a tie of float32.
    """
    product = np.multiply(x, y, dtype=np.float64)
    return np.asarray(product + np.asarray(z, np.float64), np.float32)


def to_codes(steps: Floats, node: Node, scale: Array, zero_point: Array, added: bool = False) -> Array:
    """Return codes: ``clamp(rint(steps) + Z)``, ties to even, the fused activation being part of the clamp.

    Args:
        steps: What is to be rounded, in steps of the output grid.
        node: Has the activation's bounds as `low` and `high`.
        scale: Of the output.
        zero_point: Of the output.
        added: The zero point is in `steps` already.
    """
    limits = np.iinfo(zero_point.dtype)
    offset = int(zero_point.reshape(()))
    step = np.float32(scale.reshape(()))
    low, high = (np.rint(np.float32(node.number(key, 0.0)) / step) + offset for key in ("low", "high"))
    codes = np.rint(steps)
    codes += np.float32(0 if added else offset)
    return codes.clip(max(limits.min, low), min(limits.max, high)).astype(zero_point.dtype)


def along(values: Array, sums: Array, axis: int = 1) -> Array:
    """Shape one value an output channel to broadcast along `axis`."""
    if values.size == 1:
        return values.reshape(())
    return values.reshape([-1 if d == axis % sums.ndim else 1 for d in range(sums.ndim)])


def onnxruntime_sums(node: Node, arguments: Arguments) -> Array:
    """Conv, Gemm, MatMul: ``M = Sx Sw[o] / Sy`` from left to right, ``rint(float32(acc) M) + Z``."""
    *inputs, scale, zero_point = arguments
    sums, x, w = accumulate(node, inputs)
    factor = (x.scale * w.scale) / np.float32(scale.reshape(()))  # type: ignore[union-attr]
    axis = -1 if node.kind.endswith("MatMul") else 1
    return to_codes(sums.astype(np.float32) * along(factor, sums, axis), node, scale, zero_point)  # type: ignore[arg-type]


def onnxruntime_gemm_to_float(node: Node, arguments: Arguments) -> Floats:
    """Gemm whose output stays float: ``float32(acc) (Sx Sw[o])``."""
    sums, x, w = accumulate(node, arguments)
    return np.asarray(sums.astype(np.float32) * along(x.scale * w.scale, sums))


def onnxruntime_add(node: Node, arguments: Arguments) -> Array:
    """Add: ``rint(fma(qa, Ra, fma(qb, Rb, F)))``, ``Ra = Sa / Sy``, ``F = Zy - (Ra Za + Rb Zb)``."""
    a, b, scale, zero_point = arguments
    ratio_a, ratio_b = a.scale / scale, b.scale / scale
    fixed = np.float32(zero_point) - (ratio_a * np.float32(a.zero_point) + ratio_b * np.float32(b.zero_point))
    steps = fused_multiply_add(a.codes, ratio_a, fused_multiply_add(b.codes, ratio_b, fixed))
    return to_codes(steps, node, scale, zero_point, added=True)


def onnxruntime_global_average(node: Node, arguments: Arguments) -> Array:
    """GlobalAveragePool: ``rint(float32(sum (q - Z)) M) + Zy`` with ``M = Sx / (Sy H W)``."""
    x, scale, zero_point = arguments
    axes = tuple(range(2, x.codes.ndim))
    count = int(np.prod(x.codes.shape[2:]))
    sums = (x.codes.astype(np.int64) - x.zero_point).sum(axis=axes, keepdims=True)
    factor = x.scale / (scale.reshape(()) * np.float32(count))
    return to_codes(sums.astype(np.float32) * factor, node, scale, zero_point)


def onnxruntime_multiply(node: Node, arguments: Arguments) -> Array:
    """Mul: ``rint(float32((qa - Za) (qb - Zb)) M + Zy)`` with ``M = Sa Sb / Sy``, the sum in float32 too."""
    a, b, scale, zero_point = arguments
    product = (a.codes.astype(np.int64) - a.zero_point) * (b.codes.astype(np.int64) - b.zero_point)
    steps = product.astype(np.float32) * ((a.scale * b.scale) / scale.reshape(()))
    return to_codes(steps + zero_point.astype(np.float32), node, scale, zero_point, added=True)


def onnxruntime_lrn(node: Node, arguments: Arguments) -> Floats:
    """LRN: a window of squares that slides over the channels, all in float32; the power rounded once.

    The first channel's sum is ``bias + alpha / size x^2`` term by term; the next ones add a head, then take
    off a tail.
    """
    x = floats(arguments[0])  # type: ignore[arg-type]
    size = node.integer("size", 1)
    share = np.float32(np.float32(node.number("alpha", 1e-4)) / np.float32(size))
    before = (size - 1) // 2
    squares = np.pad(x * x, ((0, 0), (before, size - 1 - before), (0, 0), (0, 0))) * share
    sums = np.empty_like(x)
    first = np.full(x[:, 0].shape, node.number("bias", 1.0), np.float32)
    for c in range(size):
        first += squares[:, c]
    sums[:, 0] = first
    for c in range(1, x.shape[1]):
        sums[:, c] = (sums[:, c - 1] + squares[:, c + size - 1]) - squares[:, c - 1]
    power = np.power(sums.astype(np.float64), -float(np.float32(node.number("beta", 0.75))))
    return x * power.astype(np.float32)


LEVELS_LESS_ONE = np.float32(255)
import os
V=os.environ.get("V","")


def openvino_interval(scale: Array, zero_point: Array) -> tuple[np.float32, np.float32]:
    """Return the real values of the smallest and largest code: what a FakeQuantize has for a grid."""
    limits, offset = np.iinfo(zero_point.dtype), np.float32(zero_point.reshape(()))
    step = np.float32(scale.reshape(()))
    return step * (np.float32(limits.min) - offset), step * (np.float32(limits.max) - offset)


def openvino_scale(x: Coded) -> np.float32:
    """Return the scale that OpenVINO gets back from a grid's interval: ``(high - low) / 255``."""
    if "a" in V: return x.scale
    low, high = openvino_interval(x.scale, x.zero_point.astype(x.codes.dtype))
    return (high - low) / LEVELS_LESS_ONE


def openvino_conv_floats(node: Node, arguments: Arguments) -> Floats:
    """Conv before its output is quantized: ``float32(acc) (Sx Sw[o]) + b``."""
    x, w, b = arguments
    sums, _, _ = accumulate(node, [x, w, None])
    unit = along(openvino_scale(x) * w.scale, sums)
    if b is None:
        return sums.astype(np.float32) * unit
    bias = along(floats(b), sums)
    if "f" in V:
        return fused_multiply_add(sums.astype(np.float32), unit, bias)
    return sums.astype(np.float32) * unit + bias


def twice_inverted(factor: np.float32) -> np.float32:
    """Return ``1 / (1 / factor)``: a last scalar factor is handed to oneDNN as the output's scale."""
    if "i" in V: return factor
    return np.float32(1) / (np.float32(1) / factor)


def openvino_conv(node: Node, arguments: Arguments) -> Array:
    """Conv with FakeQuantize: ``rint(y / Sy)`` by a product, or ``rint(fma(y, 1 / Sy, Zy))``."""
    *inputs, scale, zero_point = arguments
    values = openvino_conv_floats(node, inputs)
    low, high = openvino_interval(scale, zero_point)
    factor = LEVELS_LESS_ONE / (high - low)
    shift = -low * LEVELS_LESS_ONE / (high - low) + np.float32(np.iinfo(zero_point.dtype).min)
    if abs(shift) < LEVELS_LESS_ONE * np.float32(1e-5):
        return to_codes(values * twice_inverted(factor), node, scale, zero_point, added=True)
    if "m" in V: steps=values*factor+shift
    else: steps = fused_multiply_add(values, factor, shift)
    return to_codes(steps, node, scale, zero_point, added=True)


def openvino_residual(node: Node, arguments: Arguments) -> Array:
    """Add of codes and a Conv in float, then FakeQuantize, in steps of the codes."""
    other, *inputs, scale, zero_point = arguments
    values = openvino_conv_floats(node, inputs)
    step = openvino_scale(other)
    offset = np.float32(other.zero_point)
    if offset != 0:
        values = values + (-(offset * step) if "s" not in V else offset*step)
    if "d" in V: values = values * (np.float32(1)/step)
    else: values = values * twice_inverted(np.float32(1) / step)
    values = values + other.codes.astype(np.float32)
    low, high = openvino_interval(scale, zero_point)
    low, high = low / step, high / step
    factor = LEVELS_LESS_ONE / (high - low)
    values = np.clip(values, low, high) * factor
    least = np.float32(np.iinfo(zero_point.dtype).min)
    if low != 0:
        if "g" in V: values = fused_multiply_add(np.clip(values/factor,low,high),factor,-low*factor)
        else: values = values - low * factor
        if least: values = np.rint(values) + least
    return to_codes(values, node, scale, zero_point, added=True)


OPERATORS: dict[str, Operator] = {
    "onnxruntime.Conv": onnxruntime_sums,
    "onnxruntime.Gemm": onnxruntime_sums,
    "onnxruntime.MatMul": onnxruntime_sums,
    "onnxruntime.GemmToFloat": onnxruntime_gemm_to_float,
    "onnxruntime.Add": onnxruntime_add,
    "openvino.Conv": openvino_conv,
    "openvino.Residual": openvino_residual,
    "onnxruntime.LRN": onnxruntime_lrn,
    "onnxruntime.Mul": onnxruntime_multiply,
    "onnxruntime.GlobalAveragePool": onnxruntime_global_average,
}

MATRIX = frozenset(
    {
        "onnxruntime.Conv", "onnxruntime.Gemm", "onnxruntime.MatMul", "onnxruntime.GemmToFloat",
        "openvino.Conv", "openvino.Residual",
    }
)  # fmt: skip
QUANTIZERS = frozenset(OPERATORS) - {"onnxruntime.GemmToFloat", "onnxruntime.LRN"}
