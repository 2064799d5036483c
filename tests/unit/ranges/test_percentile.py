"""Percentile ranges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fewbit.ranges import Range, find_weight_range
from fewbit.ranges.percentile import Percentile
from fewbit.spec import QuantSpec

ASYMMETRIC = QuantSpec()
SYMMETRIC = QuantSpec(symmetric=True, signed=True)
OUTLIER = torch.cat([torch.arange(1, 1000) / 1000, torch.tensor([50.0])])


def found(x, spec=ASYMMETRIC, **hyperparameters):
    finder = Percentile(**hyperparameters).start()
    finder.observe(torch.as_tensor(x, dtype=torch.float32))
    return finder.find(spec)


def nearest_rank(x, percentile):
    x = np.sort(np.asarray(x, dtype=np.float64))
    return x[len(x) - math.floor(len(x) * (100 - percentile) / 100 + 1e-9) - 1]


def test_worked_figure_is_nearest_rank():
    assert nearest_rank(OUTLIER, 99.9) == pytest.approx(0.999)
    for bins in (1024, 4096, 16384):
        high = found(OUTLIER, percentile=99.9, bins=bins).high
        assert abs(high - 0.999) <= 64 / bins
    assert np.percentile(OUTLIER.double().numpy(), 99.9) == pytest.approx(1.048001, rel=1e-6)
    assert abs(high - 1.048001) > 0.04  # so not what linear interpolation between ranks gives
    weight = find_weight_range(OUTLIER[None], SYMMETRIC, 0, Percentile(percentile=99.9))
    assert weight.high == pytest.approx(0.999)


def test_the_share_is_counted_exactly():
    assert Percentile(percentile=99.9).above(1000) == 1
    assert Percentile(percentile=99.99).above(10000) == 1
    assert Percentile(percentile=99.99).above(9999) == 0
    assert Percentile(percentile=100).above(10**12) == 0


def test_one_hundred_is_min_max():
    assert found([-1.5, 0.3, 2.7], percentile=100) == Range(low=-1.5, high=np.float32(2.7))


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=300),
    percentile=st.sampled_from([60, 75.5, 90, 99, 99.5, 99.9]),
)
def test_within_a_bin_of_the_nearest_rank(data, percentile):
    bin_ = max(abs(v) for v in data) / 2048 + 1e-30
    low, high = -nearest_rank([-v for v in data], percentile), nearest_rank(data, percentile)
    reach = nearest_rank([abs(v) for v in data], percentile)
    if max(high, 0) - min(low, 0) > 2 * bin_:  # within a bin of nothing the whole range is taken
        got = found(data, percentile=percentile)
        assert abs(got.high - max(high, 0)) <= bin_ and abs(got.low - min(low, 0)) <= bin_
    if reach > 0 and min(data) < 0:
        assert abs(found(data, SYMMETRIC, percentile=percentile).high - reach) <= bin_


@settings(max_examples=60, deadline=None)
@given(data=st.lists(st.floats(0.015625, 50, width=32), min_size=1, max_size=300), both=st.booleans())
def test_a_higher_percentile_never_gives_a_narrower_range(data, both):
    data = [v if i % 2 else -v for i, v in enumerate(data)] if both else data
    for spec in (ASYMMETRIC, SYMMETRIC):
        ranges = [found(data, spec, percentile=p) for p in (51, 70, 90, 99, 99.9, 99.99, 100)]
        highs, lows = [r.high for r in ranges], [-r.low for r in ranges]
        assert highs == sorted(highs) and lows == sorted(lows)


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=200),
    cuts=st.lists(st.integers(1, 60), min_size=200, max_size=200),
)
def test_the_cut_into_batches_does_not_matter(data, cuts):
    finder, at = Percentile(percentile=90).start(), 0
    for size in cuts:
        finder.observe(torch.tensor(data[at : at + size]))
        at += size
    for spec in (ASYMMETRIC, SYMMETRIC):
        assert finder.find(spec) == found(data, spec, percentile=90)


def test_tails_are_cut_each_by_itself():
    x = torch.cat([torch.linspace(-1, 1, 10000), torch.tensor([-30.0, 40.0])])
    got = found(x, percentile=99.9)
    assert -1.02 < got.low < -0.95 and 0.95 < got.high < 1.02
    assert 0.95 < found(x, SYMMETRIC, percentile=99.9).high < 1.02


def test_mostly_zeros_take_the_extremes():
    x = torch.zeros(100000)
    x[:3] = torch.tensor([0.5, 1.0, 2.0])
    assert found(x, percentile=99.99) == Range(low=0, high=2)
    weight = find_weight_range(x.reshape(1, -1), SYMMETRIC, 0, "percentile")
    assert weight == Range(low=-2, high=2)


def test_weights_per_channel_are_exact():
    w = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(symmetric=True, signed=True, granularity="channel")
    got = find_weight_range(w, spec, 0, Percentile(percentile=99.5))
    assert got.high == pytest.approx([nearest_rank(row.abs(), 99.5) for row in w])
    got = find_weight_range(w, QuantSpec(granularity="channel"), 0, Percentile(percentile=99.5))
    assert got.high == pytest.approx([nearest_rank(row, 99.5) for row in w])
    assert got.low == pytest.approx([-nearest_rank(-row, 99.5) for row in w])


@pytest.mark.parametrize("percentile", [50, 100.1])
def test_hyperparameters_are_checked(percentile):
    with pytest.raises(ValidationError):
        Percentile(percentile=percentile)
