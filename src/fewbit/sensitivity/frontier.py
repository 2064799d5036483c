"""The frontier of bit allocations: the least total sensitivity for every size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fewbit.errors import RecipeError

_MOST_STATES = 10_000
_BUCKETS = 2_000


@dataclass(frozen=True)
class Allocation:
    """A width for each layer.

    Attributes:
        bits: In the order of the layers.
        size_bits: Parameters times bits, over all layers.
        cost: Total sensitivity.
    """

    bits: tuple[int, ...]
    size_bits: int
    cost: float


def pareto_frontier(
    costs: Sequence[Mapping[int, float]], parameters: Sequence[int]
) -> tuple[Allocation, ...]:
    """Return every allocation that no other one beats in size without being dearer.

    Total sensitivity counts as the sum of the layers'. Layers are taken in order; of the allocations to
    those so far, each is extended by every width, and one that has at least the size and at least the cost
    of another is dropped. That is exact, for the sum to come is the same for both. Beyond 10,000 allocations
    only the cheapest in each of 2,000 equal parts of the size is kept.

    Args:
        costs: For each layer its sensitivity at each width.
        parameters: Number of weights of each layer.

    Returns:
        In order of size, the cost falling.

    Raises:
        RecipeError: The lengths differ, or a layer has no width.

    Source: Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", 2020, arXiv 2001.00281,
    section 3.2.

    Example:
        >>> found = pareto_frontier([{2: 5, 4: 1, 8: 0.1}, {2: 2, 4: 0.3, 8: 0.05}], [100, 400])
        >>> [(one.size_bits, one.bits) for one in found]
        [(1000, (2, 2)), (1200, (4, 2)), (1600, (8, 2)), (2000, (4, 4)), (2400, (8, 4)), (4000, (8, 8))]
    """
    if len(costs) != len(parameters):
        raise RecipeError(
            f"bit allocation: {len(costs)} layers have sensitivities and {len(parameters)} have numbers of "
            "parameters; give one of each a layer"
        )
    states = [Allocation((), 0, 0.0)]
    for index, (row, count) in enumerate(zip(costs, parameters, strict=True)):
        if not row:
            raise RecipeError(
                f"bit allocation: layer {index} has no width; give its sensitivity at one or more"
            )
        grown = [
            Allocation((*state.bits, bits), state.size_bits + bits * count, state.cost + cost)
            for state in states
            for bits, cost in row.items()
        ]
        states = _thinned(_undominated(grown))
    return tuple(states)


def cheapest_within(frontier: Sequence[Allocation], size_bits: int) -> Allocation:
    """Return the allocation of least cost that is no larger.

    Raises:
        RecipeError: The smallest is larger.
    """
    inside = [one for one in frontier if one.size_bits <= size_bits]
    if not inside:
        least = min((one.size_bits for one in frontier), default=0)
        raise RecipeError(
            f"bit allocation: {size_bits} bits are too few, the smallest takes {least}; "
            "give more, or allow fewer bits a weight"
        )
    return min(inside, key=lambda one: (one.cost, one.size_bits))


def _undominated(states: list[Allocation]) -> list[Allocation]:
    kept: list[Allocation] = []
    for state in sorted(states, key=lambda one: (one.size_bits, one.cost, one.bits)):
        if not kept or state.cost < kept[-1].cost:
            kept.append(state)
    return kept


def _thinned(states: list[Allocation]) -> list[Allocation]:
    """Keep the cheapest of each part of the size where there are too many, and the smallest of all."""
    if len(states) <= _MOST_STATES:
        return states
    part = states[-1].size_bits / _BUCKETS
    cheapest = {int(state.size_bits / part): state for state in states}
    return _undominated([states[0], *cheapest.values()])
