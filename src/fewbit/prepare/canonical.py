"""Canonical form: the same function of the image, written the way that engines fuse."""

from __future__ import annotations

import torch
from torch import fx, nn

from fewbit import ops
from fewbit.net import Net, add_layer
from fewbit.step import Context, Step, StepReport


class Canonical(Step):
    """Rewrite a Net for inference without changing what it computes.

    Dropout, stochastic depth and identities go; x * sigmoid(x) becomes SiLU, x * hardsigmoid(x) and
    x * relu6(x + 3) / 6 become hard-swish, relu6(x + 3) / 6 hard-sigmoid; relu(concat(a, b)) becomes
    concat(relu(a), relu(b)), so that each ReLU stands behind its convolution; zero padding before a
    convolution becomes that convolution's own.
    """

    gives = frozenset({"canonical"})

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Rewrite in place."""
        changed = 0
        for rewrite in (drop_identities, find_hard_sigmoid, find_gates, swap_concat, fold_pads):
            for layer in net.layers():
                changed += rewrite(net, layer.node)
            net.refresh()
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
    if isinstance(_module(net, node), nn.Dropout | ops.DropPath | nn.Identity):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return _replace(net, node, source)
    return False


def find_hard_sigmoid(net: Net, node: fx.Node) -> bool:
    """Read relu6(x + 3) / 6 as a hard sigmoid."""
    last, clip = _module(net, node), _module(net, node.args[0])
    if not (isinstance(last, ops.Affine) and isinstance(clip, ops.Clip)) or last.shift is not None:
        return False
    middle = node.args[0]
    assert isinstance(middle, fx.Node)
    first = _module(net, middle.args[0])
    source = middle.args[0]
    if not (isinstance(first, ops.Affine) and isinstance(source, fx.Node)) or first.scale is not None:
        return False
    sixth = last.scale is not None and last.scale.numel() == 1 and abs(float(last.scale) * 6 - 1) < 1e-6
    three = first.shift is not None and first.shift.numel() == 1 and float(first.shift) == 3.0
    if not (sixth and three and (clip.low, clip.high) == (0.0, 6.0)):
        return False
    image = source.args[0]
    assert isinstance(image, fx.Node)
    return _swap(net, node, nn.Hardsigmoid(), image)


def find_gates(net: Net, node: fx.Node) -> bool:
    """Read x * sigmoid(x) as SiLU and x * hardsigmoid(x) as hard-swish."""
    if not isinstance(_module(net, node), ops.Mul):
        return False
    for x, gate in (node.args[:2], node.args[1::-1]):
        module = _module(net, gate)
        if not isinstance(x, fx.Node) or not isinstance(gate, fx.Node) or gate.args[:1] != (x,):
            continue
        if isinstance(module, nn.Sigmoid):
            return _swap(net, node, nn.SiLU(), x)
        if isinstance(module, nn.Hardsigmoid):
            return _swap(net, node, nn.Hardswish(), x)
    return False


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


def _set_module(net: Net, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(net.graph.get_submodule(parent), leaf, module)


def example_gap(net: Net, other: Net, seed: int = 0) -> float:
    """Return how far two networks' logits on a random image differ, relative to the largest logit."""
    image = torch.rand((1, *net.input_size), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        a, b = net(image), other(image)
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))
