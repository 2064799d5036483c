from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fewbit.doctor.weights import weight_facts
from fewbit.place.quantizer import QuantConv2d
from fewbit.spec import QuantSpec


def conv(rows: list[list[float]], granularity: str, bits: int = 8, reach: float | None = None) -> QuantConv2d:
    weight = torch.tensor(rows)
    made = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
    made.weight = nn.Parameter(weight.reshape(*weight.shape, 1, 1))
    spec = QuantSpec(bits=bits, symmetric=True, signed=True, granularity=granularity)  # type: ignore[arg-type]
    quantized = QuantConv2d(made, spec, "conv")
    peaks = weight.abs().amax(1) if granularity == "channel" else weight.abs().max()
    high = peaks if reach is None else torch.as_tensor(reach)
    quantized.weight_quantizer.set_range(-high.numpy(), high.numpy())
    return quantized


ROWS = [[1.0, -0.5], [0.05, 0.01], [0.07, -0.07], [0.0, 0.0], [1e-9, 0.0]]


def test_channels_that_keep_fewer_than_half_of_the_bits() -> None:
    """Of three alive channels one is below 1 / 16 of the grid; at 4 bits two are below 1 / 4."""
    assert weight_facts(conv(ROWS, "tensor"))["weak_channels"] == pytest.approx(1 / 3)
    assert weight_facts(conv(ROWS, "tensor", 4))["weak_channels"] == pytest.approx(2 / 3)


def test_a_scale_a_channel_has_no_weak_channels() -> None:
    facts = weight_facts(conv(ROWS[:3], "channel"))
    assert (facts["per_channel"], facts["weak_channels"]) == (True, 0.0)
    assert (facts["weight_low"], facts["weight_high"]) == pytest.approx((-1.0, 1.0))


def test_noise_and_what_min_max_would_give() -> None:
    """Over +-0.127 the step is 0.001; 0.127 and 0.0503 leave 0.0003^2 of noise, and 0.254 is clipped."""
    facts = weight_facts(conv([[0.127, 0.0503]], "tensor"))
    signal = 0.127**2 + 0.0503**2
    assert facts["weight_sqnr_db"] == pytest.approx(10 * math.log10(signal / 0.0003**2), abs=0.01)
    assert facts["weight_clip_share"] == 0.0
    clipped = weight_facts(conv([[0.254, 0.0503]], "tensor", reach=0.127))
    assert clipped["weight_clip_share"] > 0.999
    minmax = 2 * 0.002**2 / 12
    assert clipped["weight_minmax_gain_db"] == pytest.approx(10 * math.log10(0.127**2 / minmax), abs=0.01)
