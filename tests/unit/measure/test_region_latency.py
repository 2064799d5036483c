from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.measure.region_latency import RegionLatency, fit_region_latency

REGIONS = 24
CHAIN = tuple((place, place + 1) for place in range(REGIONS - 1))
NAMES = tuple(f"conv{place}" for place in range(REGIONS))


def truth(seed: int = 0) -> RegionLatency:
    rng = np.random.default_rng(seed)
    return RegionLatency(
        regions=NAMES,
        base_ms=10.0,
        float_ms=tuple(rng.uniform(-0.1, 0.8, REGIONS)),
        boundaries=CHAIN,
        boundary_ms=tuple(rng.uniform(0.0, 0.15, REGIONS - 1)),
    )


def guess(real: RegionLatency, seed: int = 1) -> RegionLatency:
    """Return what a profiler may say: off by a fifth, and nothing of boundaries."""
    rng = np.random.default_rng(seed)
    off = 1 + 0.2 * rng.standard_normal(REGIONS)
    return real.model_copy(
        update={
            "base_ms": 9.5,
            "float_ms": tuple(np.array(real.float_ms) * off),
            "boundary_ms": (0.0,) * (REGIONS - 1),
        }
    )


def draws(count: int, seed: int = 2) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    rng = np.random.default_rng(seed)
    return rng.random((count, REGIONS)) < rng.uniform(0.1, 0.9, (count, 1))


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_measurements_mend_the_guess(noise: float) -> None:
    real, seen, new = truth(), draws(40), draws(30, 3)
    rng = np.random.default_rng(4)
    times = real.predict(seen) * (1 + noise * rng.standard_normal(len(seen)))
    fitted = fit_region_latency(guess(real), seen, times)
    before = np.abs(guess(real).predict(new) / real.predict(new) - 1)
    after = np.abs(fitted.predict(new) / real.predict(new) - 1)
    assert np.median(after) < 0.02 < 0.03 < np.median(before)
    ranks = [np.argsort(np.argsort(values)) for values in (fitted.predict(new), real.predict(new))]
    assert np.corrcoef(*ranks)[0, 1] > 0.98
    assert fitted.measured == 40


def test_its_error_is_that_on_assignments_it_has_not_seen() -> None:
    real, seen, new = truth(), draws(40), draws(400, 3)
    times = real.predict(seen) * (1 + 0.02 * np.random.default_rng(4).standard_normal(len(seen)))
    fitted = fit_region_latency(guess(real), seen, times)
    other = real.predict(new) * (1 + 0.02 * np.random.default_rng(5).standard_normal(len(new)))
    unseen = float(np.median(np.abs(fitted.predict(new) / other - 1)))
    assert 0.6 * unseen < fitted.error < 1.6 * unseen


def test_a_guess_that_is_right_stays() -> None:
    real, seen = truth(), draws(12)
    fitted = fit_region_latency(real, seen, real.predict(seen))
    assert np.allclose(fitted.float_ms, real.float_ms) and fitted.error < 1e-9


def test_one_measurement_moves_the_level() -> None:
    real = truth()
    fitted = fit_region_latency(guess(real), draws(1), 2 * guess(real).predict(draws(1)))
    assert fitted.predict(draws(1))[0] > 1.2 * guess(real).predict(draws(1))[0]


@given(st.lists(st.booleans(), min_size=REGIONS, max_size=REGIONS))
def test_the_sum_by_hand(in_float: list[bool]) -> None:
    real = truth()
    expected = real.base_ms + sum(ms for ms, f in zip(real.float_ms, in_float, strict=True) if f)
    expected += sum(
        ms for (a, b), ms in zip(CHAIN, real.boundary_ms, strict=True) if in_float[a] != in_float[b]
    )
    assert real.predict(in_float) == pytest.approx(expected)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"\(3, 24\) assignments and \(2,\) times of 24 regions; give one row"
    ):
        fit_region_latency(truth(), draws(3), [1.0, 2.0])
    with pytest.raises(ValueError, match="one time above 0"):
        fit_region_latency(truth(), draws(2), [1.0, 0.0])
