"""Intervals and tests for shares, paired differences and medians: plain functions of counts.

Sources:
    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927 (`wilson`).
    R. G. Newcombe, "Interval estimation for the difference between independent proportions", 1998
    (`newcombe`). T. Tango, "Equivalence test and confidence interval for the difference in proportions for
    the paired-sample design", 1998 (`paired_bound` where few pairs disagree).
    Q. McNemar, "Note on the sampling error of the difference between correlated proportions", 1947
    (`mcnemar`). A. Maurer, M. Pontil, "Empirical Bernstein bounds and sample variance penalization", 2009,
    arXiv 0907.3740. A. Wald, "Sequential tests of statistical hypotheses", 1945 (`likelihood_ratio`,
    `wald_bounds`). S. Holm, "A simple sequentially rejective multiple test procedure", 1979 (`holm`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewbit.spec import Frozen

# Below this many discordant pairs the normal approximation of a paired difference is left for Tango's score.
FEW_PAIRS = 25
_FARTHEST = 100.0


class Interval(Frozen):
    """A confidence interval, both ends included."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def z_value(confidence: float, sides: int = 2) -> float:
    """Return the normal quantile of a confidence.

    >>> round(z_value(0.95), 6), round(z_value(0.95, sides=1), 6)
    (1.959964, 1.644854)
    """
    return NormalDist().inv_cdf((1 + confidence) / 2 if sides == 2 else confidence)


def wilson(count: float, total: float, confidence: float = 0.95, sides: int = 2) -> Interval:
    """Wilson's interval of a share.

    ``(p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)``

    Args:
        count: How many of `total`.
        total: The sample size; 0 gives (0, 1).
        confidence: Of the interval, or of each end alone where `sides` is 1.
        sides: 2, or 1 for ends that are one-sided bounds.

    Example:
        >>> seen = wilson(8300, 10000)
        >>> round(seen.low, 7), round(seen.high, 7)
        (0.8225113, 0.8372352)
    """
    if total <= 0:
        return Interval(low=0.0, high=1.0)
    z = z_value(confidence, sides)
    p, spread = count / total, z * z / total
    centre = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / total + spread / (4 * total)) / (1 + spread)
    low = 0.0 if count <= 0 else max(0.0, centre - half)
    high = 1.0 if count >= total else min(1.0, centre + half)
    return Interval(low=low, high=high)


def errors_allowed(limit: float, total: int, confidence: float = 0.95) -> int:
    """Return the most errors in `total` images that prove an error below `limit` (Wilson); -1 if none.

    >>> errors_allowed(0.17, 10000)
    1638
    """
    low, high = -1, total
    while low < high:
        middle = (low + high + 1) // 2
        if wilson(middle, total, confidence, sides=1).high < limit:
            low = middle
        else:
            high = middle - 1
    return low


def newcombe(
    count: int, total: int, other_count: int, other_total: int, confidence: float = 0.95
) -> Interval:
    """Interval of the difference of two shares of independent samples (Newcombe's method 10).

    >>> seen = newcombe(56, 70, 48, 80)
    >>> round(seen.low, 4), round(seen.high, 4)
    (0.0524, 0.3339)
    """
    first, second = wilson(count, total, confidence), wilson(other_count, other_total, confidence)
    p, q = count / total, other_count / other_total
    below = math.hypot(p - first.low, second.high - q)
    above = math.hypot(first.high - p, q - second.low)
    return Interval(low=p - q - below, high=p - q + above)


def paired_error(losses: float, gains: float, total: float) -> float:
    """Standard error of (losses - gains) / total: ``sqrt((b + c) - (b - c)^2 / n) / n``."""
    return math.sqrt(max(0.0, losses + gains - (losses - gains) ** 2 / total)) / total


def paired_bound(losses: float, gains: float, total: float, confidence: float = 0.95) -> float:
    """One-sided upper bound of the drop (losses - gains) / total of the same images.

    ``delta + z SE`` with at least `FEW_PAIRS` discordant pairs; with fewer, where that interval is too short
    (of no width at all when no prediction changed), the bound of Tango's score test.

    Example:
        >>> round(paired_bound(0, 0, 100), 4)      # nothing changed in 100 images: the drop is below 2.6 %
        0.0263
    """
    z = z_value(confidence, sides=1)
    if losses + gains >= FEW_PAIRS:
        return (losses - gains) / total + z * paired_error(losses, gains, total)
    return _tango_bound(losses, gains, total, z)


def _tango_bound(losses: float, gains: float, total: float, z: float) -> float:
    """Solve ``score(delta) = -z`` for the upper end by bisection; the score falls as delta grows."""

    def score(delta: float) -> float:
        linear = -losses - gains + (2 * total - losses + gains) * delta
        constant = -gains * delta * (1 - delta)
        gain_share = (math.sqrt(max(0.0, linear**2 - 8 * total * constant)) - linear) / (4 * total)
        variance = total * (2 * gain_share + delta * (1 - delta))
        distance = losses - gains - total * delta
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    low, high = (losses - gains) / total, 1.0
    if z < 0:
        low, high = -1.0, low
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if score(middle) > -z else (low, middle)
    return (low + high) / 2


def paired(losses: float, gains: float, total: float, confidence: float = 0.95) -> Interval:
    """Two-sided interval of the drop (losses - gains) / total of the same images; see `paired_bound`.

    >>> round(paired(150, 100, 10000).low, 7)
    0.0019026
    """
    one_sided = (1 + confidence) / 2
    return Interval(
        low=-paired_bound(gains, losses, total, one_sided), high=paired_bound(losses, gains, total, one_sided)
    )


