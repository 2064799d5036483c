from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.prepare.fold_bn import FoldBN, affine_of, fold
from fewbit.step import StepReport
from networks import make_context, make_images, make_net


def folded(model: nn.Module, size: tuple[int, int, int] = (3, 16, 16)) -> tuple[Net, Net, StepReport]:
    """Return the captured network, its folded copy, and the step's report."""
    net = capture(model.eval(), "net", size)
    copy = net.clone()
    return net, copy, FoldBN()(copy, make_context())


def kinds(net: Net) -> list[str]:
    return [layer.kind for layer in net.layers()]


def classifier(*body: nn.Module, outputs: int = 4) -> nn.Module:
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(outputs))


@torch.no_grad()
def test_worked_example() -> None:
    linear, norm = nn.Linear(2, 1), nn.BatchNorm1d(1, eps=1e-5).eval()
    linear.weight.copy_(torch.tensor([[0.5, -1.0]]))
    linear.bias.fill_(0.1)
    norm.weight.fill_(2.0)
    norm.bias.fill_(0.3)
    norm.running_mean, norm.running_var = torch.tensor([0.4]), torch.tensor([0.25])
    x = torch.tensor([[1.0, 2.0]])
    assert float(linear(x)) == pytest.approx(-1.4)
    assert float(norm(linear(x))) == pytest.approx(-6.899856, abs=1e-6)
    scale, _ = affine_of(norm)
    assert float(scale) == pytest.approx(3.99992, abs=1e-5)
    fold(linear, norm)
    assert linear.weight.tolist()[0] == pytest.approx([1.99996, -3.99992], abs=1e-5)
    assert float(linear.bias) == pytest.approx(-0.899976, abs=1e-6)
    assert float(linear(x)) == pytest.approx(-6.899856, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["plain", "depthwise", "groups", "transposed", "transposed groups", "linear"]),
    bias=st.booleans(),
    affine=st.booleans(),
    variance=st.sampled_from([0.0, 1e-8, 1e-3, 1.0, 50.0]),
    seed=st.integers(0, 2**16),
)
@example(kind="depthwise", bias=False, affine=True, variance=0.0, seed=0)
@example(kind="transposed groups", bias=True, affine=True, variance=1e-8, seed=1)
def test_folding_changes_nothing(kind: str, bias: bool, affine: bool, variance: float, seed: int) -> None:
    torch.manual_seed(seed)
    layers: dict[str, Any] = {
        "plain": lambda: nn.Conv2d(4, 6, 3, padding=1, bias=bias),
        "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=bias),
        "groups": lambda: nn.Conv2d(4, 6, 3, 2, groups=2, bias=bias),
        "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, 2, bias=bias),
        "transposed groups": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=bias),
        "linear": lambda: nn.Linear(4, 6, bias=bias),
    }
    layer = layers[kind]()
    norm = (nn.BatchNorm1d if kind == "linear" else nn.BatchNorm2d)(6, affine=affine).eval()
    if affine:
        nn.init.normal_(norm.weight)  # half of them negative
        nn.init.normal_(norm.bias)
    norm.running_mean = torch.randn(6)
    norm.running_var = variance * torch.rand(6)
    x = torch.randn(3, 4) if kind == "linear" else torch.randn(3, 6 if kind == "depthwise" else 4, 7, 7)
    with torch.no_grad():
        expected = norm.double()(layer.double()(x.double()))
        layer.float()
        fold(layer, norm.float())
        found = layer(x)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max().clamp(min=1.0))
    assert found.dtype == layer.weight.dtype == torch.float32


def test_a_network_loses_every_norm_behind_a_convolution() -> None:
    for name in ("residual", "depthwise"):
        net = make_net(name)
        before = net(make_images(4)).detach()
        copy = net.clone()
        report = FoldBN()(copy, make_context())
        assert "BatchNorm" not in kinds(copy)
        assert report.changed == kinds(net).count("BatchNorm") == 3 and report.notes == ()
        with torch.no_grad():
            gap = (copy(make_images(4)) - before).abs().max()
        assert float(gap) < 1e-5 * float(before.abs().max())
        assert torch.equal(net(make_images(4)), before)


def test_a_norm_behind_an_activation_stays_and_is_named() -> None:
    model = classifier(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1))
    model(torch.zeros(1, 3, 16, 16))
    net, copy, report = folded(model)
    assert kinds(copy) == kinds(net) and report.changed == 0
    assert report.notes == ("BatchNorm kept, nothing before it to fold into: 2",)


def test_a_norm_on_the_image_stays() -> None:
    model = classifier(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3))
    model(torch.zeros(2, 3, 16, 16))
    _, copy, report = folded(model)
    assert kinds(copy)[0] == "BatchNorm" and report.changed == 0


def test_a_norm_whose_convolution_has_another_reader_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return (y + self.norm(y)).mean((2, 3))

    model = Shared().eval()
    model.norm.running_mean.fill_(0.5)
    net, copy, report = folded(model)
    assert "BatchNorm" in kinds(copy) and report.changed == 0
    assert torch.equal(net(make_images(2)), copy(make_images(2)))


def test_a_convolution_called_twice_folds_each_norm_into_its_own_copy() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm2(self.conv(self.norm1(self.conv(x)))).flatten(1)

    model = Twice().eval()
    model.norm1.running_mean.fill_(0.5)
    model.norm2.running_var.fill_(3.0)
    net, copy, report = folded(model)
    assert report.changed == 2 and "BatchNorm" not in kinds(copy)
    with torch.no_grad():
        assert torch.allclose(net(make_images(2)), copy(make_images(2)), rtol=1e-5, atol=1e-6)


def test_a_norm_over_another_axis_than_the_products_stays() -> None:
    class Rows(nn.Module):
        """A matrix product over the last axis, a norm over the second."""

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(16, 3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(x)).mean((2, 3))

    model = Rows().eval()
    model.norm.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    net, copy, report = folded(model)
    assert "BatchNorm" in kinds(copy) and report.changed == 0
    assert torch.equal(net(make_images(2)), copy(make_images(2)))


def test_a_norm_over_the_length_of_a_sequence_stays() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(16, 48), nn.BatchNorm1d(48)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(x.flatten(1, 2))).mean(2)

    model = Sequence().eval()
    model.norm.running_mean.copy_(torch.linspace(-1, 1, 48))
    net, copy, report = folded(model)
    assert report.changed == 0
    assert torch.equal(net(make_images(2)), copy(make_images(2)))
