from __future__ import annotations

from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit import ops
from fewbit.engines.onnxruntime import OnnxRuntime
from fewbit.engines.openvino import OpenVino
from fewbit.engines.reference import Reference
from fewbit.engines.session import EngineName, Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.improve.split_channels import choose_splits, halves
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.quantizer import QuantConv2d
from fewbit.place.simulate import simulate
from fewbit.place.targets import target
from fewbit.recipe import Recipe, run_recipe
from fewbit.spec import QuantSpec, Rule, Scheme
from networks import NETWORKS, make_context, make_images, make_net

EXACT = ({"use": "canonical"}, {"use": "fold_bn"})
TENSOR = Scheme(weights=QuantSpec(bits=4, symmetric=True, signed=True))
CHANNEL = Scheme(weights=QuantSpec(bits=4, symmetric=True, signed=True, granularity="channel"))


def nearest(x: Tensor) -> Tensor:
    return torch.floor(x + 0.5)


@given(st.fractions(-1000, 1000), st.fractions(Fraction(1, 1000), 1000))
def test_halves_round_to_what_the_whole_rounds_to(weight: Fraction, step: Fraction) -> None:
    one, other = halves(weight, step)  # type: ignore[type-var]
    assert one + other == weight
    half = Fraction(1, 2)
    assert floor(one / step + half) + floor(other / step + half) == floor(weight / step + half)


def test_halves_of_many_draws_and_where_plain_halves_fail() -> None:
    draws = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    one, other = halves(draws, 1.0)
    assert torch.equal(nearest(one) + nearest(other), nearest(draws))
    assert float(2 * nearest(torch.tensor(3.0) / 2)) == 4  # plain halves of 3 steps make 4


def test_the_largest_is_split_again_and_again() -> None:
    assert choose_splits([torch.tensor([[1.0, 9.0, 3.0]])], 4) == [1, 1, 3, 2]
    assert choose_splits([torch.tensor([[1.0, 2.0]])], 0) == []
    assert choose_splits([torch.zeros((1, 3))], 2) == []


def test_with_a_scale_a_row_what_lowers_most_is_split() -> None:
    rows = torch.tensor([[5.0, 4.9, 0.1], [3.0, 1.0, 0.1], [3.0, 0.5, 0.1]])
    assert choose_splits([rows], 1) == [0]
    assert choose_splits([torch.tensor([[4.0, 4.0], [4.0, 4.0]])], 3) == [0, 1, 0]
    two = [torch.tensor([[1.0, 0.2, 0.9]]), torch.tensor([[0.1, 3.0, 1.0]])]
    assert choose_splits(two, 1) == [1]


class Outliers(nn.Module):
    """Two branches that read one tensor with a few large weights, a flattened classifier."""

    def __init__(self, flat: bool = True) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.b, self.c = nn.Conv2d(20, 8, 3), nn.Conv2d(20, 8, 1, padding=0)
        self.dw, self.flat = nn.Conv2d(8, 8, 3, groups=8), flat
        self.last = nn.Conv2d(8, 6, 3, stride=2)
        self.fc = nn.Linear(6 * 25, 5)
        with torch.no_grad():
            self.b.weight[:, 3] *= 6
            self.c.weight[2, 11] *= 9
            self.fc.weight.view(5, 6, 25)[:, 4, 7] *= 8

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a_norm(self.a(x)))
        y = self.b(x) + self.c(x)[:, :, 1:-1, 1:-1]
        y = F.relu(self.last(F.relu(self.dw(F.relu(y)))))
        return self.fc(y.flatten(1) if self.flat else y.reshape(-1, 150))


def outliers(flat: bool = True) -> Net:
    torch.manual_seed(0)
    return capture(Outliers(flat).eval(), "outliers", (3, 16, 16))


def split(net: Net, scheme: Scheme, ratio: float, *after: str) -> tuple[Net, Net]:
    """Return the folded network and the split one."""
    plain, _ = run_recipe(Recipe(name="p", scheme=scheme, steps=EXACT), net, make_context())
    steps = (*EXACT, {"use": "split_channels", "ratio": ratio}, *({"use": step} for step in after))
    made, _ = run_recipe(Recipe(name="s", scheme=scheme, steps=steps), net, make_context())
    return plain, made


