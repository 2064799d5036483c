"""Small networks with the patterns that deployed CNNs are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.targets import target
from fewbit.recipe import Context, Recipe, read_recipe, run_recipe
from fewbit.spec import Scheme

SIZE = (3, 16, 16)
CLASSES = 5


class Residual(nn.Module):
    """A stem, a residual block with BatchNorm, a pooled classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        y = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(y)))
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    """Depthwise separable with ReLU6 and one-sided padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, bias=False)
        self.stem_bn = nn.BatchNorm2d(16)
        self.dw = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.dw_bn = nn.BatchNorm2d(16)
        self.pw = nn.Conv2d(16, 32, 1, bias=False)
        self.pw_bn = nn.BatchNorm2d(32)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem_bn(self.stem(F.pad(x, (0, 1, 0, 1)))))
        x = F.relu6(self.dw_bn(self.dw(x)))
        x = F.relu6(self.pw_bn(self.pw(x)))
        return self.fc(self.drop(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class Branches(nn.Module):
    """Inception-like: ReLU behind a concatenation, a pool on one branch, channels shuffled for groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(3, 8, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 3, 2, groups=2)
        self.d = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.cat((self.a(x), self.b(x)), 1))
        x = F.channel_shuffle(x, 2) if hasattr(F, "channel_shuffle") else x
        x = torch.cat((F.relu(self.c(x)), F.max_pool2d(F.relu(self.d(x)), 3, 2)), 1)
        return self.fc(x.mean((2, 3)))


class Gated(nn.Module):
    """Squeeze-and-excite, SiLU and hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.squeeze = nn.Conv2d(16, 4, 1)
        self.excite = nn.Conv2d(4, 16, 1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.a(x))
        s = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        x = x * torch.sigmoid(self.excite(s))
        x = F.hardswish(self.b(x))
        return self.fc(x.mean((2, 3)))


NETWORKS: dict[str, type[nn.Module]] = {
    "residual": Residual,
    "depthwise": Depthwise,
    "branches": Branches,
    "gated": Gated,
}
WHOLE_RANGE = ((-2.0, -2.0, -2.0), (127 / 64, 127 / 64, 127 / 64))
"""Pixels / 64 - 2: the value 0 is the pixel 128."""
READS_NORMS = frozenset({"zeroq", "calibrate_norm"})
"""Steps that refuse a network without BatchNorm."""
RECIPES = ("int8", "int8-mse", "int8-percentile", "int8-per-tensor", "int8-symmetric")


def networks_for(*steps: str) -> tuple[str, ...]:
    """Return the networks that some steps take: those that read BatchNorms need one."""
    normless = ("branches", "gated") if READS_NORMS & set(steps) else ()
    return tuple(name for name in NETWORKS if name not in normless)


def make_model(name: str, seed: int = 0) -> nn.Module:
    """Return a seeded model whose BatchNorm statistics are not those of a fresh one."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.3, 1.5)
    return model.eval()


def make_net(name: str, seed: int = 0, image_range: tuple[Any, Any] | None = None) -> Net:
    """Return a captured network, with the range of its images where a card would tell it."""
    net = capture(make_model(name, seed), name, SIZE, CLASSES)
    net.image_range = image_range
    return net


def make_images(count: int = 8, seed: int = 1) -> Tensor:
    """Return random images."""
    return torch.randn((count, *SIZE), generator=torch.Generator().manual_seed(seed))


def make_context(engine: str = "onnxruntime", images: Tensor | None = None, seed: int = 0) -> Context:
    """Return a Context that calibrates with random images in batches of four."""
    chosen = make_images() if images is None else images
    return Context(Scheme(), target(engine), lambda: iter(chosen.split(4)), seed)


def quantize(name: str, recipe: str | Recipe = "int8", engine: str = "onnxruntime") -> Net:
    """Return a quantized network."""
    chosen = read_recipe(recipe) if isinstance(recipe, str) else recipe
    return run_recipe(chosen, make_net(name), make_context(engine))[0]
