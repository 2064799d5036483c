from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit import ops
from fewbit.engines.process import EngineProcess
from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import capture
from fewbit.net import Net, Normal
from fewbit.place.simulate import simulate
from fewbit.place.targets import target
from fewbit.prepare.equalize import Equalize, factors_of
from fewbit.prepare.fold_bn import FoldBN
from fewbit.prepare.joints import find_joints, input_ranges, matrix_of, output_ranges
from fewbit.recipe import read_recipe, run_recipe
from fewbit.spec import Scheme
from fewbit.step import StepReport
from networks import NETWORKS, SIZE, make_context, make_images, make_net


def outputs(net: Net, images: Tensor) -> Tensor:
    with torch.no_grad():
        return net(images)


def uneven(model: nn.Module, spread: float = 2.0, seed: int = 0) -> nn.Module:
    """Return the model with channels whose weights differ by e^(+-2 spread)."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            with torch.no_grad():
                factors = torch.exp(spread * torch.randn(len(module.weight), generator=generator))
                module.weight.mul_(factors.reshape(-1, *[1] * (module.weight.dim() - 1)))
    return model.eval()


def equalized(model: nn.Module, images: Tensor | None = None, **options: Any) -> tuple[Net, Net, StepReport]:
    """Return the folded network, its equalized copy, and the step's report."""
    chosen = make_images(8) if images is None else images
    net = capture(model.eval(), "net", tuple(chosen.shape[1:]))
    FoldBN()(net, make_context())
    copy = net.clone()
    return net, copy, Equalize(**options)(copy, make_context(images=chosen))


def gap(net: Net, copy: Net, images: Tensor) -> float:
    expected = outputs(net, images)
    return float((outputs(copy, images) - expected).abs().max() / expected.abs().max())


def ranges(net: Net) -> list[tuple[Tensor, Tensor]]:
    """Return (r1, r2) of each joint."""
    found = []
    for joint in find_joints(net):
        readers = [matrix_of(reader) for reader in joint.readers]
        r2 = torch.stack([input_ranges(m, m.weight.detach(), joint.channels) for m in readers]).amax(0)
        found.append((output_ranges(matrix_of(joint.producer).weight.detach()), r2))
    return found


class Pair(nn.Module):
    """The two matrix products of the specification's example, on an image of two values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0, -2.0], [0.1, 0.05], [4.0, 3.0]]))
            self.first.bias.copy_(torch.tensor([0.5, 0.02, -1.0]))
            self.second.weight.copy_(torch.tensor([[0.5, 8.0, 0.1], [-0.25, -4.0, 0.2]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x.flatten(1))))


def objective(net: Net) -> float:
    r1, r2 = ranges(net)[0]
    return float((r1 / r1.max() * r2 / r2.max()).sum())


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return a weight rounded with one symmetric scale."""
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().max() / top
    return (weight / scale).round().clamp(-top, top) * scale


def squared_error(net: Net, bits: int) -> float:
    """Return the mean squared error of the outputs with rounded weights over the example's 10,000 inputs."""
    draws = np.random.RandomState(0).randn(2, 10000)
    images = torch.from_numpy(draws.T.reshape(-1, 2, 1, 1)).double()
    graph = net.clone().graph.double()
    expected = graph(images)
    for module in graph.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rounded(module.weight.data, bits)
    with torch.no_grad():
        return float((graph(images) - expected).square().mean())


def test_worked_example_of_a_pair() -> None:
    net, copy, report = equalized(Pair(), torch.randn(4, 2, 1, 1))
    assert report.changed == 1 and report.notes == ()
    r1, r2 = ranges(net)[0]
    assert r1.tolist() == pytest.approx([2, 0.1, 4]) and r2.tolist() == pytest.approx([0.5, 8, 0.2])
    found = factors_of(r1, r2, torch.zeros(3, dtype=torch.bool))
    assert found.tolist() == pytest.approx([2, 0.111803, 4.472136], abs=1e-6)
    first, second = matrix_of(copy.layer("first")), matrix_of(copy.layer("second"))
    assert first.weight.flatten().tolist() == pytest.approx(
        [0.5, -1, 0.894427, 0.447214, 0.894427, 0.670820], abs=1e-6
    )
    assert first.bias.tolist() == pytest.approx([0.25, 0.178885, -0.223607], abs=1e-6)
    assert second.weight.flatten().tolist() == pytest.approx(
        [1, 0.894427, 0.447214, -0.5, -0.447214, 0.894427], abs=1e-6
    )
    for found in ranges(copy)[0]:
        assert found.tolist() == pytest.approx([1, 0.894427, 0.894427], abs=1e-6)
    assert objective(net) == pytest.approx(0.08125) and objective(copy) == pytest.approx(2.6, abs=1e-5)
    x = torch.tensor([1.0, -0.5]).reshape(1, 2, 1, 1)
    for one in (net, copy):
        assert outputs(one, x)[0].tolist() == pytest.approx([2.16, -0.705], abs=1e-5)


