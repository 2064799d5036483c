"""The exact Pareto front of loss against one cost, by one integer program after another."""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fewbit.errors import RecipeError
from fewbit.search.mixed.integer_program import Program
from fewbit.search.mixed.problem import LOSS, Assignment, Problem
from fewbit.search.mixed.table import tabulate

_NEAR = 1e-6


@dataclass(frozen=True)
class Front:
    """Assignments none of which is beaten in one of loss and cost without being worse in the other.

    Attributes:
        cost: Name of the cost.
        points: In order of the cost, the loss falling.
        complete: There is no other point; else there are more between these.
        programs: How many integer programs were solved.
        seconds: How long that took.
    """

    cost: str
    points: tuple[Assignment, ...]
    complete: bool
    programs: int
    seconds: float = field(compare=False)

    def within(self, limit: float) -> Assignment | None:
        """Return the point of least loss whose cost is within a limit, none where the cheapest is not."""
        inside = [point for point in self.points if point.within({self.cost: limit})]
        return inside[-1] if inside else None


def front(
    problem: Problem,
    cost: str = "ms",
    limits: Mapping[str, float] | None = None,
    points: int | None = 100,
    gap: float = 0.0,
) -> Front:
    """Return the Pareto front of loss against a cost, every point of it or an even choice.

    The limit on the cost is put just below the cost of the last answer, and the program solved again, until
    no answer is left: each point is the least loss at its limit, and of equal losses the least cost. Where
    points are capped, limits go down by at least a share of 1 / `points` of the whole cost first; then the
    widest gaps are walked through, until all are, or there are as many points as may be.

    Args:
        problem: What may be chosen.
        cost: Name of the cost.
        limits: On other costs, or on the loss.
        points: Most points; none for all of them.
        gap: Of each integer program; see `IntegerProgram`.

    Returns:
        The front; without a point where the limits leave nothing. Costs nearer than 1e-6 of how far they
        lie apart count as the same.

    Raises:
        RecipeError: The cost or a limit is of none of the problem's, or `points` is less than 2.

    Source: Y. Haimes et al., On a bicriterion formulation of the problems of integrated system
    identification and system optimization, 1971 (the limit as a parameter); G. Mavrotas, Effective
    implementation of the epsilon-constraint method, 2009 (of equal losses the least cost).
    Differs: capped fronts are spread by a least step, where grids of limits find one point several times.

    Example:
        >>> from fewbit.search.mixed.problem import Option, Problem, Region
        >>> layers = [Region(n, (Option("w4", s, {"kb": k}), Option("w8", 0.0, {"kb": 2 * k})))
        ...           for n, s, k in (("conv1", 0.3, 1.0), ("conv2", 0.2, 4.0), ("fc", 0.1, 2.0))]
        >>> found = front(Problem(tuple(layers)), "kb")
        >>> [(point.costs["kb"], round(point.loss, 6)) for point in found.points]
        [(7.0, 0.6), (8.0, 0.3), (10.0, 0.2), (12.0, 0.1), (14.0, 0.0)]
    """
    if points is not None and points < 2:
        raise RecipeError(f"front: {points} points are too few; give 2 or more, or none for all")
    given = dict(limits or {})
    problem.check_limits({**given, cost: 0.0})
    start = time.perf_counter()
    walk = _Walk(Program(tabulate(problem), gap), cost, given)
    complete = walk.go(points)
    kept: list[Assignment] = []
    for point in sorted(walk.found, key=lambda one: (one.value(cost), one.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return Front(cost, tuple(kept), complete, walk.program.solved, time.perf_counter() - start)


class _Gap(NamedTuple):
    """Costs between which points may lie.

    Attributes:
        order: The width, negative, so that the widest comes first.
        place: Tells gaps of one width apart.
        low: No point is between the one below and this cost.
        high: Cost of the point above.
        below: The nearest point below.
    """

    order: float
    place: int
    low: float
    high: float
    below: Assignment


class _Walk:
    """Answers at falling limits."""

    def __init__(self, program: Program, cost: str, limits: Mapping[str, float]) -> None:
        self.program, self.cost, self.limits = program, cost, limits
        self.found: list[Assignment] = []
        self.near = _NEAR * program.spread[program.columns[cost]]

    def go(self, points: int | None) -> bool:
        """Collect points; say whether these are all."""
        top, bottom = self._least(LOSS, None), self._least(self.cost, None)
        if top is None or bottom is None:
            return True
        most, least = top.value(self.cost), bottom.value(self.cost)
        self.found = [top]
        if most - least <= self.near:
            return True
        self.found.append(bottom)
        step = 0.0 if points is None else (most - least) / points
        gaps, above = list[_Gap](), most
        while (limit := above - max(step, self.near)) > least + self.near:
            if points is not None and len(self.found) >= points:
                return False
            point = self._least(LOSS, limit) or bottom
            if above - limit > self.near:
                gaps.append(_Gap(limit - above, len(gaps), limit, above, point))
            above = point.value(self.cost)
            if above - least > self.near:
                self.found.append(point)
        gaps.append(_Gap(least - above, len(gaps), least, above, bottom))
        return self._fill(gaps, points)

    def _fill(self, gaps: list[_Gap], points: int | None) -> bool:
        """Walk through gaps, the widest first."""
        heapq.heapify(gaps)
        while gaps:
            gap = heapq.heappop(gaps)
            if gap.high - gap.low <= 2 * self.near:
                continue
            if points is not None and len(self.found) >= points:
                return False
            point = self._least(LOSS, gap.high - self.near, gap.below) or gap.below
            cost = point.value(self.cost)
            if cost > gap.low + self.near:
                self.found.append(point)
                heapq.heappush(gaps, gap._replace(order=gap.low - cost, high=cost))
        return True

    def _least(
        self, objective: str, limit: float | None, known: Assignment | None = None
    ) -> Assignment | None:
        limits = dict(self.limits)
        if limit is not None:
            limits[self.cost] = min(limit, limits.get(self.cost, limit))
        other = self.cost if objective == LOSS else LOSS
        return self.program.least(objective, [other], limits, known)
