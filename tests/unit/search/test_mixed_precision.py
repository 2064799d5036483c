from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fewbit.engines.session import Setting
from fewbit.measure.region_latency import RegionLatency
from fewbit.search import mixed_precision
from fewbit.search.mixed_precision import Mix, mix_precisions, problem_of
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
    asked: list[int] = []

    def measure(
        self: RegionProbe, drawn: NDArray[np.bool_], base_ms: float, tell: object = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        asked.append(len(drawn))
        return real.predict(drawn), 1.0 + drawn * np.array(real.float_ms)

    monkeypatch.setattr(RegionProbe, "measure", measure)
    mixes = mix_precisions(probe, make_images(8).split(4), assignments=40)
    assert asked == [40] and mixes[0].regions == ()
    guessed(monkeypatch, real)
    mix_precisions(probe, make_images(8).split(4), assignments=40)
    assert asked == [40], "without a promise nothing is measured"


def test_it_runs_on_an_engine(probe: RegionProbe) -> None:
    mixes = mix_precisions(probe, make_images(8).split(4), assignments=4)
    assert mixes and all(isinstance(m, Mix) and m.ms > 0 for m in mixes)
    assert {layer for m in mixes for layer in m.keep_float} <= {one.name for one in probe.folded.layers()}


def test_the_problem_has_a_boundary_for_each_pair() -> None:
    problem = problem_of(latency((1.0, 0.5, 0.8, 0.2), 0.1), dict.fromkeys(REGIONS, 0.5))
    assert len(problem.boundaries) == 4 and problem.base_costs == {"ms": 4.0}
    assert mixed_precision.INTEGERS in {o.name for o in problem.regions[0].options}
