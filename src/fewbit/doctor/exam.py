"""The exam: what is measured of each layer of a quantized network alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fewbit.doctor.activations import RoundedActivation
from fewbit.doctor.decibels import divergence, ratio_db
from fewbit.doctor.partial import Partial, Values
from fewbit.doctor.records import LayerExam, SharedInput
from fewbit.doctor.shifts import OutputShift
from fewbit.doctor.weights import weight_facts
from fewbit.net import Layer, Net, name_of
from fewbit.place.quantizer import QuantConv2d, Quantizer, QuantLayer, QuantLinear
from fewbit.sensitivity.records import LayerRecord
from fewbit.sensitivity.sqnr import layer_records


@dataclass
class _Result:
    """One layer's result with only its own switches on."""

    signal: float = 0.0
    noise: float = 0.0
    kl: float = 0.0
    flips: int = 0


@dataclass
class _Shared:
    """One input of a concatenation under the grid that it shares."""

    quantizer: Quantizer
    low: float = math.inf
    high: float = -math.inf
    signal: float = 0.0
    noise: float = 0.0

    def add(self, x: Tensor) -> None:
        """Take in one batch."""
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        self.signal += float(x.double().square().sum())
        self.noise += float((self.quantizer(x) - x).double().square().sum())

    def record(self, name: str) -> SharedInput:
        """Return what is kept of it."""
        ends = self.quantizer.range()
        seen = min(max(self.high, 0.0), ends[1]) - max(min(self.low, 0.0), ends[0])
        codes = 1 + seen / float(self.quantizer.scale)
        return SharedInput(
            name=name, low=self.low, high=self.high, codes=codes, sqnr_db=ratio_db(self.signal, self.noise)
        )


