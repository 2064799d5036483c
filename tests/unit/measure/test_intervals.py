from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.measure.intervals import (
    Interval,
    bootstrap,
    empirical_bernstein,
    errors_allowed,
    hoeffding,
    holm,
    likelihood_ratio,
    mcnemar,
    mcnemar_chi2,
    median_interval,
    newcombe,
    paired,
    paired_bound,
    paired_error,
    sign_test_depth,
    wald_bounds,
    wilson,
)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (8300, 10000, 0.8225113, 0.8372351),
        (38380, 50000, 0.7638774, 0.7712815),
        (0, 100, 0.0, 0.0369935),
        (50, 50, 0.9286524, 1.0),
        (8300, 50000, 0.162764, 0.169287),
    ],
)
def test_wilson(count: int, total: int, low: float, high: float) -> None:
    found = wilson(count, total)
    assert found.low == pytest.approx(low, abs=6e-7)
    assert found.high == pytest.approx(high, abs=6e-7)


@pytest.mark.parametrize(
    ("total", "half"), [(1000, 0.0201), (5000, 0.0090), (10000, 0.0064), (50000, 0.00285)]
)
def test_wilson_half_width_at_12_percent(total: int, half: float) -> None:
    found = wilson(0.12 * total, total)
    assert (found.high - found.low) / 2 == pytest.approx(half, abs=6e-5)


@pytest.mark.parametrize(("total", "errors"), [(1000, 150), (5000, 806), (10000, 1638), (50000, 8361)])
def test_errors_that_prove_a_limit_of_17_percent(total: int, errors: int) -> None:
    assert errors_allowed(0.17, total) == errors
    assert wilson(errors, total, sides=1).high < 0.17 <= wilson(errors + 1, total, sides=1).high


def test_no_error_is_allowed_where_the_sample_is_too_small() -> None:
    assert errors_allowed(0.01, 20) == -1


