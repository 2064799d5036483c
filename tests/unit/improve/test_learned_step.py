from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.improve.learned_step import Dropping, LearnedStep
from fewbit.place.quantizer import Quantizer
from fewbit.spec import QuantSpec


def quantizer_of(low: float = -1.0, high: float = 2.0, **more: object) -> Quantizer:
    quantizer = Quantizer(QuantSpec.from_data({"bits": 4, **more}), "x")
    quantizer.set_range(low, high)
    return quantizer


def plain(x: Tensor, log_step: Tensor, low: float, high: float, mask: Tensor | None) -> Tensor:
    """The same out of torch's own functions, the rounding passed straight through."""
    step = log_step.exp()
    clamped = (x / step).clamp(low, high)
    rounded = (clamped + (clamped.round() - clamped).detach()) * step
    return rounded if mask is None else torch.where(mask > 0, rounded, x)


def laid(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if layout == "last" else x.contiguous()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("of_gradient", ["first", "last", "one value for each channel"])
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 1, 5, 6), (3, 4, 1, 1)])
def test_gradients_are_those_of_plain_autograd_however_tensors_lie(
    shape: tuple[int, ...], layout: str, of_gradient: str, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = laid(2 * torch.randn(shape, generator=generator), layout).requires_grad_()
    learned = LearnedStep(quantizer_of())
    mask = Dropping(0.5, generator).mask(x) if masked else None
    if of_gradient == "one value for each channel":  # what a mean over pixels gives back, without a copy
        given = torch.randn((*shape[:2], 1, 1), generator=generator).expand(shape)
    else:
        given = laid(torch.randn(shape, generator=generator), of_gradient)
    found = torch.autograd.grad(learned(x, mask), (x, learned.log_step), given)
    reference = plain(x, learned.log_step, learned.low, learned.high, mask)
    torch.testing.assert_close(learned(x, mask), reference, rtol=1e-6, atol=1e-6)
    wanted = torch.autograd.grad(reference, (x, learned.log_step), given)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)
    assert found[1].shape == learned.log_step.shape


@pytest.mark.parametrize("shape", [(6,), (3, 7), (2, 3, 4)])
def test_gradients_of_tensors_that_are_no_images(shape: tuple[int, ...]) -> None:
    x = (2 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    learned = LearnedStep(quantizer_of())
    found = torch.autograd.grad(learned(x).square().sum(), (x, learned.log_step))
    reference = plain(x, learned.log_step, learned.low, learned.high, None)
    wanted = torch.autograd.grad(reference.square().sum(), (x, learned.log_step))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_worked_gradient_of_the_step() -> None:
    # S = 0.2, codes -5 .. 10: inside round(x/S) - x/S, outside the end that it is clamped to.
    learned = LearnedStep(quantizer_of(-1.0, 2.0))
    assert (learned.low, learned.high) == (-5, 10)
    x = torch.tensor([0.25, -0.33, 5.0, -3.0], requires_grad=True)
    for place, slope in enumerate([1 - 1.25, -2 + 1.65, 10.0, -5.0]):
        (gradient,) = torch.autograd.grad(learned(x)[place], learned.log_step)
        assert float(gradient) / 0.2 == pytest.approx(slope, rel=1e-5)
    (of_x,) = torch.autograd.grad(learned(x).sum(), x)
    assert of_x.tolist() == [1, 1, 0, 0]


def test_outside_the_range_the_gradient_of_the_step_is_the_slope_itself() -> None:
    x = torch.tensor([9.0, -7.0, 30.0])
    learned = LearnedStep(quantizer_of())
    (gradient,) = torch.autograd.grad(learned(x).sum(), learned.log_step)
    with torch.no_grad():
        begin = learned(x).sum()
        learned.log_step += 1e-3
        assert float(gradient) == pytest.approx(float(learned(x).sum() - begin) / 1e-3, rel=1e-2)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.floats(0.0078125, 100, width=32))
