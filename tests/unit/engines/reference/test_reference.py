"""Opening, running, recording and placing; and every refusal by its text."""

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fewbit.engines.reference import TABLE, Reference
from fewbit.engines.session import Setting
from fewbit.errors import EngineError

RNG = np.random.default_rng(0)
SETTING = Setting(engine="reference")


@pytest.fixture
def network(File):
    """Conv + ReLU, depthwise conv, residual add, squeeze and excite, pool, classifier; names of its codes."""
    rng = np.random.default_rng(1)
    file = File(3, 10, 10)
    codes = []

    def grid(x, scale, zero_point=0):
        codes.append(file.quantize(x, scale, zero_point))
        return file.dequantize(codes[-1], scale, zero_point)

    def conv(x, name, inputs, outputs, kernel, groups=1):
        w = rng.integers(-127, 128, (outputs, inputs // groups, kernel, kernel)).astype(np.int8)
        w_scale = rng.uniform(0.5, 1, outputs) * 0.02 / np.sqrt(w[0].size)
        b = file.constant(rng.normal(0, 0.1, outputs), np.float32)
        pads = [kernel // 2] * 4
        return file.node("Conv", x, file.weight(w, w_scale), b, name=name, group=groups, pads=pads)

    x = grid("input", 0.03, 128)
    x = grid(file.node("Relu", conv(x, "stem", 3, 8, 3)), 0.02)
    y = grid(file.node("Relu", conv(x, "depthwise", 8, 8, 3, groups=8)), 0.02)
    y = grid(conv(y, "project", 8, 8, 1), 0.02, 120)
    x = grid(file.node("Relu", file.node("Add", x, y, name="add")), 0.03)
    gate = conv(grid(file.node("GlobalAveragePool", x), 0.02), "gate", 8, 8, 1)
    gate = grid(file.node("Sigmoid", gate), 1 / 256)
    x = grid(file.node("Mul", x, gate), 0.02)
    x = grid(file.node("GlobalAveragePool", x), 0.02)
    x = file.node("Flatten", x)
    w = file.weight(rng.integers(-127, 128, (5, 8)).astype(np.int8), rng.uniform(0.01, 0.02, 5))
    logits = file.node("Gemm", x, w, transB=1, name="classifier")
    return file, codes, logits


def images(count, seed=2):
    return np.random.default_rng(seed).normal(0, 1.5, (count, 3, 10, 10)).astype(np.float32)


def test_a_network_agrees_with_onnxruntime(network, tmp_path):
    file, codes, logits = network
    x = images(16)
    theirs = dict(zip([*codes, logits], file.run_onnxruntime(x, *codes, logits), strict=True))
    recorded = file.open(tmp_path, logits).run_recorded(x)
    assert list(recorded) == [*codes, logits]
    for name in codes:
        assert recorded[name].dtype == np.uint8 and recorded[name].shape == theirs[name].shape
        apart = np.abs(recorded[name].astype(int) - theirs[name].astype(int))
        assert (apart <= 1).mean() >= 0.999 and (apart == 0).mean() > 0.99, name
    assert (recorded[logits].argmax(1) == theirs[logits].argmax(1)).all()


def test_forced_codes_keep_differences_from_adding_up(network, tmp_path):
    file, codes, logits = network
    x = images(4)
    session = file.open(tmp_path, logits)
    plain = session.run_recorded(x)
    # An engine with one fault: every code of the depthwise layer is one too high.
    wrong = plain | {codes[2]: plain[codes[2]] + np.uint8(1)}
    seen = session.run_recorded(x, wrong)
    assert (seen[codes[2]] == plain[codes[2]]).all()  # what is recorded is our own
    assert (seen[codes[3]] != plain[codes[3]]).any()  # computed from the engine's codes
    assert (seen[codes[4]] == plain[codes[4]]).all()  # goes on from plain[codes[3]]
    assert (session.run_recorded(x, plain)[logits] == plain[logits]).all()


def test_no_image_depends_on_its_neighbours(network, tmp_path):
    file, _, logits = network
    session = file.open(tmp_path, logits)
    x = images(9)
    whole = session.run(x)
    assert (np.concatenate([session.run(x[n : n + 1]) for n in range(9)]) == whole).all()
    other = images(9, seed=3)
    other[4] = x[4]
    assert (session.run(other)[4] == whole[4]).all()


def test_placement(network, tmp_path):
    file, _, logits = network
    session = file.open(tmp_path, logits)
    placement = session.placement()
    assert placement.engine == "reference"
    matrix = {o.name: o.precision for o in placement.operators if o.matrix}
    names = ["stem", "depthwise", "project", "gate", "classifier"]
    assert matrix == dict.fromkeys(names, "int8") and not placement.float_matrix_operators()
    (add,) = (o for o in placement.operators if o.name == "add")
    assert (add.kind, add.precision, add.layers) == ("Add", "float32", ("add",))
    session.run(images(2))
    assert session.placement() == placement


def test_placement_of_an_open_size_needs_a_run(File, tmp_path):
    file = File("H", "W")
    out = file.node("Relu", "input")
    session = file.open(tmp_path, out)
    with pytest.raises(EngineError, match=r"^small\.onnx: leaves its input size open .*; run a batch first$"):
        session.placement()
    session.run(np.zeros((1, 3, 3), np.float32))
    assert session.placement().float_operators == 1


def test_output_that_is_also_read_inside(File, tmp_path):
    file = File(4)
    middle = file.node("Relu", "input")
    file.node("Neg", middle)
    assert file.open(tmp_path, middle).run(np.array([[-1, 2, -3, 4]], np.float32)).tolist() == [[0, 2, 0, 4]]


def test_external_data(File, tmp_path):
    file = File(64)
    w = RNG.normal(size=(64, 8)).astype(np.float32)
    model = file.model(file.node("MatMul", "input", file.constant(w)))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    x = RNG.normal(size=(2, 64)).astype(np.float32)
    np.testing.assert_allclose(
        Reference().open(tmp_path / "m.onnx", SETTING).run(x), x @ w, rtol=1e-4, atol=1e-5
    )
    (tmp_path / "m.data").unlink()
    with pytest.raises(
        EngineError, match=r"m\.onnx: cannot be read as ONNX \(.*m\.data.*\); export it again$"
    ):
        Reference().open(tmp_path / "m.onnx", SETTING)


def test_unknown_operator_is_named(File, tmp_path):
    file = File(4)
    out = file.node("Sigmoidd", "input", name="layer1.0.act")
    message = (
        "small.onnx: operator Sigmoidd of node 'layer1.0.act' is not known to the reference interpreter "
        "(did you mean 'Sigmoid'?); run this file on another engine"
    )
    with pytest.raises(EngineError, match=f"^{re.escape(message)}$"):
        file.open(tmp_path, out)
    file.nodes[-1].op_type, file.nodes[-1].domain = "Sigmoid", "com.example"
    with pytest.raises(EngineError, match=r"operator com\.example\.Sigmoid of node"):
        file.open(tmp_path, out)


def test_damaged_or_missing_file(tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(
        EngineError, match=r"m\.onnx: cannot be read as ONNX \(.*No such file.*\); export it again$"
    ):
        Reference().open(path, SETTING)
    path.write_bytes(b"\x08\x07garbage")
    with pytest.raises(EngineError, match=r"m\.onnx: cannot be read as ONNX"):
        Reference().open(path, SETTING)


@pytest.mark.parametrize("opset", [12, 24])
def test_opset(File, tmp_path, opset):
    file = File(4, opset=opset)
    with pytest.raises(EngineError, match=rf"has opset {opset}; the reference interpreter reads 13 to 23$"):
        file.open(tmp_path, file.node("Relu", "input"))


def test_two_inputs(File, tmp_path):
    model = File(4).model("input")
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [4]))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(EngineError, match=r"m\.onnx: has 2 inputs and 1 outputs; it must have one each$"):
        Reference().open(tmp_path / "m.onnx", SETTING)


def test_bf16_is_refused(File, tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(
        EngineError, match=r"computes in float32, not bf16; set the float precision to float32$"
    ):
        Reference().open(path, Setting(engine="reference", float_precision="bf16"))


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 3, 4, 5), (2, 1, 4, 4), (0, 3, 4, 4)])
def test_images_that_do_not_fit(File, tmp_path, shape):
    file = File(3, 4, 4)
    session = file.open(tmp_path, file.node("Relu", "input"))
    message = f"small.onnx: input 'input' takes (N, 3, 4, 4), not {shape}; resize the images to it"
    with pytest.raises(EngineError, match=f"^{re.escape(message)}$"):
        session.run(np.zeros(shape, np.float32))


