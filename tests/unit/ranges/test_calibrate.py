from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.errors import DataError, NetworkError, RecipeError
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.quantizer import QuantConv2d, Quantizer, QuantLinear
from fewbit.place.simulate import simulate
from fewbit.ranges.calibrate import Calibrate, input_quantizer, method, set_weight_grid
from fewbit.ranges.minmax import MinMax
from fewbit.recipe import Recipe, read_recipe, run_recipe
from networks import make_context, make_images, make_net, quantize

STEPS = ({"use": "canonical"}, {"use": "fold_bn"}, {"use": "place"})


def calibrated(model: nn.Module, images: Tensor, engine: str = "onnxruntime", **options: Any) -> Net:
    net = capture(model.eval(), "small", tuple(images.shape[1:]))
    recipe = Recipe(name="test", steps=(*STEPS, {"use": "calibrate", **options}))
    return run_recipe(recipe, net, make_context(engine, images))[0]


def grid_of(net: Net, tensor: str) -> Quantizer:
    """Return the quantizer that stands behind a layer."""
    return next(
        layer.module
        for layer in net.layers()
        if layer.inputs == (tensor,) and isinstance(layer.module, Quantizer)
    )


def outputs_of(net: Net, images: Tensor, name: str) -> Tensor:
    """Return the output of one layer of a float network."""
    kept = []
    handle = net.graph.get_submodule(name).register_forward_hook(lambda m, x, y: kept.append(y))
    with torch.no_grad():
        net(images)
    handle.remove()
    return torch.cat(kept)


@pytest.fixture
def images() -> Tensor:
    return make_images(8)


def test_min_max_grids_cover_what_the_float_network_shows(images: Tensor) -> None:
    float_net, _ = run_recipe(read_recipe("float32"), make_net("residual"), make_context(images=images))
    net = quantize("residual")
    for name in ("relu", "relu_1", "relu_2", "conv2"):
        seen = outputs_of(float_net, images, name)
        low, high = grid_of(net, name).range()
        step = float(grid_of(net, name).scale)
        assert low <= min(0.0, float(seen.min())) + step and high == pytest.approx(
            float(seen.max()), abs=step
        )
        assert high <= float(seen.max()) + step


def test_observing_goes_through_the_float_network(images: Tensor) -> None:
    """A grid of 2-bit weights in front does not change what the tensors behind it show."""
    plain = quantize("residual")
    coarse = read_recipe("int8")
    weights = coarse.scheme.weights.model_copy(update={"bits": 2})
    coarse = coarse.model_copy(update={"scheme": coarse.scheme.model_copy(update={"weights": weights})})
    for name in ("relu", "relu_1", "relu_2"):
        assert torch.equal(grid_of(plain, name).scale, grid_of(quantize("residual", coarse), name).scale)


def test_weight_quantizers_are_on_again_afterwards() -> None:
    for layer in quantize("residual").layers():
        if isinstance(layer.module, QuantConv2d | QuantLinear):
            assert layer.module.weight_quantizer.enabled


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_shared_grid_covers_the_widest_of_its_tensors(engine: str, images: Tensor) -> None:
    class Joined(nn.Module):
        """Two branches of very different size, joined; one is pooled first."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
            self.c = nn.Conv2d(8, 4, 1)
            with torch.no_grad():
                self.b.weight.mul_(50)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat((F.max_pool2d(F.relu(self.a(x)), 2), F.avg_pool2d(F.relu(self.b(x)), 2)), 1)
            return self.c(y).flatten(1)

    torch.manual_seed(0)
    net = calibrated(Joined(), images, engine)
    joined = grid_of(net, "cat")
    assert joined is grid_of(net, "relu") is grid_of(net, "max_pool2d") is grid_of(net, "avg_pool2d")
    float_net = capture(Joined().eval(), "x", (3, 16, 16))
    assert joined.range()[1] > 5 * float(outputs_of(float_net, images, "relu").max())


def test_of_a_pool_the_tensor_before_it_is_observed(images: Tensor) -> None:
    """Percentiles of a maximum pool's output differ from those of its input, whose grid it shares."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.max_pool2d(F.relu(self.a(x)), 4)).flatten(1)

    torch.manual_seed(0)
    model = Pooled().eval()
    net = calibrated(model, images, activations="percentile", activation_options={"percentile": 80})
    with torch.no_grad():
        seen = F.relu(model.a(images)).flatten().sort().values
    assert grid_of(net, "max_pool2d") is grid_of(net, "relu")
    expected = float(seen[int(0.8 * len(seen))])
    assert grid_of(net, "relu").range()[1] == pytest.approx(expected, rel=0.02)


