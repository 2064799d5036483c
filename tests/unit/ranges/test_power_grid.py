"""Grids that are uniform in a transformed weight."""

import numpy as np
import pytest
import torch

from fewbit.errors import RecipeError
from fewbit.ranges import find_weight_range
from fewbit.ranges.power_grid import find_power_grids
from fewbit.spec import QuantSpec

GAUSS = np.random.RandomState(0).randn(4096)
ROW = torch.tensor(GAUSS)[None]


def symmetric(bits):
    return QuantSpec(bits=bits, symmetric=True, signed=True)


# The spec's figures are the best of a grid of factors 0.005 apart: the search may only be better.
@pytest.mark.parametrize(
    ("bits", "exponent", "ratio", "mse"),
    [
        (4, 1.0, 0.630, 0.0126206),
        (4, 0.9, 0.685, 0.0118828),
        (4, 0.8, 0.725, 0.0116068),
        (4, 0.7, 0.740, 0.0118842),
        (4, 0.5, 0.815, 0.0150984),
        (6, 1.0, 0.880, 0.00104267),
        (6, 0.8, None, 0.0008732),
        (6, 0.7, None, 0.0008317),
        (6, 0.5, None, 0.0009723),
        (3, 0.9, None, 0.0443886),
        (8, 0.7, None, 5.33e-5),
        (8, 1.0, None, 7.10e-5),
    ],
)
def test_worked_gaussian(bits, exponent, ratio, mse):
    grids = find_power_grids(ROW, symmetric(bits), [exponent], steps=200)
    assert float(grids.error) / 4096 == pytest.approx(mse, rel=3e-3)
    assert float(grids.error) / 4096 <= mse * 1.001
    if ratio is not None:
        alpha = float(grids.step) * grids.top / np.abs(GAUSS).max() ** exponent
        assert alpha == pytest.approx(ratio, abs=4e-3)


@pytest.mark.parametrize(("bits", "exponent"), [(3, 0.9), (4, 0.8), (6, 0.7), (8, 0.7)])
def test_worked_best_exponents(bits, exponent):
    assert float(find_power_grids(ROW, symmetric(bits)).exponent) == exponent


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_codes_and_weights_have_the_error_that_was_searched(bits):
    rows = torch.stack([ROW[0], ROW[0] ** 3, ROW[0].abs().sqrt()])
    grids = find_power_grids(rows, symmetric(bits))
    codes = grids.encode(rows)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) <= 2 ** (bits - 1) - 1
    back = grids.decode(codes)
    assert (back.double() - rows).square().sum(1).numpy() == pytest.approx(grids.error.numpy(), rel=1e-5)
    assert torch.equal(grids.encode(back), codes)
    assert bool((back * rows >= 0).all())


def test_exponent_one_is_the_uniform_grid():
    grids = find_power_grids(ROW, symmetric(4), [1.0])
    uniform = find_weight_range(ROW, symmetric(4), 0, "requant")
    assert float(grids.step) * 7 == pytest.approx(uniform.high, rel=2e-3)


def test_each_row_by_itself_and_rows_of_zeros():
    rows = torch.stack([ROW[0], torch.zeros(4096).double(), ROW[0] * 1e-3])
    together = find_power_grids(rows, symmetric(4))
    alone = find_power_grids(rows[2:], symmetric(4))
    assert float(together.error[2]) == float(alone.error[0])
    assert together.exponent[0] == together.exponent[2] and float(together.error[1]) == 0
    assert torch.equal(together.decode(together.encode(rows))[1], torch.zeros(4096))


def test_more_exponents_never_err_more():
    errors = [float(find_power_grids(ROW**3, symmetric(4), p).error) for p in ([1.0], [0.8, 1.0])]
    assert errors[1] < errors[0]


def test_what_it_cannot_do_is_told():
    with pytest.raises(
        RecipeError, match=r"^power grid: is symmetric about zero; give a spec with symmetric"
    ):
        find_power_grids(ROW, QuantSpec())
    with pytest.raises(
        RecipeError, match=r"^power grid: exponents are \[0.5, 2\]; give some above 0, at most 1"
    ):
        find_power_grids(ROW, symmetric(4), [0.5, 2])
    with pytest.raises(RecipeError, match=r"^power grid: 1-bit symmetric signed codes hold nothing but 0"):
        find_power_grids(ROW, symmetric(1))