def test_nan_is_told_with_its_tensor(File, tmp_path):
    file = File(2)
    codes = file.quantize(file.node("Log", "input"), 0.1, 0, name="q")
    session = file.open(tmp_path, codes)
    with pytest.raises(
        EngineError, match=r"^operator QuantizeLinear of node 'q': q_out: has NaN, which has no code"
    ):
        session.run(np.array([[-1, 1]], np.float32))
    assert session.run_recorded(np.array([[0, 1]], np.float32))[codes].tolist() == [[0, 0]]  # log 0 saturates


def test_sums_over_int32_are_told(File, tmp_path):
    file = File(70000)
    w = file.weight(np.full((70000, 1), 127, np.int8), 0.01)
    out = file.node("MatMul", file.grid("input", 1.0, 0), w, name="fc")
    session = file.open(tmp_path, out)
    message = (
        r"^operator MatMul of node 'fc': fc: its sums may reach 2266950000, more than an int32 accumulator"
    )
    with pytest.raises(EngineError, match=message):
        session.run(np.full((1, 70000), 255, np.float32))
    # The same weights with inputs whose sums fit.
    assert session.run(np.ones((1, 70000), np.float32))[0, 0] == np.float32(
        70000 * 127 * np.float64(np.float32(0.01))
    )


def test_shapes_that_do_not_fit_name_the_node(File, tmp_path):
    file = File(4)
    out = file.node("Reshape", "input", file.constant([3, 5]), name="view")
    with pytest.raises(
        EngineError, match=r"^operator Reshape of node 'view': cannot reshape array of size 8"
    ):
        file.open(tmp_path, out).run(np.zeros((2, 4), np.float32))


