"""BatchNorm folding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.net import Net, Normal
from fewbit.step import Context, Step, StepReport

_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
_Foldable = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


class FoldBN(Step):
    """Fold each BatchNorm into the convolution or matrix product before it.

    With s = gamma / sqrt(var + eps) for each output channel::

        W' = s W        b' = beta + s (b - mu)

    computed in float64. A BatchNorm whose input is not the output of such a layer, that shares it with
    another reader, or that normalises another axis stays (before a zero-padded convolution it does not fold
    exactly). What it says of the layer's output, N(beta, gamma^2) in each channel, stays in `Net.statistics`.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, arXiv 1712.05877, section 3.2.
    Differs: a channel whose variance is 0 folds to a finite scale through eps; nothing is clipped.
    """

    before = frozenset({"placed"})
    gives = frozenset({"folded"})

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Fold in place."""
        changed, left = 0, []
        for layer in net.layers():
            if not isinstance(layer.module, _BatchNorm):
                continue
            source = layer.node.args[0]
            assert isinstance(source, fx.Node)
            before = net.graph.get_submodule(str(source.target)) if source.op == "call_module" else None
            if isinstance(before, _Foldable) and len(source.users) == 1 and _same_axis(net, source, before):
                fold(before, layer.module)
                net.statistics[str(source.target)] = normal_of(layer.module)
                layer.node.replace_all_uses_with(source)
                net.graph.graph.erase_node(layer.node)
                changed += 1
            else:
                left.append(layer.name)
        net.refresh()
        notes = (f"BatchNorm kept, nothing before it to fold into: {', '.join(left)}",) if left else ()
        return StepReport(step="fold_bn", changed=changed, notes=notes)


class _Rank(fx.Interpreter):
    """Runs a network up to one node and keeps the rank of its value."""

    def __init__(self, net: Net, wanted: fx.Node) -> None:
        super().__init__(net.graph)
        self.extra_traceback = False  # an error stays one line
        self.wanted, self.rank = wanted, 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n is self.wanted:
            self.rank = value.dim()
        return value


def _same_axis(net: Net, node: fx.Node, layer: nn.Module) -> bool:
    """Tell whether a layer's outputs lie on axis 1, which a BatchNorm normalises."""
    if not isinstance(layer, nn.Linear):
        return True
    walk = _Rank(net, node)
    with torch.no_grad():
        walk.run(net.example())
    return walk.rank == 2


def fold(layer: _Foldable, norm: _BatchNorm) -> None:
    """Fold one BatchNorm into a layer's weight and bias, in float64.

    Args:
        layer: Weight (O, I/g, kh, kw), (O, I), or transposed (I, O/g, kh, kw).
        norm: Its statistics are those of evaluation.
    """
    scale, shift = affine_of(norm)
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.ConvTranspose2d):
        per_group = layer.out_channels // layer.groups
        blocks = weight.reshape(layer.groups, -1, per_group, *weight.shape[2:])
        folded = (blocks * scale.reshape(layer.groups, 1, per_group, 1, 1)).reshape(weight.shape)
    else:
        folded = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().double()
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(folded.to(dtype))
    layer.bias = nn.Parameter((shift + scale * bias).to(dtype))


def affine_of(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) in float64 such that a BatchNorm in evaluation is x * scale + shift."""
    assert norm.running_mean is not None and norm.running_var is not None
    gamma = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight.detach()
    beta = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias.detach()
    scale = gamma.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, beta.double() - scale * norm.running_mean.double()


def normal_of(norm: _BatchNorm) -> Normal:
    """Return the distribution that a BatchNorm gives its output: N(beta, gamma^2) in each channel.

    Training makes it so; a channel of variance v much below eps has only gamma^2 v / (v + eps).
    """
    scale, _ = affine_of(norm)
    assert norm.running_var is not None
    mean = torch.zeros_like(scale) if norm.bias is None else norm.bias.detach().double()
    return Normal(mean, scale.abs() * torch.sqrt(norm.running_var.double()))
