"""The rows of the table for arithmetic, activations, matrix products, normalisation and pooling."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fewbit import ops
from fewbit.load.builder import FRESH, Builder, converts


def _activation(make: Callable[..., nn.Module], *targets: Any) -> None:
    def convert(b: Builder, input: fx.Node, *args: Any, inplace: bool = False, **kwargs: Any) -> fx.Node:
        return b.add(make(*args, **kwargs), input)

    converts(*targets)(convert)


_activation(nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_")
_activation(nn.Sigmoid, F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_")
_activation(nn.Tanh, F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_")
_activation(nn.Hardsigmoid, F.hardsigmoid)
_activation(nn.Hardswish, F.hardswish)
_activation(nn.SiLU, F.silu)
_activation(nn.Mish, F.mish)
_activation(nn.ELU, F.elu, F.elu_)
_activation(nn.GELU, F.gelu)
_activation(nn.Softplus, F.softplus)
_activation(nn.LeakyReLU, F.leaky_relu, F.leaky_relu_)
_activation(lambda: ops.Clip(0.0, 6.0), F.relu6)
_activation(lambda min_val=-1.0, max_val=1.0: ops.Clip(min_val, max_val), F.hardtanh, F.hardtanh_)


@converts(torch.clamp, torch.clip, torch.clamp_, "clamp", "clip", "clamp_", "clip_")
def _clamp(b: Builder, input: fx.Node, min: float | None = None, max: float | None = None) -> fx.Node:
    if isinstance(min, fx.Node | Tensor) or isinstance(max, fx.Node | Tensor):
        raise b.refuse("clamp with tensor limits")
    if min == 0 and max is None:
        return b.add(nn.ReLU(), input)
    return b.add(ops.Clip(-float("inf") if min is None else min, float("inf") if max is None else max), input)


@converts(torch.clamp_min, "clamp_min", "clamp_min_")
def _clamp_min(b: Builder, input: fx.Node, min: float) -> fx.Node:
    return _clamp(b, input, min)  # type: ignore[no-any-return]


@converts(torch.clamp_max, "clamp_max", "clamp_max_")
def _clamp_max(b: Builder, input: fx.Node, max: float) -> fx.Node:
    return _clamp(b, input, None, max)  # type: ignore[no-any-return]


@converts(F.prelu, torch.prelu, "prelu")
def _prelu(b: Builder, input: fx.Node, weight: Any) -> fx.Node:
    layer = nn.PReLU(weight.numel())
    layer.weight = _parameter(weight)  # type: ignore[assignment]
    return b.add(layer, input)


def _softmax_layer(make: type[nn.Softmax] | type[nn.LogSoftmax], *targets: Any) -> None:
    def convert(b: Builder, input: fx.Node, dim: int | None = None, *_: Any, **__: Any) -> fx.Node:
        axis = b.axis(input, -1 if dim is None else dim)
        if axis == b.size(input).batch:
            raise b.refuse("softmax over the batch")
        return b.add(make(axis), input)

    converts(*targets)(convert)


_softmax_layer(nn.Softmax, F.softmax, torch.softmax, "softmax")
_softmax_layer(nn.LogSoftmax, F.log_softmax, torch.log_softmax, "log_softmax")


def _dropout_layer(make: type[nn.Module], *targets: Any) -> None:
    def convert(
        b: Builder, input: fx.Node, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> fx.Node:
        if training:
            raise b.refuse("dropout in evaluation (pass training=self.training)")
        return b.add(make(p), input)

    converts(*targets)(convert)


_dropout_layer(nn.Dropout, F.dropout, torch.dropout)
_dropout_layer(nn.Dropout2d, F.dropout2d)
_dropout_layer(nn.AlphaDropout, F.alpha_dropout)
_dropout_layer(nn.FeatureAlphaDropout, F.feature_alpha_dropout)


FRESH.update({"clone", torch.clone})


@converts("contiguous", "clone", "detach", "cpu", torch.clone, torch.detach)
def _identity(b: Builder, input: fx.Node, **_: Any) -> fx.Node:
    return input


@converts("float", "to", "type_as", "type")
def _cast(b: Builder, input: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype) and value != torch.float32:
            raise b.refuse(f"a cast to {value}")
    return input


@converts(getattr)
def _attribute(b: Builder, input: fx.Node, name: str) -> fx.Node:
    if name != "data":
        raise b.refuse(f"attribute '{name}' of a tensor")
    return input


# ------------------------------------------------------------------------------------------ arithmetic


def _binary(module: type[nn.Module], fold: Callable[[Any, bool], Any], *targets: Any) -> None:
    def convert(
        b: Builder, input: Any, other: Any, *, alpha: float = 1, rounding_mode: Any = None
    ) -> fx.Node:
        if rounding_mode is not None or alpha != 1:
            raise b.refuse(f"{module.__name__.lower()} with alpha or rounding_mode")
        _check_broadcast(b, input, other)
        if isinstance(input, fx.Node) and isinstance(other, fx.Node):
            return b.add(module(), input, other)
        if isinstance(input, fx.Node):
            return _affine(b, input, *fold(other, False))
        folded = fold(input, True)
        if folded is None:
            raise b.refuse("a constant divided by a tensor")
        return _affine(b, other, *folded)

    converts(*targets, broadcasts=True)(convert)
    FRESH.update(targets)


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that shapes broadcast to."""
    return tuple(torch.broadcast_shapes(*map(tuple, shapes)))  # type: ignore[no-untyped-call]


