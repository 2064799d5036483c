"""Where the time of a search goes, phase by phase, and what share of it the engines have.

    python bench/search_time.py ../shared/networks/resnet20.toml --data ../shared/data/cifar10/test.tar
    python bench/search_time.py CARD --data DATA --trials 6 --source ../before/src --source src --turns 2

Each turn runs `fewbit search` once from every `--source` (the `src` folder of a checkout, this one where none
is given), so that what else the machine does falls on all of them. The phases are the search's own record
(`fewbit.clock`, kept in the study); "start and report" is what the whole process took beyond it: imports, the
report, the end. Processor seconds count all threads; those of the engines' processes stand apart.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.table import Table

from fewbit.clock import PhaseTime
from fewbit.engines.process import ENGINE_PHASES
from fewbit.search.study import read_study

_HERE = Path(__file__).resolve().parents[1] / "src"


class Run(NamedTuple):
    """One search, timed.

    Attributes:
        source: Where it was run from.
        seconds: Of the whole process.
        cpu_s: Processor seconds of it and of its children.
        phases: What the search recorded.
        trials: How many it measured.
        answer: Its recipe, empty where there is none.
    """

    source: str
    seconds: float
    cpu_s: float
    phases: tuple[PhaseTime, ...]
    trials: int
    answer: str


class Row(NamedTuple):
    """A phase of all stages together, the mean of several runs."""

    phase: str
    seconds: float
    cpu_s: float
    engine_cpu_s: float
    times: float


def search(source: Path, arguments: Sequence[str], out: Path) -> Run:
    """Run one search in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{source.resolve()}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "fewbit", "search", *arguments, "--out", str(out)]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode not in (0, 3):
        raise click.ClickException(f"{source}: the search failed: {ended.stderr.strip()[-500:]}")
    study = read_study(out)
    found = [t.recipe for t in study.trials if study.answer is not None and t.key == study.answer.key]
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Run(str(source), seconds, cpu_s, study.phases, len(study.trials), found[0] if found else "")


def rows(runs: Sequence[Run]) -> list[Row]:
    """Return the phases of runs from one source, the longest first, the rest of the process among them."""
    total: dict[str, list[float]] = {}
    for run in runs:
        inside = [sum(getattr(p, key) for p in run.phases) for key in ("seconds", "cpu_s", "child_cpu_s")]
        rest = (run.seconds - inside[0], run.cpu_s - inside[1] - inside[2], 0.0, 1)
        spent = [(p.phase, (p.seconds, p.cpu_s, p.child_cpu_s, p.times)) for p in run.phases]
        for name, figures in [*spent, ("start and report", rest)]:
            kept = total.setdefault(name, [0.0] * 4)
            for place, more in enumerate(figures):
                kept[place] += more / len(runs)
    found = [Row(name, *figures) for name, figures in total.items()]
    return sorted(found, key=lambda row: -row.seconds)


def engine_share(runs: Sequence[Run]) -> float:
    """Return the share of the searches' time, outside of imports and the report, that is the engines'."""
    phases = [p for run in runs for p in run.phases]
    return sum(p.seconds for p in phases if p.phase in ENGINE_PHASES) / sum(p.seconds for p in phases)


def table_of(runs: Sequence[Run]) -> Table:
    """Return the table of the runs from one source."""
    mean_s, mean_cpu_s = (sum(getattr(r, key) for r in runs) / len(runs) for key in ("seconds", "cpu_s"))
    title = (
        f"{runs[0].source}: {mean_s:.1f} s, {mean_cpu_s:.1f} processor s, {runs[0].trials} trials, answer "
        f"{runs[0].answer or 'none'}, engines {engine_share(runs):.0%}"
    )
    table = Table(title=title)
    table.add_column("phase")
    for name in ("seconds", "share", "own cpu s", "engines' cpu s", "times"):
        table.add_column(name, justify="right")
    for row in rows(runs):
        name = f"{row.phase} (engine)" if row.phase in ENGINE_PHASES else row.phase
        figures = (f"{row.seconds:.2f}", f"{row.seconds / mean_s:.1%}", f"{row.cpu_s:.2f}")
        table.add_row(name, *figures, f"{row.engine_cpu_s:.2f}", f"{row.times:.0f}")
    return table


@click.command()
@click.argument("cards", nargs=-1, required=True, type=click.Path(exists=True))
@click.option("--data", required=True, type=click.Path(exists=True))
@click.option("--budget", default="top1-drop<=1%", show_default=True)
@click.option("--trials", type=int, default=6, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--minutes", type=float, help="As of `fewbit search`.")
@click.option("--source", "sources", multiple=True, type=click.Path(path_type=Path, exists=True))
@click.option("--turns", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--rows", "file", type=click.Path(path_type=Path), help="Append each run as a line of JSON.")
def main(
    cards: tuple[str, ...],
    data: str,
    budget: str,
    trials: int,
    seed: int,
    minutes: float | None,
    sources: tuple[Path, ...],
    turns: int,
    file: Path | None,
) -> None:
    """Time searches and say where the time goes."""
    arguments = [*cards, "--data", data, "--budget", budget, "--trials", str(trials), "--seed", str(seed)]
    arguments += [] if minutes is None else ["--minutes", str(minutes)]
    sources = sources or (_HERE,)
    runs: dict[Path, list[Run]] = {source: [] for source in sources}
    for _ in range(turns):
        for source in sources:
            with tempfile.TemporaryDirectory() as folder:
                run = search(source, arguments, Path(folder) / "study")
            runs[source].append(run)
            if file is not None:
                kept = {**run._asdict(), "phases": [p.model_dump() for p in run.phases], "cards": cards}
                with file.open("a") as lines:
                    lines.write(json.dumps(kept) + "\n")
    console = Console(width=110)
    for source in sources:
        console.print(table_of(runs[source]))


if __name__ == "__main__":
    main()
