"""Placing: which tensors get a quantizer, from Scheme and Target."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator

from torch import fx, nn

from fewbit import ops
from fewbit.errors import RecipeError, suggest
from fewbit.net import Layer, Net, add_layer, name_of
from fewbit.place.power_quantizer import PowerQuantizer
from fewbit.place.quantizer import (
    DynamicQuantizer,
    PixelQuantizer,
    QuantConv2d,
    Quantizer,
    QuantLayer,
    QuantLinear,
)
from fewbit.place.targets import Target
from fewbit.spec import QuantSpec, Rule, Scheme
from fewbit.step import Context, Step, StepReport

MATRIX = ("Conv", "Linear")
FITTING_BITS = 7  # 2 x 255 x 63 fits 16 bits, 2 x 255 x 127 does not


class Place(Step):
    """Put quantizers where the Target's engine computes in integers, and nowhere else.

    A tensor is quantized when a convolution or matrix product in integers reads it, directly or through
    layers that the engine runs in integers. No quantizer stands between a layer and the activation that
    its kernel fuses. Layers that move or select values, and concatenations, share one quantizer between
    their inputs and their output, so their ranges are equal by construction.
    """

    needs = frozenset({"canonical"})
    before = frozenset({"placed"})
    gives = frozenset({"placed"})

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Place in place."""
        if context.target.splits_silu and context.scheme.mode == "static":
            _split_silu(net)
        plan = _Plan(net, context.scheme, context.target)
        matrices = [layer for layer in net.layers() if layer.name in plan.integer]
        for layer in matrices:
            spec = plan.weight_spec(layer.name)
            _check_grid(layer, spec, context.scheme)
            _quantize_weight(net, layer, spec)
        if context.scheme.mode == "static":
            changed = _place_static(net, plan)
        elif context.scheme.mode == "dynamic":
            changed = _place_dynamic(net, plan, matrices)
        else:
            changed = 0
        net.refresh()
        return StepReport(step="place", changed=changed + len(matrices), notes=plan.notes())