@pytest.mark.parametrize("scheme", [TENSOR, CHANNEL], ids=["tensor", "channel"])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("ratio", [0.02, 0.3])
def test_the_function_stays_and_ranges_shrink(scheme: Scheme, flat: bool, ratio: float) -> None:
    plain, made = split(outliers(flat), scheme, ratio)
    images = make_images(4)
    with torch.no_grad():
        expected = plain(images)
        assert torch.allclose(made(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    for name in ("b", "c", "fc"):
        before, after = (float(net.layer(name).module.weight.detach().abs().max()) for net in (plain, made))  # type: ignore[operator,union-attr]
        assert after < (0.7 if name != "c" else 1.1) * before
    assert made.layer("a").module.out_channels == 20 + ceil(20 * ratio)  # type: ignore[union-attr]
    assert made.statistics["a"].mean.shape == (20 + ceil(20 * ratio),)


def test_the_copies_are_of_the_channels_with_the_outliers() -> None:
    _, made = split(outliers(), TENSOR, 0.1)
    producer = made.layer("a").module
    assert isinstance(producer, nn.Conv2d) and producer.bias is not None
    assert torch.equal(producer.weight[20:], producer.weight[[3, 11]])
    assert torch.equal(producer.bias[20:], producer.bias[[3, 11]])
    statistics = made.statistics["a"]
    assert torch.equal(statistics.std[20:], statistics.std[[3, 11]])


@pytest.mark.parametrize("scheme", [TENSOR, CHANNEL], ids=["tensor", "channel"])
def test_codes_of_both_halves_make_the_code_of_the_whole(scheme: Scheme) -> None:
    plain, made = split(outliers(), scheme, 0.05, "place", "calibrate")
    module = made.layer("b").module
    assert isinstance(module, QuantConv2d)
    scale, _ = module.weight_quantizer.grid(4)
    codes = module.weight_quantizer.codes(module.weight)
    whole = codes[:, :20].clone()
    rest = made.layer("a").module.weight[20:]  # type: ignore[index,union-attr]
    first = made.layer("a").module.weight[:20]  # type: ignore[index,union-attr]
    for index, row in enumerate(rest):
        copied = next(i for i in range(20) if torch.equal(first[i], row))
        whole[:, copied] += codes[:, 20 + index]
    exact = plain.layer("b").module.weight.detach()  # type: ignore[operator,union-attr]
    away = whole - exact / scale  # type: ignore[operator]
    assert float(away.detach().abs().max()) < 0.5 + 1e-4  # a half is a tie, which may round either way


def test_splitting_lowers_the_error_of_rounding() -> None:
    images = make_images(16)
    errors, exact = [], outliers()
    fine = Rule(match="[adfl]*", weights=QuantSpec(bits=8, symmetric=True, signed=True))
    scheme = TENSOR.model_copy(update={"rules": (fine,)})
    for steps in ((), ({"use": "split_channels", "ratio": 0.1},)):
        recipe = Recipe(
            name="e", scheme=scheme, steps=(*EXACT, *steps, {"use": "place"}, {"use": "calibrate"})
        )
        made, _ = run_recipe(recipe, outliers(), make_context())
        with torch.no_grad():
            errors.append(float((made(images) - exact(images)).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_what_is_left_alone() -> None:
    """The image, sums, depthwise convolutions, and what only float layers read."""
    for name in NETWORKS:
        recipe = Recipe(name="n", steps=(*EXACT, {"use": "split_channels", "ratio": 1.0}))
        made, reports = run_recipe(recipe, make_net(name), make_context())
        split_layers = {
            layer.name
            for layer in made.layers()
            if isinstance(layer.module, nn.Conv2d)
            and layer.module.out_channels != make_net(name).layer(layer.name).module.out_channels  # type: ignore[union-attr]
        }
        wanted = {"residual": {"conv1"}, "depthwise": {"pw"}, "branches": set(), "gated": {"squeeze"}}
        assert split_layers == wanted[name]
        assert reports[-1].notes[0].endswith("% more weights")
    floats = Scheme(rules=(Rule(match="conv2", keep_float=True),))
    _, made = split(make_net("residual"), floats, 1.0)
    assert made.layer("conv1").module.out_channels == 16  # type: ignore[union-attr]


class Between(nn.Module):
    def __init__(self, between: nn.Module, shared: bool = False) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Conv2d(3, 6, 1), between, nn.Conv2d(6, 6, 1)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.between(self.a(x)))
        return (self.b(x) if self.shared else x).mean((2, 3))


@pytest.mark.parametrize(
    ("between", "shared", "splits"),
    [
        (nn.ReLU(), False, True),
        (nn.PReLU(), False, True),
        (nn.PReLU(6), False, False),
        (ops.Minimum(torch.ones(6, 1, 1)), False, False),
        (nn.ReLU(), True, True),
    ],
)
def test_what_stands_between(between: nn.Module, shared: bool, splits: bool) -> None:
    torch.manual_seed(0)
    net = capture(Between(between, shared).eval(), "between", (3, 16, 16))
    plain, made = split(net, TENSOR, 0.5)
    assert (made.layer("a").module.out_channels > 6) == splits  # type: ignore[operator,union-attr]
    with torch.no_grad():
        assert torch.allclose(made(make_images(2)), plain(make_images(2)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_it_runs_in_integers_as_simulated(engine: EngineName, tmp_path: Path) -> None:
    steps = (*EXACT, {"use": "split_channels", "ratio": 0.1}, {"use": "place"}, {"use": "calibrate"})
    recipe = Recipe(name="s", scheme=TENSOR, steps=steps)
    made, _ = run_recipe(recipe, outliers(), make_context(engine))
    path = tmp_path / "net.onnx"
    export_onnx(made, path, target(engine))
    images = make_images(5, seed=9)
    found = Reference().open(path, Setting(engine="reference")).run(images.numpy())
    np.testing.assert_array_equal(found, simulate(made, images).numpy())
    session = (OnnxRuntime() if engine == "onnxruntime" else OpenVino()).open(path, Setting(engine=engine))
    assert session.placement().float_matrix_operators() == ()
    assert float(np.abs(session.run(images.numpy()) - found).max()) < 0.05 * float(np.abs(found).max())
