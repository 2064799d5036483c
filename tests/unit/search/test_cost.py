"""Counts of multiplications and weights: by hand, and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fewbit.load.capture import capture
from fewbit.search.cost import count_cost


class Mixed(nn.Module):
    """Every kind that is counted, and one layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.point = nn.Conv2d(6, 4, 1)
        self.last = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(F.relu(self.twice(self.first(x))))
        x = self.point(self.up(self.depthwise(x)))
        rows = x.flatten(2)
        x = (rows @ rows.transpose(1, 2)).mean(2)
        logits: Tensor = self.last(x)
        return logits


def test_counts_by_hand() -> None:
    cost = count_cost(capture(Mixed(), "mixed", (3, 12, 12)))
    assert cost.dense_macs == 36 * 8 * 27 + 2 * (36 * 8 * 36) + 36 * 8 * 6 * 4
    assert cost.depthwise_macs == 36 * 8 * 25
    assert cost.pointwise_macs == 144 * 4 * 6 + 4 * 144 * 4 + 4 * 7
    assert cost.weights == 8 * 27 + 8 * 36 + 8 * 25 + 8 * 6 * 4 + 24 + 28
    assert cost.macs == cost.matrix_macs + cost.depthwise_macs


def test_counts_are_those_of_torch() -> None:
    net = capture(Mixed(), "mixed", (3, 12, 12))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(net.example())
    assert count_cost(net).macs == counter.get_total_flops() // 2


@pytest.mark.parametrize("groups", [1, 2])
def test_one_input_channel_is_no_depthwise_convolution(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(groups, 4, 3, groups=groups), nn.Flatten(), nn.Linear(36, 2))
    cost = count_cost(capture(model, "grey", (groups, 5, 5)))
    assert (cost.dense_macs, cost.depthwise_macs) == ((324, 0) if groups == 1 else (0, 324))
