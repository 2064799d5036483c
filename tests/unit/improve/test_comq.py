from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.errors import DataError
from fewbit.improve.comq import COMQ, coordinate_descent
from fewbit.improve.correct_bias import CorrectBias
from fewbit.improve.gptq import GPTQ, round_columns
from fewbit.improve.gram import LayerProblem, damped
from fewbit.improve.obq import OBQ, round_greedily
from fewbit.improve.tune_scales import TuneScales
from fewbit.place.quantizer import QuantConv2d, QuantLinear
from fewbit.recipe import Recipe, run_recipe
from fewbit.spec import QuantSpec, Scheme
from fewbit.step import Step
from networks import make_context, make_images, make_net
from solved_layers import STEPS, W, X, loss_of, of_layer, output_error, three_bit


def test_worked_example_with_the_codes_of_the_first_sweep() -> None:
    codes, scale = coordinate_descent(of_layer(), 1, False)
    assert codes.flatten().tolist() == [1, -1, 1] and float(scale) == 0.5
    assert loss_of(codes, 0.5) == pytest.approx(0.118738, rel=1e-5)


def test_worked_example_reaches_the_best_of_all_codes() -> None:
    every = [torch.tensor(q, dtype=torch.float64) for q in itertools.product(range(-2, 3), repeat=3)]
    best = min(loss_of(q, 0.5) for q in every)
    assert loss_of(coordinate_descent(of_layer(), 4, False)[0], 0.5) == pytest.approx(best)
    assert loss_of(torch.tensor([1.0, -1.0, 2.0]), 0.5) == pytest.approx(0.266338, rel=1e-5)


def test_worked_example_of_the_scale() -> None:
    codes, scale = coordinate_descent(of_layer(), 1, True)
    assert codes.flatten().tolist() == [1, -1, 1]
    assert float(scale) == pytest.approx(0.593667, rel=1e-5)
    assert loss_of(codes, float(scale)) == pytest.approx(0.102946, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 3]), st.sampled_from([2, 3, 4]))
def test_no_sweep_makes_it_worse_and_all_beat_nearest_rounding(seed: int, groups: int, bits: int) -> None:
    problem = random_problem(seed, groups, bits)
    nearest = torch.round(problem.weight / problem.scale).clamp(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    losses = [float(problem.loss(nearest).sum())]
    previous = None
    for sweeps in (2, 3, 4, 6):
        codes, scale = coordinate_descent(problem, sweeps, True)
        found = problem.loss(codes, scale).sum()
        assert previous is None or float(found) <= previous * (1 + 1e-9)
        previous = float(found)
    losses.append(previous or 0.0)
    for codes in (round_columns(problem, 0.01, True), round_greedily(problem, 0.01)):
        losses.append(float(problem.loss(codes).sum()))
        assert bool(((codes >= problem.low) & (codes <= problem.high)).all())
    assert min(losses[1:]) <= losses[0] * (1 + 1e-9)
    assert losses[1] <= losses[0] * 1.05


def random_problem(seed: int, groups: int, bits: int) -> LayerProblem:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 60, 6, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(groups, 6, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, 4, 6, generator=generator, dtype=torch.float64)
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(2, keepdim=True) / top
    limit = torch.full_like(scale, top)
    return LayerProblem(x.transpose(1, 2) @ x, weight, scale, -limit, limit)


def test_an_input_that_is_always_zero_is_rounded_to_nearest() -> None:
    gram = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)).unsqueeze(0)
    weight = torch.tensor([[[0.4, 0.9, -0.2]]], dtype=torch.float64)
    scale, limit = torch.full((1, 1, 1), 0.5, dtype=torch.float64), torch.full((1, 1, 1), 3.0)
    codes, _ = coordinate_descent(LayerProblem(gram, weight, scale, -limit, limit), 2, False)
    assert codes.flatten().tolist() == [1, 2, 0]
    assert torch.diagonal(damped(gram, 0.01)[0]).tolist() == pytest.approx([1.01, 1.01, 2.01])


def test_one_scale_for_the_tensor_moves_for_all_outputs_together() -> None:
    problem = random_problem(3, 1, 3)
    shared = LayerProblem(
        *(problem.gram, problem.weight, problem.scale.max().expand_as(problem.scale)),
        *(problem.low, problem.high),
        one_scale=True,
    )
    _, scale = coordinate_descent(shared, 3, True)
    assert len(set(scale.flatten().tolist())) == 1


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("name", ["residual", "depthwise", "branches"])
def test_it_brings_the_networks_output_nearer(name: str, asymmetric: bool) -> None:
    before, after = three_bit(name, COMQ(asymmetric=asymmetric))
    assert output_error(name, after) < 0.6 * output_error(name, before)


def test_without_images_it_says_so() -> None:
    def nothing(**options: Any) -> Tensor:
        return torch.empty(0, 3, 16, 16)

    with pytest.raises(
        DataError, match="comq: no image came; give at least one with --data or --calibration"
    ):
        net = three_bit("residual", None)[0]
        COMQ()(net, make_context(images=nothing()))


def test_the_worked_matrix() -> None:
    assert (2 * X.T @ X)[0, 0] == pytest.approx(2 * (1 + 0.25 + 0.04 + 1))
    assert W.shape == (3,)


@pytest.mark.parametrize("before", [COMQ(), CorrectBias(), TuneScales(lr_step=0)])
def test_a_step_before_it_that_moved_biases_is_not_counted_twice(before: Step) -> None:
    net, alone = three_bit("depthwise", COMQ())
    both = net.clone()
    before(both, make_context(images=make_images(64)))
    COMQ()(both, make_context(images=make_images(64)))
    assert output_error("depthwise", both) < 2 * output_error("depthwise", alone) + 1e-4


@pytest.mark.parametrize("step", [COMQ(), GPTQ(), OBQ()])
def test_a_channel_that_is_always_the_same_is_no_input(step: Step) -> None:
    net, copy = three_bit("residual", None)
    shown = make_images(32)
    shown[:, 1] = 1.37
    step(copy, make_context(images=shown))
    first, rounded = (next(m for m in n.graph.modules() if isinstance(m, QuantConv2d)) for n in (net, copy))
    nearest = first.weight_quantizer.codes(first.weight.detach())
    found = rounded.weight_quantizer.codes(rounded.weight.detach())
    inner = (slice(None), 1, 1, 1)  # the middle of the kernel never reads the padding
    if not isinstance(step, COMQ):  # which moves the scale too
        assert torch.equal(found[inner], nearest[inner])
    assert float((found[inner] - nearest[inner]).abs().max()) <= 1


def test_powers_of_two_keep_their_scales() -> None:
    scheme = Scheme(weights=QuantSpec(bits=3, symmetric=True, signed=True, power_of_two=True))
    net, _ = run_recipe(
        Recipe(name="test", scheme=scheme, steps=(*STEPS, {"use": "comq"})),
        make_net("residual"),
        make_context(),
    )
    layers = [m for m in net.graph.modules() if isinstance(m, QuantConv2d | QuantLinear)]
    assert all(bool((torch.frexp(m.weight_quantizer.scale).mantissa == 0.5).all()) for m in layers)
