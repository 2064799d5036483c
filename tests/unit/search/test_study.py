"""Whole searches on a tiny network: real recipes, files, engines and processes."""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from fewbit.data.image_set import ImageSet
from fewbit.data.images import open_images
from fewbit.engines.process import ENGINE_PHASES, EngineProcess, RemoteSession
from fewbit.engines.session import EngineName, Setting
from fewbit.errors import InputError, JournalError
from fewbit.load.capture import capture, load
from fewbit.load.card import read_card
from fewbit.measure.accuracy import Predictions
from fewbit.recipe import Recipe, read_recipe
from fewbit.search.budget import parse_budget
from fewbit.search.gather import gather
from fewbit.search.journal import FILE
from fewbit.search.options import StudyOptions
from fewbit.search.study import read_study, run_study
from fewbit.search.trial import StudyRecord
from fewbit.search.watch import Event
from fewbit.search.workbench import Workbench
from small_search import CLASSES, SIDE, make_card, make_images, options

IMAGES = 480


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    make_card(root)
    make_images(root / "images", images=IMAGES)
    return root


@pytest.fixture(scope="module")
def right(folder: Path) -> tuple[int, int]:
    """What torch gets right of all images, first and among five."""
    card = read_card(folder / "tiny.toml")
    with ImageSet(open_images(folder / "images"), card.input, CLASSES) as images, torch.no_grad():
        logits = torch.cat([load(card)(torch.from_numpy(batch)) for batch in images.batches(64)])
        accuracy = Predictions.from_logits(logits.numpy(), images.targets).accuracy()
    return accuracy.top1_correct, accuracy.top5_correct


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def given(folder: Path, right: tuple[int, int]) -> StudyOptions:
    counts = f"images = {IMAGES}\ntop1_correct = {right[0]}\ntop5_correct = {right[1]}\n"
    expecting = folder / "expecting.toml"
    expecting.write_text(f'{(folder / "tiny.toml").read_text()}\n[expected]\ndata = "images"\n{counts}')
    return options(folder, (read_card(expecting),), "top1-drop<=12%", command="fewbit search tiny.toml")


@pytest.fixture(scope="module")
def opened() -> list[tuple[str, Setting]]:
    return []


@pytest.fixture(scope="module")
def study(
    given: StudyOptions, events: list[Event], opened: list[tuple[str, Setting]]
) -> Iterator[StudyRecord]:
    original = EngineProcess.open

    def counted(self: EngineProcess, path: Path, setting: Setting) -> RemoteSession:
        opened.append((_digest(path), setting))
        return original(self, path, setting)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineProcess, "open", counted)
        made = run_study(given, events.append)
    yield made


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_finds_a_network_and_says_how_it_was_measured(study: StudyRecord) -> None:
    answer = study.answer
    assert answer is not None and answer.found and answer.advice == ""
    assert answer.timing.ratio is not None and answer.timing.ratio_interval is not None
    assert answer.float_setting.float_precision == "float32"
    assert [check.budget for check in answer.checks] == ["top1-drop<=12%"]
    assert answer.confirmation.key == answer.key
    assert answer.confirmation.accuracy.total == study.data.holdout
    assert all(check.met for check in answer.confirmation.checks)
    trial = next(t for t in study.trials if t.key == answer.key)
    assert answer.cost is not None and answer.cost.setting == trial.setting
    assert sum(f.ms for f in answer.cost.findings) + answer.cost.rest_ms == pytest.approx(answer.cost.ms)


def test_where_a_network_cannot_be_loaded_no_more_images_are_decoded(
    given: StudyOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[ImageSet] = []
    close = ImageSet.close
    monkeypatch.setattr(ImageSet, "close", lambda images: (closed.append(images), close(images)))
    card = make_card(tmp_path)
    (tmp_path / "tiny.py").write_text("def tiny(**_):\n    raise ValueError('no such layer')\n")
    with pytest.raises(InputError, match="no such layer"):
        gather(replace(given, cards=(card,)), lambda *_: None)
    assert len(closed) == 1


def test_a_float_file_is_one_for_all_engines(given: StudyOptions, tmp_path: Path) -> None:
    """Its pool moves to before the 1 x 1 convolution in it, whichever engine asks first."""
    (bench,), _ = gather(given, lambda *_: None)
    pooled = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * SIDE**2 // 4, CLASSES)
    )
    net, files = capture(pooled.eval(), "pooled", (3, SIDE, SIDE)), []
    for engine in get_args(EngineName):
        folder = tmp_path / engine
        made = Workbench(bench.card, net, bench.images, folder, 0).build(read_recipe("float32"), engine)
        assert made.net is not None
        assert [layer.kind for layer in made.net.layers()][:2] == ["AvgPool", "Conv"]
        files.append(made.path.read_bytes())
    assert len(files) > 1 and len(set(files)) == 1


