"""The benchmark of the sensitivities runs on the demo and says what it promises."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from fewbit.data.demo import demo_cards, write_tar
from fewbit.registry import ROWS

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "sensitivity.py"
BENCH: dict[str, Any] = runpy.run_path(str(SCRIPT))


def test_rank_correlations_are_scipys() -> None:
    pairs = np.random.default_rng(0).normal(size=(4, 5, 3, 2)).round(1)
    pairs[3, ..., 0] = 1.0
    found = BENCH["spearman"](pairs)
    expected = [spearmanr(draw[..., 0].ravel(), draw[..., 1].ravel()).statistic for draw in pairs[:3]]
    assert found.tolist() == pytest.approx([*expected, 0.0])


def test_it_ranks_regions_and_tells_correlation_and_cost(tmp_path: Path) -> None:
    card = next(path for path in demo_cards() if "residual" in path.name)
    write_tar(tmp_path / "demo.tar", "test", 100)
    options = ["--judge", str(tmp_path / "demo.tar"), "--images", "10", "--judge-images", "40"]
    command = [sys.executable, str(SCRIPT), str(card), *options, "--bits", "2,8", "--samples", "2"]
    answer = json.loads(
        subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, timeout=300).stdout
    )
    assert answer["bits"] == [2, 8] and answer["judge_images"] == 40
    regions, rows = answer["regions"], answer["rows"]
    assert [row["row"] for row in rows] == list(ROWS["sensitivity"])
    drops = [region["drop"] for region in regions]
    assert drops == sorted(drops, reverse=True)
    for region in regions:
        assert region["interval95"][0] <= region["drop"] <= region["interval95"][1]
    for row in rows:
        assert row["images"] == 10 and row["forwards"] > 1 and row["seconds"] > 0
        assert -1 <= row["interval95"][0] <= row["spearman"] <= row["interval95"][1] <= 1
        assert list(row["within_width"]) == ["2", "8"]
        assert sum(region["ranks"][row["row"]] for region in regions) == sum(range(1, len(regions) + 1))
    shown = subprocess.run(
        [*command, "--rows", "kl"], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert "Ranks of regions" in shown and "Rank correlation with the drop on 40 images" in shown
    assert "fisher" not in shown


def test_too_few_images_are_told(tmp_path: Path) -> None:
    card = next(path for path in demo_cards() if "residual" in path.name)
    write_tar(tmp_path / "demo.tar", "test", 100)
    options = ["--judge", str(tmp_path / "demo.tar"), "--images", "100"]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(card), *options], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "demo.tar: has 100 images, of which 100 are taken; give others" in run.stderr
