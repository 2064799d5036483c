"""A card of a small convolutional network with random weights, and the file that builds it."""

from __future__ import annotations

CARD = """
[network]
name = "tiny"
source = "tiny.py:tiny"
classes = 4
[input]
size = [3, 16, 16]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
"""
MODEL = """
from torch import nn
def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )
"""
