"""ReLU and clips that are left to the codes behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.simulate import simulate
from fewbit.place.targets import TARGETS, target
from fewbit.recipe import Recipe, read_recipe, run_recipe
from fewbit.registry import find
from networks import make_context, make_images, make_net

IMAGES = make_images(4, seed=5)


class Joined(nn.Module):
    """A branch with an activation and one without meet in a concatenation, so they share a grid."""

    def __init__(self, bounded: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.c, self.fc = nn.Conv2d(16, 8, 1), nn.Linear(8, 5)
        self.bounded = bounded

    def forward(self, x: Tensor) -> Tensor:
        a = F.hardtanh(self.a(x), -0.5, 0.5) if self.bounded else F.relu(self.a(x))
        return self.fc(F.relu(self.c(torch.cat((a, self.b(x)), 1))).mean((2, 3)))


def joined(bounded: bool) -> Net:
    torch.manual_seed(0)
    return capture(Joined(bounded).eval(), "joined", (3, 16, 16), 5)


def written(net: Net, recipe: str | Recipe, engine: str, path: Path) -> tuple[Net, dict[str, onnx.NodeProto]]:
    chosen = read_recipe(recipe) if isinstance(recipe, str) else recipe
    made, _ = run_recipe(chosen, net, make_context(engine))
    export_onnx(made, path, target(engine))
    return made, {node.name: node for node in onnx.load(path).graph.node}


def limits(path: Path, node: onnx.NodeProto) -> list[int]:
    constants = {c.name: numpy_helper.to_array(c) for c in onnx.load(path).graph.initializer}
    return [int(constants[name]) for name in node.input[1:]]


@pytest.mark.parametrize("bounded", [False, True], ids=["relu", "clip"])
def test_on_a_shared_grid_onnxruntime_gets_a_clamp_of_codes(bounded: bool, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    net, nodes = written(joined(bounded), "int8", "onnxruntime", path)
    name = next(layer.name for layer in net.layers() if layer.kind == ("Clip" if bounded else "Relu"))
    assert name not in nodes
    low, high = limits(path, nodes[f"{name}:clip"])
    assert (0 < low < high < 255) if bounded else (low > 0 and high == 255)
    assert "b:clip" not in nodes, "its neighbour in the group has no activation"
    expected = Reference().open(path, Setting()).run(IMAGES.numpy())
    np.testing.assert_array_equal(simulate(net, IMAGES).numpy(), expected)
    session = find("engines", "onnxruntime")().open(path, Setting(batch=4))
    assert session.placement().float_matrix_operators() == ()
    np.testing.assert_allclose(session.run(IMAGES.numpy()), expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("bounded", [False, True], ids=["relu", "clip"])
def test_on_a_shared_grid_openvino_keeps_it_in_its_kernel(bounded: bool, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    net, nodes = written(joined(bounded), "int8", "openvino", path)
    kinds = [node.op_type for node in nodes.values()]
    assert kinds.count("Clip" if bounded else "Relu") == (1 if bounded else 2)
    expected = Reference().open(path, Setting()).run(IMAGES.numpy())
    np.testing.assert_array_equal(simulate(net, IMAGES).numpy(), expected)
    session = find("engines", "openvino")().open(path, Setting.from_data({"engine": "openvino", "batch": 4}))
    assert session.placement().float_matrix_operators() == ()


def test_where_the_grid_ends_within_the_clip_there_is_none(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    _, nodes = written(make_net("depthwise"), "int8", "onnxruntime", path)
    assert "Clip" not in {node.op_type for node in nodes.values()}
    _, nodes = written(make_net("residual"), "int8", "onnxruntime", path)
    assert [node.op_type for node in nodes.values()].count("Relu") == 3


@pytest.mark.parametrize("engine", TARGETS)
def test_what_a_float_layer_reads_stays_clipped(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    recipe = read_recipe("int8").with_float(["dw", "pw", "fc"])
    net, nodes = written(make_net("depthwise"), recipe, engine, path)
    floats = [node for node in nodes.values() if node.op_type == "Clip" and not node.name.endswith(":clip")]
    assert len(floats) >= 2
    expected = Reference().open(path, Setting()).run(IMAGES.numpy())
    np.testing.assert_array_equal(simulate(net, IMAGES).numpy(), expected)
