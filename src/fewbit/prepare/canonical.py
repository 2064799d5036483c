"""Canonical form: the same function of the image, written the way that engines fuse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fewbit import ops
from fewbit.net import Net, add_layer
from fewbit.prepare.unshuffle import unshuffle
from fewbit.step import Context, Step, StepReport

_IDENTITIES = frozenset({"Dropout", "DropPath", "Identity"})


class Canonical(Step):
    """Rewrite a Net for inference without changing what it computes.

    Dropout, stochastic depth and identities go; x * sigmoid(x) becomes SiLU, x * hardsigmoid(x) and
    x * relu6(x + 3) / 6 become hard-swish, relu6(x + 3) / 6 hard-sigmoid; relu(concat(a, b)) becomes
    concat(relu(a), relu(b)), so that each ReLU stands behind its convolution; channel shuffles go into the
    order of the channels of the convolutions around them; an average pool that strides moves to before a
    1 x 1 convolution (but for an engine that averages codes slowly); zero padding before a
    convolution becomes that convolution's own; a 1 x 1 convolution that pads becomes a 3 x 3 one; local
    response normalization takes a faster form.
    """

    before = frozenset({"placed"})
    gives = frozenset({"canonical"})

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Rewrite in place."""
        changed = 0
        rewrites = [
            drop_identities,
            find_hard_sigmoid,
            find_gates,
            swap_concat,
            fold_pads,
            widen_points,
            speed_norms,
        ]
        if not context.target.slow_average_pools:
            rewrites.append(swap_pools)
        for rewrite in rewrites:
            for layer in net.layers():
                changed += rewrite(net, layer.node)
            net.refresh()
        changed += unshuffle(net)
        return StepReport(step="canonical", changed=changed)


def _module(net: Net, node: object) -> nn.Module | None:
    if isinstance(node, fx.Node) and node.op == "call_module":
        return net.graph.get_submodule(str(node.target))
    return None


def _replace(net: Net, node: fx.Node, other: fx.Node) -> bool:
    node.replace_all_uses_with(other)
    net.graph.graph.erase_node(node)
    return True


def _swap(net: Net, node: fx.Node, module: nn.Module, *inputs: fx.Node) -> bool:
    """Put one layer in the place of `node` and whatever only it read."""
    name = str(node.target)
    with net.graph.graph.inserting_before(node):
        new = add_layer(net.graph, name + "." + type(module).__name__.lower(), module, *inputs)
    return _replace(net, node, new)


def drop_identities(net: Net, node: fx.Node) -> bool:
    """Remove a layer that does nothing in evaluation."""
    module = _module(net, node)
    if module is not None and ops.kind_of(module) in _IDENTITIES:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return _replace(net, node, source)
    return False


def find_hard_sigmoid(net: Net, node: fx.Node) -> bool:
    """Read relu6(x + 3) / 6 as a hard sigmoid, x * relu6(x + 3) / 6 as hard-swish."""
    source = node.args[0] if node.args else None
    if not _is_sixth(_module(net, node)) or not isinstance(source, fx.Node):
        return False
    image = _shifted_relu6(net, source)
    if image is not None:
        return _swap(net, node, nn.Hardsigmoid(), image)
    if isinstance(_module(net, source), ops.Mul):
        for x, gate in (source.args[:2], source.args[1::-1]):
            if isinstance(x, fx.Node) and _shifted_relu6(net, gate) is x:
                return _swap(net, node, nn.Hardswish(), x)
    return False


def _is_sixth(module: nn.Module | None) -> bool:
    """Tell whether a layer only divides by 6."""
    if not isinstance(module, ops.Affine) or module.shift is not None or module.scale is None:
        return False
    return module.scale.numel() == 1 and abs(float(module.scale.detach()) * 6 - 1) < 1e-6


def _shifted_relu6(net: Net, node: object) -> fx.Node | None:
    """Return x where a node computes relu6(x + 3)."""
    clip = _module(net, node)
    if not isinstance(node, fx.Node) or not isinstance(clip, ops.Clip) or (clip.low, clip.high) != (0.0, 6.0):
        return None
    source = node.args[0]
    first = _module(net, source)
    if not isinstance(first, ops.Affine) or first.scale is not None or first.shift is None:
        return None
    if first.shift.numel() != 1 or float(first.shift.detach()) != 3.0:
        return None
    assert isinstance(source, fx.Node)
    image = source.args[0]
    return image if isinstance(image, fx.Node) else None


def find_gates(net: Net, node: fx.Node) -> bool:
    """Read x * sigmoid(x) as SiLU and x * hardsigmoid(x) as hard-swish."""
    found = gated(net, node)
    if found is None:
        return False
    x, gate = found
    return _swap(net, node, nn.SiLU() if isinstance(gate, nn.Sigmoid) else nn.Hardswish(), x)


