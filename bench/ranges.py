"""Time and memory of the range estimators: each of fewbit's beside its counterpart of ONNX Runtime.

    python bench/ranges.py --values 1000000 --batches 16 --rounds 9

Every tool sees the same numbers, in batches of `--values`: normal ones, whose extremes grow slowly, or the
same behind a ReLU (`--of relu`). Each tool is a process of its own (`ranges_child.py`), on `--cores` cores; a
pair takes turns, and the ratio is taken within a turn: the median over the turns with its 95 % interval.
Times are those of the processor, which other work on the machine disturbs less: "observe" and "total" per
million values, "find" once a tensor, and "total" has its share of it. "state" is what an estimator keeps
between batches, half way and after the last where they differ; "peak" is the resident memory over that before
the first batch (libraries loaded). ONNX Runtime's calibrators that make histograms hold all batches until the
end ("calibrator:Entropy" shows it); beside fewbit stands their histogram by itself, fed batch by batch, the
faster and smaller way. Its Entropy has 128 bins, so one threshold and no search; "collector:entropy-2048"
searches.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from fewbit.measure.intervals import median_interval
from fewbit.registry import rows

CHILD = Path(__file__).with_name("ranges_child.py")
# What of ONNX Runtime's an estimator stands beside; those that search for the least error, beside Entropy.
COUNTERPARTS = {
    "minmax": "calibrator:MinMax",
    "moving_average": "calibrator:MinMax",
    "sample_average": "calibrator:MinMax",
    "percentile": "collector:percentile",
    "mean_std": "collector:distribution",
}
SEARCHES = "collector:entropy"
AS_USED = ("calibrator:Entropy", "calibrator:Percentile", "collector:entropy-2048")
Figures = dict[str, float]


class Child:
    """A process that measures one tool as often as it is asked to."""

    def __init__(self, python: str, job: dict[str, Any]) -> None:
        self.job = job
        command = [python, str(CHILD), json.dumps(job)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self) -> Figures:
        """Ask for one measurement."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what it printed before it died says why
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException(f"{self.job['tool']}: the process ended; its message stands above")
        figures: Figures = json.loads(line)
        million = self.job["values"] * self.job["batches"] / 1e6
        figures["observe_ms"] = 1e3 * figures["observe_s"] / million
        figures["find_ms"] = 1e3 * figures["find_s"]
        figures["total_ms"] = figures["observe_ms"] + figures["find_ms"] / million
        return figures

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def take_turns(
    python: str, peers: str, job: dict[str, Any], tools: list[str], rounds: int
) -> list[list[Figures]]:
    """Measure tools in turn, `rounds` times each after one that warms up; return the rounds of each."""
    found: list[list[Figures]] = [[] for _ in tools]
    children = [Child(python if tool.startswith("fewbit") else peers, job | {"tool": tool}) for tool in tools]
    try:
        for turn in range(rounds + 1):
            order = list(enumerate(children))
            for place, child in order if turn % 2 else order[::-1]:
                figures = child.measure()
                if turn:
                    found[place].append(figures)
    finally:
        for child in children:
            child.close()
    return found


def summary(tool: str, rounds: list[Figures]) -> dict[str, Any]:
    """Return the medians of one tool's rounds; of the memory the largest."""
    row: dict[str, Any] = {"tool": tool, "rounds": len(rounds)}
    for key in ("observe_ms", "find_ms", "total_ms"):
        values = [one[key] for one in rounds]
        row[key] = statistics.median(values)
    row |= {key: rounds[0][key] for key in ("half_state_bytes", "last_state_bytes", "low", "high")}
    row["peak_bytes"] = max(one["peak_bytes"] - one["start_bytes"] for one in rounds)
    return row


def compare(ours: list[Figures], theirs: list[Figures]) -> dict[str, Any]:
    """Return how many times as fast ours is, by the total time within each turn."""
    ratios = [other["total_ms"] / one["total_ms"] for one, other in zip(ours, theirs, strict=True)]
    interval = median_interval(ratios)
    return {"ratio": statistics.median(ratios), "interval95": [interval.low, interval.high]}


def show(found: list[dict[str, Any]], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    for heading in (
        "tool",
        "observe ms/M",
        "find ms",
        "total ms/M",
        "state bytes",
        "peak MiB",
        "times as fast as",
    ):
        table.add_column(heading, justify="left" if heading in ("tool", "times as fast as") else "right")
    for row in found:
        state = f"{row['last_state_bytes']:.0f}"
        if row["last_state_bytes"] != row["half_state_bytes"]:
            state = f"{row['half_state_bytes']:.0f}, {state}"
        ratio = ""
        if "against" in row:
            low, high = row["interval95"]
            ratio = f"{row['against']}: {row['ratio']:.1f} [{low:.1f}, {high:.1f}]"
        numbers = (f"{row[key]:.2f}" for key in ("observe_ms", "find_ms", "total_ms"))
        table.add_row(row["tool"], *numbers, state, f"{row['peak_bytes'] / 2**20:.1f}", ratio)
    Console(width=140).print(table)


@click.command()
@click.option("--values", default=1_000_000, show_default=True, help="Numbers in one batch.")
@click.option("--batches", default=8, show_default=True, help="Batches of one measurement.")
@click.option("--rounds", default=7, show_default=True, help="Measurements of each tool; a pair takes turns.")
@click.option("--of", "values_of", type=click.Choice(["normal", "relu"]), default="normal", show_default=True)
@click.option("--bits", default=8, show_default=True, help="Of the grid that the range is for.")
@click.option("--cores", default=1, show_default=True, help="Cores that a tool may use.")
@click.option("--only", default="", help="Only these rows: minmax,kl,...")
@click.option("--peers", default=sys.executable, help="The Python that has onnxruntime.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
def main(
    values: int,
    batches: int,
    rounds: int,
    values_of: str,
    bits: int,
    cores: int,
    only: str,
    peers: str,
    seed: int,
    as_json: bool,
) -> None:
    """Measure time and memory of fewbit's range estimators beside ONNX Runtime's."""
    wanted = only.split(",") if only else [*rows("ranges"), *AS_USED]
    job = {"values": values // 8 * 8, "batches": batches, "values_of": values_of, "bits": bits, "seed": seed}
    job["cores"] = cores
    found, peer_rows = [], {}
    for name in wanted:
        if name in AS_USED:
            turns = take_turns(sys.executable, peers, job, [name], 1)
            peer_rows[name] = summary(name, turns[0])
            continue
        against = COUNTERPARTS.get(name, SEARCHES)
        ours, theirs = take_turns(sys.executable, peers, job, [f"fewbit:{name}", against], rounds)
        found.append(summary(f"fewbit:{name}", ours) | {"against": against} | compare(ours, theirs))
        peer_rows.setdefault(against, summary(against, theirs))
    found += peer_rows.values()
    if as_json:
        click.echo(json.dumps({"job": job, "rows": found}, indent=1))
    else:
        numbers = f"{batches} batches of {values / 1e6:g} million, {values_of}, {bits} bits"
        show(found, f"Range estimators: {numbers}, {cores} core{'s' if cores > 1 else ''}, {rounds} rounds")


if __name__ == "__main__":
    main()
