"""The benchmarks of the searches over precisions run and say what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fewbit.registry import ROWS

BENCH = Path(__file__).resolve().parents[2] / "bench"


def run(script: str, *options: str) -> Any:
    command = [sys.executable, str(BENCH / script), *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout)


def test_every_row_at_equal_limits_and_whole_fronts() -> None:
    answer = run("solvers.py", "--regions", "6", "--problems", "1", "--points", "4")
    names = {*ROWS["search"], "evolve-1000"}
    hawq, made, fronts = answer["hawq"], answer["made_up"], answer["fronts"]
    assert len(hawq) == 9 * len(names) and {row["row"] for row in hawq} == names
    assert all(abs(row["gain"] - 1) < 1e-5 for row in hawq if row["row"] == "integer_program")
    assert all(0.9 < row["gain"] < 1 + 1e-5 and row["seconds"] > 0 for row in hawq)
    assert len(made) == 3 * len(names) and all(row["loss_ratio"] >= 1 - 1e-9 for row in made)
    assert [row["points"] for row in fronts] == [29, 24, 41, 4] and fronts[0]["complete"]
    assert all(0.5 < row["evolved_gain"] <= 1 + 1e-9 and row["seconds"] > 0 for row in fronts)


@pytest.mark.needs_shared
def test_widths_of_a_real_network_inside_the_same_bytes(shared: Path) -> None:
    card, train = shared / "networks" / "resnet20.toml", shared / "data" / "cifar10" / "train.tar"
    few = ["--calibration-images", "4", "--images", "50", "--batch", "2", "--steps", "2", "--limits", "3"]
    only = ["--rows", "integer_program,greedy,network KL"]
    answer = run("widths.py", str(card), "--calibration", str(train), *few, *only)
    rows = {row["row"]: row for row in answer["rows"]}
    assert list(rows) == ["uniform", "integer_program", "greedy", "network KL"]
    limit = rows["uniform"]["bytes"]
    assert rows["uniform"]["widths"] == "3" * 20 and answer["sensitivity_s"] > 0
    assert all(row["bytes"] <= limit and len(row["widths"]) == 20 for row in rows.values())
    assert rows["integer_program"]["predicted"] <= rows["greedy"]["predicted"] < rows["uniform"]["predicted"]
    assert rows["integer_program"]["kl"] < rows["uniform"]["kl"]
