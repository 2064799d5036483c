"""Whole searches on a tiny network: real recipes, files, engines and processes."""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import psutil
import pytest
import torch
from torch import nn

from fewbit.data.image_set import ImageSet
from fewbit.data.images import open_images
from fewbit.engines.process import ENGINE_PHASES, EngineProcess, RemoteSession
from fewbit.engines.session import EngineName, Setting
from fewbit.errors import BudgetError, CardError, DataError, InputError, JournalError, OutputError
from fewbit.load.capture import capture, load
from fewbit.load.card import ExpectedSection, read_card
from fewbit.measure.accuracy import Accuracy, Predictions
from fewbit.recipe import Recipe, read_recipe
from fewbit.search import kept_aids
from fewbit.search import study as study_module
from fewbit.search.budget import parse_budget
from fewbit.search.gather import expected_note, gather
from fewbit.search.journal import FILE
from fewbit.search.ladder import Ladder
from fewbit.search.options import StudyOptions
from fewbit.search.proposal import Proposal
from fewbit.search.study import read_study, run_study
from fewbit.search.trial import StudyRecord, Trial
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
    assert text == trial.recipe_toml and Recipe.from_toml(text).name == trial.recipe
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


@pytest.fixture
def fresh(folder: Path, tmp_path: Path) -> Iterator[StudyOptions]:
    yield options(folder, (read_card(folder / "tiny.toml"),), "top1-drop<=12%", out=tmp_path / "out")


