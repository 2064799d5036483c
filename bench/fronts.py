"""Every search over precisions on a real network and engine, at equal measuring time.

    PYTHONPATH=src python bench/fronts.py ../shared/networks/resnet20.toml --float-precision bf16 --seconds 60

Each region of the network (`fewbit.place.regions`) is in integers or in float. Every method measures on the
engine for the same seconds (where the tables take more, as long as these), building files included, and hands
over at most `--points` choices:

- "tables" are what fewbit searches with: the times of regions by the engine's profiler, the KL divergence of
  each region in integers, and the times of mixes, as many as the seconds allow, to correct the times with:
  all integers and all float, 16 random ones, then those on the solver's front. `integer_program` (what
  reaches most of its front of 24), `greedy`, `evolve` and `differentiable` (each at evenly spaced limits of
  time) choose by the same tables, whose seconds are each one's measuring time. "uncorrected" is the solver on
  the profiler's times. "by sensitivity" leaves the regions in float that lose most, whatever they cost.
- "evolve, measured" knows no table: each of its choices is a calibrated file that is timed in turns with the
  all-integer one and whose answers' KL divergence from float32 is taken on the images that the tables'
  sensitivities are from. It is multi-objective (NSGA-II), crossover 0.5, each gene flipped at 0.1 (2 genes
  on average at most), and hands over those of its choices that none of its others beats.

Then all choices, and the network all in integers and all in float, which everybody has, are judged together:
their files take turns on the engine in several sittings, each of which opens them anew, and KL and changed
classes are counted on images that no method saw. One choice surely beats another that is slower and loses
more, both beyond the 95 % interval of the paired measurement (ratio of speeds within a round, its median
within a sitting, the interval over sittings; difference of KL on the same image); of some hundred pairs a few
look so by chance. "beats the solver's" counts the solver's choices that some choice of the row surely beats
(or by the medians alone), "beaten by" those of the row that one of the solver's does. The volume is the area
of speed and KL that a row's choices reach, as a share of what all rows' reach together; its 95 %
interval is over draws of the sittings and of the images, each with replacement. The solver's front is
dominated by a row that surely reaches more, or whose choices surely beat every one that the solver has beside
all integers and all float.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

import fewbit
from fewbit.cli.options import COUNT
from fewbit.engines.process import EngineProcess, RemoteSession
from fewbit.engines.session import EngineName, FloatPrecision
from fewbit.export.onnx_out import export_onnx
from fewbit.measure.host import sums_exactly
from fewbit.measure.intervals import Interval, median_interval
from fewbit.measure.region_latency import RegionLatency
from fewbit.measure.speed import measure_interleaved
from fewbit.recipe import run_recipe
from fewbit.registry import find, rows
from fewbit.search.mixed.front import front
from fewbit.search.mixed.integer_program import solve
from fewbit.search.mixed.nondominated import crowding, ranks
from fewbit.search.mixed.problem import Assignment, Problem
from fewbit.search.mixed_precision import FLOAT, problem_of, refine, region_losses
from fewbit.search.region_probe import RegionProbe
from fewbit.sensitivity.kl import kl_divergence
from fewbit.step import Context
from fronts_table import SOLVER, show
from speed_networks import Network, open_network

Choice = tuple[bool, ...]
Floats = NDArray[np.float64]
_AT_ONCE, _ROUNDS, _BLOCK_S, _CALLS = 6, 8, 0.1, 4
_PARENTS, _MUTATION, _MUTATIONS = 10, 0.1, 2.0
_MIXES, _DRAWS, _FRONT = 1000, 400, 24
_BEYOND = 0.1  # of the range, so that the ends of a front count too


class Subject:
    """One network on one setting, with the images that methods see and those that judge."""

    def __init__(
        self, network: Network, setting: fewbit.Setting, folder: Path, seen: int, calibration: int, seed: int
    ) -> None:
        order = np.random.default_rng(seed).permutation(len(network.images))
        images = torch.from_numpy(network.images[order])
        self.net, self.setting, self.folder, self.seed = network.net, setting, folder, seed
        self.calibration = images[:calibration]
        self.seen, self.judging = images[calibration : calibration + seen], images[calibration + seen :]
        exact = sums_exactly(setting.engine)
        self.probe = RegionProbe(network.net, setting, folder, seed=seed, exact_sums=exact)
        self.integers: Choice = (False,) * len(self.probe.regions)
        self.floats: Choice = (True,) * len(self.probe.regions)

    def exact(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits in float32."""
        with torch.no_grad():
            return torch.cat([self.net(batch) for batch in torch.split(images, 16)])

    def file(self, choice: Choice) -> Path:
        """Return a choice as a file, calibrated on real images."""
        path = self.folder / f"calibrated-{int(''.join('01'[bit] for bit in choice), 2):x}.onnx"
        if not path.exists():

            def batches() -> Iterator[torch.Tensor]:
                yield from torch.split(self.calibration, 16)

            context = Context(fewbit.Scheme(), self.probe.target, batches, self.seed)
            net, _ = run_recipe(self.probe.recipe_of(choice), self.net, context)
            export_onnx(net, path, self.probe.target)
        return path

    def divergences(self, session: RemoteSession, images: torch.Tensor, exact: torch.Tensor) -> Floats:
        """Return the KL divergence of each image."""
        logits = torch.from_numpy(session.run(images.numpy()))
        return np.asarray(kl_divergence(exact, logits).numpy())

    def measure(self, choices: Sequence[Choice], exact: torch.Tensor) -> Floats:
        """Return time as a share of all integers', and KL on the images seen, of each choice (n, 2)."""
        with EngineProcess(self.setting.engine) as process:
            paths = [self.file(self.integers), *map(self.file, choices)]
            sessions = [process.open(path, self.setting) for path in paths]
            timings = measure_interleaved(sessions, _ROUNDS, _BLOCK_S, self.seed)[1:]
            losses = [self.divergences(s, self.seen, exact).mean() for s in sessions[1:]]
        return np.array(
            [(1 / cast(float, t.ratio), loss) for t, loss in zip(timings, losses, strict=True)]
        ).reshape(-1, 2)


