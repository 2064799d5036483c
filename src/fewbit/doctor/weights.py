"""A weight and what its grid leaves of it."""

from __future__ import annotations

from typing import Any

import torch

from fewbit.doctor.decibels import ratio_db
from fewbit.place.quantizer import QuantLayer
from fewbit.ranges.minmax import MinMax
from fewbit.sensitivity.sqnr import DEAD


def weight_facts(module: QuantLayer) -> dict[str, Any]:
    """Return the fields of `LayerExam` that speak of a rounded weight.

    A channel is weak where its largest weight reaches less than 2^(-bits / 2) of the grid: it keeps fewer
    than half of the bits. One below a millionth of the largest weight is dead and not counted. Of a grid that
    is not uniform only the noise is told.
    """
    quantizer, weight = module.weight_quantizer, module.weight.detach()
    with torch.no_grad():
        error = (quantizer(weight) - weight).double().square()
    noise = float(error.sum())
    found: dict[str, Any] = {
        "per_channel": quantizer.scale.dim() > 0,
        "weight_sqnr_db": round(ratio_db(float(weight.double().square().sum()), noise), 3),
    }
    if quantizer.spec.grid != "uniform":
        return found
    with torch.no_grad():
        scale, zero_point = quantizer.grid(weight.dim())
        low, high = (quantizer.qmin - zero_point) * scale, (quantizer.qmax - zero_point) * scale
        outside = (weight < low - scale / 2) | (weight > high + scale / 2)
        peaks = weight.abs().flatten(1).amax(1)
        reached = peaks / torch.maximum(-low, high).flatten()
    alive = peaks > DEAD * peaks.max()
    weak = reached[alive] < 2 ** (-quantizer.spec.bits / 2)
    lowest, highest = quantizer.range()
    return found | {
        "weight_low": lowest,
        "weight_high": highest,
        "weak_channels": float(weak.double().mean()) if bool(alive.any()) else 0.0,
        "weight_clip_share": float(error[outside].sum()) / noise if noise > 0 else 0.0,
        "weight_minmax_gain_db": ratio_db(noise, _minmax_noise(module)) if noise > 0 else 0.0,
    }


def _minmax_noise(module: QuantLayer) -> float:
    """Return the squared error that min-max ranges would leave, step^2 / 12 for each weight."""
    quantizer = module.weight_quantizer
    weight = module.weight.detach()
    rows = weight.flatten(1) if quantizer.scale.dim() else weight.reshape(1, -1)
    low, high = MinMax().of_weights(rows, quantizer.spec)
    steps = (high - low).double() / (quantizer.qmax - quantizer.qmin)
    return float(steps.square().sum()) / 12 * rows.shape[1]
