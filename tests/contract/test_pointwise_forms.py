"""1 x 1 convolutions that stride or pad, which an engine's own rewriting has been seen to forget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import capture
from fewbit.place.simulate import simulate
from fewbit.place.targets import TARGETS, target
from fewbit.recipe import read_recipe, run_recipe
from fewbit.registry import find
from networks import make_context, make_images


class Pointwise(nn.Module):
    """A 1 x 1 convolution between forms that engines merge with it."""

    def __init__(self, stride: int, padding: int, before: str, after: str) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.point = nn.Conv2d(4, 6, 1, stride, padding)
        side = (16 + 2 * padding - 1) // stride + 1
        self.fc = nn.Linear(6 if after == "mean" else 6 * side * side, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.before == "pool":
            x = F.max_pool2d(x, 3, 1, 1)
        elif self.before == "rows":
            x = x.reshape(-1, 16, 16, 4).permute(0, 3, 1, 2)
        x = self.point(x)
        if self.after == "mean":
            return self.fc(x.mean((2, 3)))
        return self.fc((x.permute(0, 2, 3, 1) if self.after == "rows" else x).flatten(1))


@pytest.mark.parametrize("engine", TARGETS)
@pytest.mark.parametrize("recipe", ["float32", "int8", "int8-dynamic", "int8-weights-only"])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0), (2, 1), (3, 0)])
def test_stride_and_padding_are_kept(
    stride: int, padding: int, recipe: str, engine: str, tmp_path: Path
) -> None:
    images = make_images(4, seed=5)
    for before in ("conv", "pool", "rows"):
        for after in ("mean", "flat", "rows"):
            torch.manual_seed(stride)
            net = capture(Pointwise(stride, padding, before, after).eval(), "pointwise", (3, 16, 16))
            made, _ = run_recipe(read_recipe(recipe), net, make_context(engine))
            path = tmp_path / "net.onnx"
            export_onnx(made, path, target(engine))
            expected = Reference().open(path, Setting(engine="reference", batch=4)).run(images.numpy())
            np.testing.assert_array_equal(simulate(made, images).numpy(), expected)
            session = find("engines", engine)().open(path, Setting.from_data({"engine": engine, "batch": 4}))
            gap = np.abs(session.run(images.numpy()) - expected).max() / np.abs(expected).max()
            assert gap <= 0.02, (before, after)
