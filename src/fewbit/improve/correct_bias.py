"""Bias correction: the mean error that rounding brings into each output channel goes into its bias."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from fewbit.errors import DataError
from fewbit.improve.expectation import expected_inputs
from fewbit.improve.norm import restore_norm
from fewbit.net import Layer, Net
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLayer, QuantLinear
from fewbit.ranges.calibrate import input_quantizer
from fewbit.spec import Scheme
from fewbit.step import Context, Step, StepReport

_INT32_MAX = 2**31 - 1
_FEW = 64


class CorrectBias(Step):
    """Take the mean error of rounding out of each output channel.

    Rounding W to W + eps shifts the mean of an output by eps E[x], which its bias takes back::

        empirical   b_o <- b_o - mean over n, h, w of (y_quantized - y_float)
        analytic    b_o <- b_o - sum over i of (sum over kh, kw of eps[o, i]) E[x_i]

    y is the output before its activation. The empirical form goes through the layers in order, each behind
    layers that are rounded and corrected already, so it also takes back what rounding the activations
    shifts. The analytic form needs no images: E[x] is the mean of a normal distribution behind its ReLU or
    clip, whose mean and deviation the folded BatchNorm told.

    With norm, the scale of each channel is first multiplied by xi = ||W - mean W|| / ||Q - mean Q||, its
    codes stay, and its weights go with it: Q(W) has the spread of W again, and the bias takes back what xi
    shifts.

    Attributes:
        method: "empirical" or "analytic".
        images: Most images that the empirical form looks at; for all of them the tensors that are still
            to be read are in memory.
        norm: Restore the norm of each channel's weights too. It helps where the range of the weights is
            clipped to few bits.

    Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019,
    arXiv 1906.04721, section 4.2 and appendices; Finkelstein et al., "Fighting Quantization Bias With Bias",
    2019, arXiv 1906.03193 (from images); the norm: Banner et al., "Post-Training 4-Bit Quantization of
    Convolution Networks for Rapid-Deployment", 2018, arXiv 1810.05723.
    Differs: a correction that would not fit int32 at scale Sx Sw is left out; the analytic form takes a sum
    for normal again, of independent terms, and knows no mean behind a maximum pool or another activation
    than ReLU and clip: what reads that is not corrected. Banner et al. also shift Q by mu = mean W - mean Q;
    that is a fraction of a code and no integer engine's zero point, so its mean effect goes into the bias
    instead; xi stays within 1/2 and 2, and needs a scale a channel.
    """

    needs = frozenset({"calibrated"})
    gives = frozenset({"corrected"})

    method: Literal["empirical", "analytic"] = "empirical"
    images: int = Field(128, ge=1)
    norm: bool = False

    def reads_images(self, scheme: Scheme) -> bool:
        """Tell whether it takes the mean error from images."""
        return self.method == "empirical"

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Correct in place."""
        if self.method == "analytic":
            return _analytic(net, self.norm)
        return _empirical(net, context, self.images, self.norm)


def _analytic(net: Net, norm: bool) -> StepReport:
    expected = expected_inputs(net)
    layers = _matrices(net)
    left = [layer.name for layer in layers if layer.node not in expected]
    notes = [f"not corrected, the mean of what they read is not known: {', '.join(left)}"] if left else []
    for layer in layers:
        if layer.node in expected:
            module = _module_of(layer)
            exact = module.weight.detach().double()
            if norm:
                restore_norm(module)
            with torch.no_grad():
                error = module.weight_quantizer(module.weight).double() - exact
            kept = correct(net, layer, shift_of(module, error, expected[layer.node]))
            notes += _unfit(layer, kept)
    return StepReport(step="correct_bias", changed=len(layers) - len(left), notes=tuple(notes))


