"""How long a network takes by the precision of each of its regions, as it was measured in the whole graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewbit.engines.session import Setting
from fewbit.measure.region_profile import fit_region_profiles
from fewbit.measure.ridge import fit_ridge
from fewbit.spec import Frozen

Floats = NDArray[np.float64]

_DOUBT, _LEAST_DOUBT = 0.3, 0.1


class RegionLatency(Frozen):
    """A prediction of one call's time from which regions compute in float, all others being in integers.

    It is a sum::

        ms = base + sum of float_ms over regions in float
                  + sum of boundary_ms over neighbours of which one is in float and one in integers

    Attributes:
        host: The processor.
        engine_version: Of the engine in `setting`.
        setting: How the network ran; its float precision is that of regions in float.
        regions: Names, in the order in which they run.
        base_ms: Every region in integers.
        float_ms: What a region in float costs more (less than 0: it is faster in float).
        boundaries: Neighbours by their places: the first makes a tensor that the second reads, or both,
            one after the other, read what a third makes.
        boundary_ms: What it costs that the two differ.
        error: Median of |predicted / measured - 1| over the assignments that it was fitted to, each predicted
            without itself. Where profiles were fitted too it is less than on new assignments, for these are
            scaled to the times and all of them count.
        measured: How many those were.
    """

    host: str = ""
    engine_version: str = ""
    setting: Setting = Setting()
    regions: tuple[str, ...]
    base_ms: float
    float_ms: tuple[float, ...]
    boundaries: tuple[tuple[int, int], ...] = ()
    boundary_ms: tuple[float, ...] = ()
    error: float = 0.0
    measured: int = 0

    def predict(self, in_float: ArrayLike) -> Floats:
        """Return the milliseconds of one call.

        Args:
            in_float: Which regions are in float, bool (..., regions).

        Returns:
            (...) milliseconds.

        Example:
            >>> two = RegionLatency(regions=("a", "b"), base_ms=1.0, float_ms=(0.5, -0.1),
            ...                     boundaries=((0, 1),), boundary_ms=(0.2,))
            >>> two.predict([[False, False], [True, False], [True, True]]).round(6).tolist()
            [1.0, 1.7, 1.4]
        """
        design = _design(np.asarray(in_float, bool), self.boundaries)
        found: Floats = self.base_ms + design @ np.array([*self.float_ms, *self.boundary_ms])
        return found


def fit_region_latency(
    prior: RegionLatency, in_float: ArrayLike, measured_ms: ArrayLike, region_ms: ArrayLike | None = None
) -> RegionLatency:
    """Correct a first guess by measurements of the whole network.

    The guess (each region's operators by the engine's profiler, in a network all in integers and in one all
    in float) leaves out what fusing across regions and moving between precisions costs. Each number of it is
    corrected by as little as explains the measurements, in units of its own doubt (three tenths of it, and a
    tenth of the mean; boundaries: their own size and a tenth of the mean)::

        min over w of  sum over assignments of counts (predicted(w) / measured - 1)^2 + strength |w|^2

    with counts and strength as `fewbit.measure.ridge.fit_ridge` finds them. Where the assignments were
    profiled too, what their profiles tell (`fit_region_profiles`) is the guess.

    Args:
        prior: The guess.
        in_float: The assignments measured, bool (assignments, regions).
        measured_ms: Milliseconds of one call (assignments,).
        region_ms: Of each region in each assignment (assignments, regions), where profiled.

    Raises:
        ValueError: The shapes do not fit, there is no assignment, or a time is not above 0 (of a region: not
            a number).

    Source: A. E. Hoerl, R. W. Kennard, Ridge Regression: Biased Estimation for Nonorthogonal Problems, 1970.
    Differs: ridge around a guess instead of around 0.
    """
    assignments, times = np.asarray(in_float, bool), np.asarray(measured_ms, np.float64)
    if assignments.shape != (len(times), len(prior.regions)) or not len(times) or not (times > 0).all():
        raise ValueError(
            f"{assignments.shape} assignments and {times.shape} times of {len(prior.regions)} regions; "
            "give one row and one time above 0 for each"
        )
    if region_ms is not None:
        parts = np.asarray(region_ms, np.float64)
        if parts.shape != assignments.shape or not np.isfinite(parts).all():
            raise ValueError(
                f"times of regions are {parts.shape} for {assignments.shape} assignments; "
                "give a number for each"
            )
        told = fit_region_profiles(prior.float_ms, prior.boundaries, assignments, parts)
        prior = _with(prior, *told)
    design = np.hstack([np.ones((len(times), 1)), _design(assignments, prior.boundaries)])
    guess = np.array([prior.base_ms, *prior.float_ms, *prior.boundary_ms])
    weighted, target = design / times[:, None], 1.0 - design @ guess / times
    weights, alone = fit_ridge(weighted * _doubts(prior), target)
    found = guess + _doubts(prior) * weights
    count = len(prior.regions)
    fitted = _with(prior, found[0], found[1 : 1 + count], found[1 + count :])
    return fitted.model_copy(update={"error": float(np.median(np.abs(alone))), "measured": len(times)})


def _with(latency: RegionLatency, base_ms: float, float_ms: Floats, boundary_ms: Floats) -> RegionLatency:
    told = {"base_ms": float(base_ms), "float_ms": tuple(float_ms), "boundary_ms": tuple(boundary_ms)}
    return RegionLatency.model_validate(latency.model_dump() | told)


def _design(assignments: NDArray[np.bool_], boundaries: Sequence[tuple[int, int]]) -> Floats:
    """Return which terms each assignment has, (..., regions + boundaries)."""
    first, second = ([pair[side] for pair in boundaries] for side in (0, 1))
    differ = assignments[..., first] ^ assignments[..., second]
    return np.concatenate([assignments, differ], -1).astype(np.float64)


def _doubts(prior: RegionLatency) -> Floats:
    """Return how far each number of a guess may well be off."""
    changes, moves = np.abs(prior.float_ms), np.abs(prior.boundary_ms)
    least = _LEAST_DOUBT * float(changes.mean()) if len(changes) else 0.0
    return np.concatenate([[prior.base_ms], _DOUBT * changes + least, moves + least])
