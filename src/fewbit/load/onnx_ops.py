"""One table: the layers of each ONNX operator that computes."""

from __future__ import annotations

import operator as op_of
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fewbit import ops
from fewbit.load.builder import FUNCTIONS
from fewbit.load.convert import avg_pool, broadcast
from fewbit.load.onnx_graph import OPERATORS, Constant, OnnxBuilder, Op, operator
from fewbit.load.shapes import mean


def _activation(kind: str, make: Any) -> None:
    OPERATORS[kind] = lambda b, op, x: b.add(make(op), x)


_activation("Relu", lambda op: nn.ReLU())
_activation("Sigmoid", lambda op: nn.Sigmoid())
_activation("Tanh", lambda op: nn.Tanh())
_activation("Softplus", lambda op: nn.Softplus())
_activation("HardSwish", lambda op: nn.Hardswish())
_activation("Mish", lambda op: nn.Mish())
_activation("LeakyRelu", lambda op: nn.LeakyReLU(op.get("alpha", 0.01)))
_activation("Elu", lambda op: nn.ELU(op.get("alpha", 1.0)))
_activation("Gelu", lambda op: nn.GELU(approximate=op.get("approximate", b"none").decode()))


@operator("Swish")
def _swish(b: OnnxBuilder, op: Op, x: fx.Node) -> fx.Node:
    if op.get("alpha", 1.0) != 1.0:
        raise b.refuse("Swish with alpha")
    return b.add(nn.SiLU(), x)


@operator("HardSigmoid")
def _hard_sigmoid(b: OnnxBuilder, op: Op, x: fx.Node) -> fx.Node:
    alpha, beta = op.get("alpha", 0.2), op.get("beta", 0.5)
    if abs(alpha * 6 - 1) < 1e-5 and beta == 0.5:
        return b.add(nn.Hardsigmoid(), x)
    return b.add(
        ops.Clip(0.0, 1.0), b.add(ops.Affine(torch.tensor(alpha), torch.tensor(beta)), x, suffix="line")
    )


@operator("PRelu")
def _prelu(b: OnnxBuilder, op: Op, x: fx.Node, slope: Any) -> fx.Node:
    values = b.tensor(slope, "a slope")
    rank = b.size(x).rank
    channels = b.shape(x)[1]
    if values.numel() not in (1, channels) or (values.numel() > 1 and _axis_of(values, rank) != 1):
        raise b.refuse(f"slopes of shape {tuple(values.shape)}")
    layer = nn.PReLU(values.numel())
    layer.weight = nn.Parameter(values.reshape(-1))
    return b.add(layer, x)


def _axis_of(values: Tensor, rank: int) -> int | None:
    """Return the only axis along which a constant, broadcast to so many axes, differs."""
    axes = [axis + rank - values.dim() for axis, n in enumerate(values.shape) if n > 1]
    return axes[0] if len(axes) == 1 else None


@operator("Clip")
def _clip(b: OnnxBuilder, op: Op, x: fx.Node, low: Any = None, high: Any = None) -> fx.Node:
    limits = []
    for value, key, none in ((low, "min", -np.inf), (high, "max", np.inf)):
        given = op.get(key, none) if value is None else float(b.array(value, "a limit").reshape(()))
        limits.append(none if abs(given) > 3e38 else given)
    if limits == [0.0, np.inf]:
        return b.add(nn.ReLU(), x)
    return b.add(ops.Clip(limits[0], limits[1]), x)


@operator("Max", "Min")
def _limit(b: OnnxBuilder, op: Op, x: Any, other: Any) -> fx.Node:
    """Max or Min with one number, as TensorFlow writes ReLU6; Min with one a channel."""
    x, other = (other, x) if isinstance(x, Constant) else (x, other)
    if isinstance(other, Constant) and op.kind == "Min" and b.array(other, "a limit").size > 1:
        limits, rank = b.tensor(other, "limits"), b.size(x).rank
        if limits.dim() <= rank and limits.numel() == b.shape(x)[1] and _axis_of(limits, rank) == 1:
            return b.add(ops.Minimum(limits.reshape(-1, *[1] * (rank - 2))), x)
    if not isinstance(other, Constant) or b.array(other, "a limit").size != 1:
        raise b.refuse("more than one number as limit")
    return _clip(b, op, x, *((other, None) if op.kind == "Max" else (None, other)))  # type: ignore[no-any-return]


