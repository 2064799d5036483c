from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from calibrated import calibrated, context_of, scheme_of
from fewbit.improve import fit_ranges
from fewbit.improve.comq import COMQ
from fewbit.improve.fit_ranges import FitRanges
from fewbit.improve.units import whole_network
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.quantizer import QuantConv2d, Quantizer
from fewbit.recipe import Recipe, run_recipe
from fewbit.spec import QuantSpec, Scheme
from networks import make_context, make_images
from solved_layers import output_error


class OneLoudChannel(nn.Module):
    """The first channel is forty times as large as the second, and hardly anything reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.fc = nn.Linear(2, 4, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[4.0, 4.0, 4.0], [0.1, -0.1, 0.1]]).reshape(2, 3, 1, 1))
            self.fc.weight.copy_(torch.tensor([[1e-4, 1.0], [-1e-4, -1.0], [0.0, 0.5], [1e-4, -0.5]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).amax((2, 3)))


def loud(scheme: Scheme | None = None, **calibrate: str) -> Net:
    torch.manual_seed(0)
    net = capture(OneLoudChannel(), "loud", (3, 16, 16))
    steps = ({"use": "canonical"}, {"use": "place"}, {"use": "calibrate"} | calibrate)
    return run_recipe(
        Recipe(name="test", scheme=scheme or scheme_of(8), steps=steps),
        net,
        make_context(images=make_images(32)),
    )[0]


def error(net: Net) -> float:
    images = make_images(32, seed=4)
    with torch.no_grad():
        return float((net(images) - OneLoudChannel()(images)).square().mean())


def scales(net: Net) -> dict[str, float]:
    found = {m.name: m for m in net.graph.modules() if isinstance(m, Quantizer) and not m.weight}
    return {name: float(quantizer.scale) for name, quantizer in found.items()}


def test_a_loud_channel_that_matters_little_is_clipped_where_the_squared_error_covers_it() -> None:
    net = loud(activations="mse")
    before, first = error(net), scales(net)
    report = FitRanges()(net, make_context(images=make_images(48)))
    after = scales(net)
    assert (
        after["amax_flatten"] == 0.25 * first["amax_flatten"] and report.changed >= 1 and report.notes == ()
    )
    assert error(net) < 0.2 * before


def test_the_sums_are_the_expected_distance_of_the_logits_where_the_rest_is_linear() -> None:
    quantizer = Quantizer(QuantSpec(bits=3), "x")
    quantizer.set_range(0.0, 1.0)
    generator = torch.Generator().manual_seed(1)
    x, matrix = torch.rand(1, 4, generator=generator), torch.randn(3, 4, generator=generator)
    # Over all signs v the mean of (v^T J)_i^2 is the squared norm of the i-th column.
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
    weights = (signs @ matrix).square().mean(0, keepdim=True)
    torch.testing.assert_close(weights[0], matrix.square().sum(0))
    sums = fit_ranges._sums_of(quantizer)
    fit_ranges._add(sums, quantizer, x, weights)
    for factor, found in zip(sums.factors, sums.errors, strict=True):
        step = float(quantizer.scale * factor)
        gap = (torch.round(x / step).clamp(0, 7) * step - x)[0]
        expected = sum(float((matrix[:, i] * gap[i]).square().sum()) for i in range(4))
        assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", ["residual", "branches", "depthwise", "gated"])
def test_on_sound_ranges_it_does_no_harm(name: str) -> None:
    net = calibrated(name, scheme_of(8, 4))
    before = output_error(name, net)
    FitRanges()(net, context_of(48, scheme=scheme_of(8, 4)))
    assert output_error(name, net) < 1.05 * before


def fit_of(net: Net) -> fit_ranges._Fit:
    return fit_ranges._Fit(net, whole_network(net)[0], fit_ranges._rounding(net))


def test_the_weights_of_the_sums_are_the_squared_gradients_of_logits_less_their_mean() -> None:
    net = loud()
    image = make_images(1)
    expected = fit_of(net)
    with torch.no_grad():
        pooled = torch.relu(OneLoudChannel().conv(image)).amax((2, 3))
    matrix = OneLoudChannel().fc.weight.detach()
    columns = (matrix - matrix.mean(0)).square().sum(0, keepdim=True)
    quantizer = next(q for q in expected.sums if q.name == "amax_flatten")
    fit_ranges._add(expected.sums[quantizer], quantizer, pooled, columns)
    fit, generator = fit_of(net), torch.Generator().manual_seed(0)
    for _ in range(400):
        fit.show(image, generator)
    found, wanted = fit.sums[quantizer].errors / 400, expected.sums[quantizer].errors
    torch.testing.assert_close(found, wanted, rtol=0.15, atol=1e-9)


def test_of_the_moves_only_those_are_made_that_the_judges_like() -> None:
    net = loud(activations="mse")
    fit = fit_of(net)
    first = scales(net)
    image, pooled = (next(q for q in fit.sums if q.name == name) for name in ("input", "amax_flatten"))
    judges = make_images(12)
    assert fit.take_best([(image, 50.0), (pooled, 50.0)], judges, 5) == 0 and scales(net) == first
    assert fit.take_best([(pooled, 0.25), (image, 50.0)], judges, 5) == 1
    assert scales(net) == {"input": first["input"], "amax_flatten": 0.25 * first["amax_flatten"]}


def test_where_no_move_helps_the_judges_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    net = loud()
    first = scales(net)
    monkeypatch.setattr(fit_ranges._Fit, "moves", lambda fit: [(q, 50.0) for q in fit.sums])
    report = FitRanges()(net, make_context(images=make_images(48)))
    assert report.notes == ("left as they were, images that were not fitted came no nearer",)
    assert report.changed == 0 and scales(net) == first
    monkeypatch.setattr(fit_ranges._Fit, "moves", lambda fit: [])
    assert FitRanges()(net, make_context(images=make_images(48))).notes == ()


@pytest.mark.parametrize("images", [1, 3])
def test_with_too_few_images_to_judge_all_stays(images: int) -> None:
    net = loud()
    first = scales(net)
    report = FitRanges()(net, make_context(images=make_images(images)))
    assert report.notes == (f"left as they were: images came {images}, it takes 4 or more",)
    assert scales(net) == first


class Joined(nn.Module):
    """What is joined reaches the logits by another way only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.c, self.fc = nn.Conv2d(8, 4, 1), nn.Linear(4, 3)
        with torch.no_grad():
            self.c.weight[:, :4] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        y = torch.relu(self.b(x))
        return self.fc(self.c(torch.cat([x, y], 1)).mean((2, 3)))


