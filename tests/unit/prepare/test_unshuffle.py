from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fewbit.prepare.canonical as canonical
from fewbit.engines.openvino import OpenVino
from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import capture
from fewbit.net import Net, Normal
from fewbit.place.simulate import simulate
from fewbit.place.targets import target
from fewbit.prepare.unshuffle import unshuffle
from fewbit.recipe import read_recipe, run_recipe
from networks import make_context

_EXACT_BITS = 2


class Halves(nn.Module):
    """A unit of ShuffleNetV2: half of the channels pass, half go through convolutions; then a shuffle."""

    def __init__(self, channels: int, norms: bool) -> None:
        super().__init__()
        half = channels // 2
        self.a, self.b = nn.Conv2d(half, half, 1), nn.Conv2d(half, half, 3, padding=1, groups=half)
        self.c = nn.Conv2d(half, half, 1)
        self.n = nn.ModuleList(nn.BatchNorm2d(half) if norms else nn.Identity() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        passed, taken = x.chunk(2, 1)
        y = self.n[1](self.b(F.relu(self.n[0](self.a(taken)))))
        return F.channel_shuffle(torch.cat((passed, F.relu(self.n[2](self.c(y)))), 1), 2)


class Stage(nn.Module):
    """Two branches from the image, three units, and two readers: one mixes channels, one does not."""

    def __init__(self, norms: bool = True) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.units = nn.Sequential(*[Halves(16, norms) for _ in range(3)])
        self.deep, self.norm = nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.BatchNorm2d(16)
        self.deep2, self.wide = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, 2, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.channel_shuffle(torch.cat((F.relu(self.left(x)), F.relu(self.right(x))), 1), 2)
        x = self.units(x)
        x = torch.cat((self.deep2(self.norm(self.deep(x))), self.wide(x)), 1)
        return self.fc(x.mean((2, 3)))


def randomize(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics of its own in each channel."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for key in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(module, key).data
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model.eval()


def images(count: int = 4) -> Tensor:
    return torch.randn((count, 3, 16, 16), generator=torch.Generator().manual_seed(1))


def stage(norms: bool = True) -> Net:
    torch.manual_seed(0)
    return capture(randomize(Stage(norms)), "stage", (3, 16, 16))


def kinds(net: Net) -> list[str]:
    return [layer.kind for layer in net.layers()]


def test_a_stage_loses_its_shuffles_and_computes_the_same() -> None:
    net = stage()
    before = net(images())
    assert unshuffle(net) == 4
    with torch.no_grad():
        torch.testing.assert_close(net(images()), before, rtol=1e-5, atol=1e-6)
    found = kinds(net)
    assert "Permute" not in found and "Reshape" not in found
    # Behind the branches: what each of the 3 units takes, what the stage gives, and the classifier's input.
    assert found.count("Concat") == 5
    assert unshuffle(net) == 0


class Twice(nn.Module):
    """A shuffle of one tensor beside itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.fc(self.b(F.channel_shuffle(torch.cat((y, y), 1), 2)).mean((2, 3)))


def test_a_tensor_beside_itself_keeps_its_shuffle() -> None:
    net = capture(Twice().eval(), "twice", (3, 8, 8))
    before = net(net.example())
    assert unshuffle(net) == 0
    assert torch.equal(net(net.example()), before)


def test_every_channel_is_copied_once() -> None:
    net = stage()
    unshuffle(net)
    # 8 channels: 4 for the next unit, 2 for the one behind, 1 for the third, 1 that passes through all.
    slices = [layer.module.ranges[1] for layer in net.layers() if layer.inputs == ("relu",)]
    assert slices == [(0, 4, 1), (4, 6, 1), (6, 7, 1), (7, 8, 1)]


def test_sums_of_whole_numbers_are_equal_bit_for_bit() -> None:
    net = stage(norms=False)
    generator = torch.Generator().manual_seed(2)
    for layer in net.layers():
        for parameter in layer.module.parameters():
            parameter.data = torch.randint(-2, 3, parameter.shape, generator=generator).float()
    net.graph.get_submodule("fc").weight.data *= 2.0**-_EXACT_BITS
    inputs = torch.randint(-3, 4, (4, 3, 16, 16), generator=generator).float()
    other = net.clone()
    assert unshuffle(other) == 4
    with torch.no_grad():
        for layer in net.layers():
            if layer.kind == "BatchNorm":
                layer.module.reset_running_stats()
        assert torch.equal(stage_logits(other, inputs), stage_logits(net, inputs))


def stage_logits(net: Net, inputs: Tensor) -> Tensor:
    """Run up to the convolutions that read the stage, whose sums are whole numbers."""
    ends: list[Tensor] = []
    handle = net.graph.get_submodule("wide").register_forward_hook(lambda m, i, o: ends.append(o))
    net(inputs)
    handle.remove()
    return ends[0]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_codes_of_int8_are_the_same(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = []
    for on in (True, False):
        if not on:
            monkeypatch.setattr(canonical, "unshuffle", lambda net: 0)
        made, _ = run_recipe(read_recipe("int8"), stage(), make_context(engine, images()))
        assert ("Permute" in kinds(made)) is not on
        logits.append(simulate(made, images()))
    # Ranges are of float sums in another order, so a scale may differ in its last bit.
    step = (logits[1].abs().max() / 127).item()
    assert (logits[0] - logits[1]).abs().max().item() <= step


def test_openvino_runs_it_in_integers_without_a_transpose(tmp_path: Path) -> None:
    made, _ = run_recipe(read_recipe("int8"), stage(), make_context("openvino", images()))
    path = tmp_path / "stage.onnx"
    export_onnx(made, path, target("openvino"))
    session = OpenVino().open(path, Setting(engine="openvino", batch=4))
    operators = session.placement().operators
    assert not [o for o in operators if o.kind in ("Transpose", "ShuffleChannels")]
    joined = [o for o in operators if o.kind in ("Concatenation", "Split", "StridedSlice") and o.layers]
    assert joined and {o.precision for o in joined[:-1]} == {"int8"}
    expected = Reference().open(path, Setting(engine="reference", batch=4)).run(images().numpy())
    gap = np.abs(session.run(images().numpy()) - expected).max()
    assert gap <= 0.02 * np.abs(expected).max()


def test_what_a_folded_norm_told_follows_its_channels() -> None:
    net = stage(norms=False)
    rows = net.graph.get_submodule("units.0.c").weight.detach().clone()
    told = torch.arange(8, dtype=torch.float64)
    net.statistics["units.0.c"] = Normal(told, told + 1)
    unshuffle(net)
    order = net.statistics["units.0.c"].mean.long()
    assert order.tolist() != list(range(8))
    assert torch.equal(net.statistics["units.0.c"].std, order.double() + 1)
    moved = net.graph.get_submodule("units.0.c").weight.detach()
    assert torch.equal(moved.sum(1).sort(0).values, rows[order].sum(1).sort(0).values)


Body = Callable[[Any, Tensor], Tensor]


class Small(nn.Module):
    """Convolutions and a body that uses them."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.c, self.d = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 6, 1)
        self.e = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x).mean((2, 3))


def joined(m: Any, x: Tensor) -> Tensor:
    return torch.cat((m.a(x), m.b(x)), 1)


def shuffled(m: Any, x: Tensor) -> Tensor:
    return F.channel_shuffle(joined(m, x), 2)


def of_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, 8, 2, 4, 8).permute(0, 2, 1, 3, 4).reshape(-1, 8, 8, 8)


