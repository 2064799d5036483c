from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fewbit import ops
from fewbit.errors import RecipeError
from fewbit.improve.expectation import expected_inputs
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.quantizer import PixelQuantizer, Quantizer
from fewbit.prepare.canonical import Canonical
from fewbit.prepare.fold_input import FoldInput, fold_affine
from fewbit.recipe import read_recipe, run_recipe
from networks import SIZE, WHOLE_RANGE, make_context, make_net

IMAGENET = tuple(
    tuple((pixel / 255 - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225)))
    for pixel in (0, 255)
)


def folded(
    model: nn.Module, image_range: object = WHOLE_RANGE, size: tuple[int, int, int] = SIZE
) -> tuple[Net, Net]:
    """Return the captured network and its folded copy."""
    net = capture(model.eval(), "net", size)
    net.image_range = image_range  # type: ignore[assignment]
    copy = net.clone().eval()
    Canonical()(copy, make_context())
    FoldInput()(copy, make_context())
    return net, copy


def images_of(image_range: object, count: int = 4, size: tuple[int, int, int] = SIZE) -> Tensor:
    """Return preprocessed images of random pixels."""
    low, high = (torch.tensor(end, dtype=torch.float64).reshape(-1, 1, 1) for end in image_range)  # type: ignore[attr-defined]
    pixels = torch.randint(0, 256, (count, *size), generator=torch.Generator().manual_seed(3))
    return (pixels * ((high - low) / 255) + low).float()


class Stem(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.fc = conv, nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().flatten(1))


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.integers(1, 7),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    groups=st.sampled_from([1, 3]),
    side=st.integers(14, 17),
)
def test_it_computes_what_the_network_did(
    kernel: int, stride: int, padding: int, dilation: int, bias: bool, groups: int, side: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, kernel, stride, padding, dilation, groups, bias)
    net, copy = folded(Stem(conv), size=(3, side, side))
    images = images_of(WHOLE_RANGE, size=(3, side, side))
    with torch.no_grad():
        assert torch.allclose(copy(images), net(images), rtol=1e-4, atol=1e-5)


def test_the_first_layer_reads_whole_pixels_in_a_frame_of_their_own_black() -> None:
    _, copy = folded(Stem(nn.Conv2d(3, 4, 3, 2, 1)), IMAGENET)
    layers = {layer.name: layer for layer in copy.layers()}
    images = images_of(IMAGENET)
    with torch.no_grad():
        pixels = layers["pixels"].module(images)
        framed = layers["frame"].module(pixels.round())
    assert float((pixels - pixels.round()).abs().max()) < 1e-3
    assert float(pixels.min()) > -1e-3 and float(pixels.max()) < 255.001
    assert layers["frame"].module.pads == (1, 1, 0, 0)  # with a stride of 2 no window reaches the far side
    assert framed[0, :, 0, 0].tolist() == [124, 116, 104]
    assert torch.equal(framed[:, :, 1:, 1:], pixels.round())
    assert ops.pads_of(layers["conv"].module) == (0, 0, 0, 0)  # type: ignore[arg-type]


def test_padding_is_all_that_it_moves_and_by_half_a_pixel_at_most() -> None:
    net, copy = folded(Stem(nn.Conv2d(3, 4, 3, 1, 1)), IMAGENET)
    images = images_of(IMAGENET)
    with torch.no_grad():
        exact, found = (dict(n.graph.named_modules()) for n in (net, copy))
        before = exact["conv"](images)
        after = found["conv"](found["frame"](found["pixels"](images)))
        reach = exact["conv"].weight.abs().sum((1, 2, 3)).max() * 0.5 / 255 / 0.224
    gap = (after - before).abs()
    assert float(gap[:, :, 1:-1, 1:-1].max()) < 1e-4
    assert 1e-4 < float(gap.max()) < float(reach)


