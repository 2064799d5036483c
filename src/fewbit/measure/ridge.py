"""Linear fits of noisy timings: a ridge whose strength is found, in which what is far off counts less."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_STRENGTHS = np.logspace(-4, 3, 36)
_PASSES = 6
_HUBER_BOUND = 1.5 * 1.4826  # of residuals whose median size is 1
_LEAST_BOUND = 0.05  # of the target's size: where most rows are explained exactly, the others are no outliers
_NOTHING = 1e-12


def fit_ridge(design: Floats, target: Floats) -> tuple[Floats, Floats]:
    """Return the weights that explain a target, and what each row is off that is predicted from the others.

    ::

        min over w of  sum over rows of counts (target - design w)^2 + strength |w|^2

    The strength is that of the least mean of sqrt(counts) |what a row is off so| (leave one out, in closed
    form). A row counts fully within Huber's bound of 1.5 standard deviations (by the median, at least 5 % of
    the target's root mean square), beyond it by bound / size.

    Args:
        design: (rows, weights).
        target: (rows,).

    Source: A. E. Hoerl, R. W. Kennard, Ridge Regression: Biased Estimation for Nonorthogonal Problems, 1970;
    D. M. Allen, The Relationship Between Variable Selection and Data Augmentation and a Method for
    Prediction, 1974 (leaving one out); P. J. Huber, Robust Estimation of a Location Parameter, 1964.

    Example:
        >>> weights, off = fit_ridge(np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([2.0, 4.0, 6.0, 80.0]))
        >>> weights.round(1).tolist()
        [2.0]
    """
    counts, least = np.ones(len(target)), _LEAST_BOUND * float(np.sqrt(np.mean(target**2)))
    weights = alone = np.zeros(0)
    for _ in range(_PASSES):
        weights, alone = _find_strength(design, target, np.sqrt(counts))
        off = np.abs(target - design @ weights)
        bound = max(_HUBER_BOUND * float(np.median(off)), least, _NOTHING)
        counts = np.minimum(1.0, bound / np.maximum(off, _NOTHING))
    return weights, alone


def _find_strength(design: Floats, target: Floats, root_counts: Floats) -> tuple[Floats, Floats]:
    left, singular, right = np.linalg.svd(design * root_counts[:, None], full_matrices=False)
    weighted = target * root_counts
    inside = left.T @ weighted
    best, weights, alone = np.inf, np.zeros(design.shape[1]), weighted
    for strength in _STRENGTHS:
        kept = singular**2 / (singular**2 + strength)
        off = (weighted - left @ (kept * inside)) / np.maximum(1 - (left**2) @ kept, 1e-9)
        score = float(np.abs(off).mean())
        if score < best:
            best, alone = score, off / root_counts
            weights = right.T @ (kept / np.maximum(singular, _NOTHING) * inside)
    return weights, alone
