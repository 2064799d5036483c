"""Export: a Net becomes an ONNX file, the same bytes each time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
from torch import fx, nn

from fewbit import ops
from fewbit.errors import RecipeError
from fewbit.export.emit import Emitter, stand_between
from fewbit.export.pixels import INPUT_TYPES, PixelWay
from fewbit.export.qdq import dynamic_codes, dynamic_layer, quantize_activation, quantized_layer
from fewbit.export.residual_sums import add_pair, pair_scales
from fewbit.files import write_atomically
from fewbit.net import Layer, Net
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLinear
from fewbit.place.targets import Target
from fewbit.ranges.calibrate import input_quantizer
from fewbit.spec import ImageInput
from fewbit.version import __version__

OPSET = 21
IR_VERSION = 10
_NOT_RISING = frozenset({"Silu", "HardSwish", "Gelu", "Mish", "PRelu"})


def export_onnx(
    net: Net,
    path: Path,
    target: Target | None = None,
    metadata: Mapping[str, str] | None = None,
    image: ImageInput = "float32",
) -> None:
    """Write a Net as ONNX: input "input", output "logits" (N, classes), any N.

    Each node has the name of its layer, each quantized tensor the name of its layer with ":q" behind it.

    Args:
        net: Float, or quantized and calibrated.
        path: The file; it is replaced in one step.
        target: The engine it is for; ONNX Runtime wants unsigned activation codes everywhere.
        metadata: Further facts for the file's metadata.
        image: What the file takes: "float32" preprocessed images (N, C, H, W), or "uint8" pixels
            (N, H, W, C), which the step fold_input makes possible.

    Raises:
        RecipeError: The Net has quantizers without a grid, or its preprocessing is not folded.
        OutputError: The file cannot be written.
    """
    model = build_onnx(net, target, metadata, image)
    data = ir.to_proto(model).SerializeToString(deterministic=True)
    with write_atomically(path) as beside:
        beside.write_bytes(data)


def build_onnx(
    net: Net,
    target: Target | None = None,
    metadata: Mapping[str, str] | None = None,
    image: ImageInput = "float32",
) -> ir.Model:
    """Return the model that `export_onnx` writes."""
    if "placed" in net.facts and "calibrated" not in net.facts:
        raise RecipeError(
            f"{net.name}: is placed but not calibrated; put the step 'calibrate' before the export"
        )
    if image == "uint8" and "pixels" not in net.facts:
        raise RecipeError(
            f"{net.name}: takes preprocessed images; put the step 'fold_input' behind 'fold_bn' for a file "
            "that takes uint8 pixels"
        )
    emitter = Emitter(net, 0 if target is None else target.split_norm_channels)
    float32 = ir.TensorType(ir.DataType.FLOAT)
    channels, *size = net.input_size
    shape = ir.Shape(["N", *size, channels] if image == "uint8" else ["N", channels, *size])
    given = ir.Value(name="input", type=ir.TensorType(INPUT_TYPES[image]), shape=shape)
    result = _Walk(net, emitter, given, target, image).run()
    result.name, result.type, result.shape = "logits", float32, ir.Shape(["N", net.classes])
    graph = ir.Graph(
        inputs=[given],
        outputs=[result],
        nodes=emitter.nodes,
        initializers=list(emitter.initializers.values()),
        opset_imports={"": OPSET},
        name=net.name,
    )
    facts = {"fewbit.version": __version__, "fewbit.network": net.name, "fewbit.activations": _scope(net)}
    facts |= {f"fewbit.{key}": value for key, value in (metadata or {}).items()}
    return ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name="fewbit",
        producer_version=__version__,
        metadata_props=facts,
    )


def _scope(net: Net) -> str:
    """Say over what the parameters of activations are taken."""
    modules = [layer.module for layer in net.layers()]
    if any(isinstance(module, DynamicQuantizer) for module in modules):
        return "dynamic-sample"
    return "static" if any(isinstance(module, Quantizer) for module in modules) else "float"


class _Walk:
    """Visits the graph in order and keeps each node's ONNX value."""

    def __init__(
        self, net: Net, emitter: Emitter, image: ir.Value, target: Target | None, takes: ImageInput
    ) -> None:
        self.net, self.emitter = net, emitter
        self.pixels = PixelWay(emitter, takes, image)
        self.container = "unsigned" if target is not None and not target.symmetric_activations else "auto"
        self.values: dict[fx.Node, ir.Value] = {}
        self.dynamic: dict[fx.Node, tuple[ir.Value, ir.Value]] = {}
        self.layers = {layer.node: layer for layer in net.layers()}
        self.image = image
        # Behind a concatenation OpenVINO 2026.4 loses the scale of signed codes, not of unsigned ones around
        # a zero point of 128.
        self.sums = pair_scales(net, target, emitter.sizes)
        self.joined = {id(module) for module in self._joined()} if self.container == "auto" else set()

    def _joined(self) -> Iterator[Quantizer]:
        """Give the quantizers with signed codes that stand behind a concatenation."""
        for layer in self.layers.values():
            module = layer.module
            if isinstance(module, Quantizer) and not module.unsigned and self._joins(layer.node.args[0]):
                yield module

    def _joins(self, node: object) -> bool:
        """Tell whether a value is a concatenation, scaled and shifted at most."""
        while self._kind(node) in ("BatchNorm", "Affine") and isinstance(node, fx.Node):
            node = node.args[0]
        return self._kind(node) == "Concat"

    def _kind(self, node: object) -> str:
        return self.layers[node].kind if isinstance(node, fx.Node) and node in self.layers else "input"

    def run(self) -> ir.Value:
        """Emit every layer and return the value of the logits."""
        for node in self.net.graph.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.image
            elif node.op == "output":
                return self._value(node.args[0])
            elif self.pixels.goes_through(self.layers[node]):
                self.pixels.emit(self.layers[node])
            else:
                self.values[node] = self._emit(self.layers[node])
        raise AssertionError("a graph has an output")

    def _value(self, node: fx.Node) -> ir.Value:
        if node not in self.values and node in self.pixels:
            self.values[node] = self.pixels.floats(node)
        return self.values[node]

    def _emit(self, layer: Layer) -> ir.Value:
        inputs = [self._value(source) for source in layer.node.args if isinstance(source, fx.Node)]
        module, e = layer.module, self.emitter
        if isinstance(module, Quantizer):
            container = "unsigned" if id(module) in self.joined else self.container
            clip = self._clip_on_codes(layer.node.args[0]) or (-math.inf, math.inf)
            return quantize_activation(e, module, layer, inputs[0], container, clip)
        if isinstance(module, DynamicQuantizer):
            rank = len(e.size_of_input(layer))
            self.dynamic[layer.node] = dynamic_codes(e, module, layer, inputs[0], rank)
            return self.dynamic[layer.node][0]
        if not isinstance(module, QuantConv2d | QuantLinear):
            if isinstance(module, nn.AvgPool2d) and id(input_quantizer(self.net, layer.node)) in self.joined:
                e.padded_before.add(
                    layer.name
                )  # the same OpenVINO averages over codes of 0, not of the zero point
            if self._clip_on_codes(layer.node) is not None:
                return inputs[0]
            return e.layer(layer, self._kept_behind(layer, self._kept_apart(layer, inputs)))
        reads = input_quantizer(self.net, layer.node)
        if isinstance(reads, DynamicQuantizer):
            source = layer.node.args[0]
            assert isinstance(source, fx.Node)
            return dynamic_layer(e, layer, *self.dynamic[source])
        value = quantized_layer(e, layer, inputs[0], reads)
        scale = self.sums.get(layer.node)
        return value if scale is None else add_pair(e, layer, value, scale)

    def _clip_on_codes(self, node: object) -> tuple[float, float] | None:
        """Return the ends of a ReLU or clip that is left to the codes behind it, or none where it stays.

        ONNX Runtime takes a convolution with its activation to integers only where the whole container's ends
        lie within the activation's, which those of fewer bits, of a scale that is a power of two or of a
        shared grid need not. Clamping the codes is the same, and where they end within the clip anyway it is
        nothing. OpenVINO has the activation in its kernel whatever the grid.
        """
        if self.container != "unsigned":
            return None
        module = self.layers[node].module if isinstance(node, fx.Node) and node in self.layers else None
        if not isinstance(module, ops.Clip | nn.ReLU):
            return None
        assert isinstance(node, fx.Node)
        readers = [self.layers[user].module if user in self.layers else None for user in node.users]
        quantizers = [reader for reader in readers if isinstance(reader, Quantizer)]
        if len(quantizers) < len(readers):
            return None
        ends = (module.low, module.high) if isinstance(module, ops.Clip) else (0.0, math.inf)
        if isinstance(module, nn.ReLU) and all(q.limits(*ends) == q.limits() for q in quantizers):
            return None
        return ends

    def _kept_apart(self, layer: Layer, inputs: list[ir.Value]) -> list[ir.Value]:
        """Keep ONNX Runtime from quantizing a convolution or matrix product that is to stay in float.

        Between a dequantized input and a quantized output it takes the weight to int8 by itself, with one
        scale a tensor (its WeightBiasQuantization, seen with 1.31.1: one depthwise layer "left in float" took
        MobileNet v1 from 53 % to 3 %). A clip at the ends of the input's grid changes no value and stops it.
        """
        source = layer.node.args[0] if isinstance(layer.module, nn.Conv2d | nn.Linear) else None
        before = self.layers[source].module if isinstance(source, fx.Node) and source in self.layers else None
        if self.container != "unsigned" or not isinstance(before, Quantizer):
            return inputs
        low, high = before.range()
        ends = [
            self.emitter.constant(f"{layer.name}.apart.{n}", v) for n, v in (("low", low), ("high", high))
        ]
        return [self.emitter.add("Clip", f"{layer.name}.apart", [inputs[0], *ends]), *inputs[1:]]

    def _kept_behind(self, layer: Layer, inputs: list[ir.Value]) -> list[ir.Value]:
        """Keep OpenVINO from moving an activation from behind a maximum pool to before it.

        It does so behind a convolution, rightly for what only rises, wrongly for SiLU and its like (seen with
        2026.4).
        """
        source = layer.node.args[0] if layer.kind in _NOT_RISING else None
        if self._kind(source) != "MaxPool" or not isinstance(source, fx.Node) or len(source.users) != 1:
            return inputs
        return [stand_between(self.emitter, f"{layer.name}.behind", inputs[0])]