class _Plan:
    """Which layers run in integers, and by which rules."""

    def __init__(self, net: Net, scheme: Scheme, target: Target) -> None:
        self.net, self.scheme, self.target = net, scheme, target
        self.layers = {layer.node: layer for layer in net.layers()}
        self.matrices = [layer.name for layer in self.layers.values() if layer.kind in MATRIX]
        self.names = {layer.name for layer in self.layers.values()}
        self.depthwise = {layer.name for layer in self.layers.values() if is_depthwise(layer.module)}
        self._check_rules()
        self.integer = {
            name for name in self.matrices if not (rule := self.rule(name)) or not rule.keep_float
        }
        self.wanted: dict[fx.Node, bool] = {}
        fused = {kind for kinds in target.fuses.values() for kind in kinds}
        self.through = target.integer_kinds | target.sharing_kinds | fused

    def _check_rules(self) -> None:
        names = [layer.name for layer in self.layers.values()]
        for rule in self.scheme.rules:
            known = rule.match in ("first", "last", "input", *names)
            if not known and not fnmatch.filter(names, rule.match):
                raise RecipeError(
                    f"rule '{rule.match}'{suggest(rule.match, names)}: no layer of {self.net.name} matches; "
                    "`fewbit inspect` lists them"
                )

    def rule(self, name: str) -> Rule | None:
        """Return the first rule that matches a layer."""
        for rule in self.scheme.rules:
            if self._matches(rule.match, name):
                return rule
        return None

    def _matches(self, match: str, name: str) -> bool:
        if match in self.names:
            return name == match
        ends = {"first": self.matrices[:1], "last": self.matrices[-1:]}.get(match)
        return name in ends if ends is not None else fnmatch.fnmatchcase(name, match)

    def weight_spec(self, name: str) -> QuantSpec:
        """Return the grid of a layer's weights."""
        rule = self.rule(name)
        spec = rule.weights if rule is not None and rule.weights is not None else self.scheme.weights
        if self.target.exact_sums or name in self.depthwise or self.scheme.mode == "weights_only":
            return spec
        return spec.model_copy(update={"bits": min(spec.bits, FITTING_BITS)})

    def activation_spec(self, name: str) -> QuantSpec:
        """Return the grid of a layer's output, narrowed to what the Target runs fast."""
        rule = self.rule(name)
        chosen = rule.activations if rule is not None else None
        return self._narrowed(chosen or self.scheme.activations)

    def tensor_spec(self, group: Iterable[fx.Node]) -> QuantSpec:
        """Return the grid that the tensors of a group share.

        The finest that the rule of a reader asks for, else of a layer that makes one of them.
        """
        read = self.inputs_spec(group)
        if read is not None:
            return read
        rules = [self.rule(name) for node in group for name in self._makers(node)]
        asked = [rule.activations for rule in rules if rule is not None and rule.activations is not None]
        return self._narrowed(max(asked, key=lambda spec: spec.bits, default=self.scheme.activations))

    def inputs_spec(self, group: Iterable[fx.Node]) -> QuantSpec | None:
        """Return the finest grid that the rule of a layer which reads one of a group's tensors asks for."""
        readers = [self.layers[user] for node in group for user in node.users if user in self.layers]
        rules = [self.rule(layer.name) for layer in readers if layer.name in self.integer]
        asked = [rule.inputs for rule in rules if rule is not None and rule.inputs is not None]
        return self._narrowed(max(asked, key=lambda spec: spec.bits)) if asked else None

    def _makers(self, node: fx.Node) -> Iterator[str]:
        """Yield the names of the layers that make a tensor in one kernel; "input" for the image."""
        yield name_of(node)
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and self.fused_into(source) is node:
            yield from self._makers(source)

    def _narrowed(self, spec: QuantSpec) -> QuantSpec:
        if self.target.symmetric_activations:
            return spec.model_copy(update={"symmetric": True, "signed": True})
        return spec

    def keeps_float(self, layer: Layer) -> bool:
        """Tell whether a rule leaves this layer in float."""
        rule = self.rule(layer.name)
        return rule is not None and rule.keep_float

    def fused_into(self, node: fx.Node) -> fx.Node | None:
        """Return the activation behind a node that the engine computes in the same kernel."""
        layer = self.layers.get(node)
        if layer is None or len(node.users) != 1:
            return None
        user = next(iter(node.users))
        after = self.layers.get(user)
        if after is not None and after.kind in self.target.fuses.get(layer.kind, ()):
            return user
        return None

    def residual_of(self, node: fx.Node) -> bool:
        """Tell whether a convolution's result goes straight into the sum that alone reads it, in float."""
        layer = self.layers.get(node)
        if not self.target.fuses_residual or layer is None or layer.kind != "Conv" or len(node.users) != 1:
            return False
        user = self.layers.get(next(iter(node.users)))
        if user is None or user.kind != "Add":
            return False
        first = next((a for a in user.node.args if self._is_lone_conv(a)), None)
        return first is node

    def _is_lone_conv(self, node: object) -> bool:
        if not isinstance(node, fx.Node):
            return False
        layer = self.layers.get(node)
        return layer is not None and layer.kind == "Conv" and len(node.users) == 1

    def is_wanted(self, node: fx.Node) -> bool:
        """Tell whether integers read a node's value, directly or through layers that run in integers."""
        if node not in self.wanted:
            self.wanted[node] = False  # graphs have no cycles; this only guards the recursion
            self.wanted[node] = any(self._passes(user) for user in node.users)
        return self.wanted[node]

    def _passes(self, user: fx.Node) -> bool:
        layer = self.layers.get(user)
        if layer is None:
            return False
        if layer.kind in MATRIX:
            return layer.name in self.integer
        if self.keeps_float(layer):
            return False
        if self._is_normed(layer):
            return any(self.is_wanted(norm) for norm in user.users)
        return layer.kind in self.through and self.is_wanted(user)

    def _is_normed(self, layer: Layer) -> bool:
        """Tell whether a layer joins tensors for BatchNorms alone, so that each keeps a grid of its own."""
        readers = [self.layers[user].kind if user in self.layers else "" for user in layer.node.users]
        return self.target.rounds_for_norms and layer.kind == "Concat" and set(readers) == {"BatchNorm"}

    def notes(self) -> tuple[str, ...]:
        """Say which layers stay in float."""
        left = [name for name in self.matrices if name not in self.integer]
        return (f"left in float: {', '.join(left)}",) if left else ()


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether a layer is a depthwise convolution, whose kernels sum no pairs of products."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def weight_specs(net: Net, scheme: Scheme, target: Target) -> dict[str, QuantSpec]:
    """Return the grid that placing would give the weights of each layer; those left in float are missing."""
    plan = _Plan(net, scheme, target)
    return {name: plan.weight_spec(name) for name in plan.matrices if name in plan.integer}


def fused_residuals(net: Net, target: Target) -> dict[fx.Node, fx.Node]:
    """Return, for each sum that the engine computes inside a convolution's kernel, that convolution."""
    plan = _Plan(net, Scheme(), target)
    return {next(iter(node.users)): node for node in plan.layers if plan.residual_of(node)}


def _check_grid(layer: Layer, spec: QuantSpec, scheme: Scheme) -> None:
    if spec.grid == "power" and scheme.mode != "weights_only":
        raise RecipeError(
            f"layer '{layer.name}': weights on the grid 'power' have no integer arithmetic; "
            'set mode = "weights_only" in [scheme], or grid = "uniform" for its weights'
        )


def quantized_layer(layer: Layer, spec: QuantSpec) -> QuantLayer:
    """Return a convolution or matrix product that rounds its weight to a grid, still without range."""
    module: QuantLayer
    if isinstance(layer.module, nn.Conv2d):
        module = QuantConv2d(layer.module, spec, layer.name)
    else:
        assert isinstance(layer.module, nn.Linear)
        module = QuantLinear(layer.module, spec, layer.name)
    if spec.grid == "power":
        module.weight_quantizer = PowerQuantizer(spec, module.weight_quantizer.name)
    return module


