"""Small models for tests: a function of features between a stem and a classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.load.capture import capture
from fewbit.net import Net

SIZE = (3, 8, 8)


class Body(nn.Module):
    """A function of (N, 6, 8, 8), with the parts that it uses, between a stem and a classifier."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)
        with torch.no_grad():
            features = torch.flatten(self.function(self, torch.zeros(2, 6, 8, 8)), 1).shape[1]
        self.head = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.function(self, self.stem(x)), 1))


def body(function: Callable[..., Tensor], **parts: Any) -> Body:
    torch.manual_seed(0)
    return Body(function, **parts)


def captured(model: nn.Module, size: tuple[int, int, int] = SIZE) -> Net:
    """Capture, and check that the Net computes what the model does for other images and counts of them."""
    net = capture(model, "net", size)
    for count in (1, 5):
        images = torch.randn((count, *size), generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected = model.eval()(images.clone())
            torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-6)
    return net


def kinds(net: Net) -> list[str]:
    return [layer.kind for layer in net.layers()][1:-1]
