from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.improve.correct_bias import CorrectBias, shift_of
from fewbit.improve.expectation import expected_inputs
from fewbit.improve.norm import norm_gains, restore_norm
from fewbit.net import Net
from fewbit.place.quantizer import QuantConv2d, QuantLinear
from fewbit.place.simulate import simulate
from fewbit.place.targets import target
from fewbit.recipe import Recipe, run_recipe
from fewbit.spec import Granularity, QuantSpec, Scheme
from networks import make_context, make_images, make_net

STEPS = ({"use": "canonical"}, {"use": "fold_bn"}, {"use": "place"})


def coarse(name: str, granularity: Granularity = "channel", bits: int = 3) -> Net:
    scheme = Scheme(weights=QuantSpec(bits=bits, symmetric=True, signed=True, granularity=granularity))
    steps = (*STEPS, {"use": "calibrate", "weights": "mse"})
    return run_recipe(Recipe(name="test", scheme=scheme, steps=steps), make_net(name), make_context())[0]


def layers_of(net: Net) -> list[QuantConv2d | QuantLinear]:
    return [x.module for x in net.layers() if isinstance(x.module, QuantConv2d | QuantLinear)]


def outputs(net: Net, images: Tensor) -> Tensor:
    with torch.no_grad():
        return net(images)


def test_worked_example() -> None:
    w = torch.tensor([[0.9, -0.35, 0.12, -0.6, 0.28, 0.05]], dtype=torch.float64)
    q = torch.tensor([[0.9, -0.3, 0.0, -0.6, 0.3, 0.0]], dtype=torch.float64)
    gain = norm_gains(w, q)
    shift = w.mean() - q.mean()
    assert float(shift) == pytest.approx(0.0166667, abs=1e-7)
    assert float(gain) == pytest.approx(1.0097403, abs=1e-7)
    printed, exact = gain * (q + shift), gain * (q - q.mean()) + w.mean()
    assert float(printed.mean()) == pytest.approx(0.0673160, abs=1e-7)
    assert float(exact.mean()) == pytest.approx(0.0666667, abs=1e-7) == float(w.mean())
    for found in (w, printed, exact):
        assert float(found.std(correction=0)) == pytest.approx(0.4762936, abs=1e-7)


def test_a_channel_of_one_value_has_no_gain() -> None:
    assert norm_gains(torch.ones(2, 4), torch.tensor([[1.0] * 4, [0.0, 1, 0, 1]])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["residual", "depthwise", "gated"])
def test_the_codes_stay_and_the_spread_comes_back(name: str) -> None:
    net = coarse(name)
    for layer in layers_of(net):
        exact, codes = layer.weight.detach().clone(), layer.weight_quantizer.codes(layer.weight)
        assert restore_norm(layer)
        assert torch.equal(layer.weight_quantizer.codes(layer.weight), codes)
        gains = norm_gains(exact, layer.weight_quantizer(layer.weight))
        assert torch.allclose(gains, torch.ones_like(gains), atol=1e-5)


def test_one_scale_for_the_tensor_stays() -> None:
    for layer in layers_of(coarse("residual", "tensor")):
        before, scale = layer.weight.detach().clone(), layer.weight_quantizer.scale.clone()
        assert not restore_norm(layer)
        assert torch.equal(layer.weight, before) and torch.equal(layer.weight_quantizer.scale, scale)


def test_the_bias_takes_back_what_the_norm_shifts(tmp_path: Path) -> None:
    net, images = coarse("depthwise"), make_images(8)
    exact = outputs(make_net("depthwise"), images).mean(0)
    before = float((outputs(net, images).mean(0) - exact).norm())
    CorrectBias(norm=True)(net, make_context())
    assert float((outputs(net, images).mean(0) - exact).norm()) < 1e-3 * before
    export_onnx(net, tmp_path / "net.onnx", target("onnxruntime"))
    found = Reference().open(tmp_path / "net.onnx", Setting(engine="reference")).run(images.numpy())
    np.testing.assert_array_equal(found, simulate(net, images).numpy())


def test_the_analytic_form_counts_from_the_weights_before() -> None:
    net = coarse("depthwise")
    copy = net.clone()
    CorrectBias(method="analytic", norm=True)(copy, make_context())
    expected = {str(node.target): mean for node, mean in expected_inputs(net).items()}
    for old, new in zip(layers_of(net), layers_of(copy), strict=True):
        name = new.weight_quantizer.name.removesuffix(".weight")
        with torch.no_grad():
            error = new.weight_quantizer(new.weight).double() - old.weight.double()
        assert old.bias is not None and new.bias is not None
        shift = shift_of(old, error, expected[name])
        assert torch.allclose(new.bias.double(), old.bias.double() - shift, rtol=1e-5, atol=1e-6)
        assert name == "stem" or float(shift.abs().max()) > 1e-4
