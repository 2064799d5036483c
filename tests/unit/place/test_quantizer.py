from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewbit.errors import FewbitError, RecipeError
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLayer, QuantLinear
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


# Codes that a method chose


def of_weight(bits: int = 3, **more: Any) -> Quantizer:
    given = {"bits": bits, "symmetric": True, "signed": True, "granularity": "channel", **more}
    quantizer = Quantizer(QuantSpec.from_data(given), "conv.weight", weight=True)
    single = given["granularity"] == "tensor"
    quantizer.set_range(-1.0, 1.0) if single else quantizer.set_range((-1.0, -2.0), (1.0, 2.0))
    return quantizer


W = torch.tensor([[0.1, -0.9, 0.4], [1.9, 0.2, -0.6]])
CODES = torch.tensor([[1.0, -3.0, 0.0], [2.0, 1.0, -2.0]])


def test_chosen_codes_stand_in_place_of_the_nearest() -> None:
    quantizer = of_weight()
    nearest = quantizer.codes(W).clone()
    quantizer.assign(CODES)
    assert torch.equal(quantizer.codes(W), CODES) and not torch.equal(nearest, CODES)
    assert torch.equal(quantizer(W), CODES * quantizer.scale.reshape(2, 1))
    quantizer.enabled = False
    assert quantizer(W) is W  # the float network is still there


def test_a_scale_may_come_with_the_codes() -> None:
    quantizer = of_weight()
    quantizer.assign(CODES, torch.tensor([[0.5], [0.25]]))
    assert quantizer.scale.tolist() == [0.5, 0.25] and quantizer.scale.dtype == torch.float32
    assert quantizer(W).tolist() == [[0.5, -1.5, 0.0], [0.5, 0.25, -0.5]]
    one = of_weight(granularity="tensor")
    one.assign(CODES, torch.tensor([0.5], dtype=torch.float64))
    assert one.scale.shape == () and float(one.scale) == 0.5 and one.scale.dtype == torch.float32


def test_codes_of_an_asymmetric_grid_count_from_its_zero_point() -> None:
    quantizer = of_weight(symmetric=False, granularity="tensor")
    codes = torch.tensor([[-4.0, 3.0], [0.0, 1.0]])
    quantizer.assign(codes)
    expected = (codes - quantizer.zero_point) * quantizer.scale
    assert torch.equal(quantizer(torch.zeros(2, 2)), expected)


def test_codes_that_are_nearly_whole_become_whole_and_ask_for_no_gradient() -> None:
    quantizer = of_weight()
    given = (CODES.double() + 1e-9).requires_grad_()
    quantizer.assign(given)
    assert quantizer.assigned is not None and not quantizer.assigned.requires_grad
    assert torch.equal(quantizer.assigned, CODES) and quantizer.assigned.dtype == torch.float32


@pytest.mark.parametrize("wrong", [4.0, -4.0, float("nan")])
def test_codes_outside_the_grid_are_refused_and_leave_the_old_ones(wrong: float) -> None:
    quantizer = of_weight()
    quantizer.assign(CODES)
    other = CODES.clone()
    other[0, 0] = wrong
    message = r"tensor 'conv.weight': codes from .* to .* are not all from -3 to 3; clamp them"
    with pytest.raises(RecipeError, match=message):
        quantizer.assign(other)
    assert torch.equal(quantizer.codes(W), CODES)


def test_scales_that_must_be_powers_of_two_stay_such() -> None:
    quantizer = of_weight(power_of_two=True)
    quantizer.assign(CODES, torch.tensor([0.5, 0.125]))
    assert quantizer.scale.tolist() == [0.5, 0.125]
    with pytest.raises(RecipeError) as said:
        quantizer.assign(CODES, torch.tensor([0.5, 0.3]))
    assert str(said.value) == (
        "tensor 'conv.weight': its scales are powers of two, and this method moves them; "
        "set power_of_two = false for the weights"
    )
    assert quantizer.scale.tolist() == [0.5, 0.125] and torch.equal(quantizer.codes(W), CODES)


def test_a_new_range_forgets_chosen_codes() -> None:
    quantizer = of_weight()
    quantizer.assign(CODES)
    quantizer.set_range((-1.0, -2.0), (1.0, 2.0))
    assert quantizer.assigned is None and not torch.equal(quantizer.codes(W), CODES)


def test_chosen_codes_are_copied_and_saved_with_the_network() -> None:
    quantizer = of_weight()
    quantizer.assign(CODES)
    copied = copy.deepcopy(quantizer)
    quantizer.assign(CODES * 0)
    assert torch.equal(copied.codes(W), CODES)
    assert torch.equal(copied.state_dict()["assigned"], CODES)


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_bias_of_the_float_weight_stays(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    spec = QuantSpec(bits=3, symmetric=True, signed=True)
    layer: QuantLayer
    plain: nn.Module
    if kind == "conv":
        plain, x = nn.Conv2d(3, 4, 3, padding=1, bias=bias), torch.randn(2, 3, 5, 5)
        layer = QuantConv2d(plain, spec, "layer")
    else:
        plain, x = nn.Linear(3, 4, bias=bias), torch.randn(2, 3)
        layer = QuantLinear(plain, spec, "layer")
    layer.weight_quantizer.set_range(-0.5, 0.5)
    with torch.no_grad():
        exact = plain(x)
        rounded = layer(x)
        layer.bias = nn.Parameter(torch.full((4,), 0.7))
        old = 0.0 if plain.bias is None else plain.bias
        shape = (-1, 1, 1) if kind == "conv" else (-1,)
        moved = (torch.full((4,), 0.7) - old).reshape(shape)
        torch.testing.assert_close(layer(x), rounded + moved)
        layer.weight_quantizer.enabled = False
        assert torch.equal(layer(x), exact)
        layer.weight_quantizer.enabled = True
    assert (layer.float_bias is None) is not bias
    assert "float_bias" not in dict(layer.named_parameters())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 8])
def test_without_a_gradient_the_bits_are_the_same(symmetric: bool, bits: int) -> None:
    quantizer = Quantizer(QuantSpec(bits=bits, symmetric=symmetric), "t")
    quantizer.set_range(-1.37, 2.11)
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    with torch.no_grad():
        found = quantizer(x)
    assert torch.equal(found, quantizer(x.requires_grad_()).detach()) and torch.equal(x, before)