BODIES: dict[str, tuple[Body, int]] = {
    "read by a convolution": (lambda m, x: m.d(shuffled(m, x)), 1),
    "read by two convolutions": (lambda m, x: m.d(y := shuffled(m, x)) + m.e(y), 1),
    "two in a row": (lambda m, x: m.d(F.channel_shuffle(shuffled(m, x), 4)), 2),
    "through a pool": (lambda m, x: m.d(F.relu(F.max_pool2d(shuffled(m, x), 2))), 1),
    "given out": (lambda m, x: shuffled(m, x), 0),
    "read by a convolution in groups": (lambda m, x: m.c(shuffled(m, x)), 0),
    "added to": (lambda m, x: m.d(shuffled(m, x) + joined(m, x)), 0),
    "made of the image": (lambda m, x: m.d(F.channel_shuffle(torch.cat((x, x, m.a(x)[:, :2]), 1), 2)), 0),
    "read before and behind": (lambda m, x: m.d(F.channel_shuffle(y := joined(m, x), 2)) + m.e(y), 0),
    "made by a layer that runs twice": (
        lambda m, x: m.d(F.channel_shuffle(torch.cat((m.a(x), m.a(2 * x)), 1), 2)),
        1,
    ),
    "read by a layer that runs twice": (lambda m, x: m.d(shuffled(m, x)) + m.d(joined(m, 2 * x)), 1),
    "of rows": (lambda m, x: m.d(of_rows(joined(m, x))), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_only_what_convolutions_can_follow(name: str) -> None:
    body, removed = BODIES[name]
    torch.manual_seed(0)
    net = capture(Small(body).eval(), "small", (3, 8, 8))
    inputs = torch.randn((3, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    before = net(inputs)
    assert unshuffle(net) == removed
    with torch.no_grad():
        torch.testing.assert_close(net(inputs), before, rtol=1e-5, atol=1e-6)
    assert (kinds(net).count("Permute") == 0) is (removed > 0)
