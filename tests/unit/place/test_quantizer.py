from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbit.errors import FewbitError, RecipeError
from fewbit.place.quantizer import DynamicQuantizer, Quantizer
from fewbit.spec import QuantSpec


def made(low: float, high: float, spec: QuantSpec | None = None) -> Quantizer:
    quantizer = Quantizer(spec or QuantSpec(), "x")
    quantizer.set_range(low, high)
    return quantizer


def test_worked_example_of_the_whitepaper_range() -> None:
    quantizer = made(-1, 3)
    x = torch.tensor([-1.2, -1, 0, 0.5, 1.2345, 3])
    assert quantizer.codes(x).tolist() == [0, 0, 64, 96, 143, 255]
    expected = [-1.003922, -1.003922, 0, 0.501961, 1.239216, 2.996078]
    np.testing.assert_allclose(quantizer(x).numpy(), expected, rtol=1e-5)


def test_worked_example_in_four_bits() -> None:
    quantizer = made(-1, 3, QuantSpec(bits=4))
    assert quantizer.codes(torch.tensor([-1.2, -1, 0, 0.5, 1.2345, 3])).tolist() == [0, 0, 4, 6, 9, 15]


def test_worked_example_per_channel() -> None:
    weight = torch.tensor([[0.10, -0.05, 0.02, 0.08], [2, -1, 0.5, 1.5]])
    spec = QuantSpec(symmetric=True, signed=True, granularity="channel")
    quantizer = Quantizer(spec, "w", weight=True)
    quantizer.set_range((-0.1, -2.0), (0.1, 2.0))
    codes = quantizer.codes(weight)
    assert codes[0, [0, 2, 3]].tolist() == [127, 25, 102] and int(codes[0, 1]) in (-63, -64)
    assert codes[1, [0, 2, 3]].tolist() == [127, 32, 95]


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), st.integers(2, 8), st.booleans())
def test_rounding_twice_is_rounding_once_and_zero_stays_zero(
    values: list[float], bits: int, symmetric: bool
) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric, signed=symmetric)
    quantizer = made(min(*values, 0.0), max(*values, 0.0), spec)
    once = quantizer(torch.tensor(values))
    assert torch.equal(quantizer(once), once)
    assert float(quantizer(torch.zeros(1))) == 0.0


def test_gradient_passes_inside_the_range_only() -> None:
    quantizer = made(0, 1)
    x = torch.tensor([-0.5, 0.3, 2.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 0]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.0, 1.0), (-np.inf, 0.3), (0.0, np.inf)])
def test_clamping_codes_to_the_limits_of_a_clip_is_clipping(low: float, high: float, bits: int) -> None:
    x = torch.cat((torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 4, torch.zeros(1)))
    for symmetric in (False, True):
        quantizer = made(-2.5, 7.0, QuantSpec(bits=bits, symmetric=symmetric, signed=symmetric))
        limits = quantizer.limits(low, high)
        assert torch.equal(quantizer.codes(x.clamp(low, high)), quantizer.codes(x).clamp(*limits))
        assert quantizer.limits() == (quantizer.qmin, quantizer.qmax)


def test_off_it_passes_its_input_through() -> None:
    quantizer = made(0, 1)
    quantizer.enabled = False
    x = torch.rand(5)
    assert quantizer(x) is x


def test_without_a_grid_it_says_what_to_do() -> None:
    with pytest.raises(RecipeError, match="tensor 'x': has no grid yet; put the step 'calibrate' before"):
        Quantizer(QuantSpec(), "x")(torch.ones(1))


def test_a_range_that_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"tensor 'x': range .* is not finite"):
        made(float("nan"), 1.0)


def test_dynamic_grids_do_not_see_the_neighbours() -> None:
    attacker = torch.tensor([[0.1, 0.37, -0.25, 0.9]])
    quantizer = DynamicQuantizer(QuantSpec(), "x")
    alone = quantizer(attacker)
    for victim in ([0.2, 1.0, -0.3, 0.5], [0.2, 4.0, -0.3, 0.5]):
        assert torch.equal(quantizer(torch.cat((attacker, torch.tensor([victim]))))[:1], alone)


def test_dynamic_refuses_what_is_not_finite_and_takes_zeros() -> None:
    quantizer = DynamicQuantizer(QuantSpec(), "x")
    assert torch.equal(quantizer(torch.zeros(2, 3)), torch.zeros(2, 3))
    with pytest.raises(FewbitError, match="x"):
        quantizer(torch.tensor([[float("nan"), 1.0]]))
