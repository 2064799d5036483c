"""The table of converters, and the Builder through which they add layers to a Net."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fewbit.errors import NetworkError
from fewbit.net import add_layer

Converter = Callable[..., Any]
FUNCTIONS: dict[Any, Converter] = {}
METHODS: dict[str, Converter] = {}
MODULES: dict[str, Converter] = {}
IN_PLACE: set[Any] = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
FRESH: set[Any] = set()  # calls that always return a new tensor, even where no layer stands for them
BROADCASTS: set[Converter] = set()  # of calls that may read an expanded tensor


@dataclass(frozen=True)
class Size:
    """The shape of a tensor.

    Attributes:
        dims: For two images.
        batch: The axis that grows with the number of images.
    """

    dims: tuple[int, ...]
    batch: int = 0

    @property
    def free(self) -> tuple[int, ...]:
        """The shape for any number of images: -1 on the axis that grows."""
        return (*self.dims[: self.batch], -1, *self.dims[self.batch + 1 :])

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.dims)


class Builder:
    """Adds layers for one traced call.

    Args:
        root: The new graph.
        name: Name for the layer.
        sizes: Size of every node of the new graph.
        result: Size of this call's result, or a list of them.
        reserved: Names that belong to other modules of the model.
    """

    def __init__(
        self, root: fx.GraphModule, name: str, sizes: dict[fx.Node, Size], result: Any, reserved: set[str]
    ) -> None:
        self.root, self.name, self.sizes, self.result = root, name, sizes, result
        self.reserved = reserved

    def add(self, module: nn.Module, *inputs: fx.Node, suffix: str = "", size: Size | None = None) -> fx.Node:
        """Add one layer and return its node.

        Args:
            module: The layer.
            inputs: What it reads.
            suffix: Told after the call's name where one call becomes several layers.
            size: Of its output; else that of the call's result.
        """
        node = add_layer(self.root, self._free_name(suffix), module, *inputs)
        self.sizes[node] = self.result if size is None else size
        return node

    def _free_name(self, suffix: str) -> str:
        wanted = f"{self.name}_{suffix}" if suffix else self.name
        name, count = wanted, 0
        while name in self.reserved:
            count += 1
            name = f"{wanted}_{count}"
        self.reserved.add(name)
        return name

    def size(self, node: fx.Node) -> Size:
        """Return the size of a node of the new graph."""
        return self.sizes[node]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a node of the new graph, for two images."""
        return self.sizes[node].dims

    def axis(self, node: fx.Node, dim: int) -> int:
        """Return an axis as a number from 0."""
        return dim % self.sizes[node].rank

    def refuse(self, what: str) -> NetworkError:
        """Return the error for a form of a call that no layer stands for."""
        return NetworkError(
            f"layer '{self.name}': {what} is not supported; "
            "rewrite it with the operations listed in docs/networks.md"
        )


def converts(*targets: Any, broadcasts: bool = False) -> Callable[[Converter], Converter]:
    """Enter a converter for functions, and for the methods (given as text) of a tensor."""

    def enter(converter: Converter) -> Converter:
        for target in targets:
            if isinstance(target, str):
                METHODS[target] = converter
                if target.endswith("_") and not target.endswith("__"):
                    IN_PLACE.add(target)
            else:
                FUNCTIONS[target] = converter
                if getattr(target, "__name__", "").endswith("_"):
                    IN_PLACE.add(target)
        if broadcasts:
            BROADCASTS.add(converter)
        return converter

    return enter


def resolve(value: Any, known: Mapping[fx.Node, Any]) -> Any:
    """Replace the nodes in a call's arguments by what is known of them."""
    if isinstance(value, fx.Node):
        return known[value]
    if isinstance(value, list | tuple):
        items = [resolve(v, known) for v in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, slice):
        return slice(*(resolve(v, known) for v in (value.start, value.stop, value.step)))
    return value