def test_padding_with_a_value_is_inside_the_shared_grid(images: Tensor) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.pad(F.relu(self.a(x)), (1, 1, 1, 1), value=40.0)).flatten(1)

    torch.manual_seed(0)
    net = calibrated(Padded(), images)
    assert grid_of(net, "pad") is grid_of(net, "relu")
    assert grid_of(net, "pad").range()[1] == pytest.approx(40.0)


def test_padding_with_minus_infinity_before_a_maximum_pool_is_taken(images: Tensor) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.pad(self.a(x), (1, 1, 1, 1), value=-float("inf"))
            return self.c(F.max_pool2d(y, 2)).flatten(1)

    torch.manual_seed(0)
    net = calibrated(Padded(), images)
    with torch.no_grad():
        assert simulate(net, images).isfinite().all()


def test_the_way_to_the_logits_is_never_clipped(images: Tensor) -> None:
    class Ends(nn.Module):
        """A convolution whose forced quantizer stands right before the logits."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.logits = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.logits(F.relu(self.a(x))).mean((2, 3))

    torch.manual_seed(0)
    model = Ends().eval()
    net = calibrated(model, images, activations="percentile", activation_options={"percentile": 60})
    with torch.no_grad():
        inner = F.relu(model.a(images))
        logits = model.logits(inner)
    low, high = grid_of(net, "logits").range()
    step = float(grid_of(net, "logits").scale)
    assert low == pytest.approx(float(logits.min()), abs=step)
    assert high == pytest.approx(float(logits.max()), abs=step)
    assert grid_of(net, "relu").range()[1] < 0.5 * float(inner.max())


def test_a_bias_that_does_not_fit_int32_widens_its_channels_grid(images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    with torch.no_grad():
        model[2].weight[1].mul_(1e-12)
        model[2].bias.copy_(torch.tensor([0.5, 3.0, -0.5, 0.0]))  # type: ignore[operator]
    net = calibrated(model, images)
    module = net.layer("2").module
    assert isinstance(module, QuantConv2d) and module.bias is not None
    reads = input_quantizer(net, net.layer("2").node)
    assert isinstance(reads, Quantizer)
    codes = module.bias.detach().double() / (float(reads.scale) * module.weight_quantizer.scale.double())
    assert float(codes.abs().max()) <= 0.51 * 2**31
    fits = model[2].weight.detach().abs().flatten(1).amax(1) / 127
    assert torch.allclose(module.weight_quantizer.scale[[0, 2, 3]], fits[[0, 2, 3]])
    assert float(module.weight_quantizer.scale[1]) > 1000 * float(fits[1])
    with torch.no_grad():
        assert torch.allclose(simulate(net, images), model(images), atol=0.1)


def test_widened_grids_are_told_in_the_report(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with torch.no_grad():
        model[0].weight.mul_(1e-12)
        model[0].bias.fill_(1.0)  # type: ignore[operator, union-attr]
    net = capture(model.eval(), "small", (3, 16, 16))
    _, reports = run_recipe(read_recipe("int8"), net, make_context(images=images))
    assert reports[-1].notes == ("0: 4 weight grids widened so that the bias fits int32",)
    _, reports = run_recipe(read_recipe("int8-per-tensor"), net, make_context(images=images))
    assert reports[-1].notes == ("0: 1 weight grids widened so that the bias fits int32",)


def test_the_report_counts_activation_grids() -> None:
    _, reports = run_recipe(read_recipe("int8"), make_net("residual"), make_context())
    net = quantize("residual")
    quantizers = {id(layer.module) for layer in net.layers() if isinstance(layer.module, Quantizer)}
    assert reports[-1].step == "calibrate" and reports[-1].changed == len(quantizers)


def test_without_an_image_it_is_told() -> None:
    net = make_net("residual")
    with pytest.raises(
        DataError, match=r"calibration: no image came; give at least one with --data or --calib"
    ):
        run_recipe(read_recipe("int8"), net, replace(make_context(), batches=lambda: iter([])))


def test_images_with_a_value_that_is_not_finite_are_told_by_tensor(images: Tensor) -> None:
    images[3, 1, 2, 2] = float("nan")
    with pytest.raises(NetworkError, match="input: 1 of 3072 values are not finite"):
        calibrated(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), images)


def test_a_weight_that_is_not_finite_is_told_by_layer(images: Tensor) -> None:
    net, _ = run_recipe(Recipe(name="x", steps=STEPS), make_net("residual"), make_context())
    with torch.no_grad():
        net.layer("conv1").module.weight[0, 0, 0, 0] = float("inf")  # type: ignore[index, operator, union-attr]
    with pytest.raises(NetworkError, match=r"conv1\.weight: 1 of \d+ values are not finite"):
        Calibrate()(net, make_context())


def test_methods_take_their_hyperparameters() -> None:
    assert method("percentile", {"percentile": 99.0}).percentile == 99.0  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="range method 'percentile': key 'percentile' is 20"):
        method("percentile", {"percentile": 20})


def test_weights_take_their_own_method(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = 9.0  # type: ignore[index, operator, union-attr]
    wide = calibrated(model, images).layer("0").module
    narrow = (
        calibrated(model, images, weights="percentile", weight_options={"percentile": 90}).layer("0").module
    )
    assert wide.weight_quantizer.scale[0] == 9 / 127  # type: ignore[union-attr, index]
    assert narrow.weight_quantizer.scale[0] < 0.1 * 9 / 127  # type: ignore[union-attr, index, operator]


def test_a_weight_grid_is_set_by_hand() -> None:
    net, _ = run_recipe(Recipe(name="x", steps=STEPS), make_net("residual"), make_context())
    layer = net.layer("fc").module
    assert isinstance(layer, QuantLinear)
    set_weight_grid(layer, MinMax())
    peaks = layer.weight.detach().abs().amax(1).numpy()
    np.testing.assert_array_equal(layer.weight_quantizer.scale.numpy(), peaks / np.float32(127))


def held() -> int:
    """Bytes of all tensors and arrays that anything still holds."""
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    # Weights that oneDNN has arranged show no address.
    tensors = {id(o) if o.is_mkldnn else o.data_ptr(): 4 * o.numel() for o in found}
    return sum(tensors.values()) + tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("name", ["minmax", "moving_average", "percentile", "mse"])
def test_memory_does_not_grow_with_the_number_of_batches(name: str) -> None:
    after: list[int] = []

    def batches() -> Iterator[Tensor]:
        for seed in range(6):
            after.append(held())
            yield make_images(16, seed)

    recipe = Recipe(name="test", steps=(*STEPS, {"use": "calibrate", "activations": name}))
    tracemalloc.start()
    try:
        run_recipe(recipe, make_net("residual"), replace(make_context(), batches=batches))
    finally:
        tracemalloc.stop()
    one_batch = 16 * 3 * 16 * 16 * 4
    assert after[-1] - after[2] < one_batch / 2, after


class Shuffled(nn.Module):
    """A concatenation cut and joined again: one quantizer for tensors of different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)
        with torch.no_grad():
            self.b.weight.mul_(20)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat((F.relu(self.a(x)), F.relu(self.b(x))), 1)
        z = torch.cat((y[:, ::2], F.relu(self.a(x))), 1)
        return self.c(z + y).flatten(1)


@pytest.mark.parametrize("name", ["minmax", "moving_average", "percentile", "mse"])
def test_a_shared_quantizer_covers_each_tensors_own_range(images: Tensor, name: str) -> None:
    torch.manual_seed(0)
    net = calibrated(Shuffled(), images, activations=name)
    alone: dict[int, float] = {}
    for layer in net.layers():
        if isinstance(layer.module, Quantizer) and layer.inputs[0].startswith("cat"):
            finder = method(name, {}).start()
            for batch in images.split(4):
                finder.observe(
                    outputs_of(capture(seeded(Shuffled), "x", (3, 16, 16)), batch, layer.inputs[0])
                )
            high = finder.find(layer.module.spec).high
            assert isinstance(high, float)
            alone[id(layer.module)] = max(alone.get(id(layer.module), 0.0), high)
            assert layer.module.range()[1] >= 0.999 * high
    assert alone


def seeded(model: type[nn.Module]) -> nn.Module:
    """Return a model with the weights of the test."""
    torch.manual_seed(0)
    return model().eval()
