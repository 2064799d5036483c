from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import small_search

PIPELINE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "pipeline.py"))


def test_three_ways_are_timed_and_two_agree(tmp_path: Path) -> None:
    small_search.make_card(tmp_path)
    small_search.make_images(tmp_path / "images", images=40)
    arguments = [str(tmp_path / "tiny.toml"), "--data", str(tmp_path / "images"), "--rounds", "3"]
    said = CliRunner().invoke(PIPELINE["main"], [*arguments, "--batches", "4", "--images", "24", "--json"])
    assert said.exit_code == 0, said.output
    rows = json.loads(said.stdout)
    assert [row["way"] for row in rows] == [*PIPELINE["WAYS"]] * 2
    assert {row["timing"]["setting"]["engine"] for row in rows} == {"openvino", "onnxruntime"}
    assert all(row["timing"]["images_per_s"] > 0 and row["images"] == 24 for row in rows)


def test_files_that_disagree_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_search.make_card(tmp_path)
    small_search.make_images(tmp_path / "images", images=24)

    def build(card: Any, engine: str, images: Any, recipe: str, folder: Path) -> list[Path]:
        made: list[Path] = PIPELINE["build"](card, engine, images, recipe, folder)
        other: list[Path] = PIPELINE["build"](card, engine, images.subset(range(4)), recipe, folder / "other")
        shutil.copy(other[2], made[2])
        return made

    (tmp_path / "other").mkdir()
    monkeypatch.setitem(PIPELINE["_rows"].__globals__, "build", build)
    monkeypatch.setattr(PIPELINE["tempfile"], "TemporaryDirectory", lambda: _Folder(tmp_path))
    arguments = [str(tmp_path / "tiny.toml"), "--data", str(tmp_path / "images"), "--rounds", "3"]
    said = CliRunner().invoke(PIPELINE["main"], [*arguments, "--batches", "4", "--images", "24"])
    assert said.exit_code == 1
    assert (
        "tiny-openvino-uint8.onnx: its logits are not those of tiny-openvino-float32.onnx; report it"
        in said.output
    )


class _Folder:
    """Stands for a temporary folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> str:
        return str(self.path)

    def __exit__(self, *_: object) -> None:
        pass
