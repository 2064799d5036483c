from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.data.demo import demo_cards, make_images
from fewbit.errors import RecipeError
from fewbit.load.capture import capture, load
from fewbit.load.card import read_card
from fewbit.net import Net
from fewbit.place.quantizer import Quantizer
from fewbit.recipe import read_recipe, run_recipe
from fewbit.synth.zeroq import Distilled, Wanted, ZeroQ, distill, mismatch, norms_of
from networks import make_context, make_net


def test_worked_mismatch() -> None:
    x = torch.tensor([[1.0, 0, 2, 1], [-1, 3, -1, -5]], dtype=torch.float64).reshape(1, 2, 2, 2)
    variance = torch.tensor([1.0, 4.0], dtype=torch.float64)
    wanted = Wanted(torch.tensor([0.5, -1.0], dtype=torch.float64), variance.sqrt(), torch.ones(2))
    for statistics in ("batch", "sample"):
        mean, std = mismatch(x, wanted, statistics)
        assert float(mean) == pytest.approx(0.25, rel=1e-5)
        assert float(std) == pytest.approx(0.772078, rel=1e-5)
        assert float(mean + std) == pytest.approx(1.022078, rel=1e-5)


def test_statistics_of_the_batch_and_of_each_sample() -> None:
    x = torch.tensor([[3.0, 5.0], [-1.0, 1.0]]).reshape(2, 1, 1, 2)
    wanted = Wanted(torch.zeros(1), torch.ones(1), torch.full((1,), 2.0))
    mean, std = mismatch(x, wanted, "batch")
    assert float(mean) == pytest.approx((2 / 2) ** 2)
    assert float(std) == pytest.approx(((math.sqrt(5) - 1) / 2) ** 2, rel=1e-5)
    mean, std = mismatch(x, wanted, "sample")
    assert float(mean) == pytest.approx((4**2 + 0) / 4 / 2)
    assert float(std) == pytest.approx(0.0, abs=1e-6)


