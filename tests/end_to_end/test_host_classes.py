"""A processor without VNNI, which OpenVINO is told to take this one for: exact sums, and warnings."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from command import Fewbit, command
from fewbit.engines.limit import ISA_LIMIT
from fewbit.engines.process import EngineProcess
from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.measure.host import describe_host
from fewbit.place.quantizer import QuantConv2d, QuantLinear
from fewbit.place.targets import target
from fewbit.recipe import read_recipe, run_recipe
from networks import SIZE, make_context, make_net
from small_search import make_card, make_images

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or describe_host().saturates_u8s8,
    reason="needs an x86 processor with VNNI, to be told to do without",
)


@pytest.fixture
def fewbit(capsys: pytest.CaptureFixture[str]) -> Fewbit:
    return command(capsys)


def bits(exact_sums: bool, recipe: str = "int8") -> dict[str, int]:
    """Return the bits of each layer's weights."""
    context = make_context("openvino")
    aim = context.__class__(context.scheme, target("openvino", exact_sums), context.batches)
    net, _ = run_recipe(read_recipe(recipe), make_net("depthwise"), aim)
    return {
        layer.name: layer.module.weight_quantizer.spec.bits
        for layer in net.layers()
        if isinstance(layer.module, QuantConv2d | QuantLinear)
    }


def test_weights_take_the_bits_that_fit() -> None:
    assert set(bits(exact_sums=True).values()) == {8}
    assert bits(exact_sums=False) == {"stem": 7, "dw": 8, "pw": 7, "fc": 7}
    assert set(bits(False, "int8-weights-only").values()) == {8}  # they are multiplied in float
    assert bits(False, "w4a8-dfq")["pw"] == 4


def test_seven_bits_are_exact_where_eight_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_LIMIT, "AVX2")
    images = torch.full((4, *SIZE), 2.5)  # bright images, so that codes are large
    gaps = {}
    for exact_sums in (True, False):
        net = make_net("residual")
        with torch.no_grad():
            for layer in net.layers():
                if hasattr(layer.module, "weight") and layer.kind == "Conv":
                    layer.module.weight.abs_()  # all of one sign, so that sums are large
        context = make_context("openvino", images)
        aim = context.__class__(context.scheme, target("openvino", exact_sums), context.batches)
        made, _ = run_recipe(read_recipe("int8"), net, aim)
        path = tmp_path / f"{exact_sums}.onnx"
        export_onnx(made, path, target("openvino", exact_sums))
        exact = Reference().open(path, Setting(engine="reference")).run(images.numpy())
        with EngineProcess("openvino") as process:
            found = process.open(path, Setting(engine="openvino", batch=4)).run(images.numpy())
        gaps[exact_sums] = float(np.abs(found - exact).max() / np.ptp(exact))
    assert gaps[False] < 0.02 < 0.05 < gaps[True]


def test_files_say_for_which_processors_they_are(
    fewbit: Fewbit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_card(tmp_path)
    make_images(tmp_path / "images", images=60)
    common = ("quantize", tmp_path / "tiny.toml", "--data", tmp_path / "images", "--engine", "openvino")
    monkeypatch.delenv(ISA_LIMIT, raising=False)
    assert fewbit(*common, "--out", tmp_path / "exact.onnx", "--calibration-images", 20).code == 0
    monkeypatch.setenv(ISA_LIMIT, "AVX2")
    said = fewbit(*common, "--out", tmp_path / "narrow.onnx", "--calibration-images", 20)
    assert "weights have 7 bits at most, for processors that add products of u8 and s8 in 16 bits" in said.out
    forced = fewbit(*common, "--out", tmp_path / "forced.onnx", "--sums", "exact", "--calibration-images", 20)
    assert forced.code == 0
    assert (tmp_path / "forced.onnx").read_bytes() == (tmp_path / "exact.onnx").read_bytes()
    largest = {}
    for name in ("exact", "narrow"):
        graph = onnx.load(tmp_path / f"{name}.onnx").graph
        codes = [numpy_helper.to_array(c) for c in graph.initializer if c.name.endswith(".weight:q")]
        largest[name] = max(int(np.abs(code.astype(np.int64)).max()) for code in codes)
    assert largest == {"exact": 127, "narrow": 63}

    rest = ("--data", tmp_path / "images", "--engine", "openvino")
    said = fewbit("eval", tmp_path / "exact.onnx", *rest)
    assert said.code == 0 and "its results can be wrong; quantize it again here" in said.err
    assert fewbit("eval", tmp_path / "narrow.onnx", *rest).err == ""
    monkeypatch.delenv(ISA_LIMIT)
    said = fewbit("eval", tmp_path / "narrow.onnx", *rest)
    assert "has weights of 7 bits" in said.err and "quantize it again here for more accuracy" in said.err
    assert fewbit("eval", tmp_path / "exact.onnx", *rest).err == ""
    said = fewbit("bench", tmp_path / "narrow.onnx", "--engine", "openvino", "--rounds", 3)
    assert said.code == 0 and "has weights of 7 bits" in said.err


def test_engines_tell_how_they_add(fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_LIMIT, "AVX2")
    rows = {row["engine"]: row["sums"] for row in json.loads(fewbit("engines", "--json").out)["engines"]}
    assert rows == {"onnxruntime": "exact", "openvino": "saturating"}


@pytest.mark.parametrize("recipe", ["int8-weights-only", "float32"])
def test_files_that_every_processor_computes_alike_are_of_no_class(
    recipe: str, fewbit: Fewbit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_card(tmp_path)
    make_images(tmp_path / "images", images=40)
    card, out = tmp_path / "tiny.toml", tmp_path / "net.onnx"
    said = fewbit(
        *("quantize", card, "--data", tmp_path / "images", "--out", out, "--recipe", recipe),
        *("--engine", "openvino", "--sums", "saturating", "--calibration-images", 20),
    )
    assert "7 bits" not in said.out
    monkeypatch.setenv(ISA_LIMIT, "AVX2")
    assert fewbit("bench", out, "--engine", "openvino", "--rounds", 3).err == ""
