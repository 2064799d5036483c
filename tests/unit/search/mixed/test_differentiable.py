from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewbit.errors import DataError, RecipeError
from fewbit.net import Net
from fewbit.ranges.weights import rounded
from fewbit.recipe import read_recipe, run_recipe
from fewbit.search.mixed import differentiable
from fewbit.search.mixed.differentiable import Differentiable
from fewbit.search.mixed.integer_program import solve
from fewbit.search.mixed.problem import Problem, Tie
from fewbit.search.mixed.table import tabulate
from fewbit.search.mixed.widths import width_problem
from fewbit.sensitivity.kl import kl_divergence
from fewbit.spec import QuantSpec
from hawq_v3 import DATA, gain, hawq_problem
from made_problems import chain
from networks import make_context, make_images, make_net

GRIDS = {
    f"w{bits}": QuantSpec(bits=bits, symmetric=True, signed=True, granularity="channel") for bits in (2, 4, 8)
}
LAYERS = ("stem", "conv1", "conv2", "fc")


@pytest.fixture(scope="module")
def net() -> Net:
    return run_recipe(read_recipe("float32"), make_net("residual"), make_context())[0]


def sizes(net: Net) -> Problem:
    parameters = {name: net.layer(name).module.weight.numel() for name in LAYERS}  # type: ignore[operator,union-attr]
    return width_problem({name: dict.fromkeys((2, 4, 8), 0.0) for name in LAYERS}, parameters)


def with_widths(net: Net, options: dict[str, str]) -> Net:
    copy = net.clone()
    for name, option in options.items():
        module = copy.layer(name).module
        assert isinstance(module, nn.Conv2d | nn.Linear)
        module.weight.data = rounded(module.weight.data, GRIDS[option], "mse", name)
    return copy


def test_hawq_v3_within_a_tenth_of_the_gain_and_mostly_exact() -> None:
    problem = hawq_problem()
    shares = []
    for case in DATA["optima"]:
        found = Differentiable().search(problem, {case["cost"]: case["limit"]})
        assert found is not None and found.within({case["cost"]: case["limit"]})
        shares.append(gain(problem, found) / case["gain"])
    assert min(shares) > 0.9 and sum(share > 0.98 for share in shares) >= 7 and max(shares) < 1 + 1e-6


@pytest.mark.parametrize("mixing", ["softmax", "gumbel"])
def test_expected_costs_of_reorders_keep_a_row_in_one_piece(mixing: str) -> None:
    problem = chain([(0.1, 0.0)] * 4 + [(3.0, 0.0)] * 4, [(1.0, 2.0)] * 8, reorder_ms=0.7)
    found = Differentiable.from_data({"mixing": mixing}).search(problem, {"ms": 13.0})
    exact = solve(problem, {"ms": 13.0})
    assert exact is not None and list(exact.options.values()) == ["int8"] * 4 + ["bf16"] * 4
    assert found == exact


def test_the_expected_sums_are_those_of_a_choice_where_it_is_certain() -> None:
    table = tabulate(chain([(0.5, 0.1, 0.0)] * 3, [(1.0, 1.5, 2.0)] * 3, reorder_ms=0.25))
    sums = differentiable._Expected(table)
    for choice in itertools.product(range(3), repeat=3):
        certain = nn.functional.one_hot(torch.tensor(choice), 3).double()
        expected = table.totals(np.array(choice)) / table.spread()
        assert sums(certain).tolist() == pytest.approx(expected.tolist())
    half = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    every = table.totals(np.array(list(np.ndindex(3, 3, 3)))).mean(0) / table.spread()
    assert sums(half).tolist() == pytest.approx(every.tolist())


def test_what_is_left_goes_to_likely_options() -> None:
    problem = chain([(0.3, 0.0), (0.2, 0.0), (0.1, 0.0)], [(1.0, 2.0), (1.0, 5.0), (1.0, 3.0)])
    table = tabulate(problem)
    learned = np.array([[0.1, 0.9], [0.94, 0.06], [0.52, 0.48]])
    for limit, expected in ((4.0, [1, 0, 0]), (6.0, [1, 0, 1]), (10.0, [1, 1, 1])):
        found = differentiable._filled(table, np.array([1, 0, 0]), learned, {"ms": limit})
        assert found.tolist() == expected
    unlikely = np.array([[0.1, 0.9], [0.96, 0.04], [0.96, 0.04]])
    assert differentiable._filled(table, np.array([1, 0, 0]), unlikely, {"ms": 10.0}).tolist() == [1, 0, 0]


def test_a_limit_on_the_objective_itself_is_held() -> None:
    problem = chain([(0.3, 0.0), (0.2, 0.0)], [(1.0, 2.0), (1.0, 2.0)])
    assert Differentiable(steps=50).search(problem, {"ms": 2.0, "loss": 0.4}) is None
    found = Differentiable(steps=50).search(problem, {"ms": 2.0, "loss": 0.5})
    assert found is not None and found.loss == 0.5
    fast = Differentiable(steps=50).search(problem, {"loss": 0.25}, objective="ms")
    assert fast is not None and fast.costs["ms"] == 3.0 and fast.loss <= 0.25