def test_outputs_that_are_not_known(File, tmp_path):
    file = File(2, 4, 4)
    out, _ = file.node("MaxPool", "input", outputs=2, kernel_shape=[2, 2], name="pool")
    message = "^operator MaxPool of node 'pool': only its first output is known here, not 'pool_out1'$"
    with pytest.raises(EngineError, match=message):
        file.open(tmp_path, out).run(np.zeros((1, 2, 4, 4), np.float32))


def test_missing_names(File, tmp_path):
    file = File(2)
    with pytest.raises(
        EngineError, match=r"^operator Relu of node 'act': its input 'lost' does not exist; export the"
    ):
        file.open(tmp_path, file.node("Relu", "lost", name="act")).run(np.zeros((1, 2), np.float32))
    file = File(2)
    file.node("Relu", "input")
    with pytest.raises(
        EngineError, match=r"^small\.onnx: no node makes its output 'logits'; export it again$"
    ):
        file.open(tmp_path, "logits").run(np.zeros((1, 2), np.float32))


REFUSED = {
    "BatchNormalization": ({"training_mode": 1}, "is in training mode; export the network in eval mode"),
    "Resize": ({"mode": "linear"}, "only mode 'nearest' with policy 'stretch' is known"),
    "Pad": (
        {"mode": "wrap"},
        r"mode 'wrap' with amounts \[0\] is not known; pad by constant, reflect or edge",
    ),
    "Cast": (
        {"to": TensorProto.FLOAT16},
        "casts to FLOAT16; known are float32, uint8, int8, int32, int64, bool",
    ),
    "ConvTranspose": (
        {"auto_pad": "SAME_UPPER"},
        "takes its padding from auto_pad or output_shape; export it with",
    ),
    "QuantizeLinear": (
        {"block_size": 2},
        "quantizes in blocks, which is not known here; use per channel scales",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_forms_that_are_not_known(File, tmp_path, kind):
    attributes, reason = REFUSED[kind]
    file = File(2, 4, 4)
    more = [file.constant([0])] * {"BatchNormalization": 4, "Cast": 0}.get(kind, 1)
    if kind == "ConvTranspose":
        more = [file.constant(np.zeros((2, 2, 3, 3)), np.float32)]
    out = file.node(kind, "input", *more, name="it", **attributes)
    with pytest.raises(EngineError, match=f"^operator {kind} of node 'it': {reason}"):
        file.open(tmp_path, out).run(np.zeros((1, 2, 4, 4), np.float32))


def test_operators_of_classification_networks_are_known():
    wanted = """
        QuantizeLinear DequantizeLinear DynamicQuantizeLinear Conv ConvTranspose Gemm MatMul ConvInteger
        MatMulInteger MaxPool AveragePool GlobalAveragePool GlobalMaxPool ReduceMean ReduceMax ReduceMin
        Concat Add Sub Mul Div Relu Clip LeakyRelu PRelu Sigmoid HardSigmoid HardSwish Tanh Erf Gelu Elu
        Softmax Flatten Reshape Transpose Squeeze Unsqueeze Slice Split Pad Gather Shape Constant Identity
        Dropout Cast BatchNormalization LRN LayerNormalization Resize Abs Round Max Min
    """
    assert set(wanted.split()) <= set(TABLE)
