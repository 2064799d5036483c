from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fewbit.improve.soft_rounding import (
    FixedCodes,
    SoftRounding,
    annealed,
    rectified_sigmoid,
    starting_v,
    undecided,
)
from fewbit.place.quantizer import QuantConv2d, QuantLayer, QuantLinear
from fewbit.spec import QuantSpec

# Worked numbers


@pytest.mark.parametrize(
    ("fraction", "v"), [(0.1, -1.609438), (0.25, -0.887303), (0.5, 0.0), (0.9, 1.609438)]
)
def test_worked_values_of_v(fraction: float, v: float) -> None:
    found = starting_v(torch.tensor(fraction, dtype=torch.float64))
    assert float(found) == pytest.approx(v, rel=1e-5, abs=1e-9)
    assert float(rectified_sigmoid(found)) == pytest.approx(fraction, rel=1e-9)


@pytest.mark.parametrize(
    ("h", "beta", "value"),
    [(0.1, 20, 0.988471), (0.1, 8, 0.832228), (0.1, 2, 0.36), (0.25, 2, 0.75), (0.5, 2, 1), (0.5, 20, 1)],
)
def test_worked_values_of_the_regulariser(h: float, beta: float, value: float) -> None:
    assert float(undecided(torch.tensor([h], dtype=torch.float64), beta)) == pytest.approx(value, rel=1e-5)


def test_the_regulariser_is_a_sum_and_0_where_all_is_decided() -> None:
    h = torch.tensor([[0.1, 0.25], [0.5, 0.9]], dtype=torch.float64)
    assert float(undecided(h, 2.0)) == pytest.approx(0.36 + 0.75 + 1 + 0.36)
    assert float(undecided(torch.tensor([0.0, 1.0, 1.0]), 2.0)) == 0


@pytest.mark.parametrize(("share", "beta"), [(0.0, 20), (0.1, 20), (0.2, 20), (0.6, 11), (1.0, 2)])
def test_worked_schedule_of_beta(share: float, beta: float) -> None:
    assert annealed(share, 20.0, 2.0, 0.2) == pytest.approx(beta, rel=1e-5)


@given(st.floats(0, 0.9), st.floats(1, 10), st.floats(10, 30))
def test_beta_falls_from_its_start_to_its_end(warm_up: float, end: float, start: float) -> None:
    found = [annealed(i / 20, start, end, warm_up) for i in range(21)]
    assert found[0] == pytest.approx(start) and found[-1] == pytest.approx(end)
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(found))


def test_h_saturates_at_both_ends_without_a_gradient() -> None:
    v = torch.tensor([-20.0, 0.0, 20.0], requires_grad=True)
    h = rectified_sigmoid(v)
    assert h.tolist() == [0, 0.5, 1]
    h.sum().backward()
    assert v.grad is not None and v.grad[0] == 0 == v.grad[2]
    assert float(v.grad[1]) == pytest.approx(1.2 / 4)


# A layer


def conv(spec: QuantSpec | None = None, scale: float | None = None, bias: bool = True) -> QuantConv2d:
    torch.manual_seed(0)
    made = QuantConv2d(nn.Conv2d(3, 4, 3, bias=bias), spec or three_bits(), "conv")
    calibrate(made)
    if scale is not None:
        made.weight_quantizer.scale = torch.full_like(made.weight_quantizer.scale, scale)
    return made


def calibrate(layer: QuantLayer) -> None:
    weight = layer.weight.detach()
    if layer.weight_quantizer.spec.granularity == "channel":
        rows = weight.flatten(1)
        layer.weight_quantizer.set_range(rows.amin(1), rows.amax(1))
    else:
        layer.weight_quantizer.set_range(float(weight.min()), float(weight.max()))


def three_bits(**more: object) -> QuantSpec:
    return QuantSpec.from_data(
        {"bits": 3, "symmetric": True, "signed": True, "granularity": "channel", **more}
    )


SPECS = [three_bits(), three_bits(granularity="tensor"), three_bits(symmetric=False), three_bits(bits=2)]


def codes_of(layer: QuantLayer) -> Tensor:
    return layer.weight_quantizer.codes(layer.weight.detach())


@pytest.mark.parametrize("spec", SPECS, ids=["channel", "tensor", "asymmetric", "two bits"])
def test_it_starts_at_the_weight_itself(spec: QuantSpec) -> None:
    layer = conv(spec)
    soft = SoftRounding(layer)
    scale, zero_point = layer.weight_quantizer.grid(4)
    low = (layer.weight_quantizer.qmin - zero_point) * scale
    high = (layer.weight_quantizer.qmax - zero_point) * scale
    wanted = torch.maximum(torch.minimum(layer.weight, high), low)
    error = (soft(soft.up()) - wanted).detach().abs() / scale
    assert float(error.max()) < 2e-4  # V keeps away from the ends by a ten-thousandth of a step
    assert bool(((soft.up() >= 0) & (soft.up() <= 1)).all())


@pytest.mark.parametrize("spec", SPECS, ids=["channel", "tensor", "asymmetric", "two bits"])
def test_unlearned_it_rounds_to_nearest(spec: QuantSpec) -> None:
    layer = conv(spec)
    nearest = codes_of(layer).clone()
    left = SoftRounding(layer).finish()
    assert torch.equal(codes_of(layer), nearest)
    assert 0.5 < left <= 1  # of weights that nothing has moved most lie between two codes


