"""What holds for every range method of the registry; a new row is tested by being there."""

from __future__ import annotations

import inspect
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.cli.lists import describe
from fewbit.errors import DataError, NetworkError, RecipeError
from fewbit.ranges.range_finder import Range, RangeMethod
from fewbit.ranges.weights import find_weight_range
from fewbit.registry import ROWS, find
from fewbit.spec import Frozen, QuantSpec

METHODS = tuple(ROWS["ranges"])
ACTIVATIONS_ONLY = "finds ranges of activations only"
SPECS = {
    "asymmetric": QuantSpec(),
    "symmetric": QuantSpec(symmetric=True, signed=True),
    "four bits": QuantSpec(bits=4),
}


def draw(seed: int, count: int = 500) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def observed(method: str, *batches: Tensor) -> Any:
    found: RangeMethod = find("ranges", method)()
    finder = found.start("conv1")
    for batch in batches:
        finder.observe(batch)
    return finder


def ends(found: Range) -> tuple[float, float]:
    assert isinstance(found.low, float) and isinstance(found.high, float)
    return found.low, found.high


def held(value: Any, arrays: bool = False) -> int:
    """Return how many numbers, texts and arrays an object holds, or the bytes of its arrays."""
    if isinstance(value, np.ndarray | Tensor):
        return value.nbytes if arrays else 1
    if isinstance(value, list | tuple | dict):
        return sum(held(item, arrays) for item in (value.values() if isinstance(value, dict) else value))
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    parts = [getattr(value, name) for name in slots if hasattr(value, name)]
    if isinstance(value, Frozen) or not parts:
        return int(not arrays)
    return sum(held(part, arrays) for part in parts)


def takes_weights(method: str) -> bool:
    found: RangeMethod = find("ranges", method)()
    try:
        found.of_weights(draw(0).reshape(5, 100), SPECS["symmetric"])
    except RecipeError as refusal:
        assert str(refusal).startswith(f"{method}: {ACTIVATIONS_ONLY}, ") and "; give " in str(refusal)
        return False
    return True


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[method for method in METHODS if takes_weights(method)])
def weight_method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> QuantSpec:
    return SPECS[request.param]


def test_its_hyperparameters_come_back_from_toml_and_json(method: str) -> None:
    row: type[Frozen] = find("ranges", method)
    plain = row()
    assert row.from_toml(plain.to_toml()) == plain
    assert row.from_data(json.loads(plain.model_dump_json())) == plain


def test_it_says_what_it_is_where_it_is_from_and_how_it_differs(method: str) -> None:
    row: type[Frozen] = find("ranges", method)
    what, source = describe(row)
    text = inspect.getdoc(row) or ""
    assert what.endswith(".") and source and "Differs:" in text
    assert "arXiv" in source or "20" in source
    assert all(f"{field}:" in text for field in row.model_fields)


def test_unknown_hyperparameters_are_told(method: str) -> None:
    row: type[Frozen] = find("ranges", method)
    with pytest.raises(RecipeError, match="unknown key 'percentage'"):
        row.from_data({"percentage": 1})


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=50))
@pytest.mark.parametrize("name", METHODS)
def test_zero_is_inside_and_nothing_is_wider_than_the_values(name: str, values: list[float]) -> None:
    finder = observed(name, torch.tensor(values))
    for spec in SPECS.values():
        low, high = ends(finder.find(spec))
        reach = max(0.0, *values), -min(0.0, *values)
        assert low <= 0 <= high
        if spec.symmetric and min(values) < 0:
            assert low == -high and high <= max(reach) * (1 + 1e-6)
        else:
            assert high <= reach[0] * (1 + 1e-6) and -low <= reach[1] * (1 + 1e-6)


def test_what_it_keeps_does_not_grow_with_the_batches(method: str) -> None:
    finder = observed(method, *(draw(seed) for seed in range(64)))
    before, arrays = held(finder), held(finder, arrays=True)
    for seed in range(64, 640):
        finder.observe(draw(seed))
    assert (held(finder), held(finder, arrays=True)) == (before, arrays)
    assert before < 40 and arrays <= 2**16 + 2**10


