"""Deployed equals simulated, on real networks and images (Shows e and f of the main job)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fewbit.data.image_set import ImageSet
from fewbit.engines.process import EngineProcess
from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.measure.host import describe_host, rounding_of
from fewbit.place.simulate import simulate_recorded
from opened_files import open_all, run_all
from real_names import ENGINES, NETWORKS

pytestmark = pytest.mark.needs_shared
ONE_STEP, SHARE = 1, 0.999
SAME_TOP1 = 0.995


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_and_matrix_product_runs_in_integers(
    name: str, engine: str, quantized: Callable[..., object]
) -> None:
    made = quantized(name, engine)
    with EngineProcess(engine) as process:
        placement = process.open(made.path, Setting(engine=engine, batch=8)).placement()
    matrices = [layer for layer in made.net.layers() if layer.kind in ("Conv", "Linear")]
    assert [o.name for o in placement.float_matrix_operators()] == []
    assert sum(o.matrix for o in placement.operators) == len(matrices)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_simulation_equals_the_reference_exactly(
    name: str, engine: str, quantized: Callable[..., object]
) -> None:
    made = quantized(name, engine)
    images = next(iter(made.images.batches(2)))
    logits, codes = simulate_recorded(made.net, torch.from_numpy(images))
    record = Reference().open(made.path, Setting(engine="reference")).run_recorded(images)
    assert len(codes) > 20
    for tensor, value in codes.items():
        np.testing.assert_array_equal(record[f"{tensor}:q"].astype(np.int64), value, err_msg=tensor)
    np.testing.assert_array_equal(record["logits"], logits.numpy())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_each_tensor_of_the_engine_is_within_one_step_of_the_reference(
    name: str, engine: str, quantized: Callable[..., object], tmp_path: Path
) -> None:
    made = quantized(name, engine)
    images = next(iter(made.images.batches(8)))
    everything, names = open_all(made.path, tmp_path)
    logits, *found = run_all(engine, everything, names, images)
    codes = dict(zip(names, found, strict=True))
    record = Reference().open(made.path, Setting(engine="reference")).run_recorded(images, forced=codes)
    for tensor, value in codes.items():
        gap = np.abs(value.astype(np.int64) - record[tensor].astype(np.int64))
        assert (gap <= ONE_STEP).mean() >= SHARE, tensor
    # The extra outputs must not make the engine run another graph. Equal it cannot be: one code that flips
    # near a tie changes many behind it, up to the size of the quantization noise.
    with EngineProcess(engine) as process:
        plain = process.open(made.path, Setting(engine=engine, batch=8)).run(images)
    assert np.corrcoef(plain.ravel(), logits.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "squeezenet_v11", "googlenet"])
def test_engine_and_reference_choose_the_same_class(
    name: str, engine: str, quantized: Callable[..., object], images_of: Callable[[str, int], ImageSet]
) -> None:
    made, images = quantized(name, engine), images_of(name, 400 if name == "resnet20" else 100)
    choices = []
    for runner in (engine, "reference"):
        with EngineProcess(runner) as process:
            # Rounding as the engine does: in a deep network one code that differs near a tie, multiplied by
            # the layers behind it, becomes as much as the quantization noise.
            rounding = rounding_of(engine, describe_host())
            session = process.open(made.path, Setting(engine=runner, batch=16, rounding=rounding))
            if runner == "openvino":  # the formulas are those of the kernels that run
                kernels = [o.why for o in session.placement().operators if o.matrix]
                assert any("_amx" in kernel for kernel in kernels) == (rounding == "openvino_amx")
            choices.append(session.logits(images.batches(16)).argmax(1))
    assert (choices[0] == choices[1]).mean() >= SAME_TOP1
