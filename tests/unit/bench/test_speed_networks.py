from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from torch import nn

from fewbit.load.capture import capture
from speed_networks import ZOO, Network, import_torchvision, model_of, open_network, settle_norms
from tiny_card import CARD, MODEL
from torchvision_stub import need


@pytest.fixture
def card(tmp_path: Path) -> Path:
    (tmp_path / "tiny.py").write_text(MODEL, encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(CARD, encoding="utf-8")
    return tmp_path / "tiny.toml"


def test_a_card_without_images_takes_random_ones_by_the_seed(card: Path) -> None:
    first, again, other = (open_network(str(card), seed, 5) for seed in (0, 0, 1))
    assert first.name == "tiny" and first.images.shape == (5, 3, 16, 16)
    assert first.images.dtype == np.float32
    assert np.array_equal(first.images, again.images) and not np.array_equal(first.images, other.images)
    assert first.macs == 14 * 14 * 16 * (27 + 16) + 16 * 4
    model = model_of(str(card), 0)
    x = torch.from_numpy(first.images)
    with torch.no_grad():
        assert torch.equal(model(x), first.net(x))


def test_multiplications_are_counted_in_groups() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    net = capture(model, "grouped", (4, 6, 6))
    grouped = Network("grouped", "grouped", net, np.zeros((0, 4, 6, 6), np.float32))
    assert grouped.macs == 4 * 4 * 8 * (2 * 9) + 8 * 3


def test_statistics_become_those_of_the_images() -> None:
    norm = nn.BatchNorm2d(3, momentum=0.3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm)
    batches = [torch.randn((4, 3, 8, 8), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    assert settle_norms(model, batches) is model
    with torch.no_grad():
        outputs = [model[0](images) for images in batches]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variance = torch.stack([y.var((0, 2, 3), correction=1) for y in outputs]).mean(0)
    assert norm.running_mean is not None and norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.momentum == 0.3 and not norm.training and not model.training


def test_a_network_of_the_zoo_keeps_its_activations_small() -> None:
    need("torchvision")
    model = model_of("mobilenet_v3_small", 0)
    with torch.no_grad():
        logits = model(torch.randn((1, 3, 224, 224), generator=torch.Generator().manual_seed(0)))
        same = model_of("mobilenet_v3_small", 0)(torch.zeros((1, 3, 224, 224)))
    assert logits.shape == (1, 1000) and 1e-4 < float(logits.std()) < 100
    assert torch.equal(same, model(torch.zeros((1, 3, 224, 224))))


def test_a_missing_torchvision_is_told_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(click.UsageError) as told:
        import_torchvision()
    assert told.value.message.startswith(f"the networks {', '.join(ZOO)} are torchvision's, which cannot be ")
    assert told.value.message.endswith("pip install --no-deps 'torchvision==0.28.*', or name cards")
    assert told.value.exit_code == 2
