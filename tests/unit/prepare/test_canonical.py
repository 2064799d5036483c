from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit import ops
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.prepare.canonical import Canonical, example_logits, relative_gap
from networks import NETWORKS, make_context, make_images, make_net

Body = Callable[[Any, Tensor], Tensor]


class Small(nn.Module):
    """Two convolutions with a body between them and the logits."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(3, 4, 3, padding=1)
        self.c = nn.Conv2d(4, 4, 3, padding=1)
        self.point, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.norm.running_mean.fill_(0.3)
        self.drop = nn.Dropout(0.5)
        self.pool = nn.AvgPool2d([2, 2], stride=[2, 2], padding=[0, 0])  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x).mean((2, 3))


def rewritten(body: Body) -> tuple[Net, int]:
    """Return the network with this body after the step and how much it changed; it computes the same."""
    torch.manual_seed(0)
    net = capture(Small(body).eval(), "small", (3, 8, 8))
    images = torch.randn((3, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    before = net(images)
    copy = net.clone()
    report = Canonical()(copy, make_context())
    with torch.no_grad():
        assert torch.allclose(copy(images), before, rtol=1e-5, atol=1e-6)
    assert torch.equal(net(images), before)
    return copy, report.changed


def kinds(net: Net) -> list[str]:
    """Kinds of all layers, without those that only shape the logits."""
    return [layer.kind for layer in net.layers() if layer.kind not in ("GlobalAvgPool", "Flatten", "Mean")]


def relu6_gate(x: Tensor) -> Tensor:
    return F.relu6(x + 3)


def order(net: Net) -> list[str]:
    """Kinds of the convolution, the pool and the norm in the order in which they run."""
    return [layer.kind for layer in net.layers() if layer.kind in ("Conv", "AvgPool", "BatchNorm")]


POOLED: dict[str, tuple[Body, list[str]]] = {
    "plain": (lambda m, x: F.avg_pool2d(m.point(x), 2), ["AvgPool", "Conv"]),
    "overlapping": (lambda m, x: F.avg_pool2d(m.point(x), 3, 2), ["AvgPool", "Conv"]),
    "ceiling": (lambda m, x: F.avg_pool2d(m.point(x), 3, 2, ceil_mode=True), ["AvgPool", "Conv"]),
    "padding not counted": (
        lambda m, x: F.avg_pool2d(m.point(x), 3, 2, 1, count_include_pad=False),
        ["AvgPool", "Conv"],
    ),
    "norm between": (lambda m, x: F.avg_pool2d(m.norm(m.point(x)), 2), ["Conv", "BatchNorm", "AvgPool"]),
    "lists": (lambda m, x: m.pool(m.point(x)), ["AvgPool", "Conv"]),
    "padding counted": (lambda m, x: F.avg_pool2d(m.point(x), 3, 2, 1), ["Conv", "AvgPool"]),
    "no stride": (lambda m, x: F.avg_pool2d(m.point(x), 3, 1), ["Conv", "AvgPool"]),
    "wider kernel": (lambda m, x: F.avg_pool2d(m.a(x), 2), ["Conv", "AvgPool"]),
    "activation between": (lambda m, x: F.avg_pool2d(F.relu(m.point(x)), 2), ["Conv", "AvgPool"]),
    "read elsewhere": (
        lambda m, x: F.avg_pool2d(y := m.point(x), 2) + F.max_pool2d(y, 2),
        ["Conv", "AvgPool"],
    ),
    "the image": (lambda m, x: m.point(F.avg_pool2d(x, 2)), ["AvgPool", "Conv"]),
}


@pytest.mark.parametrize("case", POOLED)
def test_an_average_pool_that_strides_moves_before_a_point(case: str) -> None:
    body, expected = POOLED[case]
    torch.manual_seed(0)
    net = capture(Small(body).eval(), "small", (3, 8, 8))
    images = torch.randn((3, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    before = net(images)
    Canonical()(net, make_context("openvino"))
    with torch.no_grad():
        torch.testing.assert_close(net(images), before, rtol=1e-5, atol=1e-6)
    assert order(net) == expected


def test_average_pools_stay_where_the_engine_averages_codes_slowly() -> None:
    body, _ = POOLED["plain"]
    net, changed = rewritten(body)
    assert order(net) == ["Conv", "AvgPool"] and changed == 0


REWRITES: dict[str, tuple[Body, list[str]]] = {
    "silu": (lambda m, x: (y := m.a(x)) * torch.sigmoid(y), ["Conv", "Silu"]),
    "silu, gate first": (lambda m, x: torch.sigmoid(y := m.a(x)) * y, ["Conv", "Silu"]),
    "hard-swish": (lambda m, x: (y := m.a(x)) * F.hardsigmoid(y), ["Conv", "HardSwish"]),
    "hard-swish by relu6": (lambda m, x: (y := m.a(x)) * (relu6_gate(y) / 6), ["Conv", "HardSwish"]),
    "hard-swish, divided last": (lambda m, x: (y := m.a(x)) * relu6_gate(y) / 6, ["Conv", "HardSwish"]),
    "hard-swish, gate first": (lambda m, x: relu6_gate(y := m.a(x)) * y / 6, ["Conv", "HardSwish"]),
    "hard-sigmoid": (lambda m, x: relu6_gate(m.a(x)) / 6, ["Conv", "HardSigmoid"]),
    "hard-sigmoid, times": (lambda m, x: relu6_gate(m.a(x)) * (1 / 6), ["Conv", "HardSigmoid"]),
    "concat": (
        lambda m, x: F.relu(torch.cat((m.a(x), m.b(x)), 1)),
        ["Conv", "Conv", "Relu", "Relu", "Concat"],
    ),
    "concat, clip": (
        lambda m, x: F.relu6(torch.cat((m.a(x), m.b(x)), 1)),
        ["Conv", "Conv", "Clip", "Clip", "Concat"],
    ),
    "pad": (lambda m, x: m.c(F.pad(m.a(x), (0, 1, 2, 0))), ["Conv", "Conv"]),
    "pad read by two": (lambda m, x: m.a(y := F.pad(x, (0, 1, 0, 1))) + m.b(y), ["Conv", "Conv", "Add"]),
    "dropout": (lambda m, x: m.drop(m.a(x)), ["Conv"]),
}


@pytest.mark.parametrize("case", REWRITES)
def test_each_rewrite(case: str) -> None:
    body, expected = REWRITES[case]
    net, changed = rewritten(body)
    assert sorted(kinds(net)) == sorted(expected)
    assert changed >= 1


NEAR_MISSES: dict[str, Body] = {
    "gate of another tensor": lambda m, x: m.a(x) * torch.sigmoid(m.b(x)),
    "hard gate of another tensor": lambda m, x: m.a(x) * F.hardsigmoid(m.b(x)),
    "relu6 gate of another tensor": lambda m, x: m.a(x) * relu6_gate(m.b(x)) / 6,
    "a tensor times itself": lambda m, x: (y := m.a(x)) * y,
    "the gate of the gate": lambda m, x: (y := torch.sigmoid(m.a(x))) * torch.tanh(y),
    "sum, not product": lambda m, x: (y := m.a(x)) + torch.sigmoid(y),
    "shift that is not 3": lambda m, x: F.relu6(m.a(x) + 2) / 6,
    "divisor that is not 6": lambda m, x: F.relu6(m.a(x) + 3) / 5,
    "clip that is not 0 to 6": lambda m, x: torch.clamp(m.a(x) + 3, 0, 5) / 6,
    "shift of each channel": lambda m, x: F.relu6(m.a(x) + torch.full((4, 1, 1), 3.0)) / 6,
    "scaled, not shifted": lambda m, x: F.relu6(m.a(x) * 3) / 6,
    "scaled and clipped image": lambda m, x: F.relu6(x) / 6,
    "concat read twice": lambda m, x: (y := torch.cat((m.a(x), m.b(x)), 1)) + F.relu(y),
    "sigmoid behind concat": lambda m, x: torch.sigmoid(torch.cat((m.a(x), m.b(x)), 1)),
    "pad with a value": lambda m, x: m.c(F.pad(m.a(x), (1, 1, 1, 1), value=1.0)),
    "pad of channels": lambda m, x: F.pad(m.a(x), (1, 1, 1, 1, 0, 2)),
    "pad read by a pool too": lambda m, x: m.c(y := F.pad(m.a(x), (1, 1, 1, 1))) + F.max_pool2d(y, 1),
    "pad before a pool": lambda m, x: F.max_pool2d(F.pad(m.a(x), (1, 1, 1, 1)), 2),
    "pad as logits": lambda m, x: F.pad(m.a(x), (1, 0, 0, 0)),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_stay_as_they_are(case: str) -> None:
    body = NEAR_MISSES[case]
    torch.manual_seed(0)
    before = kinds(capture(Small(body).eval(), "small", (3, 8, 8)))
    net, changed = rewritten(body)
    assert kinds(net) == before and changed == 0


def test_a_gate_that_is_read_elsewhere_stays_beside_the_rewritten_one() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        gate = torch.sigmoid(y)
        return y * gate + gate

    net, changed = rewritten(body)
    assert sorted(kinds(net)) == ["Add", "Conv", "Sigmoid", "Silu"] and changed == 1


def test_padding_adds_up_on_each_side() -> None:
    net, _ = rewritten(lambda m, x: m.c(F.pad(m.a(x), (0, 1, 2, 3))))
    assert ops.pads_of(net.layer("c").module) == (3, 1, 4, 2)  # type: ignore[arg-type]


def test_concat_of_one_tensor_with_itself() -> None:
    net, _ = rewritten(lambda m, x: F.relu(torch.cat((y := m.a(x), y), 1)))
    assert kinds(net).count("Concat") == 1 and kinds(net).count("Relu") == 2


def test_moved_activations_are_named_after_the_one_they_come_from() -> None:
    copy = make_net("branches")
    Canonical()(copy, make_context())
    names = [layer.name for layer in copy.layers()]
    assert "relu.0" in names and "relu.1" in names and "relu" not in names


def test_a_gate_of_one_value_a_channel_stays() -> None:
    """Squeeze-and-excite divides and multiplies too, but by another tensor."""
    net, _ = rewritten(lambda m, x: (y := m.a(x)) * (relu6_gate(y.mean((2, 3), keepdim=True)) / 6))
    assert [layer.kind for layer in net.layers()].count("HardSigmoid") == 1
    assert "Mul" in kinds(net) and "HardSwish" not in kinds(net)


def test_stochastic_depth_and_identities_go() -> None:
    body = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Identity(), nn.Dropout2d(0.1), nn.Flatten(), nn.AlphaDropout(0.1)
    )
    net = capture(body.eval(), "net", (3, 4, 4))
    Canonical()(net, make_context())
    assert [layer.kind for layer in net.layers()] == ["Conv", "Flatten"]
    with_depth = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval(), "net", (3, 4, 4))
    conv = with_depth.layer("0").node
    with with_depth.graph.graph.inserting_after(conv):
        with_depth.graph.add_submodule("depth", ops.DropPath(0.5))
        depth = with_depth.graph.graph.call_module("depth", (conv,))
    with_depth.layer("1").node.replace_input_with(conv, depth)
    assert Canonical()(with_depth, make_context()).changed == 1
    assert [layer.kind for layer in with_depth.layers()] == ["Conv", "Flatten"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_the_same_and_twice_is_once(name: str) -> None:
    net = make_net(name)
    copy = net.clone()
    Canonical()(copy, make_context())
    images = make_images(4)
    with torch.no_grad():
        assert torch.allclose(net(images), copy(images), rtol=1e-5, atol=1e-6)
    assert Canonical()(copy, make_context()).changed == 0


def test_the_gap_is_relative_to_the_largest_logit() -> None:
    net = make_net("residual")
    other = net.clone()
    expected = example_logits(net)
    assert relative_gap(expected, example_logits(other)) == 0.0
    with torch.no_grad():
        other.layer("fc").module.bias.add_(0.1)  # type: ignore[union-attr, operator]
    assert relative_gap(expected, example_logits(other)) == pytest.approx(
        0.1 / float(expected.abs().max()), rel=1e-3
    )
    assert not torch.equal(example_logits(net, seed=1), expected)


def test_a_local_response_norm_takes_its_faster_form() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.LocalResponseNorm(5, 0.2), nn.Flatten())
    net = capture(model, "normed", (3, 6, 6))
    images = make_images(2)[:, :, :6, :6]
    expected = net(images)
    assert Canonical()(net, make_context()).changed == 1
    assert isinstance(net.layer("1").module, ops.LocalResponseNorm)
    torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-6)


def test_a_padded_pointwise_convolution_becomes_a_3x3_one() -> None:
    point = nn.Conv2d(4, 6, 1, stride=2, padding=(1, 0), groups=2)
    point.weight.requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), point, nn.Conv2d(6, 2, 1), nn.Flatten())
    net = capture(model, "padded", (3, 9, 7))
    images = torch.rand(2, 3, 9, 7)
    expected = net(images)
    assert Canonical()(net, make_context()).changed == 1
    wide = net.layer("1").module
    assert isinstance(wide, ops.Conv2d) and wide.kernel_size == (3, 3) and wide.pads == (2, 1, 2, 1)
    assert not wide.weight.requires_grad and wide.weight.count_nonzero() == point.weight.count_nonzero()
    assert not wide.training and wide.bias is not None
    torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-6)
