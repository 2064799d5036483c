from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.errors import DataError
from fewbit.export.onnx_out import export_onnx
from fewbit.improve.correct_bias import CorrectBias, correct, shift_of
from fewbit.improve.expectation import Moments, clipped
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.quantizer import QuantConv2d, Quantizer, QuantLinear
from fewbit.place.simulate import simulate
from fewbit.place.targets import target
from fewbit.prepare.fold_bn import FoldBN
from fewbit.recipe import Recipe, read_recipe, run_recipe
from fewbit.spec import QuantSpec, Scheme
from networks import NETWORKS, SIZE, make_context, make_images, make_model, make_net

STEPS = ({"use": "canonical"}, {"use": "fold_bn"}, {"use": "place"}, {"use": "calibrate"})
COARSE = Scheme(weights=QuantSpec(bits=3, symmetric=True, signed=True))


def corrected(name: str, shown: Tensor, **options: Any) -> tuple[Net, Net]:
    """Return a network with 3-bit weights before and after the step."""
    recipe = Recipe(name="test", scheme=COARSE, steps=STEPS)
    net, _ = run_recipe(recipe, make_net(name), make_context(images=shown))
    copy = net.clone()
    CorrectBias(**options)(copy, make_context(images=shown))
    return net, copy


def means(net: Net, images: Tensor, rounding: bool) -> dict[str, Tensor]:
    """Return the mean of each output channel of each layer that has a weight grid."""
    net, found = net.clone(), {}
    for module in net.graph.modules():
        if isinstance(module, Quantizer):
            module.enabled = rounding
    for layer in net.layers():
        if isinstance(layer.module, QuantConv2d | QuantLinear):

            def keep(module: Any, inputs: Any, output: Tensor, name: str = layer.name) -> None:
                found[name] = output.transpose(0, 1).flatten(1).double().mean(1)

            layer.module.register_forward_hook(keep)
    with torch.no_grad():
        net(images)
    return found


def test_worked_example_of_the_analytic_form() -> None:
    before = Moments(torch.tensor([0.0, 1.0, -1.0]), torch.tensor([1.0, 0.25, 1.0]))
    expected = clipped(before).mean
    assert expected.tolist() == pytest.approx([0.398942, 1.004245, 0.083315], abs=1e-6)
    layer = nn.Linear(3, 2)
    weight = torch.tensor([[0.31, -0.12, 0.9], [0.05, 0.48, -0.33]])
    quantizer = Quantizer(QuantSpec(bits=4, symmetric=True, signed=True), "w", weight=True)
    quantizer.set_range(-0.9, 0.9)
    assert float(quantizer.scale) == pytest.approx(0.1285714, abs=1e-7)
    rounded = quantizer(weight)
    assert rounded.flatten().tolist() == pytest.approx(
        [0.257143, -0.128571, 0.9, 0, 0.514286, -0.385714], abs=1e-6
    )
    shift = shift_of(layer, (rounded - weight).double(), expected)
    assert shift.tolist() == pytest.approx([-0.029695, 0.009842], abs=1e-6)


def test_kernel_positions_and_groups_add_up() -> None:
    layer = nn.Conv2d(4, 6, (2, 3), groups=2)
    error = torch.randn(6, 2, 2, 3, dtype=torch.float64)
    mean = torch.randn(4, dtype=torch.float64)
    flat = torch.nn.functional.conv2d(mean.reshape(1, 4, 1, 1).expand(1, 4, 2, 3), error, groups=2)
    assert torch.allclose(shift_of(layer, error, mean), flat.flatten())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_has_the_mean_of_the_float_network(name: str) -> None:
    images = make_images(8)
    net, copy = corrected(name, images)
    wanted = means(net, images, rounding=False)
    before, after = means(net, images, rounding=True), means(copy, images, rounding=True)
    assert wanted.keys() == after.keys()
    for layer, mean in wanted.items():
        size = float(mean.abs().max())
        assert torch.allclose(after[layer], mean, atol=2e-5 * max(1.0, size)), layer
    assert any(
        float((before[layer] - mean).abs().max()) > 1e-2 * float(mean.abs().max())
        for layer, mean in wanted.items()
    )