@operator("Softmax", "LogSoftmax")
def _softmax(b: OnnxBuilder, op: Op, x: fx.Node) -> fx.Node:
    size = b.size(x)
    axis = op.get("axis", -1 if op.opset >= 13 else 1) % size.rank
    if op.opset < 13 and any(n != 1 for n in size.dims[axis + 1 :]):
        raise b.refuse(f"softmax over the flattened axes from {axis}")
    if axis == size.batch:
        raise b.refuse("softmax over the batch")
    return b.add(nn.Softmax(axis) if op.kind == "Softmax" else nn.LogSoftmax(axis), x)


# ------------------------------------------------------------------------------------------ arithmetic

_ARITHMETIC = {"Add": op_of.add, "Sub": op_of.sub, "Mul": op_of.mul, "Div": op_of.truediv}


@operator("Add", "Sub", "Mul", "Div")
def _binary(b: OnnxBuilder, op: Op, x: Any, y: Any) -> fx.Node:
    sides = [b.tensor(v, "a constant") if isinstance(v, Constant) else v for v in (x, y)]
    shapes = [
        [tuple(t.shape) for t in b.runs[v]]
        if isinstance(v, fx.Node)
        else [tuple(v.shape)] * len(b.graph.batches)
        for v in sides
    ]
    b.result = b.size_of([broadcast(a, c) for a, c in zip(*shapes, strict=True)])
    plain = [
        float(v) if isinstance(v, Tensor) and v.numel() == 1 and v.dim() <= b.result.rank else v
        for v in sides
    ]
    return FUNCTIONS[_ARITHMETIC[op.kind]](b, *plain)  # type: ignore[no-any-return]


@operator("Sum")
def _sum(b: OnnxBuilder, op: Op, first: Any, *others: Any) -> fx.Node:
    total = first
    for other in others:
        total = _binary(b, Op("Add", {}, 1, op.opset, op.readers), total, other)
    return total  # type: ignore[no-any-return]


@operator("Neg")
def _neg(b: OnnxBuilder, op: Op, x: fx.Node) -> fx.Node:
    return b.add(ops.Affine(torch.tensor(-1.0), None), x)


@operator("MatMul")
def _matmul(b: OnnxBuilder, op: Op, x: Any, y: Any) -> fx.Node:
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        return b.add(ops.MatMul(), x, y)
    weight = b.tensor(y, "a left side")
    if weight.dim() != 2:
        raise b.refuse(f"a matrix of shape {tuple(weight.shape)}")
    return b.add(_linear(weight.t(), None), x)


@operator("Gemm")
def _gemm(b: OnnxBuilder, op: Op, x: Any, y: Any, bias: Any = None) -> fx.Node:
    weight = b.tensor(y, "a right side")
    if not isinstance(x, fx.Node) or op.get("transA", 0):
        raise b.refuse("a transposed or constant left side")
    weight = weight if op.get("transB", 0) else weight.t()
    shift = None
    if bias is not None:
        shift = b.tensor(bias, "a bias") * op.get("beta", 1.0)
        if shift.numel() > 1 and _axis_of(shift, 2) != 1:
            raise b.refuse(f"a bias of shape {tuple(shift.shape)}")
        shift = shift.reshape(-1).expand(weight.shape[0])
    return b.add(_linear(weight * op.get("alpha", 1.0), shift), x)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous())
    return layer


# ---------------------------------------------------------------------------------------- convolutions