@pytest.mark.parametrize(
    ("bits", "before", "after"), [(8, 0.00944492, 0.0000450165), (4, 1.18893, 0.00604796)]
)
def test_worked_example_of_what_rounding_costs(bits: int, before: float, after: float) -> None:
    net, copy, _ = equalized(Pair(), torch.randn(4, 2, 1, 1))
    assert squared_error(net, bits) == pytest.approx(before, rel=1e-5)
    # The specification rounds the weights after the factors, in float64; ours are float32.
    assert squared_error(copy, bits) == pytest.approx(after, rel=1e-3)


def test_worked_example_of_a_depthwise_triple() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1),
        nn.ReLU(),
        nn.Conv2d(2, 2, 1, groups=2),
        nn.ReLU(),
        nn.Conv2d(2, 1, 1),
        nn.Flatten(),
    )
    with torch.no_grad():
        for index, values in ((0, [4, 0.5]), (2, [0.1, 2]), (4, [1, 0.25])):
            model[index].weight.copy_(torch.tensor(values).reshape(model[index].weight.shape))
    _, copy, _ = equalized(model, torch.randn(4, 1, 3, 3), tolerance=1e-7, sweeps=100)
    expected = [0.736806, 0.629961]
    for name in ("0", "2", "4"):
        weight = matrix_of(copy.layer(name)).weight.detach().flatten().abs()
        assert weight.tolist() == pytest.approx(expected, abs=2e-6)
    assert 4 / expected[0] == pytest.approx(5.428835, abs=1e-5)
    assert 0.5 / expected[1] == pytest.approx(0.793701, abs=1e-5)
    assert expected[0] / 1 == pytest.approx(0.736806) and expected[1] / 0.25 == pytest.approx(
        2.519842, abs=1e-5
    )


@pytest.mark.parametrize("caps", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_the_same(name: str, caps: bool) -> None:
    net, copy, report = equalized(uneven(NETWORKS[name]()), caps=caps)
    assert gap(net, copy, make_images(8)) < 1e-4
    # Behind equal BatchNorms no channel below a clip has room, if none may be cut.
    assert report.changed == {"residual": 1, "depthwise": 3 if caps else 2, "branches": 0, "gated": 1}[name]


def test_it_looks_at_images_only_where_asked() -> None:
    def batches() -> Iterator[Tensor]:
        raise AssertionError("an image was asked for")

    net = capture(uneven(NETWORKS["depthwise"]()).eval(), "net", (3, 16, 16))
    FoldBN()(net, make_context())
    context = replace(make_context(), batches=batches)
    blind = Equalize(images=False)
    assert Equalize().reads_images(Scheme()) and not blind.reads_images(Scheme())
    without, copy = net.clone(), net.clone()
    assert blind(without, context) == Equalize()(copy, replace(context, batches=lambda: iter(())))
    with pytest.raises(AssertionError, match="asked for"):
        Equalize()(net, context)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Identity()])
@pytest.mark.parametrize("bias", [5.0, -5.0])
def test_a_small_channel_with_a_large_bias_widens_no_range(activation: nn.Module, bias: float) -> None:
    torch.manual_seed(0)
    first, norm, second = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.weight[2], norm.bias[2] = 1e-4, bias
        second.weight[:, 5] *= 20
    model = nn.Sequential(first, norm, activation, second, nn.Flatten())

    def reach(net: Net) -> float:
        normal = net.statistics["0"]
        rectified = isinstance(activation, nn.ReLU)
        ends = (normal.mean if rectified else normal.mean.abs()) + 6 * normal.std
        return float(ends.max())

    net, kept, report = equalized(model)
    _, free, _ = equalized(model, keep_ranges=False)
    assert gap(net, kept, make_images(8)) < 1e-4 and report.changed == 1
    assert reach(kept) <= reach(net) * (1 + 1e-9)
    if bias > 0 or isinstance(activation, nn.Identity):
        assert reach(free) > 10 * reach(net)
    spread = [n.layer("0").module.weight.detach().abs().flatten(1).amax(1) for n in (net, kept)]  # type: ignore[operator,union-attr]
    assert float(spread[1][5]) > 1.5 * float(spread[0][5])  # what reads it has large weights
    factors = net.statistics["0"].std / kept.statistics["0"].std
    assert float(factors.median()) == pytest.approx(1, rel=0.3)


