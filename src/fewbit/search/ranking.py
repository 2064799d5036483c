"""In which order layers are left in float: by what each one's rounding does to the whole network's answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fewbit.net import Layer, Net
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLinear

_PIXELS = 4_000_000


def images_for_ranking(input_size: tuple[int, int, int]) -> int:
    """Return how many images are enough, fewer of larger ones: 16 to 128.

    >>> images_for_ranking((3, 32, 32)), images_for_ranking((3, 224, 224))
    (128, 79)
    """
    return max(16, min(128, _PIXELS // (input_size[1] * input_size[2])))


def rank_layers(net: Net, quantized: Net, batches: Sequence[Tensor]) -> tuple[str, ...]:
    """Order the convolutions and matrix products by what leaving each alone in float would mend.

    The score of a layer is how much ``sum over images KL(softmax(float) || softmax(quantized))`` falls
    when its weight, and its input where nothing else reads it, are not rounded: measured in the full
    graph, every other layer rounded.

    Args:
        net: The float network.
        quantized: The same, quantized and calibrated; its quantizers are switched off and on again.
        batches: Images, float32 (N, C, H, W); few are enough.

    Returns:
        Names of the layers, the largest gain first.
    """
    layers = [layer for layer in quantized.layers() if isinstance(layer.module, QuantConv2d | QuantLinear)]
    with torch.no_grad():
        wanted = [net(images).double().log_softmax(1) for images in batches]
        whole = _divergence(quantized, batches, wanted)
        gains = []
        for layer in layers:
            switches = _switches(quantized, layer)
            for quantizer in switches:
                quantizer.enabled = False
            gains.append(whole - _divergence(quantized, batches, wanted))
            for quantizer in switches:
                quantizer.enabled = True
    order = sorted(range(len(layers)), key=lambda i: (-gains[i], i))
    return tuple(layers[i].name for i in order)


def _divergence(net: Net, batches: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    total = 0.0
    for images, before in zip(batches, wanted, strict=True):
        after = net(images).double().log_softmax(1)
        total += float((before.exp() * (before - after)).sum())
    return total


def _switches(net: Net, layer: Layer) -> list[Quantizer | DynamicQuantizer]:
    """The quantizers that would go with this layer: of its weight, and of its input if it alone reads it."""
    assert isinstance(layer.module, QuantConv2d | QuantLinear)
    found: list[Quantizer | DynamicQuantizer] = [layer.module.weight_quantizer]
    source = layer.node.args[0]
    if isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1:
        module = net.graph.get_submodule(str(source.target))
        calls = sum(
            node.op == "call_module" and node.target == source.target for node in net.graph.graph.nodes
        )
        if isinstance(module, Quantizer | DynamicQuantizer) and calls == 1:
            found.append(module)
    return found