def gated(net: Net, node: fx.Node) -> tuple[fx.Node, nn.Sigmoid | nn.Hardsigmoid] | None:
    """Return x and the gate of a product x * gate(x)."""
    if not isinstance(_module(net, node), ops.Mul):
        return None
    for x, gate in (node.args[:2], node.args[1::-1]):
        module = _module(net, gate)
        if not isinstance(x, fx.Node) or not isinstance(gate, fx.Node) or gate.args[:1] != (x,):
            continue
        if isinstance(module, nn.Sigmoid | nn.Hardsigmoid):
            return x, module
    return None


def swap_concat(net: Net, node: fx.Node) -> bool:
    """Move a ReLU or a clip from behind a concatenation to each of its inputs."""
    module, source = _module(net, node), node.args[0] if node.args else None
    if not isinstance(module, nn.ReLU | ops.Clip) or not isinstance(source, fx.Node):
        return False
    if not isinstance(_module(net, source), ops.Concat) or len(source.users) != 1:
        return False
    branches = []
    for index, branch in enumerate(source.args):
        assert isinstance(branch, fx.Node)
        with net.graph.graph.inserting_before(source):
            own = nn.ReLU() if isinstance(module, nn.ReLU) else ops.Clip(module.low, module.high)
            branches.append(add_layer(net.graph, f"{node.target}.{index}", own, branch))
    source.args = tuple(branches)
    return _replace(net, node, source)


def swap_pools(net: Net, node: fx.Node) -> bool:
    """Move an average pool that strides from behind a 1 x 1 convolution to before it, for fewer products.

    The mean of weighted sums is the weighted sum of means, and a window's weights sum to 1, so a bias stays.
    Not across a BatchNorm, which tells the distribution of the convolution's values before the mean.
    """
    pool = _module(net, node)
    if not isinstance(pool, nn.AvgPool2d) or not _strides(pool) or not _is_mean(pool):
        return False
    source = node.args[0]
    conv = _module(net, source)
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (1, 1) or conv.stride != (1, 1):
        return False
    assert isinstance(source, fx.Node)
    if any(ops.pads_of(conv)) or len(source.users) != 1:
        return False
    with net.graph.graph.inserting_before(source):
        pooled = net.graph.graph.call_module(str(node.target), (source.args[0],))
    source.args = (pooled,)
    return _replace(net, node, source)


def _strides(pool: nn.AvgPool2d) -> bool:
    return min(_pair(pool.stride)) > 1


def _is_mean(pool: nn.AvgPool2d) -> bool:
    """Tell whether every window's weights sum to 1: no padded zero is counted."""
    return _pair(pool.padding) == (0, 0) or not pool.count_include_pad


def _pair(given: int | Sequence[int]) -> tuple[int, ...]:
    return (given, given) if isinstance(given, int) else tuple(given)


def fold_pads(net: Net, node: fx.Node) -> bool:
    """Fold zero padding of H and W into the convolutions that read it."""
    pad = _module(net, node)
    if not isinstance(pad, ops.Pad) or pad.value != 0.0 or len(pad.pads) != 4:
        return False
    if any(pair != (0, 0) for pair in pad.pads[:2]):
        return False
    readers = [_module(net, user) for user in node.users]
    if not all(isinstance(reader, nn.Conv2d) for reader in readers):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    (above, below), (before, after) = pad.pads[2:]
    for user in list(node.users):
        conv = _module(net, user)
        assert isinstance(conv, nn.Conv2d)
        top, left, bottom, right = ops.pads_of(conv)
        padded = ops.Conv2d(conv, (top + above, left + before, bottom + below, right + after))
        _set_module(net, str(user.target), padded)
        user.args = (source,)
    net.graph.graph.erase_node(node)
    return True


def widen_points(net: Net, node: fx.Node) -> bool:
    """Give a 1 x 1 convolution that pads a 3 x 3 kernel with zeros around.

    OpenVINO 2026.4 forgets the padding of a 1 x 1 convolution that strides or has an int8 weight.
    """
    conv = _module(net, node)
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (1, 1) or not any(ops.pads_of(conv)):
        return False
    top, left, bottom, right = ops.pads_of(conv)
    wide = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        3,
        conv.stride,  # type: ignore[arg-type]
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",
    ).train(conv.training)
    wide.weight = nn.Parameter(F.pad(conv.weight.detach(), (1, 1, 1, 1)), conv.weight.requires_grad)
    wide.bias = conv.bias
    _set_module(net, str(node.target), ops.Conv2d(wide, (top + 1, left + 1, bottom + 1, right + 1)))
    return True


def speed_norms(net: Net, node: fx.Node) -> bool:
    """Take the faster form of a local response normalization."""
    module = _module(net, node)
    if type(module) is not nn.LocalResponseNorm:
        return False
    _set_module(net, str(node.target), ops.LocalResponseNorm(module))
    return True


def _set_module(net: Net, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(net.graph.get_submodule(parent), leaf, module)


def example_logits(net: Net, seed: int = 0) -> Tensor:
    """Return a network's logits (1, classes) on a random image, to see what a step changed."""
    image = torch.rand((1, *net.input_size), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return net(image)


def relative_gap(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest expected value."""
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-6))
