"""One table: the ONNX nodes of each kind of layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike
from torch import Tensor, fx, nn

from fewbit import numerics, ops
from fewbit.errors import NetworkError
from fewbit.export.sizes import Shape, Sizes
from fewbit.net import Layer, Net

Emit = Callable[["Emitter", Layer, list[ir.Value]], ir.Value]
EMITTERS: dict[str, Emit] = {}
ENDS = ("input", "logits")
_SOFTPLUS_GAP = 1e-6
_ROOTS_POWER = 0.75


class Emitter:
    """Collects the nodes and initializers of an ONNX graph; every name comes from a layer's name.

    Args:
        net: What is exported.
        split_norm_channels: See `fewbit.place.targets.Target`.

    Attributes:
        padded_before: Names of average pools whose padding stays a node of its own.
    """

    def __init__(self, net: Net, split_norm_channels: int = 0) -> None:
        self.sizes, self.split_norm_channels = Sizes(net), split_norm_channels
        self.padded_before: set[str] = set()
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    def constant(self, name: str, value: ArrayLike | Tensor, dtype: Any = np.float32) -> ir.Value:
        """Return an initializer, made once for each name."""
        if name not in self.initializers:
            given = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            array = np.array(given, dtype, order="C")
            tensor = ir.tensor(array, name=name)
            self.initializers[name] = ir.Value(
                name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
            )
        return self.initializers[name]

    def add(self, op: str, name: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        """Add a node and return its output, which has the node's name, but never that of the file's ends."""
        output = ir.Value(name=f"{name}:0" if name in ENDS else name)
        self.nodes.append(ir.node(op, inputs, attributes=attributes, outputs=[output], name=name))
        return output

    def size_of_input(self, layer: Layer) -> Shape:
        """Return the shape of a layer's first input, for two images."""
        source = layer.node.args[0]
        assert isinstance(source, fx.Node)
        return self.sizes.of(source)

    def layer(self, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
        """Add the nodes of one layer.

        Raises:
            NetworkError: No row of the table stands for its kind.
        """
        if layer.kind not in EMITTERS:
            raise NetworkError(f"layer '{layer.name}': kind {layer.kind} cannot be exported; report it")
        return EMITTERS[layer.kind](self, layer, inputs)


def emits(kind: str) -> Callable[[Emit], Emit]:
    """Enter the emitter of a kind."""

    def enter(emit: Emit) -> Emit:
        EMITTERS[kind] = emit
        return emit

    return enter


def _plain(kind: str, op: str, attributes: Callable[[Any], dict[str, Any]] = lambda m: {}) -> None:
    def emit(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
        return e.add(op, layer.name, inputs, **attributes(layer.module))

    EMITTERS[kind] = emit


def _pair(value: Any) -> list[int]:
    return [int(value)] * 2 if isinstance(value, int) else [int(v) for v in value]


def conv_attributes(conv: nn.Conv2d) -> dict[str, Any]:
    """Return the attributes of a convolution's node."""
    return {
        "kernel_shape": _pair(conv.kernel_size),
        "strides": _pair(conv.stride),
        "pads": list(ops.pads_of(conv)),
        "dilations": _pair(conv.dilation),
        "group": int(conv.groups),
    }


_plain("Relu", "Relu")
_plain("Sigmoid", "Sigmoid")
_plain("Tanh", "Tanh")
_plain("HardSwish", "HardSwish")
_plain("Mish", "Mish")
_plain("Add", "Add")
_plain("Sub", "Sub")
_plain("Mul", "Mul")
_plain("Div", "Div")
_plain("MatMul", "MatMul")
_plain("Identity", "Identity")
_plain("Dropout", "Identity")
_plain("DropPath", "Identity")
_plain("GlobalAvgPool", "GlobalAveragePool")
_plain("HardSigmoid", "HardSigmoid", lambda m: {"alpha": 1 / 6, "beta": 0.5})
_plain("LeakyRelu", "LeakyRelu", lambda m: {"alpha": float(m.negative_slope)})
_plain("Elu", "Elu", lambda m: {"alpha": float(m.alpha)})
_plain("Gelu", "Gelu", lambda m: {"approximate": m.approximate})
_plain("Softmax", "Softmax", lambda m: {"axis": int(m.dim)})
_plain("Concat", "Concat", lambda m: {"axis": int(m.dim)})
_plain("Permute", "Transpose", lambda m: {"perm": list(m.dims)})
_plain("LogSoftmax", "LogSoftmax", lambda m: {"axis": int(m.dim)})


@emits("Conv")
def _conv(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    conv = layer.module
    assert isinstance(conv, nn.Conv2d)
    parameters = [e.constant(f"{layer.name}.weight", conv.weight)]
    if conv.bias is not None:
        parameters.append(e.constant(f"{layer.name}.bias", conv.bias))
    return e.add("Conv", layer.name, [*inputs, *parameters], **conv_attributes(conv))


@emits("ConvTranspose")
def _conv_transpose(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    conv = layer.module
    assert isinstance(conv, nn.ConvTranspose2d)
    parameters = [e.constant(f"{layer.name}.weight", conv.weight)]
    if conv.bias is not None:
        parameters.append(e.constant(f"{layer.name}.bias", conv.bias))
    rows, columns = _pair(conv.padding)
    return e.add(
        "ConvTranspose",
        layer.name,
        [*inputs, *parameters],
        kernel_shape=_pair(conv.kernel_size),
        strides=_pair(conv.stride),
        pads=[rows, columns, rows, columns],
        output_padding=_pair(conv.output_padding),
        dilations=_pair(conv.dilation),
        group=int(conv.groups),
    )


@emits("Linear")
def _linear(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    linear = layer.module
    assert isinstance(linear, nn.Linear)
    weight = e.constant(f"{layer.name}.weight", linear.weight)
    bias = None if linear.bias is None else e.constant(f"{layer.name}.bias", linear.bias)
    return product(e, layer, inputs[0], weight, bias)


def product(e: Emitter, layer: Layer, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
    """Add the matrix product of a Linear layer; rows of more than two axes go through it as (-1, inputs)."""
    operands = [weight] if bias is None else [weight, bias]
    size = e.size_of_input(layer)
    if len(size) == 2:
        return e.add("Gemm", layer.name, [x, *operands], transB=1)
    rows = e.constant(f"{layer.name}.rows", [-1, size[-1]], np.int64)
    shape = e.constant(f"{layer.name}.shape", list(e.sizes.free(layer.node)), np.int64)
    flat = e.add("Reshape", f"{layer.name}.flat", [x, rows])
    return e.add(
        "Reshape",
        f"{layer.name}.shaped",
        [e.add("Gemm", layer.name, [flat, *operands], transB=1), shape],
    )


@emits("BatchNorm")
def _batch_norm(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    norm: Any = layer.module
    count = norm.num_features
    parts = {
        "weight": norm.weight if norm.weight is not None else np.ones(count),
        "bias": norm.bias if norm.bias is not None else np.zeros(count),
        "mean": norm.running_mean,
        "var": norm.running_var,
    }
    constants = [e.constant(f"{layer.name}.{key}", value) for key, value in parts.items()]
    return e.add("BatchNormalization", layer.name, [*inputs, *constants], epsilon=float(norm.eps))


@emits("LayerNorm")
def _layer_norm(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    norm: Any = layer.module
    shape = tuple(norm.normalized_shape)
    scale = e.constant(f"{layer.name}.weight", np.ones(shape) if norm.weight is None else norm.weight)
    shift = [] if norm.bias is None else [e.constant(f"{layer.name}.bias", norm.bias)]
    return e.add(
        "LayerNormalization", layer.name, [*inputs, scale, *shift], axis=-len(shape), epsilon=float(norm.eps)
    )


@emits("LayerNorm2d")
def _layer_norm_2d(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    norm: Any = layer.module
    parameters = [
        e.constant(f"{layer.name}.weight", norm.weight),
        e.constant(f"{layer.name}.bias", norm.bias),
    ]
    rows = e.add("Transpose", f"{layer.name}.nhwc", inputs, perm=[0, 2, 3, 1])
    normal = e.add(
        "LayerNormalization", f"{layer.name}.norm", [rows, *parameters], axis=-1, epsilon=float(norm.eps)
    )
    return e.add("Transpose", layer.name, [normal], perm=[0, 3, 1, 2])


@emits("Clip")
def _clip(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    clip: Any = layer.module
    limits = [
        e.constant(f"{layer.name}.{key}", np.float32(value)) if np.isfinite(value) else None
        for key, value in (("low", clip.low), ("high", clip.high))
    ]
    return e.add("Clip", layer.name, [*inputs, *limits])


@emits("Min")
def _minimum(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    limits: Any = layer.module.limits
    return e.add("Min", layer.name, [*inputs, e.constant(f"{layer.name}.limits", limits)])


@emits("PRelu")
def _prelu(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    slope: Any = layer.module.weight
    behind = [1] * (len(e.size_of_input(layer)) - 2)
    slopes = slope.reshape(-1) if slope.numel() == 1 else slope.reshape(-1, *behind)
    return e.add("PRelu", layer.name, [*inputs, e.constant(f"{layer.name}.weight", slopes)])


@emits("Softplus")
def _softplus(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    plus: Any = layer.module
    beta = float(plus.beta)
    if math.log1p(math.exp(-float(plus.threshold))) / beta > _SOFTPLUS_GAP:
        raise NetworkError(
            f"layer '{layer.name}': Softplus with threshold {plus.threshold:g} cannot be exported; "
            "take torch's default of 20"
        )
    if beta == 1.0:
        return e.add("Softplus", layer.name, inputs)
    scaled = e.add("Mul", f"{layer.name}.scaled", [*inputs, e.constant(f"{layer.name}.beta", beta)])
    wide = e.add("Softplus", f"{layer.name}.wide", [scaled])
    return e.add("Mul", layer.name, [wide, e.constant(f"{layer.name}.inverse", 1 / beta)])


@emits("LRN")
def _lrn(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    m: Any = layer.module
    if m.size % 2 == 0:
        raise NetworkError(
            f"layer '{layer.name}': local response normalisation over {m.size} channels cannot be exported, "
            "for engines take odd numbers only; retrain it with one"
        )
    if float(m.beta) == _ROOTS_POWER and e.size_of_input(layer)[1] <= e.split_norm_channels:
        return _norm_by_roots(e, layer, inputs[0])
    return e.add(
        "LRN",
        layer.name,
        inputs,
        size=int(m.size),
        alpha=float(m.alpha),
        beta=float(m.beta),
        bias=float(m.k),
    )


def _norm_by_roots(e: Emitter, layer: Layer, x: ir.Value) -> ir.Value:
    """Write a response normalization in operators that engines compute fast; their LRN is slow."""
    m: Any = layer.module
    name, channels = layer.name, e.size_of_input(layer)[1]
    weights = e.constant(f"{name}.window", numerics.window_weights(channels, int(m.size), float(m.alpha)))
    offset = e.constant(f"{name}.bias", np.full(channels, float(m.k)))
    squares = e.add("Mul", f"{name}.squares", [x, x])
    sums = e.add("Conv", f"{name}.sums", [squares, weights, offset], kernel_shape=[1, 1])
    root = e.add("Sqrt", f"{name}.root", [sums])
    power = e.add("Mul", f"{name}.power", [root, e.add("Sqrt", f"{name}.root_of_root", [root])])
    return e.add("Mul", name, [x, e.add("Reciprocal", f"{name}.reciprocal", [power])])


@emits("MaxPool")
def _max_pool(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    dilations = _pair(layer.module.dilation)
    attributes, over = _pool(e, layer, dilations)
    attributes["pads"] = [a + b for a, b in zip(attributes["pads"], [0, 0, *over], strict=True)]
    return e.add("MaxPool", layer.name, inputs, dilations=dilations, **attributes)


@emits("AvgPool")
def _average_pool(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    module: Any = layer.module
    include = int(module.count_include_pad)
    attributes, over = _pool(e, layer, [1, 1])
    pads = attributes["pads"]
    if any(over) or layer.name in e.padded_before:  # what a window reaches over the padding never counts
        if include and any(pads):
            amounts = [0, 0, *pads[:2], 0, 0, *pads[2:]]
            padded = [*inputs, e.constant(f"{layer.name}.pads", amounts, np.int64)]
            inputs = [e.add("Pad", f"{layer.name}.padded", padded)]
            if layer.name in e.padded_before:
                inputs = [stand_between(e, f"{layer.name}.behind", inputs[0])]
            pads = [0, 0, 0, 0]
        include = 0
    attributes["pads"] = [a + b for a, b in zip(pads, [0, 0, *over], strict=True)]
    return e.add("AveragePool", layer.name, inputs, count_include_pad=include, **attributes)


def stand_between(e: Emitter, name: str, x: ir.Value, strides: Sequence[int] = (1, 1)) -> ir.Value:
    """Add a pool of one pixel: it changes no value, and no engine merges the nodes on its two sides."""
    return e.add("MaxPool", name, [x], kernel_shape=[1, 1], strides=list(strides))


def _pool(e: Emitter, layer: Layer, dilations: list[int]) -> tuple[dict[str, Any], list[int]]:
    """Return a pool's attributes and how far its last windows reach over the padding (rows, columns).

    `ceil_mode` becomes padding in numbers: the engines disagree about a last window that starts in it.
    """
    m: Any = layer.module
    kernel, padding = _pair(m.kernel_size), _pair(m.padding)
    strides = _pair(m.stride if m.stride is not None else m.kernel_size)
    over = [0, 0]
    if m.ceil_mode:
        size, result = e.size_of_input(layer)[2:], e.sizes.of(layer.node)[2:]
        for axis in (0, 1):
            reach = (result[axis] - 1) * strides[axis] + dilations[axis] * (kernel[axis] - 1) + 1
            over[axis] = max(0, reach - size[axis] - 2 * padding[axis])
    return {"kernel_shape": kernel, "strides": strides, "pads": [*padding, *padding]}, over


@emits("Silu")
def _silu(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    gate = e.add("Sigmoid", f"{layer.name}.sigmoid", inputs)
    return e.add("Mul", layer.name, [*inputs, gate])


@emits("Affine")
def _affine(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    module: Any = layer.module
    (value,) = inputs
    if module.scale is not None:
        name = layer.name if module.shift is None else f"{layer.name}.scaled"
        value = e.add("Mul", name, [value, e.constant(f"{layer.name}.scale", module.scale)])
    if module.shift is not None:
        value = e.add("Add", layer.name, [value, e.constant(f"{layer.name}.shift", module.shift)])
    return value


@emits("Mean")
def _mean(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    mean: Any = layer.module
    axes = e.constant(f"{layer.name}.axes", list(mean.dims), np.int64)
    return e.add("ReduceMean", layer.name, [*inputs, axes], keepdims=int(mean.keepdim))


@emits("Flatten")
def _flatten(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    return e.add("Flatten", layer.name, inputs, axis=1)


@emits("Reshape")
def _reshape(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    reshape: Any = layer.module
    return e.add(
        "Reshape", layer.name, [*inputs, e.constant(f"{layer.name}.shape", list(reshape.shape), np.int64)]
    )


@emits("Pad")
def _pad(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    pad: Any = layer.module
    amounts = [before for before, _ in pad.pads] + [after for _, after in pad.pads]
    return e.add(
        "Pad",
        layer.name,
        [
            *inputs,
            e.constant(f"{layer.name}.pads", amounts, np.int64),
            e.constant(f"{layer.name}.value", pad.value),
        ],
    )


@emits("Slice")
def _slice(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    part: Any = layer.module
    far = np.iinfo(np.int64).max
    columns = {
        "starts": [start for start, _, _ in part.ranges.values()],
        "ends": [far if stop is None else stop for _, stop, _ in part.ranges.values()],
        "axes": list(part.ranges),
        "steps": [step for _, _, step in part.ranges.values()],
    }
    constants = [e.constant(f"{layer.name}.{key}", value, np.int64) for key, value in columns.items()]
    return e.add("Slice", layer.name, [*inputs, *constants])


@emits("Upsample")
def _upsample(e: Emitter, layer: Layer, inputs: list[ir.Value]) -> ir.Value:
    factor: Any = layer.module.factor
    scales = e.constant(f"{layer.name}.scales", [1.0, 1.0, float(factor[0]), float(factor[1])])
    return e.add(
        "Resize",
        layer.name,
        [*inputs, None, scales],
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
