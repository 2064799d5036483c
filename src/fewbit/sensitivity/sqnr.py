"""Signal to quantization noise: of the answers when one region is rounded, and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fewbit.net import Layer, Net
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLinear
from fewbit.place.regions import Region
from fewbit.place.targets import TARGETS
from fewbit.prepare.canonical import Canonical
from fewbit.prepare.fold_bn import FoldBN
from fewbit.ranges.float_pass import keep_freed_memory
from fewbit.sensitivity.one_region import OneRegion, Walk
from fewbit.sensitivity.records import Histogram, LayerRecord
from fewbit.sensitivity.score import LabelledBatch, Sensitivities, Tell, ask
from fewbit.spec import QuantSpec, Scheme
from fewbit.step import Context

_BINS = 64
_PIECE = 1 << 15  # what torch works on in one thread
_LEAST_SIGNAL = 1e-30
_BEST_DB = 200.0
DEAD = 1e-6
_MOVES = frozenset({"equalized", "absorbed", "approximated"})


class SQNR(OneRegion):
    """The share of noise in the logits when one region is rounded.

    With only region i rounded to k bits, z the float network's logits and z' those found::

        Omega_i(k) = sum (z - z')^2 / sum z^2

    over all images and classes. It is the reciprocal of the signal to quantization noise ratio at the
    logits, ``SQNR = -10 log10 Omega`` dB: noise powers of regions that do not depend on one another add up,
    decibels do not. No label is needed.

    Attributes:
        ranges: Row of the registry's `ranges` that finds the ranges of weights.
        activations: The grid of what the region's convolutions and matrix products read; none leaves it in
            float.
        activation_ranges: Row of `ranges` for them, from the images given.

    Source: D. D. Lin et al., Fixed Point Quantization of Deep Convolutional Networks, 2016,
        arXiv 1511.06393.
    Differs: measured at the logits, in place of a model of each layer's noise; as a share, not in dB.

    Example:
        >>> round(float(-10 * np.log10(0.14 / 6)), 4)     # z = (2, 1, -1), z' = (1.8, 1.3, -1.1)
        16.3202
    """

    def score(
        self,
        net: Net,
        batches: Sequence[LabelledBatch],
        regions: Sequence[Region],
        widths: Sequence[QuantSpec],
        seed: int = 0,
        tell: Tell | None = None,
    ) -> Sensitivities:
        """Return the share of noise for each region at each width; see `Sensitivity.score`."""
        question = ask("SQNR", net, batches, regions, widths)
        walk = Walk(question, self)
        signal, noise = (np.zeros((len(regions), len(widths))) for _ in range(2))
        for logits in walk.run(tell):
            signal[logits.place] += float(logits.exact.double().square().sum())
            noise[logits.place] += noise_power(logits.exact, logits.found)
        return question.answer("noise / signal", noise / np.maximum(signal, _LEAST_SIGNAL), walk.forwards)


def noise_power(exact: Tensor, found: Tensor) -> float:
    """Return ``sum (exact - found)^2``, in float64.

    >>> round(noise_power(torch.tensor([2.0, 1.0, -1.0]), torch.tensor([1.8, 1.3, -1.1])), 6)
    0.14
    """
    return _energy(exact, found)


def _energy(first: Tensor, second: Tensor | None = None) -> float:
    """Return ``sum (first - second)^2`` or ``sum first^2`` in float64, by pieces that caches hold."""
    a, b = first.reshape(-1), None if second is None else second.reshape(-1)
    total = 0.0
    for start in range(0, len(a), _PIECE):
        piece = a[start : start + _PIECE].double()
        if b is not None:
            piece = piece - b[start : start + _PIECE]
        total += float(torch.dot(piece, piece))
    return total


class _Outputs(fx.Interpreter):
    """Runs a network and keeps the output of every layer that is asked for, rounded where it is quantized."""

    def __init__(self, net: Net, names: set[str]) -> None:
        super().__init__(net.graph)
        self.extra_traceback = False  # an error stays one line
        self.names = names
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_module":
            rounds = isinstance(self.fetch_attr(str(n.target)), Quantizer | DynamicQuantizer)
            name = str(n.all_input_nodes[0].target) if rounds else str(n.target)
            if name in self.names:
                self.kept[name] = value
        return value


class Signal:
    """Power and histogram of one layer's output in float."""

    def __init__(self) -> None:
        self.power, self.low, self.high = 0.0, math.inf, -math.inf
        self.counts = torch.zeros(_BINS, dtype=torch.int64)

    def add(self, exact: Tensor) -> None:
        """Take in one batch; the first one fixes the histogram's ends."""
        self.power += _energy(exact)
        if self.low > self.high:
            low, high = torch.aminmax(exact)
            self.low, self.high = float(low), max(float(high), float(low) + 1e-9)
        inside = exact.flatten().float().clamp(self.low, self.high)
        self.counts += torch.histc(inside, _BINS, self.low, self.high).long()

    @property
    def seen(self) -> bool:
        """It took in a batch."""
        return self.low <= self.high

    def sqnr_db(self, noise: float) -> float:
        """Return 10 log10(signal / noise), at most 200 dB."""
        return (
            _BEST_DB if noise == 0 else min(_BEST_DB, 10 * math.log10(max(self.power, _LEAST_SIGNAL) / noise))
        )


def layer_records(
    float_net: Net, net: Net, batches: Iterable[Tensor], signals: dict[str, Signal] | None = None
) -> tuple[LayerRecord, ...]:
    """Compare a quantized network with its float original, layer by layer.

    SQNR of a layer's output y against its quantized value y'::

        10 log10( sum y^2 / sum (y - y')^2 )   dB

    with the noise of all layers before it in y' (accumulated) and of its own grid where it has one, over
    all images given. Where a step scaled or shifted tensors between layers, y is that of the quantized
    network with its quantizers off, unless the float network given went through that step too.

    Args:
        float_net: Its float form, or that as it was before quantizers were placed; or the captured network,
            which is rewritten as for ONNX Runtime.
        net: Quantized from it, or a float form of it.
        batches: Images (N, C, H, W) float32.
        signals: What earlier calls with the same float network and images saw of its layers, which is not
            looked at again; what this call sees is added.

    Returns:
        One record a layer, in the order in which they run.
    """
    moved = (net.facts - float_net.facts) & _MOVES
    exact = _switched_off(net) if moved else float_form(float_net)
    layers = [layer for layer in net.layers() if not isinstance(layer.module, Quantizer | DynamicQuantizer)]
    names = {layer.name for layer in layers} & {layer.name for layer in exact.layers()}
    known = {} if moved or signals is None else signals
    new = {name: Signal() for name in names if name not in known}
    noise = dict.fromkeys(names, 0.0)
    with torch.no_grad(), keep_freed_memory():
        for batch in batches:
            a, b = _Outputs(exact, names), _Outputs(net, names)
            a.run(batch)
            b.run(batch)
            for name in names:
                noise[name] += noise_power(a.kept[name], b.kept[name])
            for name, signal in new.items():
                signal.add(a.kept[name])
    known |= new
    return tuple(_record(net, layer, known.get(layer.name), noise.get(layer.name, 0.0)) for layer in layers)


def float_form(net: Net) -> Net:
    """Return the rewritten and folded copy of a captured network, with the quantized one's layer names."""
    if {"canonical", "folded"} <= net.facts:
        return net
    copy = net.clone().eval()
    context = Context(Scheme(), TARGETS["onnxruntime"], lambda: iter(()))
    for step in (Canonical(), FoldBN()):
        step(copy, context)
        copy = copy.with_facts(*step.gives)
    return copy


def _switched_off(net: Net) -> Net:
    """Return a copy of a quantized network in which nothing is rounded."""
    copy = net.clone()
    for module in copy.graph.modules():
        if isinstance(module, Quantizer | DynamicQuantizer):
            module.enabled = False
    return copy


def _record(net: Net, layer: Layer, signal: Signal | None, noise: float) -> LayerRecord:
    module = layer.module
    reader = _reader(net, layer.node)
    weight = getattr(module, "weight", None)
    weight = weight if isinstance(weight, Tensor) and isinstance(module, nn.Conv2d | nn.Linear) else None
    low, high = reader.range() if isinstance(reader, Quantizer) and reader.ready else (None, None)
    known = signal if signal is not None and signal.seen else None
    return LayerRecord(
        name=layer.name,
        kind=layer.kind,
        precision=_precision(net, layer, reader),
        weight_bits=module.weight_quantizer.spec.bits
        if isinstance(module, QuantConv2d | QuantLinear)
        else None,
        activation_bits=None if reader is None else reader.spec.bits,
        sqnr_db=None if known is None else round(known.sqnr_db(noise), 3),
        low=low,
        high=high,
        weight_range_ratio=None if weight is None else range_ratio(weight),
        weights=None if weight is None else histogram(weight),
        activations=None
        if known is None
        else Histogram(low=known.low, high=known.high, counts=tuple(known.counts.tolist())),
    )


def _reader(net: Net, node: fx.Node) -> Quantizer | DynamicQuantizer | None:
    """Return the quantizer that stands directly behind a node."""
    for user in node.users:
        module = _module(net, user)
        if isinstance(module, Quantizer | DynamicQuantizer):
            return module
    return None


def _precision(net: Net, layer: Layer, reader: Quantizer | DynamicQuantizer | None) -> str:
    from_codes = _reads_codes(net, layer.node)
    if isinstance(layer.module, nn.Conv2d | nn.Linear):
        return "int8" if from_codes and isinstance(layer.module, QuantConv2d | QuantLinear) else "float32"
    if from_codes:
        return "int8" if reader is not None or _is_rounded_behind(net, layer.node) else "float32"
    for source in layer.node.all_input_nodes:
        matrix = isinstance(_module(net, source), QuantConv2d | QuantLinear)
        if len(source.users) == 1 and (matrix or reader is not None):
            return "fused" if _reads_codes(net, source) else "float32"
    return "float32"


def _is_rounded_behind(net: Net, node: fx.Node) -> bool:
    """Tell whether the activation that alone reads a node is rounded: both are one kernel."""
    users = list(node.users)
    return len(users) == 1 and len(users[0].all_input_nodes) == 1 and _reader(net, users[0]) is not None


def _reads_codes(net: Net, node: fx.Node) -> bool:
    return any(isinstance(_module(net, s), Quantizer | DynamicQuantizer) for s in node.all_input_nodes)


def _module(net: Net, node: fx.Node) -> nn.Module | None:
    return net.graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def range_ratio(weight: Tensor) -> float:
    """Return the largest over the smallest channel maximum of a weight.

    Dead channels, below a millionth of the largest, are left out: a BatchNorm that training switched off
    leaves such weights.
    """
    peaks = weight.detach().abs().flatten(1).amax(1)
    alive = peaks[peaks > DEAD * peaks.max()]
    return float(alive.max() / alive.min()) if len(alive) else 1.0


def histogram(values: Tensor) -> Histogram:
    """Return the histogram of a tensor between its ends."""
    flat = values.detach().flatten().float()
    low, high = (float(v) for v in torch.aminmax(flat))
    high = max(high, low + 1e-9)
    counts = torch.histc(flat, _BINS, low, high)
    return Histogram(low=low, high=high, counts=tuple(int(c) for c in counts))