@pytest.mark.parametrize("spec", SPECS, ids=["channel", "tensor", "asymmetric", "two bits"])
def test_it_reaches_the_code_below_and_the_one_above_and_never_leaves_the_grid(spec: QuantSpec) -> None:
    ways = []
    for way in (-10.0, 10.0):
        layer = conv(spec)
        soft = SoftRounding(layer)
        with torch.no_grad():
            soft.v.fill_(way)
        whole = soft(soft.up()).detach()
        assert soft.finish() == 0
        codes = codes_of(layer)
        quantizer = layer.weight_quantizer
        assert bool(((codes >= quantizer.qmin) & (codes <= quantizer.qmax)).all())
        torch.testing.assert_close(quantizer(layer.weight), whole)  # what was learned is what it rounds to
        ways.append(codes)
    assert bool((ways[1] - ways[0] == 1).all())
    scale, zero_point = layer.weight_quantizer.grid(4)
    steps = layer.weight.detach() / scale + zero_point
    inside = (steps > layer.weight_quantizer.qmin) & (steps < layer.weight_quantizer.qmax)
    assert torch.equal(ways[0][inside], torch.floor(steps)[inside])


def test_weights_beyond_the_grid_start_at_its_ends() -> None:
    layer = conv(scale=1e-6)
    SoftRounding(layer).finish()
    assert set(codes_of(layer).unique().tolist()) == {-3.0, 3.0}


def test_it_starts_at_codes_that_a_step_before_has_chosen() -> None:
    layer = conv()
    generator = torch.Generator().manual_seed(3)
    chosen = torch.randint(-3, 4, layer.weight.shape, generator=generator).float()
    layer.weight_quantizer.assign(chosen)
    soft = SoftRounding(layer)
    scale, _ = layer.weight_quantizer.grid(4)
    assert float((soft(soft.up()).detach() / scale - chosen).abs().max()) < 0.4502
    soft.finish()
    assert torch.equal(codes_of(layer), chosen)


def test_codes_chosen_where_the_weight_rounds_to_anyway_keep_its_place_between_codes() -> None:
    layer, plain = conv(), conv()
    layer.weight_quantizer.assign(codes_of(layer))
    scale, _ = layer.weight_quantizer.grid(4)
    far = (layer.weight.detach() / scale).frac().abs().sub(0.5).abs() < 0.05
    moved = (SoftRounding(layer).up() - SoftRounding(plain).up()).detach().abs()
    assert float(moved[~far].max()) < 1e-6 and float(moved.max()) < 0.0502


def test_the_bias_goes_with_the_rounded_weight_alone() -> None:
    layer = conv()
    soft = SoftRounding(layer)
    assert soft.bias is not None and layer.bias is not None and layer.float_bias is not None
    before = layer.bias.detach().clone()
    with torch.no_grad():
        soft.bias += 1
    soft.finish()
    assert torch.equal(layer.bias, before + 1) and torch.equal(layer.float_bias, before)


def test_a_layer_without_bias_stays_without() -> None:
    layer = conv(bias=False)
    soft = SoftRounding(layer)
    assert soft.bias is None
    soft.finish()
    assert layer.bias is None and FixedCodes(layer).bias is None


def test_a_matrix_product() -> None:
    torch.manual_seed(0)
    layer = QuantLinear(nn.Linear(5, 3), three_bits(), "fc")
    calibrate(layer)
    nearest = codes_of(layer).clone()
    SoftRounding(layer).finish()
    assert torch.equal(codes_of(layer), nearest)


# Codes that stay


@pytest.mark.parametrize("spec", SPECS, ids=["channel", "tensor", "asymmetric", "two bits"])
def test_scales_are_learned_and_codes_stay(spec: QuantSpec) -> None:
    layer = conv(spec)
    fixed = FixedCodes(layer)
    codes, scale = codes_of(layer).clone(), layer.weight_quantizer.scale.clone()
    torch.testing.assert_close(fixed(), layer.weight_quantizer(layer.weight))
    with torch.no_grad():
        fixed.log_gain += math.log(1.5)
    torch.testing.assert_close(fixed(), 1.5 * layer.weight_quantizer(layer.weight))
    assert fixed.finish() == 0
    assert torch.equal(codes_of(layer), codes)
    torch.testing.assert_close(layer.weight_quantizer.scale, 1.5 * scale)
    torch.testing.assert_close(fixed() / 1.5, layer.weight_quantizer(layer.weight))


def test_nothing_learned_changes_no_bit() -> None:
    layer = conv()
    before = layer.weight_quantizer(layer.weight).clone()
    FixedCodes(layer).finish()
    assert torch.equal(layer.weight_quantizer(layer.weight), before)


def test_scales_that_are_powers_of_two_stay() -> None:
    layer = conv(three_bits(power_of_two=True))
    fixed, scale = FixedCodes(layer), layer.weight_quantizer.scale.clone()
    assert not fixed.log_gain.requires_grad
    fixed.finish()
    assert torch.equal(layer.weight_quantizer.scale, scale)
