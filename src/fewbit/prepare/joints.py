"""Joints: the tensors between matrix layers whose channels may be scaled, and how to scale them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fewbit import ops
from fewbit.net import Layer, Net

MatrixLayer = nn.Conv2d | nn.Linear

_HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "PRelu"})
_KEEPS_CHANNELS = frozenset(
    {"MaxPool", "AvgPool", "GlobalAvgPool", "Upsample", "Dropout", "DropPath", "Identity"}
)

_ONE_VALUE = frozenset({"Relu", "LeakyRelu", "Clip", "Dropout", "DropPath", "Identity"})


@dataclass(frozen=True)
class Joint:
    """A tensor that one layer makes and only convolutions and matrix products read.

    What lies between passes a positive factor of a channel through, f(s x) = s f(x), a clip to [0, K]
    up to K.

    Attributes:
        producer: The layer that makes it; its output channels are the joint's.
        readers: The layers that read it, each at its input channels.
        between: The layers between, in the order in which they run.
    """

    producer: Layer
    readers: tuple[Layer, ...]
    between: tuple[Layer, ...]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return outputs_of(matrix_of(self.producer))

    @property
    def clips(self) -> tuple[Layer, ...]:
        """The clips between."""
        return tuple(layer for layer in self.between if isinstance(layer.module, ops.Clip))


def find_joints(net: Net) -> list[Joint]:
    """Return the joints of a network, in the order in which they run.

    A sum, a concatenation, a product, an activation that is not homogeneous or the logits end a joint: a
    tensor that any of these reads is none.
    """
    layers = {layer.node: layer for layer in net.layers()}
    found = []
    for producer in layers.values():
        if isinstance(producer.module, nn.Conv2d | nn.Linear):
            joint = _follow(producer, layers)
            if joint is not None:
                found.append(joint)
    return found


def _follow(producer: Layer, layers: dict[fx.Node, Layer]) -> Joint | None:
    readers, between, todo = [], [], [producer.node]
    while todo:
        for user in todo.pop(0).users:
            layer = layers.get(user)
            if layer is None:
                return None
            if isinstance(layer.module, nn.Conv2d | nn.Linear):
                readers.append(layer)
            elif _passes(layer.module, layer.kind):
                between.append(layer)
                todo.append(user)
            else:
                return None
    joint = Joint(producer, tuple(readers), tuple(between))
    return joint if readers and _axes_agree(joint) else None


def _passes(module: nn.Module, kind: str) -> bool:
    """Tell whether a layer passes a factor of each channel through and keeps the channels in place."""
    if isinstance(module, ops.Clip):
        return module.low == 0.0 and module.high > 0.0
    if isinstance(module, ops.Pad):
        return module.value == 0.0 and all(pair == (0, 0) for pair in module.pads[:2])
    if isinstance(module, ops.Slice):
        return all(axis >= 2 for axis in module.ranges)
    if isinstance(module, ops.Mean):
        return set(module.dims) == {2, 3}
    if isinstance(module, nn.Flatten):
        return module.start_dim == 1 and module.end_dim == -1
    if isinstance(module, ops.Reshape):
        return len(module.shape) == 2 and module.shape[0] == -1
    return kind in _HOMOGENEOUS | _KEEPS_CHANNELS


def _axes_agree(joint: Joint) -> bool:
    """Tell whether the channels lie where every layer counts them.

    Behind a convolution that is axis 1, which flattening makes n values a channel; behind a matrix product
    the last axis, which only layers that look at one value at a time leave alone.
    """
    readers = [matrix_of(reader) for reader in joint.readers]
    if isinstance(joint.producer.module, nn.Linear):
        alone = all(layer.kind in _ONE_VALUE for layer in joint.between)
        return alone and all(isinstance(m, nn.Linear) and m.in_features == joint.channels for m in readers)
    flat = any(isinstance(layer.module, nn.Flatten | ops.Reshape | ops.Mean) for layer in joint.between)
    return all(
        m.in_channels == joint.channels
        if isinstance(m, nn.Conv2d)
        else flat and m.in_features % joint.channels == 0
        for m in readers
    )


def matrix_of(layer: Layer) -> MatrixLayer:
    """Return the module of a convolution or matrix product."""
    assert isinstance(layer.module, nn.Conv2d | nn.Linear)
    return layer.module


def outputs_of(module: MatrixLayer) -> int:
    """Return the number of output channels."""
    return module.out_channels if isinstance(module, nn.Conv2d) else module.out_features


def by_input(module: MatrixLayer, weight: Tensor, channels: int) -> Tensor:
    """Return a view of a weight with its input channels on axes 0 and 2: (G, O/G, C/G, the rest).

    Args:
        module: Whose groups count.
        weight: (O, C/G, kh, kw), or (O, C n) of a matrix product that reads n values a channel.
        channels: C.
    """
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    return weight.reshape(groups, weight.shape[0] // groups, channels // groups, -1)


def output_ranges(weight: Tensor) -> Tensor:
    """Return max |W[o]| of each output channel."""
    return weight.abs().flatten(1).amax(1)


def input_ranges(module: MatrixLayer, weight: Tensor, channels: int) -> Tensor:
    """Return max |W[:, i]| of each input channel, groups and values a channel included."""
    return by_input(module, weight, channels).abs().amax((1, 3)).reshape(channels)


def scale_outputs(weight: Tensor, factors: Tensor) -> Tensor:
    """Return W[o] * factors[o]."""
    return weight * factors.reshape(-1, *[1] * (weight.dim() - 1))


def scale_inputs(module: MatrixLayer, weight: Tensor, factors: Tensor) -> Tensor:
    """Return W[:, i] * factors[i]."""
    view = by_input(module, weight, len(factors))
    return (view * factors.reshape(view.shape[0], 1, view.shape[2], 1)).reshape(weight.shape)


def set_parameters(module: MatrixLayer, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer another weight and bias, in its own dtype."""
    dtype = module.weight.dtype
    module.weight = nn.Parameter(weight.to(dtype), module.weight.requires_grad)
    if bias is not None:
        module.bias = nn.Parameter(bias.to(dtype))


def double_weights(layers: Sequence[Layer]) -> dict[fx.Node, Tensor]:
    """Return the weights of layers in float64."""
    return {layer.node: matrix_of(layer).weight.detach().to(torch.float64) for layer in layers}
