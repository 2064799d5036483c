"""QuantizeLinear / DequantizeLinear pairs, in the form that the engines fuse."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from fewbit.export.emit import Emitter, conv_attributes, product, stand_between
from fewbit.net import Layer
from fewbit.numerics import quantize_bias
from fewbit.place.power_quantizer import PowerQuantizer
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLayer


def grid_constants(
    e: Emitter, quantizer: Quantizer, name: str, container: str
) -> tuple[ir.Value, ir.Value, int]:
    """Add scale and zero point of a grid.

    Args:
        e: The graph.
        quantizer: The grid.
        name: Prefix of the initializers.
        container: "auto" keeps the codes' own sign; "unsigned" shifts signed codes by 128 into uint8.

    Returns:
        Scale, zero point, and the shift that was added to the codes.
    """
    shift = 128 if container == "unsigned" and not quantizer.unsigned else 0
    dtype = np.uint8 if quantizer.unsigned or shift else np.int8
    scale = e.constant(f"{name}.scale", quantizer.scale)
    zero_point = e.constant(f"{name}.zero_point", quantizer.zero_point.numpy() + shift, dtype)
    return scale, zero_point, shift


def quantize_activation(
    e: Emitter,
    quantizer: Quantizer,
    layer: Layer,
    x: ir.Value,
    container: str,
    clip: tuple[float, float] = (-math.inf, math.inf),
) -> ir.Value:
    """Add a QuantizeLinear / DequantizeLinear pair behind a value and return the dequantized value.

    Codes that do not fill their container are clamped between the pair, so that the kernels on both sides
    stay in integers.

    Args:
        e: The graph.
        quantizer: The grid.
        layer: Of the quantizer.
        x: The value.
        container: As in `grid_constants`.
        clip: Ends of a clip before the quantizer, which is left to the codes.
    """
    name = layer.name
    scale, zero_point, shift = grid_constants(e, quantizer, name, container)
    tensor = layer.inputs[0]
    codes = e.add("QuantizeLinear", f"{tensor}:q", [x, scale, zero_point])
    low, high = (code + shift for code in quantizer.limits(*clip))
    dtype = np.uint8 if quantizer.unsigned or shift else np.int8
    if (low, high) != (np.iinfo(dtype).min, np.iinfo(dtype).max):
        # A shared grid may stand behind several values, each with a clip of its own.
        limits = [e.constant(f"{name}.code{code}", code, dtype) for code in (low, high)]
        codes = e.add("Clip", f"{tensor}:clip", [codes, *limits])
    return e.add("DequantizeLinear", f"{tensor}:dq", [codes, scale, zero_point])


def weight_codes(layer: QuantLayer) -> NDArray[np.int8]:
    """Return the int8 codes of a layer's weight, in the weight's shape."""
    with torch.no_grad():
        return layer.weight_quantizer.codes(layer.weight).numpy().astype(np.int8)


def bias_codes(layer: QuantLayer, reads: Quantizer) -> NDArray[np.int32] | None:
    """Return the int32 codes of a layer's bias, whose scale is input scale x weight scale."""
    if layer.bias is None:
        return None
    scale = layer.weight_quantizer.scale.numpy()
    return quantize_bias(layer.bias.detach().numpy(), reads.scale.numpy(), scale)


def quantized_layer(e: Emitter, layer: Layer, x: ir.Value, reads: Quantizer | None) -> ir.Value:
    """Add a convolution or matrix product with an int8 weight behind DequantizeLinear.

    Args:
        e: The graph.
        layer: Its module is a QuantConv2d or QuantLinear.
        x: Its input, dequantized.
        reads: The input's grid; none where it is float (weights only), then the bias stays float.
    """
    module = layer.module
    assert isinstance(module, QuantLayer)
    weight = _dequantized_weight(e, layer.name, module)
    bias = None if module.bias is None else _bias(e, layer.name, module, reads)
    if isinstance(module, QuantConv2d):
        attributes = conv_attributes(module)
        if reads is None and module.kernel_size == (1, 1) and attributes["strides"] != [1, 1]:
            # Of an int8 weight and a float input OpenVINO 2026.4 makes a product that forgets the stride.
            x = stand_between(e, f"{layer.name}.strides", x, attributes["strides"])
            attributes["strides"] = [1, 1]
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return e.add("Conv", layer.name, inputs, **attributes)
    return product(e, layer, x, weight, bias)


def _dequantized_weight(e: Emitter, name: str, module: QuantLayer) -> ir.Value:
    quantizer = module.weight_quantizer
    if isinstance(quantizer, PowerQuantizer):
        return _looked_up_weight(e, name, module, quantizer)
    codes = e.constant(f"{name}.weight:q", weight_codes(module), np.int8)
    scale = e.constant(f"{name}.weight.scale", quantizer.scale)
    zero_point = e.constant(f"{name}.weight.zero_point", quantizer.zero_point, np.int8)
    axis = {"axis": 0} if quantizer.scale.dim() else {}
    return e.add("DequantizeLinear", f"{name}.weight:dq", [codes, scale, zero_point], **axis)


