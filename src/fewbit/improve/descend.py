"""Gradient descent on one unit: rounding, steps and biases against its float output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fewbit import ops
from fewbit.improve.learned_step import Dropping, LearnedStep
from fewbit.improve.reconstruct import Problem, run_nodes
from fewbit.improve.soft_rounding import FixedCodes, SoftRounding, annealed, undecided
from fewbit.place.quantizer import DynamicQuantizer, QuantConv2d, Quantizer
from fewbit.spec import Frozen

_FEWEST = 4
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}


class Descent(Frozen):
    """How one unit is learned; every gradient method fills it in its own way.

    Attributes:
        iterations: Steps of Adam.
        batch: Images an iteration.
        values: At most so many values of the unit's tensors an iteration; where they are large it takes fewer
            images, but never under 4.
        rounding: Learn the rounding of weights; else they keep the codes that they have.
        activations: "float" inside the unit, "rounded", or "dropped": rounded at random.
        share: Of the values that are rounded where they are dropped.
        lr_rounding: Learning rate of V.
        lr_scale: Of the logarithm of weight scales, where the codes stay; 0 keeps them.
        lr_step: Of the logarithm of activation steps; 0 keeps them.
        lr_bias: Of biases; 0 keeps them.
        regularization: Lambda, weight of the regulariser.
        warm_up: Share of the iterations without it.
        beta_start, beta_end: Its exponent, from first to last.
        judges: One image in so many, drawn, is not learned from; where what was learned brings these images
            no nearer, everything stays as it was. 0: all are learned from, and nobody judges.
    """

    iterations: int
    batch: int
    values: int
    rounding: bool = True
    activations: Literal["float", "rounded", "dropped"] = "rounded"
    share: float = 0.5
    lr_rounding: float = 0.0
    lr_scale: float = 0.0
    lr_step: float = 0.0
    lr_bias: float = 0.0
    regularization: float = 0.0
    warm_up: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    judges: int = 0


def descend(problem: Problem, how: Descent, weights: Callable[[Tensor], Tensor] | None = None) -> str:
    """Learn one unit.

    The loss is the squared distance between the unit's outputs and those of the float network, summed over
    channels, averaged over images and positions::

        min_V,S,b  mean || z~ - z ||^2 + lambda sum (1 - |2 h(V) - 1|^beta)

    Args:
        problem: The unit and its tensors.
        how: Settings.
        weights: Gives, for the images chosen, factors of the squared distance (the diagonal of the Fisher
            matrix); none: 1.

    Returns:
        What a reader should know of it; "" where nothing.
    """
    kind = SoftRounding if how.rounding else FixedCodes
    soft: dict[fx.Node, SoftRounding | FixedCodes] = {
        node: kind(layer)
        for node, layer in problem.unit.layers.items()
        if layer.weight_quantizer.spec.grid == "uniform"
    }
    steps = {quantizer: LearnedStep(quantizer) for quantizer in problem.quantizers()}
    own = [steps[quantizer] for quantizer in problem.own_quantizers()]
    walk = _Walk(problem, how, soft, steps)
    groups = _learned(how, list(soft.values()), list(steps.values()), own)
    if not groups:
        return ""
    before = walk.judged()
    optimizer = torch.optim.Adam(groups, **_ADAM)  # type: ignore[arg-type]
    # V keeps its rate: what is undecided leaves the middle only when beta has fallen, which is at the end.
    falling = partial(_falling, iterations=how.iterations)
    shapes: list[Callable[[int], float]] = [falling if group["falls"] else _constant for group in groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shapes)
    for iteration in range(how.iterations):
        optimizer.zero_grad(set_to_none=True)
        chosen = walk.choose()
        loss = walk.loss(chosen, None if weights is None else weights(chosen))
        progress = iteration / how.iterations
        if how.rounding and progress >= how.warm_up:
            beta = annealed(progress, how.beta_start, how.beta_end, how.warm_up)
            loss = loss + how.regularization * sum(undecided(up, beta) for up in walk.ups.values())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        problem.tell((iteration + 1) / how.iterations)
    if not walk.judged() <= before:
        return f"{problem.unit.name}: left as it was, images that were not learned from came no nearer"
    for step in own if how.lr_step else ():
        step.finish()
    left = max((one.finish() for one in soft.values()), default=0.0)
    return (
        f"{problem.unit.name}: {left:.0%} of a layer's weights leant neither up nor down"
        if left > 0.05
        else ""
    )


def _learned(
    how: Descent,
    soft: Sequence[SoftRounding | FixedCodes],
    steps: Sequence[LearnedStep],
    own: Sequence[LearnedStep],
) -> list[dict[str, Any]]:
    """Return what is learned, with its rates, and ask for no gradient of the rest, which costs time."""
    of_v = [one.v for one in soft if isinstance(one, SoftRounding)]
    groups: list[tuple[list[nn.Parameter], float]] = [
        (of_v, how.lr_rounding),
        ([one.log_gain for one in soft if isinstance(one, FixedCodes)], how.lr_scale),
        ([one.bias for one in soft if one.bias is not None], how.lr_bias),
        ([one.log_step for one in steps if one in own], how.lr_step),
        ([one.log_step for one in steps if one not in own], 0.0),
    ]
    learned = []
    for parameters, rate in groups:
        for parameter in parameters:
            parameter.requires_grad_(rate > 0 and parameter.requires_grad)
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        if wanted:
            learned.append({"params": wanted, "lr": rate, "falls": parameters is not of_v})
    return learned


def _falling(iteration: int, iterations: int) -> float:
    """Return a factor of the learning rate that falls along a cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def _constant(iteration: int) -> float:
    return 1.0