def mcnemar(losses: int, gains: int, mid_p: bool = False) -> float:
    """Two-sided exact McNemar test: could the drop be none? 1 where no prediction differs.

    ``p = min(1, 2 sum_{i <= min(b, c)} C(m, i) / 2^m)`` with m = b + c; mid-p subtracts ``C(m, min(b, c)) /
    2^m``.

    Example:
        >>> round(mcnemar(40, 25), 7), round(mcnemar(40, 25, mid_p=True), 7)
        (0.0816815, 0.0640175)
    """
    pairs, fewer = losses + gains, min(losses, gains)
    term = tail = 1
    for i in range(1, fewer + 1):
        term = term * (pairs - i + 1) // i
        tail += term
    doubled = 2 * tail - (term if mid_p else 0)
    return min(1.0, doubled / (1 << pairs))


def mcnemar_chi2(losses: int, gains: int) -> float:
    """McNemar's statistic with continuity correction, ``(|b - c| - 1)^2 / (b + c)``; for 25 pairs or more."""
    return (abs(losses - gains) - 1) ** 2 / (losses + gains) if losses + gains else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values of several methods against one baseline.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = largest
    return adjusted


def empirical_bernstein(values: ArrayLike, value_range: float, risk: float = 0.05) -> float:
    """Half width that holds for any distribution: ``sqrt(2 V ln(2/a) / n) + 7 R ln(2/a) / (3 (n - 1))``.

    Args:
        values: The sample, (n,) with n >= 2.
        value_range: R, largest minus smallest possible value: 1 for errors, 2 for paired differences.
        risk: a, the probability that a one-sided bound at this width fails.
    """
    sample = np.asarray(values, dtype=np.float64)
    n, log = sample.size, math.log(2 / risk)
    return math.sqrt(2 * float(sample.var(ddof=1)) * log / n) + 7 * value_range * log / (3 * (n - 1))


def hoeffding(total: int, value_range: float = 1.0, risk: float = 0.05) -> float:
    """Two-sided half width for any distribution in a range: ``R sqrt(ln(2/a) / 2n)``.

    >>> round(hoeffding(10000), 4)
    0.0136
    """
    return value_range * math.sqrt(math.log(2 / risk) / (2 * total))


def likelihood_ratio(events: int, others: int, good: float, bad: float) -> float:
    """Wald's log likelihood ratio of a share being `bad` rather than `good`.

    Example: is one of two networks worse, by their discordant pairs (losses, gains)?

        >>> round(likelihood_ratio(34, 14, good=0.5, bad=0.6), 6)
        3.074923
    """
    return events * math.log(bad / good) + others * math.log((1 - bad) / (1 - good))


def wald_bounds(false_alarm: float = 0.05, miss: float = 0.05) -> tuple[float, float]:
    """Return (accept good at or below, accept bad at or above) for `likelihood_ratio`."""
    return math.log(miss / (1 - false_alarm)), math.log((1 - miss) / false_alarm)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval of a median: order statistics of the sign test, Student's t of the logarithms of a few values.

    The sign test takes the innermost pair of order statistics whose coverage is at least `confidence`; 20
    values give the 6th and the 15th (95.9 %). Fewer than 6 have no such pair at 95 %, and the bootstrap of
    so few covers far less than it says; positive speeds and times are near to log-normal:
    ``median * exp(-+ t[n-1] s / sqrt(n))`` with the standard deviation s of the logarithms.

    Args:
        values: Two or more; positive where they are fewer than 6.
        confidence: Of the interval.

    Example:
        >>> median_interval(list(range(1, 21)))
        Interval(low=6.0, high=15.0)
    """
    ordered = sorted(values)
    n = len(ordered)
    depth = sign_test_depth(n, confidence)
    if depth:
        return Interval(low=float(ordered[depth - 1]), high=float(ordered[n - depth]))
    from scipy.special import stdtrit  # takes a while, and --help comes past here

    logarithms = np.log(np.asarray(ordered, np.float64))
    reach = float(stdtrit(n - 1, (1 + confidence) / 2) * logarithms.std(ddof=1) / math.sqrt(n))
    middle = float(np.median(ordered))
    return Interval(low=middle * math.exp(-reach), high=middle * math.exp(min(reach, _FARTHEST)))


def sign_test_depth(n: int, confidence: float = 0.95) -> int:
    """Return the largest d whose d-th smallest and largest of n values cover the median; 0 if none."""
    outside, term, depth = 0, 1, 0
    while depth < n // 2:
        outside += term
        if 1 - 2 * outside / 2**n < confidence:
            break
        depth += 1
        term = term * (n - depth + 1) // depth
    return depth


def bootstrap(
    sample: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    confidence: float = 0.95,
    seed: int = 0,
    draws: int = 10_000,
) -> Interval:
    """Percentile bootstrap, for figures without a formula.

    Args:
        sample: (n, ...), resampled along its first axis.
        statistic: From draws (k, n, ...) to (k,).
        confidence: Of the interval.
        seed: Of the resampling; same seed, same interval.
        draws: How many resamples, taken in pieces of bounded memory.
    """
    rng = np.random.default_rng(seed)
    piece = max(1, min(draws, 4_000_000 // max(1, sample.size)))
    found: list[NDArray[np.float64]] = []
    for start in range(0, draws, piece):
        rows = rng.integers(0, len(sample), (min(piece, draws - start), len(sample)))
        found.append(np.asarray(statistic(sample[rows]), dtype=np.float64))
    low, high = np.quantile(np.concatenate(found), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(low=float(low), high=float(high))
