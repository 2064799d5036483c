"""`kill -9` at random moments of a search: nothing lost, nothing measured twice, the same result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest

import small_search
from fewbit.search.journal import FILE, read_study
from fewbit.search.trial import StudyRecord, Trial
from small_search import make_card, make_images

SCRIPT = Path(small_search.__file__)


class Search(NamedTuple):
    """How a search is started."""

    folder: Path
    out: Path
    budgets: tuple[str, ...]
    objective: str

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), str(self.folder), str(self.out)]
        return subprocess.Popen(
            [*command, json.dumps(self.budgets), self.objective],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> tuple[StudyRecord, list[str]]:
        """Run to the end; return the record and the keys of the trials that this run measured."""
        with self.start() as process:
            out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        return read_study(self.out), out.split()

    def kill_after(self, seconds: float) -> tuple[list[str], bool]:
        """Start, kill after some seconds; return the keys told before, and whether it was still running."""
        with self.start() as process:
            time.sleep(seconds)
            running = process.poll() is None
            os.kill(process.pid, signal.SIGKILL)
            told = process.communicate(timeout=60)[0].split()
        return told, running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    make_card(root)
    make_images(root / "images", images=300)
    return root


def _kept(out: Path) -> list[str]:
    return [t.key for t in read_study(out).trials] if (out / FILE).exists() and _has_record(out) else []


def _has_record(out: Path) -> bool:
    import sqlite3

    base = sqlite3.connect(f"{(out / FILE).absolute().as_uri()}?mode=ro", uri=True)
    try:
        return bool(base.execute("SELECT 1 FROM decisions WHERE name = 'record'").fetchone())
    except sqlite3.OperationalError:  # killed before the tables were made
        return False
    finally:
        base.close()


def _named(study: StudyRecord) -> dict[tuple[str, str], Trial]:
    return {(t.setting.engine, t.recipe): t for t in study.trials}


def _disturb(search: Search, longest_s: float, kills: int, seed: int) -> tuple[StudyRecord, int]:
    """Kill a search again and again, then let it end; check after each kill that nothing is lost.

    Returns:
        The record, and how often the search was killed: it may end before all kills came.
    """
    rng = np.random.default_rng(seed)
    told, killed = list[str](), 0
    while killed < kills:
        more, running = search.kill_after(float(rng.uniform(0.1, 1.0)) * longest_s)
        told += more
        kept = _kept(search.out)
        # What was told is in the journal; what is in it may have been ended before it was told.
        assert set(told) <= set(kept), "a trial was lost"
        assert len(set(kept)) == len(kept)
        if not running:
            break
        killed += 1
    study, last = search.finish()
    told += last
    assert len(told) == len(set(told)), "a trial was measured twice"
    assert set(told) <= {t.key for t in study.trials}
    return study, killed


def _same_accuracies(study: StudyRecord, other: StudyRecord) -> set[tuple[str, str]]:
    """Compare what both measured, and return it."""
    first, second = _named(study), _named(other)
    both = first.keys() & second.keys()
    for name in both:
        if first[name].state == second[name].state == "measured":
            assert first[name].accuracy == second[name].accuracy, name
            assert first[name].versus_float == second[name].versus_float, name
            assert first[name].key == second[name].key and first[name].bytes == second[name].bytes, name
    return both


def _same_answer(study: StudyRecord, other: StudyRecord) -> None:
    """Check for the same winner, or two that neither search's speed intervals tell apart."""
    assert study.answer is not None and other.answer is not None
    assert study.answer.found == other.answer.found
    winners = {study.answer.key, other.answer.key}
    if len(winners) == 1:
        return
    apart = []
    for record in (study, other):
        timings = [t.timing for t in record.trials if t.key in winners and t.timing is not None]
        ends = [t.ratio_interval for t in timings if t.ratio_interval is not None]
        apart.append(len(ends) == 2 and (ends[0].high < ends[1].low or ends[1].high < ends[0].low))
    assert not all(apart), "another winner, although the speeds are told apart"


@pytest.fixture(scope="module")
def by_size(folder: Path) -> tuple[StudyRecord, float]:
    """An undisturbed search for size, which no timing can turn, and its seconds."""
    begin = time.perf_counter()
    study, _ = Search(folder, folder / "size", ("top1-drop<=0%",), "size").finish()
    return study, time.perf_counter() - begin


def test_three_kills(folder: Path, by_size: tuple[StudyRecord, float], tmp_path: Path) -> None:
    calm, seconds = by_size
    search = Search(folder, tmp_path / "out", ("top1-drop<=0%",), "size")
    study, killed = _disturb(search, seconds / 2, kills=3, seed=0)
    assert killed == 3
    assert list(_named(study)) == list(_named(calm))
    assert _same_accuracies(study, calm) == set(_named(calm))
    assert study.answer is not None and calm.answer is not None
    assert study.answer.key == calm.answer.key
    assert study.answer.confirmation == calm.answer.confirmation
    assert (tmp_path / "out/best/model.onnx").read_bytes() == (folder / "size/best/model.onnx").read_bytes()


@pytest.mark.slow
def test_kills_among_fewer_bits(folder: Path, tmp_path: Path) -> None:
    begin = time.perf_counter()
    calm, _ = Search(folder, tmp_path / "calm", ("top1-drop<=15%",), "size").finish()
    seconds = time.perf_counter() - begin
    search = Search(folder, tmp_path / "out", ("top1-drop<=15%",), "size")
    study, killed = _disturb(search, seconds / 2, kills=3, seed=1)
    assert killed == 3
    assert [t for t in calm.trials if t.rung == "widths" and t.packed_bytes]
    assert list(_named(study)) == list(_named(calm))
    assert _same_accuracies(study, calm) == set(_named(calm))
    sizes = [{t.key: t.packed_bytes for t in record.trials} for record in (study, calm)]
    assert sizes[0] == sizes[1]
    assert study.answer is not None and calm.answer is not None and study.answer.key == calm.answer.key


def test_a_killed_search_leaves_no_process(folder: Path, tmp_path: Path) -> None:
    search = Search(folder, tmp_path / "out", ("top1-drop<=12%",), "throughput")
    with search.start() as process:
        children: list[psutil.Process] = []
        while not children and process.poll() is None:
            time.sleep(0.05)
            children = psutil.Process(process.pid).children()
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    assert children
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["size", "throughput"])
def test_twenty_kills(folder: Path, tmp_path: Path, objective: str) -> None:
    budget = "top1-drop<=0%" if objective == "size" else "top1-drop<=2%"
    begin = time.perf_counter()
    calm, _ = Search(folder, tmp_path / "calm", (budget,), objective).finish()
    seconds = time.perf_counter() - begin
    killed = 0
    while killed < 20:
        search = Search(folder, tmp_path / f"after {killed}", (budget,), objective)
        study, more = _disturb(search, seconds / 6, kills=20 - killed, seed=killed)
        both = _same_accuracies(study, calm)
        assert {(engine, "float32") for engine in ("onnxruntime", "openvino")} <= both
        _same_answer(study, calm)
        killed += more
