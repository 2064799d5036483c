from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, external_data_helper, helper

from fewbit.errors import ModelFileError
from fewbit.load.capture import load
from onnx_files import SIZE, Weights, card, f32, i64, kinds, make, node, read

CONV = f32(6, 4, 3, 3)


def external(folder: Path, location: str) -> Path:
    path = make([node("Conv", "x w")], {"w": CONV}, path=folder / "m.onnx")
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    place = folder / location
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(tensor.raw_data)
    external_data_helper.set_external_data(tensor, location, 0, len(tensor.raw_data))
    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path, message: str, classes: int = 6, size: tuple[int, int, int] = SIZE) -> None:
    with pytest.raises(ModelFileError, match=message) as error:
        load(card(path, classes, size))
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(str(path))


@pytest.mark.parametrize("location", ["../m.data", "../../etc/m.data"])
def test_external_data_outside_the_folder(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    refused(
        external(folder, location), rf"tensor 'w' keeps its data in '{location}', outside the file's folder"
    )


def test_external_data_at_an_absolute_path(tmp_path: Path) -> None:
    path = external(tmp_path, "m.data")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = str(tmp_path / "m.data")
    path.write_bytes(model.SerializeToString())
    assert model.graph.initializer[0].external_data[0].key == "location"
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "m.onnx")
    refused(moved, "outside the file's folder or behind a link; put the data beside the .onnx file")


def test_external_data_behind_a_link(tmp_path: Path) -> None:
    path = external(tmp_path, "m.data")
    (tmp_path / "m.data").rename(tmp_path / "real.data")
    (tmp_path / "m.data").symlink_to(tmp_path / "real.data")
    refused(path, "keeps its data in 'm.data', outside the file's folder or behind a link")


