"""A problem as arrays: ties merged, fixed regions with one option, so that a choice is one index a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbit.search.mixed.problem import LOSS, Assignment, Problem, evaluate

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """The sums that a choice has.

    Attributes:
        problem: What it was made of.
        groups: The regions that each place of a choice decides.
        names: The options of each group.
        counts: How many options each group has (G,).
        values: What each option of each group adds to each column (G, K, columns); 0 beyond a group's count.
        pairs: Groups with a boundary (E, 2), each pair once.
        pair_values: What each pair of options adds (E, K, K, columns).
        base: What is there whatever is chosen (columns,).
    """

    problem: Problem
    groups: tuple[tuple[str, ...], ...]
    names: tuple[tuple[str, ...], ...]
    counts: NDArray[np.int64]
    values: Floats
    pairs: NDArray[np.int64]
    pair_values: Floats
    base: Floats

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns: the loss, then the costs."""
        return self.problem.columns

    def totals(self, choices: NDArray[Any]) -> Floats:
        """Return the sums (..., columns) of choices (..., G)."""
        own = self.values[np.arange(len(self.groups)), choices].sum(-2)
        edges = np.arange(len(self.pairs))
        between = self.pair_values[edges, choices[..., self.pairs[:, 0]], choices[..., self.pairs[:, 1]]]
        return np.asarray(self.base + own + between.sum(-2))

    def least(self) -> Floats:
        """Return a bound that no choice goes below in any column (columns,)."""
        return np.asarray(self.base + self._extreme(np.min, np.inf))

    def spread(self) -> Floats:
        """Return how far choices can lie apart at most in each column (columns,); 1 where they cannot."""
        apart = self._extreme(np.max, -np.inf) - self._extreme(np.min, np.inf)
        return np.asarray(np.where(apart > 0, apart, 1.0))

    def limits_of(self, limits: Mapping[str, float]) -> Floats:
        """Return the limit of each column, infinite where there is none."""
        return np.array([limits.get(name, np.inf) for name in self.columns])

    def assignment(self, choice: NDArray[Any]) -> Assignment:
        """Return what a choice (G,) stands for."""
        options = {
            region: self.names[place][int(option)]
            for place, option in enumerate(choice)
            for region in self.groups[place]
        }
        return evaluate(self.problem, options)

    def allowed(self) -> NDArray[np.bool_]:
        """Return which options there are (G, K)."""
        return np.asarray(np.arange(self.values.shape[1]) < self.counts[:, None])

    def _extreme(self, of: Any, beyond: float) -> Floats:
        """Return the sum of the least or largest value of each group and of each pair, a column each."""
        allowed = self.allowed()
        total = of(np.where(allowed[..., None], self.values, beyond), axis=1).sum(0)
        if len(self.pairs):
            both = allowed[self.pairs[:, 0], :, None] & allowed[self.pairs[:, 1], None, :]
            between = np.where(both[..., None], self.pair_values, beyond)
            total = total + of(between, axis=(1, 2)).sum(0)
        return np.asarray(total)


def tabulate(problem: Problem) -> Table:
    """Return the arrays of a problem.

    Boundaries inside a group count as that group's, and parallel ones are one.
    """
    groups = problem.groups
    names = tuple(problem.options_of(group) for group in groups)
    most, columns = max(map(len, names)), problem.columns
    values = np.zeros((len(groups), most, len(columns)))
    place_of = {region: place for place, group in enumerate(groups) for region in group}
    for region in problem.regions:
        place = place_of[region.name]
        for option in region.options:
            if option.name in names[place]:
                row = [option.loss, *(option.costs[name] for name in problem.costs)]
                values[place, names[place].index(option.name)] += row
    between: dict[tuple[int, int], Floats] = {}
    for boundary in problem.boundaries:
        first, second = place_of[boundary.first], place_of[boundary.second]
        for (one, other), costs in boundary.costs.items():
            if one not in names[first] or other not in names[second]:
                continue
            at = names[first].index(one), names[second].index(other)
            row = [0.0 if name == LOSS else costs.get(name, 0.0) for name in columns]
            if first == second:
                values[first, at[0]] += row if one == other else 0.0
            else:
                key, spot = ((first, second), at) if first < second else ((second, first), at[::-1])
                between.setdefault(key, np.zeros((most, most, len(columns))))[spot] += row
    between = {key: costs for key, costs in sorted(between.items()) if costs.any()}
    return Table(
        problem=problem,
        groups=groups,
        names=names,
        counts=np.array([len(group) for group in names]),
        values=values,
        pairs=np.array(list(between), dtype=np.int64).reshape(-1, 2),
        pair_values=np.array(list(between.values())).reshape(-1, most, most, len(columns)),
        base=np.array([0.0, *(problem.base_costs.get(name, 0.0) for name in problem.costs)]),
    )