def shift_of(module: nn.Conv2d | nn.Linear, error: Tensor, expected: Tensor) -> Tensor:
    """Return eps E[x], the mean shift of each output channel.

    Args:
        module: Whose groups count.
        error: eps = Q(W) - W, in the weight's shape.
        expected: E[x] of each input channel.
    """
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    rows = error.reshape(groups, error.shape[0] // groups, len(expected) // groups, -1).sum(3)
    return (rows * expected.reshape(groups, 1, -1)).sum(2).reshape(-1)


def _empirical(net: Net, context: Context, most: int, norm: bool) -> StepReport:
    batches = list(_first(context.batches(), most))
    images = sum(len(batch) for batch in batches)
    if not images:
        raise DataError('correct_bias: no image came; give at least one, or method = "analytic"')
    wanted = _float_means(net, batches)
    layers = {layer.node: layer for layer in _matrices(net)}
    if norm:
        for layer in layers.values():
            restore_norm(_module_of(layer))
    notes = [f"from {images} images; {_FEW} or more are steadier"] if images < _FEW else []
    for done, (node, values) in enumerate(_walk(net, batches)):
        if node not in layers:
            continue
        module = _module_of(layers[node])
        error = torch.stack([_sums(module, part) for part in values]).sum(0) / _count(module, values)
        error -= wanted[node]
        kept = correct(net, layers[node], error)
        for part in values:
            part.sub_(_shaped(module, torch.where(kept, error, 0.0).float()))
        notes += _unfit(layers[node], kept)
        context.tell("correct_bias", done / len(net.graph.graph.nodes))
    return StepReport(step="correct_bias", changed=len(layers), notes=tuple(notes))


def correct(net: Net, layer: Layer, error: Tensor) -> Tensor:
    """Take a mean error out of a layer's bias where the result fits int32, and return where it does.

    Args:
        net: Whose grids hold.
        layer: A convolution or matrix product with a weight grid.
        error: float64 (O,).
    """
    module = _module_of(layer)
    bias = torch.zeros_like(error) if module.bias is None else module.bias.detach().double()
    wanted = bias - error
    reads = input_quantizer(net, layer.node)
    kept = torch.ones_like(wanted, dtype=torch.bool)
    if isinstance(reads, Quantizer):
        kept = wanted.abs() <= float(reads.scale) * module.weight_quantizer.scale.double() * _INT32_MAX
    module.bias = nn.Parameter(torch.where(kept, wanted, bias).to(module.weight.dtype))
    return kept


def _unfit(layer: Layer, kept: Tensor) -> list[str]:
    left = int((~kept).sum())
    return [f"{layer.name}: {left} corrections left out, they do not fit int32"] if left else []


def _matrices(net: Net) -> list[Layer]:
    return [layer for layer in net.layers() if isinstance(layer.module, QuantConv2d | QuantLinear)]


def _module_of(layer: Layer) -> QuantLayer:
    assert isinstance(layer.module, QuantConv2d | QuantLinear)
    return layer.module


def _first(batches: Iterable[Tensor], most: int) -> Iterator[Tensor]:
    """Yield batches until there are enough images."""
    for batch in batches:
        yield batch[:most]
        most -= len(batch)
        if most <= 0:
            return


def _sums(module: QuantLayer, values: Tensor) -> Tensor:
    """Return the sum of each output channel in float64."""
    axes = (0, 2, 3) if isinstance(module, QuantConv2d) else tuple(range(values.dim() - 1))
    return values.detach().sum(axes, dtype=torch.float64)


def _count(module: QuantLayer, values: Sequence[Tensor]) -> int:
    """Return how many values each output channel has."""
    return sum(part.numel() for part in values) // module.weight.shape[0]


def _shaped(module: QuantLayer, shift: Tensor) -> Tensor:
    return shift.reshape(-1, 1, 1) if isinstance(module, QuantConv2d) else shift


@contextmanager
def _in_float(net: Net) -> Iterator[None]:
    """Switch every quantizer off for a while."""
    found = [m for m in net.graph.modules() if isinstance(m, Quantizer | DynamicQuantizer) and m.enabled]
    for quantizer in found:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in found:
            quantizer.enabled = True


def _float_means(net: Net, batches: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
    """Return the mean of each output channel of each layer in the float network, float64 (O,)."""
    sums: dict[fx.Node, Tensor] = {}
    counts: dict[fx.Node, int] = {}

    def add(node: fx.Node, module: Any, inputs: Any, output: Tensor) -> None:
        sums[node] = sums.get(node, 0) + _sums(module, output)
        counts[node] = counts.get(node, 0) + _count(module, [output])

    handles = [layer.module.register_forward_hook(partial(add, layer.node)) for layer in _matrices(net)]
    try:
        with torch.no_grad(), _in_float(net):
            for batch in batches:
                net(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {node: total / counts[node] for node, total in sums.items()}


def _walk(net: Net, batches: Sequence[Tensor]) -> Iterator[tuple[fx.Node, list[Tensor]]]:
    """Yield each layer's output for all images, layer by layer; what nobody reads any more is dropped."""
    last = {source: node for node in net.graph.graph.nodes for source in node.all_input_nodes}
    values: dict[fx.Node, list[Tensor]] = {}
    for node in net.graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = list(batches)
        if node.op != "call_module":
            continue
        module = net.graph.get_submodule(str(node.target))
        read = [values[source] for source in node.args if isinstance(source, fx.Node)]
        with torch.no_grad():
            values[node] = [module(*parts) for parts in zip(*read, strict=True)]
        yield node, values[node]
        for source in node.all_input_nodes:
            if last[source] is node:
                values.pop(source, None)