def test_external_data_missing_or_short(tmp_path: Path) -> None:
    path = external(tmp_path, "m.data")
    (tmp_path / "m.data").write_bytes(b"1234")
    refused(path, r"tensor 'w' needs 864 bytes of 'm\.data', which has 4; copy that file again")
    (tmp_path / "m.data").unlink()
    refused(
        path,
        r"tensor 'w' keeps its data in 'm\.data', which is missing; put that file beside the \.onnx file",
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_truncated_file(share: float, tmp_path: Path) -> None:
    path = make([node("Conv", "x w")], {"w": CONV}, path=tmp_path / "m.onnx")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(path, r"is damaged or (cut short, or )?no (valid )?ONNX")


def test_other_content(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"PK\x03\x04 this is a zip")
    refused(path, "is damaged or cut short, or no ONNX file; export it again")


def test_graph_that_is_not_valid(tmp_path: Path) -> None:
    refused(
        make([node("Relu", "nowhere")], path=tmp_path / "m.onnx"),
        r"is damaged or no valid ONNX \(.*\); export it again",
    )


def test_missing_file(tmp_path: Path) -> None:
    path = make([node("Relu", "x")], path=tmp_path / "m.onnx")
    made = card(path, 4)
    path.unlink()
    with pytest.raises(ModelFileError, match=r"m\.onnx: there is no such file; correct the path"):
        load(made)


@pytest.mark.parametrize(
    ("nodes", "weights", "message"),
    [
        (
            [node("Hardmax", "x")],
            {},
            r"operator Hardmax, node 'the/Hardmax_b', is not supported; docs/networks\.md lists those",
        ),
        (
            [node("Pow", "x c")],
            {"c": np.float32(3)},
            "operator Pow, node 'the/Pow_b', is not supported; a normalisation or GELU of unusual form",
        ),
        (
            [node("Pad", "x p", mode="reflect")],
            {"p": i64(0, 0, 1, 1, 0, 0, 1, 1)},
            r"operator Pad, node 'the/Pad_b': padding mode 'reflect' is not supported; docs/networks\.md",
        ),
        (
            [node("Conv", "x x")],
            {},
            "operator Conv, node 'the/Conv_b': a weight that depends on the images is not supported",
        ),
        (
            [node("Resize", "x - s", mode="linear")],
            {"s": np.array([1, 1, 2, 2], np.float32)},
            r"'the/Resize_b': resizing by \[1\.0, 1\.0, 2\.0, 2\.0\] in mode 'linear' is not supported",
        ),
        (
            [node("Conv", "x w")],
            {"w": f32(6, 3, 3, 3)},
            r"operator Conv, node 'the/Conv_b': does not fit its input \(Given groups=1.*\); check",
        ),
        (
            [node("Transpose", "x", perm=[1, 0, 2, 3])],
            {},
            "output 'y' has shape .* for 2 images; a classifier returns logits",
        ),
        (
            [node("Cast", "x", "h", to=10), node("Cast", "h", to=1)],
            {},
            "node 'the/Cast_h': a cast of the images to another type",
        ),
    ],
)
def test_operator_that_is_not_supported(
    nodes: list[NodeProto], weights: Weights, message: str, tmp_path: Path
) -> None:
    refused(make(nodes, weights, path=tmp_path / "m.onnx"), message)


def test_operator_of_another_domain(tmp_path: Path) -> None:
    path = make([node("Relu", "x")], path=tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.node[0].CopyFrom(
        helper.make_node("FusedConv", ["x"], ["b"], domain="com.microsoft", name="f")
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    refused(path, "operator com.microsoft.FusedConv, node 'f', is not supported")


@pytest.mark.parametrize("kind", ["DequantizeLinear", "QuantizeLinear"])
def test_quantized_file(kind: str, tmp_path: Path) -> None:
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z")]
    if kind == "DequantizeLinear":
        nodes = [node("DequantizeLinear", "w s z", "d"), node("Conv", "x d")]
    weights = {"s": np.float32(0.1), "z": np.int8(0), "w": CONV.astype(np.int8)}
    used = {name for n in nodes for name in n.input}
    path = make(nodes, {k: v for k, v in weights.items() if k in used}, path=tmp_path / "m.onnx")
    refused(
        path,
        rf"is already quantized \(operator {kind}, node 'the/{kind}_\w'\); give the float32 file",
    )


@pytest.mark.parametrize(
    ("opset", "message"),
    [
        (9, r"has opset 9; 11 to \d+ are read: export it again with opset_version=17"),
        (99, "has opset 99; 11 to .* install a newer onnx"),
    ],
)
def test_opset_out_of_range(opset: int, message: str, tmp_path: Path) -> None:
    path = make([node("Relu", "x")], path=tmp_path / "m.onnx")
    model = onnx.load(path)
    model.opset_import[0].version = opset
    onnx.save(model, path)
    refused(path, message)


def test_nan_in_a_weight(tmp_path: Path) -> None:
    bad = CONV.copy()
    bad[1, 2, 0, 0] = np.nan
    bad[1, 2, 0, 1] = np.inf
    refused(
        make([node("Conv", "x w")], {"w": bad}, path=tmp_path / "m.onnx"),
        "tensor 'w' has 2 values of 216 that are NaN or infinite; export",
    )


def test_classes_that_do_not_fit(tmp_path: Path) -> None:
    path = make([node("Relu", "x")], path=tmp_path / "m.onnx")
    refused(path, r"returns 4 classes, the card says 10; set \[network\] classes = 4", classes=10)


def test_input_size_that_does_not_fit(tmp_path: Path) -> None:
    path = make([node("Relu", "x")], path=tmp_path / "m.onnx")
    refused(
        path,
        r"input 'x' takes images of size \(4, 8, 8\), the card says \(4, 16, 8\); set \[input\] size",
        size=(4, 16, 8),
    )


def test_several_inputs_or_outputs(tmp_path: Path) -> None:
    path = make([node("Relu", "x")], path=tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, None))
    onnx.save(model, path)
    refused(path, r"has 2 outputs \('y', 'b'\); a classifier has one: images in, logits out")
    model.graph.output.pop()
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))
    onnx.save(model, path)
    refused(path, r"has 2 inputs \('x', 'z'\); a classifier has one")


