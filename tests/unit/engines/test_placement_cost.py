from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from fewbit.engines.placement_cost import (
    EngineOperator,
    PlacementCost,
    PlacementFinding,
    find_costs,
    measure_placement,
)
from fewbit.engines.process import EngineProcess
from fewbit.engines.profile import Flow, OperatorTime
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import load
from fewbit.load.card import read_card
from fewbit.measure.host import describe_host
from fewbit.place.targets import target
from fewbit.recipe import Context, read_recipe, run_recipe
from fewbit.spec import Scheme
from networks import make_context, make_images, make_net, quantize

Files = dict[str, Path]
BATCH = 256
needs_amx = pytest.mark.skipif("amx_int8" not in describe_host().isa, reason="kernels of another processor")


def costs(path: Path, engine: str, batch: int = BATCH, **more: Any) -> PlacementCost:
    setting = Setting.model_validate({"engine": engine, "batch": batch, **more})
    with EngineProcess(engine) as process:
        session = process.open(path, setting)
        found = measure_placement(session, 3)
    parts = sum(finding.ms for finding in found.findings)
    assert parts + found.rest_ms == pytest.approx(found.ms, rel=1e-9)
    assert sum(o.ms for f in found.findings for o in f.operators) == pytest.approx(parts, rel=1e-9)
    assert [f.ms for f in found.findings] == sorted((f.ms for f in found.findings), reverse=True)
    assert all(f.share == pytest.approx(f.ms / found.ms) for f in found.findings)
    assert all(f.why and f.remedy and f.operators for f in found.findings)
    return found


def about(found: PlacementCost, name: str) -> PlacementFinding:
    (finding,) = (f for f in found.findings if name in f.layers)
    return finding


def kinds(finding: PlacementFinding) -> list[str]:
    return [operator.kind for operator in finding.operators]


def test_onnxruntime_names_each_convolution_that_its_form_keeps_in_float(files: Files) -> None:
    found = costs(files["mixed"], "onnxruntime")
    accidents = {f.layers: f.why for f in found.findings if f.kind == "float operator" and not f.on_purpose}
    assert accidents == {
        ("open", "relu2"): "no QuantizeLinear after it and its Relu, but Conv",
        ("wide", "clip"): "the Clip after it stays, because its QuantizeLinear reaches 7, above the Clip's 6",
        ("symmetric", "relu1"): "the Relu after it stays, because its QuantizeLinear has zero point 0 and "
        "not -128",
        ("weights_only",): "weights only: its input is not quantized",
    }
    wide = about(found, "wide")
    assert wide.file_kinds == ("Conv", "Clip")
    assert sorted(kinds(wide)) == [*["DequantizeLinear"] * 3, "FusedConv", "QuantizeLinear"]
    assert wide.remedy.startswith("a range that ends where the Clip does")
    assert "--engine onnxruntime" in about(found, "open").remedy
    plain = about(found, "plain")
    assert plain.on_purpose and plain.layers == ("plain", "gap")
    assert plain.why == "the file keeps it in float; it runs in float32"
    assert found.accidental_ms() < found.ms - plain.ms


def test_openvino_runs_all_but_one_of_them_in_integers(files: Files) -> None:
    found = costs(files["mixed"], "openvino")
    floats = {f.layers: f.on_purpose for f in found.findings if f.kind == "float operator"}
    assert floats == {("weights_only",): False, ("plain", "gap"): True}
    assert about(found, "weights_only").operators[0].kernel.endswith("f32")
    (image,) = (f for f in found.findings if f.kind == "input conversion")
    assert kinds(image) == ["QuantizeLinear", "Reorder"] and image.layers == ("in_q",)
    assert "--input uint8" in image.remedy


def test_a_border_to_bf16_is_told_apart(files: Files) -> None:
    if not describe_host().bf16:
        pytest.skip("this processor has no bf16")
    found = costs(files["mixed"], "openvino", float_precision="bf16")
    (border,) = (f for f in found.findings if f.kind == "bf16 border")
    assert border.on_purpose and border.layers == ("r3_q",)
    assert border.why.startswith("the border between gap and fc,")
    assert about(found, "plain").why == "the file keeps it in float; it runs in bf16"