def test_no_image_does_two_things(study: StudyRecord, given: StudyOptions) -> None:
    (bench,), data = gather(given, lambda *_: None)
    images = bench.images
    parts = [set(images.part(part).names) for part in ("calibration", "search", "holdout")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == IMAGES
    assert [len(part) for part in parts] == [data.calibration, data.search, data.holdout]
    assert len(images.calibration) == 48
    counts = sorted(images.calibration.targets.tolist().count(label) for label in range(CLASSES))
    assert counts[-1] - counts[0] <= 1
    for trial in study.trials:
        if trial.state == "measured":
            assert trial.accuracy is not None and trial.accuracy.total == data.search


def test_every_rung_that_must_come_came(study: StudyRecord) -> None:
    ran = {(t.setting.engine, t.recipe) for t in study.trials}
    assert {(e, r) for e in ("onnxruntime", "openvino") for r in ("float32", "int8")} <= ran
    assert len({t.key for t in study.trials}) == len(study.trials)
    for trial in study.trials:
        assert trial.state == "measured" or trial.reason
        if trial.state == "measured":
            assert trial.timing is not None and trial.timing.ratio is not None
            assert trial.placement is not None and trial.bytes > 0
        if trial.recipe == "int8" and trial.state == "measured":
            assert [r.kind for r in trial.layers if r.precision == "int8"].count("Conv") == 3
            assert trial.placement is not None and not trial.placement.float_matrix_operators()


def test_the_survey_tried_batches_and_streams(study: StudyRecord) -> None:
    trial = next(t for t in study.trials if t.recipe == "float32")
    tried = {(s.setting.batch, s.setting.streams) for s in trial.survey}
    assert {batch for batch, _ in tried} == {1, 8} and {streams for _, streams in tried} == {1, 2}
    assert trial.setting in [s.setting for s in trial.survey[:2]]  # the best two are timed


def test_what_all_trials_are_timed_against_stays_open(
    study: StudyRecord, opened: list[tuple[str, Setting]]
) -> None:
    assert study.answer is not None
    baseline = (opened[0][0], study.answer.float_setting)
    assert opened[0][1].float_precision == "float32"
    assert 1 <= opened.count(baseline) <= 2 < len(study.trials)
    again = Counter(opened) - Counter(set(opened))
    assert again.total() <= len(study.trials)  # what was closed with its trial and is a finalist, or profiled


def test_the_time_of_a_search_is_the_sum_of_its_phases(study: StudyRecord) -> None:
    assert sum(one.seconds for one in study.phases) == pytest.approx(study.seconds, rel=0.02)
    phases = {one.phase: one for one in study.phases}
    assert {"load", "decode", "calibrate", "export", "compile", "evaluate", "time"} <= set(phases)
    assert ("layers" in phases) == any(t.layers for t in study.trials)  # none where int8 was too slow
    assert phases["time"].child_cpu_s > 0 and phases["calibrate"].cpu_s > 0
    assert {"trials", "finish", "gather"} <= {one.stage for one in study.phases}
    engine = sum(phases_s for name, phases_s in _by_phase(study).items() if name in ENGINE_PHASES)
    assert study.engine_share == pytest.approx(engine / study.seconds, rel=0.02)


def _by_phase(study: StudyRecord) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in study.phases:
        found[one.phase] = found.get(one.phase, 0.0) + one.seconds
    return found


def test_float32_is_the_same_on_both_engines(study: StudyRecord) -> None:
    first, second = (t for t in study.trials if t.recipe == "float32")
    assert first.accuracy == second.accuracy
    assert first.accuracy is not None and 0.8 < first.accuracy.top1 < 1
    assert first.versus_float is not None and first.versus_float.label_changes == 0


def test_best_is_the_file_that_was_measured(study: StudyRecord, given: StudyOptions) -> None:
    assert study.answer is not None
    trial = next(t for t in study.trials if t.key == study.answer.key)
    files = {_digest(path) for path in (given.out / "files").glob("*.onnx")}
    best = given.out / "best" / "model.onnx"
    assert best.stat().st_size == trial.bytes and _digest(best) in files
    text = (given.out / "best" / "recipe.toml").read_text()
    name = "float32" if trial.recipe == "bf16" else trial.recipe  # the same file, in another precision
    assert text == trial.recipe_toml and Recipe.from_toml(text).name == name
    assert not [p for p in given.out.rglob(".*") if p.is_file()]


def test_the_watcher_is_told_in_order(study: StudyRecord, events: list[Event]) -> None:
    ends = [e.trial for e in events if e.kind == "end"]
    assert tuple(ends) == study.trials
    assert sum(e.kind == "begin" for e in events) == len(ends)
    assert [e.text for e in events if e.kind == "rung"][:1] == ["float32"]
    assert events[-1].kind == "answer" and events[-1].fraction == 1.0 and events[-1].seconds_left == 0
    fractions = [e.fraction for e in events]
    assert fractions == sorted(fractions)


def test_the_record_is_read_from_the_journal(study: StudyRecord, given: StudyOptions) -> None:
    assert read_study(given.out) == study
    assert study.command == "fewbit search tiny.toml"


def test_resuming_a_finished_search_measures_nothing(study: StudyRecord, given: StudyOptions) -> None:
    told: list[Event] = []
    again = run_study(replace(given, resume=True), told.append)
    assert not [e for e in told if e.kind in ("begin", "end")]
    assert again.trials == study.trials and again.answer == study.answer


def test_a_new_search_does_not_overwrite_an_old_one(study: StudyRecord, given: StudyOptions) -> None:
    with pytest.raises(JournalError, match="there is a study already"):
        run_study(given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0 when it was made, now it is 1"),
        ({"batches": (1, 4)}, "batch was 1,8 when it was made, now it is 1,4"),
        ({"engines": ("openvino",)}, "engines was onnxruntime,openvino when it was made, now it is openvino"),
        ({"objective": "size"}, "objective was throughput when it was made, now it is size"),
        ({"calibration_images": 24}, "number of calibration images was 48 when it was made"),
    ],
)
def test_a_journal_of_another_study_is_refused(
    study: StudyRecord, given: StudyOptions, change: dict[str, object], message: str
) -> None:
    with pytest.raises(JournalError) as error:
        run_study(replace(given, resume=True, **change))  # type: ignore[arg-type]
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_journal_of_other_weights_is_refused(
    study: StudyRecord, given: StudyOptions, tmp_path: Path
) -> None:
    other = make_card(tmp_path, "tiny", width=12)
    with pytest.raises(JournalError, match=r"network tiny was \w+ when it was made, now it is \w+"):
        run_study(replace(given, cards=(other,), resume=True))


