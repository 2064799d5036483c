"""Which images do what: a seeded, class-balanced choice to calibrate, and a split into search and holdout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewbit.errors import DataError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Indexes of the images of a set, no image in two parts, each part in a shuffled order.

    Attributes:
        calibration: They set ranges and never evaluate, int64.
        search: They judge trials, int64.
        holdout: Finalists are held against them, nothing else is, int64.
    """

    calibration: Indices
    search: Indices
    holdout: Indices


def choose_balanced(targets: NDArray[np.int64], count: int, seed: int) -> Indices:
    """Choose images so that the classes' counts differ by at most one, as far as the classes reach.

    Classes take turns in a shuffled order, each giving one of its images at random; a smaller count is a
    prefix of a larger one.

    Args:
        targets: Class index of each image, int64 (N,).
        count: How many to choose; with N or more, all are chosen.
        seed: Same seed, same choice.

    Returns:
        Indexes into `targets`, int64 (min(count, N),), each at most once.

    Example:
        >>> chosen = choose_balanced(np.array([0] * 90 + [1] * 10), 20, seed=0)
        >>> sorted(np.array([0] * 90 + [1] * 10)[chosen].tolist()).count(1)
        10
    """
    return _take_turns(targets, np.random.default_rng(seed))[: max(count, 0)]


def split(targets: NDArray[np.int64], calibration: int, holdout_fraction: float, seed: int) -> Split:
    """Split a set once, stratified by class as far as the classes reach.

    Args:
        targets: Class index of each image, int64 (N,).
        calibration: Images to calibrate with, class-balanced; 0 when another set calibrates.
        holdout_fraction: Share of the remaining images kept for the end, 0 <= share < 1; above 0 at least one
            image is held out.
        seed: Same seed, same split.

    Raises:
        DataError: The shares are out of range, or no image would be left to search or to confirm with.

    Example:
        >>> parts = split(np.arange(600) % 100, calibration=100, holdout_fraction=0.2, seed=0)
        >>> len(parts.calibration), len(parts.search), len(parts.holdout)
        (100, 400, 100)
    """
    total = len(targets)
    if not 0 <= holdout_fraction < 1:
        raise DataError(
            f"holdout fraction is {holdout_fraction}; give a share from 0 up to, not including, 1"
        )
    if calibration < 0:
        raise DataError(f"{calibration} calibration images asked for; give 0 or more")
    left = total - calibration
    held = max(round(holdout_fraction * left), 1) if holdout_fraction > 0 else 0
    if left - held < 1:
        raise DataError(
            f"{total} images are too few: {calibration} to calibrate and {held} to hold out leave none to "
            "search with; give more images, fewer to calibrate, or other images to calibrate with"
        )
    rng = np.random.default_rng(seed)
    turns = _take_turns(targets, rng)
    chosen, rest = turns[:calibration], turns[calibration:]
    mask = _hold_out(targets[rest], held, rng)
    return Split(chosen, rng.permutation(rest[~mask]), rng.permutation(rest[mask]))


def _take_turns(targets: NDArray[np.int64], rng: np.random.Generator) -> Indices:
    """All images: round by round one of each class that has any left, the classes in a shuffled order."""
    rank, counts = _rank_in_class(targets, rng)
    return np.lexsort((rng.permutation(len(counts))[targets], rank))


def _hold_out(targets: NDArray[np.int64], held: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Mark `held` images: an equal share of each class, rounded up where most is left over."""
    rank, counts = _rank_in_class(targets, rng)
    quota, left_over = np.divmod(counts * held, len(targets))
    order = np.lexsort((rng.random(len(counts)), -left_over))
    quota[order[: held - quota.sum()]] += 1
    return np.asarray(rank < quota[targets])


def _rank_in_class(targets: NDArray[np.int64], rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Each image's place in a shuffled order of its class, and the classes' counts."""
    counts = np.bincount(targets).astype(np.int64)
    shuffled = rng.permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    rank = np.empty(len(targets), np.int64)
    rank[by_class] = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank, counts