class Norms(nn.Module):
    """BatchNorms that read a convolution, a sum and a convolution without BatchNorm beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.b, self.free, self.sum_norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.c, self.c_norm, self.fc = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a_norm(self.a(x)))
        x = F.relu(self.sum_norm(self.b(x) + self.free(x)))
        return self.fc(F.relu(self.c_norm(self.c(x))).mean((2, 3)))


def test_only_norms_that_read_a_convolution_count() -> None:
    torch.manual_seed(0)
    net = capture(Norms(), "norms", (3, 8, 8))
    assert [layer.name for layer in norms_of(net)] == ["a_norm", "c_norm"]
    assert distill(net, ZeroQ(images=2, iterations=2)).norms == 2


@pytest.mark.parametrize("network", ["branches", "gated"])
def test_a_network_without_norms_is_told(network: str) -> None:
    message = f"{network}: no BatchNorm reads a convolution, so nothing tells what its images are like; take"
    with pytest.raises(RecipeError, match=message):
        distill(make_net(network), ZeroQ())
    with pytest.raises(RecipeError, match=message):
        run_recipe(read_recipe("int8-zeroq"), make_net(network), make_context())


def test_weights_that_are_not_finite_are_told() -> None:
    net = make_net("residual")
    with torch.no_grad():
        net.layer("conv1").module.weight[0, 0, 0, 0] = math.nan  # type: ignore[index,union-attr]
    with pytest.raises(
        RecipeError, match=r"residual: the distance .* is not finite \(nan\); check the weights"
    ):
        distill(net, ZeroQ(images=2, iterations=2))


def test_it_leaves_the_network_as_it_is_and_gives_the_same_images_for_a_seed() -> None:
    net = make_net("depthwise")
    before = {key: value.clone() for key, value in net.graph.state_dict().items()}
    settings, told = ZeroQ(images=3, iterations=4), list[float]()
    found = distill(net, settings, seed=5, tell=told.append)
    assert all(torch.equal(value, before[key]) for key, value in net.graph.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.graph.parameters())
    assert not any(layer.module._forward_pre_hooks for layer in net.layers())
    assert torch.equal(distill(net, settings, seed=5).images, found.images)
    assert not torch.equal(distill(net, settings, seed=6).images, found.images)
    assert found.images.shape == (3, 3, 16, 16) and found.images.dtype == torch.float32
    assert not found.images.requires_grad
    assert told == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("statistics", ["batch", "sample"])
@pytest.mark.parametrize("relative", [True, False])
def test_its_distance_falls(statistics: str, relative: bool) -> None:
    settings = ZeroQ(images=4, iterations=30, statistics=statistics, relative=relative)  # type: ignore[arg-type]
    found = distill(make_net("residual"), settings)
    assert found.last < 0.6 * found.first
    again = distill(make_net("residual"), settings.model_copy(update={"iterations": 1}))
    assert again.first == found.first and again.last >= found.last


def test_images_stay_between_black_and_white_and_look_like_photographs() -> None:
    net = make_net("residual")
    net.image_range = ((-1.0, 0.0, -2.0), (1.0, 1.0, 2.5))
    images = distill(net, ZeroQ(images=8, iterations=30)).images
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    assert torch.equal(low.maximum(torch.tensor([-1.0, 0.0, -2.0])), low)
    assert torch.equal(high.minimum(torch.tensor([1.0, 1.0, 2.5])), high)
    start = distill(net, ZeroQ(images=64, iterations=1, lr=1e-6)).images
    assert torch.allclose(start.mean((0, 2, 3)), torch.tensor([-0.1, 0.45, 0.025]), atol=0.03)
    assert torch.allclose(start.std((0, 2, 3)), 0.25 * torch.tensor([2.0, 1.0, 4.5]), rtol=0.1)


def test_large_images_are_made_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.synth import zeroq

    monkeypatch.setattr(zeroq, "_AT_ONCE_VALUES", 3 * 3 * 16 * 16)
    seen: list[int] = []
    exact = zeroq._distill_lot

    def watch(*given: object) -> Distilled:
        seen.append(int(given[3]))  # type: ignore[call-overload]
        return exact(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(zeroq, "_distill_lot", watch)
    told: list[float] = []
    found = distill(make_net("depthwise"), ZeroQ(images=7, iterations=2), tell=told.append)
    assert seen == [3, 2, 2] and found.images.shape[0] == 7
    assert told == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert found.first > found.last > 0


def test_later_steps_see_the_images_in_place_of_real_ones() -> None:
    recipe = read_recipe("int8-zeroq")
    steps = tuple({**s, "images": 4, "iterations": 3} if s["use"] == "zeroq" else s for s in recipe.steps)
    recipe = recipe.model_copy(update={"steps": steps})

    def real() -> object:
        raise AssertionError("a real image was asked for")

    context = replace(make_context(), batches=real)  # type: ignore[arg-type]
    net, reports = run_recipe(recipe, make_net("depthwise"), context)
    assert net.images is not None and net.images.shape == (4, 3, 16, 16)
    assert reports[1].changed == 4 and reports[1].notes[0].startswith("distance ")
    assert reports[1].notes[0].endswith(" over 3 BatchNorms and the image")
    input_quantizer = next(layer.module for layer in net.layers() if isinstance(layer.module, Quantizer))
    low, high = input_quantizer.range()
    step = (high - low) / 255
    assert low == pytest.approx(float(net.images.min()), abs=step)
    assert high == pytest.approx(float(net.images.max()), abs=step)


def test_it_comes_before_folding() -> None:
    recipe = read_recipe("float32")
    late = recipe.model_copy(update={"steps": (*recipe.steps, {"use": "zeroq"})})
    with pytest.raises(RecipeError, match="'zeroq' cannot follow the step that made the network folded"):
        run_recipe(late, make_net("residual"), make_context())


@pytest.fixture(scope="module")
def trained() -> tuple[Net, Tensor, Distilled]:
    """Return a trained network, real images and images made for it."""
    net = load(read_card(demo_cards()[1]))
    pixels, _ = make_images("test", 512)
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    return net, images, distill(net, ZeroQ(images=32, iterations=80))


@pytest.mark.slow
def test_its_distance_on_a_trained_network_falls_tenfold(trained: tuple[Net, Tensor, Distilled]) -> None:
    found = trained[2]
    assert found.last < found.first / 10 and found.norms > 10


@pytest.mark.slow
def test_ranges_are_those_of_real_images(trained: tuple[Net, Tensor, Distilled]) -> None:
    net, images, found = trained
    ranges = []
    for shown in (images[:256], found.images):
        made, _ = run_recipe(read_recipe("int8"), net, make_context(images=shown))
        quantizers = {x.module.name: x.module for x in made.layers() if isinstance(x.module, Quantizer)}
        ranges.append(torch.tensor([q.range()[1] - q.range()[0] for q in quantizers.values()]))
    near = (ranges[1] / ranges[0] - 1).abs() < 0.2
    assert float(near.float().mean()) >= 0.8


@pytest.mark.slow
def test_int8_calibrated_on_them_answers_as_on_real_images(trained: tuple[Net, Tensor, Distilled]) -> None:
    net, images, found = trained
    with torch.no_grad():
        exact = net(images).argmax(1)
        agree = []
        for shown in (images[:256], found.images):
            made, _ = run_recipe(read_recipe("int8"), net, make_context(images=shown))
            agree.append(float((made(images).argmax(1) == exact).float().mean()))
    assert agree[1] > agree[0] - 0.01
