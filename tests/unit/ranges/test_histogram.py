"""The streaming histogram: exact counts, whatever the order and the cut; constant memory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fewbit.errors import DataError, NetworkError
from fewbit.ranges.histogram import Histogram
from fewbit.ranges.mse import MSE
from fewbit.ranges.percentile import Percentile

BINS = 1024
floats = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-140, -(2.0**-149), 2.0**127]),
)


def counted(*batches, bins=BINS):
    histogram = Histogram("x", bins)
    for batch in batches:
        histogram.observe(torch.as_tensor(batch, dtype=torch.float32))
    return histogram


def state(h):
    return h.width, h.counts.tolist(), h.zeros, h.total, h.low, h.high


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(floats, min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 20), min_size=60, max_size=60),
)
def test_order_and_cut_do_not_matter(data, cuts):
    parts, at = [], 0
    for size in cuts:
        parts.append(data[at : at + size])
        at += size
    expected = state(counted(data))
    assert state(counted(*parts)) == expected
    assert state(counted(*reversed(parts))) == expected


@settings(max_examples=60, deadline=None)
@given(data=st.lists(floats, min_size=1, max_size=60))
def test_counts_equal_a_count_by_hand(data):
    h = counted(data)
    reach = max(abs(v) for v in data)
    by_hand = np.zeros(2 * BINS - 1, dtype=np.int64)
    for v in data:
        by_hand[(math.trunc(v / h.width) if h.width else 0) + BINS - 1] += 1
    assert h.counts.tolist() == by_hand.tolist()
    assert h.zeros == sum(v == 0 for v in data)
    assert (h.low, h.high, h.total) == (min(data), max(data), len(data))
    assert reach < BINS * h.width or reach == 0
    if reach > 2.0**-100:
        assert h.width <= reach / (BINS / 2)


@settings(max_examples=60, deadline=None)
@given(data=st.lists(floats, min_size=1, max_size=60))
def test_density_holds_every_value_in_its_place(data):
    h = counted(data)
    density = h.density()
    assert density.total == len(data) and (density.counts >= 0).all()
    assert (np.diff(density.edges) >= 0).all()
    assert (density.edges[0], density.edges[-1]) == (min(data), max(data))
    assert len(density.edges) == len(density.counts) + 1
    if min(data) < 0 < max(data):
        assert 0.0 in density.edges
    magnitudes = h.magnitudes()
    assert magnitudes.total == len(data) and (magnitudes.counts >= 0).all()
    assert (magnitudes.edges[0], magnitudes.edges[-1]) == (0, max(abs(v) for v in data))


def test_bins_against_numpy():
    x = torch.randn(50000, generator=torch.Generator().manual_seed(3))
    density = counted(x[:7], x[7:], bins=2048).density()
    expected, _ = np.histogram(x.numpy(), density.edges)
    centre = int(np.searchsorted(density.edges, 0.0))
    far = np.ones(len(expected), bool)
    far[centre - 1 : centre + 1] = False  # the two bins beside zero share what lies in both
    # numpy closes bins on the left; below zero ours close on the right: values on an edge move by one bin.
    on_edge = np.isin(density.edges, x.numpy().astype(np.float64)).sum()
    assert np.abs(density.counts - expected)[far].sum() <= 2 * on_edge
    assert density.counts[~far].sum() == expected[~far].sum()


def test_above_zero_and_mirrored():
    density = counted([-2.0, -1.0, 0.0, 3.0]).density()
    above, below = density.above_zero(), density.mirrored().above_zero()
    assert (above.edges[0], above.edges[-1], int(above.counts.sum())) == (0, 3, 1)
    assert (below.edges[0], below.edges[-1], int(below.counts.sum())) == (0, 2, 2)


def test_growth_merges_pairs_of_bins():
    h = counted([1.0, 1.001, 1.002, -0.7])
    fine = h.width
    h.observe(torch.tensor([100.0]))
    assert h.width == 64 * fine
    assert state(h) == state(counted([1.0, 1.001, 1.002, -0.7, 100.0]))


def test_counts_beyond_float32_stay_exact():
    h = counted([1.0])
    h.counts[BINS - 1] = h.zeros = 2**40
    h.total += 2**40
    h.observe(torch.zeros(3))
    h.observe(torch.tensor([3.0]))
    assert h.counts[BINS - 1] == h.zeros == 2**40 + 3
    assert h.density().total == 2**40 + 5


def test_more_values_than_one_chunk():
    x = torch.arange(100001, dtype=torch.float32) - 40000
    h = counted(x)
    assert h.counts.sum() == h.total == 100001 and h.zeros == 1
    assert h.counts[: BINS - 1].sum() == 40000 - math.ceil(h.width - 1)


def test_memory_is_constant():
    sizes = set()
    h = Histogram("x", BINS)
    for batch in range(100):
        h.observe(torch.randn(16, generator=torch.Generator().manual_seed(batch)) * 10.0 ** (batch % 30))
        sizes.add((h.counts.nbytes, h.counts.base is None, tuple(sorted(h.__slots__))))
    assert len(sizes) == 1 and next(iter(sizes))[0] == 8 * (2 * BINS - 1)
    assert not hasattr(h, "__dict__")


def test_not_finite_and_empty():
    h = Histogram("conv1", BINS)
    with pytest.raises(NetworkError, match=r"^conv1: 1 of 2 values are not finite"):
        h.observe(torch.tensor([1.0, math.inf]))
    with pytest.raises(DataError, match=r"^conv1: no value was observed"):
        h.density()
    with pytest.raises(DataError, match=r"^conv1: no value was observed"):
        h.magnitudes()
    assert h.total == 0  # the refused batch left no trace


@pytest.mark.parametrize("method", [Percentile, MSE])
def test_bins_are_a_power_of_two(method):
    assert method(bins=16384).bins == 16384
    for bins in (512, 32768, 3000):
        with pytest.raises(ValidationError):
            method(bins=bins)
    with pytest.raises(ValidationError, match="power of two, such as 4096, for bins merge in pairs"):
        method(bins=3000)


def test_the_widest_bins_fit_their_codes():
    x = torch.tensor([-1.0, 1.0]) * (1 - 2**-24)
    h = counted(x, bins=16384)
    assert h.counts[0] == h.counts[-1] == 1
