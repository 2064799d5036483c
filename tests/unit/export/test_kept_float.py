"""A layer that a recipe leaves in float stays in float on the engine too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewbit.engines.session import EngineName, Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import capture
from fewbit.place.targets import target
from fewbit.recipe import Context, read_recipe, run_recipe
from fewbit.registry import find


def _uneven() -> nn.Sequential:
    """Its depthwise layer's channels differ a thousandfold: one scale a tensor rounds most of them to 0."""
    torch.manual_seed(0)
    depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
    after = nn.Conv2d(16, 16, 1)
    with torch.no_grad():
        depthwise.weight *= torch.logspace(-3, 0, 16).reshape(16, 1, 1, 1)
        depthwise.bias.zero_()  # type: ignore[union-attr]
        after.weight *= torch.logspace(3, 0, 16).reshape(1, 16, 1, 1)
    stem = nn.Conv2d(3, 16, 3, padding=1)
    return nn.Sequential(
        stem,
        nn.ReLU6(),
        depthwise,
        nn.ReLU6(),
        after,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_it_runs_in_float_between_integer_neighbours(engine: EngineName, tmp_path: Path) -> None:
    net = capture(_uneven(), "uneven", (3, 16, 16), 5)
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def batches() -> Iterator[Tensor]:
        yield images

    recipe = read_recipe("int8").with_float(["2"])
    context = Context(scheme=recipe.scheme, target=target(engine), batches=batches, seed=0)
    quantized, _ = run_recipe(recipe, net, context)
    path = tmp_path / "kept.onnx"
    export_onnx(quantized, path, target(engine))
    session = find("engines", engine)().open(path, Setting(engine=engine, batch=32))
    in_float = session.placement().float_matrix_operators()
    assert [set(operator.layers) & {"0", "2", "4", "8"} for operator in in_float] == [{"2"}]
    with torch.no_grad():
        wanted = quantized(images).numpy()
        unrounded = net(images).numpy()
    got = session.run(images.numpy())
    assert np.abs(got - wanted).max() < 0.05 * np.abs(unrounded).max()