def test_the_analytic_form_removes_most_of_the_shift_where_statistics_are_true() -> None:
    """A network whose BatchNorms have the statistics of the images."""
    model = make_model("depthwise").train()
    images = make_images(64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        model(images)
    scheme = COARSE
    net = capture(model.eval(), "depthwise", SIZE)
    plain, _ = run_recipe(Recipe(name="p", scheme=scheme, steps=STEPS), net, make_context(images=images))
    fixed = plain.clone()
    report = CorrectBias(method="analytic")(fixed, make_context())
    assert report.changed == 4 and report.notes == ()
    wanted = means(plain, images, rounding=False)
    before, after = means(plain, images, rounding=True), means(fixed, images, rounding=True)
    assert float((after["fc"] - wanted["fc"]).norm()) < 0.5 * float((before["fc"] - wanted["fc"]).norm())


def test_layers_whose_input_is_not_known_are_named() -> None:
    net, copy = corrected("gated", make_images(4), method="analytic")
    report = CorrectBias(method="analytic")(net, make_context())
    assert report.notes == ("not corrected, the mean of what they read is not known: squeeze, excite, b, fc",)
    for name in ("squeeze", "excite", "b", "fc"):
        assert torch.equal(copy.layer(name).module.bias, net.layer(name).module.bias)  # type: ignore[arg-type]


def test_it_looks_at_no_more_images_than_told() -> None:
    images = make_images(8)
    _, few = corrected("residual", images, images=3)
    _, same = corrected("residual", images, images=3)
    net, _ = corrected("residual", images)
    CorrectBias()(net, make_context(images=images[:3]))
    for layer in ("stem", "fc"):
        bias = few.layer(layer).module.bias
        assert torch.allclose(bias, net.layer(layer).module.bias, atol=1e-6)  # type: ignore[arg-type]
        assert torch.equal(bias, same.layer(layer).module.bias)  # type: ignore[arg-type]


def test_few_images_are_told_and_none_is_an_error() -> None:
    net, _ = corrected("residual", make_images(4))
    report = CorrectBias()(net, make_context(images=make_images(4)))
    assert report.notes == ("from 4 images; 64 or more are steadier",)
    assert CorrectBias()(net, make_context(images=make_images(64))).notes == ()
    empty = replace(make_context(), batches=lambda: iter(()))
    with pytest.raises(
        DataError, match='correct_bias: no image came; give at least one, or method = "analytic"'
    ):
        CorrectBias()(net, empty)


def test_a_layer_without_a_bias_gets_one_and_rounding_is_on_again() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 196, 3)
    ).eval()
    recipe = Recipe(name="test", scheme=COARSE, steps=(*STEPS, {"use": "correct_bias"}))
    net, _ = run_recipe(recipe, capture(model, "net", SIZE), make_context())
    bias = net.layer("0").module.bias
    assert (
        isinstance(bias, nn.Parameter)
        and bias.dtype == torch.float32
        and float(bias.detach().abs().max()) > 0
    )
    assert all(m.enabled for m in net.graph.modules() if isinstance(m, Quantizer))


def test_a_correction_that_does_not_fit_int32_is_left_out() -> None:
    net, _ = corrected("residual", make_images(4))
    layer = net.layer("conv2")
    module = layer.module
    assert isinstance(module, QuantConv2d) and module.bias is not None
    before = module.bias.detach().clone()
    error = torch.zeros(16, dtype=torch.float64)
    error[3], error[5] = 1e12, 0.25
    kept = correct(net, layer, error)
    assert kept.tolist() == [channel != 3 for channel in range(16)]
    expected = before.clone()
    expected[5] -= 0.25
    assert torch.equal(module.bias, expected)


@pytest.mark.parametrize("recipe", ["int8-equalized", "int8-per-tensor-equalized"])
@pytest.mark.parametrize("name", ["depthwise", "residual"])
def test_the_exported_file_computes_what_is_simulated(name: str, recipe: str, tmp_path: Path) -> None:
    made, _ = run_recipe(read_recipe(recipe), make_net(name), make_context())
    export_onnx(made, tmp_path / "net.onnx", target("onnxruntime"))
    images = make_images(5, seed=9)
    found = Reference().open(tmp_path / "net.onnx", Setting(engine="reference")).run(images.numpy())
    np.testing.assert_array_equal(found, simulate(made, images).numpy())


def test_other_modes() -> None:
    for name in ("int8-dynamic", "int8-weights-only"):
        recipe = read_recipe(name)
        longer = recipe.model_copy(update={"steps": (*recipe.steps, {"use": "correct_bias"})})
        net, reports = run_recipe(longer, make_net("residual"), make_context())
        assert reports[-1].changed == 4
        wanted = means(net, make_images(8), rounding=False)
        assert "fc" in wanted


def test_folding_keeps_what_the_norm_told() -> None:
    model = make_model("residual")
    net = capture(model, "residual", SIZE)
    FoldBN()(net, make_context())
    assert set(net.statistics) == {"stem", "conv1", "conv2"}
    norm = model.bn1
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
    shrunk = (norm.running_var / (norm.running_var + norm.eps)).sqrt()
    assert torch.allclose(net.statistics["conv1"].mean.float(), norm.bias)
    assert torch.allclose(net.statistics["conv1"].std.float(), norm.weight.abs() * shrunk)
    copy = net.clone().with_facts("x")
    copy.statistics.pop("stem")
    assert "stem" in net.statistics and set(copy.statistics) == {"conv1", "conv2"}
