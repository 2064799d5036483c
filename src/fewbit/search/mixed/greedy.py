"""The greedy answer: one region after another, the least loss for what it saves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from fewbit.search.mixed.problem import LOSS, Assignment, Problem
from fewbit.search.mixed.table import Choice, Floats, Table, tabulate
from fewbit.spec import Frozen

Counts = Literal["whole", "missing", "alone"]
"""What a change is worth: its loss for all that it saves, for what is still missing, or that alone."""
_NEAR = 1e-12
_LONGEST = 8  # of blocks, where one so long helps: growing all from everywhere takes a minute at 150 regions
_ROUNDING = 5e-13  # of a sum, beside the 1e-12 by which assignments are held against limits


class Greedy(Frozen):
    """Lower the region that loses least for what it saves, until every limit holds.

    From the most precise assignment, again and again the change of one region with the least::

        d loss / d cost     cost = sum over limits exceeded of cost / range of the cost

    where a change of cost counts what the boundaries to the neighbours cost more or less. A region may go
    down several levels at once, so every step follows the lower convex hull of its options. Where no change
    of one region saves anything, since a region alone pays its boundaries for nothing, neighbours go
    together: from each region a block grows by the neighbour that saves most, and the best block is taken.
    At the end what still fits is raised again, the most gained for its cost first. That is done three times
    and the best returned: as it stands, with only what is still missing counted as saved, and raising from
    the cheapest assignment. Where no way leads inside the limits, it goes by what is saved alone, from the
    cheapest and from all uniform assignments.

    It proves nothing: where several limits or boundaries hold each other, it may find nothing though there
    is something.

    Source: Z. Dong et al., HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks, 2019,
    arXiv 1911.03852 (sensitivity against size); the ratio: G. Dantzig, Discrete-Variable Extremum Problems,
    1957.
    Differs: boundaries are in the cost of a change; blocks, where single changes save nothing; raising at
    the end; the best of three ways, for each alone misses up to 5 % of the gain on HAWQ-V3's ResNet-18;
    several limits at once.

    Example:
        >>> from fewbit.search.mixed.problem import Option, Problem, Region
        >>> layers = [Region(n, (Option("w4", s, {"kb": k}), Option("w8", 0.0, {"kb": 2 * k})))
        ...           for n, s, k in (("conv1", 0.3, 1.0), ("conv2", 0.2, 4.0), ("fc", 0.1, 2.0))]
        >>> found = Greedy().search(Problem(tuple(layers)), {"kb": 10.0})
        >>> found.options, found.loss, found.costs
        ({'conv1': 'w8', 'conv2': 'w4', 'fc': 'w8'}, 0.2, {'kb': 10.0})
    """

    def search(
        self, problem: Problem, limits: Mapping[str, float], seed: int = 0, objective: str = LOSS
    ) -> Assignment | None:
        """Return what greedy search finds; see `Searcher.search`. No chance is in it."""
        problem.check_limits(limits, objective)
        table = tabulate(problem)
        choice = choose_greedily(table, limits, objective)
        return None if choice is None else table.assignment(choice)


def choose_greedily(
    table: Table, limits: Mapping[str, float], objective: str = LOSS, start: Choice | None = None
) -> Choice | None:
    """Return the choice (G,) that greedy search finds, none where it ends outside a limit.

    Args:
        table: The problem.
        limits: By column.
        objective: The column to keep low.
        start: Where to start; at the least objective of each group where none.
    """
    shares = dict.fromkeys(limits, 1e-9)  # of equal options the cheapest
    top = least_choice(table, shares | {objective: 1.0}) if start is None else start
    bottom = least_choice(table, dict.fromkeys(limits, 1.0))
    ways: list[tuple[Choice, Counts]] = [(top, "whole"), (top, "missing"), (bottom, "missing")]
    found = [_go(table, limits, objective, first, counts) for first, counts in ways]
    if all(choice is None for choice in found):
        others = (bottom, *uniform_choices(table))
        found = [_go(table, limits, objective, first, "alone") for first in others]
    order = [table.columns.index(objective), *(table.columns.index(name) for name in limits)]
    inside = [choice for choice in found if choice is not None]
    return min(inside, key=lambda choice: tuple(table.totals(choice)[order]), default=None)


def least_choice(table: Table, columns: Mapping[str, float]) -> Choice:
    """Return for each group the option of the least weighted sum of columns, boundaries left out."""
    weights = np.array([columns.get(name, 0.0) for name in table.columns]) / table.spread()
    sums = np.where(table.allowed(), table.values @ weights, np.inf)
    return np.asarray(sums.argmin(1), np.int64)


def uniform_choices(table: Table) -> Iterator[Choice]:
    """Give, for each option that some group has, the choice of it wherever it is open, else the first."""
    for option in dict.fromkeys(name for names in table.names for name in names):
        yield np.array([names.index(option) if option in names else 0 for names in table.names])


def _go(
    table: Table, limits: Mapping[str, float], objective: str, start: Choice, counts: Counts
) -> Choice | None:
    """Lower from a start until all limits hold, and raise what fits; none where a limit is exceeded."""
    walk = _Walk(table, limits, objective, start, counts)
    walk.lower()
    if not table.assignment(walk.choice).within(limits):
        return None
    walk.raise_what_fits()
    return walk.choice


class _Walk:
    """A choice that changes, with what each change of it would add."""

    def __init__(
        self, table: Table, limits: Mapping[str, float], objective: str, choice: Choice, counts: Counts
    ) -> None:
        self.table, self.choice, self.counts = table, choice.copy(), counts
        self.spread = table.spread()
        most = table.limits_of(limits)
        self.limited = np.isfinite(most)
        self.most = most + _ROUNDING * np.where(self.limited, np.maximum(1.0, np.abs(most)), 0.0)
        self.objective = table.columns.index(objective)
        self.options = [name for names in table.names for name in names]
        self.neighbours: list[list[tuple[int, Floats]]] = [[] for _ in table.groups]
        for (first, second), values in zip(table.pairs, table.pair_values, strict=True):
            self.neighbours[first].append((second, values))
            self.neighbours[second].append((first, values.transpose(1, 0, 2)))
        self.totals = table.totals(self.choice)
        self.changes = np.stack([self._changes_of(g, self.choice) for g in range(len(choice))])
        self.open = table.allowed()

    def lower(self) -> None:
        """Change regions until no limit is exceeded, or nothing helps."""
        while self._excess(self.totals) > 0:
            moves = self._best_single() or self._best_block(_LONGEST) or self._best_block(len(self.choice))
            if not moves:
                return
            self._take(moves)

    def raise_what_fits(self) -> None:
        """Change single regions to a lower objective while all limits hold."""
        while True:
            gains = -self.changes[..., self.objective] / self.spread[self.objective]
            fits = (self.totals + self.changes <= self.most).all(-1)
            added = (self.changes / self.spread)[..., self.limited].sum(-1)
            worth = np.where(self.open & fits & (gains > _NEAR), gains / np.maximum(added, _NEAR), 0.0)
            at = np.unravel_index(worth.argmax(), worth.shape)
            if worth[at] <= 0:
                return
            self._take({int(at[0]): int(at[1])})

    def _best_single(self) -> dict[int, int]:
        """Return the change of one group that is worth most, none where none lowers the excess."""
        saved = self._saved(self.totals + self.changes)
        worth = self._worth(self.changes[..., self.objective], np.where(self.open, saved, 0.0))
        at = np.unravel_index(worth.argmin(), worth.shape)
        return {int(at[0]): int(at[1])} if np.isfinite(worth[at]) else {}

    def _best_block(self, longest: int) -> dict[int, int]:
        """Return the change of up to `longest` neighbours to one option that is worth most, if any helps."""
        best, least = dict[int, int](), np.inf
        for option in dict.fromkeys(self.options):
            level = [names.index(option) if option in names else -1 for names in self.table.names]
            for seed in range(len(level)):
                for moves, totals in itertools.islice(self._blocks(seed, level), longest - 1):
                    added = np.asarray(totals[self.objective] - self.totals[self.objective])
                    worth = float(self._worth(added, self._saved(totals)))
                    if worth < least:
                        best, least = dict(moves), worth
        return best

    def _blocks(self, seed: int, level: list[int]) -> Iterator[tuple[dict[int, int], Floats]]:
        """Give blocks that grow from a group by the neighbour that leaves least excess, and their totals."""
        choice, totals, moves = self.choice.copy(), self.totals, dict[int, int]()
        edge = {seed} if level[seed] not in (-1, choice[seed]) else set()
        while edge:
            after = {g: totals + self._changes_of(g, choice)[level[g]] for g in sorted(edge)}
            chosen = min(after, key=lambda g: (self._excess(after[g]), after[g][self.objective], g))
            totals = after[chosen]
            choice[chosen] = moves[chosen] = level[chosen]
            edge |= {g for g, _ in self.neighbours[chosen] if level[g] not in (-1, choice[g])}
            edge -= moves.keys()
            if len(moves) > 1:
                yield moves, totals

    def _take(self, moves: Mapping[int, int]) -> None:
        for group, option in moves.items():
            self.choice[group] = option
        self.totals = self.table.totals(self.choice)
        touched = set(moves).union(*({other for other, _ in self.neighbours[group]} for group in moves))
        for group in touched:
            self.changes[group] = self._changes_of(group, self.choice)

    def _changes_of(self, group: int, choice: Choice) -> Floats:
        """Return what each option of a group would add to each column (K, columns)."""
        values = self.table.values[group].copy()
        for other, between in self.neighbours[group]:
            values += between[:, choice[other]]
        return np.asarray(values - values[choice[group]])

    def _saved(self, totals: Floats) -> Floats:
        """Return what totals (..., columns) save, as a sum of shares; 0 where they exceed limits no less."""
        missing = self._excess(self.totals) - self._excess(totals)
        if self.counts != "whole":
            return missing
        over = self.totals > self.most
        beyond = np.maximum(0.0, totals - self.most) / self.spread
        whole = np.where(over, (self.totals - totals) / self.spread, -beyond).sum(-1)
        return np.asarray(np.where(missing > _NEAR, whole, 0.0))

    def _excess(self, totals: Floats) -> Floats:
        """Return by how much totals (..., columns) exceed the limits, as a sum of shares."""
        over = np.maximum(0.0, totals - self.most) / self.spread
        return np.asarray(over.sum(-1))

    def _worth(self, added: Floats, saved: Floats) -> Floats:
        """Return what is to be least: the objective added for what is saved; what is free goes first."""
        free = (added <= 0) | (self.counts == "alone")
        ratio = np.where(free, -saved, added / self.spread[self.objective] / np.maximum(saved, _NEAR))
        return np.asarray(np.where(saved > _NEAR, ratio, np.inf))
