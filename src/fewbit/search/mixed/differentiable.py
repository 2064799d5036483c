"""Differentiable search: options mixed by learned probabilities, which gradients move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from fewbit.errors import DataError, RecipeError
from fewbit.net import Net
from fewbit.ranges.weights import rounded
from fewbit.search.mixed.greedy import choose_greedily
from fewbit.search.mixed.problem import LOSS, Assignment, Problem
from fewbit.search.mixed.table import Choice, Floats, Table, tabulate
from fewbit.spec import Frozen, QuantSpec

Batch = tuple[Tensor, Tensor | None]
Objective = Callable[[Tensor, int], Tensor]
_LEAST = 1e-300
_LIKELY = 0.05


class Differentiable(Frozen):
    """Learn the probability of each region's options by gradients, and take the most probable.

    With logits theta_ik of option k of region i, each step of Adam descends::

        m_i = softmax(theta_i)     or, "gumbel":  m_i = softmax((theta_i + g) / tau),  g = -log(-log(u))
        L(m) + sum_c [max(0, lambda_c + rho e_c)^2 - lambda_c^2] / (2 rho)
        e_c = (expected cost_c - limit_c) / range of cost_c     lambda_c <- max(0, lambda_c + eta rho e_c)

    where the expected cost of a boundary is m_i^T C m_j and tau falls exponentially. L is the expected loss
    of the table (`search`), or that of a network (`search_network`) whose layers have the weights
    sum_k m_ik Q_k(W_i): cross entropy where labels are given, else the KL divergence from the float
    network's answers. Where the most probable options exceed a limit, greedy search lowers them at the least
    loss of log-probability; what is left of the limits goes to likely options that cost more.

    Attributes:
        mixing: "softmax", or "gumbel", which adds noise so that few options are mixed at a time.
        steps: Steps of Adam.
        rate: Its learning rate.
        tau_first: Temperature at the first step, where "gumbel".
        tau_last: Temperature at the last.
        stiffness: rho, how steeply exceeding a limit is punished.
        pressure: eta, how fast the punishment follows.

    Source: B. Wu et al., Mixed Precision Quantization of ConvNets via Differentiable Neural Architecture
    Search, 2018, arXiv 1812.00090 ("gumbel"); Z. Cai, N. Vasconcelos, Rethinking Differentiable Search for
    Mixed-Precision Neural Networks, 2020, arXiv 2004.05795 ("softmax").
    Differs: the weights stay as they are and only theta is learned, where the papers train both in turn;
    weights only, activations stay in float; a limit instead of a fixed weight of the cost: the multiplier
    lambda is found (an augmented Lagrangian); the answer is made to hold the limits, and nothing is
    retrained.

    Example:
        >>> from fewbit.search.mixed.problem import Option, Problem, Region
        >>> layers = [Region(n, (Option("w4", s, {"kb": k}), Option("w8", 0.0, {"kb": 2 * k})))
        ...           for n, s, k in (("conv1", 0.3, 1.0), ("conv2", 0.2, 4.0), ("fc", 0.1, 2.0))]
        >>> found = Differentiable().search(Problem(tuple(layers)), {"kb": 10.0})
        >>> found.options, found.loss, found.costs
        ({'conv1': 'w8', 'conv2': 'w4', 'fc': 'w8'}, 0.2, {'kb': 10.0})
    """

    mixing: Literal["softmax", "gumbel"] = "softmax"
    steps: int = Field(300, ge=1)
    rate: float = Field(0.1, gt=0)
    tau_first: float = Field(5.0, gt=0)
    tau_last: float = Field(0.5, gt=0)
    stiffness: float = Field(10.0, gt=0)
    pressure: float = Field(0.1, gt=0)

    def search(
        self, problem: Problem, limits: Mapping[str, float], seed: int = 0, objective: str = LOSS
    ) -> Assignment | None:
        """Descend the table's expected objective; see `Searcher.search`."""
        problem.check_limits(limits, objective)
        table = tabulate(problem)
        sums, at = _Expected(table), table.columns.index(objective)
        learned = self._learn(table, limits, lambda mixed, _: sums(mixed)[at], seed)
        return _most_probable(table, learned, limits, objective)

    def search_network(
        self,
        net: Net,
        batches: Sequence[Batch],
        grids: Mapping[str, QuantSpec | None],
        problem: Problem,
        limits: Mapping[str, float],
        seed: int = 0,
        method: str = "mse",
        tell: Callable[[float], None] | None = None,
    ) -> Assignment | None:
        """Descend what a network itself loses when the weights of its layers are mixed.

        Args:
            net: In float, its BatchNorms folded; stays as it is.
            batches: Images (N, C, H, W) float32 and their labels (N,) int64, or none; a batch a step, in
                turns that the seed shuffles.
            grids: What each option's name does to weights; none leaves them in float.
            problem: Its regions have the names of convolutions and matrix products. Its losses are only
                what the answer reports.
            limits: By name of a cost, the most that it may be.
            seed: Of the order of the batches and of the noise.
            method: Row of the registry's `ranges` that finds the ranges of the grids.
            tell: Told the fraction done.

        Returns:
            The assignment; none where none inside the limits was found.

        Raises:
            RecipeError: The network is quantized or not folded, a region is none of its layers, an option
                has no grid, or a limit is of no cost of the problem.
            DataError: No image came.
        """
        problem.check_limits(limits)
        table = tabulate(problem)
        loss = _NetworkLoss(net, batches, _mixtures(net, table, grids, method), seed, tell, self.steps)
        learned = self._learn(table, limits, loss, seed)
        return _most_probable(table, learned, limits, LOSS)

    def _learn(self, table: Table, limits: Mapping[str, float], objective: Objective, seed: int) -> Floats:
        """Return the probability (G, K) of each option after the last step."""
        sums, absent = _Expected(table), torch.from_numpy(~table.allowed())
        limited = [table.columns.index(name) for name, limit in limits.items() if np.isfinite(limit)]
        most = torch.from_numpy(table.limits_of(limits) / table.spread())[limited]
        theta = torch.zeros(absent.shape, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([theta], lr=self.rate)
        multipliers = torch.zeros(len(limited), dtype=torch.float64)
        noise = torch.Generator().manual_seed(seed)
        for step in range(self.steps):
            mixed = self._mix(theta.masked_fill(absent, -torch.inf), step, noise)
            excess = sums(mixed)[limited] - most
            pushed = (multipliers + self.stiffness * excess).clamp(min=0)
            punished = (pushed.square() - multipliers.square()).sum() / (2 * self.stiffness)
            optimizer.zero_grad()
            (objective(mixed, step) + punished).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            raised = multipliers + self.pressure * self.stiffness * excess.detach()
            multipliers = raised.clamp(min=0)
        learned = torch.softmax(theta.detach().masked_fill(absent, -torch.inf), 1)
        return np.asarray(learned.numpy(), np.float64)

    def _mix(self, theta: Tensor, step: int, noise: torch.Generator) -> Tensor:
        if self.mixing == "softmax":
            return torch.softmax(theta, 1)
        share = step / max(1, self.steps - 1)
        tau = self.tau_first * (self.tau_last / self.tau_first) ** share
        uniform = torch.rand(theta.shape, generator=noise, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        return torch.softmax((theta - torch.log(-torch.log(uniform))) / tau, 1)


class _Expected:
    """The sums that a choice has on average where each group draws its option by itself, in shares."""

    def __init__(self, table: Table) -> None:
        spread = table.spread()
        self.base = torch.from_numpy(table.base / spread)
        self.own = torch.from_numpy(table.values / spread)
        self.between = torch.from_numpy(table.pair_values / spread)
        self.pairs = torch.from_numpy(table.pairs)

    def __call__(self, mixed: Tensor) -> Tensor:
        """Return the sums (columns,) of probabilities (G, K)."""
        first, second = mixed[self.pairs[:, 0]], mixed[self.pairs[:, 1]]
        own = torch.einsum("gk,gkc->c", mixed, self.own)
        return self.base + own + torch.einsum("ek,el,eklc->c", first, second, self.between)


class _NetworkLoss:
    """What a network loses on a batch when its weights are mixed."""

    def __init__(
        self,
        net: Net,
        batches: Sequence[Batch],
        mixtures: Mapping[str, tuple[int, Tensor]],
        seed: int,
        tell: Callable[[float], None] | None,
        steps: int,
    ) -> None:
        if not sum(len(images) for images, _ in batches):
            raise DataError("differentiable search: no image came; give at least one batch")
        self.graph = net.clone().eval().graph.requires_grad_(False)
        self.mixtures, self.tell, self.steps = mixtures, tell, steps
        self.batches = [batch for batch in batches if len(batch[0])]
        self.order = np.random.default_rng(seed)
        self.left: list[int] = []
        self.exact: dict[int, Tensor] = {}

    def __call__(self, mixed: Tensor, step: int) -> Tensor:
        """Return the mean loss of the next batch."""
        if not self.left:
            self.left = self.order.permutation(len(self.batches)).tolist()
        place = self.left.pop()
        images, labels = self.batches[place]
        weights = {
            f"{layer}.weight": torch.tensordot(mixed[group].to(stack.dtype)[: len(stack)], stack, 1)
            for layer, (group, stack) in self.mixtures.items()
        }
        logits = functional_call(self.graph, weights, (images,))
        if self.tell is not None:
            self.tell((step + 1) / self.steps)
        if labels is not None:
            return nn.functional.cross_entropy(logits, labels).double()
        if place not in self.exact:
            with torch.no_grad():
                self.exact[place] = torch.log_softmax(self.graph(images), 1)
        found = torch.log_softmax(logits, 1)
        return nn.functional.kl_div(found, self.exact[place], log_target=True, reduction="batchmean").double()


def _mixtures(
    net: Net, table: Table, grids: Mapping[str, QuantSpec | None], method: str
) -> dict[str, tuple[int, Tensor]]:
    """Return by layer its group and its weights at each option of it (K, *weight)."""
    if "placed" in net.facts or "folded" not in net.facts:
        raise RecipeError(
            f"{net.name}: differentiable search reads a float network whose BatchNorms are folded; "
            "run the recipe 'float32' on it first"
        )
    layers = {layer.name: layer.module for layer in net.layers()}
    found = {}
    for place, (regions, names) in enumerate(zip(table.groups, table.names, strict=True)):
        missing = [name for name in names if name not in grids]
        if missing:
            raise RecipeError(
                f"region '{regions[0]}': option '{missing[0]}' has no grid; there are {', '.join(grids)}"
            )
        for region in regions:
            module = layers.get(region)
            if not isinstance(module, nn.Conv2d | nn.Linear):
                raise RecipeError(
                    f"{net.name}: region '{region}' is no convolution or matrix product of it; "
                    "`fewbit inspect` lists them"
                )
            weight = module.weight.detach()
            specs = [grids[name] for name in names]
            rows = [weight if spec is None else rounded(weight, spec, method, region) for spec in specs]
            found[region] = (place, torch.stack(rows))
    return found


def _most_probable(
    table: Table, learned: Floats, limits: Mapping[str, float], objective: str
) -> Assignment | None:
    """Return the most probable options inside the limits; none where the limits are exceeded."""
    at = table.columns.index(objective)
    own, between, base = table.values.copy(), table.pair_values.copy(), table.base.copy()
    own[..., at] = np.where(table.allowed(), -np.log(np.maximum(learned, _LEAST)), 0.0)
    between[..., at], base[at] = 0.0, 0.0
    surprise = replace(table, values=own, pair_values=between, base=base)
    limited = {name: limit for name, limit in limits.items() if name != objective}
    choice = choose_greedily(surprise, limited, objective)
    if choice is None:
        return None
    found = table.assignment(_filled(table, choice, learned, limits))
    return found if found.within(limits) else None


def _filled(table: Table, choice: Choice, learned: Floats, limits: Mapping[str, float]) -> Choice:
    """Return a choice with what fits of the likely options that cost more, the most probable first.

    At the limit some region is undecided between two options, and the cheaper one alone would leave room.
    """
    most, spread = table.limits_of(limits), table.spread()
    limited = np.isfinite(most)
    places = [(int(g), int(k)) for g, k in zip(*np.nonzero(learned > _LIKELY), strict=True)]
    choice = choice.copy()
    for group, option in sorted(places, key=lambda at: (-learned[at], at)):
        other = choice.copy()
        other[group] = option
        before, after = table.totals(choice), table.totals(other)
        dearer = ((after - before) / spread)[limited].sum() > 0
        if dearer and (after <= most).all():
            choice = other
    return choice
