from __future__ import annotations

from pathlib import Path

import pytest

from fewbit.engines.causes import CAUSES, Matrix, Parts, cause_of, read_parts, sum_by_cause
from fewbit.engines.process import EngineProcess
from fewbit.engines.profile import OperatorTime
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.place.targets import target
from networks import quantize

KINDS = {
    "conv": "Conv",
    "relu": "Relu",
    "add": "Add",
    "pool": "MaxPool",
    "gap": "GlobalAveragePool",
    "act": "HardSwish",
    "gate": "Mul",
    "cat": "Concat",
    "pad": "Pad",
    "shuffle": "Transpose",
    "q": "QuantizeLinear",
    "odd": "Einsum",
    "fc": "Gemm",
}
MATRICES = {
    "stem": Matrix((7, 7), 1, 64, True),
    "conv": Matrix((3, 3), 1, 64, False),
    "pw": Matrix((1, 1), 1, 64, False),
    "dw": Matrix((3, 3), 64, 64, False),
    "grouped": Matrix((1, 1), 3, 64, False),
    "wide": Matrix((5, 5), 1, 64, False),
    "fc": Matrix((), 1, 10, False),
}
PARTS = Parts(KINDS, MATRICES)


def operator(kind: str, *layers: str, matrix: bool = False, ms: float = 1.0) -> OperatorTime:
    return OperatorTime(name="o", kind=kind, precision="int8", layers=layers, matrix=matrix, ms=ms)


@pytest.mark.parametrize(
    ("kind", "layers", "cause"),
    [
        ("Convolution", ("stem", "relu"), "first convolution"),
        ("Convolution", ("conv", "add", "relu"), "3x3"),
        ("Convolution", ("pw", "act"), "1x1"),
        ("GroupConvolution", ("dw", "relu"), "depthwise"),
        ("QLinearConv", ("grouped",), "other convolutions"),
        ("QLinearConv", ("wide",), "other convolutions"),
        ("QGemm", ("fc",), "classifier"),
        ("QLinearAdd", ("add", "relu"), "residual adds"),
        ("Pooling", ("pool",), "pools"),
        ("Reduce", ("gap",), "pools"),
        ("Subgraph", ("act",), "activations"),
        ("QLinearMul", ("gate",), "activations"),
        ("HardSigmoid", (), "activations"),
        ("QLinearConcat", ("cat",), "concat, shuffle"),
        ("Pad", ("pad",), "concat, shuffle"),
        ("Transpose", ("shuffle",), "concat, shuffle"),
        ("Transpose", (), "quantize, reorder"),
        ("Reorder", (), "quantize, reorder"),
        ("QuantizeLinear", ("q",), "quantize, reorder"),
        ("Einsum", ("odd",), "rest"),
        ("Unheard", (), "rest"),
    ],
)
def test_each_operator_has_one_cause(kind: str, layers: tuple[str, ...], cause: str) -> None:
    assert cause_of(operator(kind, *layers), PARTS, started=True) == cause
    assert cause in CAUSES


def test_what_converts_before_the_first_convolution_converts_the_image() -> None:
    operators = [
        operator("QuantizeLinear", ms=1.0),
        operator("Reorder", ms=2.0),
        operator("Convolution", "stem", matrix=True, ms=4.0),
        operator("Reorder", ms=8.0),
        operator("Convolution", "unknown", matrix=True, ms=16.0),
        operator("Reshape", "cat", ms=0.0),
    ]
    found = sum_by_cause(operators, PARTS)
    assert found == {
        "first convolution": 4.0,
        "other convolutions": 16.0,
        "input conversion": 3.0,
        "quantize, reorder": 8.0,
    }
    assert list(found) == sorted(found, key=CAUSES.index)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ["depthwise", "residual", "branches", "gated"])
def test_nothing_of_an_exported_file_is_left_over(name: str, engine: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(quantize(name, "int8", engine), path, target(engine))
    parts = read_parts(path)
    with EngineProcess(engine) as process:
        operators = process.open(path, Setting(engine=engine, batch=256)).profile(3)
    causes = sum_by_cause(operators, parts)
    assert sum(causes.values()) == pytest.approx(sum(o.ms for o in operators))
    assert "rest" not in causes
    assert {"input conversion", "classifier", "pools"} <= causes.keys()
    expected = {
        "depthwise": {"first convolution", "depthwise", "1x1"},
        "residual": {"first convolution", "3x3"},
        "branches": {"first convolution", "3x3", "1x1", "concat, shuffle"},
        "gated": {"first convolution", "3x3", "1x1", "activations"},
    }[name]
    assert expected <= causes.keys()
    if name == "residual" and engine == "onnxruntime":
        assert "residual adds" in causes  # OpenVINO computes it inside the convolution


def test_the_matrices_of_a_file_are_read_with_their_shapes(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(quantize("depthwise"), path, target("onnxruntime"))
    assert read_parts(path).matrices == {
        "stem": Matrix((3, 3), 1, 16, True),
        "dw": Matrix((3, 3), 16, 16, False),
        "pw": Matrix((1, 1), 1, 32, False),
        "fc": Matrix((), 1, read_parts(path).matrices["fc"].channels, False),
    }
