from __future__ import annotations

import pytest
import torch

from fewbit.errors import RecipeError
from fewbit.place.power_quantizer import PowerQuantizer
from fewbit.place.quantizer import Quantizer
from fewbit.ranges.power_grid import find_power_grids
from fewbit.ranges.weights import find_weight_range, weight_rows
from fewbit.spec import QuantSpec

WEIGHT = torch.randn((6, 4, 3, 3), generator=torch.Generator().manual_seed(0)) ** 3


def spec(bits: int = 4, granularity: str = "channel", grid: str = "power") -> QuantSpec:
    return QuantSpec.from_data(
        {"bits": bits, "symmetric": True, "signed": True, "granularity": granularity, "grid": grid}
    )


def made(
    bits: int = 4, granularity: str = "channel", exponents: tuple[float, ...] = (0.5, 0.7, 1.0)
) -> PowerQuantizer:
    quantizer = PowerQuantizer(spec(bits, granularity), "w")
    grids = find_power_grids(weight_rows(WEIGHT, quantizer.spec), quantizer.spec, exponents)
    one = granularity == "tensor"
    quantizer.set_power(*((v[0] if one else v) for v in (grids.exponent, grids.step)))
    return quantizer


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_rounds_as_the_grids_that_were_found(bits: int, granularity: str) -> None:
    quantizer = made(bits, granularity)
    rows = weight_rows(WEIGHT, quantizer.spec)
    grids = find_power_grids(rows, quantizer.spec, (0.5, 0.7, 1.0))
    codes = grids.encode(rows)
    assert torch.equal(quantizer.codes(WEIGHT).reshape(codes.shape), codes.float())
    torch.testing.assert_close(quantizer(WEIGHT).reshape(codes.shape), grids.decode(codes), rtol=1e-6, atol=0)
    top = 2 ** (bits - 1) - 1
    assert (quantizer.qmin, quantizer.qmax) == (-top, top)
    low, high = quantizer.range()
    assert low == -high and float(quantizer(WEIGHT * 1e6).abs().max()) == high


def test_worked_values() -> None:
    quantizer = PowerQuantizer(spec(3, "tensor"), "w")
    quantizer.set_power(torch.tensor(0.5), torch.tensor(0.5))  # values 0.25 q |q|, steps of 0.5 in sqrt |w|
    x = torch.tensor([0.0, 0.06, 0.07, -0.55, -0.57, 9.0])
    assert quantizer.codes(x).tolist() == [0, 0, 1, -1, -2, 3]
    assert quantizer(x).tolist() == [0, 0, 0.25, -0.25, -1, 2.25]
    assert float(quantizer.scale) == 0.25
    tables, which = quantizer.tables()
    assert tables.tolist() == [[-9, -4, -1, 0, 1, 4, 9]] and which.tolist() == 0


def test_exponent_one_is_the_uniform_grid() -> None:
    quantizer = made(exponents=(1.0,))
    uniform = Quantizer(spec(grid="uniform"), "w", weight=True)
    uniform.set_range(-quantizer.scale.numpy() * 7, quantizer.scale.numpy() * 7)
    assert torch.equal(quantizer.codes(WEIGHT), uniform.codes(WEIGHT))
    torch.testing.assert_close(quantizer(WEIGHT), uniform(WEIGHT), rtol=1e-6, atol=0)


def test_rounding_twice_is_rounding_once_and_errs_less_than_uniform() -> None:
    quantizer = made()
    once = quantizer(WEIGHT)
    assert torch.equal(quantizer(once), once) and once.dtype == torch.float32
    uniform = Quantizer(spec(grid="uniform"), "w", weight=True)
    found = find_weight_range(WEIGHT, uniform.spec, 0, "requant")
    uniform.set_range(found.low, found.high)
    errors = [(rounded - WEIGHT).square().flatten(1).sum(1) for rounded in (once, uniform(WEIGHT))]
    assert bool((errors[0] <= errors[1] * 1.001).all()) and float(errors[0].sum()) < 0.7 * float(
        errors[1].sum()
    )


def test_codes_can_be_assigned_and_off_it_passes_its_input_through() -> None:
    quantizer = made()
    codes = quantizer.codes(WEIGHT)
    quantizer.assign(-codes)
    assert torch.equal(quantizer(WEIGHT), -made()(WEIGHT))
    quantizer.enabled = False
    assert quantizer(WEIGHT) is WEIGHT


def test_what_it_cannot_do_is_told() -> None:
    with pytest.raises(RecipeError, match=r"^tensor 'w': has no grid yet; put the step 'calibrate' before"):
        PowerQuantizer(spec(), "w")(WEIGHT)
    with pytest.raises(RecipeError, match=r"^tensor 'w': is on a power grid, which no range gives; give cal"):
        made().set_range(-1, 1)
    with pytest.raises(RecipeError, match=r"^tensor 'w': is on a power grid, and this method wants uniform"):
        made().grid(4)