@given(st.integers(1, 5000), st.data())
def test_wilson_contains_the_share_and_is_symmetric(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    found, mirrored = wilson(count, total), wilson(total - count, total)
    assert 0 <= found.low <= count / total <= found.high <= 1
    assert found.low == pytest.approx(1 - mirrored.high, abs=1e-12)


def test_wilson_covers_what_it_claims() -> None:
    rng = np.random.default_rng(0)
    counts = rng.binomial(400, 0.17, 4000)
    covered = np.mean([0.17 in wilson(int(count), 400) for count in counts])
    assert 0.94 < covered < 0.965


def test_newcombe_matches_the_paper() -> None:
    # Newcombe 1998, table II, example a (56/70 against 48/80), method 10.
    assert newcombe(56, 70, 48, 80).low == pytest.approx(0.0524, abs=5e-5)
    assert newcombe(56, 70, 48, 80).high == pytest.approx(0.3339, abs=5e-5)


@pytest.mark.parametrize(
    ("losses", "gains", "p", "mid"),
    [
        (40, 25, 0.0816815, 0.0640175),
        (150, 100, 0.0018833, 0.0015482),
        (10, 2, 0.0385742, 0.0224609),
        (5, 5, 1.0, None),
        (0, 0, 1.0, None),
    ],
)
def test_mcnemar(losses: int, gains: int, p: float, mid: float | None) -> None:
    assert mcnemar(losses, gains) == pytest.approx(p, abs=6e-8)
    assert mcnemar(gains, losses) == mcnemar(losses, gains)
    if mid is not None:
        assert mcnemar(losses, gains, mid_p=True) == pytest.approx(mid, abs=6e-8)


def test_mcnemar_of_many_pairs_is_exact() -> None:
    assert mcnemar(25000, 24000) == pytest.approx(math.erfc(999 / math.sqrt(2 * 49000)), rel=1e-3)


def test_mcnemar_chi2() -> None:
    assert mcnemar_chi2(40, 25) == pytest.approx(3.015385, abs=1e-6)
    assert mcnemar_chi2(150, 100) == pytest.approx(9.604)
    assert mcnemar_chi2(0, 0) == 0.0


def test_paired_interval_of_the_worked_example() -> None:
    assert paired_error(150, 100, 10000) == pytest.approx(0.00158035, abs=1e-8)
    found = paired(150, 100, 10000)
    assert found.low == pytest.approx(0.0019025, abs=1e-7)
    assert found.high == pytest.approx(0.0080975, abs=1e-7)
    assert paired_bound(150, 100, 10000) == pytest.approx(0.005 + 1.644854 * 0.00158035, abs=1e-8)
    # As two independent samples of 83 % and 82.5 %: 3.4 times wider.
    alone = newcombe(8300, 10000, 8250, 10000)
    assert (alone.high - alone.low) / (found.high - found.low) == pytest.approx(
        0.0053430 / 0.00158035, rel=0.01
    )


def test_unchanged_predictions_prove_no_more_than_their_number() -> None:
    # Tango's bound for no discordant pair has the closed form z^2 / (n + z^2).
    assert paired_bound(0, 0, 100) == pytest.approx(1.644854**2 / (100 + 1.644854**2), abs=1e-6)
    assert paired(0, 0, 100).low == -paired(0, 0, 100).high


def test_one_discordant_pair_solves_the_score_equation() -> None:
    found = paired(1, 0, 44)
    assert found.low < 0 < 1 / 44 < found.high
    score = (1 - 44 * found.high) / math.sqrt(44 * _variance(1, 0, 44, found.high))
    assert score == pytest.approx(-1.959964, abs=1e-5)


def _variance(b: int, c: int, n: int, delta: float) -> float:
    """The variance of one pair at the likeliest shares with difference delta, found by a grid."""
    gain = np.linspace(max(0.0, -delta), (1 - delta) / 2, 2_000_001)[1:-1]
    likelihood = (
        b * np.log(gain + delta) + (c * np.log(gain) if c else 0) + (n - b - c) * np.log(1 - delta - 2 * gain)
    )
    best = gain[likelihood.argmax()]
    return float(2 * best + delta * (1 - delta))


@pytest.mark.parametrize(("losses", "gains", "total"), [(12, 3, 400), (2, 7, 300), (9, 9, 1000)])
def test_few_pairs_solve_the_score_equation(losses: int, gains: int, total: int) -> None:
    delta = paired_bound(losses, gains, total)
    score = (losses - gains - total * delta) / math.sqrt(total * _variance(losses, gains, total, delta))
    assert score == pytest.approx(-1.644854, abs=1e-4)


@pytest.mark.parametrize(("loss", "gain"), [(0.004, 0.004), (0.002, 0.0), (0.02, 0.01)])
def test_the_paired_bound_covers_what_it_claims(loss: float, gain: float) -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(1000, [loss, gain, 1 - loss - gain], 3000)
    above = np.mean([paired_bound(b, c, 1000) >= loss - gain - 1e-12 for b, c, _ in counts])
    assert above > 0.94


def test_holm_is_never_below_the_p_value() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_empirical_bernstein_of_the_worked_example() -> None:
    sample = np.array([-1] * 60 + [1] * 45 + [0] * 4895)
    assert sample.mean() == pytest.approx(-0.003)
    assert sample.var(ddof=1) == pytest.approx(0.0209952, abs=1e-7)
    assert empirical_bernstein(sample, value_range=2) == pytest.approx(0.0090096, abs=5e-8)
    assert hoeffding(5000, value_range=2) == pytest.approx(0.0384129, abs=5e-8)


@pytest.mark.parametrize(
    ("total", "half"), [(1000, 0.0429), (5000, 0.0192), (10000, 0.0136), (50000, 0.0061)]
)
def test_hoeffding(total: int, half: float) -> None:
    assert hoeffding(total) == pytest.approx(half, abs=6e-5)


def test_likelihood_ratio_of_the_worked_examples() -> None:
    assert likelihood_ratio(1, 0, 0.5, 0.6) == pytest.approx(0.1823216, abs=1e-7)
    assert likelihood_ratio(0, 1, 0.5, 0.6) == pytest.approx(-0.2231436, abs=1e-7)
    good, bad = wald_bounds()
    assert bad == pytest.approx(2.944439, abs=1e-6)
    assert bad == pytest.approx(-good)
    assert likelihood_ratio(30, 14, 0.5, 0.6) == pytest.approx(2.345637, abs=1e-6)
    assert good < likelihood_ratio(30, 14, 0.5, 0.6) < bad
    assert likelihood_ratio(34, 14, 0.5, 0.6) == pytest.approx(3.074923, abs=1e-6)
    assert likelihood_ratio(34, 14, 0.5, 0.6) > bad


def test_twenty_rounds_give_the_6th_and_15th_value() -> None:
    assert sign_test_depth(20) == 6
    outside = sum(math.comb(20, i) for i in range(6)) / 2**20
    assert 1 - 2 * outside == pytest.approx(0.959, abs=5e-4)
    assert median_interval([float(v) for v in range(20, 0, -1)]) == Interval(low=6, high=15)
    assert [sign_test_depth(n) for n in (0, 1, 5, 6, 7, 8, 9)] == [0, 0, 0, 1, 1, 1, 2]


def test_the_bootstrap_of_the_worked_example() -> None:
    a = np.array([10.2, 10.1, 13.0, 10.3, 10.2])
    b = np.array([5.1, 5.2, 6.4, 5.0, 5.1])
    assert np.median(a / b) == pytest.approx(2.0)
    assert a.mean() / b.mean() == pytest.approx(2.00746, abs=1e-5)
    found = bootstrap(a / b, lambda draws: np.median(draws, axis=1))
    assert found.low == pytest.approx(1.942, abs=5e-4)
    assert found.high == pytest.approx(2.06, abs=5e-4)
    few = median_interval(list(a / b))  # Student's t: narrow values, a narrow interval
    assert 1.93 < few.low < 2.0 < few.high < 2.08


def test_the_median_interval_covers_what_it_claims() -> None:
    rng = np.random.default_rng(0)
    covered = np.mean([0.0 in median_interval(list(rng.standard_cauchy(20))) for _ in range(2000)])
    assert covered > 0.95


@pytest.mark.parametrize("rounds", [2, 3, 4, 5])
def test_few_rounds_cover_what_they_claim(rounds: int) -> None:
    rng = np.random.default_rng(rounds)
    speeds = np.exp(0.1 * rng.standard_normal((2000, rounds)))
    assert np.mean([1.0 in median_interval(list(one)) for one in speeds]) > 0.93


def test_bootstrap_of_a_figure_without_a_formula() -> None:
    # Ratio of top-5 errors of two networks, resampled by image.
    rng = np.random.default_rng(0)
    errors = np.stack([rng.random(500) < 0.2, rng.random(500) < 0.1], axis=1).astype(float)

    def ratio(draws: np.ndarray) -> np.ndarray:
        means = draws.mean(axis=1)
        return means[:, 0] / means[:, 1]

    found = bootstrap(errors, ratio, seed=3)
    assert found == bootstrap(errors, ratio, seed=3)
    assert found != bootstrap(errors, ratio, seed=4)
    assert found.low < errors[:, 0].mean() / errors[:, 1].mean() < found.high
    assert found.high - found.low < 2
