from __future__ import annotations

import math

import pytest
import torch

from fewbit.errors import DataError, RecipeError
from fewbit.place.quantizer import QuantConv2d
from fewbit.place.regions import Region
from fewbit.recipe import read_recipe, run_recipe
from fewbit.sensitivity.frontier import cheapest_within, pareto_frontier
from fewbit.sensitivity.kl import KL, kl_divergence, kl_sensitivities
from fewbit.sensitivity.one_region import rounded_layer
from fewbit.spec import QuantSpec
from networks import make_context, make_images, make_net

WIDTHS = [QuantSpec(bits=bits, symmetric=True, signed=True, granularity="channel") for bits in (2, 4, 8)]


def test_it_is_the_sum_over_classes_with_the_float_answer_first() -> None:
    exact, found = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[2.0, 2.0, 1.0]])
    p, q = exact.double().softmax(1), found.double().softmax(1)
    assert float(kl_divergence(exact, found)) == pytest.approx(float((p * (p / q).log()).sum()))
    assert float(kl_divergence(exact, found)) != pytest.approx(float(kl_divergence(found, exact)))
    assert kl_divergence(exact, exact + 5).tolist() == pytest.approx([0.0], abs=1e-12)
    assert kl_divergence(exact, found).dtype == torch.float64
    far = kl_divergence(torch.tensor([[0.0, 2000.0]]), torch.tensor([[2000.0, 0.0]]))
    assert float(far) == pytest.approx(2000)


Z, Z_ROUNDED = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[1.8, 1.3, -1.1]])


def test_worked_numbers() -> None:
    assert Z.double().softmax(1)[0].tolist() == pytest.approx([0.705385, 0.259496, 0.035119], rel=1e-5)
    assert float(kl_divergence(Z, Z_ROUNDED)) == pytest.approx(0.0254809, rel=1e-5)
    assert float(kl_divergence(Z_ROUNDED, Z)) == pytest.approx(0.0270896, rel=1e-5)


def test_a_shift_of_all_logits_costs_nothing_though_they_move() -> None:
    moved = Z + 0.5
    assert float((moved - Z).square().mean()) == 0.25
    assert float(kl_divergence(Z, moved)) == pytest.approx(0, abs=1e-12)


def test_one_layer_at_a_time_and_the_network_stays() -> None:
    net, _ = run_recipe(read_recipe("float32"), make_net("residual"), make_context())
    before = {key: value.clone() for key, value in net.graph.state_dict().items()}
    images, told = make_images(6), list[float]()
    found = kl_sensitivities(net, images.split(4), WIDTHS, tell=told.append)
    assert list(found) == ["stem", "conv1", "conv2", "fc"]
    assert told == [k / 8 for k in range(1, 9)]  # four layers on each of two batches
    assert all(torch.equal(value, before[key]) for key, value in net.graph.state_dict().items())
    for row in found.values():
        assert row[0] > row[1] > row[2] > 0
    copy = net.clone()
    made = rounded_layer(copy.layer("conv2"), WIDTHS[1], "minmax")
    with torch.no_grad():
        made.weight.copy_(made.weight_quantizer(made.weight))
        expected = float(kl_divergence(net(images), copy(images)).mean())
    assert found["conv2"][1] == pytest.approx(expected, rel=1e-4)


def test_rounding_is_that_of_a_placed_layer() -> None:
    made, _ = run_recipe(read_recipe("int8"), make_net("residual"), make_context())
    module = made.layer("conv1").module
    assert isinstance(module, QuantConv2d)
    expected = module.weight_quantizer(module.weight)
    float_net, _ = run_recipe(read_recipe("float32"), make_net("residual"), make_context())
    found = rounded_layer(float_net.layer("conv1"), WIDTHS[2], "minmax")
    assert torch.equal(found.weight_quantizer(found.weight), expected)


def test_sensitivities_allocate_bits() -> None:
    net, _ = run_recipe(read_recipe("float32"), make_net("depthwise"), make_context())
    found = kl_sensitivities(net, [make_images(4)], WIDTHS)
    costs = [dict(zip((2, 4, 8), row, strict=True)) for row in found.values()]
    sizes = [net.layer(name).module.weight.numel() for name in found]  # type: ignore[operator,union-attr]
    frontier = pareto_frontier(costs, sizes)
    half = cheapest_within(frontier, 4 * sum(sizes))
    uniform = sum(row[4] for row in costs)
    assert half.cost <= uniform and math.isfinite(half.cost) and len(set(half.bits)) > 1


def test_it_is_the_row_with_a_region_for_each_layer() -> None:
    net, _ = run_recipe(read_recipe("float32"), make_net("residual"), make_context())
    regions = [Region(name, (name,)) for name in ("stem", "conv1", "conv2", "fc")]
    found = KL(ranges="mse").score(net, [(make_images(4), None)], regions, WIDTHS)
    assert kl_sensitivities(net, [make_images(4)], WIDTHS, "mse") == found.losses
    assert found.unit == "nats" and found.images == 4
    assert found.losses != kl_sensitivities(net, [make_images(4)], WIDTHS)


def test_a_quantized_network_and_no_image_are_told() -> None:
    made, _ = run_recipe(read_recipe("int8"), make_net("residual"), make_context())
    with pytest.raises(RecipeError, match="residual: is quantized already; give the float network"):
        kl_sensitivities(made, [make_images(1)], WIDTHS)
    with pytest.raises(DataError, match="KL sensitivity: no image came; give at least one, or distil some"):
        kl_sensitivities(make_net("residual"), [], WIDTHS)
