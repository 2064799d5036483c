from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.net import Net
from fewbit.sensitivity.hessian import Hessian, mean_of, quadratic_forms, signs_like
from fewbit.sensitivity.score import LabelledBatch
from scored import WIDTHS, pictures, regions, tiny, trace_of

MATRIX = torch.tensor([[4.0, 1, 0], [1, 3, -1], [0, -1, 2]])


def form(vector: Tensor) -> Tensor:
    weight = torch.tensor([0.3, -2.0, 1.0], requires_grad=True)
    return quadratic_forms(weight @ MATRIX @ weight / 2, [weight], [vector])


def two_layers() -> Net:
    return tiny(nn.Conv2d(1, 2, 2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3, bias=False))


def exact_hessian(net: Net, images: Tensor, labels: Tensor) -> tuple[Tensor, list[slice]]:
    """Return the Hessian of the summed cross-entropy in all weights, and where those of each layer are."""
    flat = torch.cat([net.layer(name).module.weight.detach().flatten() for name in ("0", "3")]).double()  # type: ignore[operator,union-attr]

    def loss(flat: Tensor) -> Tensor:
        x = torch.tanh(F.conv2d(images.double(), flat[:8].reshape(2, 1, 2, 2))).flatten(1)
        return F.cross_entropy(x @ flat[8:].reshape(3, 8).T, labels, reduction="sum")

    found = torch.autograd.functional.hessian(loss, flat)
    assert isinstance(found, Tensor)
    return found, [slice(0, 8), slice(8, 32)]


def spread_of(hessian: Tensor, own: slice) -> float:
    """Return the variance of v_i^T (H v)_i: 2 sum H_ab^2 inside, a != b, and sum H_ab^2 with the others."""
    inside = hessian[own, own].square()
    others = hessian[own].square().sum() - inside.sum()
    return float(2 * (inside.sum() - inside.diag().sum()) + others)


def test_the_eight_sign_vectors_of_the_worked_matrix() -> None:
    vectors = [torch.tensor(signs) for signs in itertools.product((-1.0, 1.0), repeat=3)]
    found = [float(form(vector)) for vector in vectors]
    assert sorted(found) == [5, 5, 9, 9, 9, 9, 13, 13]
    worked = {(1, 1, 1): 9, (1, 1, -1): 13, (1, -1, 1): 9, (1, -1, -1): 5}
    for signs, value in worked.items():
        assert float(form(torch.tensor(signs, dtype=torch.float32))) == value
    assert statistics.mean(found) == float(MATRIX.trace()) == 9
    assert statistics.pvariance(found) == 8


def test_the_mean_of_drawn_vectors_comes_to_the_trace() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, drawn = mean_of(lambda: form(signs_like(torch.zeros(3), generator)), 400, 0.0)
    assert drawn == 400
    assert abs(float(mean) - 9) < 4 * (8 / 400) ** 0.5


def drawn_from(values: list[float]) -> Callable[[], Tensor]:
    rest = iter(values)
    return lambda: torch.tensor([next(rest)], dtype=torch.float64)


def test_it_stops_once_the_mean_stands_still_but_not_before_ten() -> None:
    assert mean_of(drawn_from([2.0] * 50), 50, 1e-3)[1] == 10
    mean, drawn = mean_of(drawn_from([1.0, 3.0] * 25), 50, 0.03)
    assert (float(mean), drawn) == (pytest.approx(2.0), 18)  # 1 / 17 moves 33 / 17 by 0.0303, then by 0.0294
    assert mean_of(drawn_from([2.0] * 3), 3, 1e-3)[1] == 3
    assert mean_of(drawn_from([2.0]), 1, 1e-3)[1] == 1


def test_all_vectors_together_give_the_exact_traces_of_a_network() -> None:
    layers = (nn.Conv2d(1, 1, 2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(2, 2, bias=False))
    net = tiny(*layers, size=(1, 2, 3), classes=2)
    images, labels = pictures(net, 5), torch.tensor([0, 1, 1, 0, 1])
    weights = [net.layer(name).module.weight for name in ("0", "3")]  # type: ignore[union-attr]
    total = torch.zeros(2, dtype=torch.float64)
    for signs in itertools.product((-1.0, 1.0), repeat=8):
        vectors = [torch.tensor(signs[:4]).reshape(1, 1, 2, 2), torch.tensor(signs[4:]).reshape(2, 2)]
        total += quadratic_forms(F.cross_entropy(net(images), labels), weights, vectors)  # type: ignore[arg-type]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        x = torch.tanh(F.conv2d(images.double(), a)).flatten(1)
        return F.cross_entropy(x @ b.T, labels)

    exact = torch.autograd.functional.hessian(loss, tuple(w.detach().double() for w in weights))  # type: ignore[operator,union-attr]
    expected = [float(exact[i][i].reshape(n, n).trace()) for i, n in ((0, 4), (1, 4))]
    assert (total / 2**8).tolist() == pytest.approx(expected, rel=1e-4)


def test_drawn_vectors_come_to_the_exact_traces_of_a_network() -> None:
    net, samples = two_layers(), 300
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    batches = list(zip(pictures(net, 7).split(4), labels.split(4), strict=True))
    found = Hessian(samples=samples, tolerance=0).score(net, batches, regions(net), WIDTHS)  # type: ignore[arg-type]
    assert found.forwards == 9 * samples
    parts = [exact_hessian(net, *batch) for batch in batches]
    for place, name in enumerate(("0", "3")):
        trace = sum(float(part.diag()[places[place]].sum()) for part, places in parts) / 7
        variance = sum(spread_of(part, places[place]) for part, places in parts) / 49 / samples
        assert abs(trace_of(found, net, name) - abs(trace)) < 4 * variance**0.5
        assert abs(trace) > 5 * variance**0.5


def test_of_a_linear_network_it_is_known_and_needs_no_labels() -> None:
    """The trace is the mean of ||x||^2 (1 - sum p^2), whatever the labels."""
    net = tiny(nn.Flatten(), nn.Linear(9, 3))
    images = pictures(net, 8)
    with torch.no_grad():
        shares = net(images).double().softmax(1)
    powers = images.double().flatten(1).square().sum(1)
    expected = float((powers * (1 - shares.square().sum(1))).mean())
    for labels in (None, torch.zeros(8, dtype=torch.int64)):
        found = Hessian(samples=500, tolerance=0).score(net, [(images, labels)], regions(net), WIDTHS)
        assert trace_of(found, net, "1") == pytest.approx(expected, rel=0.1)
    assert found.unit == "half nats"


def test_labels_count_where_they_are_given() -> None:
    net, images = two_layers(), pictures(two_layers(), 6)
    given = [torch.full((6,), label) for label in (0, 1)]
    rows = [
        Hessian(samples=5).score(net, [(images, labels)], regions(net), WIDTHS).losses
        for labels in (*given, None)
    ]
    assert rows[0] != rows[1] != rows[2] != rows[0]


def test_loose_tolerance_takes_fewer_vectors() -> None:
    net = two_layers()
    batches: list[LabelledBatch] = [(pictures(net, 6), None)]
    loose, strict = (
        Hessian(samples=60, tolerance=tolerance).score(net, batches, regions(net), WIDTHS)
        for tolerance in (0.5, 0.0)
    )
    assert loose.forwards == 90 and strict.forwards == 540