def test_same_values_same_range_and_they_are_not_touched(method: str, spec: QuantSpec) -> None:
    batches = [draw(0), draw(1)]
    before = [batch.clone() for batch in batches]
    assert observed(method, *batches).find(spec) == observed(method, *batches).find(spec)
    assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))


def test_observing_may_go_on_after_a_range_was_asked_for(method: str, spec: QuantSpec) -> None:
    finder = observed(method, draw(0))
    finder.find(spec)
    finder.observe(draw(1))
    assert finder.find(spec) == observed(method, draw(0), draw(1)).find(spec)


def test_the_shape_and_layout_of_a_batch_do_not_matter(method: str, spec: QuantSpec) -> None:
    flat = draw(0, 480)
    shaped = flat.reshape(4, 3, 8, 5)
    strided = torch.empty_like(shaped, memory_format=torch.channels_last).copy_(shaped)
    assert observed(method, flat.reshape(4, -1)).find(spec) == observed(method, shaped).find(spec)
    low, high = ends(observed(method, shaped).find(spec))
    assert ends(observed(method, strided).find(spec)) == pytest.approx((low, high), rel=1e-6)


def test_what_is_never_negative_starts_at_zero(method: str, spec: QuantSpec) -> None:
    low, high = ends(observed(method, draw(0).clamp(min=0)).find(spec))
    assert low == 0.0 and high > 0


def test_a_tensor_of_zeros_has_a_range(method: str, spec: QuantSpec) -> None:
    assert ends(observed(method, torch.zeros(10)).find(spec)) == (0.0, 0.0)


def test_nothing_observed_is_told_by_name(method: str, spec: QuantSpec) -> None:
    with pytest.raises(DataError, match="conv1: no value was observed"):
        observed(method).find(spec)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_told_by_name(method: str, value: float) -> None:
    with pytest.raises(NetworkError, match="conv1: 1 of 3 values are not finite"):
        observed(method, torch.tensor([0.0, value, 1.0]))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_have_as_many_ends_as_channels(weight_method: str, symmetric: bool, granularity: str) -> None:
    weight = draw(3, 240).reshape(6, 4, 2, 5)
    weight[2] = 0
    before = weight.clone()
    spec = QuantSpec.from_data({"symmetric": symmetric, "signed": True, "granularity": granularity})
    found = find_weight_range(weight, spec, 0, weight_method, "conv1.weight")
    again = find_weight_range(weight, spec, 0, weight_method, "conv1.weight")
    assert found == again and torch.equal(weight, before)
    low, high = torch.tensor(found.low), torch.tensor(found.high)
    assert low.shape == high.shape == (() if granularity == "tensor" else (6,))
    assert bool((low <= 0).all()) and bool((high >= 0).all())
    rows = weight.reshape(6, -1) if granularity == "channel" else weight.reshape(1, -1)
    reach = rows.abs().amax(1).reshape(low.shape)
    assert bool((high <= reach * (1 + 1e-6)).all()) and bool((-low <= reach * (1 + 1e-6)).all())
    if symmetric:
        assert torch.equal(low, -high)
    if granularity == "channel":
        assert float(low[2]) == float(high[2]) == 0.0


def test_weights_do_not_depend_on_the_other_channels(weight_method: str) -> None:
    spec = QuantSpec(symmetric=True, signed=True, granularity="channel")
    weight = draw(4, 200).reshape(4, 50)
    other = weight.clone()
    other[1:] *= 100
    a, b = (find_weight_range(w, spec, 0, weight_method) for w in (weight, other))
    assert a.high[0] == b.high[0]  # type: ignore[index]


def test_weights_that_are_not_finite_are_told_by_name(method: str) -> None:
    with pytest.raises(NetworkError, match=r"fc\.weight: 1 of 2 values are not finite"):
        find_weight_range(torch.tensor([[1.0, float("nan")]]), QuantSpec(), 0, method, "fc.weight")
