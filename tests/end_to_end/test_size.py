"""`search --objective size` goes under 8 bits and says what that is worth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fewbit.data.demo import demo_cards, write_tar
from fewbit.search.journal import read_study
from fewbit.search.trial import StudyRecord

pytestmark = pytest.mark.slow
BUDGET = "top1-drop<=6%"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("size")
    card = next(path for path in demo_cards() if "residual" in path.name)
    write_tar(root / "demo.tar", "test", 500)
    few = ["--engines", "onnxruntime", "--batch", "8", "--threads", "1", "--trials", "6", "--seed", "0"]
    asked = ["--data", str(root / "demo.tar"), "--budget", BUDGET, "--objective", "size"]
    command = [sys.executable, "-m", "fewbit", "search", str(card), *asked, *few, "--out", str(root / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return root / "out"


@pytest.fixture(scope="module")
def study(out: Path) -> StudyRecord:
    return read_study(out)


def test_the_answer_is_smaller_than_int8_and_inside_the_budget(out: Path, study: StudyRecord) -> None:
    result: dict[str, Any] = json.loads((out / "best" / "result.json").read_text())
    int8 = next(t for t in study.trials if t.recipe == "int8")
    float32 = next(t for t in study.trials if t.recipe == "float32")
    assert result["found"] and "-widths" in result["recipe"]
    assert result["packed_bytes"] < 0.8 * int8.bytes < result["bytes"]
    assert (
        result["versus_float"]["top1_drop"] <= 0.06 and result["holdout"]["versus_float"]["top1_drop"] <= 0.06
    )
    assert result["bytes"] == (out / "best" / "model.onnx").stat().st_size
    assert result["float_bytes"] == float32.bytes
    assert int8.packed_bytes == 0 and float32.packed_bytes == 0
    assert "with weights packed (the file has" in result["sentence"]


def test_the_widths_are_the_programs_choice_and_stand_in_the_recipe(out: Path, study: StudyRecord) -> None:
    assert study.answer is not None
    answer = next(t for t in study.trials if t.key == study.answer.key)
    widths = {layer.name: layer.weight_bits for layer in answer.layers if layer.weight_bits is not None}
    assert len(set(widths.values())) > 1 and min(w for w in widths.values() if w) < 8
    for name, bits in widths.items():
        assert f'match = "{name}"' in answer.recipe_toml and f"bits = {bits}" in answer.recipe_toml
    assert (out / "best" / "recipe.toml").read_text() == answer.recipe_toml


def test_the_report_tells_the_file_from_the_packed_size(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert "Size with weights packed" in page and "Size of the file" in page
    assert "weights of several widths" in page
    front = json.loads((out / "pareto.json").read_text())["bytes"]
    assert any(point["packed_bytes"] and point["packed_bytes"] < point["bytes"] for point in front)
