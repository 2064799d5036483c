from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fewbit.doctor.activations import RoundedActivation, kurtosis, tail_ratio
from fewbit.place.quantizer import DynamicQuantizer, Quantizer
from fewbit.ranges.histogram import Histogram
from fewbit.spec import QuantSpec


def observed(x: torch.Tensor, low: float, high: float, bits: int = 8) -> RoundedActivation:
    quantizer = Quantizer(QuantSpec(bits=bits), "x")
    quantizer.set_range(low, high)
    found = RoundedActivation("x", quantizer)
    for part in x.split(1000):
        found.observe(part)
    return found


def test_kurtosis_is_that_of_scipy() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_t(5, 20000).astype(np.float32))
    found = observed(x, -10, 10).facts()["kurtosis"]
    assert found == pytest.approx(stats.kurtosis(x.numpy().astype(np.float64), fisher=False), rel=1e-6)
    assert kurtosis([2.0, 4.0, 8.0, 16.0]) == 0.0  # a constant


def test_what_lies_beyond_the_ends_is_counted_with_its_noise() -> None:
    """Codes 0 to 255 over [0, 2.55]: step 0.01; 5 of 1000 values are 4.55, each 2 away from the end."""
    x = torch.full((1000,), 1.003)
    x[:5] = 4.55
    facts = observed(x, 0, 2.55).facts()
    clip, rest = 5 * 2.0**2, 995 * 0.003**2
    assert facts["clipped"] == 0.005
    assert facts["clip_share"] == pytest.approx(clip / (clip + rest), rel=1e-4)
    assert facts["tail_ratio"] == pytest.approx(1.0, abs=1e-6)  # the largest are more than 0.1 %


def test_a_value_within_half_a_step_of_the_end_is_not_clipped() -> None:
    x = torch.full((100,), 2.554)
    assert observed(x, 0, 2.55).facts()["clipped"] == 0.0


def test_gains_of_other_ranges() -> None:
    """Clipped at half of their reach, uniform values have 10 log10 of their noises' ratio to win."""
    x = torch.linspace(0, 2, 20001)
    facts = observed(x, 0, 1.0).facts()
    clipped = float(((x - x.clamp(max=1)) ** 2).double().sum())
    minmax = 20001 * (2 / 255) ** 2 / 12
    assert facts["minmax_gain_db"] == pytest.approx(10 * math.log10(clipped / minmax), abs=0.1)
    assert facts["mse_gain_db"] >= facts["minmax_gain_db"] - 0.05
    well = observed(x, 0, 2.0).facts()
    assert abs(well["minmax_gain_db"]) < 0.1


def test_tail_ratio() -> None:
    values = Histogram("x", 4096)
    x = torch.ones(10000)
    x[:3] = -64.0
    values.observe(x)
    assert tail_ratio(values) == pytest.approx(64.0, rel=0.05)  # a bin is 1 / 32 wide
    assert tail_ratio(values, share=0.99999) == 1.0
    zeros = Histogram("x", 1024)
    zeros.observe(torch.zeros(5))
    assert tail_ratio(zeros) == 1.0


def test_bins_hold_every_value() -> None:
    x = torch.cat([torch.randn(3000, generator=torch.Generator().manual_seed(0)), torch.zeros(500)])
    found = observed(x, -4, 4).histogram()
    assert sum(found.counts) == 3500
    assert (found.low, found.high) == (float(x.min()), float(x.max()))
    assert max(found.counts) == found.counts[int(-found.low / (found.high - found.low) * 64)]  # the zeros'


def test_run_time_grids_clip_nothing() -> None:
    found = RoundedActivation("x", DynamicQuantizer(QuantSpec(symmetric=True), "x"))
    found.observe(torch.randn((2, 8), generator=torch.Generator().manual_seed(0)))
    assert found.facts()["clipped"] == 0.0 and "minmax_gain_db" not in found.facts()


def test_a_tensor_of_zeros_has_nothing_to_gain() -> None:
    found = observed(torch.zeros(100), 0, 1)
    assert found.facts() == {
        "kurtosis": 0.0,
        "tail_ratio": 1.0,
        "clipped": 0.0,
        "clip_share": 0.0,
        "minmax_gain_db": 0.0,
        "mse_gain_db": 0.0,
    }
    assert sum(found.histogram().counts) == 100
