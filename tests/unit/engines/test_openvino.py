from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fewbit.engines.onnxruntime import OnnxRuntime
from fewbit.engines.openvino import OpenVino
from fewbit.engines.session import Setting
from fewbit.errors import EngineError
from fewbit.measure.host import describe_host

Files = dict[str, Path]


def open_file(path: Path, **setting: object) -> object:
    return OpenVino().open(path, Setting.model_validate({"engine": "openvino", **setting}))


@pytest.mark.parametrize("setting", [{"batch": 4}, {"threads": 2}, {"batch": 3, "threads": 2, "streams": 2}])
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
    assert np.array_equal(session.run(images[:1])[0], session.run(images)[0])


def test_engines_agree(files: Files, images: np.ndarray, step: float) -> None:
    for name, tolerance in (("float", 1e-5), ("int8", 1.01 * step)):
        ours = open_file(files[name], batch=4).run(images)
        theirs = OnnxRuntime().open(files[name], Setting(batch=4)).run(images)
        assert np.abs(ours - theirs).max() <= tolerance
        assert np.abs(ours).max() > 10 * tolerance


def test_float32_is_pinned_and_bf16_is_another_network(files: Files, images: np.ndarray) -> None:
    session = open_file(files["float"])
    assert {o.precision for o in session.placement().operators if o.matrix} == {"float32"}
    if not describe_host().bf16:
        with pytest.raises(
            EngineError, match=r"^float.onnx: this processor has no native bf16; use float32$"
        ):
            open_file(files["float"], float_precision="bf16")
        return
    half = open_file(files["float"], float_precision="bf16")
    assert {o.precision for o in half.placement().operators if o.matrix} == {"bf16"}
    error = np.abs(half.run(images) - session.run(images)).max()
    assert 1e-5 < error < 0.05


def test_int8_file_runs_whole_in_integers(files: Files) -> None:
    placement = open_file(files["int8"]).placement()
    kinds = {o.layers: o.kind for o in placement.operators if o.layers}
    assert kinds == {
        ("conv1", "relu1"): "Convolution",
        ("dw", "relu_dw"): "Convolution",
        ("pw", "add", "relu_add"): "Convolution",
        ("branch", "relu_branch"): "Convolution",
        ("concat",): "Concatenation",
        ("pool",): "Pooling",
        ("gap",): "Reduce",
        ("flat",): "Reshape",
        ("fc",): "FullyConnected",
    }
    assert placement.float_matrix_operators() == ()
    assert placement.float_operators == 0
    assert placement.integer_operators == 8
    assert sum(o.matrix for o in placement.operators) == 5


def test_placement_says_why_a_convolution_stayed_in_float(files: Files) -> None:
    placement = open_file(files["mixed"]).placement()
    why = {o.layers[0]: o.why.partition(": ")[2] for o in placement.float_matrix_operators()}
    assert why == {
        "weights_only": "weights only: its input is not quantized",
        "plain": "its input and weights are not quantized",
    }
    assert placement.by_layer()["symmetric"].precision == "int8"
    assert placement.by_layer()["relu2"].precision == "int8"


def test_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"")
    with pytest.raises(EngineError, match=r"^broken.onnx: openvino refuses it \(.*\)$"):
        open_file(path)


def test_wrong_image_size_is_told_in_one_line(files: Files, images: np.ndarray) -> None:
    message = r"^float.onnx: openvino got images \(2, 16, 16\), the network takes \(3, 16, 16\)$"
    with pytest.raises(EngineError, match=message):
        open_file(files["float"]).run(images[:2, :2])


def test_telemetry_is_never_imported(files: Files) -> None:
    program = (
        "import sys; from pathlib import Path; from fewbit.engines.openvino import OpenVino; "
        "from fewbit.engines.session import Setting; "
        f"OpenVino().open(Path({str(files['float'])!r}), Setting(engine='openvino')); "
        "print([m for m in sys.modules if m.partition('.')[0] in ('openvino_telemetry', 'torch')])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