def test_it_starts_as_the_quantizer_that_it_stands_for(bits: int, symmetric: bool, high: float) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric, signed=symmetric)
    quantizer = Quantizer(spec, "x")
    quantizer.set_range(-high / 2, high)
    x = high * torch.randn(200, generator=torch.Generator().manual_seed(0))
    x = x[((x / quantizer.scale).frac().abs() - 0.5).abs() > 1e-3]  # off the ties, which a last bit can turn
    learned = LearnedStep(quantizer)
    torch.testing.assert_close(learned(x), quantizer(x), rtol=1e-5, atol=1e-6 * high)


def test_where_the_mask_is_0_values_pass() -> None:
    quantizer = quantizer_of()
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    learned = LearnedStep(quantizer)
    mask = torch.zeros_like(x)
    mask[0] = 1
    found = learned(x, mask)
    assert torch.equal(found[1], x[1]) and torch.equal(found[0], learned(x)[0])


def test_the_quantizer_gets_the_step_and_keeps_its_zero_point() -> None:
    quantizer = quantizer_of()
    before, zero_point = float(quantizer.scale), float(quantizer.zero_point)
    learned = LearnedStep(quantizer)
    with torch.no_grad():
        learned.log_step += 0.25
    assert float(quantizer.scale) == before
    learned.finish()
    assert float(quantizer.scale) == pytest.approx(before * 1.2840254)
    assert float(quantizer.zero_point) == zero_point and not quantizer.scale.requires_grad
    x = torch.linspace(-2, 3, 50)
    torch.testing.assert_close(quantizer(x), learned(x))


def test_a_step_that_is_a_power_of_two_stays() -> None:
    quantizer = quantizer_of(power_of_two=True)
    before = quantizer.scale.clone()
    learned = LearnedStep(quantizer)
    assert not learned.log_step.requires_grad
    learned.finish()
    assert torch.equal(quantizer.scale, before)


# Masks


def made(share: float, seed: int = 0, length: int = 1 << 12) -> Dropping:
    return Dropping(share, torch.Generator().manual_seed(seed), length)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_mask_holds_its_share_of_ones(share: float) -> None:
    mask = made(share, length=1 << 16).mask(torch.empty(20, 3, 20, 20))
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    error = 4 * (share * (1 - share) / mask.numel()) ** 0.5
    assert float(mask.mean()) == pytest.approx(share, abs=error + 1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (7, 3), (2, 3, 4), (300, 3, 4, 5)])
def test_a_mask_has_the_shape_even_beyond_the_row(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    mask = made(0.5).mask(x)
    assert mask.shape == x.shape and mask.dtype == torch.float32
    if len(shape) == 4:
        assert mask.is_contiguous(memory_format=torch.channels_last)


def test_each_mask_is_another_and_the_seed_decides_them() -> None:
    x = torch.empty(2, 3, 8, 8)
    dropping, again, other = made(0.5), made(0.5), made(0.5, seed=1)
    masks = [dropping.mask(x) for _ in range(3)]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    assert all(torch.equal(mask, again.mask(x)) for mask in masks)
    assert not torch.equal(masks[0], other.mask(x))


def test_values_on_the_ends_of_the_grid_are_inside_but_not_what_a_relu_makes_zero() -> None:
    learned = LearnedStep(quantizer_of(0.0, 3.0))
    assert learned.can_rectify and not LearnedStep(quantizer_of(-1.0, 2.0)).can_rectify
    x = torch.tensor([-0.3, 0.0, 1.0, 3.0, 3.3], requires_grad=True)
    (inside,) = torch.autograd.grad(learned(x).sum(), x)
    assert inside.tolist() == [0, 1, 1, 1, 0]
    (behind_relu,) = torch.autograd.grad(learned(x, None, True).sum(), x)
    assert behind_relu.tolist() == [0, 0, 1, 1, 0]
    torch.testing.assert_close(learned(x, None, True), learned(torch.relu(x)))
