from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.improve import gram
from fewbit.improve.comq import COMQ
from fewbit.place.quantizer import QuantConv2d, QuantLinear
from fewbit.spec import QuantSpec
from networks import make_context, make_images
from solved_layers import three_bit


def convolution(**options: int) -> QuantConv2d:
    plain = nn.Conv2d(4, 8, 3, padding=1, bias=False, **options)  # type: ignore[arg-type]
    return QuantConv2d(plain, QuantSpec(bits=8, symmetric=True, signed=True), "conv")


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 2}, {"dilation": 2, "groups": 4}])
def test_patches_times_weights_are_the_convolution(options: dict[str, int]) -> None:
    layer, images = convolution(**options), seeded(2, 4, 9, 8)
    expected = F.conv2d(images, layer.weight, None, layer.stride, 1, layer.dilation, layer.groups)
    exact, same = gram.patches(layer, images, images, 10_000, torch.Generator().manual_seed(0))
    assert torch.equal(exact, same)
    rows = layer.weight.detach().reshape(layer.groups, layer.weight.shape[0] // layer.groups, -1)
    found = exact @ rows.transpose(1, 2)  # (g, N P, O / g)
    per_image = found.reshape(layer.groups, 2, -1, rows.shape[1]).permute(1, 0, 3, 2)
    torch.testing.assert_close(per_image.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


def test_fewer_positions_are_drawn_at_equal_places_of_both() -> None:
    images = seeded(2, 4, 9, 8)
    exact, rounded = gram.patches(convolution(), images, 2 * images, 7, torch.Generator().manual_seed(0))
    assert exact.shape == (1, 14, 36) and torch.equal(rounded, 2 * exact)
    again, _ = gram.patches(convolution(), images, images, 7, torch.Generator().manual_seed(0))
    assert torch.equal(again, exact)


def moments(exact: Tensor, rounded: Tensor) -> gram._Moments:
    return gram._moments_of(exact.unsqueeze(0).double(), rounded.unsqueeze(0).double())


def test_moments_of_two_halves_are_those_of_the_whole_and_give_covariances() -> None:
    exact, rounded = seeded(50, 5) + 3, seeded(50, 5) - 2
    halves = moments(exact[:20], rounded[:20]) + moments(exact[20:], rounded[20:])
    own, cross = moments(exact, rounded).covariances()
    torch.testing.assert_close(halves.covariances(), (own, cross))
    torch.testing.assert_close(own[0], 49 * torch.cov(rounded.double().T))
    about, gap = rounded.double() - rounded.double().mean(0), exact.double() - rounded.double()
    torch.testing.assert_close(cross[0], (gap - gap.mean(0)).T @ about)


def test_the_correction_undoes_a_shrinking_of_the_inputs_and_leaves_noise_alone() -> None:
    exact, weight = seeded(4000, 3).double(), torch.tensor([[[1.0, -2.0, 0.5]]], dtype=torch.float64)
    parts = [moments(some, 0.8 * some) for some in (exact[:3000], exact[3000:])]
    found = gram._correction(weight, parts[0], parts[1])
    torch.testing.assert_close(found, 0.25 * weight, rtol=0.03, atol=0.0)
    noise = exact + 0.01 * torch.randn(4000, 3, generator=torch.Generator().manual_seed(4)).double()
    few = [moments(exact[:8], noise[:8]), moments(exact[8:], noise[8:])]
    assert float(gram._correction(weight, few[0], few[1]).abs().max()) < 0.01
    same = moments(exact, exact)
    assert torch.equal(gram._correction(weight, same, same), torch.zeros_like(weight))


def test_a_layer_with_too_many_inputs_keeps_its_nearest_codes_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gram, "_MOST_INPUTS", 100)
    _, solved = three_bit("residual", None)
    report = COMQ()(solved, make_context(images=make_images(64)))
    told = [note for note in report.notes if "stays rounded to nearest" in note]
    assert told == [
        f"{name}: stays rounded to nearest (144 inputs an output, at most 100 are solved)"
        for name in ("conv1", "conv2")
    ]
    for name, layer in solved.graph.named_modules():
        if isinstance(layer, QuantConv2d | QuantLinear):
            assert (layer.weight_quantizer.assigned is None) == (layer.weight[0].numel() > 100), name
