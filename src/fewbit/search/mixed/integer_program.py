"""The exact answer: an integer program solved by branch and bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array, vstack

from fewbit.errors import FewbitError
from fewbit.search.mixed.problem import LOSS, Assignment, Problem
from fewbit.search.mixed.quiet import quiet_stdout
from fewbit.search.mixed.table import Choice, Floats, Table, tabulate
from fewbit.spec import Frozen

_SCALE = 1e6
"""The solver compares to 1e-6; rows and objective reach this far, so that this is little of their range."""
_SLACKS = (1e-8, -1e-6)
"""Limits are this share of the range looser for the solver, for it takes those it can just meet for unmet.
Where it goes on answering what is over the limit by its tolerance, they are tighter."""
_PATIENCE = 10
_EQUAL = 1e-7
"""Losses or costs nearer than this share of their range count as equal."""
_INFEASIBLE = 2


class IntegerProgram(Frozen):
    """The least loss inside all limits, proven by an integer program.

    With x_ik = 1 where region i has option k, and y_ijkl = x_ik x_jl at each boundary::

        min  sum_ik loss_ik x_ik
        s.t. sum_k x_ik = 1
             base_c + sum_ik cost_cik x_ik + sum_ijkl cost_cijkl y_ijkl <= limit_c    for each cost c
             sum_l y_ijkl = x_ik     sum_k y_ijkl = x_jl     x, y in {0, 1}

    The last line makes each y that product; where boundaries close no circle, the program without limits
    needs no branching. Tied regions share one x. Of losses nearer than 1e-7 of how far they lie apart, which
    counts as equal, the one of least cost is taken. HiGHS solves it by branch and bound, the same each time.

    Attributes:
        gap: Stop where the answer is proven to be within this share of the least; 0 goes on to the end.

    Source: Z. Yao et al., HAWQ-V3: Dyadic Neural Network Quantization, 2021, arXiv 2011.10680;
    the boundaries' linearisation: M. Schlesinger, Syntactic analysis of two-dimensional visual signals in
    noisy conditions, 1976, as in T. Werner, A Linear Programming Approach to Max-sum
    Problem: A Review, 2007.
    Differs: what neighbours cost when they differ is in the program; any number of limits, on the loss too;
    any cost may be what is least.

    Example:
        >>> from fewbit.search.mixed.problem import Option, Problem, Region
        >>> layers = [Region(n, (Option("w4", s, {"kb": k}), Option("w8", 0.0, {"kb": 2 * k})))
        ...           for n, s, k in (("conv1", 0.3, 1.0), ("conv2", 0.2, 4.0), ("fc", 0.1, 2.0))]
        >>> found = IntegerProgram().search(Problem(tuple(layers)), {"kb": 10.0})
        >>> found.options, found.loss, found.costs
        ({'conv1': 'w8', 'conv2': 'w4', 'fc': 'w8'}, 0.2, {'kb': 10.0})
    """

    gap: float = Field(0.0, ge=0, lt=1)

    def search(
        self, problem: Problem, limits: Mapping[str, float], seed: int = 0, objective: str = LOSS
    ) -> Assignment | None:
        """Return the optimum, none where the limits leave nothing; see `Searcher.search`."""
        return solve(problem, limits, objective, self.gap)


def solve(
    problem: Problem, limits: Mapping[str, float], objective: str = LOSS, gap: float = 0.0
) -> Assignment | None:
    """Return the assignment of the least objective inside all limits.

    Args:
        problem: What may be chosen.
        limits: By name of a cost, or of the loss, the most that it may be.
        objective: The loss, or a cost by its name.
        gap: Share of the objective that the answer may be from the least.

    Returns:
        The optimum; of equal ones that of the least limited cost (the sum of their shares, of several).
        None where no assignment is inside the limits.

    Raises:
        RecipeError: A limit or the objective is of no cost of the problem, or a limit is not a number.
    """
    problem.check_limits(limits, objective)
    others = [name for name in limits if name != objective] or [n for n in problem.columns if n != objective]
    return Program(tabulate(problem), gap).least(objective, others, limits)


class Program:
    """A table as an integer program.

    Args:
        table: The problem.
        gap: Share of the objective that an answer may be from the least.

    Attributes:
        solved: How many times a solver was asked.
    """

    def __init__(self, table: Table, gap: float = 0.0) -> None:
        self.table, self.gap, self.solved = table, gap, 0
        self.spread = table.spread()
        self.columns = {name: place for place, name in enumerate(table.columns)}
        self._own = np.flatnonzero(table.allowed().ravel())
        self._own_at = np.full(table.values.shape[:2], -1)
        self._own_at[table.allowed()] = np.arange(len(self._own))
        self._both = [
            (edge, one, other)
            for edge, (i, j) in enumerate(table.pairs)
            for one in range(table.counts[i])
            for other in range(table.counts[j])
        ]
        self.structure, self.sides = self._structure()
        # What every choice has at least is taken out of the numbers, which keeps them small.
        least = np.where(table.allowed()[..., None], table.values, np.inf).min(1)
        relative = (table.values - least[:, None]).reshape(-1, len(table.columns))[self._own]
        between = [table.pair_values[pair] for pair in self._both]
        self.coefficients: Floats = np.vstack([relative, *between])
        self.base = table.base + least.sum(0)

    def least(
        self,
        objective: str,
        others: Sequence[str],
        limits: Mapping[str, float],
        known: Assignment | None = None,
    ) -> Assignment | None:
        """Return the assignment of the least objective inside the limits; of equal ones that of least others.

        Args:
            objective: A column.
            others: Columns whose shares of their spread are summed to tell equal ones apart.
            limits: By column.
            known: An assignment inside the limits that is the answer unless the objective can be less.
        """
        found = self._inside(self._weights([objective]), limits, limits, _PATIENCE)
        if found is None or not others:
            return found
        apart = _EQUAL * self.spread[self.columns[objective]]
        if known is not None and found.value(objective) >= known.value(objective) - apart:
            return known
        value, most = found.value(objective), limits.get(objective, np.inf)
        asked = {**limits, objective: min(value + apart / 2, most)}
        accepted = {**limits, objective: min(value + apart, most)}
        return self._inside(self._weights(others), asked, accepted, 2) or found

    def _weights(self, columns: Sequence[str]) -> Floats:
        weights = np.zeros(len(self.columns))
        for name in columns:
            weights[self.columns[name]] = 1 / self.spread[self.columns[name]]
        return weights

    def _inside(
        self, weights: Floats, limits: Mapping[str, float], accepted: Mapping[str, float], patience: int
    ) -> Assignment | None:
        """Return the least weighted sum inside limits.

        The sums rounded once are held against what is accepted. A choice that only the solver's tolerance
        lets pass is forbidden, and the program solved again; after so many, with tighter limits.
        """
        for slack in _SLACKS:
            forbidden: list[Choice] = []
            while len(forbidden) < patience:
                choice = self._solve(weights, limits, slack, forbidden)
                if choice is None:
                    return None
                found = self.table.assignment(choice)
                if found.within(accepted):
                    return found
                forbidden.append(choice)
        return None

    def _solve(
        self, weights: Floats, limits: Mapping[str, float], slack: float, forbidden: Sequence[Choice]
    ) -> Choice | None:
        constraints = [LinearConstraint(self.structure, self.sides, self.sides)]
        rows, most = [], []
        for name, limit in limits.items():
            at = self.columns[name]
            if np.isfinite(limit):
                rows.append(self.coefficients[:, at] * (_SCALE / self.spread[at]))
                most.append(((limit - self.base[at]) / self.spread[at] + slack) * _SCALE)
        for choice in forbidden:
            rows.append(np.zeros(len(self.coefficients)))
            rows[-1][self._own_at[np.arange(len(choice)), choice]] = 1.0
            most.append(len(choice) - 1.0)
        if rows:
            constraints.append(LinearConstraint(csr_array(np.array(rows)), -np.inf, np.array(most)))
        solution = self._minimise(self.coefficients @ weights * _SCALE, constraints)
        if solution is None:
            return None
        shares = np.full(self._own_at.shape, -1.0)
        shares[self.table.allowed()] = solution[: len(self._own)]
        return np.asarray(shares.argmax(1), np.int64)

    def _minimise(self, objective: Floats, constraints: list[LinearConstraint]) -> Floats | None:
        """Return the x and y of the least objective, none where there are none.

        HiGHS's presolve at times finds programs infeasible that are not, so it has to say so without, too.
        """
        for presolve in (True, False):
            self.solved += 1
            with quiet_stdout():
                answer = milp(
                    objective,
                    integrality=np.ones(len(objective)),
                    bounds=Bounds(0, 1),
                    constraints=constraints,
                    options={"mip_rel_gap": self.gap, "presolve": presolve},
                )
            if answer.x is not None:
                return np.asarray(answer.x)
            if answer.status != _INFEASIBLE:
                raise FewbitError(
                    f"integer program of {len(self.table.groups)} regions: HiGHS gave up "
                    f"({answer.message.rstrip('.')}); take the row 'evolve', or a gap above 0"
                )
        return None

    def _structure(self) -> tuple[csr_array, Floats]:
        """Return the rows that are equal to their sides: one option a group, and y the product of two x."""
        groups = len(self.table.groups)
        at = np.repeat(np.arange(groups), self.table.counts)
        size = len(self._own) + len(self._both)
        single = coo_array((np.ones(len(at)), (at, np.arange(len(at)))), shape=(groups, size))
        row_of: dict[tuple[int, int, int], int] = {}
        entries: list[tuple[int, int, float]] = []
        for column, (edge, one, other) in enumerate(self._both, len(self._own)):
            for side, (group, option) in enumerate(zip(self.table.pairs[edge], (one, other), strict=True)):
                key = (edge, side, option)
                if key not in row_of:
                    row_of[key] = len(row_of)
                    entries.append((row_of[key], int(self._own_at[group, option]), -1.0))
                entries.append((row_of[key], column, 1.0))
        if not entries:
            return csr_array(single), np.ones(groups)
        rows, columns, values = (np.array(part) for part in zip(*entries, strict=True))
        products = coo_array((values, (rows, columns)), shape=(len(row_of), size))
        sides = np.concatenate([np.ones(groups), np.zeros(len(row_of))])
        return csr_array(vstack([single, products])), sides
