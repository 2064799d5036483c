from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from fewbit.errors import NetworkError
from fewbit.load.capture import capture, load
from fewbit.load.card import card_from_options
from fewbit.net import Net
from torchvision_stub import need
from zoo import CLASSES, NETWORKS, SIZE, TIMM, timm_zoo, zoo

SMALL = (3, 64, 64)
LAYERS = {
    "resnet18": 69,
    "mobilenet_v2": 153,
    "efficientnet_b0": 249,
    "shufflenet_v2_x1_0": 243,
    "mobilenet_v3_small": 157,
    "googlenet": 197,
    "densenet121": 427,
    "vgg16": 39,
}
KINDS = {
    "resnet18": {"Conv": 20, "BatchNorm": 20, "Relu": 17, "Add": 8, "MaxPool": 1},
    "mobilenet_v2": {"Conv": 52, "Clip": 35, "Add": 10, "Dropout": 1},
    "efficientnet_b0": {"Conv": 81, "Silu": 49, "Sigmoid": 16, "Mul": 16, "DropPath": 9},
    "shufflenet_v2_x1_0": {"Conv": 56, "Slice": 26, "Concat": 16, "Permute": 16, "Reshape": 32},
    "mobilenet_v3_small": {"Conv": 52, "HardSwish": 19, "HardSigmoid": 9, "Mul": 9},
    "googlenet": {"Conv": 57, "Concat": 9, "MaxPool": 13},
    "densenet121": {"Conv": 120, "BatchNorm": 121, "Concat": 58, "AvgPool": 3},
    "vgg16": {"Conv": 13, "Linear": 3, "MaxPool": 5, "Dropout": 2},
}


def outputs_of(network: nn.Module | Net, images: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        result: torch.Tensor = network(images)
    return result


def check_training(model: nn.Module, net: Net, images: torch.Tensor) -> None:
    """A step in training mode gives the same logits and the same running statistics."""
    assert net.facts == frozenset()
    model.train()
    net.train()
    assert torch.equal(outputs_of(net, images), outputs_of(model, images))
    after = model.state_dict()
    statistics = [key for key in after if "running" in key or "num_batches" in key]
    found = net.graph.state_dict()
    assert all(torch.equal(found[key], after[key]) for key in statistics)


@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_network_is_captured_whole(name: str) -> None:
    model = zoo(name)
    size = SIZE if name == "vgg16" else SMALL
    started = time.perf_counter()
    net = capture(model, name, size, CLASSES)
    assert time.perf_counter() - started < 60
    images = torch.rand((2, *size), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(outputs_of(net, images), outputs_of(model, images), rtol=1e-5, atol=1e-6)
    kinds = [layer.kind for layer in net.layers()]
    assert len(kinds) == LAYERS[name]
    assert {kind: kinds.count(kind) for kind in KINDS[name]} == KINDS[name]
    assert net.graph.state_dict().keys() == model.state_dict().keys()
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        check_training(model, net, images)


@pytest.mark.parametrize("name", TIMM)
def test_timm_network_is_captured_whole(name: str) -> None:
    model = timm_zoo(name)
    net = capture(model, name, SMALL, CLASSES)
    images = torch.rand((2, *SMALL), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(outputs_of(net, images), outputs_of(model, images), rtol=1e-5, atol=1e-6)
    if "BatchNormAct2d" in {type(module).__name__ for module in model.modules()}:
        assert "BatchNorm" in {layer.kind for layer in net.layers()}
    check_training(model, net, images)


@pytest.mark.parametrize(
    ("source", "layers"), [("torchvision:mobilenet_v3_small", 157), ("timm:resnet18", 69)]
)
def test_card_by_name(source: str, layers: int) -> None:
    need(source.partition(":")[0])
    card = card_from_options(source, classes=1000, size=SMALL, mean=[0.5] * 3, std=[0.5] * 3)
    net = load(card, seed=4)
    assert len(net.layers()) == layers
    assert torch.equal(outputs_of(net, net.example()), outputs_of(load(card, seed=4), net.example()))


@pytest.mark.parametrize(
    ("source", "near"), [("torchvision:resnet81", "resnet18"), ("timm:resnet81", "resnet18")]
)
def test_name_that_the_package_does_not_have(source: str, near: str) -> None:

    need(source.partition(":")[0])
    card = card_from_options(source, classes=1000, size=SMALL, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(NetworkError, match=r"'resnet81' \(did you mean 'resnet18'\?\)"):
        load(card)
