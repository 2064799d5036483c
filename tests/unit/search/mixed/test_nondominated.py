from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fewbit.search.mixed.nondominated import crowding, ranks

VALUES = arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.integers(0, 4))


@settings(deadline=None)
@given(VALUES)
def test_each_front_is_what_nothing_left_dominates(values: np.ndarray) -> None:
    def dominates(one: int, other: int) -> bool:
        return bool((values[one] <= values[other]).all() and (values[one] < values[other]).any())

    left, found, front = set(range(len(values))), {}, 0
    while left:
        free = {row for row in left if not any(dominates(other, row) for other in left)}
        found |= dict.fromkeys(free, front)
        left -= free
        front += 1
    assert ranks(values).tolist() == [found[row] for row in range(len(values))]


def test_equal_rows_do_not_dominate_each_other() -> None:
    assert ranks(np.array([[1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])).tolist() == [0, 0, 1]


def test_room_is_the_distance_of_the_neighbours_in_shares() -> None:
    found = crowding(np.array([[10.0, 0.4], [0.0, 1.0], [2.0, 0.8], [5.0, 0.0]]))
    # At 2: (5 - 0) / 10 and (1 - 0.4) / 1; at 5 and 10 an end of the other column.
    assert found[2] == np.float64(0.5) + np.float64(0.6) and np.isinf(found[[0, 1, 3]]).all()


def test_a_column_without_spread_gives_no_room() -> None:
    found = crowding(np.array([[0.0, 3.0], [1.0, 3.0], [2.0, 3.0], [4.0, 3.0]]))
    assert found[1] == 0.5 and np.isinf(found[[0, 3]]).all()
    assert np.isinf(crowding(np.array([[1.0, 2.0]]))).all()