def test_of_joined_tensors_each_is_watched_where_it_is_rounded_first() -> None:
    torch.manual_seed(0)
    steps = ({"use": "canonical"}, {"use": "place"}, {"use": "calibrate"})
    recipe = Recipe(name="test", scheme=scheme_of(8), steps=steps)
    net = run_recipe(recipe, capture(Joined(), "joined", (3, 16, 16)), make_context(images=make_images(32)))[
        0
    ]
    fit = fit_of(net)
    shared = [q for q in fit.sums if sum(other is q for other in fit.quantizers.values()) > 1]
    assert len(shared) == 1
    watched = [str(node.args[0]) for node, q in fit.quantizers.items() if q is shared[0]]
    assert len(watched) == 2 and not any("cat" in name for name in watched)


def test_codes_that_a_method_chose_go_with_grids_that_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    net = calibrated("residual", scheme_of(8))
    COMQ()(net, context_of(48, scheme=scheme_of(8)))
    layer = next(m for m in net.graph.modules() if isinstance(m, QuantConv2d))
    quantizer = layer.weight_quantizer
    with torch.no_grad():
        before, scale = quantizer(layer.weight).clone(), quantizer.scale.clone()
        layer.bias = nn.Parameter(torch.full_like(quantizer.scale, 2.0**31 * float(scale.max()) * 0.1))
    monkeypatch.setattr(fit_ranges._Fit, "take_best", lambda *_: 1)
    report = FitRanges()(net, context_of(48, scheme=scheme_of(8)))
    assert any("so that the bias fits int32" in note for note in report.notes)
    assert bool((quantizer.scale > 1.5 * scale).all())
    with torch.no_grad():
        gap = (quantizer(layer.weight) - before).abs().flatten(1).amax(1)
    assert bool((gap <= 0.51 * quantizer.scale).all())


def test_powers_of_two_stay_powers_of_two() -> None:
    weights = QuantSpec(bits=8, symmetric=True, signed=True)
    net = loud(Scheme(weights=weights, activations=QuantSpec(bits=8, symmetric=True, power_of_two=True)))
    first = scales(net)
    FitRanges()(net, make_context(images=make_images(48)))
    after = scales(net)
    assert after["amax_flatten"] < first["amax_flatten"]
    assert all(bool(torch.frexp(torch.tensor(scale)).mantissa == 0.5) for scale in after.values())


def test_without_fixed_ranges_there_is_nothing_to_fit() -> None:
    scheme = scheme_of(8, mode="dynamic")
    net = calibrated("residual", scheme)
    report = FitRanges()(net, context_of(scheme=scheme))
    assert report.changed == 0 and report.notes == ()
    assert FitRanges().reads_images(scheme) is False and FitRanges().reads_images(scheme_of(8)) is True