Body = Callable[[Any, Tensor], Tensor]


class Small(nn.Module):
    """Convolutions with a body between them and the logits."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 1, bias=False)
        self.fc, self.slope = nn.Linear(8, 8), nn.PReLU(8, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x).flatten(1)


BODIES: dict[str, tuple[Body, int]] = {
    "chain": (lambda m, x: m.d(F.relu(m.c(F.relu(m.b(F.relu(m.a(x))))))), 3),
    "no activation": (lambda m, x: m.b(m.a(x)), 1),
    "leaky": (lambda m, x: m.b(F.leaky_relu(m.a(x), 0.1)), 1),
    "slopes": (lambda m, x: m.b(m.slope(m.a(x))), 1),
    "pools": (lambda m, x: m.b(F.avg_pool2d(F.max_pool2d(F.relu(m.a(x)), 2), 2, 1, 1)), 1),
    "pads": (lambda m, x: m.b(F.pad(F.relu(m.a(x)), (0, 1, 2, 0))), 1),
    "crop": (lambda m, x: m.b(F.relu(m.a(x))[:, :, 1:, ::2]), 1),
    "upsampled": (lambda m, x: m.b(F.interpolate(F.relu(m.a(x)), scale_factor=2)), 1),
    "pooled classifier": (lambda m, x: m.fc(F.relu(m.a(x)).mean((2, 3))), 1),
    "two classifiers": (lambda m, x: m.fc(F.relu(m.fc(F.relu(m.a(x)).mean((2, 3))))), 2),
    "two readers": (lambda m, x: m.b(y := F.relu(m.a(x))) * m.d(y), 1),
    "a reader that is a sum": (lambda m, x: m.b(y := F.relu(m.a(x))) + y, 0),
    "a block inside": (lambda m, x: (y := F.relu(m.a(x))) + m.d(F.relu(m.b(y))), 1),
    "logits": (lambda m, x: F.relu(m.a(x)), 0),
    "concatenation": (lambda m, x: torch.cat((m.a(x), x), 1), 0),
    "sigmoid": (lambda m, x: m.b(torch.sigmoid(m.a(x))), 0),
    "silu": (lambda m, x: m.b(F.silu(m.a(x))), 0),
    "channels moved": (lambda m, x: m.b(F.channel_shuffle(m.a(x), 2)), 0),
    "some channels": (lambda m, x: F.relu(m.a(x))[:, 1:], 0),
    "padded with ones": (lambda m, x: m.b(F.pad(F.relu(m.a(x)), (1, 1, 1, 1), value=1.0)), 0),
    "clip from below 0": (lambda m, x: m.b(F.hardtanh(m.a(x))), 0),
    "rows": (lambda m, x: m.fc(m.a(x).permute(0, 2, 3, 1)), 0),
    "log": (lambda m, x: m.b(F.softplus(m.a(x))), 0),
}


@pytest.mark.parametrize("case", BODIES)
def test_what_may_lie_between(case: str) -> None:
    body, joints = BODIES[case]
    torch.manual_seed(0)
    net, copy, report = equalized(uneven(Small(body)))
    assert report.changed == len(find_joints(net)) == joints
    assert gap(net, copy, make_images(3, seed=5)) < 1e-4
    for (r1, r2), (before1, before2) in zip(ranges(copy), ranges(net), strict=True):
        assert torch.allclose(r1, r2, rtol=2e-2)
        assert float(before1.max() / before1.min()) > 5 and not torch.allclose(before1, before2, rtol=0.5)


@settings(max_examples=25, deadline=None)
@given(spread=st.floats(0.0, 3.0), groups=st.sampled_from([1, 2, 4]), seed=st.integers(0, 2**16))
def test_any_weights_any_groups(spread: float, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=groups), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 36, 3),
    )  # fmt: skip
    images = torch.randn(2, 3, 8, 8)
    net, copy, report = equalized(uneven(model, spread, seed), images)
    assert report.changed == 2
    assert gap(net, copy, images) < 1e-4


def test_dead_channels_stay_and_factors_are_bounded() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1), nn.Flatten())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.0, 1.0, 1e9, 1.0]).reshape(4, 1, 1, 1))
        model[2].weight.copy_(torch.tensor([1.0, 0.0, 1.0, 1e9]).reshape(1, 4, 1, 1))
    _, copy, _ = equalized(model, torch.randn(2, 1, 2, 2))
    first = matrix_of(copy.layer("0")).weight.detach().flatten()
    assert first.tolist() == pytest.approx([0, 1, 1e6, 1e3])


class Clipped(nn.Module):
    """Channels that reach the clip of 6 and channels far below it; the second layer's bias is a bound."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 3, 1)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([8.0, 0.1, 0.02, 4.0]).reshape(4, 1, 1, 1))
            self.first.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu6(self.first(x))).flatten(1)