def test_a_float_file_has_nothing_that_is_kept_out_of_integers(files: Files) -> None:
    for engine in ("onnxruntime", "openvino"):
        found = costs(files["float"], engine)
        assert not found.integers
        assert {f.kind for f in found.findings} <= {"reorder", "input conversion"}
        assert {"first convolution", "depthwise", "classifier"} <= found.rest.keys()


def export(name: str, engine: str, folder: Path, recipe: str = "int8") -> Path:
    path = folder / f"{name}-{engine}.onnx"
    export_onnx(quantize(name, recipe, engine), path, target(engine))
    return path


def test_a_gate_and_a_hard_swish_for_each_engine(tmp_path: Path) -> None:
    found = costs(export("gated", "onnxruntime", tmp_path), "onnxruntime")
    (swish,) = (f for f in found.findings if f.kind == "float operator")
    assert (swish.layers, swish.file_kinds) == (("hardswish",), ("HardSwish",))
    assert swish.why == "HardSwish has no integer kernel in ONNX Runtime"
    assert {"DequantizeLinear", "HardSigmoid", "Mul", "QuantizeLinear"} <= set(kinds(swish))
    assert not swish.on_purpose and "no integer kernel on this engine" in swish.remedy
    found = costs(export("gated", "openvino", tmp_path), "openvino")
    assert "hardswish" not in {name for f in found.findings for name in f.layers}  # in the kernel of b
    assert about(found, "mul").why == "a product of two tensors is computed in no convolution's kernel"


def test_openvino_on_a_file_for_onnxruntime_names_what_a_quantizer_parts(tmp_path: Path) -> None:
    found = costs(export("gated", "onnxruntime", tmp_path), "openvino")
    swish = about(found, "hardswish")
    assert swish.kind == "unfused operator" and kinds(swish) == ["Subgraph"]
    assert swish.why.startswith("a quantizer with a zero point stands between its convolution and it,")
    assert "--engine openvino" in swish.remedy


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_residual_block_runs_in_integers(tmp_path: Path, engine: str) -> None:
    found = costs(export("residual", engine, tmp_path), engine)
    assert not [f for f in found.findings if f.kind in ("float operator", "legacy kernel")]
    assert {"first convolution", "3x3", "classifier"} <= found.rest.keys()


@pytest.mark.parametrize("stands", ["marked", "rounding", "none"])
def test_openvino_adds_in_the_kernel_only_where_a_quantizer_stands_before_the_sum(
    tmp_path: Path, stands: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    aim = target("openvino").model_copy(update={"fuses_residual": stands != "rounding"})
    images = make_images()
    context = Context(Scheme(), aim, lambda: iter(images.split(4)), 0)
    if stands == "none":
        monkeypatch.setattr("fewbit.export.onnx_out.pair_scales", lambda *_: {})
    path = tmp_path / "net.onnx"
    export_onnx(run_recipe(read_recipe("int8"), make_net("residual"), context)[0], path, aim)
    unfused = [f for f in costs(path, "openvino").findings if f.kind == "unfused operator"]
    assert [f.layers for f in unfused] == ([("add", "relu_2")] if stands == "none" else [])
    if unfused:
        assert unfused[0].why.startswith("no quantizer stands between its convolution and the sum,")
        assert "a quantizer between them" in unfused[0].remedy


def test_weights_only_turn_into_floats_in_every_call(tmp_path: Path) -> None:
    found = costs(export("residual", "onnxruntime", tmp_path, "int8-weights-only"), "onnxruntime", batch=8)
    assert not found.integers
    turned = [f for f in found.findings if f.kind == "conversion"]
    assert {"conv1", "conv2"} <= {name.split(".")[0] for f in turned for name in f.layers}
    assert all(f.on_purpose and f.why == "its weights are turned into floats in every call" for f in turned)


def write(graph: Any, path: Path, size: tuple[int, int, int]) -> Path:
    """Write a graph of another input size than the shared ones have, of which the result's shape is free."""
    graph.nodes[-1].output[0] = "logits"
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "net",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *size])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    onnx.save(model, path)
    return path


