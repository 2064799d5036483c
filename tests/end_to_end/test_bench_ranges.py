"""The benchmark of the range estimators runs and says what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench" / "ranges.py"


def test_pairs_take_turns_and_memory_is_told() -> None:
    options = ["--values", "4096", "--batches", "4", "--rounds", "3", "--json"]
    command = [sys.executable, str(BENCH), *options, "--only", "minmax,kl,calibrator:Entropy"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    answer = json.loads(run.stdout)
    rows = {row["tool"]: row for row in answer["rows"]}
    assert list(rows) == [
        *("fewbit:minmax", "fewbit:kl"),
        *("calibrator:MinMax", "collector:entropy", "calibrator:Entropy"),
    ]
    for name, against in (("minmax", "calibrator:MinMax"), ("kl", "collector:entropy")):
        ours = rows[f"fewbit:{name}"]
        assert ours["against"] == against and ours["rounds"] == 3
        assert ours["interval95"][0] <= ours["ratio"] <= ours["interval95"][1]
        assert ours["half_state_bytes"] == ours["last_state_bytes"]
        assert 0 < ours["observe_ms"] < ours["total_ms"]
    held = rows["calibrator:Entropy"]
    assert held["last_state_bytes"] > held["half_state_bytes"] > 4096 * 4
    low, high = (rows["fewbit:minmax"][key] for key in ("low", "high"))
    assert (low, high) == (rows["calibrator:MinMax"]["low"], rows["calibrator:MinMax"]["high"])


def test_a_tool_that_dies_is_named() -> None:
    command = [sys.executable, str(BENCH), "--values", "64", "--only", "nonsense", "--rounds", "2"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 1
    told = run.stderr.splitlines()[-1]
    assert told == "Error: fewbit:nonsense: the process ended; its message stands above"
