"""How an engine rounds: its own float32 formulas in place of the normative ones, code for code.

Everything here is float32 unless it says otherwise; each operation rounds. Sx, Zx: scale and zero point of
a tensor x; y: the output. Found in the sources named below and checked on real networks, on processors with
AVX-512 VNNI, with AMX and without; another kernel (AVX2, ARM) may order its operations otherwise. With AMX
OpenVINO leaves a signed tensor without a zero point in int8 where an operator reads it; elsewhere it moves
every activation to uint8. Nodes of the rounding "openvino_amx" have attributes for it.

Source: ONNX Runtime 1.31: onnxruntime/core/mlas/lib (quantize.cpp for Conv and Gemm, avx2/qladd_avx2.cpp,
qlmul.cpp, qlgavgpool.cpp), core/providers/cpu/nn/lrn.cc, contrib_ops/cpu/quantization/quant_gemm.cc.
OpenVINO 2026.4: src/plugins/intel_cpu/src (dnnl_postops_composer.cpp, nodes/fake_quantize.cpp),
src/plugins/intel_cpu/src/transformations/transformation_pipeline.cpp (`input0LowPrecisionList`: where
int8 is left), src/common/snippets/src/pass/fq_decomposition.cpp,
src/common/low_precision_transformations/src/add.cpp. Which products and sums of OpenVINO are fused into one
instruction was found by experiment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewbit.engines.reference_graph import Array, Coded, Node, floats
from fewbit.engines.reference_layers import Operator, accumulate

Floats = NDArray[np.float32]
Given = Sequence[Any]  # the inputs of a fused node; `reference_fusion` knows what each one is
STEPS = np.float32(255)  # of an 8-bit grid


def fused_multiply_add(x: ArrayLike, y: ArrayLike, z: ArrayLike) -> Floats:
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
    offset = int(zero_point)
    step = np.float32(scale)
    low, high = (np.rint(np.float32(node.number(key, 0.0)) / step) + offset for key in ("low", "high"))
    codes = np.rint(steps)
    codes += np.float32(0 if added else offset)
    return codes.clip(max(limits.min, low), min(limits.max, high)).astype(zero_point.dtype)


def along(values: Array, sums: Array, axis: int = 1) -> Array:
    """Shape one value an output channel to broadcast along `axis`."""
    if values.size == 1:
        return values.reshape(())
    return values.reshape([-1 if d == axis % sums.ndim else 1 for d in range(sums.ndim)])


def onnxruntime_sums(node: Node, arguments: Given) -> Array:
    """Conv, Gemm, MatMul: ``M = Sx Sw[o] / Sy`` from left to right, ``rint(float32(acc) M) + Z``."""
    *inputs, scale, zero_point = arguments
    sums, x, w = accumulate(node, inputs)
    factor = (x.scale * w.scale) / np.float32(scale)
    axis = -1 if node.kind.endswith("MatMul") else 1
    steps = sums.astype(np.float32) * along(factor, sums, axis)
    return to_codes(steps, node, scale, zero_point)


def onnxruntime_gemm_to_float(node: Node, arguments: Given) -> Floats:
    """Gemm whose output stays float: ``float32(acc) (Sx Sw[o])``."""
    sums, x, w = accumulate(node, arguments)
    return np.asarray(sums.astype(np.float32) * along(x.scale * w.scale, sums))


def onnxruntime_add(node: Node, arguments: Given) -> Array:
    """Add: ``rint(fma(qa, Ra, fma(qb, Rb, F)))``, ``Ra = Sa / Sy``, ``F = Zy - fma(Ra, Za, Rb Zb)``."""
    a, b, scale, zero_point = arguments
    ratio_a, ratio_b = a.scale / scale, b.scale / scale
    offset = fused_multiply_add(ratio_a, a.zero_point, ratio_b * np.float32(b.zero_point))
    fixed = np.float32(zero_point) - offset
    steps = fused_multiply_add(a.codes, ratio_a, fused_multiply_add(b.codes, ratio_b, fixed))
    return to_codes(steps, node, scale, zero_point, added=True)


def onnxruntime_global_average(node: Node, arguments: Given) -> Array:
    """GlobalAveragePool: ``rint(float32(sum (q - Z)) M) + Zy`` with ``M = Sx / (Sy H W)``."""
    x, scale, zero_point = arguments
    axes = tuple(range(2, x.codes.ndim))
    count = int(np.prod(x.codes.shape[2:]))
    sums = (x.codes.astype(np.int64) - x.zero_point).sum(axis=axes, keepdims=True)
    factor = x.scale / (scale.reshape(()) * np.float32(count))
    return to_codes(sums.astype(np.float32) * factor, node, scale, zero_point)


def onnxruntime_multiply(node: Node, arguments: Given) -> Array:
    """Mul: ``rint(float32((qa - Za) (qb - Zb)) M + Zy)`` with ``M = Sa Sb / Sy``, the sum in float32 too."""
    a, b, scale, zero_point = arguments
    product = (a.codes.astype(np.int64) - a.zero_point) * (b.codes.astype(np.int64) - b.zero_point)
    steps = product.astype(np.float32) * ((a.scale * b.scale) / scale.reshape(()))
    return to_codes(steps + zero_point.astype(np.float32), node, scale, zero_point, added=True)


def onnxruntime_lrn(node: Node, arguments: Given) -> Floats:
    """LRN: a window of squares that slides over the channels, all in float32; the power rounded once.

    The first channel's sum is ``bias + alpha / size x^2`` term by term; the next ones add a head, then take
    off a tail.
    """
    x = floats(arguments[0])
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
    return np.asarray(x * power.astype(np.float32))


def openvino_interval(scale: Array, zero_point: Array) -> tuple[np.float32, np.float32]:
    """Return the real values of a grid's smallest and largest code, which a FakeQuantize is made of."""
    limits, offset = np.iinfo(zero_point.dtype), np.float32(zero_point)
    step = np.float32(scale)
    return step * (np.float32(limits.min) - offset), step * (np.float32(limits.max) - offset)