FLOAT_KINDS = ("Relu", "HardSigmoid", "HardSwish", "Elu", "Gelu", "Tanh", "Abs")
INTEGER_KINDS = ("Sigmoid", "LeakyRelu", "Softmax", "GlobalAveragePool", "Transpose")


@pytest.mark.parametrize("kind", [*FLOAT_KINDS, *INTEGER_KINDS])
def test_onnxruntime_has_the_integer_kernels_that_are_said(
    kind: str, builder: Callable[..., Any], tmp_path: Path
) -> None:
    g = builder()
    x = g.grid("input", "in", 4 / 127, 128)
    x = g.grid(g.conv(x, "first", (16, 16), k=1, scale=4 / 127), "mid", 4 / 127, 128)
    g.grid(g.node(kind, [x], "op"), "out", 4 / 127, 128)
    found = costs(write(g, tmp_path / "net.onnx", (16, 16, 16)), "onnxruntime")
    floats = [f for f in found.findings if f.kind == "float operator"]
    if kind in INTEGER_KINDS:
        assert not floats
    else:
        (finding,) = floats
        assert finding.layers == ("op",) and finding.file_kinds == (kind,)
        assert finding.why.startswith(f"{kind} has no integer kernel in ONNX Runtime")


def chain(g: Any, shape: tuple[int, int], zero: int, dtype: Any, behind: tuple[int, Any] | None) -> None:
    """Write two 1x1 convolutions, the second in float where no quantizer stands between them."""
    x = g.grid("input", "in", 4 / 127, zero, dtype)
    x = g.node("Relu", [g.conv(x, "first", shape, k=1, scale=4 / 127)], "act")
    x = x if behind is None else g.grid(x, "mid", 4 / 127, *behind)
    g.conv(x, "second", (shape[1], 16), k=1, scale=None if behind is None else 4 / 127)


@needs_amx
@pytest.mark.parametrize(
    ("shape", "zero", "dtype", "behind", "precision", "why"),
    [
        ((58, 64), 0, np.uint8, (0, np.uint8), "float32", "input channels in multiples of 4; it has 58"),
        ((64, 64), 0, np.int8, None, "bf16", "it reads signed codes and writes bf16"),
        ((64, 64), 20, np.uint8, (5, np.int8), "float32", "its input has zero point 20"),
        ((64, 64), 20, np.uint8, (5, np.uint8), "float32", ""),
        ((64, 64), 0, np.uint8, (0, np.uint8), "float32", ""),
    ],
)
def test_openvino_has_old_kernels_where_it_is_said(
    builder: Callable[..., Any],
    tmp_path: Path,
    shape: tuple[int, int],
    zero: int,
    dtype: Any,
    behind: tuple[int, Any] | None,
    precision: str,
    why: str,
) -> None:
    g = builder()
    chain(g, shape, zero, dtype, behind)
    path = write(g, tmp_path / "net.onnx", (shape[0], 28, 28))
    found = costs(path, "openvino", 4, float_precision=precision)
    legacy = [f for f in found.findings if f.kind == "legacy kernel"]
    if not why:
        assert not legacy
        return
    (finding,) = legacy
    (operator,) = finding.operators
    assert finding.layers == ("first", "act") and why in finding.why
    assert operator.kernel.startswith("jit_avx512_amx") and operator.precision == "int8"


def test_openvino_keeps_signed_codes_with_a_zero_point_out_of_integers(
    builder: Callable[..., Any], tmp_path: Path
) -> None:
    g = builder()
    x = g.grid("input", "in", 4 / 127, 0)
    x = g.grid(g.conv(x, "first", (16, 16), k=1, scale=4 / 127), "mid", 4 / 127, 5, np.int8)
    g.conv(x, "second", (16, 16), k=1, scale=4 / 127)
    finding = about(costs(write(g, tmp_path / "net.onnx", (16, 28, 28)), "openvino", 4), "second")
    assert finding.kind == "float operator" and not finding.on_purpose
    said = "its input has signed codes with zero point 5; OpenVINO takes zero points only with unsigned ones"
    assert finding.why == said


