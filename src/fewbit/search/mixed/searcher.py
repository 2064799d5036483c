"""What every search over precisions offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fewbit.search.mixed.problem import LOSS, Assignment, Problem


class Searcher(Protocol):
    """How options are chosen: frozen hyperparameters; a row of the registry's table ``search``."""

    def search(
        self, problem: Problem, limits: Mapping[str, float], seed: int = 0, objective: str = LOSS
    ) -> Assignment | None:
        """Return the best assignment found inside all limits.

        Args:
            problem: What may be chosen.
            limits: By name of a cost, or of the loss, the most that it may be.
            seed: Of all that is random; one that uses no chance does not look at it.
            objective: What should be least: the loss, or a cost by its name.

        Returns:
            The assignment; none where none inside the limits was found.

        Raises:
            RecipeError: A limit or the objective is of no cost of the problem, or a limit is not a number.
        """
        ...
