"""Weights on power grids, from the recipe to the file: small bytes, float arithmetic, both engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.errors import RecipeError
from fewbit.export.onnx_out import export_onnx
from fewbit.net import Net
from fewbit.place.power_quantizer import PowerQuantizer
from fewbit.place.quantizer import QuantConv2d, QuantLinear
from fewbit.place.simulate import simulate
from fewbit.place.targets import TARGETS, target
from fewbit.recipe import Recipe, read_recipe, run_recipe
from fewbit.registry import find
from fewbit.spec import QuantSpec, Rule, Scheme
from networks import NETWORKS, make_context, make_images, make_net, quantize

IMAGES = make_images(4, seed=5)
POWER = {"symmetric": True, "signed": True, "granularity": "channel", "grid": "power"}


def recipe(
    weights: str = "requant", rules: tuple[Rule, ...] = (), mode: str = "weights_only", **spec: Any
) -> Recipe:
    scheme = Scheme.from_data({"mode": mode, "weights": POWER | spec, "rules": rules})
    steps: list[dict[str, Any]] = [{"use": name} for name in ("canonical", "fold_bn", "place")]
    return Recipe(name="power", scheme=scheme, steps=(*steps, {"use": "calibrate", "weights": weights}))


def layers_of(net: Net) -> dict[str, QuantConv2d | QuantLinear]:
    modules = {layer.name: layer.module for layer in net.layers()}
    return {n: m for n, m in modules.items() if isinstance(m, QuantConv2d | QuantLinear)}


@pytest.mark.parametrize("engine", TARGETS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("bits", "granularity"), [(2, "channel"), (3, "tensor"), (4, "channel"), (8, "tensor")]
)
def test_simulation_reference_and_engine_agree(
    bits: int, granularity: str, network: str, engine: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    net = quantize(network, recipe(bits=bits, granularity=granularity), engine)
    export_onnx(net, path, target(engine))
    expected = Reference().open(path, Setting()).run(IMAGES.numpy())
    np.testing.assert_array_equal(simulate(net, IMAGES).numpy(), expected)
    with torch.no_grad():
        np.testing.assert_allclose(net(IMAGES).numpy(), expected, atol=1e-5 * np.abs(expected).max())
    session = find("engines", engine)().open(path, Setting.from_data({"engine": engine, "batch": 4}))
    np.testing.assert_allclose(session.run(IMAGES.numpy()), expected, atol=1e-5 * np.abs(expected).max())
    kinds = {operator.kind for operator in session.placement().operators}
    assert not kinds & {"Gather", "Cast", "Convert"}, "the codes are looked up when the file is opened"
    constants = {c.name: numpy_helper.to_array(c) for c in onnx.load(path).graph.initializer}
    for name, module in layers_of(net).items():
        codes = constants[f"{name}.weight:q"]
        assert codes.dtype == np.int8 and codes.shape == tuple(module.weight.shape)
        assert np.abs(codes.astype(int)).max() <= 2 ** (bits - 1) - 1
        assert f"{name}.weight" not in constants


def test_the_file_is_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = {}
    for name in ("float32", "int8-weights-only", "w4-weights-only-power"):
        net = quantize("residual", name)
        export_onnx(net, tmp_path / "net.onnx", target("onnxruntime"))
        constants = onnx.load(tmp_path / "net.onnx").graph.initializer
        found[name] = sum(numpy_helper.to_array(c).nbytes for c in constants)
    weights = sum(p.numel() for n, p in make_net("residual").graph.named_parameters() if n.endswith("weight"))
    assert found["w4-weights-only-power"] < 1.5 * weights < 0.5 * found["float32"]
    assert found["w4-weights-only-power"] < found["int8-weights-only"] + 1500  # its tables


def test_it_errs_less_than_uniform_codes_of_the_same_width() -> None:
    torch.manual_seed(0)
    source = make_net("branches")
    for parameter in source.graph.parameters():  # trained weights have tails, those of a fresh network do not
        nn.init.normal_(parameter, std=0.1)
    errors = {}
    for grid in ("power", "uniform"):
        made, _ = run_recipe(recipe(bits=4, grid=grid), source, make_context())
        with torch.no_grad():
            errors[grid] = [
                float((m.weight_quantizer(m.weight) - m.weight).square().sum())
                for m in layers_of(made).values()
            ]
    assert all(power <= 1.001 * uniform for power, uniform in zip(*errors.values(), strict=True))
    assert sum(errors["power"]) < 0.9 * sum(errors["uniform"])


def test_a_rule_may_leave_a_layer_uniform() -> None:
    rule = Rule(match="last", weights=QuantSpec(bits=8, symmetric=True))
    net = quantize("residual", recipe(rules=(rule,), bits=3))
    kinds = {n: isinstance(m.weight_quantizer, PowerQuantizer) for n, m in layers_of(net).items()}
    assert kinds == {"stem": True, "conv1": True, "conv2": True, "fc": False}


def test_exponents_and_steps_are_hyperparameters() -> None:
    one = recipe().model_copy(
        update={
            "steps": (
                *recipe().steps[:-1],
                {"use": "calibrate", "weights": "requant", "weight_options": {"exponents": [0.5]}},
            )
        }
    )
    for module in layers_of(quantize("residual", one)).values():
        assert isinstance(module.weight_quantizer, PowerQuantizer)
        assert set(module.weight_quantizer.exponent.tolist()) == {0.5}


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_integer_arithmetic_is_refused(mode: str) -> None:
    with pytest.raises(
        RecipeError,
        match=r"^layer 'stem': weights on the grid 'power' have no integer arithmetic; set mode = \"wei",
    ):
        run_recipe(recipe(mode=mode), make_net("residual"), make_context())


def test_other_range_methods_are_refused() -> None:
    with pytest.raises(
        RecipeError,
        match=r"^tensor 'stem.weight': is on a power grid, which only the range method 'requant' finds; give",
    ):
        run_recipe(recipe(weights="mse"), make_net("residual"), make_context())


@pytest.mark.parametrize("change", [{"symmetric": False}, {"power_of_two": True}])
def test_grids_that_are_none_are_refused(change: dict[str, bool]) -> None:
    with pytest.raises(RecipeError, match=r"the power grid is symmetric and its scales are no powers of two"):
        recipe(**change)


def test_activations_stay_uniform() -> None:
    with pytest.raises(RecipeError, match=r'activations are on the uniform grid; give grid = "uniform"'):
        Scheme.from_data({"activations": {"grid": "power", "symmetric": True}})


def test_the_recipe_that_ships_is_built_so() -> None:
    shipped = read_recipe("w4-weights-only-power")
    assert not shipped.uses_images
    net, _ = run_recipe(shipped, make_net("depthwise"), make_context())
    assert all(isinstance(m.weight_quantizer, PowerQuantizer) for m in layers_of(net).values())
