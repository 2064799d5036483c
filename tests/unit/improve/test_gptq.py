from __future__ import annotations

import pytest
import torch

from fewbit.improve.gptq import GPTQ, round_columns
from fewbit.improve.gram import LayerProblem
from solved_layers import loss_of, of_layer, output_error, three_bit


def test_worked_example_of_gptq_in_the_given_order() -> None:
    codes = round_columns(of_layer(top=1), 1e-12, False)
    assert (0.5 * codes).flatten().tolist() == [0.5, -0.5, 0.5]
    assert loss_of(codes, 0.5) == pytest.approx(0.118738, rel=1e-5)


def test_columns_in_blocks_give_what_one_column_after_the_other_does() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(900, 300, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 5, 300, generator=generator, dtype=torch.float64)
    scale = torch.full((1, 5, 1), 0.3, dtype=torch.float64)
    limit = torch.full((1, 5, 1), 7.0, dtype=torch.float64)
    problem = LayerProblem((x.T @ x).unsqueeze(0), weight, scale, -limit, limit)
    found = round_columns(problem, 0.01, False)
    hessian = 2 * problem.gram[0] + 0.01 * torch.diagonal(2 * problem.gram[0]).mean() * torch.eye(300)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, codes = weight[0].clone(), torch.empty_like(weight[0])
    for i in range(300):
        codes[:, i] = torch.round(left[:, i] / 0.3).clamp(-7, 7)
        error = (left[:, i] - 0.3 * codes[:, i]) / upper[i, i]
        left[:, i:] -= error.unsqueeze(1) * upper[i, i:]
    assert float((found[0] != codes).double().mean()) < 0.005


def test_the_order_by_activation_rounds_the_largest_input_first() -> None:
    gram = torch.tensor([[[1.0, 0.9], [0.9, 4.0]]], dtype=torch.float64)
    weight = torch.tensor([[[0.4, 0.4]]], dtype=torch.float64)
    one, limit = torch.ones(1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1), 3.0)
    problem = LayerProblem(gram, weight, one, -limit, limit)
    # The second input is rounded down first, so that only the first is left to make up for it.
    assert round_columns(problem, 1e-9, True).flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("step", [GPTQ(), GPTQ(order="given", asymmetric=False)])
@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_it_brings_the_networks_output_nearer(name: str, step: GPTQ) -> None:
    before, after = three_bit(name, step)
    assert output_error(name, after) < 0.6 * output_error(name, before)
