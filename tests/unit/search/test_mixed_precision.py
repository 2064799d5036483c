from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from fewbit.engines.session import Setting
from fewbit.measure.region_latency import RegionLatency
from fewbit.search import mixed_precision
from fewbit.search.mixed.front import front
from fewbit.search.mixed_precision import FLOAT, Mix, mix_precisions, problem_of, refine
from fewbit.search.region_probe import RegionProbe
from networks import make_images, make_net

REGIONS = ("stem", "conv1", "conv2", "fc")


def latency(float_ms: tuple[float, ...], boundary_ms: float = 0.0) -> RegionLatency:
    return RegionLatency(
        regions=REGIONS,
        base_ms=4.0,
        float_ms=float_ms,
        boundaries=((0, 1), (0, 2), (1, 2), (2, 3)),
        boundary_ms=(boundary_ms,) * 4,
    )


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RegionProbe:
    return RegionProbe(make_net("residual"), Setting(engine="openvino", batch=2), tmp_path)


def guessed(monkeypatch: pytest.MonkeyPatch, told: RegionLatency) -> None:
    monkeypatch.setattr(RegionProbe, "guess", lambda self: told)


def test_the_front_falls_in_loss_and_rises_in_time(
    probe: RegionProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    guessed(monkeypatch, latency((1.0, 0.5, 0.8, 0.2), 0.1))
    mixes = mix_precisions(probe, make_images(8).split(4), assignments=0)
    assert [m.ms for m in mixes] == sorted(m.ms for m in mixes)
    assert [m.loss for m in mixes] == sorted((m.loss for m in mixes), reverse=True)
    assert mixes[0].keep_float == () and mixes[0].ratio == 1.0 and mixes[0].ms == 4.0
    assert all(0 < len(m.regions) < 4 for m in mixes[1:])
    for mix in mixes:
        in_float = [name in mix.regions for name in REGIONS]
        assert mix.ms == pytest.approx(float(latency((1.0, 0.5, 0.8, 0.2), 0.1).predict(in_float)))


def test_a_region_that_is_faster_in_float_is_in_float(
    probe: RegionProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    guessed(monkeypatch, latency((1.0, 0.5, 0.8, -0.3)))
    mixes = mix_precisions(probe, make_images(8).split(4), assignments=0)
    assert mixes[0].regions == ("fc",) and mixes[0].ratio == pytest.approx(3.7 / 4)
    assert all("fc" in m.regions for m in mixes)


def test_what_moving_costs_can_be_more_than_what_float_gains(
    probe: RegionProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    guessed(monkeypatch, latency((1.0, 0.5, 0.8, -0.3), boundary_ms=0.4))
    assert mix_precisions(probe, make_images(8).split(4), assignments=0)[0].regions == ()


def test_a_gain_that_is_promised_is_measured_before_it_is_believed(
    probe: RegionProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    guessed(monkeypatch, latency((1.0, 0.5, 0.8, -0.3)))
    real = latency((1.0, 0.5, 0.8, 0.3))
    asked = measuring(monkeypatch, real)
    told: list[float] = []
    mixes = mix_precisions(probe, make_images(8).split(4), assignments=40, tell=told.append)
    assert [len(drawn) for drawn in asked] == [6, 6, 6, 6, 6, 6, 4] and mixes[0].regions == ()
    assert told == sorted(told) and told[-1] == 1.0
    guessed(monkeypatch, real)
    mix_precisions(probe, make_images(8).split(4), assignments=40)
    assert len(asked) == 7, "without a promise nothing is measured"


def measuring(monkeypatch: pytest.MonkeyPatch, real: RegionLatency) -> list[NDArray[np.bool_]]:
    """Let every mix take what `real` says; return what is asked for, as it comes."""
    asked: list[NDArray[np.bool_]] = []

    def measure_each(
        self: RegionProbe, chunks: Iterable[NDArray[np.bool_]], base_ms: float
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        for drawn in chunks:
            asked.append(drawn)
            rows = np.vstack(asked)
            yield real.predict(rows), 1.0 + rows * np.array(real.float_ms)

    monkeypatch.setattr(RegionProbe, "measure_each", measure_each)
    return asked


class Chain:
    """Regions in a row that take what is given, and what was asked for."""

    def __init__(self, float_ms: NDArray[np.float64], boundary_ms: float) -> None:
        self.seed, self.float_ms, self.boundary_ms = 0, float_ms, boundary_ms
        self.asked: list[NDArray[np.bool_]] = []

    def latency(self) -> RegionLatency:
        count = len(self.float_ms)
        return RegionLatency(
            regions=tuple(f"r{place}" for place in range(count)),
            base_ms=float(count),
            float_ms=tuple(self.float_ms.tolist()),
            boundaries=tuple((place, place + 1) for place in range(count - 1)),
            boundary_ms=(self.boundary_ms,) * (count - 1),
        )

    def draw(self, count: int, seed: int) -> NDArray[np.bool_]:
        return np.random.default_rng(seed).random((count, len(self.float_ms))) < 0.5

    def measure_each(
        self, chunks: Iterable[NDArray[np.bool_]], base_ms: float
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        for chunk in chunks:
            self.asked.append(chunk)
            rows = np.vstack(self.asked)
            region_ms = 1 + rows * self.float_ms
            region_ms[:, 1:] += self.boundary_ms * (rows[:, 1:] ^ rows[:, :-1])
            yield region_ms.sum(1), region_ms


def test_refining_measures_where_the_front_lies() -> None:
    rng = np.random.default_rng(3)
    real = Chain(rng.uniform(-0.1, 0.5, 40), 0.05)
    guess = Chain(real.float_ms + rng.normal(0, 0.2, 40), 0.1).latency()
    losses = {name: 1.0 + 0.1 * place for place, name in enumerate(guess.regions)}
    fits = list(refine(cast(RegionProbe, real), guess, losses, 30))
    assert [fit.measured for fit in fits] == [18, 24, 30]
    first = np.vstack(real.asked[:3])
    assert not first[0].any() and first[1].all()
    assert (first[2:] == real.draw(60, 0)[:16]).all(), "the next are random"
    for before, asked in zip(fits, real.asked[3:], strict=False):
        points = front(problem_of(before, losses), "ms", points=24).points
        on_front = {tuple(point.options[name] == FLOAT for name in before.regions) for point in points}
        assert {tuple(row) for row in asked.tolist()} <= on_front
    rows = np.vstack(real.asked)
    assert len({row.tobytes() for row in rows}) == 30 and (rows.all(1) | ~rows.any(1)).sum() == 2
    truth = front(problem_of(real.latency(), losses), "ms").points
    for point in truth:
        in_float = [point.options[name] == FLOAT for name in guess.regions]
        assert fits[-1].predict(in_float) == pytest.approx(point.costs["ms"], rel=0.02)


def test_where_all_of_the_front_is_measured_random_mixes_follow(
    probe: RegionProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measuring(monkeypatch, latency((1.0, 0.5, 0.8, 0.3)))
    losses = dict.fromkeys(REGIONS, 0.5)
    fits = list(refine(probe, latency((1.0, 0.5, 0.8, -0.3)), losses, 40))
    assert fits[-1].measured == 40 and sum(map(len, asked)) == 40  # of 16 that there are


def test_it_runs_on_an_engine(probe: RegionProbe) -> None:
    mixes = mix_precisions(probe, make_images(8).split(4), assignments=4)
    assert mixes and all(isinstance(m, Mix) and m.ms > 0 for m in mixes)
    assert {layer for m in mixes for layer in m.keep_float} <= {one.name for one in probe.folded.layers()}


def test_the_problem_has_a_boundary_for_each_pair() -> None:
    problem = problem_of(latency((1.0, 0.5, 0.8, 0.2), 0.1), dict.fromkeys(REGIONS, 0.5))
    assert len(problem.boundaries) == 4 and problem.base_costs == {"ms": 4.0}
    assert mixed_precision.INTEGERS in {o.name for o in problem.regions[0].options}
