from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from calibrated import scheme_of
from fewbit.engines.process import EngineProcess
from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.errors import EngineError
from fewbit.export.onnx_out import export_onnx
from fewbit.export.residual_sums import covering_scale, pair_scales
from fewbit.load.capture import capture
from fewbit.measure.host import describe_host, rounding_of
from fewbit.net import Net
from fewbit.place.targets import target
from fewbit.recipe import read_recipe, run_recipe
from fewbit.spec import PASSES, Scheme
from networks import CLASSES, SIZE, make_context, make_images, quantize
from opened_files import drop_passed

POSITIVE = st.floats(2.0**-13, 10.0, width=32)


class Sums(nn.Module):
    """A block of each kind: what the second convolution reads, a ReLU behind, a projection."""

    def __init__(self, reads_itself: bool = False, relu: bool = True, projects: bool = False) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = (nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16))
        self.projection = nn.Conv2d(16, 16, 1) if projects else None
        self.head, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, CLASSES)
        self.reads_itself, self.relu = reads_itself, relu

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.conv2(x if self.reads_itself else F.relu(self.conv1(x)))
        x = y + (x if self.projection is None else self.projection(x))
        x = F.relu(self.head(F.relu(x) if self.relu else x))
        return self.fc(x.mean((2, 3)))


def make(engine: str = "openvino", scheme: Scheme | None = None, **kinds: bool) -> Net:
    torch.manual_seed(0)
    net = capture(Sums(**kinds).eval(), "sums", SIZE, CLASSES)
    recipe = read_recipe("int8").model_copy(update={"scheme": scheme or Scheme()})
    return run_recipe(recipe, net, make_context(engine))[0]


def write(net: Net, folder: Path) -> Path:
    path = folder / "net.onnx"
    export_onnx(net, path, target("openvino"))
    return path


def marked(path: Path) -> list[str]:
    return [
        node.name
        for node in onnx.load(path).graph.node
        if any(entry.key == PASSES for entry in node.metadata_props)
    ]


def test_a_block_gets_one_pair_with_the_scale_of_the_formula(tmp_path: Path) -> None:
    path = write(make(), tmp_path)
    assert marked(path) == ["conv2:sum:q", "conv2:sum:dq"]
    graph = onnx.load(path).graph
    constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    pairs = {node.name: node for node in graph.node}
    add = pairs["add"]
    (other,) = (name for name in add.input if not name.startswith("conv2"))
    makers = {node.output[0]: node for node in graph.node}
    (behind,) = (n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "relu_2")
    residual, out = (float(constants[node.input[1]]) for node in (makers[other], behind))
    found = constants[pairs["conv2:sum:q"].input[1]]
    needed = max(255 * residual / 128, 255 * out / 127)
    assert needed < found < 2.01 * needed
    assert np.frexp(found)[0] == 0.5  # a power of two
    assert constants[pairs["conv2:sum:q"].input[2]].dtype == np.int8


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(lambda: make(reads_itself=True), id="the convolution reads the residual itself"),
        pytest.param(lambda: make(relu=False), id="no ReLU behind the sum"),
        pytest.param(lambda: make(scheme=scheme_of(8, 6)), id="fewer codes than uint8 has"),
        pytest.param(lambda: quantize("depthwise", engine="openvino"), id="no sum"),
    ],
)
def test_no_pair_where_it_could_change_a_code_or_gains_nothing(net: object) -> None:
    assert pair_scales(net(), target("openvino")) == {}  # type: ignore[operator]


def test_no_pair_for_an_engine_that_rounds_it() -> None:
    assert pair_scales(make("onnxruntime"), target("onnxruntime")) == {}
    assert pair_scales(make(), None) == {}
    assert len(pair_scales(make(), target("openvino"))) == 1


def test_of_a_projection_only_codes_from_0_take_part() -> None:
    assert pair_scales(make(projects=True), target("openvino")) == {}  # its codes are signed


@given(POSITIVE, POSITIVE, st.integers(0, 255), st.floats(-1e4, 1e4, width=32))
def test_what_the_pair_clamps_changes_no_code(residual: float, out: float, code: int, value: float) -> None:
    pair = np.float32(covering_scale(residual, out))
    low, high = np.float32(-128) * pair, np.float32(127) * pair

    def codes(y: np.float32) -> float:
        total = np.float64(y) + np.float64(residual) * code
        return float(np.clip(np.rint(max(0.0, total) / out), 0, 255))

    y = np.float32(value)
    assert codes(y) == codes(y.clip(low, high))


@pytest.mark.parametrize("rounding", ["exact", "openvino"])
def test_the_reference_passes_a_marked_pair(rounding: str, tmp_path: Path) -> None:
    net, images = make(), make_images().numpy()
    with_pair = write(net, tmp_path)
    without, model = tmp_path / "without.onnx", onnx.load(with_pair)
    drop_passed(model)
    onnx.save(model, without)
    setting = Setting.model_validate({"engine": "reference", "rounding": rounding})
    first, second = (Reference().open(path, setting).run_recorded(images) for path in (with_pair, without))
    assert first.keys() == second.keys()
    far = sum(int((first[key] != second[key]).sum()) for key in first if key != "logits")
    assert far == 0 if rounding == "exact" else far < 20  # the two kernels round ties of a float apart


@pytest.mark.skipif("avx512_vnni" not in describe_host().isa, reason="formulas of AVX-512 VNNI kernels")
@pytest.mark.parametrize("seed", range(4))
def test_openvino_adds_in_the_kernel_to_the_code(seed: int, tmp_path: Path) -> None:
    path = write(make(), tmp_path)
    images = make_images(64, seed).numpy()
    found = []
    for runner in ("openvino", "reference"):
        rounding = rounding_of("openvino", describe_host())
        with EngineProcess(runner) as process:
            session = process.open(path, Setting(engine=runner, batch=64, rounding=rounding))
            found.append(session.run(images))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5)


def test_half_a_marked_pair_is_an_error(tmp_path: Path) -> None:
    path = write(make(), tmp_path)
    model = onnx.load(path)
    (first,) = (node for node in model.graph.node if node.name == "conv2:sum:q")
    del first.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(EngineError, match=r"'conv2:sum:dq': has 'fewbit.passes' without its QuantizeLinear;"):
        Reference().open(path, Setting(engine="reference"))
