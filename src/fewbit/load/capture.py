"""Capture: a model becomes a Net, by our own Tracer with the leaf table."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from fewbit.errors import NetworkError, first_line
from fewbit.load import convert, shapes  # noqa: F401  (their rows enter the table)
from fewbit.load.builder import (
    BROADCASTS,
    FRESH,
    FUNCTIONS,
    IN_PLACE,
    METHODS,
    Builder,
    Converter,
    Size,
    resolve,
)
from fewbit.load.card import Card
from fewbit.load.leaves import module_layer
from fewbit.load.model import build_model
from fewbit.load.tracer import Root, Tracer
from fewbit.net import Net

_GAP = 1e-4


def load(card: Card, seed: int = 0) -> Net:
    """Build the network of a card, read its weights and capture it.

    Args:
        card: Says where the model and the weights are.
        seed: Of the initial weights where the card names none.

    Returns:
        The Net, in evaluation mode.

    Raises:
        NetworkError: The model cannot be built or captured, or its weights do not fit.
        ModelFileError: The .onnx file cannot be used.
    """
    if card.source.kind == "onnx":
        from fewbit.load.onnx_in import load_onnx

        net = load_onnx(card)
    else:
        model = build_model(card, seed)
        net = capture(model, card.network.name, card.input.size, card.network.classes)
    net.image_range = card.input.value_range
    return net


def capture(model: nn.Module, name: str, input_size: tuple[int, int, int], classes: int | None = None) -> Net:
    """Capture a model as a Net.

    The model is copied, not touched. The Net has the model's own layers under their own names; switching
    it to training mode does what `model.train()` does. Where a forward goes another way in training than
    in evaluation, the Net has the fact "eval_only" and refuses training mode.

    Args:
        model: Takes images (N, C, H, W), returns logits (N, classes).
        name: Name of the network.
        input_size: (C, H, W).
        classes: Number of classes, checked where given.

    Returns:
        The Net, in evaluation mode.

    Raises:
        NetworkError: The model decides by the values in a tensor, uses an operation that no layer stands
            for, refuses the input size, or returns another number of classes.

    Example:
        >>> net = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
        ...               "tiny", (3, 4, 4))
        >>> [layer.kind for layer in net.layers()]
        ['Conv', 'Relu', 'Flatten', 'Linear']
    """
    root = Root(_plain_copy(model, name))
    images = torch.rand((3, *input_size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        logits = _run_model(root, images.clone(), name, classes)
        two, three = _trace(root, images[:2].clone(), name), _trace(root, images.clone(), name)
        alike = _trains_alike(root, two, images[:2].clone())
        facts: frozenset[str] = frozenset() if alike else frozenset({"eval_only"})
        graph = _Rebuild(root, two, _sizes(two, three, name), name).run()
        net = Net(graph, name, input_size, int(logits.shape[1]), facts).eval()
        _check_same(net, images, logits)
    return net


def _plain_copy(model: nn.Module, name: str) -> nn.Module:
    """Copy a model for evaluation in float32; weights computed by parametrizations become plain ones."""
    try:
        copy = deepcopy(model)
    except (RuntimeError, TypeError) as reason:
        raise NetworkError(
            f"{name}: cannot be copied ({first_line(reason)}); keep no tensor computed from parameters in "
            "it, as torch.nn.utils.weight_norm does"
        ) from reason
    for module in list(copy.modules()):
        if parametrize.is_parametrized(module):
            values = {key: getattr(module, key).detach() for key in module.parametrizations}  # type: ignore[union-attr]
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for key, value in values.items():
                module.register_parameter(key, nn.Parameter(value))
    return copy.to("cpu", torch.float32).eval()


def _run_model(root: Root, images: Tensor, name: str, classes: int | None) -> Tensor:
    size = tuple(images.shape[1:])
    try:
        logits = root(images)
    except Exception as reason:
        raise NetworkError(
            f"{name}: refuses images of size {size} ({first_line(reason)}); "
            "set [input] size to what the model takes"
        ) from reason
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise NetworkError(
            f"{name}: returns {what} for {len(images)} images; a classifier returns logits (N, classes): "
            "give a factory that makes such a model"
        )
    if classes is not None and logits.shape[1] != classes:
        raise NetworkError(
            f"{name}: returns {logits.shape[1]} classes, the card says {classes}; "
            f"set [network] classes = {logits.shape[1]} or pass the right arguments to the factory"
        )
    if not bool(torch.isfinite(logits).all()):
        raise NetworkError(f"{name}: its logits are not finite on a random image; check its weights")
    return logits


def _trace(root: Root, images: Tensor, name: str) -> Tracer:
    tracer = Tracer(images)
    try:
        tracer.graph = tracer.trace(root)
    except Exception as reason:
        raise NetworkError(
            f"{name}: cannot be captured ({first_line(reason)}); "
            "its forward must not depend on the values of a tensor"
        ) from reason
    return tracer


def _calls(tracer: Tracer) -> list[fx.Node]:
    return [node for node in tracer.graph.nodes if node.op != "get_attr"]


def _sizes(two: Tracer, three: Tracer, name: str) -> dict[fx.Node, Any]:
    """Tell the batch axis of each traced result by comparing a run of two images with one of three."""
    if [(n.op, n.target) for n in _calls(two)] != [(n.op, n.target) for n in _calls(three)]:
        raise NetworkError(
            f"{name}: cannot be captured (it does other things for 3 images than for 2); "
            "its forward must not depend on the number of images"
        )
    sizes: dict[fx.Node, Any] = {}
    for node, other in zip(_calls(two), _calls(three), strict=True):
        if node.op == "output":
            continue
        first, second = two.results[node], three.results[other]
        lists = isinstance(first, list)
        pairs = zip(first, second, strict=True) if lists else [(first, second)]
        found = [_size(a, b, _layer_name(two, node), name) for a, b in pairs]
        sizes[node] = found if lists else found[0]
    return sizes


def _size(two: tuple[int, ...], three: tuple[int, ...], layer: str, name: str) -> Size:
    axes = [axis for axis, (a, b) in enumerate(zip(two, three, strict=False)) if a != b]
    if len(two) != len(three) or len(axes) != 1 or two[axes[0]] * 3 != three[axes[0]] * 2:
        raise NetworkError(
            f"{name}: layer '{layer}' returns {two} for 2 images and {three} for 3; "
            "one axis must grow with the number of images, the others stay: keep the images apart"
        )
    return Size(two, axes[0])


def _trains_alike(root: Root, evaluating: Tracer, images: Tensor) -> bool:
    """Tell whether the model makes the same calls in training mode."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in root.parameters()}
    copy = deepcopy(root, memo).train()
    tracer = Tracer(images)
    try:
        tracer.graph = tracer.trace(copy)
    except Exception:  # noqa: BLE001  (whatever its forward raises in training, evaluation still works)
        return False
    if [(n.op, n.target) for n in _calls(tracer)] != [(n.op, n.target) for n in _calls(evaluating)]:
        return False
    if len(_outputs(tracer)) != 1:
        return False
    return all(copy.get_submodule(str(n.target)).training for n in _calls(tracer) if n.op == "call_module")