def test_the_network_loses_what_a_rounded_one_does_where_the_choice_is_certain(net: Net) -> None:
    images = make_images(6)
    table = tabulate(sizes(net))
    mixtures = differentiable._mixtures(net, table, GRIDS, "mse")
    options = dict(zip(LAYERS, ("w8", "w2", "w4", "w4"), strict=True))
    certain = nn.functional.one_hot(torch.tensor([2, 0, 1, 1]), 3).double()
    loss = differentiable._NetworkLoss(net, [(images, None)], mixtures, 0, None, 1)(certain, 0)
    with torch.no_grad():
        logits = with_widths(net, options)(images)
        expected = float(kl_divergence(net(images), logits).mean())
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    labels = torch.arange(6) % 5
    loss = differentiable._NetworkLoss(net, [(images, labels)], mixtures, 0, None, 1)(certain, 0)
    assert float(loss) == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_the_answer_for_a_network_is_among_its_best(net: Net) -> None:
    images, problem = make_images(16), sizes(net)
    limits = {"bytes": 2700.0}
    before = {key: value.clone() for key, value in net.graph.state_dict().items()}
    told = list[float]()
    search = Differentiable(steps=150)
    found = search.search_network(net, [(images, None)], GRIDS, problem, limits, tell=told.append)
    assert found is not None and found.within(limits)
    assert all(torch.equal(value, before[key]) for key, value in net.graph.state_dict().items())
    assert len(told) == 150 and told[-1] == 1.0 and told == sorted(told)
    with torch.no_grad():
        exact, losses = net(images), dict[tuple[str, ...], float]()
        for widths in itertools.product(GRIDS, repeat=len(LAYERS)):
            options = dict(zip(LAYERS, widths, strict=True))
            size = sum(
                next(o.costs["bytes"] for o in problem.by_name[layer].options if o.name == width)
                for layer, width in options.items()
            )
            if size <= limits["bytes"]:
                losses[widths] = float(kl_divergence(exact, with_widths(net, options)(images)).mean())
    ordered = sorted(losses.values())
    assert losses[tuple(found.options[layer] for layer in LAYERS)] <= ordered[2] and len(ordered) > 30


def test_labels_batches_ties_and_noise(net: Net) -> None:
    images, problem = make_images(8), sizes(net)
    tied = Problem(problem.regions, ties=(Tie(("conv1", "conv2")),))
    batches = [
        (images[:5], torch.arange(5)),
        (images[5:], torch.zeros(3, dtype=torch.long)),
        (images[:0], None),
    ]
    search = Differentiable(mixing="gumbel", steps=20)
    found = [search.search_network(net, batches, GRIDS, tied, {"bytes": 2700.0}, seed) for seed in (0, 0)]
    assert found[0] is not None and found[0] == found[1] and found[0].within({"bytes": 2700.0})
    assert found[0].options["conv1"] == found[0].options["conv2"]
    assert search.search_network(net, batches, GRIDS, tied, {"bytes": 10.0}) is None


def test_every_batch_has_its_turn_in_an_order_of_the_seed(net: Net) -> None:
    batches: list[tuple[Tensor, Tensor | None]] = [(make_images(1, seed), None) for seed in range(4)]
    seen: dict[int, list[Tensor]] = {}
    for seed in (0, 1):
        loss = differentiable._NetworkLoss(net, batches, {}, seed, None, 8)
        hook = loss.graph.register_forward_pre_hook(
            lambda _, given, seed=seed: seen.setdefault(seed, []).append(given[0])
        )
        for step in range(8):
            loss(torch.zeros(1, 1), step)
        hook.remove()
    places = {
        seed: list(dict.fromkeys(next(i for i, b in enumerate(batches) if b[0] is x) for x in shown))
        for seed, shown in seen.items()
    }
    assert sorted(places[0]) == sorted(places[1]) == [0, 1, 2, 3] and places[0] != places[1]


def test_float_is_an_option(net: Net) -> None:
    problem = width_problem({"fc": {4: 0.0, 8: 0.0}}, {"fc": 80})
    grids: dict[str, QuantSpec | None] = {"w4": GRIDS["w2"], "w8": None}
    mixtures = differentiable._mixtures(net, tabulate(problem), grids, "mse")
    stack = mixtures["fc"][1]
    assert torch.equal(stack[1], net.layer("fc").module.weight) and len(stack[0].unique()) <= 3 * 5  # type: ignore[arg-type]


def test_bad_input_is_told(net: Net) -> None:
    problem, images = sizes(net), [(make_images(2), None)]
    search: Any = Differentiable(steps=1).search_network
    with pytest.raises(DataError) as caught:
        search(net, [(make_images(2)[:0], None)], GRIDS, problem, {})
    assert str(caught.value) == "differentiable search: no image came; give at least one batch"
    with pytest.raises(RecipeError) as wrong:
        search(net, images, {"w2": None, "w4": None}, problem, {})
    assert str(wrong.value) == "region 'stem': option 'w8' has no grid; there are w2, w4"
    with pytest.raises(RecipeError) as wrong:
        search(net, images, GRIDS, width_problem({"conv9": {2: 0.0}}, {"conv9": 4}), {})
    assert str(wrong.value) == (
        "residual: region 'conv9' is no convolution or matrix product of it; `fewbit inspect` lists them"
    )
    told = (
        "residual: differentiable search reads a float network whose BatchNorms are folded; "
        "run the recipe 'float32' on it first"
    )
    placed, _ = run_recipe(read_recipe("int8"), make_net("residual"), make_context())
    for other in (placed, make_net("residual")):
        with pytest.raises(RecipeError) as wrong:
            search(other, images, GRIDS, problem, {})
        assert str(wrong.value) == told
    with pytest.raises(RecipeError, match="limits: there is no 'kb'; there are loss, bytes"):
        search(net, images, GRIDS, problem, {"kb": 1.0})