def ramp() -> Tensor:
    """Images with values from -1 to 2."""
    return torch.linspace(-1, 2, 16).reshape(1, 1, 4, 4)


@torch.no_grad()
def test_a_channel_that_reaches_the_clip_keeps_its_scale() -> None:
    torch.manual_seed(1)
    net, copy, _ = equalized(Clipped(), ramp())
    before, after = (matrix_of(n.layer("first")).weight.flatten() for n in (net, copy))
    assert after[0] == before[0] and after[3] == before[3]
    assert not torch.allclose(after[1:3], before[1:3])
    assert float((after * 2 * 2)[1:3].max()) <= 6 * (1 + 1e-6)  # none comes to reach it
    assert gap(net, copy, ramp()) < 1e-6
    assert not any(layer.kind == "Min" for layer in copy.layers())


@torch.no_grad()
def test_a_cap_a_channel_lets_it_shrink() -> None:
    torch.manual_seed(1)
    model = Clipped()
    model.second.weight.copy_(torch.tensor([0.1, 5.0, 5.0, 3.0]).reshape(1, 4, 1, 1).expand(3, 4, 1, 1))
    net, copy, _ = equalized(model, ramp(), caps=True)
    before, after = (matrix_of(n.layer("first")).weight.flatten() for n in (net, copy))
    factor = (before / after)[0]
    assert float(factor) == pytest.approx((8 / 0.1) ** 0.5)
    (cap,) = (layer for layer in copy.layers() if layer.kind == "Min")
    assert cap.inputs == ("relu6",)
    limits = cap.module.limits
    assert limits.shape == (4, 1, 1)  # type: ignore[union-attr]
    assert limits.flatten()[0] == pytest.approx(float(6 / factor)) and float(limits.max()) == 6.0  # type: ignore[index, operator, arg-type]
    assert gap(net, copy, ramp()) < 1e-6


def test_without_images_the_folded_statistics_bound_the_reach() -> None:
    net = make_net("depthwise")
    FoldBN()(net, make_context())
    copy = net.clone()
    blank = replace(make_context(), batches=lambda: iter(()))
    report = Equalize(headroom=0.0)(copy, blank)
    assert report.changed == 3 and report.notes == ()
    assert gap(net, copy, make_images(8)) < 1e-4
    blind = net.clone()
    blind.statistics.clear()
    report = Equalize()(blind, blank)
    assert report.changed == 0
    assert report.notes == ("clipped outputs left as they are, their reach is not known: stem, dw, pw",)
    assert torch.equal(outputs(blind, make_images(2)), outputs(net, make_images(2)))


def test_statistics_are_scaled_too() -> None:
    net, copy, _ = equalized(uneven(NETWORKS["residual"]()))
    factors = matrix_of(net.layer("conv1")).weight.detach()[:, 0, 0, 0].double()
    factors = factors / matrix_of(copy.layer("conv1")).weight.detach()[:, 0, 0, 0]
    before, after = net.statistics["conv1"], copy.statistics["conv1"]
    assert isinstance(after, Normal)
    assert torch.allclose(after.mean * factors, before.mean, rtol=1e-5)
    assert torch.allclose(after.std * factors, before.std, rtol=1e-5)
    assert copy.statistics["conv2"] is net.statistics["conv2"]  # its output goes into a sum


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_capped_networks_run_in_integers_and_as_simulated(engine: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = uneven(NETWORKS["depthwise"](), 1.5)
    images = 4 * make_images(6)
    recipe = read_recipe("int8-per-tensor-equalized")
    made, _ = run_recipe(recipe, capture(model, "net", SIZE), make_context(engine, images))
    assert sum(isinstance(layer.module, ops.Minimum) for layer in made.layers()) >= 2
    path = tmp_path / "net.onnx"
    export_onnx(made, path, target(engine))
    expected = simulate(made, images).numpy()
    found = Reference().open(path, Setting(engine="reference")).run(images.numpy())
    np.testing.assert_array_equal(found, expected)
    with EngineProcess(engine) as process:
        session = process.open(path, Setting(engine=engine, batch=6))
        assert session.placement().float_matrix_operators() == ()
        logits = session.run(images.numpy())
    assert float(np.abs(logits - expected).max()) < 0.02 * float(np.abs(expected).max())
