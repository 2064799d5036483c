from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn

from fewbit import ops
from fewbit.engines.onnxruntime import OnnxRuntime
from fewbit.engines.openvino import OpenVino
from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.errors import NetworkError
from fewbit.export.emit import EMITTERS
from fewbit.export.onnx_out import export_onnx
from fewbit.net import Net, add_layer
from fewbit.place import simulate as simulation
from fewbit.place.simulate import simulate

SIZE = (4, 9, 7)
IMAGES = 2 * torch.randn((3, *SIZE), generator=torch.Generator().manual_seed(0))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    layer = make().eval()
    for name, buffer in layer.named_buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1.5) if "var" in name else nn.init.normal_(buffer)
    return layer


def draw(count: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(count))


def norm(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return what makes a normalisation with drawn weights."""

    def build() -> nn.Module:
        layer = make()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        return layer

    return build


def two(
    first: nn.Module | None, second: nn.Module | None, join: nn.Module
) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Return the layers of a network of two branches; each reads the numbered values (0 is the image)."""
    return [(first or nn.Identity(), (0,)), (second or nn.Tanh(), (0,)), (join, (1, 2))]


def flat(layer: nn.Module) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Return the layers of a network that runs one on (N, C)."""
    return [(ops.GlobalAvgPool(), (0,)), (nn.Flatten(), (1,)), (layer, (2,))]


Layers = list[tuple[nn.Module, tuple[int, ...]]]
Made = Callable[[], nn.Module | Layers]
SEQUENCE = ops.Reshape((-1, 4, 63))
CASES: dict[str, list[Made]] = {
    "Conv": [
        lambda: nn.Conv2d(4, 6, 3, 2, 1, 1, 2),
        lambda: nn.Conv2d(4, 8, (1, 3), bias=False, dilation=2, padding=(1, 0)),
        lambda: ops.Conv2d(nn.Conv2d(4, 4, 3, groups=4), (0, 1, 2, 3)),
    ],
    "ConvTranspose": [
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1),
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), groups=2, bias=False, dilation=(1, 2)),
    ],
    "Linear": [lambda: nn.Linear(7, 5), lambda: nn.Linear(7, 5, bias=False), lambda: flat(nn.Linear(4, 3))],
    "MatMul": [lambda: two(None, ops.Permute((0, 1, 3, 2)), ops.MatMul())],
    "BatchNorm": [
        norm(lambda: nn.BatchNorm2d(4)),
        lambda: nn.BatchNorm2d(4, affine=False),
        lambda: flat(norm(lambda: nn.BatchNorm1d(4))()),
        lambda: [(SEQUENCE, (0,)), (nn.BatchNorm1d(4), (1,))],
    ],
    "LayerNorm": [
        norm(lambda: nn.LayerNorm(7)),
        norm(lambda: nn.LayerNorm((9, 7), bias=False)),
        lambda: nn.LayerNorm(7, elementwise_affine=False),
    ],
    "LayerNorm2d": [lambda: ops.LayerNorm2d(draw(4), draw(4), 1e-6)],
    "Relu": [nn.ReLU],
    "Clip": [lambda: ops.Clip(0, 6), lambda: ops.Clip(-math.inf, 0.5), lambda: ops.Clip(-0.5, math.inf)],
    "Min": [
        lambda: ops.Minimum(draw(4).detach().reshape(4, 1, 1)),
        lambda: flat(ops.Minimum(draw(4).detach())),
    ],
    "LeakyRelu": [lambda: nn.LeakyReLU(0.2)],
    "PRelu": [
        nn.PReLU,
        lambda: nn.PReLU(4, init=0.1),
        lambda: flat(nn.PReLU()),
        lambda: flat(nn.PReLU(4, init=0.1)),
        lambda: [(SEQUENCE, (0,)), (nn.PReLU(4), (1,))],
    ],
    "Elu": [lambda: nn.ELU(0.7)],
    "Gelu": [nn.GELU, lambda: nn.GELU("tanh")],
    "Tanh": [nn.Tanh],
    "Sigmoid": [nn.Sigmoid],
    "HardSigmoid": [nn.Hardsigmoid],
    "Silu": [nn.SiLU],
    "HardSwish": [nn.Hardswish],
    "Mish": [nn.Mish],
    "Softplus": [nn.Softplus, lambda: nn.Softplus(beta=2.0), lambda: nn.Softplus(threshold=30.0)],
    "Softmax": [lambda: nn.Softmax(1), lambda: nn.Softmax(3)],
    "LogSoftmax": [lambda: nn.LogSoftmax(1)],
    "LRN": [
        lambda: nn.LocalResponseNorm(3, 0.1, 0.6, 1.5),
        lambda: nn.LocalResponseNorm(5, 0.1),
    ],
    "MaxPool": [
        lambda: nn.MaxPool2d(3, 2, 1),
        lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
        lambda: nn.MaxPool2d((2, 3), dilation=(2, 1)),
        lambda: nn.MaxPool2d(2, 3, 1, ceil_mode=True),
    ],
    "AvgPool": [
        lambda: nn.AvgPool2d(3, 2, 1),
        lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        lambda: nn.AvgPool2d(2, ceil_mode=True),
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        lambda: nn.AvgPool2d(2, 3, 1, ceil_mode=True, count_include_pad=False),
        lambda: nn.AvgPool2d(4, 3, 1, ceil_mode=True),
        lambda: nn.AvgPool2d(4, 3, 0, ceil_mode=True),
    ],
    "GlobalAvgPool": [ops.GlobalAvgPool],
    "Mean": [lambda: ops.Mean((2, 3), False), lambda: ops.Mean((1,), True)],
    "Add": [lambda: two(None, None, ops.Add()), lambda: [(ops.Add(), (0, 0))]],
    "Sub": [lambda: two(ops.GlobalAvgPool(), None, ops.Sub())],
    "Mul": [lambda: two(None, ops.GlobalAvgPool(), ops.Mul())],
    "Div": [lambda: two(None, nn.Softplus(), ops.Div())],
    "Affine": [
        lambda: ops.Affine(torch.tensor(2.0), torch.randn(4, 1, 1)),
        lambda: ops.Affine(nn.Parameter(torch.randn(4, 1, 1)), None),
        lambda: ops.Affine(None, torch.tensor(3.0)),
        lambda: two(ops.Affine(None, None), None, ops.Add()),
    ],
    "Concat": [lambda: two(None, None, ops.Concat(1)), lambda: two(None, None, ops.Concat(3))],
    "Flatten": [nn.Flatten],
    "Reshape": [lambda: ops.Reshape((-1, 2, 2, 63))],
    "Permute": [lambda: ops.Permute((0, 3, 1, 2))],
    "Frame": [
        lambda: ops.Frame((1, 2, 3, 4), torch.arange(4.0)),
        lambda: ops.Frame((0, 1, 0, 0), torch.ones(4)),
        lambda: ops.Frame((0, 0, 2, 0), torch.ones(4)),
    ],
    "Pad": [
        lambda: ops.Pad([(0, 0), (1, 0), (2, 1), (0, 3)], -1.5),
        lambda: ops.Pad([(0, 0), (0, 0), (0, 0), (1, 1)]),
    ],
    "Slice": [lambda: ops.Slice({1: (1, 3, 1), 2: (0, None, 2)})],
    "Upsample": [lambda: ops.Upsample((2, 3))],
    "Dropout": [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout],
    "DropPath": [lambda: ops.DropPath(0.5)],
    "Identity": [nn.Identity],
}  # fmt: skip
EVERY = [(kind, index) for kind, made in CASES.items() for index in range(len(made))]


def build(kind: str, index: int) -> Net:
    """Return a network of the layers of one case."""
    torch.manual_seed(2)
    made = CASES[kind][index]()
    layers = made if isinstance(made, list) else [(made, (0,))]
    root = fx.GraphModule(nn.Module(), fx.Graph())
    values = [root.graph.placeholder("input")]
    for number, (layer, reads) in enumerate(layers):
        name = f"layer{number}" if number + 1 < len(layers) else "tested"
        values.append(add_layer(root, name, seeded(lambda layer=layer: layer), *[values[i] for i in reads]))
    root.graph.output(add_layer(root, "last", nn.Flatten(), values[-1]))
    root.recompile()
    with torch.no_grad():
        classes = root.eval()(IMAGES[:1]).shape[1]
    return Net(root, "net", SIZE, classes)


def test_every_kind_has_an_emitter_a_case_and_numerics() -> None:
    kinds = set(ops.KINDS.values())
    assert set(EMITTERS) == kinds
    assert set(CASES) == kinds
    assert kinds == set(simulation._MOVES) | set(simulation._DEFINED)


@pytest.mark.parametrize(("kind", "index"), EVERY)
def test_the_exported_layer_equals_torch(kind: str, index: int, tmp_path: Path) -> None:
    net = build(kind, index)
    export_onnx(net, tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    with torch.no_grad():
        expected = net(IMAGES).numpy()
    found = OnnxRuntime().open(tmp_path / "net.onnx", Setting(batch=3)).run(IMAGES.numpy())
    assert found.shape == expected.shape
    np.testing.assert_allclose(
        found, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(expected).max()))
    )
    assert "tested" in {node.name for node in model.graph.node}


@pytest.mark.parametrize(("kind", "index"), [case for case in EVERY if "Pool" in case[0]])
def test_openvino_agrees_about_the_last_window_of_a_pool(kind: str, index: int, tmp_path: Path) -> None:
    net = build(kind, index)
    export_onnx(net, tmp_path / "net.onnx")
    found = OpenVino().open(tmp_path / "net.onnx", Setting(engine="openvino", batch=3)).run(IMAGES.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(found, net(IMAGES).numpy(), atol=1e-5)


@pytest.mark.parametrize(("kind", "index"), EVERY)
def test_simulation_equals_the_reference_bit_for_bit(kind: str, index: int, tmp_path: Path) -> None:
    net = build(kind, index)
    export_onnx(net, tmp_path / "net.onnx")
    found = Reference().open(tmp_path / "net.onnx", Setting(engine="reference")).run(IMAGES.numpy())
    np.testing.assert_array_equal(simulate(net, IMAGES).numpy(), found)
    with torch.no_grad():
        expected = net(IMAGES).numpy()
    np.testing.assert_allclose(
        found, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(expected).max()))
    )


def test_a_kind_without_a_row_is_told(tmp_path: Path) -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    root = fx.GraphModule(nn.Module(), fx.Graph())
    x = root.graph.placeholder("input")
    root.graph.output(add_layer(root, "odd", Unknown(), x))
    root.recompile()
    with pytest.raises(NetworkError, match="layer 'odd': kind Unknown cannot be exported; report it"):
        export_onnx(Net(root, "net", SIZE, 1), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            nn.LocalResponseNorm(4),
            "layer 'tested': local response normalisation over 4 channels cannot be expo",
        ),
        (
            nn.Softplus(threshold=1.0),
            "layer 'tested': Softplus with threshold 1 cannot be exported; take torch",
        ),
    ],
)
def test_what_engines_cannot_run_is_told_by_layer(layer: nn.Module, message: str, tmp_path: Path) -> None:
    root = fx.GraphModule(nn.Module(), fx.Graph())
    x = root.graph.placeholder("input")
    root.graph.output(add_layer(root, "tested", layer, x))
    root.recompile()
    with pytest.raises(NetworkError, match=message):
        export_onnx(Net(root, "net", SIZE, 1), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_constant_of_one_name_is_made_once() -> None:
    from fewbit.export.emit import Emitter

    emitter = Emitter(build("Relu", 0))
    first = emitter.constant("c", 1.0)
    assert emitter.constant("c", 1.0) is first and list(emitter.initializers) == ["c"]
