from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fewbit.engines.onnxruntime import OnnxRuntime
from fewbit.engines.session import Setting
from fewbit.errors import EngineError

Files = dict[str, Path]


def open_file(path: Path, **setting: object) -> object:
    return OnnxRuntime().open(path, Setting.model_validate({"engine": "onnxruntime", **setting}))


@pytest.mark.parametrize(
    "setting", [{"batch": 4}, {"threads": 2}, {"threads": 2, "streams": 2}, {"threads": 4, "streams": 2}]
)
def test_any_number_of_images_in_any_setting_gives_the_same_logits(
    files: Files, images: np.ndarray, setting: dict[str, int]
) -> None:
    whole = open_file(files["int8"], batch=len(images)).run(images)
    session = open_file(files["int8"], **setting)
    for count in (1, 3, 11):
        assert np.array_equal(session.run(images[:count]), whole[:count])
    assert whole.shape == (11, 10)
    assert session.run(images[:0]).shape == (0, 10)


def test_one_image_does_not_depend_on_its_neighbours(files: Files, images: np.ndarray) -> None:
    session = open_file(files["int8"], batch=11)
    others = images.copy()
    others[1:] *= 50
    assert np.array_equal(session.run(others)[0], session.run(images)[0])


def test_int8_file_runs_whole_in_integers(files: Files) -> None:
    placement = open_file(files["int8"]).placement()
    kinds = {o.layers: o.kind for o in placement.operators if o.layers}
    assert kinds == {
        ("conv1", "relu1"): "QLinearConv",
        ("dw", "relu_dw"): "QLinearConv",
        ("pw",): "QLinearConv",
        ("add", "relu_add"): "QLinearAdd",
        ("branch", "relu_branch"): "QLinearConv",
        ("concat",): "QLinearConcat",
        ("pool",): "NhwcMaxPool",
        ("gap",): "QLinearGlobalAveragePool",
        ("flat",): "Flatten",
        ("fc",): "QGemm",
    }
    assert placement.float_matrix_operators() == ()
    assert placement.float_operators == 0
    assert placement.integer_operators == 9
    assert sum(o.matrix for o in placement.operators) == 5
    assert placement.by_layer()["relu_dw"].precision == "int8"


def test_float_file_runs_in_float_and_every_layer_is_found(files: Files) -> None:
    placement = open_file(files["float"]).placement()
    assert placement.integer_operators == 0
    assert {o.precision for o in placement.operators} == {"float32"}
    assert set(placement.by_layer()) == {"conv1", "relu1", "dw", "relu_dw", "gap", "flat", "fc"}
    assert [o.layers for o in placement.float_matrix_operators()] == [
        ("conv1", "relu1"),
        ("dw", "relu_dw"),
        ("fc",),
    ]


def test_placement_says_why_a_convolution_stayed_in_float(files: Files) -> None:
    placement = open_file(files["mixed"]).placement()
    why = {o.layers[0]: o.why for o in placement.float_matrix_operators()}
    assert why == {
        "symmetric": "the Relu after it stays, because its QuantizeLinear has zero point 0 and not -128",
        "wide": "the Clip after it stays, because its QuantizeLinear reaches 7, above the Clip's 6",
        "open": "no QuantizeLinear after it and its Relu, but Conv",
        "weights_only": "weights only: its input is not quantized",
        "plain": "its input and weights are not quantized",
    }
    assert placement.by_layer()["fc"].precision == "int8"


def test_bf16_is_refused(files: Files) -> None:
    with pytest.raises(
        EngineError, match=r"^float.onnx: onnxruntime computes nothing in bf16 on the CPU; use float32"
    ):
        open_file(files["float"], float_precision="bf16")


def test_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model" * 20)
    with pytest.raises(
        EngineError, match=r"^broken.onnx: onnxruntime refuses it \(.*Protobuf parsing failed.*\)$"
    ):
        open_file(path)


def test_wrong_image_size_is_told_in_one_line(files: Files, images: np.ndarray) -> None:
    with pytest.raises(
        EngineError, match=r"^float.onnx: onnxruntime failed on images \(1, 2, 16, 16\) \(.*\)$"
    ):
        open_file(files["float"]).run(images[:2, :2])


def test_fixed_batch_must_be_the_settings(
    tmp_path: Path, write_net: dict[str, Callable[..., Path]], images: np.ndarray
) -> None:
    path = write_net["float"](tmp_path / "fixed.onnx", batch=4)
    with pytest.raises(
        EngineError, match=r"^fixed.onnx: its batch is fixed at 4, the setting asks for 1; use --batch 4"
    ):
        open_file(path)
    free = open_file(write_net["float"](tmp_path / "free.onnx")).run(images)
    assert np.allclose(open_file(path, batch=4).run(images), free, atol=1e-5)
