"""The mean over images of each image's extremes."""

import numpy as np
import pytest
import torch

from fewbit.errors import NetworkError
from fewbit.ranges import find_weight_range
from fewbit.ranges.sample_average import SampleAverage
from fewbit.spec import QuantSpec


def observe(*batches):
    finder = SampleAverage().start("conv1")
    for batch in batches:
        finder.observe(torch.as_tensor(batch))
    return finder


def test_extremes_are_averaged_over_images():
    x = np.random.default_rng(0).standard_normal((7, 3, 4, 5)).astype(np.float32)
    found = observe(x).find(QuantSpec())
    flat = x.reshape(7, -1).astype(np.float64)
    assert (found.low, found.high) == pytest.approx((flat.min(1).mean(), flat.max(1).mean()), rel=1e-12)
    mirrored = observe(x).find(QuantSpec(symmetric=True, signed=True))
    assert mirrored.high == -mirrored.low == max(-found.low, found.high)


def test_neither_the_cut_nor_the_order_of_images_matters():
    x = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    whole = observe(x).find(QuantSpec())
    for other in (observe(*x.split(7)), observe(x.flip(0)), observe(x.to(memory_format=torch.channels_last))):
        found = other.find(QuantSpec())
        assert (found.low, found.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_zero_counts_as_a_value_of_each_image():
    found = observe(torch.tensor([[1.0, 3.0], [-2.0, -4.0]])).find(QuantSpec())
    assert (found.low, found.high) == (-2.0, 1.5)


def test_one_image_of_many_cannot_stretch_the_range():
    x = torch.ones(100, 8)
    x[3, 3] = 101
    assert observe(x).find(QuantSpec()).high == pytest.approx(2)


def test_the_values_that_are_not_finite_are_counted():
    with pytest.raises(NetworkError, match="conv1: 2 of 6 values are not finite"):
        observe(torch.tensor([[0.0, float("nan"), 1.0], [2.0, 3.0, float("inf")]]))


def test_weights_are_one_sample():
    rows = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    spec = QuantSpec(granularity="channel")
    assert find_weight_range(rows, spec, 0, "sample_average") == find_weight_range(rows, spec, 0, "minmax")
