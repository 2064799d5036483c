from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.load.capture import capture
from fewbit.net import Net, Normal
from fewbit.prepare.absorb_bias import AbsorbBias, surplus_of
from fewbit.prepare.fold_bn import FoldBN
from fewbit.prepare.joints import matrix_of
from fewbit.step import StepReport
from networks import make_context

BETA, GAMMA, SURPLUS = (3.0, 0.5, 1.2), (0.5, 0.4, 0.3), (1.5, 0.0, 0.3)
Body = Callable[[Any, Tensor], Tensor]


class Two(nn.Module):
    """A layer that puts out N(beta, gamma^2) of the specification's example, and what reads it."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.first, self.norm = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3, eps=1e-9)
        self.point, self.window = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 3)
        self.padded, self.depthwise = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 3, 2, groups=3)
        self.fc = nn.Linear(3 * 36, 4)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor(GAMMA))
            self.norm.bias.copy_(torch.tensor(BETA))
            self.first.weight.copy_(torch.eye(3).reshape(3, 3, 1, 1))  # the image is N(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.norm(self.first(x))).flatten(1)


def absorbed(body: Body, **options: Any) -> tuple[Net, Net, StepReport]:
    torch.manual_seed(0)
    net = capture(Two(body).eval(), "two", (3, 6, 6))
    FoldBN()(net, make_context())
    copy = net.clone()
    return net, copy, AbsorbBias(**options)(copy, make_context())


def test_worked_example() -> None:
    found = surplus_of(Normal(torch.tensor(BETA), torch.tensor(GAMMA)))
    assert found.tolist() == pytest.approx(SURPLUS, abs=1e-6)
    net, copy, report = absorbed(lambda m, x: m.point(F.relu(x)))
    assert report.changed == 1
    before, after = matrix_of(net.layer("first")), matrix_of(copy.layer("first"))
    assert (before.bias - after.bias).tolist() == pytest.approx(SURPLUS, abs=1e-6)
    assert torch.equal(before.weight, after.weight)
    reader = matrix_of(copy.layer("point"))
    expected = matrix_of(net.layer("point")).weight.detach().flatten(1) @ torch.tensor(SURPLUS)
    assert reader.bias.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert copy.statistics["first"].mean.tolist() == pytest.approx([1.5, 0.5, 0.9], abs=1e-6)
    assert copy.statistics["first"].std.tolist() == pytest.approx(GAMMA, abs=1e-6)


CARRIED: dict[str, Body] = {
    "1 x 1": lambda m, x: m.point(F.relu(x)),
    "window": lambda m, x: m.window(F.relu(x)),
    "depthwise": lambda m, x: m.depthwise(F.relu(x)),
    "two readers": lambda m, x: torch.cat((m.window(y := F.relu(x)).flatten(1), m.point(y).flatten(1)), 1),
    "pooled": lambda m, x: m.point(F.max_pool2d(F.relu(x), 3, 2, 1)),
    "flattened": lambda m, x: m.fc(F.relu(x).flatten(1)),
}


@pytest.mark.parametrize("case", CARRIED)
def test_values_above_the_surplus_pass_exactly(case: str) -> None:
    net, copy, report = absorbed(CARRIED[case])
    assert report.changed == 1
    images = torch.rand((5, 3, 6, 6), generator=torch.Generator().manual_seed(1)) * 6 - 3
    with torch.no_grad():
        expected, found = net(images), copy(images)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # values below it do not
        assert not torch.allclose(copy(images - 6), net(images - 6), atol=1e-3)


LEFT: dict[str, Body] = {
    "a zero-padded reader": lambda m, x: m.padded(F.relu(x)),
    "padding of its own": lambda m, x: m.window(F.pad(F.relu(x), (0, 1, 0, 0))),
    "an average over padding": lambda m, x: m.window(F.avg_pool2d(F.relu(x), 3, 1, 1)),
    "a clip": lambda m, x: m.point(F.relu6(x)),
    "no activation": lambda m, x: m.point(x),
    "a leaky one": lambda m, x: m.point(F.leaky_relu(x)),
    "a sum": lambda m, x: m.depthwise(y := F.relu(x)).flatten(1).mean(1, keepdim=True) + y.flatten(1),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_does_not_carry_a_constant_is_left(case: str) -> None:
    net, copy, report = absorbed(LEFT[case])
    assert report.changed == 0
    assert all(
        torch.equal(a, b) for a, b in zip(net.graph.parameters(), copy.graph.parameters(), strict=True)
    )


def test_a_larger_distance_absorbs_less() -> None:
    _, copy, _ = absorbed(CARRIED["1 x 1"], deviations=5)
    assert copy.statistics["first"].mean.tolist() == pytest.approx([2.5, 0.5, 1.2], abs=1e-6)


def test_without_statistics_nothing_is_absorbed() -> None:
    net, _, _ = absorbed(CARRIED["1 x 1"])
    net.statistics.clear()
    assert AbsorbBias()(net, make_context()).changed == 0
