from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from rich.progress import Progress

from fewbit.cli import progress
from fewbit.cli.progress import describe_trial, search_progress, step_progress, time_left
from fewbit.engines.session import Setting
from fewbit.measure.accuracy import Accuracy
from fewbit.search.trial import Trial
from fewbit.search.watch import Event

FAILED = Trial(
    key="k",
    network="tiny",
    recipe="int8",
    recipe_toml="",
    rung="int8",
    setting=Setting(engine="openvino"),
    state="failed",
    reason="[ONNXRuntimeError] : 1 : FAIL : see [/some/path]",
)
MEASURED = FAILED.model_copy(
    update={
        "state": "measured",
        "reason": "",
        "accuracy": Accuracy(top1_correct=90, top5_correct=99, total=100),
    }
)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A stderr that is a terminal."""
    screen = io.StringIO()

    columns = progress._bar().columns

    def real() -> Progress:
        return Progress(
            *columns, console=Console(file=screen, force_terminal=True, width=120), transient=True
        )

    monkeypatch.setattr(progress, "_bar", real)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    return screen


def test_a_trial_in_one_line() -> None:
    assert describe_trial(MEASURED) == "tiny int8 on openvino, top-1 90.00% of 100 images"
    assert describe_trial(FAILED).endswith("failed: [ONNXRuntimeError] : 1 : FAIL : see [/some/path]")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.4, "0 s left"),
        (59.6, "1 min 00 s left"),
        (75, "1 min 15 s left"),
        (3600, "60 min 00 s left"),
    ],
)
def test_time_left_as_a_person_says_it(seconds: float | None, text: str) -> None:
    assert time_left(seconds) == text


def test_elsewhere_each_finished_trial_and_note_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with search_progress() as watch:
        watch(Event("begin", "int8"))
        watch(Event("progress", "int8", 0.1, 40.0))  # too soon after the start to be told
        watch(Event("note", "one image was left out", 0.2))
        watch(Event("end", "int8", 0.5, 75.0, trial=FAILED))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "[ 20%] one image was left out",
        f"[ 50%] {describe_trial(FAILED)} (1 min 15 s left)",
    ]


def test_progress_is_told_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with search_progress() as watch:
        for second in range(25):
            now[0] = 100.0 + second
            watch(Event("progress", f"second {second}", 0.5))
    assert capsys.readouterr().err.splitlines() == ["[ 50%] second 10", "[ 50%] second 20"]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with search_progress(quiet=True) as watch, step_progress("eval", quiet=True) as tell:
        watch(Event("end", "x", trial=FAILED))
        tell("x", 0.5)
    assert capsys.readouterr() == ("", "")


def test_in_a_terminal_a_bar_with_the_trials_above_it(terminal: io.StringIO) -> None:
    with search_progress() as watch:
        watch(Event("note", "[/odd] brackets", 0.1))
        watch(Event("progress", "timing [/x]", 0.3, 75.0))
        watch(Event("end", "int8", 0.5, 70.0, trial=FAILED))
        watch(Event("answer", "found", 1.0, 0.0))
    shown = terminal.getvalue()
    assert "[/odd] brackets" in shown and "[ONNXRuntimeError] : 1 : FAIL : see [/some/path]" in shown


def test_in_a_terminal_a_step_has_a_bar(terminal: io.StringIO) -> None:
    with step_progress("net [/x]") as tell:
        tell("calibrate [/y]", 0.5)
        tell("done", 1.0)
    assert "net [/x]: " in terminal.getvalue()


def test_elsewhere_a_short_step_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with step_progress("net") as tell:
        tell("calibrate", 0.5)
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_elsewhere_a_long_step_says_a_line_every_ten_seconds_with_the_time_left(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with step_progress("net") as tell:
        for second in range(35):
            clock[0] = 100.0 + second
            tell("qdrop", second / 100)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "[ 10%] net: qdrop (1 min 30 s left)",
        "[ 20%] net: qdrop (1 min 20 s left)",
        "[ 30%] net: qdrop (1 min 10 s left)",
    ]


def test_the_time_left_follows_the_present_pace_not_the_leap_of_a_resumed_run(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with step_progress("net") as tell:
        tell("qdrop", 0.0)
        for second in range(1, 61):  # half of it was there already
            clock[0] = 100.0 + second
            tell("qdrop", 0.5 + second / 1000)
    assert capsys.readouterr().err.splitlines()[-1] == "[ 56%] net: qdrop (7 min 20 s left)"


def test_another_step_begins_its_estimate_anew(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with step_progress("net") as tell:
        for second in range(10):
            clock[0] = 100.0 + second
            tell("calibrate", second / 10)
        clock[0] = 111.0
        tell("qdrop", 0.0)
        clock[0] = 121.0
        tell("qdrop", 0.05)
    assert capsys.readouterr().err.splitlines() == [
        "[  0%] net: qdrop",
        "[  5%] net: qdrop (3 min 10 s left)",
    ]


def test_in_a_terminal_a_step_shows_the_time_left(terminal: io.StringIO, clock: list[float]) -> None:
    with step_progress("net") as tell:
        tell("qdrop", 0.0)
        clock[0] = 140.0
        tell("qdrop", 0.5)
    assert "40 s left" in terminal.getvalue()
