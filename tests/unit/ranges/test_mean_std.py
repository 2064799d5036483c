"""Ranges within some deviations of the mean."""

import numpy as np
import pytest
import torch

from fewbit.ranges import find_weight_range
from fewbit.ranges.mean_std import MeanStd
from fewbit.spec import QuantSpec

SYMMETRIC = QuantSpec(symmetric=True, signed=True)


def observe(x, deviations):
    finder = MeanStd(deviations=deviations).start()
    for part in torch.as_tensor(np.asarray(x), dtype=torch.float32).split(700):
        finder.observe(part)
    return finder


@pytest.mark.parametrize("deviations", [1, 2, 3])
def test_mean_and_deviations(deviations):
    x = np.random.default_rng(0).normal(0.5, 2, 5000).astype(np.float32).astype(np.float64)
    low, high = x.mean() - deviations * x.std(), x.mean() + deviations * x.std()
    found = observe(x, deviations).find(QuantSpec())
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    mirrored = observe(x, deviations).find(SYMMETRIC)
    assert mirrored.high == -mirrored.low == pytest.approx(max(-low, high), rel=1e-9)
    weights = find_weight_range(torch.tensor(x), QuantSpec(), 0, MeanStd(deviations=deviations))
    assert (weights.low, weights.high) == pytest.approx((low, high), rel=1e-6)


def test_never_beyond_the_extremes():
    found = observe([-1.0, 0.0, 2.0], 6).find(QuantSpec())
    assert (found.low, found.high) == (-1, 2)
    found = observe([-1.0, 0.0, 2.0], 6).find(SYMMETRIC)
    assert (found.low, found.high) == (-2, 2)


def test_after_a_relu_and_far_from_zero():
    x = np.maximum(np.random.default_rng(1).standard_normal(5000), 0).astype(np.float32)
    found = observe(x, 2).find(QuantSpec())
    assert found.low == 0 and found.high == pytest.approx(x.mean() + 2 * x.std(), rel=1e-5)
    above = observe(x + 100, 2).find(QuantSpec())
    assert above.low == 0 and above.high == pytest.approx(100 + x.mean() + 2 * x.std(), rel=1e-6)
    below = observe(-x - 100, 2).find(QuantSpec())
    assert below.high == 0 and below.low == pytest.approx(-above.high)


def test_each_channel_by_itself():
    rows = torch.tensor(np.random.default_rng(2).standard_normal((3, 500)) * [[1], [10], [0]]).float()
    spec = QuantSpec(symmetric=True, signed=True, granularity="channel")
    found = find_weight_range(rows, spec, 0, MeanStd(deviations=2))
    x = rows.double().numpy()
    assert found.high == pytest.approx(list(np.abs(x.mean(1)) + 2 * x.std(1)), rel=1e-6)
    assert found.low[2] == found.high[2] == 0