@pytest.mark.parametrize("form", ["HardSigmoid", "Clip"])
def test_openvino_computes_a_hard_sigmoid_in_the_convolution_only_as_a_clip(
    form: str, builder: Callable[..., Any], tmp_path: Path
) -> None:
    g = builder()
    x = g.conv(g.grid("input", "in", 4 / 127, 0, np.int8), "first", (16, 16), k=1, scale=4 / 127)
    if form == "HardSigmoid":
        x = g.node("HardSigmoid", [x], "gate", alpha=1 / 6, beta=0.5)
    else:
        x = g.node("Mul", [x, g.constant("sixth", np.float32(1 / 6))], "scaled")
        x = g.node("Add", [x, g.constant("half", np.float32(0.5))], "shifted")
        bounds = [g.constant("low", np.float32(0)), g.constant("high", np.float32(1))]
        x = g.node("Clip", [x, *bounds], "gate")
    g.conv(g.grid(x, "mid", 1 / 255, 0), "second", (16, 16), k=1, scale=1 / 255)
    found = costs(write(g, tmp_path / "net.onnx", (16, 28, 28)), "openvino", 4)
    floats = [f for f in found.findings if f.kind == "float operator"]
    assert [f.layers for f in floats] == ([("gate",)] if form == "HardSigmoid" else [])
    if floats:
        assert "only a float reference kernel for HardSigmoid" in floats[0].why
        assert {"Math", "Reorder"} <= set(kinds(floats[0]))


def made(name: str, kind: str, ms: float, *sources: int, makes: str = "int8", **more: Any) -> OperatorTime:
    flow = Flow(sources=sources, makes=makes)
    return OperatorTime(name=name, kind=kind, precision="int8", ms=ms, flow=flow, **more)


def test_a_profile_made_by_hand_is_sorted_to_the_last_microsecond(files: Files) -> None:
    operators = [
        made("in_q", "QuantizeLinear", 1.0),
        made("conv1", "QLinearConv", 2.0, 0, layers=("conv1", "relu1"), matrix=True),
        made("r1_q", "QuantizeLinear", 4.0, 1),
        made("dw", "QLinearConv", 8.0, 2, layers=("dw",), matrix=True),
        made("out_dq", "DequantizeLinear", 16.0, 3, makes="float32"),
        made("empty", "Reshape", 0.0, 4, makes="float32"),
    ]
    found = find_costs(files["int8"], Setting(engine="onnxruntime"), operators)
    assert found.ms == 31.0 and found.rest == {"first convolution": 2.0, "depthwise": 8.0}
    assert [(f.kind, f.ms, f.layers) for f in found.findings] == [
        ("conversion", 16.0, ("out_dq",)),
        ("conversion", 4.0, ("r1_q",)),
        ("input conversion", 1.0, ("in_q",)),
    ]
    assert found.findings[0].why == "the result of the network is brought into the form of its output"
    assert found.findings[1].why == "codes change their scale between relu1 and dw"
    assert found.findings[2].operators == (
        EngineOperator(name="in_q", kind="QuantizeLinear", precision="int8", ms=1.0),
    )
    assert found.findings[0].share == 16 / 31 and found.accidental_ms() == 21.0
    assert PlacementCost.model_validate_json(found.model_dump_json()) == found


@pytest.mark.needs_shared
def test_mobilenet_v2_adds_up_on_both_engines(tmp_path: Path, shared: Path) -> None:
    net = load(read_card(shared / "networks" / "mobilenet_v2.toml"))
    for engine in ("onnxruntime", "openvino"):
        images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        made = run_recipe(read_recipe("int8"), net, make_context(engine, images))[0]
        path = tmp_path / f"{engine}.onnx"
        export_onnx(made, path, target(engine))
        found = costs(path, engine, batch=1)
        assert not [f for f in found.findings if f.kind in ("float operator", "legacy kernel")]
        assert {"first convolution", "1x1", "depthwise", "classifier"} <= found.rest.keys()
        (image,) = (f for f in found.findings if f.kind == "input conversion")
        assert 0 < image.share < 0.5