def test_what_takes_long_is_not_done_for_a_trial_that_will_not_come(
    fresh: StudyOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    class Asking(Ladder):
        def propose(self, history: Sequence[Trial]) -> Proposal | None:
            if len(history) == 2:
                assert self._aids.mixing is not None
                asked.append(self._aids.ranking("tiny", "onnxruntime", "int8"))
                asked.append(self._aids.mixing("tiny", "onnxruntime", "int8", "float32"))
            return super().propose(history)

    monkeypatch.setattr(study_module, "Ladder", Asking)
    monkeypatch.setattr(kept_aids, "_LEAST_MS_TO_MIX", 0.0)
    for name in ("ranking", "mixes"):
        monkeypatch.setattr(Workbench, name, lambda *_: pytest.fail("nobody will measure it"))
    study = run_study(replace(fresh, trials=2, engines=("onnxruntime",), batches=(8,)))
    assert [t.recipe for t in study.trials] == ["float32", "int8"]
    assert asked == [(), ()] * (len(asked) // 2) and asked


def test_an_engine_that_dies_costs_one_trial(fresh: StudyOptions) -> None:
    killed: list[str] = []

    def kill_once(event: Event) -> None:
        if "float32 on openvino: search images" in event.text and not killed:
            killed.append(event.text)
            for child in psutil.Process().children():
                if "openvino" in " ".join(child.cmdline()):
                    child.kill()

    study = run_study(replace(fresh, batches=(8,)), kill_once)
    failed = [t for t in study.trials if t.state == "failed"]
    assert killed and [(t.setting.engine, t.recipe) for t in failed] == [("openvino", "float32")]
    assert "openvino crashed" in failed[0].reason and "\n" not in failed[0].reason
    assert study.answer is not None and study.answer.found
    assert not psutil.Process().children()


def test_ended_after_one_trial_it_is_not_empty_handed(fresh: StudyOptions) -> None:
    study = run_study(replace(fresh, trials=1, engines=("onnxruntime",), batches=(8,)))
    assert [t.recipe for t in study.trials] == ["float32"]
    assert study.answer is not None and study.answer.found and study.answer.key == study.trials[0].key
    assert study.notes == ("ended after 1 trials, as asked by --trials; --resume goes on",)
    more = run_study(replace(fresh, engines=("onnxruntime",), batches=(8,), resume=True))
    assert more.trials[0] == study.trials[0] and len(more.trials) > 1


def test_no_time_at_all_still_measures_one_on_fewer_images(fresh: StudyOptions) -> None:
    short = replace(fresh, minutes=0.0001, engines=("onnxruntime",), batches=(8,))
    study = run_study(short)
    assert [t.recipe for t in study.trials] == ["float32"]
    assert study.answer is not None and study.answer.found
    assert study.notes == (
        "200 of 259 search images are used, so that the minutes given suffice",
        "ended after 1 trials, as asked by --minutes; --resume goes on",
    )
    assert (study.data.search, study.data.holdout) == (200, 173)
    # With time, it goes on with as many images as before: what was measured stays comparable.
    more = run_study(replace(short, minutes=1.0, resume=True))
    assert more.trials[0] == study.trials[0] and more.data == study.data
    assert {t.accuracy.total for t in more.trials if t.accuracy and t.state == "measured"} == {200}


def test_what_the_card_expects_is_told_first(
    study: StudyRecord, events: list[Event], right: tuple[int, int]
) -> None:
    said = f"is right on {right[0]} (top-5: {right[1]}) of {IMAGES} images, as its card expects"
    assert study.notes == (f"tiny: float32 on onnxruntime {said}",)
    assert [e.kind for e in events if e.kind in ("end", "note")][:2] == ["end", "note"]


@pytest.mark.parametrize(
    ("top1", "said"),
    [
        (8103, "as its card expects"),
        (8102, "8102 (top-5: 9872): within rounding"),
        (8000, "check scale, mean"),
    ],
)
def test_a_mismatch_with_the_card_says_what_to_check(top1: int, said: str) -> None:
    expected = ExpectedSection(data="x", images=10000, top1_correct=top1, top5_correct=9872)
    accuracy = Accuracy(top1_correct=8103, top5_correct=9872, total=10000)
    assert said in expected_note("resnet20", "openvino", accuracy, expected)


def test_images_to_calibrate_may_come_from_elsewhere(fresh: StudyOptions, tmp_path: Path) -> None:
    other = make_images(tmp_path / "other", images=60, seed=5)
    (bench,), data = gather(replace(fresh, calibration=other, calibration_images=30), lambda *_: None)
    assert (data.calibration, data.search + data.holdout) == (30, IMAGES)
    assert not set(bench.images.calibration.names) <= set(bench.images.search.names)


def test_the_same_seed_splits_the_same(fresh: StudyOptions) -> None:
    (first,), _ = gather(fresh, lambda *_: None)
    (second,), _ = gather(fresh, lambda *_: None)
    (third,), _ = gather(replace(fresh, seed=3), lambda *_: None)
    assert first.images.search.names == second.images.search.names != third.images.search.names


def test_two_networks_compete(fresh: StudyOptions, tmp_path: Path) -> None:
    cards = (fresh.cards[0], make_card(tmp_path, "wide", width=24))
    given = replace(
        fresh, cards=cards, engines=("onnxruntime",), batches=(8,), budgets=(parse_budget("top1-error<=20%"),)
    )
    study = run_study(given)
    ran = [(t.network, t.recipe) for t in study.trials]
    assert ran[:2] == [("tiny", "float32"), ("wide", "float32")]
    # The images were labelled by the tiny one: the wide one is hopeless and gets no int8.
    assert ("wide", "int8") not in ran
    assert study.answer is not None and study.answer.found
    assert next(t for t in study.trials if t.key == study.answer.key).network == "tiny"


def test_what_the_holdout_images_refuse_is_climbed_past(fresh: StudyOptions) -> None:
    small = replace(fresh, objective="size", engines=("onnxruntime",), batches=(8,))
    first = run_study(replace(small, trials=2))
    assert first.answer is not None and first.answer.key == first.trials[1].key
    seen, held = first.answer.checks[0].value, first.answer.confirmation.checks[0].value
    assert seen < held, "give make_images another seed: int8 must lose more on the holdout images"
    between = parse_budget(f"top1-drop<={50 * (seen + held):.2f}%")
    study = run_study(replace(small, budgets=(between,), resume=True))
    note = "inside on the search images, refused by the holdout images: tiny int8 on onnxruntime"
    assert note in study.notes
    assert study.answer is not None and study.answer.key != first.answer.key
    assert len(study.trials) > 2


def test_a_folder_that_is_a_file(fresh: StudyOptions) -> None:
    fresh.out.write_text("mine")
    with pytest.raises(InputError, match=r"out: is a file; give a folder with --out"):
        run_study(fresh)
    assert fresh.out.read_text() == "mine"


def test_a_folder_that_cannot_be_written(fresh: StudyOptions, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"cannot be written .* give a folder you may write to with --out"):
        run_study(replace(fresh, out=tmp_path / "file" / "out"))


def test_nothing_is_left_where_the_images_cannot_be_used(fresh: StudyOptions, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        run_study(replace(fresh, data=tmp_path / "nowhere"))
    assert not fresh.out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cards": ()}, "search: no network; give one card or more"),
        ({"budgets": ()}, 'search: no budget; give one like --budget "top1-drop<=1%"'),
        ({"engines": ()}, "search: no engine; give one or more"),
        ({"batches": ()}, "search: no batch; give one or more"),
        ({"batches": (0, 8)}, "search: batch is 0; give a number above 0"),
        ({"threads": 0}, "search: threads is 0; give a number above 0"),
        ({"minutes": -1.0}, "search: minutes is -1.0; give a number above 0"),
        ({"trials": 0}, "search: trials is 0; give a number above 0"),
        ({"confidence": 1.0}, "search: confidence is 1.0; give 0.5 up to, not including, 1"),
        ({"holdout_fraction": 0.0}, "search: holdout fraction is 0.0; give a share inside 0 and 1"),
    ],
)
def test_options_that_cannot_be(fresh: StudyOptions, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        replace(fresh, **change)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_two_cards_of_one_name(fresh: StudyOptions) -> None:
    with pytest.raises(CardError, match="two cards are named 'tiny'; give each network a name of its own"):
        replace(fresh, cards=fresh.cards * 2)
    with pytest.raises(BudgetError):
        replace(fresh, budgets=())


def test_the_journal_holds_no_trial_twice(study: StudyRecord, given: StudyOptions) -> None:
    base = sqlite3.connect(given.out / FILE)
    keys = [row[0] for row in base.execute("SELECT key FROM trials")]
    base.close()
    assert len(keys) == len(set(keys)) >= len(study.trials)


def test_images_that_also_calibrate_are_left_out(fresh: StudyOptions) -> None:
    given = replace(fresh, calibration=fresh.data, calibration_images=60)
    (bench,), data = gather(given, lambda *_: None)
    images = bench.images
    assert data.calibrating == 60 and data.search + data.holdout == IMAGES - 60
    assert not set(images.calibration.hashes) & {*images.search.hashes, *images.holdout.hashes}
    with pytest.raises(DataError, match="images: all 480 images calibrate; give others to evaluate"):
        gather(replace(given, calibration_images=IMAGES), lambda *_: None)


def test_engines_in_another_order_keep_the_float32_that_drops_are_against(fresh: StudyOptions) -> None:
    first = run_study(replace(fresh, batches=(8,), trials=3, engines=("onnxruntime", "openvino")))
    again = run_study(replace(fresh, batches=(8,), resume=True, engines=("openvino", "onnxruntime")))
    assert [t.key for t in again.trials[: len(first.trials)]] == [t.key for t in first.trials]
    assert again.answer is not None
    with sqlite3.connect(fresh.out / FILE) as base:
        held = {row[0] for row in base.execute("SELECT key FROM predictions WHERE part = 'holdout'")}
    assert first.trials[0].key in held and first.trials[0].setting.engine == "onnxruntime"
    chosen = next(t for t in again.trials if t.key == again.answer.key)
    if chosen.recipe.startswith("int8"):
        assert again.answer.confirmation.versus_float.label_changes > 0


def test_another_limit_of_latency_times_everything_anew(fresh: StudyOptions) -> None:
    small = replace(fresh, engines=("onnxruntime",), batches=(1, 8), trials=2)
    first = run_study(small)
    budgets = (*small.budgets, parse_budget("latency<=500ms"))
    again = run_study(replace(small, budgets=budgets, resume=True))
    assert any(
        note.startswith("the limit of latency is another than before: 2 trials") for note in again.notes
    )
    assert [t.key for t in again.trials] == [t.key for t in first.trials]
    assert all(a.timing != b.timing for a, b in zip(first.trials, again.trials, strict=True))
    answer = again.answer
    assert answer is not None and answer.found
    latency = next(c for c in answer.confirmation.checks if c.budget == "latency<=500ms")
    assert latency.value == answer.timing.ms_per_batch_p50 and latency.low < latency.high


def test_a_trial_that_failed_comes_again_on_resume(fresh: StudyOptions) -> None:
    def kill(event: Event) -> None:
        if "float32 on openvino: search images" in event.text:
            for child in psutil.Process().children():
                if "openvino" in " ".join(child.cmdline()):
                    child.kill()

    short = replace(fresh, batches=(8,), trials=2)
    first = run_study(short, kill)
    assert [t.state for t in first.trials] == ["measured", "failed"]
    again = run_study(replace(short, resume=True))
    assert [t.state for t in again.trials] == ["measured", "measured"]
    assert "trials that failed before may come again" in again.notes


def test_a_file_that_is_made_again_must_be_the_one_measured(fresh: StudyOptions) -> None:
    run_study(replace(fresh, engines=("onnxruntime",), batches=(8,), trials=2))
    with sqlite3.connect(fresh.out / FILE) as base:
        base.execute("UPDATE decisions SET value = 'another' WHERE name LIKE 'file %'")
        base.execute("DELETE FROM decisions WHERE name = 'answer'")
    again = run_study(replace(fresh, engines=("onnxruntime",), batches=(8,), trials=3, resume=True))
    assert any("made again it is another than was measured" in note for note in again.notes)


def test_a_network_that_cannot_be_fast_enough_is_not_quantized(fresh: StudyOptions, tmp_path: Path) -> None:
    """A network of 300 times the multiplications: its forecast cannot reach the tiny one's speed."""
    cards = (make_card(tmp_path, "large", width=400), fresh.cards[0])
    budgets = (parse_budget("top1-drop<=60%"),)
    given = replace(fresh, cards=cards, engines=("onnxruntime",), batches=(8,), budgets=budgets)
    told: list[Event] = []
    first = run_study(replace(given, trials=3), told.append)
    study = run_study(replace(given, resume=True), told.append)
    assert [(t.network, t.recipe) for t in study.trials[:3]] == [
        ("large", "float32"),
        ("tiny", "float32"),
        ("tiny", "int8"),
    ]
    assert not any(t.network == "large" and t.recipe != "float32" for t in study.trials)
    (one,) = study.left_out
    assert (one.network, one.engine, one.reason) == ("large", "onnxruntime", "speed")
    assert first.left_out and one.high is not None and one.to_beat is not None and one.high < one.to_beat
    notes = [e.text for e in told if e.text.startswith("not quantized: ")]
    assert len(notes) == 1 and notes[0].startswith("not quantized: large on onnxruntime: it may reach ")
    with sqlite3.connect(fresh.out / FILE) as base:
        (kept,) = base.execute("SELECT value FROM decisions WHERE name = 'left out'").fetchone()
    assert '"large"' in kept
    assert {cost.network for cost in study.networks} == {"large", "tiny"}
    assert study.networks[0].macs > 300 * study.networks[1].macs
    assert study.answer is not None and study.answer.found


def test_a_search_for_size_that_stops_and_goes_on_tries_the_same_widths(tmp_path: Path) -> None:
    card = make_card(tmp_path, width=32)
    make_images(tmp_path / "images", width=32, images=300)
    more = {"objective": "size", "engines": ("onnxruntime",)}
    given = options(tmp_path, (card,), "top1-drop<=12%", **more)
    whole = run_study(replace(given, out=tmp_path / "whole", trials=6))
    stopped = run_study(replace(given, trials=4))
    study = run_study(replace(given, trials=6, resume=True))
    assert [len(s.trials) for s in (whole, stopped, study)] == [6, 4, 6]
    for one, other in zip(study.trials, whole.trials, strict=True):
        assert (one.key, one.accuracy, one.packed_bytes) == (other.key, other.accuracy, other.packed_bytes)
    narrow = [t for t in study.trials if t.rung == "widths"]
    assert narrow and all(0 < t.packed_bytes < t.bytes for t in narrow)
    assert study.answer is not None and whole.answer is not None and study.answer.found
    assert study.answer.key == whole.answer.key
    smallest = next(t for t in study.trials if t.key == study.answer.key)
    int8 = next(t for t in study.trials if t.recipe == "int8")
    assert smallest in narrow and smallest.counted_bytes < int8.bytes < smallest.bytes
