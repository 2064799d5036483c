"""On networks drawn by chance: what is simulated is what the file says, and what the engine runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import capture
from fewbit.place.simulate import simulate
from fewbit.place.targets import TARGETS, target
from fewbit.recipe import read_recipe, run_recipe
from fewbit.registry import find
from networks import make_context, make_images
from random_networks import RandomNetwork

SEEDS = range(16)


@pytest.mark.parametrize("engine", TARGETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_simulation_reference_and_engine_agree(seed: int, engine: str, tmp_path: Path) -> None:
    model = RandomNetwork(seed).eval()
    net, images = capture(model, f"random{seed}", (3, 16, 16), 5), make_images(4, seed=5)
    with torch.no_grad():
        logits = model(images).numpy()
    path = tmp_path / "net.onnx"
    for recipe, near in (
        ("float32", 1e-4),
        ("int8", 0.25),
        ("int8-dynamic", 0.25),
        ("int8-weights-only", 0.25),
    ):
        made, _ = run_recipe(read_recipe(recipe), net, make_context(engine))
        export_onnx(made, path, target(engine))
        expected = Reference().open(path, Setting(engine="reference", batch=4)).run(images.numpy())
        np.testing.assert_array_equal(simulate(made, images).numpy(), expected, err_msg=recipe)
        session = find("engines", engine)().open(path, Setting.from_data({"engine": engine, "batch": 4}))
        scale = float(np.abs(expected).max())
        found = session.run(images.numpy())
        assert np.abs(found - expected).max() <= (1e-4 if recipe == "float32" else 0.03) * scale, recipe
        assert np.abs(expected - logits).max() <= near * scale, recipe
        if recipe == "int8":
            assert session.placement().integer_operators > 0
