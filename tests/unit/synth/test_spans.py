from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit import ops
from fewbit.improve.expectation import moments_of
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.prepare.fold_bn import FoldBN
from fewbit.synth.spans import Span, between, spans_of
from networks import make_context
from small_models import SIZE, body, captured


class Sums(nn.Module):
    """Two normalised layers, their sum, its average, a layer without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b, self.b_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        for norm in (self.a_norm, self.b_norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a_norm(self.a(x)))
        return self.fc(F.relu(a + self.b_norm(self.b(a))).mean((2, 3)))


def folded(model: nn.Module, size: tuple[int, int, int] = (3, 4, 4)) -> Net:
    net = capture(model.eval(), "net", size)
    FoldBN()(net, make_context())
    return net


def by_name(net: Net, deviations: float = 6.0) -> dict[str, Span]:
    spans = spans_of(net, deviations, 3.0)
    return {"input" if node.op == "placeholder" else str(node.target): span for node, span in spans.items()}


def near(span: Span, low: Tensor | float, high: Tensor | float) -> bool:
    return torch.allclose(span.low, torch.as_tensor(low, dtype=torch.float64)) and torch.allclose(
        span.high, torch.as_tensor(high, dtype=torch.float64)
    )


def test_a_normalised_layer_and_what_cuts_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    )
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 0.1]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, 3.0, -2.0]))
    found = by_name(folded(model))
    std = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64) / math.sqrt(1 + norm.eps)
    mean = torch.tensor([0.0, 1.0, 3.0, -2.0], dtype=torch.float64)
    assert near(found["0"], mean - 6 * std, mean + 6 * std)
    for name in ("2", "3", "4"):
        assert near(found[name], torch.zeros(4), (mean + 6 * std).clamp(0, 6))
    assert near(found["input"], torch.full((3,), -3.0), torch.full((3,), 3.0))
    wide = by_name(folded(model), deviations=3.0)["0"]
    assert near(wide, mean - 3 * std, mean + 3 * std)


def test_a_sum_lies_between_independent_terms_and_terms_that_move_together() -> None:
    torch.manual_seed(1)
    net = folded(Sums())
    found, moments = by_name(net), {str(node.target): m for node, m in moments_of(net).items()}
    a, b = (net.statistics[name] for name in "ab")
    together = Span(
        (a.mean - 6 * a.std).clamp(min=0) + b.mean - 6 * b.std, found["relu"].high + found["b"].high
    )
    total = moments["add"]
    assert total.variance is not None
    alone = Span(total.mean - 6 * total.variance.sqrt(), total.mean + 6 * total.variance.sqrt())
    between_them = between(alone, together)
    assert near(found["add"], between_them.low, between_them.high)
    assert bool((alone.high < found["add"].high).all()) and bool((found["add"].high < together.high).all())
    assert near(found["relu_1"], found["add"].low.clamp(min=0), found["add"].high.clamp(min=0))


def test_an_average_keeps_the_ends_and_logits_lie_between() -> None:
    torch.manual_seed(1)
    net = folded(Sums())
    found, moments = by_name(net), {str(node.target): m for node, m in moments_of(net).items()}
    read = found["relu_1"]
    assert near(found["mean_flatten"], read.low, read.high)
    module = net.layer("fc").module
    assert isinstance(module, nn.Linear)
    weight, middle = module.weight.detach().double(), module(moments["mean_flatten"].mean.float()).detach()
    alone = (weight.square() @ ((read.high - read.low) / 2).square()).sqrt()
    together = weight.abs() @ ((read.high - read.low) / 2)
    ends = found["fc"]
    assert bool((ends.high > middle + alone - 1e-5).all()) and bool(
        (ends.high < middle + together + 1e-5).all()
    )
    assert bool((ends.low < middle - alone + 1e-5).all()) and bool(
        (ends.low > middle - together - 1e-5).all()
    )


def test_geometric_mean_of_ends() -> None:
    narrow = Span(torch.tensor([-1.0, 2.0, -math.inf]), torch.tensor([-1.0, 4.0, 1.0]))
    wide = Span(torch.tensor([-4.0, -8.0, -math.inf]), torch.tensor([9.0, 9.0, math.inf]))
    found = between(narrow, wide)
    assert found.low.tolist() == [-2.0, 0.0, -math.inf]
    assert found.high.tolist() == [0.0, 6.0, math.inf]


FUNCTIONS = {
    "relu": F.relu,
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "mish": F.mish,
    "softplus": F.softplus,
    "relu6": F.relu6,
    "gate": lambda x: x * torch.sigmoid(x * 0.5 + 0.25),
    "difference": lambda x: x - F.relu(x),
    "softmax": lambda x: torch.softmax(x, 1),
    "shuffle": lambda x: F.relu(x).reshape(-1, 2, 3, 8, 8).permute(0, 2, 1, 3, 4).reshape(-1, 6, 8, 8),
    "concat": lambda x: torch.cat((x, F.relu(x)), 1),
    "concat of rows": lambda x: torch.cat((x, F.relu(x)), 2),
    "pad": lambda x: F.pad(F.relu(x), (1, 1, 1, 1), value=-1.0),
    "pad channels": lambda x: F.pad(F.relu(x), (0, 0, 0, 0, 1, 2)),
    "slice": lambda x: x[:, 1:4],
    "average": lambda x: F.avg_pool2d(F.relu(x), 2),
    "upsample": lambda x: F.interpolate(x, scale_factor=2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_holds_the_values_of_normal_draws(name: str) -> None:
    """The normalised stem lies within 6 deviations of its mean, and what follows within what that makes."""
    model = body(lambda self, x: FUNCTIONS[name](self.norm(x)), norm=nn.BatchNorm2d(6))
    norm = model.norm
    nn.init.uniform_(norm.weight, 0.5, 1.5)  # type: ignore[arg-type,union-attr]
    nn.init.normal_(norm.bias)  # type: ignore[arg-type,union-attr]
    net = captured(model.eval())
    images = torch.randn((64, *SIZE), generator=torch.Generator().manual_seed(0))
    _learn(net, images)
    FoldBN()(net, make_context())
    spans, outputs = spans_of(net, 6.0, 6.0), _outputs(net, images)
    for layer in net.layers()[:-1]:
        span, values = spans[layer.node], outputs[layer.name].transpose(0, 1).flatten(1).double()
        low, high = (
            end.reshape(-1).repeat_interleave(len(values) // end.numel()) for end in (span.low, span.high)
        )
        assert bool((values.amin(1) >= low - 1e-3).all()), layer.name
        assert bool((values.amax(1) <= high + 1e-3).all()), layer.name
        assert float(high.max() - low.min()) < 6 * float(values.max() - values.min()), layer.name


def _learn(net: Net, images: Tensor) -> None:
    """Give the BatchNorm the statistics of images."""
    norm = net.layer("norm").module
    assert isinstance(norm, nn.BatchNorm2d)
    norm.train()
    norm.momentum = None
    norm.reset_running_stats()
    with torch.no_grad():
        net(images)
    norm.eval()


def _outputs(net: Net, images: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = [
        layer.module.register_forward_hook(lambda m, i, o, name=layer.name: found.update({name: o}))
        for layer in net.layers()
    ]
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    return found


def test_scales_caps_and_norms_that_stay() -> None:
    limits = torch.tensor([1.0, 2, 3, 4, 5, 6]).reshape(-1, 1, 1)
    model = body(
        lambda self, x: self.after(self.least(self.norm(x) * self.scale + 1.0)),
        norm=nn.BatchNorm2d(6),
        scale=nn.Parameter(torch.tensor([1.0, -2, 3, 1, 1, 1]).reshape(-1, 1, 1)),
        least=ops.Minimum(limits),
        after=nn.BatchNorm2d(6),
    )
    net = captured(model.eval())
    FoldBN()(net, make_context())
    found = {str(node.target): span for node, span in spans_of(net, 6.0, 3.0).items()}
    reach = 6 / math.sqrt(1 + 1e-5)
    scale = torch.tensor([1.0, 2, 3, 1, 1, 1], dtype=torch.float64)
    assert near(found["least"], 1 - reach * scale, limits.flatten().double())
    assert near(found["after"], torch.full((6,), -reach), torch.full((6,), reach))


def test_what_nothing_tells_is_infinite_until_something_cuts_it() -> None:
    model = body(lambda self, x: torch.sigmoid(F.layer_norm(self.norm(x), (8, 8))), norm=nn.BatchNorm2d(6))
    net = captured(model.eval())
    FoldBN()(net, make_context())
    found = {layer.kind: spans_of(net, 6.0, 3.0)[layer.node] for layer in net.layers()}
    assert float(found["LayerNorm"].low) == -math.inf and float(found["LayerNorm"].high) == math.inf
    assert near(found["Sigmoid"], 0.0, 1.0)
    assert bool(found["Linear"].high.isfinite().all())
    model = body(lambda self, x: self.free(F.layer_norm(x, (8, 8))), free=nn.Conv2d(6, 2, 1))
    net = captured(model.eval())
    last = [spans_of(net, 6.0, 3.0)[layer.node] for layer in net.layers()][-1]
    assert float(last.low) == -math.inf and float(last.high) == math.inf


def test_the_image_spans_black_and_white_where_the_card_tells_them() -> None:
    torch.manual_seed(0)
    net = folded(Sums())
    net.image_range = ((-1.0, -2.0, 0.0), (1.0, 2.5, 1.0))
    found = by_name(net)
    assert near(found["input"], torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([1.0, 2.5, 1.0]))
