from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.search.mixed.evolve import Evolve
from fewbit.search.mixed.front import front
from fewbit.search.mixed.greedy import Greedy
from fewbit.search.mixed.integer_program import solve
from fewbit.search.mixed.problem import LOSS, Option, Problem, Region
from fewbit.search.mixed.table import tabulate
from hawq_v3 import hawq_problem
from made_problems import chain, every_assignment, problems


def row_of_regions(seed: int, regions: int = 16) -> Problem:
    rng = np.random.default_rng(seed)
    losses = [(float(x), float(x) * 0.05, 0.0) for x in rng.lognormal(-3, 1.5, regions)]
    ms = [(float(x), float(x * 1.3), float(x * 2)) for x in rng.lognormal(0, 1, regions)]
    return chain(losses, ms, reorder_ms=0.3)


def limit_of(problem: Problem) -> float:
    times = [[option.costs["ms"] for option in region.options] for region in problem.regions]
    return sum(time[0] + 0.4 * (time[-1] - time[0]) for time in times)


def test_it_is_never_worse_than_greedy_and_mostly_better_where_reorders_bind_regions() -> None:
    better = 0
    for seed in range(6):
        problem = row_of_regions(seed)
        limits = {"ms": limit_of(problem)}
        found, greedy = Evolve().search(problem, limits), Greedy().search(problem, limits)
        exact = solve(problem, limits)
        assert found is not None and greedy is not None and exact is not None
        assert exact.loss - 1e-9 <= found.loss <= greedy.loss + 1e-12
        better += found.loss < greedy.loss - 1e-9
    assert better >= 3


def test_one_generation_of_nothing_but_parents_is_greedy() -> None:
    problem = row_of_regions(0)
    limits = {"ms": limit_of(problem)}
    plain = Evolve(generations=1, population=4, crossover=0, mutation=0, stretches=0)
    assert plain.search(problem, limits) == Greedy().search(problem, limits)


def test_finalists_are_the_best_in_order_and_differ() -> None:
    problem = hawq_problem()
    limits = {"ms": 4.24618}
    found = Evolve().finalists(problem, limits)
    assert len(found) == 5 and all(one.within(limits) for one in found)
    assert [one.loss for one in found] == sorted(one.loss for one in found)
    assert len({tuple(one.options.values()) for one in found}) == 5
    assert found[0] == Evolve().search(problem, limits) == solve(problem, limits)
    assert Evolve().finalists(problem, limits, count=2) == found[:2]
    assert Evolve().finalists(problem, {"ms": 1.0}) == ()


def test_the_seed_decides() -> None:
    problem = row_of_regions(3, 26)
    limits = {"ms": limit_of(problem)}
    some = [Evolve(generations=20).finalists(problem, limits, seed) for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2]


def test_children_are_of_both_parents_and_move_one_level() -> None:
    regions = tuple(Region(f"r{p}", tuple(Option(f"w{b}", 0.0, {}) for b in range(2, 9))) for p in range(200))
    table, rng = tabulate(Problem(regions)), np.random.default_rng(0)
    fathers = np.stack([np.full(200, 1), np.full(200, 4)])
    crossed = Evolve(mutation=0, stretches=0)._children(table, fathers, rng)
    assert set(np.unique(crossed)) == {1, 4} and crossed.shape == (40, 200)
    both = [child for child in crossed if len(set(child.tolist())) == 2]
    assert abs(np.mean([np.mean(child == 4) for child in both]) - 0.5) < 0.03
    moved = Evolve(mutation=0.1, mutations=1e9, crossover=0, stretches=0)._children(table, fathers[:1], rng)
    assert set(np.unique(moved)) == {0, 1, 2} and abs(np.mean(moved != 1) - 0.1) < 0.01
    few = Evolve(mutation=0.1, mutations=2.0, crossover=0, stretches=0)._children(table, fathers[:1], rng)
    assert abs(np.sum(few != 1) / 40 - 2.0) < 1.0
    stretched = Evolve(mutation=0, crossover=0, stretches=1)._children(table, fathers[:1], rng)
    for child in stretched:
        changed = np.flatnonzero(child != 1)
        assert len(changed) == 0 or changed[-1] - changed[0] == len(changed) - 1
    assert (stretched != 1).any(1).sum() > 25


def test_levels_end_at_the_first_and_last_option() -> None:
    regions = (Region("a", (Option("x", 0.0, {}),)), Region("b", tuple(Option(n, 0.0, {}) for n in "xyz")))
    table = tabulate(Problem(regions))
    children = Evolve(mutation=1, mutations=9, stretches=0.5)._children(
        table, np.array([[0, 0], [0, 2]]), np.random.default_rng(0)
    )
    assert (children >= 0).all() and (children < table.counts).all()


@settings(deadline=None, max_examples=25)
@given(problems(), st.integers(0, 3))
def test_small_fronts_are_exact_and_none_is_beyond(problem: Problem, seed: int) -> None:
    exact = front(problem, "ms", points=None).points
    found = Evolve(generations=30).front(problem, "ms", seed)
    spots = [(round(one.costs["ms"], 6), round(one.loss, 6)) for one in found]
    known = [(round(one.costs["ms"], 6), round(one.loss, 6)) for one in exact]
    assert spots == sorted(spots) and all(one in every_assignment(problem) for one in found)
    for ms, loss in spots:
        assert any(c <= ms + 1e-6 and x <= loss + 1e-6 for c, x in known)
    assert spots[0][1] >= spots[-1][1] and len(set(spots)) == len(spots)


def test_the_front_of_hawq_v3_is_nearly_the_exact_one() -> None:
    problem = hawq_problem()
    exact, found = front(problem, "ms").points, Evolve().front(problem, "ms")
    assert found[0] == exact[0] and found[-1] == exact[-1]
    gains = []
    for point in exact[1:]:
        best = min(one.loss for one in found if one.within({"ms": point.costs["ms"]}))
        gains.append((exact[0].loss - best) / (exact[0].loss - point.loss))
    assert max(gains) <= 1 + 1e-9 and float(np.mean(gains)) > 0.97
    assert Evolve().front(problem, "ms") == found != Evolve().front(problem, "ms", seed=1)


def test_other_objectives_and_limits_on_the_loss() -> None:
    problem = hawq_problem()
    found = Evolve().search(problem, {LOSS: 0.2, "mib": 9.0}, objective="ms")
    exact = solve(problem, {LOSS: 0.2, "mib": 9.0}, "ms")
    assert found is not None and exact is not None and found.within({LOSS: 0.2, "mib": 9.0})
    assert exact.costs["ms"] <= found.costs["ms"] <= 1.01 * exact.costs["ms"]
