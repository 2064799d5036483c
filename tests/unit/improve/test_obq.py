from __future__ import annotations

import pytest
import torch

from fewbit.improve import obq
from fewbit.improve.gptq import round_columns
from fewbit.improve.gram import LayerProblem
from fewbit.improve.obq import OBQ, round_greedily
from solved_layers import loss_of, of_layer, output_error, three_bit


def test_worked_example_of_obq() -> None:
    codes = round_greedily(of_layer(top=2), 1e-12)
    assert (0.5 * codes).flatten().tolist() == [0.0, -0.5, 1.0]
    assert loss_of(codes, 0.5) == pytest.approx(0.127738, rel=1e-5)


def random_layer(outputs: int, inputs: int, groups: int = 1) -> LayerProblem:
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(groups, 4 * inputs, inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, outputs, inputs, generator=generator, dtype=torch.float64)
    scale = weight.abs().amax(2, keepdim=True) / 3
    limit = torch.full_like(scale, 3.0)
    return LayerProblem(x.transpose(1, 2) @ x, weight, scale, -limit, limit)


def test_downdating_the_inverse_is_inverting_what_is_left() -> None:
    problem = random_layer(1, 6)
    hessian = 2 * problem.gram[0]
    hessian += 1e-9 * torch.diagonal(hessian).mean() * torch.eye(6)
    left, open_, codes = problem.weight[0, 0].clone(), list(range(6)), torch.zeros(6, dtype=torch.float64)
    step = problem.scale[0, 0, 0]
    while open_:
        inverse = torch.linalg.inv(hessian[open_][:, open_])
        nearest = torch.round(left[open_] / step).clamp(-3, 3)
        errors = left[open_] - nearest * step
        scores = errors.square() / torch.diagonal(inverse)
        beyond = errors.abs() > step * (0.5 + 1e-9)
        at = int(torch.where(beyond, -errors.abs(), scores).argmin())
        codes[open_[at]] = nearest[at]
        left[open_] -= errors[at] / inverse[at, at] * inverse[:, at]
        open_.pop(at)
    assert torch.equal(round_greedily(problem, 1e-9)[0, 0], codes)


def test_rows_at_a_time_and_groups_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_layer(5, 8, groups=2)
    whole = round_greedily(problem, 0.01)
    monkeypatch.setattr(obq, "_VALUES_AT_ONCE", 2 * 8**2)
    assert torch.equal(round_greedily(problem, 0.01), whole)
    for group in range(2):
        parts = (problem.gram, problem.weight, problem.scale, problem.low, problem.high)
        alone = LayerProblem(*(part[group : group + 1] for part in parts))
        assert torch.equal(round_greedily(alone, 0.01)[0], whole[group])


def test_choosing_the_order_is_better_than_a_given_one_for_most_outputs() -> None:
    problem = random_layer(64, 12)
    greedy, given = (
        problem.loss(f) for f in (round_greedily(problem, 0.01), round_columns(problem, 0.01, False))
    )
    assert float((greedy <= given).double().mean()) > 0.6
    assert float(greedy.sum()) < float(given.sum())


@pytest.mark.parametrize("step", [OBQ(), OBQ(most_inputs=1)])
@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_it_brings_the_networks_output_nearer(name: str, step: OBQ) -> None:
    before, after = three_bit(name, step)
    assert output_error(name, after) < 0.6 * output_error(name, before)