def measure_tables(subject: Subject, seconds: float) -> tuple[RegionLatency, RegionLatency, dict[str, float]]:
    """Return the profiler's times of regions, those refined until the time is out, and the losses."""
    begin, probe = time.perf_counter(), subject.probe
    guess = fitted = probe.guess()
    losses = region_losses(probe, torch.split(subject.seen, 16))
    refined, took = refine(probe, guess, losses, _MIXES), 0.0
    while time.perf_counter() - begin + took < seconds:
        start, before = time.perf_counter(), fitted.measured
        fitted = next(refined, fitted)
        if fitted.measured == before:
            break  # there are no more
        took = (time.perf_counter() - start) * _AT_ONCE / (fitted.measured - before)
    return guess, fitted, losses


def by_tables(problem: Problem, name: str, points: int, seed: int) -> list[Choice]:
    """Return what a row of the registry chooses at evenly spaced limits, the solver from its front."""
    if name == SOLVER:
        whole = front(problem, "ms", points=max(points, _FRONT)).points
        ms, loss = np.array([p.costs["ms"] for p in whole]), np.array([p.loss for p in whole])
        return [_choice(problem, whole[place]) for place in reach_most(-ms, loss, points)]
    fastest, surest = solve(problem, {}, "ms"), solve(problem, {})
    assert fastest is not None and surest is not None
    search, found = find("search", name)(), []
    for limit in np.linspace(fastest.costs["ms"], surest.costs["ms"], points):
        answer = search.search(problem, {"ms": float(limit)}, seed)
        found += [] if answer is None else [_choice(problem, answer)]
    return list(dict.fromkeys(found))


def reach_most(speed: Floats, loss: Floats, points: int) -> list[int]:
    """Return the places of so many points that reach nearly as much volume as all.

    Whatever takes least away goes first.

    Example:
        >>> reach_most(np.array([1.0, 1.1, 3.0, 4.0]), np.array([0.0, 0.1, 0.2, 1.0]), 3)
        [0, 2, 3]
    """
    corner = speed.min() - _BEYOND * np.ptp(speed) - 1e-9, loss.max() + _BEYOND * np.ptp(loss) + 1e-9
    kept = list(range(len(speed)))
    while len(kept) > points:
        without = [[place for place in kept if place != gone] for gone in kept]
        kept = max(without, key=lambda places: volume(speed[places], loss[places], corner))
    return kept


def by_sensitivity(losses: Mapping[str, float], points: int) -> list[Choice]:
    """Return the choices that leave the 0, ..., all regions of the greatest loss in float."""
    order = sorted(losses, key=lambda name: -losses[name])
    counts = np.unique(np.linspace(0, len(order), points).round().astype(int))
    return [tuple(name in order[:count] for name in losses) for count in counts]