def stays_signed(node: Node, key: str, kind: np.dtype[Any], zero_point: ArrayLike) -> bool:
    """Say whether OpenVINO leaves a grid in int8: with AMX, an int8 one without a zero point.

    `key` is the attribute that allows it: "signed", or "signed_output" for what the node puts out.
    """
    return bool(node.integer(key, 0)) and kind == np.int8 and int(np.asarray(zero_point)) == 0


def openvino_grid(x: Coded, node: Node) -> tuple[np.float32, np.float32]:
    """Return scale and zero point that OpenVINO reads a tensor with: all activations become uint8.

    A grid of another type is taken as the interval ``(l, h)`` that it covers: ``S = (h - l) / 255`` and
    ``Z = -255 l / (h - l)``, both in float32, so that Z may miss its whole number by a rounding. One that
    stays signed has no zero point.
    """
    if stays_signed(node, "signed", x.codes.dtype, x.zero_point):
        return np.float32(x.scale), np.float32(0)
    if x.codes.dtype == np.uint8:
        return np.float32(x.scale), np.float32(x.zero_point)
    low, high = openvino_interval(x.scale, x.zero_point.astype(x.codes.dtype))
    return (high - low) / STEPS, -(STEPS * low) / (high - low)


def openvino_held(x: Coded, node: Node) -> Floats:
    """Return the codes that OpenVINO holds, uint8 or, where the grid stays signed, int8, as float32."""
    signed = stays_signed(node, "signed", x.codes.dtype, x.zero_point)
    lowest = 0 if signed else np.iinfo(x.codes.dtype).min
    return np.asarray(x.codes.astype(np.float32) - np.float32(lowest))


def openvino_codes(steps: Floats, node: Node, scale: Array, zero_point: Array) -> Array:
    """Return codes in the type of the file: `steps` rounded in uint8, zero point in them, then moved.

    Where the grid stays signed, `steps` have no zero point.
    """
    signed = stays_signed(node, "signed_output", zero_point.dtype, zero_point)
    codes = np.rint(steps) + np.float32(0 if signed else np.iinfo(zero_point.dtype).min)
    return to_codes(codes, node, scale, zero_point, added=True)


def openvino_sums_to_float(node: Node, arguments: Given) -> Floats:
    """Conv, Gemm without a quantizer: ``float32(acc) (Sx Sw[o]) + b``, each step rounded."""
    x, w, b = [*arguments, None][:3]
    sums, _, _ = accumulate(node, [x, w, None])
    values = sums.astype(np.float32) * along(openvino_grid(x, node)[0] * w.scale, sums)
    return np.asarray(values if b is None else values + along(floats(b), sums))


