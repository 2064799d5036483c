"""Streaming moments in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import DataError, NetworkError
from fewbit.ranges.moments import Moments, moments_of_rows


def observed(*batches):
    moments = Moments("conv1")
    for batch in batches:
        moments.observe(torch.as_tensor(batch))
    return moments


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(-1e6, 1e6), st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_equal_those_of_all_values_at_once(seed, shift, sizes):
    rng = np.random.default_rng(seed)
    batches = [(rng.standard_normal(size) + shift).astype(np.float32) for size in (*sizes, 1)]
    together = np.concatenate(batches).astype(np.float64)
    moments = observed(*batches)
    assert moments.total == len(together)
    assert moments.mean == pytest.approx(together.mean(), rel=1e-12, abs=1e-12)
    assert moments.deviation == pytest.approx(together.std(), rel=1e-9, abs=1e-9)
    assert (moments.low, moments.high) == (together.min(), together.max())


def test_nothing_cancels_far_from_zero():
    x = torch.randn(100000, generator=torch.Generator().manual_seed(0)) + 4096
    assert observed(x).deviation == pytest.approx(float(x.double().std(unbiased=False)), rel=1e-12)


def test_many_values_in_float64():
    x = torch.full((3_000_000,), 0.1)
    assert observed(x).mean == pytest.approx(float(np.float32(0.1)), rel=1e-14)
    assert observed(x).deviation == pytest.approx(0, abs=1e-12)


def test_rows():
    rows = np.random.default_rng(1).standard_normal((5, 70)).astype(np.float32) + 3
    mean, deviation, absolute = (found.numpy() for found in moments_of_rows(torch.tensor(rows)))
    x = rows.astype(np.float64)
    assert mean == pytest.approx(x.mean(1)) and deviation == pytest.approx(x.std(1))
    assert absolute == pytest.approx(np.abs(x - x.mean(1, keepdims=True)).mean(1))


def test_nothing_observed_and_values_not_finite_are_told():
    with pytest.raises(DataError, match="conv1: no value was observed"):
        _ = observed(torch.zeros(0)).deviation
    with pytest.raises(NetworkError, match="conv1: 2 of 3 values are not finite"):
        observed(torch.tensor([0.0, float("nan"), float("inf")]))
