from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit import ops
from fewbit.improve.expectation import Moments, clipped, expected_inputs, image_moments, moments_of
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.prepare.equalize import Equalize
from fewbit.prepare.fold_bn import FoldBN
from networks import make_context, make_images


def normal(mean: float, std: float) -> Moments:
    return Moments(torch.tensor([mean]), torch.tensor([std**2]))


@pytest.mark.parametrize(
    ("mean", "std", "high", "expected", "variance"),
    [
        (0, 1, math.inf, 0.398942, 0.340845),
        (1, 0.5, math.inf, 1.004245, 0.240049),
        (-1, 1, math.inf, 0.0833155, 0.0683983),
        (2, 3, math.inf, 2.453359, 5.615315),
        (2, 3, 6.0, 2.326174, 4.384818),
    ],
)
def test_worked_moments(mean: float, std: float, high: float, expected: float, variance: float) -> None:
    found = clipped(normal(mean, std), 0.0, high)
    assert float(found.mean) == pytest.approx(expected, rel=1e-6, abs=5e-7)
    assert found.variance is not None
    assert float(found.variance) == pytest.approx(variance, rel=1e-5)


def test_a_channel_without_spread_is_clipped_as_a_number() -> None:
    found = clipped(Moments(torch.tensor([-1.0, 2.0, 9.0, 0.0]), torch.zeros(4)), 0.0, 6.0)
    assert found.mean.tolist() == pytest.approx([0.0, 2.0, 6.0, 0.0], abs=1e-29)
    assert found.variance is not None and float(found.variance.max()) < 1e-29


def test_moments_are_those_of_draws() -> None:
    draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.5 + 0.7
    cut = draws.clamp(-0.4, 2.0)
    found = clipped(normal(0.7, 1.5), -0.4, 2.0)
    assert found.variance is not None
    assert float(found.mean) == pytest.approx(float(cut.mean()), abs=5e-3)
    assert float(found.variance) == pytest.approx(float(cut.var()), abs=5e-3)


