"""Why an operator is not in integers, or stands there at all, and what can be done: read off file and kernel.

What stands here was asked of ONNX Runtime 1.31 and OpenVINO 2026.4; the tests ask again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fewbit.engines.exported import MATRIX, QUANTIZING
from fewbit.engines.run_graph import RunGraph
from fewbit.engines.session import EngineName

_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
# What ONNX Runtime runs in integers, or moves without dequantizing it, where quantizers stand around it.
_ORT_INTEGER = frozenset(
    {
        "Add", "AveragePool", "Concat", "Flatten", "Gather", "GlobalAveragePool", "LeakyRelu", "MaxPool",
        "Mul", "Pad", "Reshape", "Resize", "Sigmoid", "Slice", "Softmax", "Split", "Squeeze", "Transpose",
        "Unsqueeze",
    }
)  # fmt: skip
_CLAMPS = frozenset({"Relu", "Clip"})
# What OpenVINO computes inside the kernel of the convolution before it.
_OV_FUSED = frozenset({"Clip", "Elu", "Gelu", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Sigmoid"})
_LEAVE = "leave as is"
_BF16 = "bf16 for this region (fewbit search tries that)"
_FOR_ORT = "quantize for this engine (--engine onnxruntime): unsigned codes, with a quantizer behind it"
_FOR_OV = "quantize for this engine (--engine openvino): no quantizer before it, and symmetric codes"
_CLIP = "a range that ends where the Clip does: the recipes of fewbit end it there"
_VNNI_ROW, _VNNI_GROUP = 32, 4


class Reason(NamedTuple):
    """Why, and what one can do about it."""

    why: str
    remedy: str


def why_float(graph: RunGraph, names: tuple[str, ...], engine: EngineName) -> Reason:
    """Say what keeps an operator out of integers whose file does not ask for float there.

    Args:
        graph: What runs.
        names: Nodes of the file that it stands for.
        engine: Which engine runs it.
    """
    nodes = graph.exported.nodes
    matrix = next((name for name in names if graph.exported.is_matrix(name)), None)
    if matrix is not None:
        return _why_matrix(graph, matrix, engine)
    if any(map(graph.exported.is_norm, names)):
        return Reason("engines normalize responses in float", f"{_LEAVE}, or {_BF16}")
    if not names:
        return Reason("the engine made it itself; the file has no such operator", _LEAVE)
    lacking = [n for n in names if not _has_kernel(nodes[n].op_type, engine)]
    kind = nodes[(lacking or names)[0]].op_type
    if lacking and engine == "openvino":
        return Reason(
            f"{_NAMES[engine]} has only a float reference kernel for {kind}, and computes it in no "
            "convolution's kernel",
            "written as Clip(x / 6 + 0.5, 0, 1) it is computed in the convolution's kernel",
        )
    if lacking and kind in _CLAMPS:
        return Reason(
            f"{kind} has no integer kernel in {_NAMES[engine]}: it runs in integers only as the clamp of the "
            "quantizer behind the convolution before it",
            _FOR_ORT,
        )
    if lacking:
        elsewhere = "; OpenVINO computes it in the convolution's kernel" if kind in _OV_FUSED else ""
        return Reason(
            f"{kind} has no integer kernel in {_NAMES[engine]}",
            f"{_LEAVE}: no integer kernel on this engine{elsewhere}",
        )
    why = graph.exported.why_float(names[0])
    if "no QuantizeLinear" in why:
        return Reason(why, f"put a quantizer behind it: {_FOR_ORT}" if engine == "onnxruntime" else _LEAVE)
    if "not quantized" in why:
        return Reason(why, "quantize its inputs, or leave as is where they are floats anyway")
    return Reason(why.replace("the engine", _NAMES[engine]), f"{_LEAVE}, or {_BF16}")


def _has_kernel(kind: str, engine: EngineName) -> bool:
    return kind in _ORT_INTEGER if engine == "onnxruntime" else kind != "HardSigmoid"


def _why_matrix(graph: RunGraph, name: str, engine: EngineName) -> Reason:
    """Say what keeps a convolution or matrix product with quantized weights in float."""
    exported = graph.exported
    node = exported.nodes[name]
    if not exported.is_quantized(node.input[0]):
        return Reason("weights only: its input is not quantized", "quantize the tensor that it reads")
    if engine == "onnxruntime":
        why = exported.why_float(name) or f"{_NAMES[engine]} took no integer kernel for this {node.op_type}"
        narrow = exported.zero_point(node.input[1])
        if narrow is None or narrow.dtype in (np.int8, np.uint8):
            return Reason(why, _CLIP if "above the Clip" in why else _FOR_ORT)
        return Reason(f"its weights are {narrow.dtype} codes", "8-bit containers for the weights")
    zero, weight_zero = exported.zero_point(node.input[0]), exported.zero_point(node.input[1])
    if weight_zero is not None and weight_zero.dtype != np.int8:
        return Reason(
            f"its weights are {weight_zero.dtype} codes, and {_NAMES[engine]} multiplies only int8 ones",
            "int8 weights: quantize again with fewbit",
        )
    if zero is not None and zero.dtype == np.int8 and np.any(zero):
        return Reason(
            f"its input has signed codes with zero point {int(zero.flat[0])}; {_NAMES[engine]} takes zero "
            "points only with unsigned ones",
            "symmetric or unsigned codes: --recipe int8",
        )
    return Reason(f"{_NAMES[engine]} took no integer kernel for this {node.op_type}", _LEAVE)


def why_unfused(graph: RunGraph, place: int) -> Reason:
    """Say why element-wise work is an operator of its own: codes in, floats inside, codes out."""
    exported, names = graph.exported, graph.layers[place]
    for name in names:
        before, zero = _convolution_before(graph, name)
        if before is not None and exported.nodes[name].op_type not in ("Add", "Mul"):
            told = " with a zero point" if zero else ""
            return Reason(
                f"a quantizer{told} stands between its convolution and it, so it is not computed in that "
                "kernel but in float, between codes that are read and written again",
                f"{_FOR_OV}; or {_BF16}",
            )
    if any(exported.nodes[name].op_type == "Mul" for name in names):
        return Reason("a product of two tensors is computed in no convolution's kernel", _LEAVE)
    if any(_sums_unrounded(graph, name) for name in names):
        return Reason(
            "no quantizer stands between its convolution and the sum, so the sum is not computed in that "
            "kernel",
            "a quantizer between them, for one rounding more",
        )
    return Reason("OpenVINO computes it in no convolution's kernel", f"{_LEAVE}, or {_BF16}")


def _sums_unrounded(graph: RunGraph, name: str) -> bool:
    """Say whether a node adds the result of a convolution that is not rounded in between."""
    node, nodes = graph.exported.nodes[name], graph.exported.nodes
    makers = [graph.exported.maker(value) for value in node.input]
    return node.op_type == "Add" and any(m is not None and nodes[m].op_type in MATRIX for m in makers)


def _convolution_before(graph: RunGraph, name: str) -> tuple[str | None, int]:
    """Return the convolution that a node reads through a quantizer, and the quantizer's zero point."""
    exported = graph.exported
    for value in exported.nodes[name].input:
        if not exported.is_quantized(value):
            continue
        zero, maker = exported.zero_point(value), exported.maker(value)
        while maker is not None and exported.nodes[maker].op_type in QUANTIZING:
            maker = exported.maker(exported.nodes[maker].input[0])
        if maker is not None and exported.nodes[maker].op_type in MATRIX:
            return maker, 0 if zero is None else int(zero.flat[0])
    return None, 0


