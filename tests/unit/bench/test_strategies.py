"""Strategies side by side: how rows come about, on measurements made by hand and on the demo."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fewbit.engines.session import Setting
from fewbit.errors import EngineError
from fewbit.measure.accuracy import Predictions
from fewbit.measure.intervals import Interval
from fewbit.measure.speed import Timing
from small_search import make_card, make_images
from speed_turns import Entrant, Standing
from strategies import opponents
from strategies_field import settings_of
from strategies_table import strategy_row, tables_of

ROOT = Path(__file__).resolve().parents[3]
BUDGETS = ("top5-error<=17%", "top1-drop<=1%")


def refuse() -> None:
    raise EngineError("not to be opened")


def standing(name: str, images_per_s: float, own: bool = False) -> Standing:
    timing = Timing(
        setting=Setting(batch=8),
        images_per_s=images_per_s,
        interval=Interval(low=0.9 * images_per_s, high=1.1 * images_per_s),
        ms_per_batch_p50=1.0,
        rounds=12,
        ratio=images_per_s / 100,
        ratio_interval=Interval(low=0.9, high=1.1),
    )
    return Standing(Entrant(name, "8 at a time", "int8", own, refuse), timing)  # type: ignore[arg-type]


def predictions(right1: int, right5: int, total: int = 200) -> Predictions:
    places = np.arange(total)
    return Predictions(places < right1, places < right5, np.where(places < right1, 0, 1))


def test_a_row_holds_each_budget_against_the_figures() -> None:
    exact = predictions(150, 180)
    row = strategy_row("int8", standing("int8", 300), predictions(146, 172), exact, BUDGETS)
    assert row["top1_drop"] == pytest.approx(0.02) and row["top5_error"] == pytest.approx(0.14)
    low, high = row["top5_error_interval95"]
    assert low < 0.14 < high and row["images"] == 200
    assert row["budgets"] == {"top5-error<=17%": "met", "top1-drop<=1%": "missed"}
    sure = strategy_row("int8", standing("int8", 300), predictions(150, 198), exact, BUDGETS)
    assert sure["budgets"]["top5-error<=17%"] == "proven"
    gone = strategy_row("int8", Standing(standing("", 1).entrant, failed="no file"), None, exact, BUDGETS)
    assert gone["failed"] == "no file" and "budgets" not in gone


def test_an_answer_sits_with_float32_and_the_fastest_peers() -> None:
    speeds = {"onnxruntime float32": 10, "openvino float32": 90, "a": 60, "b": 80, "c": 70, "d": 75}
    peers = [standing(name, speed) for name, speed in speeds.items()]
    failed = Standing(standing("e", 1).entrant, failed="it crashed")
    met = [entrant.name for entrant in opponents([standing("own", 500, True), *peers, failed])]
    assert met == ["onnxruntime float32", "openvino float32", "b", "d"]


def test_settings_cross_batches_and_streams() -> None:
    assert [(s.batch, s.threads, s.streams) for s in settings_of((1, 8), 1)] == [(1, 1, 1), (8, 1, 1)]


def test_it_runs_on_a_small_card(tmp_path: Path) -> None:
    make_card(tmp_path)
    make_images(tmp_path / "images", images=120)
    card = tmp_path / "tiny.toml"
    text = card.read_text(encoding="utf-8")
    expected = '\n[expected]\ndata = "images"\nimages = 120\ntop1_correct = 0\ntop5_correct = 0\n'
    card.write_text(text + expected, encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "bench" / "strategies.py"), str(card), "--minutes", "0.1"]
    command += ["--budget", "top1-drop<=30%", "--recipes", "int8,int8-nowhere", "--batches", "8"]
    command += ["--sittings", "1", "--rounds", "3", "--first-rounds", "3", "--block", "0.01"]
    command += ["--studies", str(tmp_path / "studies"), "--rows", str(rows)]

    def run(*more: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        ended = subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, check=False, timeout=500
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    found = json.loads(run("--json"))
    by_name = {row["strategy"]: row for row in found if "strategy" in row}
    assert by_name["answer to top1-drop<=30%"]["images"] == 100  # 20 calibrate
    assert "int8-nowhere" in by_name["fewbit int8-nowhere on ONNX Runtime"]["failed"]
    for name in ("fewbit int8 on ONNX Runtime", "onnxruntime float32", "openvino as it comes"):
        assert by_name[name]["images_per_s"] > 0 and set(by_name[name]["budgets"]) == {"top1-drop<=30%"}
    (answer,) = [row for row in found if "budget" in row]
    assert set(answer["over"]) >= {"onnxruntime float32", "openvino float32"}
    assert answer["holdout_images"] == 40
    again = run()  # from the rows that were kept, without measuring
    assert "top1-drop<=30%" in again and len(rows.read_text(encoding="utf-8").splitlines()) == len(found)
    console = Console(file=io.StringIO(), width=300)
    for table in tables_of(found):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().strip() == again.strip()
