from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.net import Net
from fewbit.place.quantizer import Quantizer
from fewbit.place.simulate import simulate, simulate_recorded
from fewbit.place.targets import target
from fewbit.recipe import read_recipe
from networks import NETWORKS, RECIPES, make_images, quantize

ENGINES = ("onnxruntime", "openvino")
FOUR_BITS = {
    "weights": {"bits": 4, "symmetric": True, "signed": True, "granularity": "channel"},
    "activations": {"bits": 5},
}


def check_equal(net: Net, path: Path, engine: str) -> None:
    """Compare the simulation of the Net with the interpreter of the file: every code and every logit."""
    export_onnx(net, path, target(engine))
    images = make_images(3, seed=7)
    logits, codes = simulate_recorded(net, images)
    record = Reference().open(path, Setting(engine="reference")).run_recorded(images.numpy())
    for name, value in codes.items():
        stored = record[f"{name}:q"]
        quantizer = _quantizer(net, name)
        shift = 128 if stored.dtype == np.uint8 and not quantizer.unsigned else 0
        whole = (stored.astype(np.int64) - shift).clip(quantizer.qmin, quantizer.qmax)
        np.testing.assert_array_equal(whole, value, err_msg=name)
    np.testing.assert_array_equal(record["logits"], logits.numpy())


def _quantizer(net: Net, name: str) -> Quantizer:
    modules = [layer.module for layer in net.layers() if layer.inputs == (name,)]
    return next(module for module in modules if isinstance(module, Quantizer))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recipe", [*RECIPES, "int8-dynamic", "int8-weights-only"])
@pytest.mark.parametrize("name", NETWORKS)
def test_simulation_and_reference_agree_bit_for_bit(
    name: str, recipe: str, engine: str, tmp_path: Path
) -> None:
    check_equal(quantize(name, recipe, engine), tmp_path / "net.onnx", engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_so_they_do_under_eight_bits(name: str, engine: str, tmp_path: Path) -> None:
    plain = read_recipe("int8")
    scheme = plain.scheme.from_data(FOUR_BITS)
    net = quantize(name, plain.model_copy(update={"scheme": scheme}), engine)
    check_equal(net, tmp_path / "net.onnx", engine)


@pytest.mark.parametrize("name", NETWORKS)
def test_fake_quantized_forward_stays_near_the_simulation(name: str) -> None:
    net = quantize(name)
    images = make_images(4, seed=9)
    with torch.no_grad():
        fake, exact = net(images), simulate(net, images)
    assert float((fake - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    for recipe in ("int8", "int8-dynamic"):
        net = quantize("gated", recipe)
        images = make_images(4, seed=11)
        together = simulate(net, images)
        alone = torch.cat([simulate(net, image[None]) for image in images])
        assert torch.equal(together, alone)
