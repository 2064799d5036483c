"""HAWQ-V3's published tables of ResNet-18, as a problem, and the optima found by trying every assignment."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from fewbit.search.mixed.problem import Assignment, Option, Problem, Region, Tie, evaluate

DATA: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
LAYERS = tuple(f"layer{place}" for place in range(len(DATA["trace"])))


def hawq_problem() -> Problem:
    """Give each of the 19 layers int4 or int8; loss is trace x squared error of the weights."""
    regions = []
    for place, layer in enumerate(LAYERS):
        options = []
        for bits in (4, 8):
            table = DATA[f"int{bits}"]
            costs = {
                "mib": DATA["parameters"][place] * bits / 8 / 2**20,
                "bops": DATA["macs"][place] * bits * bits / 1024 / 1e6,
                "ms": table["ms"][place],
            }
            options.append(Option(f"int{bits}", DATA["trace"][place] * table["error"][place], costs))
        regions.append(Region(layer, tuple(options)))
    ties = tuple(Tie(tuple(LAYERS[place] for place in tie)) for tie in DATA["ties"])
    return Problem(tuple(regions), ties=ties)


def uniform(problem: Problem, option: str) -> Assignment:
    """Give every region the same option."""
    return evaluate(problem, {region.name: option for region in problem.regions})


def gain(problem: Problem, found: Assignment) -> float:
    """Return what an assignment loses less than all int4."""
    return uniform(problem, "int4").loss - found.loss


def int8_layers(found: Assignment) -> list[int]:
    """Return the places of the layers that are int8."""
    return [place for place, layer in enumerate(LAYERS) if found.options[layer] == "int8"]
