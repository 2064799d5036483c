"""The leaf table: modules that the Tracer does not walk into, and the layers that they become.

A module that decides by `self.training`, or that wraps a BatchNorm in its own forward, would be frozen in
the mode in which it is traced; so those stay whole here. Names are "package.Class", so nothing optional is
imported.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from fewbit import ops
from fewbit.load.builder import FUNCTIONS, METHODS, Builder, Converter, Size
from fewbit.load.convert import avg_pool, padded


def module_layer(b: Builder, module: nn.Module, *inputs: Any) -> Any:
    """Add the layer, or the layers, that a leaf module of the user's model becomes.

    Raises:
        NetworkError: No layer stands for this class of module.
    """
    converter = leaf_converter(module)
    if converter is not None:
        return converter(b, module, *inputs)
    if ops.kind_of(module) is None:
        raise b.refuse(f"module {type(module).__name__}")
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.padding_mode != "zeros":
        raise b.refuse(f"padding mode '{module.padding_mode}'")
    if isinstance(module, nn.MaxPool2d) and module.return_indices:
        raise b.refuse("maximum pooling with indices")
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is None:
        raise b.refuse("BatchNorm with the statistics of the batch")
    if isinstance(module, nn.Softmax | nn.LogSoftmax) and module.dim is None:
        raise b.refuse("softmax without an axis")
    if isinstance(module, nn.Conv2d):
        module = padded(module)
    if isinstance(module, nn.AvgPool2d):
        return avg_pool(b, module, *inputs)
    if getattr(module, "inplace", False):
        module = copy(module)
        module.inplace = False  # type: ignore[assignment]
    return b.add(module, *inputs)


def leaf_converter(module: nn.Module) -> Converter | None:
    """Return the row of the leaf table for a module, if there is one."""
    for ancestor in type(module).__mro__:
        row = LEAVES.get(f"{ancestor.__module__.partition('.')[0]}.{ancestor.__name__}")
        if row is not None:
            return row
    return None


def is_leaf(module: nn.Module) -> bool:
    """Tell whether the Tracer keeps this module whole.

    A subclass of a `torch.nn` module with a forward of its own is walked into.
    """
    if leaf_converter(module) is not None:
        return True
    return any(
        ancestor in ops.KINDS and type(module).forward is ancestor.forward
        for ancestor in type(module).__mro__
    )


def _keep(make: Callable[[Any], nn.Module]) -> Converter:
    """Convert a module into one layer of ours."""

    def build(b: Builder, module: Any, x: fx.Node) -> Any:
        return b.add(make(module), x)

    return build


def _as_function(function: Any, *attributes: str) -> Converter:
    """Convert a module through the function that it calls."""

    def build(b: Builder, module: Any, x: fx.Node) -> Any:
        table = METHODS if isinstance(function, str) else FUNCTIONS
        return table[function](b, x, *[getattr(module, name) for name in attributes])

    return build


def _layer_norm_2d(b: Builder, module: Any, x: fx.Node) -> fx.Node:
    if module.weight is None or module.bias is None:
        raise b.refuse("LayerNorm2d without weight and bias")
    return b.add(ops.LayerNorm2d(module.weight, module.bias, module.eps), x)


def _batch_norm_act(b: Builder, module: Any, x: fx.Node) -> Any:
    """Expand timm's BatchNorm with its activation; the parameters are shared, not copied."""
    if module.running_mean is None:
        raise b.refuse("BatchNorm with the statistics of the batch")
    norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, affine=module.affine)
    norm.weight, norm.bias = module.weight, module.bias
    norm.running_mean, norm.running_var = module.running_mean, module.running_var
    norm.num_batches_tracked = module.num_batches_tracked
    node, name = b.add(norm, x), b.name
    for suffix, part in (("drop", module.drop), ("act", module.act)):
        if not isinstance(part, nn.Identity):
            b.name = f"{name}_{suffix}"
            node = module_layer(b, part, node)
    b.name = name
    return node


def _constant_pad(b: Builder, module: Any, x: fx.Node) -> Any:
    return FUNCTIONS[F.pad](b, x, module.padding, "constant", getattr(module, "value", 0.0))


def _conv_same(b: Builder, module: Any, x: fx.Node) -> Any:
    """TensorFlow's "SAME" padding, which depends on the size of the input."""
    totals = []
    for side, kernel, stride, dilation in zip(
        b.shape(x)[2:], module.kernel_size, module.stride, module.dilation, strict=True
    ):
        totals.append(max((-(-side // stride) - 1) * stride + (kernel - 1) * dilation + 1 - side, 0))
    top, left = totals[0] // 2, totals[1] // 2
    return b.add(ops.Conv2d(module, (top, left, totals[0] - top, totals[1] - left)), x)


def _pooled(b: Builder, module: Any, x: fx.Node) -> Any:
    pooled = b.add(ops.GlobalAvgPool(), x, size=Size((*b.shape(x)[:2], 1, 1)))
    return METHODS["flatten"](b, pooled) if module.flatten else pooled


def _drop_path(module: Any) -> nn.Module:
    return ops.DropPath(module.p, per_image=module.mode == "row")


LEAVES: dict[str, Converter] = {
    "torch.Identity": lambda b, m, x: x,
    "torch.ReLU6": _keep(lambda m: ops.Clip(0.0, 6.0)),
    "torch.Hardtanh": _keep(lambda m: ops.Clip(m.min_val, m.max_val)),
    "torch.Softmax2d": _keep(lambda m: nn.Softmax(1)),
    "torch.AdaptiveAvgPool2d": _as_function(F.adaptive_avg_pool2d, "output_size"),
    "torch.AdaptiveMaxPool2d": _as_function(F.adaptive_max_pool2d, "output_size", "return_indices"),
    "torch.ChannelShuffle": _as_function(F.channel_shuffle, "groups"),
    "torch.Upsample": _as_function(F.interpolate, "size", "scale_factor", "mode"),
    "torch.ConstantPad2d": _constant_pad,
    "torch.ZeroPad2d": _constant_pad,
    "torch.Unflatten": _as_function("unflatten"),
    "torch.Flatten": _as_function("flatten"),
    "torchvision.StochasticDepth": _keep(_drop_path),
    "torchvision.LayerNorm2d": _layer_norm_2d,
    "timm.DropPath": _keep(lambda m: ops.DropPath(m.drop_prob)),
    "timm.LayerNorm2d": _layer_norm_2d,
    "timm.BatchNormAct2d": _batch_norm_act,
    "timm.Conv2dSame": _conv_same,
    "timm.FastAdaptiveAvgPool": _pooled,
}
