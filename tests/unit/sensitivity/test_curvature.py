from __future__ import annotations

import pytest
import torch
from torch import nn

from fewbit.place.regions import Region
from fewbit.sensitivity.curvature import curvature_losses, drawn_labels, own_weights, rounding_error
from fewbit.sensitivity.fisher import Fisher
from fewbit.sensitivity.hessian import Hessian
from fewbit.sensitivity.one_region import rounded_layer
from fewbit.sensitivity.score import ask
from fewbit.spec import QuantSpec
from scored import WIDTHS, pictures, regions, tiny
from small_models import body, captured

TENSOR = QuantSpec(bits=2, symmetric=True, signed=True)


def test_rounding_error_by_hand() -> None:
    """(1, -0.4, 0.3, 0.6) on the grid -1, 0, 1 becomes (1, 0, 0, 1): 0.16 + 0.09 + 0.16."""
    net = tiny(nn.Flatten(), nn.Linear(4, 1, bias=False), size=(1, 2, 2), classes=1)
    module = net.layer("1").module
    assert isinstance(module, nn.Linear)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, -0.4, 0.3, 0.6]]))
    assert rounding_error(rounded_layer(net.layer("1"), TENSOR, "minmax")) == pytest.approx(0.41)


def test_losses_add_up_over_the_layers_of_a_region_by_the_size_of_their_traces() -> None:
    net = tiny(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    whole = Region("whole", ("0", "1", "3"))
    question = ask("Hessian", net, [(pictures(net, 1), None)], [whole, Region("0", ("0",))], WIDTHS)
    found = curvature_losses(question, "minmax", {"0": -16.0, "3": 6.0})
    for column, width in enumerate(WIDTHS):
        first, last = (rounding_error(rounded_layer(net.layer(name), width, "minmax")) for name in ("0", "3"))
        assert found[:, column].tolist() == pytest.approx([2.0 * first + 0.25 * last, 2.0 * first])


def test_calls_that_share_a_weight_get_weights_of_their_own() -> None:
    net = captured(body(lambda self, x: self.twice(self.twice(x)), twice=nn.Conv2d(6, 6, 1)))
    net = net.with_facts("canonical", "folded")
    layers = [layer for layer in net.layers() if layer.kind == "Conv"]
    assert layers[1].module.weight is layers[2].module.weight
    question = ask("Fisher", net, [(pictures(net, 1), None)], regions(net), WIDTHS)
    weights = own_weights(question)
    assert list(weights) == [layer.name for layer in layers] + ["head"]
    assert len({id(weight) for weight in weights.values()}) == 4
    asks = {name for name, value in question.net.graph.named_parameters() if value.requires_grad}
    assert asks == {f"{name}.weight" for name in weights}
    assert all(torch.equal(net.layer(name).module.weight, weight) for name, weight in weights.items())  # type: ignore[arg-type]


def test_labels_are_drawn_as_often_as_the_network_names_them() -> None:
    shares = torch.tensor([0.7, 0.2, 0.1])
    logits = (shares.log() + 3).expand(20_000, 3)
    found = drawn_labels(logits, torch.Generator().manual_seed(0))
    assert found.dtype == torch.int64 and found.shape == (20_000,)
    assert (found.bincount() / 20_000).tolist() == pytest.approx(shares.tolist(), abs=0.01)
    again = drawn_labels(logits, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)


def test_a_network_without_layers_to_round_has_no_curvature() -> None:
    net = tiny(nn.ReLU(), nn.Flatten(), size=(1, 1, 3))
    for row in (Hessian(), Fisher()):
        found = row.score(net, [(pictures(net, 2), None)], regions(net), WIDTHS)
        assert found.losses == {"0": (0.0, 0.0, 0.0)} and found.forwards == 0


def test_what_needs_no_gradient_of_its_own_is_left_alone() -> None:
    """BatchNorms that could not be folded, biases and slopes keep their values and get no gradient."""
    net = tiny(nn.Conv2d(1, 2, 2), nn.PReLU(2), nn.Flatten(), nn.Linear(8, 3))
    question = ask("Fisher", net, [(pictures(net, 1), None)], regions(net), WIDTHS)
    own_weights(question)
    assert not question.net.layer("1").module.weight.requires_grad  # type: ignore[union-attr]
    assert not question.net.layer("3").module.bias.requires_grad  # type: ignore[union-attr]