def test_fold_affine_by_hand() -> None:
    conv = nn.Conv2d(2, 2, 1, groups=2)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([3.0, 5.0]).reshape(2, 1, 1, 1))
        conv.bias.copy_(torch.tensor([1.0, -1.0]))  # type: ignore[union-attr]
    fold_affine(conv, torch.tensor([2.0, 4.0]).double(), torch.tensor([10.0, 20.0]).double())
    assert conv.weight.flatten().tolist() == [6.0, 20.0]
    assert conv.bias is not None and conv.bias.tolist() == [31.0, 99.0]


def test_pixels_have_the_grid_of_pixels_whatever_the_scheme_and_the_images_say() -> None:
    for recipe in ("int8", "int8-symmetric", "w4a4-reconstructed"):
        net, _ = run_recipe(
            read_recipe(recipe).with_pixels(), make_net("residual", image_range=WHOLE_RANGE), make_context()
        )
        grids = [layer.module for layer in net.layers() if isinstance(layer.module, Quantizer)]
        pixels = [grid for grid in grids if isinstance(grid, PixelQuantizer)]
        assert len(pixels) == 2 and pixels[0] is pixels[1]  # of the pixels and of their frame
        assert (float(pixels[0].scale), float(pixels[0].zero_point)) == (1.0, 0.0)
        assert (pixels[0].qmin, pixels[0].qmax, pixels[0].unsigned) == (0, 255, True)


def test_without_a_card_nothing_tells_the_preprocessing() -> None:
    net = make_net("residual")
    Canonical()(net, make_context())
    with pytest.raises(
        RecipeError,
        match=r"residual: nothing tells scale, mean and std of its images, which fold_input folds into the "
        r"first layer; give them in the card's \[input\]",
    ):
        FoldInput()(net, make_context())


def test_another_layer_than_a_convolution_reads_the_image() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.fc = nn.MaxPool2d(2), nn.LazyLinear(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.pool(x).flatten(1))

    with pytest.raises(
        RecipeError,
        match="net: layer 'pool' reads the image and is no convolution with zero padding, so the "
        "preprocessing cannot be folded; use --input float32, or leave the step fold_input out",
    ):
        folded(Pooled())


def test_a_convolution_may_read_the_image_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.LazyLinear(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((self.conv(x) + self.conv(x).relu()).flatten(1))

    net, copy = folded(Twice())
    images = images_of(WHOLE_RANGE)
    with torch.no_grad():
        assert torch.allclose(copy(images), net(images), rtol=1e-4, atol=1e-5)


def test_folded_twice_is_folded_once() -> None:
    _, copy = folded(Stem(nn.Conv2d(3, 4, 3, 1, 1)))
    again = copy.with_facts("pixels")
    report = FoldInput()(again, make_context())
    assert report.changed == 0 and report.notes == ("the preprocessing is folded already",)


def test_padding_that_stands_for_no_pixel_is_refused() -> None:
    bright = ((0.5, 0.5, 0.5), (2.5, 2.5, 2.5))
    with pytest.raises(
        RecipeError,
        match=r"net: the value 0, with which 'conv' pads, is the pixel \[-64.0, -64.0, -64.0\] in each "
        "channel, and pixels go from 0 to 255; use --input float32, or leave the step fold_input out",
    ):
        folded(Stem(nn.Conv2d(3, 4, 3, 1, 1)), bright)
    net, copy = folded(Stem(nn.Conv2d(3, 4, 3)), bright)  # without padding nothing stands for it
    images = images_of(bright)
    with torch.no_grad():
        assert torch.allclose(copy(images), net(images), rtol=1e-4, atol=1e-4)


def test_bias_correction_knows_the_mean_of_the_pixels() -> None:
    net = make_net("residual", image_range=IMAGENET)
    for step in (Canonical(), FoldInput()):
        step(net, make_context())
    plain = make_net("residual", image_range=IMAGENET)
    found, before = (
        next(mean for node, mean in expected_inputs(n).items() if str(node.target) == "stem")
        for n in (net, plain)
    )
    low, high = (torch.tensor(end, dtype=torch.float64) for end in IMAGENET)
    assert torch.allclose(found, (before - low) * 255 / (high - low), rtol=1e-4)
