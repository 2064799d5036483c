"""Residual sums inside OpenVINO's convolutions: a pair that changes nothing where the engine wants one."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from torch import fx, nn

from fewbit.export.emit import Emitter
from fewbit.export.sizes import Sizes
from fewbit.net import Layer, Net
from fewbit.place.quantizer import QuantConv2d, Quantizer
from fewbit.place.targets import Target
from fewbit.spec import PASSES

_ROOM = 1.001
"""More than float32 rounds a scale by: the ends stay outside of what is told apart."""


def pair_scales(net: Net, target: Target | None, sizes: Sizes) -> dict[fx.Node, float]:
    """Return the convolutions that get a pair, with its scale.

    OpenVINO 2026.4 adds a residual inside the convolution's kernel only where a FakeQuantize stands between
    convolution and sum, and then does not round there: the kernel clamps to the ends of its grid and goes on
    in float. Without one the sum is an operator of its own, over values in float32 or bf16. In::

        codes = clamp(round(max(0, y + r) / S_out), 0, 255)    with r = S_r q, q in 0..255

    a y below ``-255 S_r`` gives code 0 and one above ``255 S_out`` code 255 whatever it is, so a grid of int8
    that covers these changes none: S is the power of two behind ``max(255 S_r / 128, 255 S_out / 127)``.

    The kernel overwrites the residual with the sum, so a pair is put only where it may: the residual is a
    block's input, read by the sum and by what leads to the convolution, but neither by the convolution itself
    nor by anything else, and both are of one shape with more than one pixel. Elsewhere the engine adds
    outside and rounds at the pair, and where no ReLU follows the sum it gains nothing.

    Args:
        net: Placed and calibrated.
        target: Whose file it becomes.
        sizes: Of the network's values.
    """
    if target is None or not target.fuses_residual:
        return {}
    layers = {layer.node: layer for layer in net.layers()}
    found = {}
    for layer in layers.values():
        behind = _codes_behind(layer, layers) if layer.kind == "Add" else None
        operands = [node for node in layer.node.args if isinstance(node, fx.Node)]
        if behind is None or len(operands) != 2:
            continue
        for conv, other in (operands, operands[::-1]):
            residual = layers[other].module if other in layers else None
            if _is_lone_conv(conv, layers) and _is_full(residual) and _may_overwrite(other, conv, sizes):
                assert isinstance(residual, Quantizer)
                found[conv] = covering_scale(float(residual.scale), float(behind.scale))
    return found


def _may_overwrite(other: fx.Node, conv: fx.Node, sizes: Sizes) -> bool:
    """Tell whether a convolution's kernel may put its sum where the residual lies."""
    shape = sizes.of(other)
    if shape != sizes.of(conv) or math.prod(shape[2:]) == 1:
        return False
    before, open_nodes = set[fx.Node](), list(conv.all_input_nodes)
    while open_nodes:
        node = open_nodes.pop()
        if node not in before:
            before.add(node)
            open_nodes += node.all_input_nodes
    (adder,) = conv.users
    others = set(other.users) - {adder}
    return bool(others) and others <= before and conv not in others


def covering_scale(residual: float, output: float) -> float:
    """Return the scale of a grid of int8 around all that is told apart behind a sum, a power of two.

    So files of the recipe "int8-power-of-two" have no other scale.

    Args:
        residual: Scale of the codes that are added.
        output: Scale of the codes behind the sum.
    """
    least = _ROOM * max(255 * residual / 128, 255 * output / 127)
    return float(2.0 ** math.ceil(math.log2(least)))


def add_pair(e: Emitter, layer: Layer, x: ir.Value, scale: float) -> ir.Value:
    """Add the pair behind a convolution and return its value."""
    name = f"{layer.name}:sum"
    grid = e.constant(f"{name}.scale", scale), e.constant(f"{name}.zero_point", 0, np.int8)
    codes = e.add("QuantizeLinear", f"{name}:q", [x, *grid])
    result = e.add("DequantizeLinear", f"{name}:dq", [codes, *grid])
    for node in e.nodes[-2:]:
        node.metadata_props[PASSES] = "clamps only"
    return result


def _codes_behind(layer: Layer, layers: dict[fx.Node, Layer]) -> Quantizer | None:
    """Return the one grid of full uint8 codes behind the ReLU behind a sum."""
    if len(layer.node.users) != 1:
        return None
    (after,) = layer.node.users
    if after not in layers or not isinstance(layers[after].module, nn.ReLU) or len(after.users) != 1:
        return None
    (quantizer,) = (layers[user].module if user in layers else None for user in after.users)
    return quantizer if isinstance(quantizer, Quantizer) and _is_full(quantizer) else None


def _is_full(module: object) -> bool:
    """Tell whether codes are all of uint8 with zero point 0."""
    return (
        isinstance(module, Quantizer)
        and module.unsigned
        and (module.qmin, module.qmax) == (0, 255)
        and not bool(module.zero_point.any())
    )


def _is_lone_conv(node: fx.Node, layers: dict[fx.Node, Layer]) -> bool:
    return node in layers and isinstance(layers[node].module, QuantConv2d) and len(node.users) == 1