def twice_inverted(factor: np.float32) -> np.float32:
    """Return ``1 / (1 / factor)``: a last scalar factor is handed to oneDNN as the output's scale."""
    return np.float32(1) / (np.float32(1) / factor)


def openvino_conv(node: Node, arguments: Given) -> Array:
    """Conv with its FakeQuantize: ``rint(y F'')``, or with a zero point ``rint(fma(y, F, Z))``.

    ``F = 255 / (h - l)`` and ``Z = -255 l / (h - l)`` with the interval (l, h) of the output grid; F'' is F
    twice inverted. A grid that stays signed has no zero point.
    """
    *inputs, scale, zero_point = arguments
    values = openvino_sums_to_float(node, inputs)
    low, high = openvino_interval(scale, zero_point)
    factor = STEPS / (high - low)
    shift = -low * STEPS / (high - low)
    signed = stays_signed(node, "signed_output", zero_point.dtype, zero_point)
    small = signed or abs(shift) < STEPS * np.float32(1e-5)
    steps = values * twice_inverted(factor) if small else fused_multiply_add(values, factor, shift)
    return openvino_codes(steps, node, scale, zero_point)


def openvino_fake_quantize(
    x: Floats, interval: tuple[np.float32, np.float32], node: Node, scale: Array, zero_point: Array
) -> Array:
    """FakeQuantize in a generated kernel: ``rint(clamp(x, l, h) F - l F)``, ``F = 255 / (h - l)``.

    For a grid that stays signed ``rint(x F)``, saturated.
    """
    low, high = interval
    factor = STEPS / (high - low)
    signed = stays_signed(node, "signed_output", zero_point.dtype, zero_point)
    steps = x * factor if signed else x.clip(low, high) * factor - low * factor
    return openvino_codes(steps, node, scale, zero_point)


def openvino_quantize(node: Node, arguments: Given) -> Array:
    """QuantizeLinear of floats."""
    x, scale, zero_point = arguments
    return openvino_fake_quantize(floats(x), openvino_interval(scale, zero_point), node, scale, zero_point)


def openvino_residual(node: Node, arguments: Given) -> Array:
    """Add of codes and a Conv in float, then FakeQuantize, all in steps of the codes' grid (S, Z).

    ``v = (y - Z S) (1 / S)'' + q``, then FakeQuantize with ``l / S`` and ``h / S``. Without AMX not exact at
    ties where the codes are signed and no convolution reads them (a projection shortcut).
    """
    other, *inputs, scale, zero_point = arguments
    assert isinstance(other, Coded)
    values = openvino_sums_to_float(node, inputs)
    step, offset = openvino_grid(other, node)
    values = (values - offset * step) * twice_inverted(np.float32(1) / step)
    values = values + openvino_held(other, node)
    low, high = openvino_interval(scale, zero_point)
    return openvino_fake_quantize(values, (low / step, high / step), node, scale, zero_point)


def openvino_residual_in_kernel(node: Node, arguments: Given) -> Array:
    """Add of codes and a Conv with a pair of scale P behind it, in the Conv's kernel, in steps of the codes.

    The pair's FakeQuantize does not round: ``v = y (F O) + q`` with ``F = 255 / (127 P + 128 P)`` and
    ``O = (127 (P / S) + 128 (P / S)) / 255``; then ``rint(v K'')`` with ``K = 255 / (h / S)``; y is clamped
    to the pair's ends.
    """
    other, *inputs, pair, scale, zero_point = arguments
    assert isinstance(other, Coded)
    values = openvino_sums_to_float(node, inputs)
    lowest, highest = np.float32(-128), np.float32(127)
    part = np.float32(pair) / np.float32(other.scale)
    ends = np.float32(pair) * lowest, np.float32(pair) * highest
    factor = STEPS / (ends[1] - ends[0])
    factor *= (part * highest - part * lowest) / STEPS
    values = values.clip(*ends) * factor + openvino_held(other, node)
    _, high = openvino_interval(scale, zero_point)
    steps = values * twice_inverted(STEPS / (high / np.float32(other.scale)))
    return openvino_codes(steps, node, scale, zero_point)


