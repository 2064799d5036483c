"""The benchmark of speed runs on a small network, says what it promises, and keeps its rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_card import CARD, MODEL

BENCH = Path(__file__).resolve().parents[2] / "bench" / "speed.py"
PEERS = {"onnxruntime float32", "onnxruntime int8", "nncf int8"}


def test_every_contender_has_a_row(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(MODEL, encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(CARD, encoding="utf-8")
    rows_path = tmp_path / "rows.jsonl"
    rows_path.write_text('{"peak_gops": 1000.0}\n', encoding="utf-8")  # known, so not measured
    pace = ["--sittings", "2", "--rounds", "3", "--first-rounds", "3", "--block", "0.01", "--images", "8"]
    case = ["--batches", "2", "--threads", "1", "--only", "onnxruntime,nncf", "--peers", "/bin/false"]
    command = [sys.executable, str(BENCH), str(tmp_path / "tiny.toml"), *pace, *case]
    command += ["--rows", str(rows_path), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(run.stdout)
    assert found["machine"] == {"peak_gops": 1000.0}
    rows = found["rows"]
    assert {row["contender"] for row in rows if not row["own"]} == PEERS
    failed = {row["contender"]: row["failed"] for row in rows if "failed" in row}
    why = "/bin/false has no nncf; give one that has with --peers"
    assert failed == {"nncf int8": f"tiny: nncf:openvino made no file ({why})"}
    (answer,) = [row for row in rows if row["answer"]]
    assert answer["own"] and answer["contender"].startswith("fewbit ")
    assert answer["best_peer"].startswith("onnxruntime ")
    assert answer["ratio_interval95"][0] <= answer["ratio"] <= answer["ratio_interval95"][1]
    macs = 14 * 14 * 16 * (27 + 16) + 16 * 4
    assert answer["macs"] == macs
    assert answer["peak_fraction"] == pytest.approx(answer["images_per_s"] * 2 * macs / 1e12)
    assert {"first convolution", "1x1"} <= answer["ms_by_cause"].keys()
    kept = rows_path.read_text(encoding="utf-8")
    assert [json.loads(line) for line in kept.splitlines()] == [found["machine"], *rows]
