from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.errors import RecipeError
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.quantizer import QuantConv2d, Quantizer, QuantLinear
from fewbit.place.simulate import simulate
from fewbit.place.targets import target
from fewbit.recipe import Recipe, read_recipe, run_recipe
from fewbit.spec import Scheme
from networks import NETWORKS, SIZE, make_context, make_images, make_model, make_net

STEPS = ("canonical", "fold_bn", "place")


def made(net: Net, scheme: Scheme | None = None, engine: str = "onnxruntime", **options: Any) -> Net:
    steps = (*({"use": step} for step in STEPS), {"use": "calibrate_norm", **options})
    recipe = Recipe(name="test", scheme=scheme or Scheme(), steps=steps)
    return run_recipe(recipe, net, replace(make_context(engine), batches=_nothing))[0]


def _nothing() -> Any:
    raise AssertionError("an image was asked for")


def ranges(net: Net) -> dict[str, tuple[float, float]]:
    return {x.module.name: x.module.range() for x in net.layers() if isinstance(x.module, Quantizer)}


def learned(name: str, images: Tensor) -> Net:
    """Return a network whose BatchNorms have the statistics of the images."""
    model = make_model(name).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        model(images)
    return capture(model.eval(), name, SIZE)


class Plain(nn.Module):
    """One normalised layer without an activation, which another layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
            self.norm.bias.copy_(torch.tensor([1.0, 0.0, -3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x))).mean((2, 3))


@pytest.mark.parametrize("deviations", [6.0, 4.0])
def test_ends_are_those_of_the_farthest_channels(deviations: float) -> None:
    torch.manual_seed(0)
    found = ranges(made(capture(Plain().eval(), "plain", SIZE), deviations=deviations))
    shrunk = 1 / math.sqrt(1 + 1e-5)
    low = min(1 - 0.5 * deviations * shrunk, -2 * deviations * shrunk, -3 - deviations * shrunk)
    high = max(1 + 0.5 * deviations * shrunk, 2 * deviations * shrunk, -3 + deviations * shrunk)
    step = (high - low) / 255
    assert found["a"] == pytest.approx((low, high), abs=step)
    assert found["input"] == pytest.approx((-3.0, 3.0), abs=6 / 255)


def test_the_image_spans_what_the_card_or_the_step_says() -> None:
    net = make_net("residual")
    assert ranges(made(net, image=2.0))["input"] == pytest.approx((-2, 2), abs=4 / 255)
    net.image_range = ((-2.0, -1.5, -1.0), (2.5, 2.0, 3.0))
    assert ranges(made(net, image=2.0))["input"] == pytest.approx((-2, 3), abs=5 / 255)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("network", ["residual", "depthwise"])
def test_ranges_are_near_those_of_images_where_the_statistics_are_true(network: str, engine: str) -> None:
    images = make_images(64)
    net = learned(network, images)
    found = ranges(made(net, engine=engine, image=float(images.abs().max())))
    real, _ = run_recipe(read_recipe("int8"), net, make_context(engine, images))
    wanted = ranges(real)
    assert found.keys() == wanted.keys()
    for name, (low, high) in wanted.items():
        ratio = (found[name][1] - found[name][0]) / (high - low)
        averaged = name.endswith("flatten")  # of noise, no two of whose positions are alike
        assert ratio > 1 if averaged else 0.5 < ratio < 2.5, name


def test_a_clip_caps_and_a_relu_cuts() -> None:
    found = ranges(made(make_net("depthwise")))
    assert all(low == 0 for name, (low, _) in found.items() if name != "input")
    assert max(high for name, (_, high) in found.items() if name != "input") <= 6.0001


@pytest.mark.parametrize("network", ["branches", "gated"])
def test_a_network_without_norms_is_told(network: str) -> None:
    with pytest.raises(RecipeError, match=f"{network}: no BatchNorm tells what its tensors are like; take a"):
        run_recipe(read_recipe("int8-dfq"), make_net(network), make_context())


class Rows(nn.Module):
    """A layer reads what a layer norm made of a normalised one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.layer_norm(self.norm(self.a(x)), (16, 16))).mean((2, 3))


def test_a_tensor_of_which_nothing_is_known_is_told() -> None:
    net = capture(Rows().eval(), "rows", SIZE)
    with pytest.raises(
        RecipeError, match=r"rows: without images nothing tells between which values '.*' lies"
    ):
        made(net)


@pytest.mark.parametrize("mode", ["dynamic", "weights_only"])
def test_other_modes_need_no_norms(mode: str) -> None:
    net = made(make_net("gated"), Scheme(mode=mode))  # type: ignore[arg-type]
    assert all(
        layer.module.weight_quantizer.ready
        for layer in net.layers()
        if isinstance(layer.module, QuantConv2d | QuantLinear)
    )
    assert net(make_images(1)).isfinite().all()


def test_it_needs_folded_norms() -> None:
    recipe = Recipe(name="test", steps=({"use": "canonical"}, {"use": "place"}, {"use": "calibrate_norm"}))
    with pytest.raises(
        RecipeError, match="step 'calibrate_norm' needs a network that is folded; put the step"
    ):
        run_recipe(recipe, make_net("residual"), make_context())


def test_weights_take_the_method_asked_for() -> None:
    scheme = read_recipe("w4a8-dfq").scheme
    plain, clipped = (made(make_net("residual"), scheme, weights=method) for method in ("minmax", "mse"))
    scales = [n.layer("conv1").module.weight_quantizer.scale for n in (plain, clipped)]  # type: ignore[union-attr]
    assert bool((scales[1] <= scales[0]).all()) and bool((scales[1] < scales[0]).any())  # type: ignore[operator]


@pytest.mark.parametrize("recipe", ["int8-dfq", "w4a8-dfq", "int8-zeroq"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name in ("depthwise", "residual")])
def test_the_exported_file_computes_what_is_simulated(name: str, recipe: str, tmp_path: Path) -> None:
    net, _ = run_recipe(read_recipe(recipe), make_net(name), make_context())
    export_onnx(net, tmp_path / "net.onnx", target("onnxruntime"))
    images = make_images(5, seed=9)
    found = Reference().open(tmp_path / "net.onnx", Setting(engine="reference")).run(images.numpy())
    np.testing.assert_array_equal(found, simulate(net, images).numpy())