def _quantize_weight(net: Net, layer: Layer, spec: QuantSpec) -> None:
    parent, _, leaf = layer.name.rpartition(".")
    setattr(net.graph.get_submodule(parent), leaf, quantized_layer(layer, spec))


def _place_dynamic(net: Net, plan: _Plan, matrices: list[Layer]) -> int:
    """Put a quantizer with run-time parameters in front of each matrix product, one for each tensor."""
    made: dict[fx.Node, fx.Node] = {}
    for layer in matrices:
        if not plan.weight_spec(layer.name).symmetric:
            raise RecipeError(
                f"layer '{layer.name}': dynamic quantization takes symmetric weights; "
                "set symmetric = true in [scheme.weights]"
            )
        source = layer.node.args[0]
        assert isinstance(source, fx.Node)
        if source not in made:
            spec = plan.inputs_spec((source,)) or plan.activation_spec(layer.name)
            if spec.power_of_two:
                raise RecipeError(
                    f"layer '{layer.name}': dynamic quantization takes each scale from a sample at run time, "
                    "never a power of two; set power_of_two = false in [scheme.activations]"
                )
            with net.graph.graph.inserting_after(source):
                name = f"quantizers.{source.name}"
                made[source] = add_layer(net.graph, name, DynamicQuantizer(spec, name_of(source)), source)
        layer.node.replace_input_with(source, made[source])
    return len(made)


def _place_static(net: Net, plan: _Plan) -> int:
    tails = _tails(net, plan)
    groups = _share(net, plan, tails)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node, root in groups.items():
        members.setdefault(root, []).append(node)
    specs = {root: plan.tensor_spec(group) for root, group in members.items()}
    made: dict[fx.Node, Quantizer] = {}
    count = 0
    for node in tails:
        root = groups[node]
        first = root not in made
        if first:
            made[root] = _quantizer_of(plan, members[root], specs[root], name_of(root))
            net.graph.add_submodule(f"quantizers.{root.name}", made[root])
        users = list(node.users)
        with net.graph.graph.inserting_after(node):
            quantizer = net.graph.graph.call_module(f"quantizers.{root.name}", (node,))
        for user in users:
            user.replace_input_with(node, quantizer)
        count += first
    return count


def _quantizer_of(plan: _Plan, group: list[fx.Node], spec: QuantSpec, name: str) -> Quantizer:
    """Return the quantizer that the tensors of a group share; pixels have theirs."""
    pixels = any(node in plan.layers and isinstance(plan.layers[node].module, ops.Pixels) for node in group)
    return PixelQuantizer(name) if pixels else Quantizer(spec, name)


def _tails(net: Net, plan: _Plan) -> list[fx.Node]:
    """Return the nodes whose values are quantized, in the order in which they run."""
    tails: list[fx.Node] = []
    quantized: set[fx.Node] = set()
    behind: dict[fx.Node, bool] = {}
    for node in net.graph.graph.nodes:
        if node.op not in ("placeholder", "call_module"):
            continue
        layer = plan.layers.get(node)
        forced = (
            layer is not None
            and plan.target.quantizes_output
            and (behind.pop(node, False) or (layer.kind == "Conv" and layer.name in plan.integer))
        )
        fused = plan.fused_into(node)
        if fused is not None:
            behind[fused] = forced
            continue
        keeps = layer is not None and layer.kind in plan.target.sharing_kinds
        carried = keeps and node.args[0] in quantized and not _ends(node)
        if (plan.is_wanted(node) and not plan.residual_of(node)) or forced or carried:
            tails.append(node)
            quantized.add(node)
    return tails


def _ends(node: fx.Node) -> bool:
    return all(user.op == "output" for user in node.users)


def _share(net: Net, plan: _Plan, tails: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return, for each quantized node, the node whose quantizer it shares."""
    root: dict[fx.Node, fx.Node] = {node: node for node in tails}

    def find(node: fx.Node) -> fx.Node:
        while root[node] is not node:
            node = root[node]
        return node

    for node in tails:
        layer = plan.layers.get(node)
        if layer is None or layer.kind not in plan.target.sharing_kinds | {"Concat"}:
            continue
        for source in node.all_input_nodes:
            if source in root:
                root[find(source)] = find(node)
    return {node: find(node) for node in tails}


def _split_silu(net: Net) -> None:
    """Write x * sigmoid(x) out, so that each half gets its own quantizer."""
    for layer in net.layers():
        if layer.kind != "Silu":
            continue
        source = layer.node.args[0]
        assert isinstance(source, fx.Node)
        with net.graph.graph.inserting_before(layer.node):
            gate = add_layer(net.graph, f"{layer.name}.sigmoid", nn.Sigmoid(), source)
            product = add_layer(net.graph, f"{layer.name}.mul", ops.Mul(), source, gate)
        layer.node.replace_all_uses_with(product)
        net.graph.graph.erase_node(layer.node)
    net.refresh()
