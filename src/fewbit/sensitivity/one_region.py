"""Running a float network with one region rounded and all else in float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fewbit.net import Layer, name_of
from fewbit.place.place import quantized_layer
from fewbit.place.quantizer import Quantizer, QuantLayer
from fewbit.place.regions import Region
from fewbit.ranges.calibrate import method, set_weight_grid
from fewbit.ranges.range_finder import RangeFinder
from fewbit.sensitivity.score import Question, Tell, activation_grid
from fewbit.spec import Frozen, QuantSpec

Values = dict[fx.Node, Tensor]


class OneRegion(Frozen):
    """How one region is rounded; the hyperparameters of the rows that run the network so.

    Attributes:
        ranges: Row of the registry's `ranges` that finds the ranges of weights.
        activations: The grid of what the region's convolutions and matrix products read; none leaves it in
            float.
        activation_ranges: Row of `ranges` for them, from the images given.
    """

    ranges: str = "minmax"
    activations: QuantSpec | None = None
    activation_ranges: str = "minmax"


@dataclass(frozen=True)
class Logits:
    """What the network says to one batch with one region rounded.

    Attributes:
        place: The indexes of the region and the width.
        exact: Logits (N, classes) in float.
        found: Logits with the region rounded.
        labels: The images' classes, or none.
    """

    place: tuple[int, int]
    exact: Tensor
    found: Tensor
    labels: Tensor | None


def rounded_layer(layer: Layer, spec: QuantSpec, ranges: str) -> QuantLayer:
    """Return a convolution or matrix product that rounds its weight, with its range."""
    module = quantized_layer(layer, spec)
    set_weight_grid(module, method(ranges, {}))
    return module


def _rounded_layers(
    question: Question, region: Region, width: QuantSpec, ranges: str
) -> dict[fx.Node, QuantLayer]:
    return {layer.node: rounded_layer(layer, width, ranges) for layer in question.matrices[region.name]}


class Walk:
    """Runs the network in float once a batch, and once more behind each region for each width.

    A run with one region rounded takes all that the region does not change from the float run.

    Args:
        question: Its regions and widths are run through.
        how: How they are rounded.

    Attributes:
        forwards: The runs so far, in those of the whole network over all images.
    """

    def __init__(self, question: Question, how: OneRegion) -> None:
        self.question, self.how, self.forwards = question, how, 0.0
        graph = question.net.graph.graph
        self._layers = question.net.layers()
        self._image = question.net.image_node
        self._end = next(node for node in graph.nodes if node.op == "output").all_input_nodes[0]
        self._rounded = [
            [_rounded_layers(question, region, width, how.ranges) for width in question.widths]
            for region in question.regions
        ]
        self._products: dict[fx.Node, int] = {}
        self._quantizers: dict[fx.Node, Quantizer] = {}

    def run(self, tell: Tell | None = None) -> Iterator[Logits]:
        """Yield the logits of each batch, region and width.

        Raises:
            NetworkError: The float logits are not finite.
        """
        batches = self.question.batches
        if self.how.activations is not None:
            self._quantizers = self._calibrate(self.how.activations)
        for index, (images, labels) in enumerate(batches):
            values = self._in_float(images)
            exact = self.question.finite(values[self._end])
            for place, row in enumerate(self._rounded):
                for width, modules in enumerate(row):
                    found = self._changed(values, modules).get(self._end, exact)
                    yield Logits((place, width), exact, found, labels)
                if tell is not None:
                    tell((index + (place + 1) / len(self._rounded)) / len(batches))

    def _calibrate(self, spec: QuantSpec) -> dict[fx.Node, Quantizer]:
        grid = activation_grid(self.question.row, spec)
        chosen = method(self.how.activation_ranges, {})
        finders: dict[fx.Node, RangeFinder] = {}
        for layer in self.question.layers.values():
            source = layer.node.all_input_nodes[0]
            finders.setdefault(source, chosen.start(name_of(source)))
        for images, _ in self.question.batches:
            values = self._in_float(images)
            for node, finder in finders.items():
                finder.observe(values[node])
        made: dict[fx.Node, Quantizer] = {}
        for node, finder in finders.items():
            made[node] = Quantizer(grid, name_of(node))
            found = finder.find(grid)
            made[node].set_range(found.low, found.high)
        return made

    def _in_float(self, images: Tensor) -> Values:
        values: Values = {self._image: images}
        with torch.no_grad():
            for layer in self._layers:
                values[layer.node] = layer.module(*[values[node] for node in _read(layer.node)])
        for layer in self._layers:
            self._products[layer.node] = products(layer.module, values[layer.node])
        self._count(self._layers, len(images))
        return values

    def _changed(self, values: Values, modules: Mapping[fx.Node, QuantLayer]) -> Values:
        """Return the values that differ from the float ones."""
        found: Values = {}
        ran: list[Layer] = []
        with torch.no_grad():
            for layer in self._layers:
                node, read = layer.node, _read(layer.node)
                if node not in modules and not any(source in found for source in read):
                    continue
                taken = [found.get(source, values[source]) for source in read]
                if node in modules and read[0] in self._quantizers:
                    taken[0] = self._quantizers[read[0]](taken[0])
                found[node] = modules.get(node, layer.module)(*taken)
                ran.append(layer)
        self._count(ran, len(values[self._image]))
        return found

    def _count(self, layers: list[Layer], images: int) -> None:
        whole = sum(self._products.values()) or 1
        done = sum(self._products[layer.node] for layer in layers)
        self.forwards += done / whole * images / self.question.images


def products(module: nn.Module, output: Tensor) -> int:
    """Return how many multiplications a convolution or matrix product takes for one image; else 0."""
    if not isinstance(module, nn.Conv2d | nn.Linear):
        return 0
    return output[0].numel() * module.weight[0].numel()


def _read(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.args if isinstance(source, fx.Node)]
