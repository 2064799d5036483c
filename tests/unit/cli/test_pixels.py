from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from command import Fewbit


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
