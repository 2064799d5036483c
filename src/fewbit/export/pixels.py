"""The way into a file: pixels as they are, or preprocessed images taken back to pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import fx

from fewbit import ops
from fewbit.export.emit import Emitter
from fewbit.export.frame import frame
from fewbit.export.qdq import grid_constants
from fewbit.net import Layer
from fewbit.place.quantizer import PixelQuantizer
from fewbit.spec import ImageInput

INPUT_TYPES = {"float32": ir.DataType.FLOAT, "uint8": ir.DataType.UINT8}
_CHANNELS_FIRST = [0, 3, 1, 2]


@dataclass(frozen=True)
class _Way:
    """A tensor on the way: its value, whether that is uint8 codes, and the quantizer that it went through."""

    value: ir.Value
    coded: bool
    quantizer: Layer | None = None


class PixelWay:
    """Emits what stands between the image and the layers behind `ops.Pixels`.

    The pixels, their rounding and the frame around them are one tensor of uint8 codes: the frame is joined to
    the codes, and one DequantizeLinear stands before the convolution, so that kernels see integers alone. A
    uint8 input keeps its order (N, H, W, C); the Transpose stands behind the DequantizeLinear, where OpenVINO
    and ONNX Runtime both find that it is the order in which their integer kernels read. In front of it
    OpenVINO 2026.4 computes the convolution in float.

    Args:
        emitter: The graph.
        takes: What the file takes.
        image: Its input.
    """

    def __init__(self, emitter: Emitter, takes: ImageInput, image: ir.Value) -> None:
        self.emitter, self.image, self.channels_last = emitter, image, takes == "uint8"
        self._ways: dict[fx.Node, tuple[Layer, _Way]] = {}

    def __contains__(self, node: object) -> bool:
        return node in self._ways

    def goes_through(self, layer: Layer) -> bool:
        """Tell whether a layer is on the way."""
        on = isinstance(layer.module, PixelQuantizer | ops.Frame) and layer.node.args[0] in self
        return on or isinstance(layer.module, ops.Pixels)

    def emit(self, layer: Layer) -> None:
        """Add the nodes of a layer on the way."""
        self._ways[layer.node] = layer, self._emit(layer)

    def _emit(self, layer: Layer) -> _Way:
        e, module = self.emitter, layer.module
        if isinstance(module, ops.Pixels):
            if self.channels_last:
                return _Way(self.image, coded=True)
            return _Way(e.layer(layer, [self.image]), coded=False)
        source = layer.node.args[0]
        assert isinstance(source, fx.Node)
        before = self._ways[source][1]
        if isinstance(module, ops.Frame):
            dtype = np.uint8 if before.coded else np.float32
            return _Way(frame(e, layer, before.value, self.channels_last, dtype), before.coded)
        if before.coded:
            return _Way(before.value, coded=True, quantizer=layer)
        assert isinstance(module, PixelQuantizer)
        scale, zero_point, _ = grid_constants(e, module, layer.name, "auto")
        codes = e.add("QuantizeLinear", f"{layer.inputs[0]}:q", [before.value, scale, zero_point])
        return _Way(codes, coded=True, quantizer=layer)

    def floats(self, node: fx.Node) -> ir.Value:
        """Return a tensor of the way as float32 (N, C, H, W), for the layers behind it."""
        layer, way = self._ways[node]
        if not way.coded:
            return way.value
        e, name = self.emitter, layer.name
        if way.quantizer is None:
            value = e.add("Cast", f"{name}:float", [way.value], to=int(ir.DataType.FLOAT))
        else:
            module, name = way.quantizer.module, way.quantizer.inputs[0]
            assert isinstance(module, PixelQuantizer)
            scale, zero_point, _ = grid_constants(e, module, way.quantizer.name, "auto")
            value = e.add("DequantizeLinear", f"{name}:dq", [way.value, scale, zero_point])
        if not self.channels_last:
            return value
        return e.add("Transpose", f"{name}:channels_first", [value], perm=_CHANNELS_FIRST)
