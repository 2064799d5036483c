"""What befalls a search: engines that die, clocks that run out, folders and images that cannot be used."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fewbit.errors import BudgetError, CardError, DataError, InputError, OutputError
from fewbit.load.card import ExpectedSection, read_card
from fewbit.measure.accuracy import Accuracy
from fewbit.search import kept_aids
from fewbit.search import study as study_module
from fewbit.search.budget import parse_budget
from fewbit.search.gather import expected_note, gather
from fewbit.search.journal import FILE
from fewbit.search.ladder import Ladder
from fewbit.search.options import StudyOptions
from fewbit.search.proposal import Proposal
from fewbit.search.study import run_study
from fewbit.search.trial import Trial
from fewbit.search.watch import Event
from fewbit.search.workbench import Workbench
from small_search import make_card, make_images, options

IMAGES = 480


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    make_card(root)
    make_images(root / "images", images=IMAGES)
    return root


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
