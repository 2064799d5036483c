"""Calibrating: every quantizer gets its grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import fx

from fewbit import ops
from fewbit.errors import DataError, RecipeError
from fewbit.net import Net
from fewbit.numerics import round_up_to_power_of_two
from fewbit.place.power_quantizer import PowerQuantizer
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLayer, QuantLinear
from fewbit.ranges.float_pass import FloatPass, keep_freed_memory
from fewbit.ranges.range_finder import Range, RangeFinder, RangeMethod
from fewbit.ranges.requant import REQuant
from fewbit.ranges.weights import find_weight_range, weight_rows
from fewbit.registry import find
from fewbit.spec import Scheme
from fewbit.step import Context, Step, StepReport

_INT32_MAX = 2**31 - 1
_LOGITS_METHOD = "minmax"


class Calibrate(Step):
    """Give every quantizer its grid: weights from their values, activations from the calibration images.

    The images stream through the float network once; a tensor costs constant memory, whatever their
    number. A quantizer that several tensors share observes those that hold all their values, each by
    itself, and covers the range of each. Tensors that no convolution or matrix product reads (the way to the
    logits) are never clipped: they take min-max.

    Attributes:
        activations: Row of the registry's `ranges` for activations.
        activation_options: Its hyperparameters.
        weights: Row of `ranges` for weights.
        weight_options: Its hyperparameters.
    """

    needs = frozenset({"placed"})
    gives = frozenset({"calibrated"})

    activations: str = "minmax"
    activation_options: Mapping[str, Any] = Field(default_factory=dict)
    weights: str = "minmax"
    weight_options: Mapping[str, Any] = Field(default_factory=dict)

    def reads_images(self, scheme: Scheme) -> bool:
        """Tell whether activations have fixed grids."""
        return scheme.mode == "static"

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Calibrate in place."""
        weight_method = method(self.weights, self.weight_options)
        activation_method = method(self.activations, self.activation_options)
        for layer in net.layers():
            if isinstance(layer.module, QuantConv2d | QuantLinear):
                set_weight_grid(layer.module, weight_method)
        watched = watched_quantizers(net)
        if watched:
            _observe(net, watched, activation_method, context)
        notes = hold_biases(net)
        return StepReport(step="calibrate", changed=len({q.name for q in watched.values()}), notes=notes)


def method(name: str, options: Mapping[str, Any]) -> RangeMethod:
    """Return a range method by its row and hyperparameters.

    Raises:
        RecipeError: No such row, or hyperparameters that it does not take.
    """
    found: RangeMethod = find("ranges", name).from_data(dict(options), f"range method '{name}'", RecipeError)
    return found


def set_weight_grid(layer: QuantLayer, weight_method: RangeMethod) -> None:
    """Give a layer's weight its grid."""
    quantizer = layer.weight_quantizer
    if isinstance(quantizer, PowerQuantizer):
        _set_power_grid(layer, quantizer, weight_method)
        return
    found = find_weight_range(
        layer.weight.detach(), quantizer.spec, quantizer.axis, weight_method, quantizer.name
    )
    quantizer.set_range(found.low, found.high)


def _set_power_grid(layer: QuantLayer, quantizer: PowerQuantizer, weight_method: RangeMethod) -> None:
    if not isinstance(weight_method, REQuant):
        raise RecipeError(
            f"tensor '{quantizer.name}': is on a power grid, which only the range method 'requant' finds; "
            'give the step calibrate weights = "requant"'
        )
    rows = weight_rows(layer.weight, quantizer.spec, quantizer.axis, quantizer.name)
    grids = weight_method.power_grids(rows, quantizer.spec)
    one = quantizer.spec.granularity == "tensor"
    quantizer.set_power(*((v[0] if one else v) for v in (grids.exponent, grids.step)))


