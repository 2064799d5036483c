"""SiLU computed as another function that engines compute faster."""

from __future__ import annotations

import torch
from torch import fx, nn

from fewbit import ops
from fewbit.net import Net, Normal, add_layer, name_of
from fewbit.spec import SiluForm
from fewbit.step import Context, Step, StepReport

GELU_SCALE = 1.7729
"""The c of least greatest difference between ``x sigmoid(x)`` and ``c GELU(x / c)``."""


class ReplaceSiLU(Step):
    """Compute ``SiLU(x) = x sigmoid(x)`` behind a convolution as a function like it.

    An engine's kernel computes an exponential and a division a value, which in EfficientNet takes about half
    of all time. Two functions come near::

        "gelu"        c GELU(x / c), GELU(x) = x Phi(x), c = 1.7729    |difference| <= 0.025
        "hard_swish"  x clamp(x + 3, 0, 6) / 6                         |difference| <= 0.143

    The first is within a step of 8-bit codes that reach to 7; 1 / c goes into the weights of the convolution
    in front. What comes of it is measured as of any other recipe: everything behind, ranges and corrections
    too, sees the new function. OpenVINO computes both inside its convolutions. A SiLU that reads something
    else than a convolution, or a tensor that others read too, stays.

    Attributes:
        form: Which function takes its place.

    Source: Hendrycks, Gimpel, "Gaussian Error Linear Units (GELUs)", 2016, arXiv 1606.08415, section 2:
    ``GELU(x) ~ x sigmoid(1.702 x)``. Howard et al., "Searching for MobileNetV3", 2019, arXiv 1905.02244,
    section 5.2: hard-swish.
    Differs: the approximations are read from right to left, in a network that was trained with SiLU and is
    not trained again; c is that of the least greatest difference.
    """

    needs = frozenset({"canonical"})
    before = frozenset({"placed"})
    gives = frozenset({"approximated"})

    form: SiluForm = "gelu"

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Replace in place."""
        changed, kept = 0, []
        for layer in net.layers():
            if layer.kind != "Silu":
                continue
            conv = _conv_of(net, layer.node.args[0])
            if conv is None:
                kept.append(layer.name)
                continue
            self._replace(net, layer.node, conv)
            changed += 1
        net.refresh()
        notes = (f"left as they are: {', '.join(kept)}",) if kept else ()
        return StepReport(step="replace_silu", changed=changed, notes=notes)

    def _replace(self, net: Net, node: fx.Node, conv: nn.Conv2d) -> None:
        graph, name = net.graph, name_of(node)
        (source,) = node.all_input_nodes
        with graph.graph.inserting_before(node):
            if self.form == "hard_swish":
                new = add_layer(graph, f"{name}.hard_swish", nn.Hardswish(), source)
            else:
                _divide(net, source, conv)
                gelu = add_layer(graph, f"{name}.gelu", nn.GELU(), source)
                new = add_layer(graph, f"{name}.scaled", ops.Affine(torch.tensor(GELU_SCALE), None), gelu)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _conv_of(net: Net, node: object) -> nn.Conv2d | None:
    """Return the convolution that a node is, if nothing else reads it and it runs once."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
        return None
    module = net.graph.get_submodule(str(node.target))
    runs = sum(other.op == "call_module" and other.target == node.target for other in net.graph.graph.nodes)
    return module if isinstance(module, nn.Conv2d) and runs == 1 else None


def _divide(net: Net, node: fx.Node, conv: nn.Conv2d) -> None:
    """Let a convolution put out x / c in place of x."""
    conv.weight = nn.Parameter(conv.weight.detach() / GELU_SCALE)
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias.detach() / GELU_SCALE)
    normal = net.statistics.get(str(node.target))
    if normal is not None:
        net.statistics[str(node.target)] = Normal(normal.mean / GELU_SCALE, normal.std / GELU_SCALE)