def _check_broadcast(b: Builder, *values: Any) -> None:
    shapes = [b.shape(v) if isinstance(v, fx.Node) else getattr(v, "shape", ()) for v in values]
    if broadcast(*shapes) != b.result.dims:
        raise b.refuse("expanding a tensor before arithmetic with another")


def _affine(b: Builder, x: fx.Node, scale: Any, shift: Any) -> fx.Node:
    scale, shift = _constant(b, scale), _constant(b, shift)
    if _is_only(scale, 1.0) and _is_only(shift, 0.0) and b.shape(x) == b.result.dims:
        return x
    return b.add(ops.Affine(scale, shift), x)


def _is_only(value: Tensor | None, number: float) -> bool:
    return value is None or (
        value.dim() == 0 and not isinstance(value, nn.Parameter) and float(value) == number
    )


def _constant(b: Builder, value: Any) -> Tensor | None:
    """Return a constant that broadcasts over any number of images."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return torch.tensor(float(value))
    axis = b.result.batch - b.result.rank
    if value.dim() >= -axis and value.shape[axis] > 1:
        first = value.narrow(axis, 0, 1)
        if not torch.equal(first.expand_as(value), value):
            raise b.refuse("a constant for each image")
        return first.contiguous()
    return value if value.is_floating_point() else value.float()


_binary(ops.Add, lambda v, swapped: (None, v), operator.add, operator.iadd, torch.add, "add", "add_")
_binary(
    ops.Sub,
    lambda v, swapped: (-1.0, v) if swapped else (None, -v),
    *(operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_"),
)
_binary(
    ops.Mul,
    lambda v, swapped: (v, None),
    *(operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"),
)
_binary(
    ops.Div,
    lambda v, swapped: None if swapped else (1.0 / v, None),
    *(operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_"),
)


@converts(operator.neg, torch.neg, "neg")
def _neg(b: Builder, input: fx.Node) -> fx.Node:
    return _affine(b, input, -1.0, None)


@converts(operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm")
def _matmul(b: Builder, input: Any, other: Any) -> fx.Node:
    if isinstance(input, fx.Node) and isinstance(other, fx.Node):
        return b.add(ops.MatMul(), input, other)
    if not isinstance(input, fx.Node) or other.dim() != 2:
        raise b.refuse("a matrix product of this constant")
    return _linear(b, input, other.t().contiguous())  # type: ignore[no-any-return]


@converts(F.linear)
def _linear(b: Builder, input: fx.Node, weight: Any, bias: Any = None) -> fx.Node:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight, layer.bias = _parameter(weight), _parameter(bias)  # type: ignore[assignment]
    return b.add(layer, input)


@converts(F.conv2d, torch.conv2d)
def _conv2d(
    b: Builder,
    input: fx.Node,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> fx.Node:
    outputs, inputs, *kernel = weight.shape
    layer = nn.Conv2d(
        inputs * groups,
        outputs,
        (kernel[0], kernel[1]),
        stride,
        padding,
        dilation,
        groups,
        bias is not None,
        device="meta",
    )
    layer.weight, layer.bias = _parameter(weight), _parameter(bias)  # type: ignore[assignment]
    return b.add(padded(layer), input)


def padded(conv: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution whose padding is in numbers, not in words."""
    if not isinstance(conv.padding, str):
        return conv
    top, left, bottom, right = ops.pads_of(conv)
    if (top, left) != (bottom, right):
        return ops.Conv2d(conv, (top, left, bottom, right))
    plain = copy(conv)
    plain.padding = (top, left)
    return plain


