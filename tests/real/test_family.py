"""Five real networks under one budget: who is left out could not have won."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fewbit.load.card import Card
from fewbit.search.budget import parse_budget
from fewbit.search.family import Family
from fewbit.search.options import StudyOptions
from fewbit.search.study import run_study
from fewbit.search.trial import Trial

pytestmark = [pytest.mark.needs_shared, pytest.mark.slow, pytest.mark.timeout(2400)]
NAMES = ("googlenet", "mobilenet_v2", "squeezenet_v11", "mobilenet_v1_025", "fdmobilenet_025")
IMAGES = 300


def some_images(whole: Path, out: Path) -> Path:
    """Take every second image, so that the search takes minutes."""
    with tarfile.open(whole) as given, tarfile.open(out, "w") as made:
        files = sorted((m for m in given.getmembers() if m.isfile()), key=lambda m: m.name)
        for member in files[:: len(files) // IMAGES]:
            made.addfile(member, given.extractfile(member))
    return out


def test_who_is_left_out_could_not_have_won(
    shared: Path, card_of: Callable[[str], Card], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search, then the same one taken on with no forecast: what was left out is measured after all."""
    given = StudyOptions(
        cards=tuple(card_of(name) for name in NAMES),
        data=some_images(shared / "data" / "imagenet" / "images.tar", tmp_path / "images.tar"),
        budgets=(parse_budget("top5-error<=17%"),),
        out=tmp_path / "out",
        batches=(8,),
        inputs=("float32",),
        calibration_images=32,
        holdout_fraction=0.25,
        pace=0.1,
    )
    study = run_study(given)
    out = {(one.network, one.engine): one for one in study.left_out}
    quantized = {(t.network, t.setting.engine) for t in study.trials if t.recipe == "int8"}
    assert study.answer is not None and study.answer.found
    assert not quantized & set(out)
    # 168 of 600 wrong among five: outside by far, so it runs in float32 once, and nowhere else.
    assert {out["fdmobilenet_025", engine].reason for engine in given.engines} == {"accuracy"}
    assert sum(t.network == "fdmobilenet_025" for t in study.trials) == 1
    costs = {cost.network: cost for cost in study.networks}
    assert 290e6 < costs["mobilenet_v2"].macs < 310e6
    assert costs["mobilenet_v2"].depthwise_macs < costs["mobilenet_v2"].pointwise_macs

    monkeypatch.setattr(Family, "forecast", lambda *_: None)
    whole = run_study(replace(given, resume=True))
    rates = {t.network: _rate(t) for t in whole.trials if t.recipe == "float32" and _rate(t) > 0}
    for (network, engine), one in out.items():
        if one.reason != "speed" or one.high is None or one.to_beat is None:
            continue
        (plain,) = [t for t in whole.trials if _who(t) == (network, engine, "int8")]
        assert plain.timing is not None and plain.timing.ratio is not None
        assert plain.timing.ratio * rates[network] < min(one.high, one.to_beat)
    assert whole.answer is not None
    winner = next(t for t in whole.trials if t.key == whole.answer.key)
    assert (winner.network, winner.setting.engine) not in out


def _who(trial: Trial) -> tuple[str, str, str]:
    return trial.network, trial.setting.engine, trial.recipe


def _rate(trial: Trial) -> float:
    """Return the speed of the float32 baseline beside this trial."""
    timing = trial.timing
    return timing.images_per_s / timing.ratio if timing is not None and timing.ratio else 0.0