def _pads(b: OnnxBuilder, op: Op, x: fx.Node, kernel: list[int]) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right)."""
    word = op.get("auto_pad", b"NOTSET").decode()
    if word == "NOTSET":
        top, left, bottom, right = op.get("pads", [0, 0, 0, 0])
        return top, left, bottom, right
    if word == "VALID":
        return 0, 0, 0, 0
    low, high = [], []
    for side, k, stride, dilation in zip(
        b.shape(x)[2:], kernel, op.get("strides", [1, 1]), op.get("dilations", [1, 1]), strict=True
    ):
        total = max((-(-side // stride) - 1) * stride + (k - 1) * dilation + 1 - side, 0)
        small, large = total // 2, total - total // 2
        low.append(small if word == "SAME_UPPER" else large)
        high.append(large if word == "SAME_UPPER" else small)
    return low[0], low[1], high[0], high[1]


@operator("Conv")
def _conv(b: OnnxBuilder, op: Op, x: fx.Node, weight: Any, bias: Any = None) -> fx.Node:
    kernels = b.tensor(weight, "a weight")
    if kernels.dim() != 4:
        raise b.refuse(f"a weight of shape {tuple(kernels.shape)}")
    outputs, inputs, *kernel = kernels.shape
    top, left, bottom, right = _pads(b, op, x, list(kernel))
    groups = op.get("group", 1)
    same = (top, left) == (bottom, right)
    layer = nn.Conv2d(
        inputs * groups,
        outputs,
        (kernel[0], kernel[1]),
        tuple(op.get("strides", [1, 1])),
        (top, left) if same else 0,
        tuple(op.get("dilations", [1, 1])),
        groups,
        bias is not None,
        device="meta",
    )
    layer.weight = nn.Parameter(kernels)
    layer.bias = nn.Parameter(b.tensor(bias, "a bias")) if bias is not None else None
    return b.add(layer if same else ops.Conv2d(layer, (top, left, bottom, right)), x)


@operator("ConvTranspose")
def _conv_transpose(b: OnnxBuilder, op: Op, x: fx.Node, weight: Any, bias: Any = None) -> fx.Node:
    kernels = b.tensor(weight, "a weight")
    top, left, bottom, right = op.get("pads", [0, 0, 0, 0])
    if kernels.dim() != 4 or "output_shape" in op.attributes or (top, left) != (bottom, right):
        raise b.refuse("output_shape, padding of different sides or a weight of other than 4 axes")
    if op.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise b.refuse("auto_pad")
    inputs, outputs, *kernel = kernels.shape
    groups = op.get("group", 1)
    layer = nn.ConvTranspose2d(
        inputs,
        outputs * groups,
        (kernel[0], kernel[1]),
        tuple(op.get("strides", [1, 1])),
        (top, left),
        tuple(op.get("output_padding", [0, 0])),
        groups,
        bias is not None,
        tuple(op.get("dilations", [1, 1])),
        device="meta",
    )
    layer.weight = nn.Parameter(kernels)
    layer.bias = nn.Parameter(b.tensor(bias, "a bias")) if bias is not None else None
    return b.add(layer, x)


@operator("BatchNormalization")
def _batch_norm(b: OnnxBuilder, op: Op, x: fx.Node, *parts: Any) -> fx.Node:
    if op.get("training_mode", 0) or op.outputs > 1:
        raise b.refuse("training mode")
    scale, shift, mean_, variance = (b.tensor(part, "a parameter") for part in parts)
    make = {4: nn.BatchNorm2d, 2: nn.BatchNorm1d}.get(b.size(x).rank)
    if make is None:
        raise b.refuse(f"an input of {b.size(x).rank} axes")
    layer = make(len(scale), op.get("epsilon", 1e-5), 1 - op.get("momentum", 0.9))
    layer.weight, layer.bias = nn.Parameter(scale), nn.Parameter(shift)
    layer.running_mean, layer.running_var = mean_, variance
    return b.add(layer, x)


@operator("LayerNormalization")
def _layer_norm(b: OnnxBuilder, op: Op, x: fx.Node, scale: Any, shift: Any = None) -> fx.Node:
    size = b.size(x)
    axis = op.get("axis", -1) % size.rank
    if axis <= size.batch or op.outputs > 1:
        raise b.refuse("normalisation over the batch, or its statistics")
    shape = size.dims[axis:]
    layer = nn.LayerNorm(shape, op.get("epsilon", 1e-5), bias=shift is not None)
    layer.weight = nn.Parameter(b.tensor(scale, "a scale").expand(shape).contiguous())
    if shift is not None:
        layer.bias = nn.Parameter(b.tensor(shift, "a bias").expand(shape).contiguous())
    return b.add(layer, x)


@operator("LRN")
def _lrn(b: OnnxBuilder, op: Op, x: fx.Node) -> fx.Node:
    size, alpha, beta, bias = (op.get(k, d) for k, d in _LRN.items())
    return b.add(nn.LocalResponseNorm(size, alpha, beta, bias), x)


_LRN = {"size": 1, "alpha": 1e-4, "beta": 0.75, "bias": 1.0}

# --------------------------------------------------------------------------------------------- pooling


@operator("MaxPool")
def _max_pool(b: OnnxBuilder, op: Op, x: fx.Node) -> fx.Node:
    if op.outputs > 1:
        raise b.refuse("maximum pooling with indices")
    kernel, stride = op.get("kernel_shape"), op.get("strides", [1, 1])
    dilation = op.get("dilations", [1, 1])
    padding, ceil_mode = _pool_pads(b, op, x, kernel, stride, dilation)
    return b.add(nn.MaxPool2d(tuple(kernel), tuple(stride), padding, tuple(dilation), ceil_mode=ceil_mode), x)


@operator("AveragePool")
def _average_pool(b: OnnxBuilder, op: Op, x: fx.Node) -> fx.Node:
    kernel, stride = op.get("kernel_shape"), op.get("strides", [1, 1])
    if set(op.get("dilations", [1])) != {1}:
        raise b.refuse("dilation")
    include = bool(op.get("count_include_pad", 0))
    top, left, bottom, right = _pads(b, op, x, kernel)
    if include and (top, left) != (bottom, right):
        x = b.add(ops.Pad([(0, 0), (0, 0), (top, bottom), (left, right)]), x, suffix="pad")
        top = left = 0
        padding, ceil_mode = (0, 0), bool(op.get("ceil_mode", 0))
    else:
        padding, ceil_mode = _pool_pads(b, op, x, kernel, stride, [1, 1])
    return avg_pool(b, nn.AvgPool2d(tuple(kernel), tuple(stride), padding, ceil_mode, include), x)


def _pool_pads(
    b: OnnxBuilder, op: Op, x: fx.Node, kernel: list[int], stride: list[int], dilation: list[int]
) -> tuple[tuple[int, int], bool]:
    """Return (rows, columns) of padding and ceil_mode; more padding at the end is what ceil_mode adds."""
    if len(kernel) != 2:
        raise b.refuse(f"a kernel of {len(kernel)} axes")
    top, left, bottom, right = _pads(b, op, x, kernel)
    ceil_mode = bool(op.get("ceil_mode", 0))
    if (top, left) == (bottom, right):
        return (top, left), ceil_mode
    for choice in (False, True):
        wanted, got = [], []
        for axis, (low, high) in enumerate(((top, bottom), (left, right))):
            side, reach = b.shape(x)[2 + axis], dilation[axis] * (kernel[axis] - 1) + 1
            wanted.append(_windows(side + low + high, reach, stride[axis], ceil_mode))
            got.append(_windows(side + 2 * low, reach, stride[axis], choice))
        if wanted == got:
            return (top, left), choice
    raise b.refuse(f"padding {[top, left, bottom, right]}")


def _windows(side: int, reach: int, stride: int, ceil_mode: bool) -> int:
    return -(-(side - reach) // stride) + 1 if ceil_mode else (side - reach) // stride + 1


@operator("GlobalAveragePool")
def _global_average_pool(b: OnnxBuilder, op: Op, x: fx.Node) -> fx.Node:
    return b.add(ops.GlobalAvgPool(), x)


@operator("GlobalMaxPool")
def _global_max_pool(b: OnnxBuilder, op: Op, x: fx.Node) -> fx.Node:
    return b.add(nn.MaxPool2d(b.shape(x)[2:], b.shape(x)[2:]), x)


@operator("ReduceMean", "ReduceSum", "ReduceMax")
def _reduce(b: OnnxBuilder, op: Op, x: fx.Node, axes: Any = None) -> fx.Node:
    size = b.size(x)
    listed = op.get("axes") if axes is None else b.array(axes, "axes").tolist()
    chosen = sorted(axis % size.rank for axis in listed or ())
    keep = bool(op.get("keepdims", 1))
    if not chosen or size.batch in chosen:
        raise b.refuse("reducing the batch")
    if op.kind == "ReduceMean":
        return mean(b, x, chosen, keep)
    dims = [1 if axis in chosen else n for axis, n in enumerate(size.dims) if keep or axis not in chosen]
    b.result = type(size)(tuple(dims), size.batch - sum(axis < size.batch for axis in chosen) * (not keep))
    function = torch.sum if op.kind == "ReduceSum" else torch.amax
    return FUNCTIONS[function](b, x, chosen, keep)  # type: ignore[no-any-return]
