from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fewbit.load.card import Card
from fewbit.load.model import build_model
from fewbit.net import Net
from real_names import NETWORKS

COUNTS = {
    "resnet20": {"Conv": 19, "BatchNorm": 19, "Add": 9, "Pad": 2, "Slice": 2, "Linear": 1},
    "resnet56": {"Conv": 55, "BatchNorm": 55, "Add": 27, "Pad": 2, "Slice": 2, "Linear": 1},
    "mobilenet_v1_025": {"Conv": 27, "BatchNorm": 27, "Clip": 27, "Pad": 5, "Linear": 1},
    "fdmobilenet_025": {"Conv": 23, "BatchNorm": 23, "Relu": 23, "Linear": 1},
    "mobilenet_v2": {"Conv": 52, "Clip": 35, "Add": 10, "Linear": 1},
    "squeezenet_v11": {"Conv": 26, "Relu": 26, "Concat": 8, "MaxPool": 3},
    "googlenet": {"Conv": 57, "Concat": 9, "MaxPool": 13, "LRN": 2, "Linear": 1},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_net_equals_the_model(
    name: str, card_of: Callable[[str], Card], net_of: Callable[[str], Net]
) -> None:
    card, net = card_of(name), net_of(name)
    model = build_model(card)
    images = torch.rand((3, *card.input.size), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(net(images), model(images))
    kinds = [layer.kind for layer in net.layers()]
    assert {kind: kinds.count(kind) for kind in COUNTS[name]} == COUNTS[name]
    state = model.state_dict()
    assert {key: value.shape for key, value in net.graph.state_dict().items()} == {
        key: value.shape for key, value in state.items()
    }


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v1_025"])
def test_training_equals_the_models(
    name: str, card_of: Callable[[str], Card], net_of: Callable[[str], Net]
) -> None:
    model, net = build_model(card_of(name)).train(), net_of(name).clone().train()
    images = torch.rand((2, *net.input_size), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(net(images), model(images))
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in net.graph.state_dict().items())