def _looked_up_weight(e: Emitter, name: str, module: QuantLayer, quantizer: PowerQuantizer) -> ir.Value:
    """Add a weight whose codes are looked up; engines do so once, when they open the file.

    The table of each exponent lies in one tensor, one behind the other; a channel's codes are moved to its
    own.
    """
    tables, which = quantizer.tables()
    rank = module.weight.dim()
    shape = (-1, *[1] * (rank - 1)) if which.dim() else ()
    first = which.numpy() * tables.shape[1] - quantizer.qmin
    codes = e.constant(f"{name}.weight:q", weight_codes(module), np.int8)
    starts = e.constant(f"{name}.weight.start", first.reshape(shape), np.int32)
    values = e.constant(f"{name}.weight.table", tables.reshape(-1))
    scale = e.constant(f"{name}.weight.scale", quantizer.scale.numpy().reshape(shape))
    wide = e.add("Cast", f"{name}.weight:wide", [codes], to=int(ir.DataType.INT32))
    places = e.add("Add", f"{name}.weight:place", [wide, starts])
    units = e.add("Gather", f"{name}.weight:unit", [values, places])
    return e.add("Mul", f"{name}.weight:dq", [units, scale])


def _bias(e: Emitter, name: str, module: QuantLayer, reads: Quantizer | None) -> ir.Value:
    assert module.bias is not None
    if reads is None:
        return e.constant(f"{name}.bias", module.bias)
    codes = bias_codes(module, reads)
    assert codes is not None
    scale = reads.scale.numpy() * module.weight_quantizer.scale.numpy()
    values = e.constant(f"{name}.bias:q", codes, np.int32)
    scales = e.constant(f"{name}.bias.scale", scale)
    zero = e.constant(f"{name}.bias.zero_point", np.zeros_like(scale), np.int32)
    axis = {"axis": 0} if np.ndim(scale) else {}
    return e.add("DequantizeLinear", f"{name}.bias:dq", [values, scales, zero], **axis)


def dynamic_codes(
    e: Emitter, quantizer: DynamicQuantizer, layer: Layer, x: ir.Value, rank: int
) -> tuple[ir.Value, ir.Value]:
    """Add the nodes that quantize each sample by its own largest magnitude.

    Returns:
        uint8 codes with zero point 128, and the scale of each sample (N, 1, ...).
    """
    name, tensor = layer.name, layer.inputs[0]
    axes = e.constant(f"{name}.axes", list(range(1, rank)), np.int64)
    magnitude = e.add("Abs", f"{tensor}:abs", [x])
    peak = e.add("ReduceMax", f"{tensor}:peak", [magnitude, axes], keepdims=1)
    top = e.constant(f"{name}.qmax", np.float32(quantizer.qmax))
    raw = e.add("Div", f"{tensor}:raw_scale", [peak, top])
    zero = e.constant("dynamic:zero", np.float32(0))
    one = e.constant("dynamic:one", np.float32(1))
    floor = e.constant("dynamic:floor", np.float32(1e-12))
    empty = e.add("Equal", f"{tensor}:empty", [peak, zero])
    held = e.add("Max", f"{tensor}:held_scale", [raw, floor])
    scale = e.add("Where", f"{tensor}:scale", [empty, one, held])
    steps = e.add("Div", f"{tensor}:steps", [x, scale])
    rounded = e.add("Round", f"{tensor}:round", [steps])
    limits = [e.constant(f"{name}.low", np.float32(-quantizer.qmax)), top]
    clipped = e.add("Clip", f"{tensor}:clip", [rounded, *limits])
    shifted = e.add("Add", f"{tensor}:shift", [clipped, e.constant("dynamic:shift", np.float32(128))])
    return e.add("Cast", f"{tensor}:q", [shifted], to=int(ir.DataType.UINT8)), scale


def dynamic_layer(e: Emitter, layer: Layer, codes: ir.Value, scale: ir.Value) -> ir.Value:
    """Add a convolution or matrix product of int8 weights and per-sample codes, summed in integers."""
    module = layer.module
    assert isinstance(module, QuantLayer)
    name, values = layer.name, weight_codes(module)
    zero_point = e.constant("dynamic:zero_point", 128, np.uint8)
    weight_scale = module.weight_quantizer.scale.numpy()
    if isinstance(module, QuantConv2d):
        weight = e.constant(f"{name}.weight:q", values, np.int8)
        inputs = [codes, weight, zero_point]
        acc = e.add("ConvInteger", f"{name}:acc", inputs, **conv_attributes(module))
        shape: tuple[int, ...] = (-1, 1, 1) if weight_scale.ndim else ()
    else:
        weight = e.constant(f"{name}.weight:q", values.T, np.int8)
        acc = e.add("MatMulInteger", f"{name}:acc", [codes, weight, zero_point])
        shape = (-1,) if weight_scale.ndim else ()
    sums = e.add("Cast", f"{name}:sums", [acc], to=int(ir.DataType.FLOAT))
    # Two products, not the product of the scales: ONNX Runtime fuses that form into MatMulIntegerToFloat,
    # which takes one scale for the whole batch and so would give a sample its neighbour's scale.
    own = e.add("Mul", f"{name}:own", [sums, scale])
    weight_scales = e.constant(f"{name}.weight.scale", weight_scale.reshape(shape))
    result = e.add("Mul", name if module.bias is None else f"{name}:product", [own, weight_scales])
    if module.bias is not None:
        bias = module.bias.reshape(-1, 1, 1) if isinstance(module, nn.Conv2d) else module.bias
        result = e.add("Add", name, [result, e.constant(f"{name}.bias", bias)])
    return result
