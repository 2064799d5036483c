from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from fewbit.errors import ModelFileError
from fewbit.export.onnx_out import export_onnx
from fewbit.load.exported import Exported, read_exported
from networks import quantize

INPUT = {"size": [3, 16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
FACTS = {
    "network": "residual",
    "classes": 5,
    "input": INPUT,
    "labels": {"cat": 1, "dog": 0},
    "calibration_images": ["0a1b2c3d4e5f", "f5e4d3c2b1a0"],
}


def written(path: Path, facts: object) -> Path:
    text = facts if isinstance(facts, str) else json.dumps(facts)
    export_onnx(quantize("residual", "float32"), path, metadata={"card": text})
    return path


def test_an_exported_file_says_what_it_needs(tmp_path: Path) -> None:
    path = written(tmp_path / "net.onnx", FACTS)
    found = read_exported(path)
    assert isinstance(found, Exported)
    assert (found.network, found.classes, found.labels) == ("residual", 5, {"cat": 1, "dog": 0})
    assert found.calibration_images == {"0a1b2c3d4e5f", "f5e4d3c2b1a0"}
    assert found.input.size == (3, 16, 16) and found.input.std == (0.25, 0.25, 0.25)


def test_its_card_names_the_file_itself(tmp_path: Path) -> None:
    path = written(tmp_path / "net.onnx", FACTS)
    found = read_exported(path)
    assert found is not None
    card = found.card(path)
    assert card.source.path == path.resolve() and card.source.kind == "onnx"
    assert (card.network.name, card.network.classes, card.input) == ("residual", 5, found.input)


def test_a_file_of_another_program_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "theirs.onnx"
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    onnx.save(model, path)
    assert read_exported(path) is None
    export_onnx(quantize("residual", "float32"), path)
    assert read_exported(path) is None


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        ModelFileError, match=r"none\.onnx: there is no such file; give an exported \.onnx file or"
    ):
        read_exported(tmp_path / "none.onnx")


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_a_file_cut_short_is_told(tmp_path: Path, keep: float) -> None:
    path = written(tmp_path / "net.onnx", FACTS)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ModelFileError, match=r"net\.onnx: is damaged or no ONNX file; export it again"):
        read_exported(path)


def test_a_file_of_another_kind_is_told(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"\xff\xd8\xff\xe0 a photograph")
    with pytest.raises(ModelFileError, match="is damaged or no ONNX file"):
        read_exported(path)
    with pytest.raises(ModelFileError, match="is damaged or no ONNX file"):
        read_exported(tmp_path)


@pytest.mark.parametrize(
    "facts",
    [
        "{",
        [1, 2],
        {key: value for key, value in FACTS.items() if key != "classes"},
        FACTS | {"calibration_images": None},
        FACTS | {"labels": ["cat"]},
        FACTS | {"labels": {"cat": "one"}},
        FACTS | {"classes": "many"},
    ],
)
def test_damaged_facts_are_told(tmp_path: Path, facts: object) -> None:
    with pytest.raises(
        ModelFileError,
        match=r"net\.onnx: its fewbit metadata is damaged or of another version of fewbit \(.+\); export it",
    ):
        read_exported(written(tmp_path / "net.onnx", facts))


def test_damaged_preprocessing_is_told_by_its_key(tmp_path: Path) -> None:
    path = written(tmp_path / "net.onnx", FACTS | {"input": INPUT | {"mean": [0.5]}})
    with pytest.raises(
        ModelFileError,
        match=r"another version of fewbit \(key 'input\.mean' is \[0\.5\]: has 1 number where size",
    ):
        read_exported(path)
