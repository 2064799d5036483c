"""The order in which layers are left in float."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fewbit.load.capture import capture
from fewbit.place.targets import target
from fewbit.recipe import read_recipe, run_recipe
from fewbit.search.ranking import rank_layers
from fewbit.step import Context


class _Fragile(nn.Sequential):
    """The weights of one layer have one huge value in every channel: per channel scales cannot save it."""

    def __init__(self, bad: int) -> None:
        layers: list[nn.Module] = []
        for index in range(4):
            conv = nn.Conv2d(3 if index == 0 else 8, 8, 3, padding=1)
            if index == bad:
                with torch.no_grad():
                    conv.weight[:, 0, 0, 0] *= 40
            layers += [conv, nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@pytest.mark.parametrize("bad", [1, 3])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_layer_that_rounds_worst_comes_first(bad: int, engine: str) -> None:
    torch.manual_seed(0)
    net = capture(_Fragile(bad), "fragile", (3, 8, 8), 5)
    images = torch.randn(64, 3, 8, 8)

    def batches() -> Iterator[Tensor]:
        yield images

    recipe = read_recipe("int8")
    context = Context(scheme=recipe.scheme, target=target(engine), batches=batches, seed=0)
    quantized, _ = run_recipe(recipe, net, context)
    before = quantized(images)
    ranked = rank_layers(net, quantized, [images])
    assert ranked[0] == str(2 * bad)
    assert sorted(ranked) == ["0", "10", "2", "4", "6"]
    assert ranked == rank_layers(net, quantized, [images])
    torch.testing.assert_close(quantized(images), before, rtol=0, atol=0)  # every quantizer is on again
