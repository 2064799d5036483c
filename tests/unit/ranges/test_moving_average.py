"""Exponential moving averages of extremes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fewbit.ranges import Range, find_weight_range
from fewbit.ranges.moving_average import MovingAverage
from fewbit.spec import QuantSpec

MAXIMA = (6.0, 5.0, 8.0, 5.5)


def test_worked_figures():
    finder = MovingAverage(momentum=0.9, images_per_update=2).start()
    found = []
    for maximum in MAXIMA:
        finder.observe(torch.tensor([[0.0, maximum], [0.1, 1.0]]))
        found.append(finder.find(QuantSpec()).high)
    assert found == pytest.approx([6, 5.9, 6.11, 6.049], abs=1e-12)


def test_both_ends_by_themselves():
    finder = MovingAverage(momentum=0.5, images_per_update=1).start()
    finder.observe(torch.tensor([[-1.0, 6.0], [-3.0, 2.0]]))
    assert finder.find(QuantSpec()) == Range(low=-2, high=4)
    assert finder.find(QuantSpec(symmetric=True, signed=True)) == Range(low=-4, high=4)


def test_a_last_smaller_group_counts():
    finder = MovingAverage(momentum=0.9, images_per_update=2).start()
    finder.observe(torch.tensor([6.0, 1.0, 5.0]))
    assert finder.find(QuantSpec()).high == pytest.approx(5.9)
    finder.observe(torch.tensor([16.0]))  # fills the group: finding before has left no trace
    assert finder.find(QuantSpec()).high == pytest.approx(7.0)


@settings(max_examples=60, deadline=None)
@given(
    images=st.lists(
        st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=40
    ),
    cuts=st.lists(st.integers(1, 9), min_size=40, max_size=40),
    group=st.integers(1, 12),
)
def test_the_cut_into_batches_does_not_matter(images, cuts, group):
    whole, cut = (MovingAverage(images_per_update=group).start() for _ in range(2))
    x = torch.tensor(images)
    whole.observe(x)
    at = 0
    for size in cuts:
        cut.observe(x[at : at + size])
        at += size
    assert cut.find(QuantSpec()) == whole.find(QuantSpec())


def test_state_is_a_handful_of_numbers():
    finder = MovingAverage(images_per_update=3).start()
    for _ in range(50):
        finder.observe(torch.randn(4, 5))
    assert (len(finder.averages), len(finder.group), finder.images) == (2, 2, 200 % 3)


def test_a_weight_is_one_group():
    assert find_weight_range(torch.tensor([[-1.0, 2.0]]), QuantSpec(), 0, "moving_average") == Range(
        low=-1, high=2
    )


@pytest.mark.parametrize(
    "wrong", [{"momentum": 1.0}, {"momentum": -0.1}, {"images_per_update": 0}, {"decay": 0.9}]
)
def test_hyperparameters_are_checked(wrong):
    with pytest.raises(ValidationError):
        MovingAverage(**wrong)
