"""Networks drawn by chance from the layers of deployed CNNs, wired as nobody would by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Size = tuple[int, int]


class Move(NamedTuple):
    """One call of the network: what it computes from which values."""

    call: Callable[..., Tensor]
    reads: tuple[int, ...]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "elu": F.elu,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "affine": lambda x: x * 1.5 + 0.25,
    "negative": lambda x: -x,
    "self": lambda x: x + x,
}
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "sub": lambda a, b: a - b,
}


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, 0, 0.3)
    norm.running_mean = 0.3 * torch.randn(channels)
    norm.running_var = 0.3 + torch.rand(channels)
    return norm


def _gate(channels: int) -> nn.Module:
    """Squeeze and excite."""
    squeeze, excite = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), squeeze, nn.ReLU(), excite, nn.Sigmoid())


class _Rows(nn.Module):
    """A matrix product over the channels of each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class RandomNetwork(nn.Module):
    """A classifier of (3, 16, 16) drawn by a seed."""

    def __init__(self, seed: int, classes: int = 5) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.parts = nn.ModuleList()
        self.moves: list[Move] = []
        self.sizes: list[Size] = [(3, 16)]
        torch.manual_seed(seed)
        for _ in range(self.rng.randint(5, 11)):
            self._draw()
        channels, side = self.sizes[-1]
        self.flat = self.rng.random() < 0.3
        self.fc = nn.Linear(channels * side * side if self.flat else channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for move in self.moves:
            values.append(move.call(*[values[i] for i in move.reads]))
        last = values[-1]
        return self.fc(last.flatten(1) if self.flat else last.mean((2, 3)))

    def _add(self, call: Callable[..., Tensor], size: Size, *reads: int) -> None:
        if isinstance(call, nn.Module):
            self.parts.append(call)
        self.moves.append(Move(call, reads))
        self.sizes.append(size)

    def _draw(self) -> None:
        rng, latest = self.rng, len(self.sizes)
        source = rng.randrange(max(0, latest - 4), latest)
        channels, side = self.sizes[source]
        kind = rng.choice(["layer", "layer", "function", "join", "shape"])
        if kind == "layer":
            self._draw_layer(source, channels, side)
        elif kind == "function":
            self._add(FUNCTIONS[rng.choice(list(FUNCTIONS))], (channels, side), source)
        elif kind == "join":
            same = [i for i, size in enumerate(self.sizes) if size == (channels, side)]
            self._add(JOINS[rng.choice(list(JOINS))], (channels, side), source, rng.choice(same))
        else:
            self._draw_shape(source, channels, side)

    def _draw_layer(self, source: int, channels: int, side: int) -> None:
        kind = self.rng.choice(["conv", "conv", "depthwise", "norm", "prelu", "gate", "rows"])
        if kind == "conv":
            outputs, kernel = self.rng.choice([4, 8, 16]), self.rng.choice([1, 3])
            stride = self.rng.choice([1, 2]) if kernel == 3 and side >= 4 else 1
            conv = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, bias=self.rng.random() < 0.7)
            layer = nn.Sequential(conv, _norm(outputs)) if self.rng.random() < 0.5 else conv
            self._add(layer, (outputs, (side - 1) // stride + 1), source)
            return
        made: dict[str, Callable[[], nn.Module]] = {
            "depthwise": lambda: nn.Conv2d(channels, channels, 3, 1, 1, groups=channels),
            "norm": lambda: _norm(channels),
            "prelu": lambda: nn.PReLU(channels),
            "rows": lambda: _Rows(channels),
            "gate": lambda: _gate(channels),
        }
        layer = made[kind]()
        self._add(layer, (channels, side), source)
        if kind == "gate":
            self._add(JOINS["mul"], (channels, side), source, len(self.sizes) - 1)

    def _draw_shape(self, source: int, channels: int, side: int) -> None:
        kind = self.rng.choice(["concat", "pad", "pad value", "slice", "shuffle", "up", "pool", "mean pool"])
        if kind == "concat":
            other = self.rng.choice([i for i, size in enumerate(self.sizes) if size[1] == side])
            size = (channels + self.sizes[other][0], side)
            self._add(lambda a, b: torch.cat((a, b), 1), size, source, other)
        elif kind.startswith("pad"):
            value = 0.7 if kind == "pad value" else 0.0
            self._add(lambda x: F.pad(x, (0, 1, 1, 0), value=value), (channels, side + 1), source)
        elif kind == "slice":
            self._add(lambda x: x[:, : (channels + 1) // 2], ((channels + 1) // 2, side), source)
        elif kind == "shuffle" and channels % 2 == 0:
            self._add(lambda x: F.channel_shuffle(x, 2), (channels, side), source)
        elif kind == "up" and side <= 8:
            self._add(lambda x: F.interpolate(x, scale_factor=2), (channels, 2 * side), source)
        elif kind.endswith("pool") and side >= 4:
            make = nn.MaxPool2d if kind == "pool" else nn.AvgPool2d
            pool = make(3, 2, self.rng.choice([0, 1]), ceil_mode=self.rng.random() < 0.5)
            self._add(pool, (channels, pool(torch.zeros(1, 1, side, side)).shape[2]), source)
