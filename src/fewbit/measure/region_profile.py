"""The time of each region by its own precision and its neighbours', from profiles of random mixes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fewbit.measure.ridge import fit_ridge

Floats = NDArray[np.float64]

_LEVEL, _OWN = 10.0, 3.0


def fit_region_profiles(
    float_ms: Sequence[float],
    boundaries: Sequence[tuple[int, int]],
    in_float: NDArray[np.bool_],
    region_ms: Floats,
) -> tuple[float, Floats, Floats]:
    """Return the times of regions and of boundaries that profiles of mixes tell.

    With x the regions in float, each region's own milliseconds are fitted alone, and then summed::

        ms_r = a + b x_r + sum over neighbours n of r (c_n x_n + d_n x_r x_n)
                         + sum over neighbours n, m of r that are neighbours too  e_nm x_n x_m

    The sum has the form of a `RegionLatency`, for ``x y = (x + y - [x != y]) / 2``. One profile tells as many
    times as there are regions, where one time of the whole network is a single number. Each fit is a ridge
    around the medians of the region in integers and in float (`fewbit.measure.ridge`), in which what is far
    off counts less, for a profiled operator at times takes many times as long.

    Args:
        float_ms: What each region in float is guessed to cost more; counts for regions that are the same in
            all mixes.
        boundaries: Neighbours by their places.
        in_float: Bool (mixes, regions), one mix or more.
        region_ms: (mixes, regions), finite.

    Returns:
        The fields `base_ms`, `float_ms` (regions,) and `boundary_ms` (boundaries,) of a `RegionLatency`.

    Source: A. E. Hoerl, R. W. Kennard, Ridge Regression: Biased Estimation for Nonorthogonal Problems, 1970;
    P. J. Huber, Robust Estimation of a Location Parameter, 1964. The model is our own.

    Example:
        >>> mixes = np.array([[False, False], [True, False], [False, True], [True, True]] * 5)
        >>> first = 1.0 + 0.5 * mixes[:, 0]
        >>> second = 2.0 + 0.5 * mixes[:, 1] + 0.25 * (mixes[:, 0] ^ mixes[:, 1])  # 0.25: it has to convert
        >>> base, more, moves = fit_region_profiles((0, 0), ((0, 1),), mixes, np.stack([first, second], 1))
        >>> round(base, 2), more.round(2).tolist(), moves.round(2).tolist()
        (3.0, [0.5, 0.5], [0.25])
    """
    state = in_float.astype(np.float64)
    base, more, moves = 0.0, np.zeros(len(float_ms)), np.zeros(len(boundaries))
    for place, guess_ms in enumerate(float_ms):
        near, pairs = _around(place, boundaries)
        first, second = ([boundaries[pair][side] for pair in pairs] for side in (0, 1))
        both = state[:, first] * state[:, second]
        design = np.column_stack([np.ones(len(state)), state[:, place], state[:, near], both])
        start, doubts = np.zeros(design.shape[1]), np.ones(design.shape[1])
        start[:2] = _levels(in_float[:, place], region_ms[:, place], guess_ms)
        doubts[:2] = _LEVEL, _OWN
        weights, _ = fit_ridge(design * doubts, region_ms[:, place] - design @ start)
        found = start + weights * doubts
        base += float(found[0])
        more[[place, *near]] += found[1 : 2 + len(near)]
        together = found[2 + len(near) :]
        np.add.at(more, first, together / 2)
        np.add.at(more, second, together / 2)
        moves[pairs] -= together / 2
    return base, more, moves


def _around(place: int, boundaries: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Return the neighbours of a region, and the boundaries among it and them, each pair once."""
    near = sorted({one for pair in boundaries if place in pair for one in pair} - {place})
    pairs = {
        frozenset(pair): index
        for index, pair in reversed(list(enumerate(boundaries)))
        if pair[0] != pair[1] and {*pair} <= {place, *near}
    }
    return near, sorted(pairs.values())


def _levels(in_float: NDArray[np.bool_], ms: Floats, more_ms: float) -> tuple[float, float]:
    """Return the median of a region in integers, and what float adds to it."""
    if in_float.all():
        return float(np.median(ms)) - more_ms, more_ms
    integers = float(np.median(ms[~in_float]))
    return integers, float(np.median(ms[in_float])) - integers if in_float.any() else more_ms
