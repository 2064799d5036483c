from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import search_time
from fewbit.clock import PhaseTime
from search_time import Run, engine_share, rows, table_of
from small_search import make_card, make_images

ROOT = Path(__file__).resolve().parents[3]


def spent(phase: str, seconds: float, stage: str = "trials", times: int = 1) -> PhaseTime:
    return PhaseTime(
        stage=stage, phase=phase, seconds=seconds, cpu_s=seconds / 2, child_cpu_s=seconds / 4, times=times
    )


def run(timed_s: float = 6.0) -> Run:
    phases = (spent("time", timed_s), spent("time", 1.0, "finish", 3), spent("calibrate", 1.0))
    return Run("src", 12.0, 9.0, phases, 5, "int8")


def test_phases_of_all_stages_and_the_rest_of_the_process() -> None:
    found = rows([run(6.0), run(8.0)])
    assert [(row.phase, row.seconds, row.times) for row in found] == [
        ("time", 8.0, 4.0),
        ("start and report", 3.0, 1.0),
        ("calibrate", 1.0, 1.0),
    ]
    assert found[1].cpu_s == pytest.approx(9.0 - 0.75 * 9.0)
    assert sum(row.seconds for row in found) == 12.0


def test_the_engines_share_leaves_imports_and_the_report_out() -> None:
    assert engine_share([run()]) == 7 / 8
    console = Console(file=io.StringIO(), width=110)
    console.print(table_of([run()]))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "engines 88%" in text and "time (engine)" in text and "calibrate" in text


def test_it_times_a_search(tmp_path: Path) -> None:
    make_card(tmp_path)
    make_images(tmp_path / "images", images=120)
    script, card, data = ROOT / "bench" / "search_time.py", tmp_path / "tiny.toml", tmp_path / "images"
    few = ("--trials", "1", "--minutes", "0.05", "--rows", str(tmp_path / "rows"))
    ended = subprocess.run(
        [sys.executable, str(script), str(card), "--data", str(data), *few],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "start and report" in ended.stdout and "time (engine)" in ended.stdout
    assert (tmp_path / "rows").read_text().count("\n") == 1
    assert search_time.ENGINE_PHASES
