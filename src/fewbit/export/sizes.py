"""The shapes of a Net's values, which a few emitters need."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from fewbit import ops
from fewbit.net import Net
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer

Shape = tuple[int, ...]


class _Shapes(fx.Interpreter):
    """Runs a network, no value rounded, and notes the shape of each."""

    def __init__(self, net: Net) -> None:
        super().__init__(net.graph)
        self.extra_traceback = False  # an error stays one line
        self.found: dict[str, Shape] = {}

    def run_node(self, n: fx.Node) -> Any:
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, Quantizer | DynamicQuantizer):
            value = self.env[n.all_input_nodes[0]]
        elif isinstance(module, QuantConv2d):
            value = ops.convolve(self.env[n.all_input_nodes[0]], module.weight, module.bias, module)
        else:
            value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n.name] = tuple(value.shape)
        return value


class Sizes:
    """The shape of every value of a Net, found by running it on zeros when first asked for.

    Args:
        net: Stays as it is.
    """

    def __init__(self, net: Net) -> None:
        self.net = net

    def of(self, node: fx.Node) -> Shape:
        """Return the shape of a node's value for two images."""
        return self._two[node.name]

    def free(self, node: fx.Node) -> Shape:
        """Return the shape of a node's value with -1 on the axis that grows with the number of images."""
        pairs = zip(self._two[node.name], self._three[node.name], strict=True)
        return tuple(a if a == b else -1 for a, b in pairs)

    @cached_property
    def _two(self) -> dict[str, Shape]:
        return self._run(2)

    @cached_property
    def _three(self) -> dict[str, Shape]:
        return self._run(3)

    def _run(self, images: int) -> dict[str, Shape]:
        net = self.net.clone().eval() if self.net.graph.training else self.net
        walk = _Shapes(net)
        with torch.no_grad():
            walk.run(net.example(images))
        return walk.found
