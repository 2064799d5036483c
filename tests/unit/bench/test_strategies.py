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
from strategies import opponents, slug
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
    row = strategy_row("int8", standing("int8", 300), predictions(146, 172), exact, BUDGETS, 1)
    assert row["top1_drop"] == pytest.approx(0.02) and row["top5_error"] == pytest.approx(0.14)
    low, high = row["top5_error_interval95"]
    assert low < 0.14 < high and row["images"] == 200
    assert row["budgets"] == {"top5-error<=17%": "met", "top1-drop<=1%": "missed"}
    top5 = [
        strategy_row("int8", standing("int8", 300), predictions(150, right5), exact, BUDGETS, looks, chosen)
        for right5, looks, chosen in ((177, 1, False), (177, 30, False), (198, 30, False), (198, 30, True))
    ]
    assert [row["budgets"]["top5-error<=17%"] for row in top5] == ["proven", "met", "proven", "met"]
    gone = strategy_row("int8", Standing(standing("", 1).entrant, failed="no file"), None, exact, BUDGETS, 1)
    assert gone["failed"] == "no file" and "budgets" not in gone


def test_each_budget_has_a_folder_of_its_own() -> None:
    budgets = ("top5-error<=17%", "top5-error<17%", "top1>=0.75", "top1-drop <= 1 %")
    assert [slug(budget) for budget in budgets] == [
        "top5-error-le-17",
        "top5-error-lt-17",
        "top1-ge-0.75",
        "top1-drop-le-1",
    ]


def test_an_answer_sits_with_float32_and_the_fastest_peers() -> None:
    speeds = {"onnxruntime float32": 10, "openvino float32": 90, "a": 60, "b": 80, "c": 70, "d": 75}
    peers = [standing(name, speed) for name, speed in speeds.items()]
    failed = Standing(standing("e", 1).entrant, failed="it crashed")
    met = [entrant.name for entrant in opponents([standing("own", 500, True), *peers, failed])]
    assert met == ["onnxruntime float32", "openvino float32", "b", "d"]


def test_settings_cross_batches_and_streams() -> None:
    assert [(s.batch, s.threads, s.streams) for s in settings_of((1, 8), 1)] == [(1, 1, 1), (8, 1, 1)]


def made_card(folder: Path) -> Path:
    """Write a tiny network, its images and its card, which names them."""
    make_card(folder)
    make_images(folder / "images", images=120)
    card = folder / "tiny.toml"
    expected = '\n[expected]\ndata = "images"\nimages = 120\ntop1_correct = 0\ntop5_correct = 0\n'
    card.write_text(card.read_text(encoding="utf-8") + expected, encoding="utf-8")
    return card


def run(card: Path, *more: str, **changed: str) -> subprocess.CompletedProcess[str]:
    asked = {"minutes": "0.1", "budget": "top1-drop<=30%", "recipes": "int8,int8-dynamic", "batches": "8"}
    asked |= {"sittings": "1", "rounds": "3", "first-rounds": "3", "block": "0.01"}
    asked |= {"studies": str(card.parent / "studies")} | changed
    command = [sys.executable, str(ROOT / "bench" / "strategies.py"), str(card), *more]
    for name, value in asked.items():
        command += [f"--{name}", value]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)


def test_it_runs_on_a_small_card(tmp_path: Path) -> None:
    card, rows = made_card(tmp_path), tmp_path / "rows.jsonl"
    ended = run(card, "--json", rows=str(rows))
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    by_name = {row["strategy"]: row for row in found if "strategy" in row}
    assert by_name["answer to top1-drop<=30%"]["images"] == 100  # 20 calibrate
    for name in ("fewbit int8 on ONNX Runtime", "onnxruntime float32", "openvino as it comes"):
        assert by_name[name]["images_per_s"] > 0 and set(by_name[name]["budgets"]) == {"top1-drop<=30%"}
    assert sum(name.startswith("fewbit int8-dynamic") for name in by_name) == 2
    assert not any(name.startswith("torch.compile") for name in by_name)
    (answer,) = [row for row in found if "budget" in row]
    assert set(answer["over"]) >= {"onnxruntime float32", "openvino float32"}
    assert answer["holdout_images"] == 40 and answer["rounds"] == 3
    again = run(card, rows=str(rows))  # from the rows that were kept, without measuring
    assert again.returncode == 0 and "surveying" not in again.stderr
    assert len(rows.read_text(encoding="utf-8").splitlines()) == len(found)
    console = Console(file=io.StringIO(), width=300)
    for table in tables_of(found):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().strip() == again.stdout.strip()
    other = run(card, rows=str(rows), seed="1", recipes="float32")
    assert other.returncode == 0, "other options are measured anew, and searched with their own seed"
    assert "searching" in other.stderr and "int8-dynamic" not in other.stdout
    kept = tmp_path / "studies" / "tiny-top1-drop-le-30-0"
    kept.rename(kept.with_name("tiny-top1-drop-le-20-0"))
    wrong = run(card, budget="top1-drop<=20%")
    assert (
        wrong.returncode == 1
        and "is another search: its budget is top1-drop<=30%, asked for is top1-drop<=20%;" in wrong.stderr
    )


def test_what_cannot_be_used_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    card = made_card(tmp_path)
    for told, changed in (
        ("budget 'bytes<=2MB': give one of accuracy", {"budget": "bytes<=2MB"}),
        ("int8-nowhere", {"recipes": "int8,int8-nowhere"}),
    ):
        ended = run(card, **changed)
        assert ended.returncode == 2 and told in ended.stderr
    assert not (tmp_path / "studies").exists()