def watched_quantizers(net: Net) -> dict[fx.Node, Quantizer]:
    """Return the quantizer nodes to observe: in each shared group the ones that hold all of its values."""
    groups: dict[int, list[fx.Node]] = {}
    for layer in net.layers():
        if isinstance(layer.module, Quantizer):
            groups.setdefault(id(layer.module), []).append(layer.node)
    chosen: dict[fx.Node, Quantizer] = {}
    for nodes in groups.values():
        inside = {node: _derives(net, node, set(nodes)) for node in nodes}
        joined = {
            source for node in nodes if inside[node] == "Concat" for source in _sources(node, set(nodes))
        }
        for node in nodes:
            if inside[node] == "" or inside[node] == "Concat":
                quantizer = net.graph.get_submodule(str(node.target))
                if node not in joined:
                    assert isinstance(quantizer, Quantizer)
                    chosen[node] = quantizer
    return chosen


def _derives(net: Net, node: fx.Node, group: set[fx.Node]) -> str:
    """Return "Concat" or "moved" where a quantized value is made of values of its own group, else ""."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if not any(reader in group for reader in source.all_input_nodes):
        return ""
    layer = net.layer(str(source.target))
    if isinstance(layer.module, ops.Pad) and layer.module.value and math.isfinite(layer.module.value):
        return ""  # it adds a value of its own
    return "Concat" if layer.kind == "Concat" else "moved"


def _sources(node: fx.Node, group: set[fx.Node]) -> set[fx.Node]:
    """Return the group's quantizer nodes whose values a concatenation holds."""
    found: set[fx.Node] = set()
    layer = node.args[0]
    assert isinstance(layer, fx.Node)
    for reader in layer.all_input_nodes:
        if reader in group:
            found.add(reader)
    return found


def _observe(net: Net, watched: Mapping[fx.Node, Quantizer], chosen: RangeMethod, context: Context) -> None:
    plain = method(_LOGITS_METHOD, {})
    finders: dict[fx.Node, RangeFinder] = {}
    for node, quantizer in watched.items():
        kind = chosen if feeds_matrix(net, node) else plain
        finders[node] = kind.start(quantizer.name)
    float_pass, images = FloatPass(net, finders), 0
    with keep_freed_memory():
        for batch in context.batches():
            float_pass.show(batch)
            images += len(batch)
    if not images:
        raise DataError("calibration: no image came; give at least one with --data or --calibration")
    shared: dict[Quantizer, list[Range]] = {}
    for node, quantizer in watched.items():
        shared.setdefault(quantizer, []).append(finders[node].find(quantizer.spec))
    for quantizer, found in shared.items():
        quantizer.set_range(np.min([one.low for one in found]), np.max([one.high for one in found]))


def feeds_matrix(net: Net, node: fx.Node) -> bool:
    """Tell whether a convolution or matrix product comes anywhere behind a quantizer."""
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user in seen:
                continue
            if user.op == "call_module" and isinstance(
                net.graph.get_submodule(str(user.target)), QuantConv2d | QuantLinear
            ):
                return True
            seen.add(user)
            todo.append(user)
    return False


def input_quantizer(net: Net, layer_node: fx.Node) -> Quantizer | DynamicQuantizer | None:
    """Return the quantizer whose codes a layer reads, or none where it reads floats."""
    source = layer_node.args[0]
    if isinstance(source, fx.Node) and source.op == "call_module":
        module = net.graph.get_submodule(str(source.target))
        if isinstance(module, Quantizer | DynamicQuantizer):
            return module
    return None


def hold_biases(net: Net) -> tuple[str, ...]:
    """Widen the weight grid of channels whose bias would not fit int32 at scale Sx Sw[o].

    Dead channels have tiny weights and any bias; a wider grid costs them nothing.
    """
    notes = []
    for layer in net.layers():
        module = layer.module
        if not isinstance(module, QuantConv2d | QuantLinear) or module.bias is None:
            continue
        reads = input_quantizer(net, layer.node)
        if not isinstance(reads, Quantizer):
            continue
        quantizer = module.weight_quantizer
        need = module.bias.detach().abs().double() / (float(reads.scale) * 0.5 * _INT32_MAX)
        if quantizer.scale.dim() == 0:
            need = need.max()
        low = quantizer.scale.double() < need
        if bool(low.any()):
            scale = torch.maximum(quantizer.scale.double(), need)
            if quantizer.spec.power_of_two:
                scale = torch.from_numpy(round_up_to_power_of_two(scale.numpy()))
            quantizer.scale = scale.float()
            notes.append(f"{layer.name}: {int(low.sum())} weight grids widened so that the bias fits int32")
    return tuple(notes)
