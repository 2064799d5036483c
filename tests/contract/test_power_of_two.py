"""Scales that are powers of two: from the recipe to the file, where requantizing is a shift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.errors import RecipeError
from fewbit.export.onnx_out import export_onnx
from fewbit.improve.norm import restore_norm
from fewbit.net import Net
from fewbit.numerics import quantized_multiplier
from fewbit.place.quantizer import QuantConv2d, Quantizer, QuantLinear
from fewbit.place.simulate import simulate
from fewbit.place.targets import TARGETS, target
from fewbit.ranges.calibrate import Calibrate, input_quantizer
from fewbit.ranges.weights import find_weight_range
from fewbit.recipe import Recipe, read_recipe, run_recipe
from fewbit.registry import ROWS, find
from fewbit.spec import QuantSpec, Scheme
from networks import NETWORKS, make_context, make_images, make_net, quantize

IMAGES = make_images(4, seed=5)
WEIGHTS = {"symmetric": True, "signed": True, "power_of_two": True}
ERRORS = ("mse", "lp_norm", "requant")


def recipe(bits: int = 8, symmetric: bool = False, channel: bool = True, ranges: str = "minmax") -> Recipe:
    scheme = Scheme(
        weights=QuantSpec.from_data(
            WEIGHTS | {"bits": bits, "granularity": "channel" if channel else "tensor"}
        ),
        activations=QuantSpec(bits=bits, symmetric=symmetric, power_of_two=True),
    )
    steps: list[dict[str, Any]] = [{"use": name} for name in ("canonical", "fold_bn", "place")]
    steps.append({"use": "calibrate", "weights": ranges, "activations": ranges})
    return Recipe(name="powers", scheme=scheme, steps=tuple(steps))


def is_power(values: Any) -> bool:
    return bool((np.frexp(np.asarray(values, np.float64))[0] == 0.5).all())


def scales_of(path: Path) -> dict[str, NDArray[Any]]:
    constants = onnx.load(path).graph.initializer
    return {c.name: numpy_helper.to_array(c) for c in constants if c.name.endswith(".scale")}


def layers_of(net: Net) -> list[QuantConv2d | QuantLinear]:
    return [m for layer in net.layers() if isinstance(m := layer.module, QuantConv2d | QuantLinear)]


@pytest.mark.parametrize("engine", TARGETS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_file_has_no_other_scale_and_requantizing_is_a_shift(
    network: str, engine: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    for bits, symmetric, channel, ranges in ((8, False, True, "mse"), (4, True, False, "minmax")):
        net = quantize(network, recipe(bits, symmetric, channel, ranges), engine)
        export_onnx(net, path, target(engine))
        scales = scales_of(path)
        assert len(scales) > 2 * len(layers_of(net)) and all(is_power(s) for s in scales.values())
        assert {s.ndim for n, s in scales.items() if n.endswith(".weight.scale")} == {int(channel)}
        factors = multipliers(net)
        assert factors
        for factor in factors:
            assert quantized_multiplier(float(factor))[0] == 2**30  # M0 = 0.5: nothing but a shift
        expected = Reference().open(path, Setting()).run(IMAGES.numpy())
        np.testing.assert_array_equal(simulate(net, IMAGES).numpy(), expected)
        session = find("engines", engine)().open(path, Setting.from_data({"engine": engine, "batch": 4}))
        assert [o.name for o in session.placement().float_matrix_operators()] == []
        gap = np.abs(session.run(IMAGES.numpy()) - expected).max() / np.abs(expected).max()
        assert gap < (0.02 if bits == 8 else 0.3)


def multipliers(net: Net) -> list[float]:
    """Return Sx Sw / Sy of every layer with a quantized input, over all grids that its network has."""
    outputs = {float(m.scale) for layer in net.layers() if isinstance(m := layer.module, Quantizer)}
    found = []
    for layer in net.layers():
        reads = input_quantizer(net, layer.node)
        if isinstance(layer.module, QuantConv2d | QuantLinear) and isinstance(reads, Quantizer):
            weights = layer.module.weight_quantizer.scale.double().reshape(-1)
            found += [float(w) * float(reads.scale) / out for w in weights for out in outputs]
    return found


@pytest.mark.parametrize("method", [m for m in ROWS["ranges"] if m != "kl"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_of_every_method(method: str, bits: int) -> None:
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(1)) * torch.logspace(
        -2, 2, 6
    ).reshape(-1, 1, 1, 1)
    for granularity in ("tensor", "channel"):
        for symmetric in (True, False):
            spec = QuantSpec.from_data(
                {"bits": bits, "signed": True, "symmetric": symmetric, "granularity": granularity}
                | {"power_of_two": True}
            )
            quantizer = Quantizer(spec, "w", weight=True)
            found = find_weight_range(weight, spec, 0, method)
            quantizer.set_range(found.low, found.high)
            assert is_power(quantizer.scale.numpy())


def errors_of_powers(weight: torch.Tensor, bits: int, power: float) -> dict[float, float]:
    top = 2 ** (bits - 1) - 1
    found = {}
    for exponent in range(-12, 8):
        scale = 2.0**exponent
        rounded = torch.round(weight / scale).clamp(-top, top) * scale
        found[scale] = float((rounded - weight).double().abs().pow(power).sum())
    return found


@pytest.mark.parametrize("method", ERRORS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_methods_that_search_take_the_best_power_of_all(method: str, bits: int) -> None:
    spec = QuantSpec.from_data(WEIGHTS | {"bits": bits})
    chosen: Any = find("ranges", method)()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(400, generator=generator) * float(10 ** torch.randn(1, generator=generator))
        errors = errors_of_powers(weight, bits, getattr(chosen, "power", 2.0))
        quantizer = Quantizer(spec, "w", weight=True)
        found = find_weight_range(weight, spec, 0, chosen)
        quantizer.set_range(found.low, found.high)
        assert errors[float(quantizer.scale)] == pytest.approx(min(errors.values()), rel=1e-6)
        activation = Quantizer(QuantSpec(bits=bits, symmetric=True, signed=True, power_of_two=True), "x")
        finder = chosen.start()
        finder.observe(weight)
        seen = finder.find(activation.spec)
        activation.set_range(seen.low, seen.high)
        # The histogram spreads values within their bins, so of two that are all but equal it may take either.
        assert errors[float(activation.scale)] < 1.02 * min(errors.values())


def test_min_max_covers_its_range_and_wastes_less_than_half() -> None:
    for bits in (2, 4, 8):
        for low, high in ((-1.0, 3.0), (0.0, 0.7), (-5.0, 0.001), (-1.0, 1.0)):
            quantizer = Quantizer(QuantSpec(bits=bits, power_of_two=True), "x")
            quantizer.set_range(low, high)
            covered = (quantizer.qmax - quantizer.qmin) * float(quantizer.scale)
            assert (high - low) * (1 - 1e-6) <= covered < 2 * (high - low)
            assert float(quantizer(torch.zeros(1))) == 0.0


def test_worked_scales() -> None:
    quantizer = Quantizer(QuantSpec(power_of_two=True), "x")
    quantizer.set_range(-1.0, 3.0)  # 4 / 255 goes up to 1 / 32, and 1 / (1 / 32) steps lie below zero
    assert (float(quantizer.scale), float(quantizer.zero_point)) == (1 / 32, 32)
    assert quantizer.codes(torch.tensor([-1.2, -1, 0, 0.5, 3])).tolist() == [0, 0, 32, 48, 128]
    quantizer = Quantizer(QuantSpec(bits=4, symmetric=True, signed=True, power_of_two=True), "x")
    quantizer.set_range(-0.875, 0.5)  # 0.875 / 7 is a power already
    assert float(quantizer.scale) == 0.125


def test_grids_widened_for_a_bias_and_norms_given_back_keep_the_powers() -> None:
    net = make_net("residual")
    with torch.no_grad():
        stem = net.graph.get_submodule("stem")
        assert isinstance(stem, nn.Conv2d)
        stem.weight[0] *= 1e-12
    made, reports = run_recipe(recipe(), net, make_context())
    assert any("widened" in note for note in reports[-1].notes)
    for layer in layers_of(made):
        assert is_power(layer.weight_quantizer.scale.numpy())
        assert not restore_norm(layer)
    assert restore_norm(layers_of(quantize("residual"))[0])


def test_codes_are_not_assigned_with_another_scale() -> None:
    quantizer = Quantizer(QuantSpec.from_data(WEIGHTS), "w", weight=True)
    quantizer.set_range(-1.0, 1.0)
    quantizer.assign(torch.ones(2), quantizer.scale / 2)
    with pytest.raises(RecipeError, match=r"^tensor 'w': its scales are powers of two, .* power_of_two = f"):
        quantizer.assign(torch.ones(2), quantizer.scale * 0.9)


def test_dynamic_scales_cannot_be_powers() -> None:
    wanted = recipe().model_copy(update={"scheme": recipe().scheme.model_copy(update={"mode": "dynamic"})})
    with pytest.raises(
        RecipeError,
        match=r"^layer 'stem': dynamic quantization takes each scale .*set power_of_two = false in \[scheme",
    ):
        run_recipe(wanted, make_net("residual"), make_context())


def test_the_recipe_that_ships_is_built_so() -> None:
    made, _ = run_recipe(read_recipe("int8-power-of-two"), make_net("gated"), make_context("openvino"))
    assert isinstance(read_recipe("int8-power-of-two").built_steps()[-1][1], Calibrate)
    assert all(is_power(m.weight_quantizer.scale.numpy()) for m in layers_of(made))