def _outputs(tracer: Tracer) -> list[fx.Node]:
    outputs: list[fx.Node] = next(n for n in tracer.graph.nodes if n.op == "output").all_input_nodes
    return outputs


def _check_same(net: Net, images: Tensor, logits: Tensor) -> None:
    try:
        gap = float((net(images) - logits).abs().max() / logits.abs().max().clamp(min=1e-6))
    except RuntimeError as reason:
        raise NetworkError(
            f"{net.name}: the captured network fails ({first_line(reason)}); "
            "the model's forward changes a tensor in place that it reads again: rewrite that part"
        ) from reason
    if not gap <= _GAP:
        raise NetworkError(
            f"{net.name}: the captured network differs from the model by {gap:.1e} of its largest logit; "
            "does its forward draw random numbers in evaluation, or change a view in place? rewrite that part"
        )


class _Rebuild:
    """Makes the graph anew with one layer for each traced call.

    Args:
        root: The model.
        traced: Its calls.
        sizes: What they return.
        name: Name of the network.
    """

    def __init__(self, root: Root, traced: Tracer, sizes: dict[fx.Node, Any], name: str) -> None:
        self.root, self.traced, self.results, self.name = root, traced, sizes, name
        self.graph = fx.GraphModule(nn.Module(), fx.Graph())
        self.known: dict[fx.Node, Any] = {}
        self.origin: dict[fx.Node, fx.Node] = {}
        self.sizes: dict[fx.Node, Size] = {}
        self.reserved = {_short(path) for path, _ in root.named_modules()}
        self.taken: set[str] = set()
        self.used: set[int] = set()
        self.parameters = {p.data_ptr(): p for p in root.parameters()}

    def run(self) -> fx.GraphModule:
        """Return the new graph."""
        for node in self.traced.graph.nodes:
            self.origin[node] = node
            if node.op == "placeholder":
                self.known[node] = self.graph.graph.placeholder("input")
                self.sizes[self.known[node]] = self.results[node]
            elif node.op == "get_attr":
                self.known[node] = self._constant(node)
            elif node.op == "output":
                self.graph.graph.output(resolve(node.args[0], self.known))
            else:
                before = self.known.get(node.args[0]) if node.args else None
                self.known[node] = self._convert(node)
                self._note_alias(node, before)
        self.graph.graph.eliminate_dead_code()
        self.graph.delete_all_unused_submodules()
        self.graph.graph.lint()
        self.graph.recompile()
        return self.graph

    def _constant(self, node: fx.Node) -> Tensor:
        value: Any = self.root
        for part in str(node.target).split("."):
            value = getattr(value, part)
        parameter = self.parameters.get(value.data_ptr())
        viewed = parameter is not None and parameter.numel() == value.numel()
        if viewed and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value)  # in the same memory
        constant: Tensor = value
        return constant

    def _convert(self, node: fx.Node) -> Any:
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        name = self._owner_of_weight(node) or _layer_name(self.traced, node)
        if module is not None and id(module) not in self.used:
            self.reserved.discard(name)
        self.taken.add(name)
        builder = Builder(self.graph, name, self.sizes, self.results[node], self.reserved)
        converter = self._converter(builder, node, module)
        word = getattr(node.target, "__name__", node.target)
        try:
            if converter not in BROADCASTS:
                self._check_not_expanded(builder, node)
            args = resolve(node.args, self.known)
            kwargs = {key: resolve(value, self.known) for key, value in node.kwargs.items()}
            return converter(builder, *args, **kwargs)
        except NetworkError as reason:
            raise NetworkError(f"{self.name}: {reason}") from reason
        except (TypeError, ValueError, AttributeError, RuntimeError) as reason:
            error = builder.refuse(f"this form of '{word}' ({first_line(reason)})")
            raise NetworkError(f"{self.name}: {error}") from reason

    def _check_not_expanded(self, builder: Builder, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            layer = self.known[source]
            if isinstance(layer, fx.Node) and self.sizes[layer] != self.results[source]:
                raise builder.refuse("expanding a tensor for anything but arithmetic")

    def _owner_of_weight(self, node: fx.Node) -> str:
        """Return the path of the module whose forward is just this convolution or matrix product."""
        if node.target not in (F.linear, F.conv2d) or not isinstance(node.args[1], fx.Node):
            return ""
        path, _, key = str(node.args[1].target).rpartition(".")
        name = _short(path)
        alone = not any(other == name or other.startswith(f"{name}.") for other in self.taken)
        if key != "weight" or path != self.traced.owners[node] or not alone or not name:
            return ""
        self.reserved.discard(name)
        return name

    def _converter(self, builder: Builder, node: fx.Node, module: nn.Module | None) -> Converter:
        if module is not None:
            if id(module) in self.used:  # called twice: each call is a layer of its own
                module = _share(module)
            self.used.add(id(module))
            return lambda b, *args, **kwargs: module_layer(b, module, *args, **kwargs)
        table: dict[Any, Converter] = METHODS if node.op == "call_method" else FUNCTIONS
        converter = table.get(node.target)
        if converter is None:
            word = str(getattr(node.target, "__name__", node.target)).strip("_")
            error = builder.refuse(f"operation '{word}'")
            raise NetworkError(f"{self.name}: {error}")
        return converter

    def _note_alias(self, node: fx.Node, before: Any) -> None:
        """Note which traced values are one tensor, so that a change in place reaches all readers."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not isinstance(before, fx.Node):
            return
        if self._in_place(node):
            for other, root in self.origin.items():
                if root is self.origin[source] and self.known.get(other) is before:
                    self.known[other] = self.known[node]
            self.origin[node] = self.origin[source]
        elif self.known[node] is before and node.target not in FRESH:
            self.origin[node] = self.origin[source]

    def _in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.root.get_submodule(str(node.target)), "inplace", False))
        return node.target in IN_PLACE or bool(node.kwargs.get("inplace", False))


def _share(module: nn.Module) -> nn.Module:
    """Copy a module but keep its parameters and buffers, which both calls train and read."""
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return deepcopy(module, memo)


def _short(path: str) -> str:
    return path.removeprefix("model").removeprefix(".")


def _layer_name(tracer: Tracer, node: fx.Node) -> str:
    """Name a layer by its module's path, or by the path of the module whose forward calls it."""
    if node.op == "call_module":
        return _short(str(node.target)) or "model"
    word = str(getattr(node.target, "__name__", node.target)).strip("_")
    owner = _short(tracer.owners[node])
    return f"{owner}.{word}" if owner else word