class Exam:
    """Looks at every layer of a quantized network alone.

    Args:
        exact: The float network, prepared as the recipe prepares it.
        net: Quantized from it, calibrated.
        batches: Images (N, C, H, W); few are enough. They are kept.

    Attributes:
        partial: The network with its switches.
        images: How many images were looked at.
    """

    def __init__(self, exact: Net, net: Net, batches: Iterable[Tensor]) -> None:
        self.partial = Partial(exact, net)
        self._exact, self._net, self._batches = exact, net, list(batches)
        self.images = sum(len(batch) for batch in self._batches)
        self._layers = [layer for layer in self.partial.layers if not isinstance(layer.module, Quantizer)]
        self._results: dict[str, _Result] = {}
        self._rounded: dict[str, RoundedActivation] = {}
        self._shifts: dict[str, OutputShift] = {}
        self._shared: dict[str, dict[str, _Shared]] = {}
        for batch in self._batches:
            self._look(batch)

    def records(self) -> tuple[LayerExam, ...]:
        """Return what was measured of each layer, and of the input where it is quantized."""
        known = layer_records(self._exact, self._net, self._batches)
        layers = {layer.name: layer for layer in self._layers}
        found = [self._record(record, layers[record.name]) for record in known if record.name in layers]
        image = self._input_record()
        return tuple(found) if image is None else (image, *found)

    def harm(self, layers: Iterable[str]) -> float:
        """Return the mean KL in nats with only the weights and results of some layers rounded."""
        wanted = set(layers)
        switches = frozenset(
            node for layer in self._layers if layer.name in wanted for node in self.partial.switches(layer)
        )
        if "input" in wanted:
            switches |= frozenset(self.partial.quantizers(self.partial.image))
        return self._divergence(switches)

    def whole(self) -> float:
        """Return the mean KL in nats of the quantized network."""
        return self._divergence(self.partial.every_switch())

    def _divergence(self, switches: frozenset[fx.Node]) -> float:
        total = 0.0
        for batch in self._batches:
            values = self.partial.exact(batch)
            changed = self.partial.changed(values, switches)
            total += divergence(self.partial.logits(values, {}), self.partial.logits(values, changed))
        return total / self.images

    def _look(self, batch: Tensor) -> None:
        partial = self.partial
        values = partial.exact(batch)
        self._look_at("input", partial.image, tuple(partial.quantizers(partial.image)), values)
        for layer in self._layers:
            self._look_at(layer.name, layer.node, partial.switches(layer), values)
            if isinstance(layer.module, QuantConv2d | QuantLinear):
                self._look_at_output(layer, layer.module, values)
            if layer.kind == "Concat":
                self._look_at_inputs(layer, values)

    def _look_at(self, name: str, node: fx.Node, switches: tuple[fx.Node, ...], values: Values) -> None:
        if not switches:
            return
        changed = self.partial.changed(values, switches)
        result = self._results.setdefault(name, _Result())
        end = switches[-1]
        exact, logits = values[end].double(), self.partial.logits(values, {})
        alone = self.partial.logits(values, changed)
        result.signal += float(exact.square().sum())
        result.noise += float((changed[end].double() - exact).square().sum())
        result.kl += divergence(logits, alone)
        result.flips += int((logits.argmax(1) != alone.argmax(1)).sum())
        behind = self.partial.quantizers(node)
        if behind:
            layer = self.partial.layer_of(behind[0])
            assert layer is not None
            rounded = self._rounded.setdefault(name, RoundedActivation(name, layer.module))
            with torch.no_grad():
                rounded.observe(values[node])

    def _look_at_output(self, layer: Layer, module: QuantLayer, values: Values) -> None:
        source = layer.node.args[0]
        assert isinstance(source, fx.Node)
        with torch.no_grad():
            rounded = module(values[source])
        axis = 1 if isinstance(module, QuantConv2d) else -1
        self._shifts.setdefault(layer.name, OutputShift()).add(values[layer.node], rounded, axis)

    def _look_at_inputs(self, layer: Layer, values: Values) -> None:
        behind = {str(node.target) for node in self.partial.quantizers(self.partial.tail(layer))}
        for node in layer.node.all_input_nodes:
            before = self.partial.layer_of(node)
            if before is None or str(node.target) not in behind or not isinstance(before.module, Quantizer):
                continue
            source = node.args[0]
            assert isinstance(source, fx.Node)
            shared = self._shared.setdefault(layer.name, {})
            with torch.no_grad():
                shared.setdefault(name_of(source), _Shared(before.module)).add(values[source])

    def _record(self, record: LayerRecord, layer: Layer) -> LayerExam:
        fields: dict[str, Any] = dict(record)
        fields |= self._alone(layer.name)
        if isinstance(layer.module, nn.Conv2d):
            fields["depthwise"] = layer.module.groups > 1 and layer.module.groups == layer.module.in_channels
        if isinstance(layer.module, QuantConv2d | QuantLinear):
            fields |= weight_facts(layer.module)
        if layer.name in self._shifts:
            fields |= self._shifts[layer.name].facts()
        shared = self._shared.get(layer.name, {})
        fields["inputs"] = tuple(one.record(name) for name, one in shared.items())
        return LayerExam(**fields)

    def _input_record(self) -> LayerExam | None:
        behind = self.partial.quantizers(self.partial.image)
        layer = self.partial.layer_of(behind[0]) if behind else None
        if layer is None or not isinstance(layer.module, Quantizer):
            return None
        low, high = layer.module.range()
        bits = layer.module.spec.bits
        return LayerExam(
            name="input", kind="Input", precision="int8", activation_bits=bits, low=low, high=high,
            activations=self._rounded["input"].histogram(), **self._alone("input"),
        )  # fmt: skip

    def _alone(self, name: str) -> dict[str, Any]:
        result = self._results.get(name)
        if result is None:
            return {}
        facts: dict[str, Any] = {
            "sqnr_alone_db": round(ratio_db(result.signal, result.noise), 3),
            "kl": max(0.0, result.kl / self.images),
            "flips": result.flips / self.images,
        }
        return facts | (self._rounded[name].facts() if name in self._rounded else {})
