"""Small problems made by chance, and every assignment of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from hypothesis import strategies as st

from fewbit.errors import RecipeError
from fewbit.search.mixed.problem import Assignment, Boundary, Option, Problem, Region, Tie, evaluate

NAMES = ("int8", "bf16", "float32")


def chain(losses: list[tuple[float, ...]], ms: list[tuple[float, ...]], reorder_ms: float = 0.0) -> Problem:
    """Make regions a, b, c, ... in a row; neighbours that differ cost a reorder."""
    letters = "abcdefghijklmnopqrstuvwxyz"[: len(losses)]
    regions = [
        Region(letter, tuple(Option(n, x, {"ms": t}) for n, x, t in zip(NAMES, loss, time, strict=False)))
        for letter, loss, time in zip(letters, losses, ms, strict=True)
    ]
    differ = {(one, other): {"ms": reorder_ms} for one in NAMES for other in NAMES if one != other}
    known = [{option.name for option in region.options} for region in regions]
    boundaries = [
        Boundary(
            letters[at],
            letters[at + 1],
            {
                pair: cost
                for pair, cost in differ.items()
                if pair[0] in known[at] and pair[1] in known[at + 1]
            },
        )
        for at in range(len(letters) - 1)
        if reorder_ms
    ]
    return Problem(tuple(regions), tuple(boundaries))


def every_assignment(problem: Problem) -> list[Assignment]:
    """Return all that ties and fixed regions allow."""
    found = []
    for group_options in itertools.product(*(problem.options_of(group) for group in problem.groups)):
        options = {
            region: option
            for group, option in zip(problem.groups, group_options, strict=True)
            for region in group
        }
        found.append(evaluate(problem, options))
    return found


def least(problem: Problem, limits: Mapping[str, float], objective: str = "loss") -> float | None:
    """Return the least objective inside limits by trying everything."""
    inside = [one.value(objective) for one in every_assignment(problem) if one.within(limits)]
    return min(inside, default=None)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to five regions with up to three options, two costs, boundaries, ties and fixed regions.

    Numbers are whole or not, negative too; with whole ones many assignments are equal.
    """
    whole = draw(st.booleans())

    def number(low: int, high: int) -> float:
        if whole:
            return float(draw(st.integers(low, high)))
        return draw(st.integers(1000 * low, 1000 * high)) / 999

    regions = []
    for place in range(draw(st.integers(1, 5))):
        names = draw(st.permutations(NAMES))[: draw(st.integers(1, 3))]
        options = tuple(
            Option(name, number(0, 5), {"ms": number(-2, 6), "kb": number(0, 4)}) for name in names
        )
        regions.append(Region(f"r{place}", options))
    boundaries = []
    for _ in range(draw(st.integers(0, 5)) if len(regions) > 1 else 0):
        first, second = draw(st.permutations(regions))[:2]
        pairs = [(one.name, other.name) for one in first.options for other in second.options]
        costs = {pair: {"ms": number(-2, 4)} for pair in pairs if draw(st.booleans())}
        boundaries.append(Boundary(first.name, second.name, costs))
    names_of = [region.name for region in regions]
    ties, fixed = [], {}
    if len(regions) > 1 and draw(st.booleans()):
        ties.append(Tie(tuple(draw(st.permutations(names_of))[: draw(st.integers(2, len(regions)))])))
    if draw(st.booleans()):
        region = draw(st.sampled_from(regions))
        fixed[region.name] = draw(st.sampled_from(region.options)).name
    base = {"ms": number(0, 3)}
    try:
        return Problem(tuple(regions), tuple(boundaries), tuple(ties), fixed, base)
    except RecipeError:  # tied regions with nothing in common
        return Problem(tuple(regions), tuple(boundaries), (), fixed, base)
