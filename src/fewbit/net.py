"""Net: a network as a readable list of named layers with the edges between them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fewbit.errors import RecipeError
from fewbit.ops import kind_of


@dataclass(frozen=True)
class Layer:
    """One layer of a Net.

    Attributes:
        name: Its name; parts of the user's model keep theirs.
        kind: What it is: "Conv", "Relu", "Add", ...
        module: The module that computes it.
        inputs: Names of the layers that it reads; "input" is the image.
        node: Its place in the graph.
    """

    name: str
    kind: str
    module: nn.Module
    inputs: tuple[str, ...]
    node: fx.Node


@dataclass(frozen=True)
class Normal:
    """What a folded BatchNorm said of the layer before it: each output channel is about N(mean, std^2).

    Attributes:
        mean: float64 (C,).
        std: float64 (C,), never negative.
    """

    mean: Tensor
    std: Tensor


class Net:
    """A captured network: every node of its graph is the input, one layer, or the output.

    Args:
        graph: The graph; each call in it is a module with a kind (see `fewbit.ops`).
        name: Name of the network.
        input_size: (C, H, W).
        classes: Number of classes.
        facts: What has been done to it ("folded", "placed", "calibrated", ...).
        statistics: The distribution of a layer's output by its name, where a BatchNorm told it before it was
            folded; whoever scales or shifts an output replaces its record.
        image_range: The lowest and the highest value of each channel of an image, where the card tells it.

    Attributes:
        images: Images (N, C, H, W) made for this network, which every later step of a recipe takes in place
            of real ones; or none.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        name: str,
        input_size: tuple[int, int, int],
        classes: int,
        facts: frozenset[str] = frozenset(),
        statistics: Mapping[str, Normal] | None = None,
        image_range: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    ) -> None:
        self.graph = graph
        self.name = name
        self.input_size = input_size
        self.classes = classes
        self.facts = facts
        self.statistics = dict(statistics or {})
        self.image_range = image_range
        self.images: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, C, H, W)."""
        logits: Tensor = self.graph(x)
        return logits

    def __repr__(self) -> str:
        """Show the network as a list of its layers."""
        lines = [f"{layer.name:<40} {layer.kind:<14} <- {', '.join(layer.inputs)}" for layer in self.layers()]
        return f"Net {self.name} {self.input_size}\n" + "\n".join(lines)

    @property
    def image_node(self) -> fx.Node:
        """The node of the graph that stands for the images."""
        image: fx.Node = next(node for node in self.graph.graph.nodes if node.op == "placeholder")
        return image

    def layers(self) -> list[Layer]:
        """Return the layers in the order in which they run."""
        return list(self._layers())

    def _layers(self) -> Iterator[Layer]:
        for node in self.graph.graph.nodes:
            if node.op == "call_module":
                module = self.graph.get_submodule(str(node.target))
                inputs = tuple(name_of(source) for source in node.all_input_nodes)
                yield Layer(str(node.target), kind_of(module) or type(module).__name__, module, inputs, node)

    def layer(self, name: str) -> Layer:
        """Return a layer by its name.

        Raises:
            RecipeError: There is none.
        """
        for layer in self._layers():
            if layer.name == name:
                return layer
        raise RecipeError(f"{self.name}: has no layer '{name}'; `fewbit inspect` lists them")

    def edges(self) -> list[tuple[str, str]]:
        """Return (from, to) names of all edges."""
        return [(source, layer.name) for layer in self._layers() for source in layer.inputs]

    def clone(self) -> Net:
        """Return a copy that shares nothing with this one."""
        made = self._made_of(copy.deepcopy(self.graph), self.facts)
        made.images = None if self.images is None else self.images.clone()
        return made

    def with_facts(self, *facts: str) -> Net:
        """Return the same network with more facts."""
        return self._made_of(self.graph, self.facts | set(facts))

    def _made_of(self, graph: fx.GraphModule, facts: frozenset[str]) -> Net:
        size, classes = self.input_size, self.classes
        made = Net(graph, self.name, size, classes, facts, self.statistics, self.image_range)
        made.images = self.images
        return made

    def train(self, mode: bool = True) -> Net:
        """Switch to training mode, as `model.train()` would.

        Raises:
            RecipeError: The model's forward goes another way in training than the captured one.
        """
        if mode and "eval_only" in self.facts:
            raise RecipeError(
                f"{self.name}: its forward goes another way in training, so the captured network can only be "
                "evaluated; choose a recipe without training, or rewrite the forward without `self.training`"
            )
        self.graph.train(mode)
        return self

    def eval(self) -> Net:
        """Switch to evaluation mode."""
        return self.train(False)

    def example(self, images: int = 1) -> Tensor:
        """Return zeros of the input's shape (images, C, H, W)."""
        return torch.zeros((images, *self.input_size))

    def refresh(self) -> None:
        """Check and compile the graph again after a change, and drop layers that nothing reads."""
        self.graph.graph.eliminate_dead_code()
        self.graph.delete_all_unused_submodules()
        self.graph.graph.lint()
        self.graph.recompile()


def name_of(node: fx.Node) -> str:
    """Return the name of the layer that a node computes; "input" for the image."""
    return "input" if node.op == "placeholder" else str(node.target)


def add_layer(net: fx.GraphModule, name: str, module: nn.Module, *inputs: fx.Node) -> fx.Node:
    """Add a layer at the graph's insertion point under a name that is free, and return its node."""
    taken = {str(node.target) for node in net.graph.nodes} | {"input"}
    unique, count = name, 0
    while unique in taken or _is_module(net, unique):
        count += 1
        unique = f"{name}_{count}"
    net.add_submodule(unique, module)
    return net.graph.call_module(unique, inputs)


def _is_module(net: fx.GraphModule, name: str) -> bool:
    try:
        net.get_submodule(name)
    except AttributeError:
        return False
    return True