def evolve_measured(subject: Subject, seconds: float, points: int) -> tuple[list[Choice], int]:
    """Breed choices that are measured as files until the time is out; return the best and how many ran."""
    begin, rng = time.perf_counter(), np.random.default_rng(subject.seed)
    exact = subject.exact(subject.seen)
    known: dict[Choice, Floats] = {}
    waiting = [subject.floats, *map(_as_choice, subject.probe.draw(_AT_ONCE - 1, subject.seed))]
    known[subject.integers] = subject.measure([subject.integers], exact)[0]
    while waiting:
        start = time.perf_counter()
        known |= dict(zip(waiting, subject.measure(waiting, exact), strict=True))
        now = time.perf_counter()
        room = (seconds - (now - begin)) / ((now - start) / len(waiting))  # of the last generation, a part
        waiting = _children(known, rng)[: max(0, int(room))]
    choices, values = list(known), np.array(list(known.values()))
    best = sorted(np.flatnonzero(ranks(values) == 0), key=lambda place: values[place, 0])
    return _some([choices[place] for place in best], points), len(known)


def _children(known: Mapping[Choice, Floats], rng: np.random.Generator) -> list[Choice]:
    """Return new choices from those that fewest others beat, those with most room first."""
    values, choices = np.array(list(known.values())), np.array(list(known))
    parents = choices[np.lexsort((-crowding(values), ranks(values)))[:_PARENTS]]
    share = min(_MUTATION, _MUTATIONS / parents.shape[1])
    made: dict[Choice, None] = {}
    for _ in range(100 * _AT_ONCE):
        first, second = parents[rng.integers(len(parents), size=2)]
        genes = np.where(rng.random(len(first)) < 0.5, first, second) ^ (rng.random(len(first)) < share)
        if _as_choice(genes) not in known:
            made[_as_choice(genes)] = None
        if len(made) == _AT_ONCE:
            break
    return list(made)


def _choice(problem: Problem, found: Assignment) -> Choice:
    return tuple(found.options[region.name] == FLOAT for region in problem.regions)


def _as_choice(row: Any) -> Choice:
    return tuple(bool(bit) for bit in row)


def _some(choices: Sequence[Choice], points: int) -> list[Choice]:
    places = np.unique(np.linspace(0, len(choices) - 1, min(points, len(choices))).round().astype(int))
    return [choices[place] for place in places]


