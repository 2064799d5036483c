"""Dense blocks: concatenations that BatchNorms read, and an average pool behind a 1 x 1 convolution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.engines.reference import Reference
from fewbit.engines.session import Session, Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.quantizer import Quantizer
from fewbit.place.simulate import simulate
from fewbit.place.targets import target
from fewbit.recipe import read_recipe, run_recipe
from fewbit.registry import find
from networks import make_context, make_images


class Dense(nn.Module):
    """A block of DenseNet with a transition behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 8 * i) for i in range(4))
        self.grow = nn.ModuleList(nn.Conv2d(16 + 8 * i, 8, 3, padding=1) for i in range(3))
        self.point, self.last = nn.Conv2d(40, 16, 1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.max_pool2d(F.relu(self.stem(x)), 2)]
        for norm, conv in zip(self.norms, self.grow):  # noqa: B905
            parts.append(conv(F.relu(norm(torch.cat(parts, 1)))))
        x = F.avg_pool2d(self.point(F.relu(self.norms[3](torch.cat(parts, 1)))), 2)
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


def dense() -> Net:
    torch.manual_seed(0)
    model = Dense().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                value.data.copy_(torch.rand(value.shape) + 0.1)
    return capture(model, "dense", (3, 16, 16))


def made_for(engine: str) -> Net:
    return run_recipe(read_recipe("int8"), dense(), make_context(engine))[0]


def opened(net: Net, engine: str, path: Path) -> Session:
    export_onnx(net, path, target(engine))
    session: Session = find("engines", engine)().open(path, Setting.from_data({"engine": engine, "batch": 8}))
    return session


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_simulation_reference_and_engine_agree(engine: str, tmp_path: Path) -> None:
    net, images = made_for(engine), make_images(8, seed=5)
    session = opened(net, engine, tmp_path / "net.onnx")
    setting = Setting(engine="reference", batch=8)
    expected = Reference().open(tmp_path / "net.onnx", setting).run(images.numpy())
    np.testing.assert_array_equal(simulate(net, images).numpy(), expected)
    assert np.abs(session.run(images.numpy()) - expected).max() <= 0.02 * np.abs(expected).max()


def test_openvino_reads_each_part_in_codes_of_its_own(tmp_path: Path) -> None:
    net = made_for("openvino")
    quantizers = {
        layer.inputs[0]: layer.name for layer in net.layers() if isinstance(layer.module, Quantizer)
    }
    parts = ["max_pool2d", "grow.0", "grow.1", "grow.2"]
    assert len({quantizers[part] for part in parts}) == len(parts)
    assert not [name for name in quantizers if name.startswith("cat")]
    session = opened(net, "openvino", tmp_path / "net.onnx")
    operators = session.placement().operators
    convolutions = [o for o in operators if o.matrix]
    assert len(convolutions) == 6 and {o.precision for o in convolutions} == {"int8"}
    pools = [o for o in operators if o.kind in ("Pooling", "AvgPool", "MaxPool")]
    assert len(pools) == 2 and {o.precision for o in pools} == {"int8"}
    joins = [o for o in operators if o.kind == "Concatenation"]
    assert joins and {o.precision for o in joins} == {"int8"}


def test_onnxruntime_gets_no_further_quantizer_and_averages_behind_the_convolution() -> None:
    net = made_for("onnxruntime")
    assert net.layer("avg_pool2d").inputs[0].startswith("quantizers.point")


def test_openvino_averages_before_the_convolution() -> None:
    net = made_for("openvino")
    assert net.layer("point").inputs[0].startswith("quantizers.avg_pool2d")
