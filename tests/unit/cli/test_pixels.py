from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from command import Fewbit
from fewbit.recipe import read_recipe


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_file_that_takes_pixels_is_made_evaluated_and_timed(
    fewbit: Fewbit, job: Path, tmp_path: Path, engine: str
) -> None:
    for takes in ("float32", "uint8"):
        said = fewbit(
            *("quantize", job / "tiny.toml", "--data", job / "images", "--out", tmp_path / f"{takes}.onnx"),
            *("--engine", engine, "--input", takes, "--calibration-images", 40, "--json"),
        )
        assert (said.code, said.err) == (0, "")
        assert said.answer["recipe"] == ("int8" if takes == "float32" else "int8-pixels")
    entry = onnx.load(tmp_path / "uint8.onnx").graph.input[0].type.tensor_type
    assert entry.elem_type == onnx.TensorProto.UINT8
    said = fewbit(
        *("eval", tmp_path / "uint8.onnx", "--data", job / "images", "--against", job / "tiny.toml"),
        *("--engine", engine, "--json"),
    )
    assert abs(said.answer["versus"]["top1_drop"]) <= 0.06 and said.answer["versus"]["flips"] <= 0.1
    assert said.answer["calibration_images_left_out"] == 40
    said = fewbit("bench", tmp_path / "uint8.onnx", "--engine", engine, "--rounds", 3, "--json")
    assert said.code == 0 and said.answer[0]["images_per_s"] > 0


def test_a_recipe_that_folds_the_input_makes_a_file_that_takes_pixels(
    fewbit: Fewbit, job: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(read_recipe("int8").with_pixels().to_toml())
    common = ("quantize", job / "tiny.toml", "--data", job / "images", "--recipe", tmp_path / "mine.toml")
    for takes, kind in ((), onnx.TensorProto.UINT8), (("--input", "float32"), onnx.TensorProto.FLOAT):
        assert fewbit(*common, *takes, "--out", tmp_path / "net.onnx").code == 0
        assert onnx.load(tmp_path / "net.onnx").graph.input[0].type.tensor_type.elem_type == kind