def openvino_global_average(node: Node, arguments: Given) -> Array:
    """GlobalAveragePool: ``m = sum q / (H W) - Z`` in steps of the input, then its FakeQuantize."""
    x, scale, zero_point = arguments
    axes = tuple(range(2, x.codes.ndim))
    step, offset = openvino_grid(x, node)
    sums = openvino_held(x, node).sum(axis=axes, keepdims=True, dtype=np.float64)  # whole numbers: exact
    means = sums.astype(np.float32) / np.float32(np.prod(x.codes.shape[2:])) - offset
    low, high = openvino_interval(scale, zero_point)
    return openvino_fake_quantize(means, (low / step, high / step), node, scale, zero_point)


def openvino_lrn(node: Node, arguments: Given) -> Floats:
    """LRN of 5 channels and beta 3/4: ``x / sqrt(sqrt(s^3))``, ``s = fma(sum x^2, alpha / 5, bias)``."""
    x = floats(arguments[0])
    share, bias = np.float32(node.number("alpha", 1e-4) / 5), np.float32(node.number("bias", 1.0))
    padded = np.pad(x, ((0, 0), (2, 2), (0, 0), (0, 0)))
    channels = x.shape[1]
    sums = x * x
    for shift in (0, 1, 3, 4):
        near = padded[:, shift : shift + channels]
        sums = fused_multiply_add(near, near, sums)
    sums = fused_multiply_add(sums, share, bias)
    return np.asarray(x / np.sqrt(np.sqrt(sums * (sums * sums))))


def lrn_by_roots(node: Node, arguments: Given) -> Floats:
    """LRN of beta 3/4 in several operators: ``x (1 / (sqrt(s) sqrt(sqrt(s))))``.

    The convolution that sums begins at 0 with the first channel and adds the bias last. ONNX Runtime begins
    anew after 128 channels, which is not done here: a few of a thousand sums are another float32.
    """
    x = floats(arguments[0])
    size = node.integer("size", 1)
    share, before = np.float32(node.number("alpha", 1e-4)) / np.float32(size), (size - 1) // 2
    squares = np.pad(x * x, ((0, 0), (before, size - 1 - before), (0, 0), (0, 0)))
    sums = np.zeros_like(x)
    for shift in range(size):
        sums = fused_multiply_add(squares[:, shift : shift + x.shape[1]], share, sums)
    root = np.sqrt(sums + np.float32(node.number("bias", 1.0)))
    return np.asarray(x * (np.float32(1) / (root * np.sqrt(root))))


OPERATORS: dict[str, Operator] = {
    "onnxruntime.Conv": onnxruntime_sums,
    "onnxruntime.Gemm": onnxruntime_sums,
    "onnxruntime.MatMul": onnxruntime_sums,
    "onnxruntime.GemmToFloat": onnxruntime_gemm_to_float,
    "onnxruntime.Add": onnxruntime_add,
    "onnxruntime.Mul": onnxruntime_multiply,
    "onnxruntime.GlobalAveragePool": onnxruntime_global_average,
    "onnxruntime.LRN": onnxruntime_lrn,
    "onnxruntime.LRN by roots": lrn_by_roots,
    "openvino.QuantizeLinear": openvino_quantize,
    "openvino.Conv": openvino_conv,
    "openvino.ConvToFloat": openvino_sums_to_float,
    "openvino.GemmToFloat": openvino_sums_to_float,
    "openvino.Residual": openvino_residual,
    "openvino.ResidualInKernel": openvino_residual_in_kernel,
    "openvino.GlobalAveragePool": openvino_global_average,
    "openvino.LRN": openvino_lrn,
    "openvino.LRN by roots": lrn_by_roots,
}

# Which of them are convolutions or matrix products, and which put out codes.
MATRIX = frozenset(
    {
        "onnxruntime.Conv", "onnxruntime.Gemm", "onnxruntime.MatMul", "onnxruntime.GemmToFloat",
        "openvino.Conv", "openvino.ConvToFloat", "openvino.GemmToFloat", "openvino.Residual",
        "openvino.ResidualInKernel",
    }
)  # fmt: skip
QUANTIZERS = frozenset(kind for kind in OPERATORS if not kind.endswith(("ToFloat", "LRN", "LRN by roots")))
