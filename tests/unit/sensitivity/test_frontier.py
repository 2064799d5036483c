from __future__ import annotations

import itertools
import random

import pytest

from fewbit.errors import RecipeError
from fewbit.sensitivity import frontier
from fewbit.sensitivity.frontier import Allocation, cheapest_within, pareto_frontier

COSTS = [{2: 5, 4: 1, 8: 0.1}, {2: 2, 4: 0.3, 8: 0.05}, {2: 0.8, 4: 0.2, 8: 0.02}]
PARAMETERS = [100, 400, 1000]


def test_worked_frontier() -> None:
    found = pareto_frontier(COSTS, PARAMETERS)
    assert [(one.size_bits, one.bits) for one in found] == [
        (3000, (2, 2, 2)),
        (3200, (4, 2, 2)),
        (3600, (8, 2, 2)),
        (4000, (4, 4, 2)),
        (4400, (8, 4, 2)),
        (6000, (8, 8, 2)),
        (6400, (8, 4, 4)),
        (8000, (8, 8, 4)),
        (12000, (8, 8, 8)),
    ]
    expected = [7.8, 3.8, 2.9, 2.1, 1.2, 0.95, 0.6, 0.35, 0.17]
    assert [one.cost for one in found] == pytest.approx(expected, rel=1e-5)
    assert cheapest_within(found, 6000).bits == (8, 8, 2)
    assert cheapest_within(found, 6399).bits == (8, 8, 2) and cheapest_within(found, 6400).bits == (8, 4, 4)
    assert cheapest_within(found, 10**9).bits == (8, 8, 8)


def test_it_is_that_of_all_allocations() -> None:
    chance = random.Random(0)
    for _ in range(20):
        layers = chance.randint(1, 5)
        costs = [{bits: chance.random() for bits in (2, 4, 8)} for _ in range(layers)]
        parameters = [chance.randint(1, 9) for _ in range(layers)]
        every = [
            (sum(n * b for n, b in zip(parameters, bits, strict=True)),
             sum(row[b] for row, b in zip(costs, bits, strict=True)))
            for bits in itertools.product((2, 4, 8), repeat=layers)
        ]  # fmt: skip
        best = sorted({
            (size, min(c for s, c in every if s == size))
            for size, cost in every
            if not any(s <= size and c < cost for s, c in every)
        })  # fmt: skip
        found = pareto_frontier(costs, parameters)
        assert [one.size_bits for one in found] == [size for size, _ in best]
        assert [one.cost for one in found] == pytest.approx([cost for _, cost in best])


def test_many_states_are_thinned_to_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(1)
    costs = [
        dict(zip((2, 4, 8), sorted(chance.sample(range(1, 1000), 3), reverse=True), strict=True))
        for _ in range(16)
    ]
    parameters = [chance.randint(1, 1000) for _ in range(16)]
    exact = pareto_frontier(costs, parameters)
    monkeypatch.setattr(frontier, "_MOST_STATES", 60)
    monkeypatch.setattr(frontier, "_BUCKETS", 50)
    found = pareto_frontier(costs, parameters)
    assert len(found) <= 52 < len(exact)
    assert found[0].bits == (2,) * 16 and found[-1].bits == exact[-1].bits
    for budget in range(exact[0].size_bits, exact[-1].size_bits, 500):
        assert cheapest_within(found, budget).cost < 1.25 * cheapest_within(exact, budget).cost


def test_fifty_layers_are_done_at_once() -> None:
    chance = random.Random(2)
    costs = [{2: 1 + chance.random(), 4: chance.random(), 8: 0.1 * chance.random()} for _ in range(50)]
    found = pareto_frontier(costs, [chance.randint(100, 2_000_000) for _ in range(50)])
    assert 500 < len(found) <= 10_000 * 3 and len(found[0].bits) == 50


def test_bad_input_is_told() -> None:
    with pytest.raises(
        RecipeError, match="3 layers have sensitivities and 2 have numbers of parameters; give"
    ):
        pareto_frontier(COSTS, [1, 2])
    with pytest.raises(RecipeError, match="layer 1 has no width; give its sensitivity at one or more"):
        pareto_frontier([{2: 1.0}, {}], [1, 2])
    with pytest.raises(RecipeError, match="2999 bits are too few, the smallest takes 3000; give more"):
        cheapest_within(pareto_frontier(COSTS, PARAMETERS), 2999)
    assert pareto_frontier([], []) == (Allocation((), 0, 0.0),)
