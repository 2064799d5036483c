from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fewbit.measure.region_latency import RegionLatency, fit_region_latency
from fewbit.measure.region_profile import fit_region_profiles

REGIONS = 24
# A chain, and every fourth region is read by the one after the next too, as a residual is.
PAIRS = tuple(
    sorted([(a, a + 1) for a in range(REGIONS - 1)] + [(a, a + 2) for a in range(0, REGIONS - 2, 4)])
)


def truth(seed: int = 0) -> RegionLatency:
    rng = np.random.default_rng(seed)
    return RegionLatency(
        regions=tuple(f"conv{place}" for place in range(REGIONS)),
        base_ms=10.0,
        float_ms=tuple(rng.uniform(-0.2, 0.4, REGIONS)),
        boundaries=PAIRS,
        boundary_ms=tuple(rng.uniform(0.0, 0.3, len(PAIRS))),
    )


def draws(count: int, seed: int = 2) -> NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    drawn: NDArray[np.bool_] = rng.random((count, REGIONS)) < rng.uniform(0.05, 0.95, (count, 1))
    return drawn


def profiles(real: RegionLatency, seen: NDArray[np.bool_], noise: float = 0.0) -> NDArray[np.float64]:
    """Return the time of each region: what moving a tensor costs is spent by the one that reads it."""
    parts = np.full(seen.shape, real.base_ms / REGIONS) + seen * np.array(real.float_ms)
    for (first, second), ms in zip(real.boundaries, real.boundary_ms, strict=True):
        parts[:, second] += ms * (seen[:, first] ^ seen[:, second])
    return parts * (1 + noise * np.random.default_rng(5).standard_normal(parts.shape))


def off(found: RegionLatency, real: RegionLatency) -> float:
    new = draws(200, 9)
    return float(np.median(np.abs(found.predict(new) / real.predict(new) - 1)))


def as_latency(
    real: RegionLatency, told: tuple[float, NDArray[np.float64], NDArray[np.float64]]
) -> RegionLatency:
    base, more, moves = told
    update = {"base_ms": base, "float_ms": tuple(more), "boundary_ms": tuple(moves)}
    return RegionLatency.model_validate(real.model_dump() | update)


def test_enough_profiles_tell_every_number() -> None:
    real, seen = truth(), draws(60)
    found = as_latency(real, fit_region_profiles((0.0,) * REGIONS, PAIRS, seen, profiles(real, seen)))
    new = draws(50, 3)
    assert np.allclose(found.predict(new), real.predict(new), rtol=2e-3)
    assert np.allclose(found.boundary_ms, real.boundary_ms, atol=0.02)


def test_half_as_many_mixes_as_numbers_tell_more_with_profiles() -> None:
    real, seen = truth(), draws(30)
    guess = real.model_copy(
        update={"float_ms": (0.1,) * REGIONS, "boundary_ms": (0.15,) * len(PAIRS), "base_ms": 9.5}
    )
    rng = np.random.default_rng(6)
    times = real.predict(seen) * (1 + 0.01 * rng.standard_normal(len(seen)))
    alone = fit_region_latency(guess, seen, times)
    both = fit_region_latency(guess, seen, times, profiles(real, seen, 0.03))
    assert off(both, real) < 0.01 < 0.02 < off(alone, real)
    assert both.measured == 30


def test_an_operator_that_was_once_held_up_does_not_count() -> None:
    real, seen = truth(), draws(40)
    parts = profiles(real, seen, 0.01)
    calm = off(as_latency(real, fit_region_profiles((0.0,) * REGIONS, PAIRS, seen, parts)), real)
    held = np.random.default_rng(7).random(parts.shape) < 0.02
    late = as_latency(real, fit_region_profiles((0.0,) * REGIONS, PAIRS, seen, parts + 5.0 * held))
    assert held.sum() > 10 and calm < 0.01
    assert off(late, real) < 0.02


@pytest.mark.parametrize("always", [False, True])
def test_a_region_that_never_changes_keeps_its_guess(always: bool) -> None:
    real, seen = truth(), draws(60)
    seen[:, -1] = always
    guess = (*((0.0,) * (REGIONS - 1)), 0.7)
    _, more, _ = fit_region_profiles(guess, PAIRS, seen, profiles(real, seen))
    assert more[-1] == pytest.approx(0.7, abs=0.25)  # and a share of the border to its neighbour


def test_regions_that_read_each_other_are_neighbours_once() -> None:
    pairs, seen = ((0, 1), (1, 0)), np.array([[a, b] for a in (0, 1) for b in (0, 1)] * 4, bool)
    parts = np.stack([1 + 0.5 * seen[:, 0], 2 + 0.4 * (seen[:, 0] ^ seen[:, 1])], 1)
    base, more, moves = fit_region_profiles((0.0, 0.0), pairs, seen, parts)
    assert base == pytest.approx(3.0, abs=0.02)
    assert more == pytest.approx([0.5, 0.0], abs=0.02) and moves.sum() == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_what_costs_in_few_mixes_alone_is_no_outlier(share: float) -> None:
    """A region that takes nothing but where its neighbour is in float: most rows are explained exactly."""
    rng = np.random.default_rng(0)
    seen = np.stack([rng.random(60) < share, rng.random(60) < 0.5], 1)
    parts = np.stack([np.ones(60), 0.5 * seen[:, 0]], 1) * (1 + 0.03 * rng.standard_normal((60, 2)))
    _, more, moves = fit_region_profiles((0.0, 0.0), ((0, 1),), seen, parts)
    assert more[0] + moves[0] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "parts", [np.ones((2, REGIONS)), np.full((3, REGIONS), np.nan)], ids=["fewer", "not a number"]
)
def test_profiles_that_do_not_fit_are_refused(parts: NDArray[np.float64]) -> None:
    with pytest.raises(
        ValueError, match=r"times of regions are \(\d, 24\) for \(3, 24\) assignments; give a number"
    ):
        fit_region_latency(truth(), draws(3), [1.0, 2.0, 3.0], parts)


def test_no_mix_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"\(0, 24\) assignments and \(0,\) times of 24 regions; give one row"
    ):
        fit_region_latency(truth(), draws(0), [])
