from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import networks
from fewbit import __version__
from fewbit.engines.onnxruntime import OnnxRuntime
from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.errors import OutputError, RecipeError
from fewbit.export.onnx_out import IR_VERSION, OPSET, build_onnx, export_onnx
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.quantizer import DynamicQuantizer, Quantizer
from fewbit.place.simulate import simulate
from fewbit.place.targets import target
from fewbit.recipe import Recipe, read_recipe, run_recipe, shipped_recipes
from networks import CLASSES, NETWORKS, SIZE, make_context, make_images, make_net, networks_for, quantize

RECIPES = tuple(shipped_recipes())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(path: Path, images: Tensor, batch: int = 1) -> np.ndarray:
    return OnnxRuntime().open(path, Setting(batch=batch)).run(images.numpy())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_is_valid_and_its_bytes_are_the_same_twice(name: str, recipe: str, tmp_path: Path) -> None:
    if name not in networks_for(*(step["use"] for step in shipped_recipes()[recipe].steps)):
        pytest.skip("no BatchNorm to read")
    export_onnx(quantize(name, recipe), tmp_path / "a.onnx", target("onnxruntime"))
    export_onnx(quantize(name, recipe), tmp_path / "b.onnx", target("onnxruntime"))
    assert digest(tmp_path / "a.onnx") == digest(tmp_path / "b.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def test_its_bytes_are_the_same_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from networks import quantize\n"
        "from fewbit.export.onnx_out import export_onnx; from fewbit.place.targets import target\n"
        "export_onnx(quantize('gated'), Path(sys.argv[2]), target('onnxruntime'), {'b': '1', 'a': '2'})"
    )
    folder = str(Path(networks.__file__).parent)
    export_onnx(quantize("gated"), tmp_path / "here.onnx", target("onnxruntime"), {"b": "1", "a": "2"})
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run(
        [sys.executable, "-c", code, folder, str(tmp_path / "there.onnx")], check=True, env=environment
    )
    assert digest(tmp_path / "here.onnx") == digest(tmp_path / "there.onnx")


def test_the_ends_are_named_and_take_any_number_of_images(tmp_path: Path) -> None:
    net = quantize("branches")
    export_onnx(net, tmp_path / "net.onnx", target("onnxruntime"))
    graph = onnx.load(tmp_path / "net.onnx").graph
    (image,), (logits,) = graph.input, graph.output
    assert (image.name, logits.name) == ("input", "logits")
    sides = [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim]
    assert sides == ["N", *SIZE]
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == ["N", CLASSES]
    images = make_images(5)
    whole = run(tmp_path / "net.onnx", images, batch=5)
    assert whole.shape == (5, CLASSES)
    for batch in (1, 2, 3):
        np.testing.assert_allclose(run(tmp_path / "net.onnx", images, batch), whole, atol=1e-6)


@pytest.mark.parametrize("recipe", ["float32", "int8", "int8-dynamic"])
def test_every_layer_has_a_node_of_its_name_and_no_name_is_there_twice(recipe: str) -> None:
    net = quantize("gated", recipe)
    model = build_onnx(net, target("onnxruntime"))
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    layers = [x for x in net.layers() if not isinstance(x.module, Quantizer | DynamicQuantizer)]
    assert {layer.name for layer in layers} <= set(names)
    owned = [name for name in names if name is not None]
    parts = {layer.name for layer in layers} | {"input"}
    assert all(any(name == p or name.startswith((f"{p}:", f"{p}.")) for p in parts) for name in owned)


@pytest.mark.parametrize(
    ("recipe", "scope"), [("float32", "float"), ("int8", "static"), ("int8-dynamic", "dynamic-sample")]
)
def test_metadata_says_what_the_file_is(recipe: str, scope: str, tmp_path: Path) -> None:
    export_onnx(quantize("residual", recipe), tmp_path / "net.onnx", metadata={"engine": "openvino"})
    model = onnx.load(tmp_path / "net.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts == {
        "fewbit.version": __version__,
        "fewbit.network": "residual",
        "fewbit.activations": scope,
        "fewbit.engine": "openvino",
    }
    assert (model.producer_name, model.producer_version) == ("fewbit", __version__)
    assert (model.ir_version, model.opset_import[0].version) == (IR_VERSION, OPSET)