class _Walk:
    """Runs a unit with soft weights and learned steps."""

    def __init__(
        self,
        problem: Problem,
        how: Descent,
        soft: Mapping[fx.Node, SoftRounding | FixedCodes],
        steps: Mapping[Quantizer, LearnedStep],
    ) -> None:
        self.problem, self.how, self.soft, self.steps = problem, how, soft, steps
        self.modules = {
            node: problem.net.graph.get_submodule(str(node.target)) for node in problem.unit.nodes
        }
        self.dropping = (
            Dropping(how.share, problem.second_generator()) if how.activations == "dropped" else None
        )
        self.ups: dict[fx.Node, Tensor] = {}
        self.idle = self._idle()
        every, judging = torch.arange(problem.images), problem.judges(how.judges)
        self.learned_from, self.judges = every[~judging], every[judging]
        values = run_nodes(problem.net, problem.unit, problem.unit.nodes, problem.rounded, slice(0, 1))
        each = sum(value.numel() for value in values.values())
        self.batch = min(len(self.learned_from), how.batch, max(_FEWEST, how.values // each))

    def _idle(self) -> set[fx.Node]:
        """Return each ReLU that only quantizers read, none of which lets values below 0 pass."""
        found: set[fx.Node] = set()
        if self.how.activations != "rounded":
            return found
        for node, module in self.modules.items():
            readers = [self.modules.get(reader) for reader in node.users]
            if isinstance(module, nn.ReLU) and node not in self.problem.unit.outputs:
                steps = [self.steps.get(r) if isinstance(r, Quantizer) else None for r in readers]
                if all(step is not None and step.can_rectify for step in steps):
                    found.add(node)
        return found

    def choose(self) -> Tensor:
        """Return the places of the images of one iteration."""
        places = torch.randint(0, len(self.learned_from), (self.batch,), generator=self.problem.generator)
        return self.learned_from[places]

    def judged(self) -> float:
        """Return the loss on the images that are not learned from, 0 where there are none."""
        with torch.no_grad():
            parts = [
                float(self.loss(some, None)) * len(some)
                for some in torch.split(self.judges, self.batch)
                if len(some)
            ]
        return sum(parts) / max(1, len(self.judges))

    def loss(self, chosen: Tensor, factors: Tensor | None) -> Tensor:
        """Return the squared distance from the float outputs."""
        values = {node: self._input(node, chosen) for node in self.problem.unit.inputs}
        self.ups = {n: soft.up() for n, soft in self.soft.items() if isinstance(soft, SoftRounding)}
        for node in self.problem.unit.nodes:
            values[node] = self._call(node, [values[s] for s in node.args if isinstance(s, fx.Node)])
        total = torch.zeros(())
        for node in self.problem.unit.outputs:
            squares = (values[node] - self.problem.exact.take(node, chosen)).square()
            if factors is not None:
                squares = squares * factors
            channels = squares.shape[1] if squares.dim() == 4 else squares.shape[-1]
            total = total + squares.sum() * (channels / squares.numel())
        return total

    def _input(self, node: fx.Node, chosen: Tensor) -> Tensor:
        rounded = self.problem.rounded.take(node, chosen)
        if self.dropping is None or node.op == "placeholder":
            return rounded
        return torch.lerp(self.problem.exact.take(node, chosen), rounded, self.dropping.mask(rounded))

    def _call(self, node: fx.Node, inputs: list[Tensor]) -> Tensor:
        module = self.modules[node]
        if isinstance(module, Quantizer) and module in self.steps:
            if self.how.activations == "float":
                return inputs[0]
            drops = self.dropping is not None and node not in self.problem.unit.outputs
            mask = self.dropping.mask(inputs[0]) if drops and self.dropping is not None else None
            rounded: Tensor = self.steps[module](inputs[0], mask, node.args[0] in self.idle)
            return rounded
        if isinstance(module, DynamicQuantizer) and self.how.activations == "float":
            return inputs[0]
        if node in self.idle:
            return inputs[0]
        if node in self.soft:
            return self._matrix(node, module, inputs[0])
        result: Tensor = module(*inputs)
        return result

    def _matrix(self, node: fx.Node, module: nn.Module, x: Tensor) -> Tensor:
        soft = self.soft[node]
        weight = soft(self.ups.get(node))
        if isinstance(module, QuantConv2d):
            return ops.convolve(x, weight, soft.bias, module)
        return nn.functional.linear(x, weight, soft.bias)
