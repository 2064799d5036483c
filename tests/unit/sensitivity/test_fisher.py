from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewbit.net import Net
from fewbit.sensitivity.fisher import Fisher
from fewbit.sensitivity.kl import KL
from fewbit.spec import QuantSpec
from scored import WIDTHS, folded, labelled, pictures, regions, tiny, trace_of


def squared_gradients(net: Net, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of each class and, were it the label, each layer's squared gradient."""
    modules = [layer.module for layer in net.layers() if isinstance(layer.module, nn.Conv2d | nn.Linear)]
    logits = net(image)[0]
    rows = []
    for one in logits.log_softmax(0):
        gradients = torch.autograd.grad(one, [module.weight for module in modules], retain_graph=True)
        rows.append(torch.stack([gradient.double().square().sum() for gradient in gradients]))
    return logits.detach().double().softmax(0), torch.stack(rows)


def test_it_is_the_mean_over_images_of_the_gradients_squares_for_drawn_labels() -> None:
    net, samples = tiny(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), 60
    images = pictures(net, 6)
    found = Fisher(samples=samples).score(net, [(images, None)], regions(net), WIDTHS)
    mean, variance = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for image in images.split(1):
        shares, squares = squared_gradients(net, image)
        expected = shares @ squares
        mean += expected / 6
        variance += shares @ (squares - expected).square() / samples / 36
    for index, name in enumerate(("0", "3")):
        assert abs(trace_of(found, net, name) - float(mean[index])) < 4 * float(variance[index]) ** 0.5
        assert float(mean[index]) > 8 * float(variance[index]) ** 0.5
    assert found.forwards == 1 + 2 * samples and found.unit == "half nats"


def test_of_a_linear_network_it_is_known() -> None:
    """One draw gives ||x||^2 ||p - e_y||^2, in the mean ||x||^2 (1 - sum p^2)."""
    net = tiny(nn.Flatten(), nn.Linear(9, 3))
    images = pictures(net, 8)
    with torch.no_grad():
        shares = net(images).double().softmax(1)
    expected = float((images.double().flatten(1).square().sum(1) * (1 - shares.square().sum(1))).mean())
    found = Fisher(samples=200).score(net, [(images, None)], regions(net), WIDTHS)
    assert trace_of(found, net, "1") == pytest.approx(expected, rel=0.1)


def test_labels_do_not_count_and_neither_do_batches() -> None:
    net = folded("residual")
    whole = labelled(net, 6, 6)
    (images, labels) = whole[0]
    assert labels is not None
    other = Fisher().score(net, [(images, (labels + 1) % 5)], regions(net), WIDTHS).losses
    assert Fisher().score(net, whole, regions(net), WIDTHS).losses == other
    assert Fisher().score(net, labelled(net, 6, 4), regions(net), WIDTHS).losses == other


def test_half_of_it_is_about_the_divergence_where_rounding_is_fine() -> None:
    net = folded("residual")
    fine = [QuantSpec(bits=8, symmetric=True, signed=True)]
    batches = labelled(net, 16, 16)
    fisher = Fisher(samples=4).score(net, batches, regions(net), fine).losses
    moved = KL().score(net, batches, regions(net), fine).losses
    ratios = {name: fisher[name][0] / 2 / moved[name][0] for name in moved}
    assert all(1 / 3 < ratio < 3 for ratio in ratios.values()), ratios
