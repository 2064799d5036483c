"""Time and loss of every search over precisions at equal limits, and of the whole front.

    python bench/solvers.py --regions 20,60,150 --problems 3 --points 50

On HAWQ-V3's published tables of ResNet-18 (19 layers, int4 or int8, three ties; `hawq_v3.toml`) each row has
the share of the gain over all int4 that the best of all assignments has, at nine limits. On made-up networks
(`random_problem`: float32, bf16 or int8, and converting between neighbours costs) it has its loss as a
multiple of the exact least one, at limits of a quarter, a half and three quarters of the way from the least
time to all float32. "evolve-1000" is "evolve" with ten times the generations. Fronts are of loss against the
cost, beside those that evolution finds: "gain" is what its best point within the cost of an exact point loses
less than the cheapest one, as a share of what the exact point does, the mean over the exact front. Seconds
are those of the clock, one call each; torch has one thread.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from fewbit.registry import find, rows
from fewbit.search.mixed.evolve import Evolve
from fewbit.search.mixed.front import front
from fewbit.search.mixed.integer_program import solve
from fewbit.search.mixed.problem import Assignment, Boundary, Option, Problem, Region
from fewbit.search.mixed.searcher import Searcher
from hawq_v3 import DATA, gain, hawq_problem, uniform

PRECISIONS = ("int8", "bf16", "float32")
SHARES = (0.25, 0.5, 0.75)
Rows = list[dict[str, Any]]


def random_problem(regions: int, seed: int) -> Problem:
    """Make a network up: regions in a row, every third one read again three further on, as by a join.

    Times are log-normal; bf16 takes 0.5 to 1.1 of float32's, int8 0.2 to 0.7. The loss of int8 is log-normal
    and that of bf16 a hundredth of it. Where two regions differ, converting costs 5 to 50 us.
    """
    rng = np.random.default_rng(seed)
    made = []
    for place in range(regions):
        ms, loss = 0.1 * rng.lognormal(), rng.lognormal(-5, 1.5)
        times = (ms * rng.uniform(0.2, 0.7), ms * rng.uniform(0.5, 1.1), ms)
        losses = (loss, 0.01 * loss, 0.0)
        options = [
            Option(name, float(one), {"ms": float(taken)})
            for name, one, taken in zip(PRECISIONS, losses, times, strict=True)
        ]
        made.append(Region(f"region{place}", tuple(options)))
    joins = [(place, place + 1) for place in range(regions - 1)]
    joins += [(place, place + 3) for place in range(0, regions - 3, 3)]
    boundaries = []
    for first, second in joins:
        ms = rng.uniform(0.005, 0.05)
        costs = {
            (one, other): {"ms": float(ms * rng.uniform(0.8, 1.2))}
            for one in PRECISIONS
            for other in PRECISIONS
            if one != other
        }
        boundaries.append(Boundary(f"region{first}", f"region{second}", costs))
    return Problem(tuple(made), tuple(boundaries))


def searchers(names: Iterable[str]) -> dict[str, Searcher]:
    """Return the rows by name, and the longer evolution, each called once to load its libraries."""
    chosen: dict[str, Searcher] = {}
    for name in names:
        chosen[name] = Evolve(generations=1000) if name == "evolve-1000" else find("search", name)()
        chosen[name].search(random_problem(2, 0), {})
    return chosen


def timed(
    search: Searcher, problem: Problem, limits: Mapping[str, float], seed: int
) -> tuple[Assignment, float]:
    """Search once; return what was found and the seconds."""
    start = time.perf_counter()
    found = search.search(problem, limits, seed)
    seconds = time.perf_counter() - start
    if found is None:
        raise click.ClickException(f"nothing was found inside {dict(limits)}")
    return found, seconds


def on_hawq(chosen: Mapping[str, Searcher], seed: int) -> Rows:
    """Measure the rows at the nine limits."""
    problem, found = hawq_problem(), []
    for case in DATA["optima"]:
        for name, search in chosen.items():
            answer, seconds = timed(search, problem, {case["cost"]: case["limit"]}, seed)
            share = gain(problem, answer) / case["gain"]
            found.append(
                {"cost": case["cost"], "share": case["share"], "row": name, "gain": share, "seconds": seconds}
            )
    return found


def on_made_up(chosen: Mapping[str, Searcher], regions: int, problems: int, seed: int) -> Rows:
    """Measure the rows on problems of one size."""
    found = []
    for place in range(problems):
        problem = random_problem(regions, seed + place)
        fast = solve(problem, {}, "ms")
        assert fast is not None
        least, most = fast.costs["ms"], uniform(problem, "float32").costs["ms"]
        for share in SHARES:
            limits = {"ms": least + share * (most - least)}
            best = solve(problem, limits)
            assert best is not None
            for name, search in chosen.items():
                answer, seconds = timed(search, problem, limits, seed)
                ratio = answer.loss / best.loss
                found.append(
                    {"regions": regions, "share": share, "row": name, "loss_ratio": ratio, "seconds": seconds}
                )
    return found


def measure_front(problem: Problem, name: str, cost: str, points: int | None, seed: int) -> dict[str, Any]:
    """Time the exact front and the evolved one, and compare them."""
    exact = front(problem, cost, points=points)
    start = time.perf_counter()
    bred = Evolve().front(problem, cost, seed)
    seconds = time.perf_counter() - start
    worst = exact.points[0].loss
    gains = []
    for point in exact.points[1:]:
        inside = (one.loss for one in bred if one.within({cost: point.costs[cost]}))
        least = min(inside, default=worst)
        gains.append((worst - least) / (worst - point.loss))
    return {
        "problem": name,
        "cost": cost,
        "points": len(exact.points),
        "complete": exact.complete,
        "programs": exact.programs,
        "seconds": exact.seconds,
        "evolved_points": len(bred),
        "evolved_seconds": seconds,
        "evolved_gain": statistics.fmean(gains),
    }


def show(console: Console, hawq: Rows, made: Rows, fronts: Rows) -> None:
    """Print the tables."""
    names = list(dict.fromkeys(row["row"] for row in hawq))
    table = Table("limit", *names, title="HAWQ-V3, ResNet-18: % of the best gain, ms")
    for case in DATA["optima"]:
        cells = [row for row in hawq if (row["cost"], row["share"]) == (case["cost"], case["share"])]
        texts = [f"{100 * row['gain']:.2f}, {1e3 * row['seconds']:.1f}" for row in cells]
        table.add_row(f"{case['cost']} {case['share']}", *texts)
    console.print(table)
    table = Table("regions", *names, title="Made up: loss / least, geometric mean (largest), median seconds")
    for regions in dict.fromkeys(row["regions"] for row in made):
        texts = []
        for name in names:
            cells = [row for row in made if (row["regions"], row["row"]) == (regions, name)]
            ratios = [row["loss_ratio"] for row in cells]
            seconds = statistics.median(row["seconds"] for row in cells)
            texts.append(f"{statistics.geometric_mean(ratios):.3f} ({max(ratios):.2f}), {seconds:.2f}")
        table.add_row(str(regions), *texts)
    console.print(table)
    heads = ("front", "points", "complete", "programs", "s", "evolved points", "s", "gain %")
    table = Table(*heads, title="Whole fronts")
    for row in fronts:
        table.add_row(
            f"{row['problem']}, {row['cost']}",
            str(row["points"]),
            "yes" if row["complete"] else "no",
            str(row["programs"]),
            f"{row['seconds']:.1f}",
            str(row["evolved_points"]),
            f"{row['evolved_seconds']:.1f}",
            f"{100 * row['evolved_gain']:.2f}",
        )
    console.print(table)


@click.command()
@click.option("--regions", default="20,60,150", show_default=True, help="Sizes of the made-up problems.")
@click.option("--problems", default=3, show_default=True, help="Made-up problems of each size.")
@click.option("--points", default=50, show_default=True, help="Most points of a made-up problem's front.")
@click.option("--rows", "only", default="", help="Only these rows: greedy,evolve,evolve-1000,...")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the tables.")
def main(regions: str, problems: int, points: int, only: str, seed: int, as_json: bool) -> None:
    """Measure the searches over precisions at equal limits."""
    import torch

    torch.set_num_threads(1)
    chosen = searchers(only.split(",") if only else [*rows("search"), "evolve-1000"])
    sizes = [int(size) for size in regions.split(",") if size]
    hawq = on_hawq(chosen, seed)
    made = [row for size in sizes for row in on_made_up(chosen, size, problems, seed)]
    fronts = [measure_front(hawq_problem(), "HAWQ-V3", cost, None, seed) for cost in ("mib", "bops", "ms")]
    fronts += [measure_front(random_problem(n, seed), f"{n} regions", "ms", points, seed) for n in sizes]
    if as_json:
        click.echo(json.dumps({"hawq": hawq, "made_up": made, "fronts": fronts}, indent=1))
    else:
        show(Console(width=150), hawq, made, fronts)


if __name__ == "__main__":
    main()