def _parameter(value: Tensor | None) -> nn.Parameter | None:
    return value if value is None or isinstance(value, nn.Parameter) else nn.Parameter(value)


@converts(F.batch_norm, torch.batch_norm)
def _batch_norm(
    b: Builder,
    input: fx.Node,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> fx.Node:
    if training or running_mean is None:
        raise b.refuse("BatchNorm with the statistics of the batch")
    make = nn.BatchNorm2d if b.size(input).rank == 4 else nn.BatchNorm1d
    layer = make(len(running_mean), eps, momentum, affine=weight is not None)
    layer.weight, layer.bias = _parameter(weight), _parameter(bias)  # type: ignore[assignment]
    layer.running_mean, layer.running_var = running_mean, running_var
    return b.add(layer, input)


@converts(F.layer_norm, torch.layer_norm)
def _layer_norm(
    b: Builder,
    input: fx.Node,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> fx.Node:
    layer = nn.LayerNorm(normalized_shape, eps, weight is not None, bias is not None, device="meta")
    layer.weight, layer.bias = _parameter(weight), _parameter(bias)  # type: ignore[assignment]
    return b.add(layer, input)


# --------------------------------------------------------------------------------------------- pooling


@converts(F.max_pool2d, torch.max_pool2d)
def _max_pool(
    b: Builder,
    input: fx.Node,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> fx.Node:
    if return_indices:
        raise b.refuse("maximum pooling with indices")
    return b.add(nn.MaxPool2d(kernel_size, stride or kernel_size, padding, dilation, False, ceil_mode), input)


@converts(F.avg_pool2d)
def _avg_pool(b: Builder, input: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    return avg_pool(b, nn.AvgPool2d(*args, **kwargs), input)


def avg_pool(b: Builder, pool: nn.AvgPool2d, x: fx.Node) -> fx.Node:
    """Add average pooling, as the mean over H and W where its kernel covers them."""
    if pool.divisor_override is not None:
        raise b.refuse("average pooling with divisor_override")
    if pair(pool.kernel_size) == b.shape(x)[2:] and pair(pool.padding) == (0, 0):
        return b.add(ops.GlobalAvgPool(), x)
    return b.add(pool, x)


@converts(F.adaptive_avg_pool2d)
def _adaptive_avg_pool(b: Builder, input: fx.Node, output_size: Any) -> fx.Node:
    before, after = b.shape(input)[2:], b.result.dims[2:]
    if before == after:
        return input
    if after == (1, 1):
        return b.add(ops.GlobalAvgPool(), input)
    if after[0] % before[0] == 0 and after[1] % before[1] == 0:
        return b.add(ops.Upsample((after[0] // before[0], after[1] // before[1])), input)
    if before[0] % after[0] or before[1] % after[1]:
        raise b.refuse(f"adaptive average pooling of {_by(before)} to {_by(after)} (not a whole factor)")
    return b.add(nn.AvgPool2d((before[0] // after[0], before[1] // after[1])), input)


@converts(F.adaptive_max_pool2d)
def _adaptive_max_pool(b: Builder, input: fx.Node, output_size: Any, return_indices: bool = False) -> fx.Node:
    if return_indices:
        raise b.refuse("maximum pooling with indices")
    before, after = b.shape(input)[2:], b.result.dims[2:]
    if before[0] % after[0] or before[1] % after[1]:
        raise b.refuse(f"adaptive maximum pooling of {_by(before)} to {_by(after)} (not a whole factor)")
    return b.add(nn.MaxPool2d((before[0] // after[0], before[1] // after[1])), input)


def _by(size: Sequence[int]) -> str:
    return "x".join(str(side) for side in size)


def pair(value: Any) -> tuple[Any, Any]:
    """Return (rows, columns) of a number or of two."""
    return (value[0], value[-1]) if isinstance(value, Sequence) else (value, value)


@converts(F.local_response_norm)
def _lrn(b: Builder, input: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    return b.add(nn.LocalResponseNorm(*args, **kwargs), input)
