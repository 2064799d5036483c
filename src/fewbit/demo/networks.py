"""The two demo networks: plain torch modules, BatchNorm kept apart, for 3 x 32 x 32 images of 100 classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, inputs, H, W)`` to ``(N, outputs, H / stride, W / stride)``."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        sum_: Tensor = self.relu(y + self.shortcut(x))
        return sum_


class Residual(nn.Module):
    """A ResNet as for CIFAR: a stem, stages of residual blocks at halving resolution, mean, classifier."""

    def __init__(self, classes: int, widths: tuple[int, ...], blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        layers: list[nn.Module] = []
        inputs = widths[0]
        for stage, (outputs, count) in enumerate(zip(widths, blocks, strict=True)):
            for index in range(count):
                layers.append(ResidualBlock(inputs, outputs, 2 if stage > 0 and index == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to class scores ``(N, classes)``."""
        y = self.pool(self.blocks(self.stem(x)))
        scores: Tensor = self.classifier(torch.flatten(y, 1))
        return scores


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel by 3x3, narrow by 1x1; the input is added where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = nn.Sequential(
                nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()
            )
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, inputs, H, W)`` to ``(N, outputs, H / stride, W / stride)``."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class Depthwise(nn.Module):
    """A small MobileNet v2: a stem, inverted residuals with ReLU6, a wide last layer, mean, classifier."""

    def __init__(self, classes: int, stem: int, blocks: tuple[tuple[int, int, int], ...], last: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU6())
        layers: list[nn.Module] = []
        inputs = stem
        for outputs, stride, expansion in blocks:
            layers.append(InvertedResidual(inputs, outputs, stride, expansion))
            inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.last = nn.Sequential(nn.Conv2d(inputs, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to class scores ``(N, classes)``."""
        y = self.pool(self.last(self.blocks(self.stem(x))))
        scores: Tensor = self.classifier(torch.flatten(y, 1))
        return scores


def demo_residual(classes: int = 100) -> Residual:
    """The residual network: widths 32, 64, 128 at 32, 16 and 8 pixels, one block each."""
    return Residual(classes, (32, 64, 128), (1, 1, 1))


def demo_depthwise(classes: int = 100) -> Depthwise:
    """The depthwise network: inverted residuals of width 32 and 48 at 16 pixels, 96 at 8 pixels."""
    blocks = ((32, 2, 1), (32, 1, 3), (48, 1, 3), (48, 1, 3), (96, 2, 4), (96, 1, 4))
    return Depthwise(classes, 32, blocks, 256)