def test_a_network_without_grids_is_not_written(tmp_path: Path) -> None:
    steps = tuple({"use": step} for step in ("canonical", "fold_bn", "place"))
    net, _ = run_recipe(Recipe(name="x", steps=steps), make_net("residual"), make_context())
    with pytest.raises(RecipeError, match="residual: is placed but not calibrated; put the step 'calibrate'"):
        export_onnx(net, tmp_path / "net.onnx", target("onnxruntime"))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(OutputError, match=r"taken/net\.onnx: cannot be written"):
        export_onnx(quantize("residual", "float32"), tmp_path / "taken" / "net.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_captured_network_is_exported_as_it_is(tmp_path: Path) -> None:
    net = make_net("residual")
    export_onnx(net, tmp_path / "net.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds.count("BatchNormalization") == 3
    with torch.no_grad():
        expected = net(make_images(3)).numpy()
    np.testing.assert_allclose(run(tmp_path / "net.onnx", make_images(3)), expected, atol=1e-5)


def test_a_network_in_training_mode_is_exported_as_in_evaluation(tmp_path: Path) -> None:
    net = make_net("depthwise")
    export_onnx(net, tmp_path / "eval.onnx")
    before = {key: value.clone() for key, value in net.train().graph.state_dict().items()}
    export_onnx(net, tmp_path / "train.onnx")
    assert digest(tmp_path / "eval.onnx") == digest(tmp_path / "train.onnx")
    assert all(torch.equal(value, before[key]) for key, value in net.graph.state_dict().items())


class Named(nn.Module):
    """Layers under the names that the file's ends and the exporter's own nodes have."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Conv2d(3, 8, 3)
        self.act = nn.Module()
        self.act.sigmoid = nn.Conv2d(8, 8, 1)
        self.silu = nn.SiLU()
        self.output = nn.Conv2d(8, 8, 1)
        self.logits = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.silu(self.act.sigmoid(F.relu(self.input(x))))  # type: ignore[operator]
        return self.logits(F.relu(self.output(x))).mean((2, 3))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("recipe", ["float32", "int8", "int8-dynamic", "int8-weights-only"])
def test_layers_may_have_the_names_of_the_files_ends(recipe: str, engine: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = capture(Named().eval(), "named", SIZE, CLASSES)
    made, _ = run_recipe(read_recipe(recipe), net, make_context(engine))
    path = tmp_path / "net.onnx"
    export_onnx(made, path, target(engine))
    onnx.checker.check_model(onnx.load(path), full_check=True)
    expected = simulate(made, make_images(3)).numpy()
    found = Reference().open(path, Setting(engine="reference")).run(make_images(3).numpy())
    np.testing.assert_array_equal(found, expected)
    assert np.abs(run(path, make_images(3)) - expected).max() < 0.05 * np.abs(expected).max()


def test_one_tensor_on_both_sides_of_a_sum(tmp_path: Path) -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, CLASSES, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x))
            return self.b(y + y).mean((2, 3))

    torch.manual_seed(0)
    for engine in ("onnxruntime", "openvino"):
        made, _ = run_recipe(
            read_recipe("int8"), capture(Doubled().eval(), "doubled", SIZE, CLASSES), make_context(engine)
        )
        export_onnx(made, tmp_path / "net.onnx", target(engine))
        expected = simulate(made, make_images(3)).numpy()
        found = (
            Reference().open(tmp_path / "net.onnx", Setting(engine="reference")).run(make_images(3).numpy())
        )
        np.testing.assert_array_equal(found, expected)


def test_networks_that_differ_have_other_bytes(tmp_path: Path) -> None:
    nets: list[Net] = [
        quantize("residual"),
        quantize("residual", "int8-mse"),
        quantize("residual", "float32"),
    ]
    for number, net in enumerate(nets):
        export_onnx(net, tmp_path / f"{number}.onnx", target("onnxruntime"))
    assert len({digest(path) for path in tmp_path.iterdir()}) == 3
