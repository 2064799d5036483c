"""Fewer than 8 bits on a real network: deployed equals simulated there too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from fewbit.data.image_set import ImageSet
from fewbit.engines.process import EngineProcess
from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.net import Net
from fewbit.place.simulate import simulate
from fewbit.place.targets import target
from fewbit.recipe import Recipe, image_context, read_recipe, run_recipe
from fewbit.spec import QuantSpec, Rule, Scheme
from opened_files import open_all, run_all
from real_names import ENGINES

pytestmark = pytest.mark.needs_shared
NAME, CALIBRATION = "resnet20", 32


def recipe_of(weights: int, activations: int, ends: bool) -> Recipe:
    eight = QuantSpec(bits=8, symmetric=True, signed=True, granularity="channel")
    rules = [Rule(match=m, weights=eight, activations=QuantSpec()) for m in ("first", "last")]
    scheme = Scheme(
        weights=eight.model_copy(update={"bits": weights}),
        activations=QuantSpec(bits=activations),
        rules=tuple(rules) if ends else (),
    )
    return read_recipe("int8-mse").model_copy(update={"name": "widths", "scheme": scheme})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("weights", "activations", "ends"), [(4, 4, False), (2, 8, True)])
def test_engine_reference_and_simulation_agree(
    weights: int,
    activations: int,
    ends: bool,
    engine: str,
    net_of: Callable[[str], Net],
    images_of: Callable[[str, int], ImageSet],
    tmp_path: Path,
) -> None:
    images = images_of(NAME, CALIBRATION)
    made, _ = run_recipe(recipe_of(weights, activations, ends), net_of(NAME), image_context(images, engine))
    path = tmp_path / "net.onnx"
    export_onnx(made, path, target(engine))
    batch = next(iter(images.batches(4)))
    expected = Reference().open(path, Setting(engine="reference")).run(batch)
    np.testing.assert_array_equal(simulate(made, torch.from_numpy(batch)).numpy(), expected)

    everything, names = open_all(path, tmp_path)
    _, *found = run_all(engine, everything, names, batch)
    codes = dict(zip(names, found, strict=True))
    record = Reference().open(path, Setting(engine="reference")).run_recorded(batch, forced=codes)
    for tensor, value in codes.items():
        gap = np.abs(value.astype(np.int64) - record[tensor].astype(np.int64))
        assert (gap <= 1).mean() >= 0.999, tensor

    with EngineProcess(engine) as process:
        placement = process.open(path, Setting(engine=engine, batch=4)).placement()
    assert [o.name for o in placement.float_matrix_operators()] == []
    constants = {c.name: numpy_helper.to_array(c) for c in onnx.load(path).graph.initializer}
    stored = {n: v for n, v in constants.items() if n.endswith(".weight:q")}
    assert len(stored) > 18 and {v.dtype for v in stored.values()} == {np.dtype(np.int8)}
    widest = [int(np.abs(v.astype(int)).max()) for v in stored.values()]
    top = 2 ** (weights - 1) - 1
    assert widest.count(top) == len(widest) - 2 * ends and max(widest) == (127 if ends else top)
