"""The formulas of an engine against the engine itself, at grids where ties are common."""

import numpy as np
import onnxruntime
import pytest

from fewbit.engines import reference_rounding
from fewbit.engines.openvino import OpenVino
from fewbit.engines.process import EngineProcess
from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.measure.host import describe_host, rounding_of

X_SCALE, W_SCALE = 0.1, 0.05


def images(count=64, channels=4, size=12):
    return np.random.default_rng(0).normal(0, 4, (count, channels, size, size)).astype(np.float32)


def conv(file, x, name="conv"):
    """A 1x1 convolution whose sums are whole steps of `X_SCALE * W_SCALE`."""
    rng = np.random.default_rng(3)
    w = file.weight(rng.integers(-20, 21, (4, 4, 1, 1)).astype(np.int8), [W_SCALE] * 4)
    unit = np.float32(X_SCALE) * np.float32(W_SCALE)
    bias = file.weight(rng.integers(-50, 51, 4).astype(np.int32), [unit] * 4)
    return file.node("Conv", x, w, bias, name=name)


def relu_conv(file, x):
    return file.node("Relu", conv(file, x))


def add(file, x):
    return file.node("Add", x, file.grid(conv(file, x), 0.1, 117))


def multiply(file, x):
    return file.node("Mul", x, file.grid(conv(file, x), 0.1, 117))


def average(file, x):
    return file.node("GlobalAveragePool", x)


def residual(file, x):
    return file.node("Relu", file.node("Add", x, conv(file, x)))


def shortcut(file, x):
    """A sum whose terms only it reads, and a convolution behind it."""
    total = file.node("Add", file.grid(conv(file, x, "short"), 0.05, 0, np.int8), conv(file, x, "main"))
    return conv(file, file.grid(total, 0.03, 0, np.int8), "last")


def open_both(file, path, scale, zero_point, body, rounding):
    """Write a network of one body; return the codes of both roundings, given images."""
    x = file.grid("input", X_SCALE, 128)
    codes = file.quantize(body(file, x), scale, zero_point)
    output = file.dequantize(codes, scale, zero_point)
    file.open(path, output)

    def run(rounding):
        setting = Setting(engine="reference", rounding=rounding)
        return Reference().open(path / "small.onnx", setting).run(images())

    return output, run("exact"), run(rounding)


@pytest.mark.parametrize("body", [relu_conv, conv, add, multiply, average])
def test_codes_are_onnxruntimes(body, File, tmp_path):
    file = File(4, 12, 12)
    scale, zero_point = {"relu_conv": (0.01, 0), "average": (0.0005, 128)}.get(body.__name__, (0.02, 128))
    output, exact, followed = open_both(file, tmp_path, scale, zero_point, body, "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    model = file.model(output).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    theirs = session.run(None, {"input": images()})[0]
    np.testing.assert_array_equal(followed, theirs)
    if body in (relu_conv, conv):  # at ties the definition says otherwise
        assert (exact != theirs).any()


@pytest.mark.parametrize("body", [relu_conv, conv, residual])
def test_codes_are_openvinos(body, File, tmp_path):
    file = File(4, 12, 12)
    scale, zero_point = (0.02, 128) if body is conv else (0.01, 0)
    rounding = rounding_of("openvino", describe_host())
    _, exact, followed = open_both(file, tmp_path, scale, zero_point, body, rounding)
    session = OpenVino().open(tmp_path / "small.onnx", Setting(engine="openvino", batch=64))
    theirs = session.run(images())
    np.testing.assert_allclose(followed, theirs, rtol=1e-6)
    assert (np.abs(exact - theirs) > scale / 2).any()


@pytest.mark.parametrize("body", [conv, residual, shortcut])
@pytest.mark.parametrize("isa", ["AVX512_CORE_VNNI", "ALL"])
def test_signed_codes_are_openvinos_with_amx_and_without(body, isa, File, tmp_path, monkeypatch):
    if "avx512_vnni" not in describe_host().isa:
        pytest.skip("the formulas are those of AVX-512 VNNI and AMX, which this processor lacks")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)  # read once a process, so OpenVINO needs one of its own
    rounding = rounding_of("openvino", describe_host())
    if body is shortcut and rounding == "openvino":
        pytest.skip("without AMX the formula is not exact where only a sum reads signed codes")
    file, scale = File(4, 12, 12), 0.02
    x = file.grid(conv(file, file.grid("input", X_SCALE, 0, np.int8), "first"), X_SCALE, 0, np.int8)
    file.open(tmp_path, file.grid(body(file, x), scale, 0, np.int8))
    path = tmp_path / "small.onnx"
    with EngineProcess("openvino") as process:
        theirs = process.open(path, Setting(engine="openvino", batch=64)).run(images())
    codes = {
        which: Reference().open(path, Setting(engine="reference", rounding=which)).run(images())
        for which in ("openvino", "openvino_amx")
    }
    followed = codes.pop(rounding)
    np.testing.assert_allclose(followed, theirs, rtol=1e-6)
    assert (np.abs(codes.popitem()[1] - theirs) > scale / 2).any()  # the other one differs, at ties


def test_exact_rounding_leaves_the_graph_alone(File, tmp_path):
    file = File(4, 12, 12)
    file.open(tmp_path, file.grid(relu_conv(file, file.grid("input", X_SCALE, 128)), 0.02, 0))
    placed = [
        {o.kind for o in session.placement().operators}
        for rounding in ("exact", "onnxruntime")
        for session in [Reference().open(tmp_path / "small.onnx", Setting(rounding=rounding))]
    ]
    assert "Conv" in placed[0] and "Relu" in placed[0]
    assert "onnxruntime.Conv" in placed[1] and not {"Conv", "Relu"} & placed[1]


def test_a_layer_that_does_not_run_in_integers_is_not_fused(File, tmp_path):
    file = File(4, 12, 12)
    weight = file.constant(np.ones((4, 4, 1, 1)), np.float32)
    y = file.node("Conv", file.grid("input", X_SCALE, 128), weight)
    file.open(tmp_path, file.grid(y, 0.02, 128))
    for rounding in ("onnxruntime", "openvino"):
        session = Reference().open(tmp_path / "small.onnx", Setting(rounding=rounding))
        matrices = [o for o in session.placement().operators if o.matrix]
        assert [(o.kind, o.precision) for o in matrices] == [("Conv", "float32")]


def test_fused_multiply_add_rounds_once():
    x, y = np.float32(1 + 2**-13), np.float32(1 - 2**-13)
    assert x * y + np.float32(-1) == 0
    assert reference_rounding.fused_multiply_add(x, y, np.float32(-1)) == np.float32(-(2.0**-26))