def test_input_of_other_type_or_rank(tmp_path: Path) -> None:
    path = make([node("Relu", "x")], path=tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, 4, 8, 8]))
    onnx.save(model, path)
    refused(path, "input 'x' is float16; float32 is read: export the float32 network")
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8]))
    onnx.save(model, path)
    refused(path, r"input 'x' has 3 axes; images have 4 \(N, C, H, W\)")


def test_output_that_is_no_logits(tmp_path: Path) -> None:
    path = make([node("Relu", "x", "y")], pool=False, path=tmp_path / "m.onnx")
    refused(path, r"output 'y' has shape \(2, 4, 8, 8\) for 2 images; a classifier returns logits")
    path = make([node("Relu", "x", "a"), node("Identity", "w", "y")], {"w": f32(1, 4)}, pool=False, path=path)
    refused(path, "output 'y' does not depend on the images")


def test_file_for_one_image_only_says_so(tmp_path: Path) -> None:
    nodes = [
        node("Reshape", "x s", "r"),
        node("Transpose", "r", "t", perm=[1, 0, 2]),
        node("ReduceMean", "t", "y", axes=[2], keepdims=0),
    ]
    path = make(nodes, {"s": i64(1, 4, 64)}, pool=False, path=tmp_path / "m.onnx")
    refused(path, "operator Reshape, node 'the/Reshape_r': cannot give .* export with a dynamic batch axis")


def test_batch_of_one_baked_in_is_read_for_any_number(tmp_path: Path) -> None:
    nodes = [node("Reshape", "x s", "r"), node("ReduceMean", "r", "y", axes=[2], keepdims=0)]
    path = make(nodes, {"s": i64(1, 4, 64)}, pool=False, path=tmp_path / "m.onnx")
    net = load(card(path, 4))
    images = torch.rand(3, *SIZE)
    torch.testing.assert_close(net(images), images.mean((2, 3)))


def test_a_reading_that_differs_from_onnx_runtime_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbit.load.onnx_graph import OPERATORS

    wrong: Callable[..., Any] = lambda b, op, x: b.add(torch.nn.SiLU(), x)  # noqa: E731
    monkeypatch.setitem(OPERATORS, "Relu", wrong)
    path = make([node("Relu", "x")], path=tmp_path / "m.onnx")
    refused(
        path,
        r"read as a network, its output differs from ONNX Runtime's by \d\.\de[-+]\d\d of the largest logit",
        classes=4,
    )


def test_external_data_beside_the_file(tmp_path: Path) -> None:
    path = external(tmp_path, "weights/m.data")
    assert kinds(read(path, 6)) == ["Conv", "GlobalAvgPool", "Flatten"]


def test_hostile_node_name_is_not_executed(tmp_path: Path) -> None:
    """torch.fx writes names into Python source."""
    target = tmp_path / "executed"
    name = f'a"); __import__("os").mkdir("{target}"); getattr(self, "a'
    relu = helper.make_node("Relu", ["x"], ["b"], name=name)
    net = read(make([relu], path=tmp_path / "m.onnx"), 4)
    assert not target.exists()
    assert re.fullmatch(r"[\w:.-]+", net.layers()[0].name)


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_are_read_or_refused_in_one_line(seed: int, tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w c", "a", pads=[1, 1, 1, 1]),
        node("Shape", "a", "shape"),
        node("Slice", "shape zero one", "count"),
        node("Concat", "count rest", "target", axis=0),
        node("Reshape", "a target", "r"),
        node("ReduceMean", "r", "q", axes=[2], keepdims=0),
        node("Gemm", "q g", "y"),
    ]
    weights = {
        "w": f32(6, 4, 1, 1),
        "c": f32(6),
        "g": f32(6, 5),
        "zero": i64(0),
        "one": i64(1),
        "rest": i64(6, -1),
    }
    path = make(nodes, weights, 13, pool=False, path=tmp_path / "m.onnx")
    whole, made = path.read_bytes(), card(path, 5)
    rng = np.random.default_rng(seed)
    refusals = 0
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(bytes(flipped))
        try:
            load(made)
        except ModelFileError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 5
