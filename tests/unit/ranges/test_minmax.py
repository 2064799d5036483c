"""Min-max, the range itself, and what all methods share."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit import registry
from fewbit.errors import DataError, NetworkError, RecipeError
from fewbit.ranges import Range, find_weight_range
from fewbit.ranges.minmax import MinMax
from fewbit.ranges.mse import MSE
from fewbit.ranges.range_finder import extremes, flatten, range_of_extremes
from fewbit.spec import QuantSpec

ASYMMETRIC = QuantSpec()
SYMMETRIC = QuantSpec(symmetric=True, signed=True)
SPECS = [ASYMMETRIC, SYMMETRIC, QuantSpec(symmetric=True), QuantSpec(bits=4, signed=True), QuantSpec(bits=2)]
METHODS = list(registry.ROWS["ranges"])
values = st.floats(-1e6, 1e6, width=32)


def started(name):
    return registry.find("ranges", name)().start("layer1.relu")


def test_extremes_over_batches():
    finder = MinMax().start()
    for batch in ([1.0, -2.0], [6.0, 0.5], [-1.0, 5.0]):
        finder.observe(torch.tensor(batch))
    assert finder.find(ASYMMETRIC) == Range(low=-2, high=6)
    assert finder.find(SYMMETRIC) == Range(low=-6, high=6)


def test_one_sided_values_take_zero_in():
    assert range_of_extremes(2.1, 3.5, ASYMMETRIC) == Range(low=0, high=3.5)
    assert range_of_extremes(-3.5, -2.1, ASYMMETRIC) == Range(low=-3.5, high=0)


def test_unsigned_symmetric_codes_cover_the_positive_side():
    assert range_of_extremes(-1, 3, QuantSpec(symmetric=True)) == Range(low=0, high=3)


def test_no_negative_zero_at_the_upper_end():
    assert math.copysign(1, range_of_extremes(-2.0, -0.0, ASYMMETRIC).high) == 1


@pytest.mark.parametrize("low", [0.0, -0.0, 0.5])
def test_never_negative_gives_a_positive_zero(low):
    for spec in SPECS:
        found = range_of_extremes(low, 2.0, spec)
        assert found.low == 0 and math.copysign(1, found.low) == 1 and found.high == 2


def test_a_range_holds_zero():
    for low, high in ((0.1, 1.0), (-1.0, -0.1), ((-1.0, 0.1), (1.0, 1.0))):
        with pytest.raises(ValueError, match="low must be at most 0 and high at least 0"):
            Range(low=low, high=high)
    with pytest.raises(ValueError, match="low has 1 ends and high 2; give as many of each"):
        Range(low=(-1.0,), high=(1.0, 2.0))


def test_a_range_goes_through_toml():
    found = Range(low=(-1.0, 0.0), high=(0.5, 2.0))
    assert Range.from_toml(found.to_toml()) == found


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60, deadline=None)
@given(data=st.lists(values, min_size=1, max_size=64), spec=st.sampled_from(SPECS))
def test_every_range_lies_within_the_data(method, data, spec):
    finder = started(method)
    finder.observe(torch.tensor(data))
    found = finder.find(spec)
    least, greatest = min(*data, 0.0), max(*data, 0.0)
    if spec.symmetric and spec.signed and least < 0:
        assert 0 <= found.high <= max(-least, greatest) and found.low == -found.high
    else:
        assert least <= found.low <= 0 <= found.high <= greatest
    assert (found.high > found.low) == any(
        v > 0 or (v < 0 and not (spec.symmetric and not spec.signed)) for v in data
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_never_negative_tensor_has_low_zero(method):
    finder = started(method)
    finder.observe(torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).relu())
    for spec in SPECS:
        assert finder.find(spec).low == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_all_zeros(method):
    finder = started(method)
    finder.observe(torch.zeros(2, 3))
    for spec in SPECS:
        assert finder.find(spec) == Range(low=0, high=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_names_the_tensor(method, bad):
    with pytest.raises(
        NetworkError, match=r"^layer1.relu: 2 of 6 values are not finite \(NaN or infinite\); check"
    ):
        started(method).observe(torch.tensor([[1.0, bad, 2.0], [bad, 0.0, 1.0]]))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_observed(method):
    finder = started(method)
    finder.observe(torch.empty(0, 3))
    with pytest.raises(DataError, match=r"^layer1.relu: no value was observed, .* at least one image$"):
        finder.find(ASYMMETRIC)


@pytest.mark.parametrize("method", METHODS)
def test_memory_layout_and_gradients_do_not_matter(method):
    x = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    plain, last = started(method), started(method)
    plain.observe(x)
    last.observe(x.detach().to(memory_format=torch.channels_last))
    assert plain.find(ASYMMETRIC) == last.find(ASYMMETRIC)
    assert plain.find(SYMMETRIC) == last.find(SYMMETRIC)


@pytest.mark.parametrize("method", METHODS)
def test_other_floating_types(method):
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        finder = started(method)
        finder.observe(torch.tensor([[-1.0, 0.5, 3.0]], dtype=dtype))
        assert finder.find(QuantSpec(bits=8)).high == pytest.approx(3, rel=0.02)


def test_channels_last_is_not_copied():
    x = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert flatten(x).data_ptr() == x.data_ptr()
    assert extremes(flatten(x), "x") == (0, 0)


WEIGHT = torch.tensor([[[0.5, -1.0], [0.25, 0.0]], [[2.0, 0.0], [1.0, 1.5]], [[0.0, 0.0], [0.0, 0.0]]])


def test_weights_per_channel():
    spec = QuantSpec(symmetric=True, signed=True, granularity="channel")
    assert find_weight_range(WEIGHT, spec) == Range(low=(-1, -2, 0), high=(1, 2, 0))
    assert find_weight_range(WEIGHT, QuantSpec(granularity="channel")) == Range(
        low=(-1, 0, 0), high=(0.5, 2, 0)
    )
    assert find_weight_range(WEIGHT, spec, axis=1) == Range(low=(-2.0, -1.5), high=(2.0, 1.5))
    assert find_weight_range(WEIGHT, spec, axis=-1) == find_weight_range(WEIGHT, spec, axis=2)


def test_weights_per_tensor():
    assert find_weight_range(WEIGHT, SYMMETRIC) == Range(low=-2, high=2)
    assert find_weight_range(WEIGHT, ASYMMETRIC, 1) == Range(low=-1, high=2)


def test_symmetric_weights_are_signed_whatever_their_sign():
    for method in METHODS:
        if method == "kl":
            continue  # for activations only
        found = find_weight_range(torch.tensor([[0.5, 1.0, 1.0]]), QuantSpec(symmetric=True), 0, method)
        assert found.low == -found.high < 0


def test_the_method_of_weights_by_name_or_object():
    spec = QuantSpec(bits=3, symmetric=True, signed=True)
    assert find_weight_range(WEIGHT, spec, 0, "mse") == find_weight_range(WEIGHT, spec, 0, MSE())
    with pytest.raises(RecipeError, match=r"ranges: no 'mme' \(did you mean 'mse'\?\); there are minmax, "):
        find_weight_range(WEIGHT, spec, 0, "mme")


def test_weights_that_cannot_be_used():
    with pytest.raises(
        RecipeError, match=r"^fc: shape \(2, 2\) has no weights along axis 2; give the axis of the"
    ):
        find_weight_range(torch.ones(2, 2), SYMMETRIC, 2, name="fc")
    with pytest.raises(RecipeError, match=r"^weight: shape \(0, 2\) has no weights"):
        find_weight_range(torch.ones(0, 2), SYMMETRIC)
    with pytest.raises(NetworkError, match=r"^fc: 1 of 2 values are not finite"):
        find_weight_range(torch.tensor([[math.nan, 1.0]]), SYMMETRIC, name="fc")