class Many(nn.Module):
    """Two normalised layers and what may stand before a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b, self.b_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.read_clip, self.read_sum = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.read_concat, self.read_pool = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)
        self.unknown, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(16, 2)
        for norm in (self.a_norm, self.b_norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a_norm(self.a(x)))
        b = self.b_norm(self.b(a))
        y = self.read_clip(F.relu6(b)) + self.read_sum(F.relu(a + b))
        y = y + self.read_concat(torch.cat((a, b), 1)) + self.read_pool(F.max_pool2d(a, 1))
        y = y + self.unknown(F.silu(b))
        return self.fc(F.avg_pool2d(F.relu(y * 0 + a), 2).flatten(1)) + self.fc(F.avg_pool2d(a, 2).flatten(1))


def known(net: Net) -> dict[str, Tensor]:
    return {str(node.target): mean for node, mean in expected_inputs(net).items()}


def test_where_the_expectation_goes() -> None:
    torch.manual_seed(0)
    model = Many().eval()
    net = capture(model, "many", (3, 4, 4))
    FoldBN()(net, make_context())
    found = known(net)
    a = Moments(model.a_norm.bias.detach().double(), (net.statistics["a"].std) ** 2)
    b = Moments(model.b_norm.bias.detach().double(), (net.statistics["b"].std) ** 2)
    relu_a = clipped(a)
    assert found["a"].tolist() == [0, 0, 0]  # the image
    assert torch.equal(found["b"], relu_a.mean)
    assert torch.equal(found["read_clip"], clipped(b, 0.0, 6.0).mean)
    assert relu_a.variance is not None and b.variance is not None
    both = Moments(relu_a.mean + b.mean, relu_a.variance + b.variance)
    assert torch.allclose(found["read_sum"], clipped(both).mean)
    assert torch.equal(found["read_concat"], torch.cat((relu_a.mean, b.mean)))
    assert "read_pool" not in found and "unknown" not in found
    names = [name for name in found if name.startswith("fc")]
    assert len(names) == 1
    assert torch.equal(found[names[0]], relu_a.mean.repeat_interleave(4))


def test_the_image_is_a_photograph_where_the_card_tells_its_range() -> None:
    net = capture(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten()).eval(), "image", (2, 2, 2))
    plain = image_moments(net)
    assert plain.mean.tolist() == [0, 0] and plain.variance is not None and plain.variance.tolist() == [1, 1]
    net.image_range = ((-1.0, 0.0), (1.0, 4.0))
    found = image_moments(net)
    assert found.mean.tolist() == pytest.approx([-0.1, 1.8])
    assert found.variance is not None and found.variance.tolist() == pytest.approx([0.25, 1.0])


def test_a_layer_without_batchnorm_passes_the_moments_of_independent_inputs_on() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 6, (1, 2), groups=2), nn.Conv2d(6, 2, 1, bias=False)
    net = capture(nn.Sequential(*layers, nn.Flatten()).eval(), "sums", (4, 1, 2))
    net.image_range = ((-2.0, -1.0, 0.0, 0.0), (2.0, 3.0, 1.0, 8.0))
    image = image_moments(net)
    assert image.variance is not None
    draws = torch.randn((200_000, 4, 1, 2), generator=torch.Generator().manual_seed(1))
    draws = draws * image.variance.sqrt().float().reshape(-1, 1, 1) + image.mean.float().reshape(-1, 1, 1)
    with torch.no_grad():
        drawn = layers[0](draws).flatten(1)
    found = {str(node.target): moments for node, moments in moments_of(net).items()}
    assert torch.allclose(found["0"].mean.float(), drawn.mean(0), atol=0.02)
    assert found["0"].variance is not None
    assert torch.allclose(found["0"].variance.float(), drawn.var(0), rtol=0.02)
    assert torch.allclose(known(net)["1"], found["0"].mean)


def test_channels_that_are_padded_sliced_or_averaged() -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.after, self.fc = nn.BatchNorm2d(5), nn.Linear(20, 2)
            nn.init.normal_(self.norm.bias)
            nn.init.normal_(self.after.bias)

        def forward(self, x: Tensor) -> Tensor:
            x = F.pad(F.relu(self.norm(self.a(x)))[:, 1:], (0, 0, 0, 0, 1, 1))
            return self.fc(F.avg_pool2d(self.after(x), 2).flatten(1)) + x.mean(1).flatten(1)[:, :2]

    torch.manual_seed(0)
    model = Moved().eval()
    net = capture(model, "moved", (3, 4, 4))
    FoldBN()(net, make_context())
    found = {layer.kind: moments_of(net).get(layer.node) for layer in net.layers() if layer.name != "slice_2"}
    a = clipped(Moments(net.statistics["a"].mean, net.statistics["a"].std ** 2))
    assert a.variance is not None
    pad, kept = found["Pad"], found["BatchNorm"]
    assert pad is not None and pad.variance is not None and kept is not None
    assert torch.equal(pad.mean[1:4], a.mean[1:]) and pad.mean[[0, 4]].tolist() == [0, 0]
    assert torch.equal(pad.variance[1:4], a.variance[1:]) and pad.variance[[0, 4]].tolist() == [0, 0]
    assert torch.equal(kept.mean.float(), model.after.bias)
    assert found["Mean"] is None


def test_a_minimum_a_channel_cuts_the_same_normal() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 3, 1), nn.Flatten()
    ).eval()
    with torch.no_grad():
        model[1].weight.fill_(20.0)
        model[3].weight.div_(1000.0)
    net = capture(model, "cut", (3, 16, 16))
    FoldBN()(net, make_context())
    before = known(net)["3"]
    Equalize(caps=True)(net, make_context(images=make_images(4)))
    assert any(isinstance(layer.module, ops.Minimum) for layer in net.layers())
    after, factors = known(net)["3"], torch.full((4,), 20.0, dtype=torch.float64) / net.statistics["0"].std
    assert torch.allclose(after * factors, before, rtol=1e-3)