def why_legacy(graph: RunGraph, place: int) -> Reason:
    """Say why an operator in integers has an old or a reference kernel on OpenVINO."""
    operator, exported = graph.operators[place], graph.exported
    kernel = operator.flow.kernel
    if not operator.matrix:
        return Reason(f"OpenVINO runs this {operator.kind} with its reference kernel {kernel}", _LEAVE)
    made = operator.flow.makes
    reads = {graph.operators[source].flow.makes for source in graph.sources(place)}
    matrix = next((n for n in graph.layers[place] if exported.is_matrix(n)), None)
    if matrix is None:
        return Reason(f"OpenVINO took the kernel {kernel}", _LEAVE)
    weight = exported.shape(exported.nodes[matrix].input[1])
    inputs = weight[1] if len(weight) == 4 else 0
    if weight[2:] == (1, 1) and inputs > _VNNI_ROW and inputs % _VNNI_GROUP:
        return Reason(
            f"the new 1x1 kernels take input channels in multiples of {_VNNI_GROUP}; it has {inputs} "
            f"({kernel})",
            f"{_LEAVE}, or {_BF16}",
        )
    if made == "bf16" and "int8" in reads:
        return Reason(
            f"it reads signed codes and writes bf16, which only old kernels do ({kernel})",
            "a quantizer behind it, or float32 instead of bf16 for the floats",
        )
    zero = exported.zero_point(exported.nodes[matrix].input[0])
    if zero is not None and np.any(zero):
        return Reason(
            f"its input has zero point {int(zero.flat[0])}, which sends it to an old kernel ({kernel})",
            "symmetric activations: quantize for this engine, or --recipe int8-symmetric",
        )
    return Reason(f"OpenVINO took an old kernel ({kernel})", _LEAVE)


def why_input(takes: str) -> Reason:
    """Say why the image is converted before the first layer."""
    if takes == "uint8":
        return Reason("pixels are brought into the layout of the first layer", _LEAVE)
    return Reason(
        "float images are rounded to codes and brought into the layout of the first layer",
        "uint8 pixels in: --input uint8, which folds the preprocessing into the first layer",
    )


def why_conversion(graph: RunGraph, places: Sequence[int], by_choice: bool) -> Reason:
    """Say what conversions that belong to no float operator convert between.

    Args:
        graph: What runs.
        places: One conversion, or several one behind the other.
        by_choice: The file wants floats on one side.
    """
    before, behind = neighbour(graph, places[0], forward=False), neighbour(graph, places[-1], forward=True)
    where = f"between {before or 'the input'} and {behind or 'the output'}"
    if by_choice:
        return Reason(
            f"the border {where}, where the recipe changes between integers and floats",
            f"{_LEAVE}, or keep fewer separate regions in float",
        )
    if not behind:
        return Reason("the result of the network is brought into the form of its output", _LEAVE)
    moved = [name for place in places for name in graph.layers[place]]
    if moved:
        kinds = ", ".join(graph.exported.nodes[name].op_type for name in moved)
        return Reason(f"the file itself moves values {where} ({kinds})", _LEAVE)
    if any(graph.operators[place].kind in QUANTIZING for place in places):
        return Reason(f"codes change their scale {where}", "one scale on both sides")
    made = [graph.operators[place].flow for place in (*graph.sources(places[0]), places[-1])]
    layouts = [flow.layout for flow in made if flow.layout]
    told = f" ({layouts[0]} to {layouts[-1]})" if len(layouts) > 1 else ""
    return Reason(f"another layout in memory is wanted {where}{told}", _LEAVE)


def neighbour(graph: RunGraph, place: int, forward: bool) -> str:
    """Return the nearest node of the file before or behind an operator; empty where there is none."""
    waiting, seen = [place], {place}
    while waiting:
        for other in graph.beyond(waiting.pop(0), forward):
            if graph.layers[other]:
                return graph.layers[other][0 if forward else -1]
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return ""