class Judged:
    """All choices measured together.

    Every sitting opens all files anew: where a network lies in memory makes it a few percent faster or slower
    for as long as it is open, which rounds alone would take for a difference.

    Args:
        subject: Makes the files.
        choices: Each once.
        sittings: How often they are opened.
        rounds: How many turns each takes in a sitting.

    Attributes:
        rates: Images a second (sittings, rounds, choices).
        kl: Divergence from float32 (choices, images).
        changed: Share of images whose class is another than float32's (choices,).
    """

    def __init__(self, subject: Subject, choices: Sequence[Choice], sittings: int, rounds: int) -> None:
        self.places = {choice: place for place, choice in enumerate(choices)}
        exact, rng = subject.exact(subject.judging), np.random.default_rng(subject.seed)
        paths, logits, rates = [subject.file(choice) for choice in choices], [], []
        for sitting in range(sittings):
            with EngineProcess(subject.setting.engine) as process:
                opened = {
                    place: process.open(paths[place], subject.setting)
                    for place in rng.permutation(len(paths))
                }
                sessions = [opened[place] for place in range(len(paths))]
                if not sitting:
                    logits = [torch.from_numpy(s.run(subject.judging.numpy())) for s in sessions]
                rates.append(_take_turns(sessions, rounds, rng))
        self.rates = np.array(rates)
        self.kl = np.array([kl_divergence(exact, found).numpy() for found in logits])
        self.changed = np.array(
            [float((found.argmax(1) != exact.argmax(1)).float().mean()) for found in logits]
        )

    def ratios(self) -> Floats:
        """Return how many times as fast each choice is as each other (sittings, choices, choices).

        Medians over the rounds of a sitting.
        """
        return np.asarray(np.median(self.rates[..., :, None] / self.rates[..., None, :], 1))

    def beats(self, surely: bool) -> NDArray[np.bool_]:
        """Return whether each choice (row) is faster and loses less than each other (column)."""
        ratios = self.ratios()
        apart = self.kl[:, None] - self.kl[None]
        if not surely:
            return np.asarray((np.median(ratios, 0) > 1) & (apart.mean(-1) < 0))
        count = len(self.places)
        low = [[median_interval(ratios[:, a, b].tolist()).low for b in range(count)] for a in range(count)]
        spread = 1.96 * apart.std(-1, ddof=1) / np.sqrt(apart.shape[-1])
        return np.asarray((np.array(low) > 1) & (apart.mean(-1) + spread < 0))

    def volumes(self, sets: Sequence[Sequence[int]], rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Return the share of the whole volume that sets reach (sets,), and draws of it (draws, sets).

        Each draw takes sittings with replacement, and images with replacement, the same for all its sittings:
        what they share is no less uncertain for being met in each.
        """
        taken = np.median(self.rates / self.rates.mean(-1, keepdims=True), 1)
        speed, loss = np.median(taken, 0), self.kl.mean(1)
        corner = speed.min() - _BEYOND * np.ptp(speed), loss.max() + _BEYOND * np.ptp(loss)

        def shares(speed: Floats, loss: Floats) -> list[float]:
            whole = volume(speed, loss, corner)
            return [volume(speed[list(s)], loss[list(s)], corner) / whole for s in sets]

        drawn = []
        for _ in range(_DRAWS):
            sittings = rng.integers(len(taken), size=len(taken))
            images = rng.integers(self.kl.shape[1], size=self.kl.shape[1])
            drawn.append(shares(np.median(taken[sittings], 0), self.kl[:, images].mean(1)))
        return np.array(shares(speed, loss)), np.array(drawn)


def _take_turns(sessions: Sequence[RemoteSession], rounds: int, rng: np.random.Generator) -> Floats:
    """Return images a second (rounds, sessions)."""
    calls = [np.median(session.time_block(_BLOCK_S).latencies_ms) / 1000 for session in sessions]
    rates = np.empty((rounds, len(sessions)))
    for row in rates:
        for place in rng.permutation(len(sessions)):
            seconds = max(_BLOCK_S, _CALLS * float(calls[place]))
            row[place] = sessions[place].time_block(seconds).images_per_s
    return rates


def volume(speed: Floats, loss: Floats, corner: tuple[float, float]) -> float:
    """Return the area between points (more speed, less loss is better) and a corner that is worse than all.

    Example:
        >>> volume(np.array([1.0, 3.0]), np.array([0.0, 1.0]), (0.0, 2.0))
        4.0
    """
    area, reached = 0.0, corner[0]
    for place in np.lexsort((-speed, loss)):
        if speed[place] > reached and loss[place] < corner[1]:
            area += (speed[place] - reached) * (corner[1] - loss[place])
            reached = speed[place]
    return float(area)


def run(subject: Subject, seconds: float, points: int, sittings: int, rounds: int) -> dict[str, Any]:
    """Let every method choose, and judge all."""
    found: dict[str, list[Choice]] = {}
    took: dict[str, tuple[float, float]] = {}

    def add(name: str, measuring_s: float, choose: Callable[[], list[Choice]]) -> None:
        start = time.perf_counter()
        found[name] = choose()
        took[name] = measuring_s, time.perf_counter() - start
        told(f"{name}: {len(found[name])} choices in {took[name][1]:.1f} s")

    start = time.perf_counter()
    guess, fitted, losses = measure_tables(subject, seconds)
    tables_s, problem = time.perf_counter() - start, problem_of(fitted, losses)
    told(f"tables: {tables_s:.0f} s, {fitted.measured} mixes")
    for name in (SOLVER, *(row for row in rows("search") if row != SOLVER)):
        by_tables(problem, name, 2, subject.seed)  # so that no row's time has that of loading it
        add(name, tables_s, lambda name=name: by_tables(problem, name, points, subject.seed))  # type: ignore[misc]
    unfitted = problem_of(guess, losses)
    add("integer_program, uncorrected", tables_s, lambda: by_tables(unfitted, SOLVER, points, subject.seed))
    add("by sensitivity", tables_s, lambda: by_sensitivity(losses, points))
    start = time.perf_counter()
    bred, evaluated = evolve_measured(subject, max(seconds, tables_s), points)
    add("evolve, measured", time.perf_counter() - start, lambda: bred)
    both = [subject.integers, subject.floats]
    every = list(dict.fromkeys([*both, *(choice for choices in found.values() for choice in choices)]))
    told(f"judging {len(every)} files")
    judged = Judged(subject, every, sittings, rounds)
    return {
        "network": subject.net.name,
        "setting": subject.setting.model_dump(mode="json"),
        "regions": len(subject.probe.regions),
        "corrected_by": fitted.measured,
        "latency_error": fitted.error,
        "evaluated_by_evolve": evaluated,
        "judged": len(every),
        "sittings": sittings,
        "rounds": rounds,
        "images": len(subject.judging),
        "rows": compare(judged, found, took, both, subject.seed),
        "choices": _describe(judged, every, found),
    }


def told(text: str) -> None:
    """Say how far it is, beside the answer."""
    click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)


def compare(
    judged: Judged,
    found: Mapping[str, list[Choice]],
    took: Mapping[str, tuple[float, float]],
    both: Sequence[Choice],
    seed: int,
) -> list[dict[str, Any]]:
    """Return what each method's choices are worth; what everybody has counts for all volumes."""
    sets = {name: sorted({judged.places[choice] for choice in choices}) for name, choices in found.items()}
    reach = [[*places, *(judged.places[choice] for choice in both)] for places in sets.values()]
    reached, drawn = judged.volumes(reach, np.random.default_rng(seed))
    solver_at = list(sets).index(SOLVER)
    sure, nominal, solver = judged.beats(True), judged.beats(False), sets[SOLVER]
    own = [place for place in solver if place not in {judged.places[choice] for choice in both}]
    rows_found = []
    for place, (name, places) in enumerate(sets.items()):
        rows_found.append(
            {
                "row": name,
                "points": len(places),
                "measuring_s": took[name][0],
                "solving_s": took[name][1],
                "beats_solver": int(sure[np.ix_(places, solver)].any(0).sum()),
                "beats_all": bool(own and sure[np.ix_(places, own)].any(0).all()),
                "beats_solver_by_medians": int(nominal[np.ix_(places, solver)].any(0).sum()),
                "beaten_by_solver": int(sure[np.ix_(solver, places)].any(0).sum()),
                "beaten_by_solver_by_medians": int(nominal[np.ix_(solver, places)].any(0).sum()),
                "volume": float(reached[place]),
                "volume_interval95": _middle(drawn[:, place]),
                "more_volume": float(reached[place] - reached[solver_at]),
                "more_volume_interval95": _middle(drawn[:, place] - drawn[:, solver_at]),
            }
        )
    return rows_found


def _middle(drawn: Floats) -> list[float]:
    """Return what the middle 95 % of draws lie between."""
    return [float(end) for end in np.quantile(drawn, (0.025, 0.975))]


def _ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def _describe(
    judged: Judged, every: Sequence[Choice], found: Mapping[str, list[Choice]]
) -> list[dict[str, Any]]:
    ratios = judged.ratios()[:, :, 0]
    return [
        {
            "in_float": "".join("01"[bit] for bit in choice),
            "by": [name for name, choices in found.items() if choice in choices],
            "images_per_s": float(np.median(judged.rates[..., place])),
            "ratio_to_int8": float(np.median(ratios[:, place])),
            "interval95": _ends(median_interval(ratios[:, place].tolist())),
            "kl": float(judged.kl[place].mean()),
            "kl_interval95": (
                judged.kl[place].mean()
                + np.array([-1.96, 1.96]) * judged.kl[place].std(ddof=1) / np.sqrt(judged.kl.shape[1])
            ).tolist(),
            "changed": float(judged.changed[place]),
        }
        for place, choice in enumerate(every)
    ]


@click.command(help=__doc__)
@click.argument("networks", nargs=-1, required=True)
@click.option("--engine", default="openvino", show_default=True)
@click.option("--float-precision", default="float32", show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--seconds", default=60.0, show_default=True, help="That each method may measure.")
@click.option(
    "--points",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    help="Choices that each hands over at most.",
)
@click.option(
    "--sittings", type=click.IntRange(6), default=8, show_default=True, help="In which all files are judged."
)
@click.option(
    "--rounds", type=COUNT, default=5, show_default=True, help="Turns that each file takes in a sitting."
)
@click.option("--calibration-images", default=64, show_default=True)
@click.option("--seen-images", default=64, show_default=True, help="That methods take losses on.")
@click.option("--images", default=256, show_default=True, help="That judge.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the tables.")
def main(networks: tuple[str, ...], as_json: bool, **options: Any) -> None:
    torch.set_num_threads(options["threads"])
    setting = fewbit.Setting(
        engine=cast(EngineName, options["engine"]),
        float_precision=cast(FloatPrecision, options["float_precision"]),
        batch=options["batch"],
        threads=options["threads"],
    )
    seen, calibration, seed = options["seen_images"], options["calibration_images"], options["seed"]
    found = []
    for source in networks:
        network = open_network(source, seed, seen + calibration + options["images"])
        with tempfile.TemporaryDirectory() as folder:
            subject = Subject(network, setting, Path(folder), seen, calibration, seed)
            found.append(
                run(subject, options["seconds"], options["points"], options["sittings"], options["rounds"])
            )
        if not as_json:
            show(Console(width=150), found[-1])
    if as_json:
        click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