def test_another_budget_keeps_what_was_measured(
    study: StudyRecord, given: StudyOptions, folder: Path
) -> None:
    """A budget that nobody can meet, on the same journal: the nearest network, and what would meet it."""
    told: list[Event] = []
    hard = replace(given, budgets=(parse_budget("top1-error<=1%"),), resume=True)
    again = run_study(hard, told.append)
    kept = [t for t in study.trials if t.state == "measured"]
    assert list(again.trials[: len(kept)]) == kept
    assert not {e.trial.key for e in told if e.trial is not None} & {t.key for t in kept}
    answer = again.answer
    assert answer is not None and not answer.found
    assert "float32 itself misses top1-error<=1% by " in answer.advice
    assert "top1-error<=" in answer.advice and "would be met by tiny" in answer.advice
    nearest = next(t for t in again.trials if t.key == answer.key)
    assert nearest.accuracy == max((t.accuracy for t in again.trials if t.accuracy), key=lambda a: a.top1)
    assert (given.out / "best" / "model.onnx").stat().st_size == nearest.bytes
    back = run_study(replace(given, resume=True))
    assert back.answer is not None and back.answer.found


def test_what_the_card_expects_is_told_first(
    study: StudyRecord, events: list[Event], right: tuple[int, int]
) -> None:
    said = f"is right on {right[0]} (top-5: {right[1]}) of {IMAGES} images, as its card expects"
    assert study.notes == (f"tiny: float32 on onnxruntime {said}",)
    assert [e.kind for e in events if e.kind in ("end", "note")][:2] == ["end", "note"]


def test_the_journal_holds_no_trial_twice(study: StudyRecord, given: StudyOptions) -> None:
    base = sqlite3.connect(given.out / FILE)
    keys = [row[0] for row in base.execute("SELECT key FROM trials")]
    base.close()
    assert len(keys) == len(set(keys)) >= len(study.trials)
