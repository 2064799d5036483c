"""Networks that people deploy: exported in 8 bits, run by both engines, matrices in integers (Shows g)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from fewbit.engines.process import EngineProcess
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.targets import target
from fewbit.recipe import Context, read_recipe, run_recipe
from fewbit.spec import Scheme
from zoo import NETWORKS, SIZE, zoo


@cache
def net_of(name: str) -> Net:
    return capture(zoo(name), name, SIZE)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_matrix_runs_in_integers(name: str, engine: str, tmp_path: Path) -> None:
    net = net_of(name)
    images = torch.rand((2, *SIZE), generator=torch.Generator().manual_seed(5))
    context = Context(Scheme(), target(engine), lambda: iter([images]))
    made, _ = run_recipe(read_recipe("int8"), net, context)
    export_onnx(made, tmp_path / "net.onnx", target(engine))
    with EngineProcess(engine, timeout_s=300) as process:
        session = process.open(tmp_path / "net.onnx", Setting(engine=engine, batch=2))
        placement, logits = session.placement(), session.run(images.numpy())
    kinds = {layer.name: layer.kind for layer in made.layers()}
    matrices = {layer for layer, kind in kinds.items() if kind in ("Conv", "Linear")}
    # DenseNet has BatchNorms that no convolution precedes; ONNX Runtime computes some as float convolutions.
    left = [o for o in placement.float_matrix_operators() if matrices & set(o.layers) or not o.layers]
    assert [(o.name, o.why) for o in left] == []
    in_integers = {n for o in placement.operators if o.matrix and o.precision == "int8" for n in o.layers}
    assert matrices <= in_integers
    with torch.no_grad():
        simulated = made(images).numpy()
    assert np.isfinite(logits).all()
    assert np.corrcoef(logits.ravel(), simulated.ravel())[0, 1] > 0.9
