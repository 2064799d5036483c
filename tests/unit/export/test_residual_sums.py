from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional as F

from calibrated import scheme_of
from fewbit.engines.process import EngineProcess
from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.errors import EngineError
from fewbit.export.onnx_out import export_onnx
from fewbit.export.residual_sums import covering_scale, pair_scales
from fewbit.export.sizes import Sizes
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


class Rounded(nn.Module):
    """Blocks whose residual OpenVINO cannot overwrite, one of each kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16, 16)
        )
        self.side, self.fc, self.kind = nn.Conv2d(16, 16, 1), nn.Linear(16, CLASSES), kind

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        if self.kind == "one pixel":
            x = F.adaptive_avg_pool2d(x, 1)
        y = self.conv2(F.relu(self.conv1(x)))
        if self.kind == "beside":
            z = F.relu(y + F.relu(self.side(x)))
        elif self.kind == "one pixel of it":
            z = F.relu(y + F.relu(self.side(F.adaptive_avg_pool2d(x, 1))))
        else:
            z = F.relu(y + x)
        if self.kind == "read again":
            z = F.relu(self.side(x)) * 0.5 + self.conv3(z)
        if self.kind == "joined again":
            z = self.conv3(torch.cat((x[:, :8], z[:, 8:]), 1))
        if self.kind == "pooled again":
            z = self.conv3(z) + F.max_pool2d(x, 3, 1, 1)
        if self.kind == "added twice":
            z = F.relu(self.conv3(z) + x)
        return self.fc(F.relu(z).mean((2, 3)))


KEPT = {"added twice": ["conv3:sum:q", "conv3:sum:dq"]}
"""Of two sums of one residual the last may overwrite it."""


def make(engine: str = "openvino", scheme: Scheme | None = None, **kinds: bool) -> Net:
    torch.manual_seed(0)
    net = capture(Sums(**kinds).eval(), "sums", SIZE, CLASSES)
    recipe = read_recipe("int8").model_copy(update={"scheme": scheme or Scheme()})
    return run_recipe(recipe, net, make_context(engine))[0]


def pairs(net: Net, engine: str | None = "openvino") -> dict[fx.Node, float]:
    return pair_scales(net, None if engine is None else target(engine), Sizes(net))


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
    assert pairs(net()) == {}  # type: ignore[operator]


def test_no_pair_for_an_engine_that_rounds_it() -> None:
    assert pairs(make("onnxruntime"), "onnxruntime") == {}
    assert pairs(make(), None) == {}
    assert len(pairs(make())) == 1


def test_of_a_projection_only_codes_from_0_take_part() -> None:
    assert pairs(make(projects=True)) == {}  # its codes are signed


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


NEEDS_VNNI = pytest.mark.skipif("avx512_vnni" not in describe_host().isa, reason="AVX-512 VNNI kernels")


@NEEDS_VNNI
@pytest.mark.parametrize(
    "kind",
    [
        *("one pixel", "one pixel of it", "beside"),
        *("read again", "joined again", "pooled again", "added twice"),
    ],
)
def test_no_pair_where_the_engine_would_round_at_it(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = capture(Rounded(kind).eval(), "rounded", SIZE, CLASSES)
    path = write(run_recipe(read_recipe("int8"), net, make_context("openvino"))[0], tmp_path)
    assert marked(path) == KEPT.get(kind, [])
    assert_runs_as_simulated(path, make_images(64).numpy())


@NEEDS_VNNI
@pytest.mark.parametrize("seed", range(4))
def test_openvino_adds_in_the_kernel_to_the_code(seed: int, tmp_path: Path) -> None:
    assert_runs_as_simulated(write(make(), tmp_path), make_images(64, seed).numpy())


def assert_runs_as_simulated(path: Path, images: NDArray[np.float32]) -> None:
    """OpenVINO's logits are the reference's with its rounding; a code that differed would show."""
    found = []
    for runner in ("openvino", "reference"):
        rounding = rounding_of("openvino", describe_host())
        with EngineProcess(runner) as process:
            session = process.open(path, Setting(engine=runner, batch=64, rounding=rounding))
            found.append(session.run(images))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rounding", ["exact", "openvino", "openvino_amx"])
def test_a_pair_that_is_too_narrow_shows(rounding: str, tmp_path: Path) -> None:
    path = write(make(), tmp_path)
    model, narrow = onnx.load(path), tmp_path / "narrow.onnx"
    (scale,) = (entry for entry in model.graph.initializer if entry.name == "conv2:sum.scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / 16, scale.name))
    onnx.save(model, narrow)
    setting = Setting.model_validate({"engine": "reference", "rounding": rounding})
    wide, clamped = (Reference().open(p, setting).run(make_images().numpy()) for p in (path, narrow))
    assert np.abs(wide - clamped).max() > 1e-3 * np.abs(wide).max()


def test_onnxruntime_rounds_at_a_pair(tmp_path: Path) -> None:
    path, images = write(make(), tmp_path), make_images().numpy()
    found = []
    for runner in ("onnxruntime", "reference"):
        with EngineProcess(runner) as process:
            setting = Setting.model_validate({"engine": runner, "rounding": "onnxruntime", "batch": 8})
            found.append(process.open(path, setting).run(images))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-4)


def unmark(model: onnx.ModelProto) -> None:
    del _pair_of(model)[0].metadata_props[:]


def other_operator(model: onnx.ModelProto) -> None:
    last = _pair_of(model)[1]
    last.op_type = "Neg"
    del last.input[1:]


def without_grid(model: onnx.ModelProto) -> None:
    del _pair_of(model)[0].input[1:]


def without_inputs(model: onnx.ModelProto) -> None:
    del _pair_of(model)[1].input[:]


def other_zero_point(model: onnx.ModelProto) -> None:
    (zero,) = (entry for entry in model.graph.initializer if entry.name == "conv2:sum.zero_point")
    zero.CopyFrom(numpy_helper.from_array(np.int8(3), zero.name))


@pytest.mark.parametrize("broken", [unmark, other_operator, without_grid, without_inputs, other_zero_point])
def test_a_marked_node_that_is_no_pair_is_an_error(
    broken: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    path = write(make(), tmp_path)
    model = onnx.load(path)
    broken(model)
    onnx.save(model, path)
    with pytest.raises(EngineError, match=r"is marked 'fewbit.passes' and is no pair of .*; export the file"):
        Reference().open(path, Setting(engine="reference"))


def _pair_of(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.name.startswith("conv2:sum")]
