"""BRECQ: block reconstruction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from fewbit.improve.descend import Descent, descend
from fewbit.improve.reconstruct import Problem, reconstruct
from fewbit.improve.units import split_into_blocks, split_into_layers
from fewbit.net import Net
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer, QuantLinear
from fewbit.step import Context, Step, StepReport

_AT_ONCE, _PIXELS_AT_ONCE, _FISHER = 64, 1 << 20, "fisher"


class BRECQ(Step):
    """Reconstruct each block's output: first the rounding of its weights, then the steps of its activations.

    The second-order change of the loss is taken block by block, with the Hessian at a block's output z
    replaced by the identity ("mse") or by the diagonal of the Fisher matrix ("fisher")::

        min  sum_i F_i (z~_i - z_i)^2,      F_i = 1  or  (dL / dz_i)^2,  L = KL(float logits, logits)

    Stage 1 learns rounding as AdaRound does, in all layers of the block together, activations in float.
    Stage 2 learns activation steps by the gradient of LSQ.

    Attributes:
        images: At most so many calibration images.
        units: "block", or "layer" for one layer at a time.
        weighting: "mse" or "fisher".
        iterations: Steps of Adam a block in stage 1.
        step_iterations: In stage 2; 0 leaves the steps as calibrated.
        batch: Images an iteration.
        values: At most so many values of tensors an iteration; large ones take fewer images, never under 4.
        group: Layers in a row that make a block where the network has none.
        lr_rounding: Learning rate of V.
        lr_step: Learning rate of the logarithm of activation steps.
        regularization: Lambda.
        warm_up: Share of the iterations without the regulariser.
        beta_start: Its exponent at first.
        beta_end: Its exponent in the end.

    Source: Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction",
    2021, arXiv 2102.05426.
    Differs: a hundred times the learning rate of rounding, 25 times that of steps, ten times lambda and a
    hundredth of the iterations; rounding keeps its rate,
    that of steps falls along a cosine; large feature maps take fewer images an iteration; the Fisher
    factors are scaled to a mean of 1 in each unit, so that lambda means the same; the genetic search over
    widths is not here.

    Example:
        >>> BRECQ(units="layer").units
        'layer'
    """

    needs = frozenset({"calibrated"})
    gives = frozenset({"rounded"})

    images: int = Field(1024, ge=1)
    units: Literal["block", "layer"] = "block"
    weighting: Literal["mse", "fisher"] = "mse"
    iterations: int = Field(200, ge=1)
    step_iterations: int = Field(50, ge=0)
    batch: int = Field(32, ge=1)
    values: int = Field(1 << 20, ge=1)
    group: int = Field(2, ge=1)
    lr_rounding: float = Field(0.1, gt=0)
    lr_step: float = Field(0.01, ge=0)
    regularization: float = Field(0.1, ge=0)
    warm_up: float = Field(0.2, ge=0, lt=1)
    beta_start: float = Field(20.0, ge=1)
    beta_end: float = Field(2.0, ge=1)

    def __call__(self, net: Net, context: Context) -> StepReport:
        """Reconstruct in place."""
        layers = self.units == "layer"
        units = split_into_layers(net) if layers else split_into_blocks(net, self.group)
        return reconstruct(self, "brecq", net, context, units, self.images, self._solve)

    def _solve(self, problem: Problem) -> str:
        weights = fisher(problem) if self.weighting == "fisher" else None
        try:
            return self._learn(problem, weights)
        finally:
            problem.exact.drop(_FISHER)

    def _learn(self, problem: Problem, weights: Callable[[Tensor], Tensor] | None) -> str:
        rounding = Descent(
            iterations=self.iterations,
            batch=self.batch,
            values=self.values,
            activations="float",
            lr_rounding=self.lr_rounding,
            regularization=self.regularization,
            warm_up=self.warm_up,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
        )
        note = descend(problem, rounding, weights)
        if self.step_iterations and self.lr_step:
            steps = Descent(
                iterations=self.step_iterations,
                batch=self.batch,
                values=self.values,
                rounding=False,
                lr_step=self.lr_step,
            )
            descend(problem, steps, weights)
        return note


def fisher(problem: Problem) -> Callable[[Tensor], Tensor] | None:
    """Return what gives (dL / dz)^2 of a unit's output for chosen images, scaled to a mean of 1.

    L is the divergence of the logits from the float network's when the unit and all before it are rounded
    and all behind it is float. None where the unit has several outputs or makes the logits itself. The
    factors lie beside the unit's tensors, under their memory limit.
    """
    behind = _behind(problem)
    if len(problem.unit.outputs) != 1 or not behind:
        return None
    output = problem.unit.outputs[0]
    total, count = 0.0, 0
    at_once = max(1, min(_AT_ONCE, _PIXELS_AT_ONCE // math.prod(problem.net.input_size)))
    for start in range(0, problem.images, at_once):
        which = slice(start, min(start + at_once, problem.images))
        squares = _squared_gradient(problem, behind, output, which)
        problem.exact.put(_FISHER, squares, start, problem.images)
        total, count = total + float(squares.sum(dtype=torch.float64)), count + squares.numel()
    gain = count / max(total, 1e-30)
    return lambda chosen: problem.exact.take(_FISHER, chosen) * gain


def _behind(problem: Problem) -> list[fx.Node]:
    nodes = [node for node in problem.net.graph.graph.nodes if node.op == "call_module"]
    return nodes[nodes.index(problem.unit.nodes[-1]) + 1 :]


def _squared_gradient(problem: Problem, behind: list[fx.Node], output: fx.Node, which: slice) -> Tensor:
    exact = {node: problem.exact.take(node, which) for node in problem.held(behind)}
    modules = {node: problem.net.graph.get_submodule(str(node.target)) for node in behind}
    rounded = {node: problem.rounded.take(node, which) for node in problem.unit.inputs}
    with torch.no_grad():
        for node in problem.unit.nodes:
            module = problem.net.graph.get_submodule(str(node.target))
            rounded[node] = module(*[rounded[s] for s in node.args if isinstance(s, fx.Node)])
        wanted = _logits(exact, behind, modules).log_softmax(-1)
    begin = rounded[output].detach().requires_grad_()
    found = _logits({**exact, output: begin}, behind, modules).log_softmax(-1)
    loss = (wanted.exp() * (wanted - found)).sum()
    (gradient,) = torch.autograd.grad(loss, begin)
    return gradient.square()


def _logits(
    known: dict[fx.Node, Tensor], behind: list[fx.Node], modules: dict[fx.Node, torch.nn.Module]
) -> Tensor:
    """Run what is behind a unit in float."""
    values = dict(known)
    for node in behind:
        module = modules[node]
        inputs = [values[s] for s in node.args if isinstance(s, fx.Node)]
        if isinstance(module, Quantizer | DynamicQuantizer):
            values[node] = inputs[0]
        elif isinstance(module, QuantConv2d | QuantLinear):
            values[node] = _in_float(module, inputs[0])
        else:
            values[node] = module(*inputs)
    return values[behind[-1]]


def _in_float(module: QuantConv2d | QuantLinear, x: Tensor) -> Tensor:
    module.weight_quantizer.enabled = False
    try:
        result: Tensor = module(x)
        return result
    finally:
        module.weight_quantizer.enabled = True
