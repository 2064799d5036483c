"""Decibels and divergences: how far a rounded thing is from the exact one."""

from __future__ import annotations

import math

from torch import Tensor

BEST_DB = 200.0


def ratio_db(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise), between -200 and 200 dB.

    >>> round(ratio_db(120, 0.3), 2), ratio_db(1.0, 0.0)
    (26.02, 200.0)
    """
    if noise <= 0:
        return BEST_DB
    return max(-BEST_DB, min(BEST_DB, 10 * math.log10(max(signal, 1e-30) / noise)))


def divergence(exact: Tensor, rounded: Tensor) -> float:
    """Return the sum over images of KL(softmax(exact) || softmax(rounded)), in nats.

    Args:
        exact: Logits (N, classes) of the float network.
        rounded: Of the other, on the same images.
    """
    before, after = exact.double().log_softmax(1), rounded.double().log_softmax(1)
    return float((before.exp() * (before - after)).sum())
