"""Sorting by two or more things that should all be small."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def ranks(values: Floats) -> NDArray[np.int64]:
    """Return the non-dominated front that each row is in, 0 for those that no other dominates.

    A row dominates another that is nowhere smaller and somewhere larger. Front 1 is what is not dominated
    when front 0 is taken away, and so on.

    Args:
        values: What should be small (N, columns).

    Source: K. Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, 2002, section III.

    Example:
        >>> ranks(np.array([[1.0, 4.0], [2.0, 2.0], [3.0, 3.0], [4.0, 1.0], [4.0, 4.0]])).tolist()
        [0, 0, 1, 0, 2]
    """
    no_worse = (values[:, None] <= values[None]).all(-1)
    dominates = no_worse & ~no_worse.T
    found = np.full(len(values), -1)
    front = 0
    while (found < 0).any():
        left = found < 0
        free = left & ~(dominates & left[:, None]).any(0)
        found[free] = front
        front += 1
    return found


def crowding(values: Floats) -> Floats:
    """Return how much room each row has: the sum over columns of the distance between its two neighbours.

    Distances are shares of the column's range; rows at an end have infinite room.

    Args:
        values: (N, columns).

    Source: K. Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, 2002, section III.
    Differs: rows are compared with all others, not those of their own front.

    Example:
        >>> crowding(np.array([[0.0, 4.0], [1.0, 2.0], [4.0, 0.0]])).tolist()
        [inf, 2.0, inf]
    """
    room = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        apart = column[order[-1]] - column[order[0]]
        room[order[[0, -1]]] = np.inf
        if apart > 0:
            room[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / apart
    return room
