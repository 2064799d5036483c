"""Running a placed network in float, as fast as torch can, and showing its tensors to range finders."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fewbit import ops
from fewbit.net import Net
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLinear
from fewbit.ranges.range_finder import RangeFinder, extremes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _LARGEST_KEPT_BYTES = 2**31 - 1, 32 * 2**20
_MAKES_ITS_OUTPUT = (nn.Conv2d, nn.Linear, ops.Add, ops.Concat, ops.Affine, nn.BatchNorm2d)
_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_FUSES = _ONEDNN and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Give back what is free, let malloc keep what is freed from here on, and give that back in the end.

    Every layer frees and takes megabytes. Left alone, glibc's malloc gives them back to the system and
    faults them in anew whenever they happen to lie on top: up to a tenth of the time, and a peak of memory
    that differs from run to run. Afterwards malloc is as it makes itself once a block of 32 MiB was freed.
    Elsewhere than on glibc this does nothing.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.malloc_trim(0)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_KEPT_BYTES)
        libc.malloc_trim(0)


@dataclass(frozen=True)
class _Call:
    """One thing to do for a batch.

    Attributes:
        run: Takes tensors, returns one; of a watched tensor, shows it.
        inputs: What it reads.
        output: What it makes; none where it only looks.
        frees: What nobody reads after it.
    """

    run: Callable[..., Any]
    inputs: tuple[fx.Node, ...]
    output: fx.Node | None
    frees: tuple[fx.Node, ...] = ()


class _Convolution:
    """A convolution in float, the activation that alone reads it included.

    At its first batch it arranges its weights in the order that the kernel reads, and sees to it that its
    output is finite: a ReLU or clip in the kernel would turn what is not a number into 0. Where torch has no
    oneDNN, or the padding differs from side to side, it does as torch does.

    Args:
        name: What errors call it.
        module: Whose weights and geometry it takes.
        activation: The ReLU or clip behind it, or none.
    """

    def __init__(self, name: str, module: QuantConv2d, activation: nn.ReLU | ops.Clip | None) -> None:
        self.name, self.module, self.activation = name, module, activation
        self._arranged: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        module, pads = self.module, ops.pads_of(self.module)
        if not _FUSES or pads[:2] != pads[2:] or x.device.type != "cpu" or x.dtype != torch.float32:
            y = ops.convolve(x, module.weight, module.float_bias, module)
            return y if self.activation is None else self.activation(y)
        geometry = list(pads[:2]), list(module.stride), list(module.dilation), module.groups
        if self._arranged is None:
            if x.numel():
                extremes(ops.convolve(x, module.weight, module.float_bias, module), self.name)
            self._arranged = torch.ops.mkldnn._reorder_convolution_weight(
                module.weight, *geometry, list(x.shape)
            )
        word, limits = "none" if self.activation is None else "relu", []
        if isinstance(self.activation, ops.Clip):
            word, limits = "hardtanh", [self.activation.low, self.activation.high]
        fused: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._arranged, module.float_bias, *geometry, word, limits, ""
        )
        return fused


class FloatPass:
    """Runs a network with every quantizer off; each watched tensor goes to its finder.

    A ReLU or clip is computed by the convolution before it, or overwrites its input, where nobody else reads
    that.

    Args:
        net: A network with quantizers.
        finders: The finder of each quantizer node to watch.
    """

    def __init__(self, net: Net, finders: Mapping[fx.Node, RangeFinder]) -> None:
        self._modules: dict[fx.Node, nn.Module] = {
            node: net.graph.get_submodule(str(node.target))
            for node in net.graph.graph.nodes
            if node.op == "call_module"
        }
        self._image = net.image_node
        self._same: dict[fx.Node, fx.Node] = {}
        calls = [call for node in self._modules for call in self._calls(node, finders.get(node))]
        self._program: list[_Call] = []
        read: set[fx.Node] = set()
        for call in reversed(calls):
            frees = {*call.inputs, *([call.output] if call.output is not None else [])} - read
            read |= frees
            self._program.insert(0, replace(call, frees=tuple(frees)))

    def show(self, images: Tensor) -> None:
        """Run one batch (N, C, H, W)."""
        # Pools and convolutions of torch are faster with channels last; finders read it as it is.
        values = {self._image: images.contiguous(memory_format=torch.channels_last)}
        with torch.no_grad():
            for call in self._program:
                found = call.run(*[values[node] for node in call.inputs])
                if call.output is not None:
                    values[call.output] = found
                for node in call.frees:
                    del values[node]

    def _calls(self, node: fx.Node, finder: RangeFinder | None) -> Iterator[_Call]:
        """Return what a layer does; a layer that passes its input on becomes another name of it."""
        module, source = self._modules[node], node.args[0]
        assert isinstance(source, fx.Node)
        inputs = tuple(self._same.get(one, one) for one in node.all_input_nodes)
        if isinstance(module, Quantizer | DynamicQuantizer):
            self._same[node] = inputs[0]
            if finder is not None:
                yield _Call(finder.observe, inputs, None)
        elif isinstance(module, QuantConv2d):
            activation = self._only_reader(node)
            if activation is not None:
                self._same[activation] = node
            chosen: Any = self._modules[activation] if activation is not None else None
            yield _Call(_Convolution(str(node.target), module, chosen), inputs, node)
        elif isinstance(module, QuantLinear):
            yield _Call(partial(F.linear, weight=module.weight, bias=module.float_bias), inputs, node)
        elif node not in self._same:
            overwrites = self._only_reader(source) is node
            read = cast("tuple[fx.Node, ...]", node.args)
            arguments = tuple(self._same.get(one, one) for one in read)
            yield _Call(_overwriting(module) if overwrites else module, arguments, node)

    def _only_reader(self, source: fx.Node) -> fx.Node | None:
        """Return the ReLU or clip that alone reads a layer's output, where that output is its own."""
        if not isinstance(self._modules.get(source), _MAKES_ITS_OUTPUT) or len(source.users) != 1:
            return None
        reader = next(iter(source.users))
        return reader if isinstance(self._modules.get(reader), nn.ReLU | ops.Clip) else None


def _overwriting(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a ReLU or clip that takes its input's memory."""
    if isinstance(module, ops.Clip):
        return lambda x: x.clamp_(module.low, module.high)
    return torch.relu_
