"""Evolutionary search: a population of assignments, crossed and mutated, judged by the tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fewbit.search.mixed.greedy import choose_greedily, least_choice, uniform_choices
from fewbit.search.mixed.nondominated import crowding, ranks
from fewbit.search.mixed.problem import LOSS, Assignment, Problem
from fewbit.search.mixed.table import Choice, Table, tabulate
from fewbit.spec import Frozen

Genomes = NDArray[np.int64]
_END = 0.3
"""Probability that a stretch ends with the next region."""


class Evolve(Frozen):
    """Breed assignments: the best are parents, a child takes each region from one of two, and may mutate.

    A genome is the level of each region (of tied ones together). Its fitness needs no forward pass::

        loss / range of the loss + penalty sum_c max(0, cost_c - limit_c) / range of the cost

    The population starts with what greedy search finds, the most precise, the cheapest and the uniform
    assignments, the rest by chance. Each generation keeps the parents, the best that differ so far, and
    replaces the others by children: each gene from either of two parents with probability 0.5, then one
    level up or down with probability `mutation`; in some a stretch of regions, which lie side by side where
    boundaries cost, takes one level. The best that was ever inside the limits is returned, so it is never
    worse than greedy search.

    Attributes:
        population: Genomes of one generation.
        parents: How many of them have children and live on.
        generations: How many times.
        crossover: Probability that a gene is the second parent's.
        mutation: Probability that a gene moves one level, where fewer than `mutations` genes of a child do.
        mutations: How many genes of a child move on average at most.
        stretches: Probability that a stretch of a child takes one level.
        penalty: Of exceeding a limit by the whole range of its cost.

    Source: Y. Chen et al., Joint Neural Architecture Search and Quantization, 2018, arXiv 1811.09426;
    Y. Li et al., BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction, 2021,
    arXiv 2102.05426; the front: K. Deb et al., A Fast and Elitist Multiobjective Genetic
    Algorithm: NSGA-II, 2002.
    Differs: greedy answers are in the first population; parents differ; no more than `mutations` genes
    move, and stretches take one level, without which 150 regions with boundaries gain nothing over greedy
    search; limits are relative to the ranges of the costs; the fitness is predicted, and whoever wants to
    can measure the `finalists`.

    Example:
        >>> from fewbit.search.mixed.problem import Option, Problem, Region
        >>> layers = [Region(n, (Option("w4", s, {"kb": k}), Option("w8", 0.0, {"kb": 2 * k})))
        ...           for n, s, k in (("conv1", 0.3, 1.0), ("conv2", 0.2, 4.0), ("fc", 0.1, 2.0))]
        >>> found = Evolve(generations=20).search(Problem(tuple(layers)), {"kb": 10.0}, seed=1)
        >>> found.options, found.loss, found.costs
        ({'conv1': 'w8', 'conv2': 'w4', 'fc': 'w8'}, 0.2, {'kb': 10.0})
    """

    population: int = Field(50, ge=4)
    parents: int = Field(10, ge=2)
    generations: int = Field(100, ge=1)
    crossover: float = Field(0.5, ge=0, le=1)
    mutation: float = Field(0.1, ge=0, le=1)
    mutations: float = Field(2.0, gt=0)
    stretches: float = Field(0.5, ge=0, le=1)
    penalty: float = Field(1e3, gt=0)

    def search(
        self, problem: Problem, limits: Mapping[str, float], seed: int = 0, objective: str = LOSS
    ) -> Assignment | None:
        """Return the best that was ever inside the limits; see `Searcher.search`."""
        found = self.finalists(problem, limits, seed, objective, 1)
        return found[0] if found else None

    def finalists(
        self,
        problem: Problem,
        limits: Mapping[str, float],
        seed: int = 0,
        objective: str = LOSS,
        count: int = 5,
    ) -> tuple[Assignment, ...]:
        """Return the best of all that were inside the limits, to be told apart by measuring.

        Args:
            problem: What may be chosen.
            limits: By name of a cost, or of the loss, the most that it may be.
            seed: Of all that is random.
            objective: The loss, or a cost by its name.
            count: How many at most.
        """
        problem.check_limits(limits, objective)
        table, rng = tabulate(problem), np.random.default_rng(seed)
        most, spread, at = table.limits_of(limits), table.spread(), table.columns.index(objective)
        genomes = self._first(table, [choose_greedily(table, limits, objective)], limits, objective, rng)
        best: dict[bytes, Assignment] = {}
        for generation in range(self.generations + 1):
            genomes = np.unique(genomes, axis=0)
            totals = table.totals(genomes)
            over = (np.maximum(0.0, totals - most) / spread).sum(-1)
            fitness = totals[:, at] / spread[at] + self.penalty * over
            order = np.argsort(fitness, kind="stable")
            looked_at = genomes[order[: self.parents] if generation else order]
            best = self._keep(best, table, looked_at, limits, objective, count)
            if generation < self.generations:
                fathers = genomes[order[: self.parents]]
                genomes = np.concatenate([fathers, self._children(table, fathers, rng)])
        return tuple(best.values())

    def front(self, problem: Problem, cost: str = "ms", seed: int = 0) -> tuple[Assignment, ...]:
        """Return the front of loss against a cost: of all ever bred those that none of them dominates.

        The population starts with greedy answers, at evenly spaced limits and the cheapest. Parents are
        chosen by the non-dominated front that they are in, and in the last of these by how much room they
        have.

        Args:
            problem: What may be chosen.
            cost: Name of the cost.
            seed: Of all that is random.

        Returns:
            In order of the cost, the loss falling; see `fewbit.search.mixed.front.front` for the exact one.
        """
        problem.check_limits({cost: 0.0})
        table, rng = tabulate(problem), np.random.default_rng(seed)
        columns = [table.columns.index(cost), table.columns.index(LOSS)]
        first, last = (table.totals(least_choice(table, {name: 1.0}))[columns[0]] for name in (cost, LOSS))
        limits = np.linspace(first, last, max(2, self.population // 3))
        greedy = [choose_greedily(table, {cost: float(limit)}) for limit in limits]
        greedy.append(choose_greedily(table, {}, cost))
        genomes = self._first(table, greedy, {cost: np.inf}, LOSS, rng)
        archive = genomes[:0]
        for generation in range(self.generations + 1):
            every = np.unique(np.concatenate([archive, genomes]), axis=0)
            archive = every[ranks(table.totals(every)[:, columns]) == 0]
            if generation < self.generations:
                values = table.totals(genomes)[:, columns]
                order = np.lexsort((-crowding(values), ranks(values)))
                fathers = genomes[order[: self.parents]]
                genomes = np.concatenate([fathers, self._children(table, fathers, rng)])
        found = [table.assignment(genome) for genome in archive]
        kept: list[Assignment] = []
        for point in sorted(found, key=lambda one: (one.value(cost), one.loss)):
            if not kept or point.loss < kept[-1].loss:
                kept.append(point)
        return tuple(kept)

    def _first(
        self,
        table: Table,
        greedy: list[Choice | None],
        limits: Mapping[str, float],
        objective: str,
        rng: np.random.Generator,
    ) -> Genomes:
        """Return the first population: what is known to be good somewhere, the rest by chance."""
        known = [choice for choice in greedy if choice is not None]
        known += [least_choice(table, {objective: 1.0}), least_choice(table, dict.fromkeys(limits, 1.0))]
        known += uniform_choices(table)
        chance = rng.integers(0, table.counts, (max(0, self.population - len(known)), len(table.counts)))
        return np.concatenate([np.stack(known), chance])

    def _children(self, table: Table, fathers: Genomes, rng: np.random.Generator) -> Genomes:
        genes_each = len(table.counts)
        shape = (max(1, self.population - self.parents), genes_each)
        pairs = rng.integers(0, len(fathers), (2, shape[0]))
        genes = np.where(rng.random(shape) < self.crossover, fathers[pairs[1]], fathers[pairs[0]])
        share = min(self.mutation, self.mutations / genes_each)
        genes = genes + np.where(rng.random(shape) < share, rng.choice((-1, 1), shape), 0)
        starts, lengths = rng.integers(0, genes_each, shape[0]), 1 + rng.geometric(_END, shape[0])
        lengths[rng.random(shape[0]) >= self.stretches] = 0
        places = np.arange(genes_each)
        stretch = (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
        levels = rng.integers(0, table.counts.max(), shape[0])
        genes = np.where(stretch, levels[:, None], genes)
        return np.asarray(np.clip(genes, 0, table.counts - 1), np.int64)

    def _keep(
        self,
        best: Mapping[bytes, Assignment],
        table: Table,
        genomes: Genomes,
        limits: Mapping[str, float],
        objective: str,
        count: int,
    ) -> dict[bytes, Assignment]:
        """Return the `count` best inside the limits of those known and these."""
        known = dict(best)
        for genome in genomes:
            key = genome.tobytes()
            if key not in known:
                found = table.assignment(genome)
                if found.within(limits):
                    known[key] = found
        inside = sorted(
            known.items(),
            key=lambda item: (item[1].value(objective), sum(item[1].value(n) for n in limits), item[0]),
        )
        return dict(inside[:count])
