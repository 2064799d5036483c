"""Speed against the peers: fewbit's answer and those installed take turns on every network.

    python bench/speed.py --peers PYTHON --rows speed.jsonl
    python bench/speed.py resnet50 ../shared/networks/mobilenet_v2.toml --batches 8 --threads 1

Without arguments the networks are ten of torchvision's, with random weights (`pip install --no-deps
'torchvision==0.28.*'`); a card brings its own weights and images. On each, with each batch and number of
threads, stand: ONNX Runtime in float32 and in its own int8 (quantize_static: QDQ, u8 activations, s8 weights
a channel, after quant_pre_process); OpenVINO in float32, in bf16, and as it comes with its latency and
throughput hints; NNCF's int8 model with these hints and with streams; torch.compile in float32 and bf16 (it
needs a C++ compiler); and fewbit's candidates (`speed_answers.py`). With several threads, whatever has
streams runs in one stream of all threads and in as many as threads, a batch in each. What counts is images a
second.

The peers get the network as it was captured, without fewbit's rewrites. Where it has SiLU, fewbit's
candidates have it as a scaled GELU too, which cost a trained network up to 0.4 points (`bench/silu.py`).
Hard-swish, which cost it 2, is not counted.

Every contender has a process of its own; one that crashes has a row that says so. How rounds go, and which
ratio is shown, says `speed_turns.py`. "of int8 peak" is twice the multiplications of the images a second
over what large int8 convolutions reach here (`python bench/speed_peak.py`), times threads. "ms by cause" is
the engine's own profile of the answer, one call at a time on the threads of one stream.

Fewbit may take a batch in parts: with 32 images at hand it runs 1, 2, 4, 8 or 32 at a time. Its mixes of
precisions are measured on one thread, for batch 1 and for batch 8.

With `--files` the files are kept in a folder, and a second run makes only those that are missing there. With
`--rows` the rows of every case are kept in a file as they come, and a second run measures only the cases
that are missing there; delete a case's lines to measure it anew. `--peers` names the Python that has nncf.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fewbit.cli.options import COUNT, Numbers
from fewbit.engines.causes import read_parts, sum_by_cause
from fewbit.engines.session import Setting
from fewbit.errors import EngineError, FewbitError
from fewbit.measure.host import describe_host, usable_cores, versions
from speed_answers import Candidate, candidates
from speed_networks import ZOO, Network, import_torchvision, open_network
from speed_peak import find_peak
from speed_peers import PeerFiles, peer_entrants
from speed_process import EngineTimed
from speed_table import Row, lines_of, rows_of, tables_of
from speed_turns import Entrant, Opened, Pace, measure_case

_PROFILE_S, _PROFILE_CALLS = 4.0, (3, 20)
_WIDTH = 400


def key_of(row: Row) -> tuple[Any, ...]:
    """Return the case that a row belongs to."""
    return tuple(row.get(name) for name in ("source", "batch", "threads", "seed", "peers"))


def read_rows(path: Path | None) -> list[Row]:
    """Read the rows kept so far; a last line that was cut off is taken off the file."""
    if path is None or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]), encoding="utf-8")
        lines.pop()
    return [json.loads(line) for line in lines]


def own_entrants(
    found: Sequence[tuple[Candidate, Sequence[Candidate]]],
) -> tuple[list[Entrant], dict[tuple[str, str], Candidate]]:
    """Return fewbit's candidates as entrants, and the candidates by name and setting."""
    by_name = {}

    def entrant(candidate: Candidate, further: Sequence[Candidate] = ()) -> Entrant:
        name, how = f"fewbit {candidate.name}", describe(candidate.setting)
        by_name[name, how] = candidate
        start = partial(open_candidate, candidate)
        return Entrant(name, how, candidate.form, True, start, tuple(map(entrant, further)))

    return [entrant(first, further) for first, further in found], by_name


def open_candidate(candidate: Candidate) -> Opened:
    """Open a candidate in a process of its own."""
    return EngineTimed(candidate.path, candidate.setting)


def describe(setting: Setting) -> str:
    """Say how a file is run, threads left out.

    Example:
        >>> describe(Setting(engine="openvino", float_precision="bf16", batch=4, threads=2, streams=2))
        'openvino with bf16, 2 streams, 4 at a time'
    """
    wide = " with bf16" if setting.float_precision == "bf16" else ""
    streams = f"{setting.streams} stream{'s' if setting.streams > 1 else ''}"
    return f"{setting.engine}{wide}, {streams}, {setting.batch} at a time"


def causes_of(candidate: Candidate, ms_per_batch: float) -> dict[str, float]:
    """Return the milliseconds by cause of one call of a candidate, alone; empty without a profile."""
    low, high = _PROFILE_CALLS
    calls = int(min(high, max(low, 1e3 * _PROFILE_S / ms_per_batch)))
    try:
        timed = EngineTimed(candidate.path, candidate.setting)
        try:
            return sum_by_cause(timed.session.profile(calls), read_parts(candidate.path))
        finally:
            timed.close()
    except EngineError as error:
        print(f"no profile: {error}", file=sys.stderr)
        return {}


def measure_network(
    network: Network,
    wanted: Sequence[tuple[int, int]],
    pace: Pace,
    peers: str,
    only: str,
    peak_gops: float,
    tell: Callable[[str], None],
    kept: Path | None = None,
) -> Iterator[list[Row]]:
    """Yield the rows of each case (batch, threads) of a network; its files are made once."""
    wanted_peers = tuple(only.split(","))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if kept is None else kept
        files = PeerFiles(network, folder, peers, usable_cores(), pace.seed)
        for batch, threads in wanted:
            tell(f"batch {batch}, {threads} threads: making files")
            own, by_name = own_entrants(candidates(network, folder, batch, threads, pace.seed))
            others = [e for e in peer_entrants(files, batch, threads) if e.name.startswith(wanted_peers)]
            standings = measure_case([*others, *own], pace, tell)
            case = {
                "network": network.name,
                "source": network.source,
                "batch": batch,
                "threads": threads,
                "seed": pace.seed,
                "peers": only,
                "macs": network.macs,
            }
            rows = rows_of(standings, case, network.macs, peak_gops * threads)
            for row in rows:
                if row["answer"]:
                    tell("profile of the answer")
                    chosen = by_name[row["contender"], row["how"]]
                    row["ms_by_cause"] = causes_of(chosen, row["ms_per_batch_p50"])
            yield rows


def keep(rows: Sequence[Row], path: Path | None) -> None:
    """Add rows to the file, all of a case at once."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(row)}\n" for row in rows))


def machine_row(rows: Sequence[Row], path: Path | None) -> Row:
    """Return the row that describes the machine and its peak, measuring it where it is not known."""
    known = next((row for row in rows if "peak_gops" in row), None)
    if known is not None:
        return known
    print("integer peak", file=sys.stderr, flush=True)
    host = describe_host().model_dump(mode="json")
    row = {"peak_gops": find_peak(), "host": host, "versions": versions()}
    keep([row], path)
    return row


@click.command()
@click.argument("networks", nargs=-1, metavar="[NETWORK|CARD]...")
@click.option("--batches", type=Numbers(int, 1), default="1,8,32", show_default=True)
@click.option("--threads", "threads", type=Numbers(int, 1), default="1,2", show_default=True)
@click.option("--sittings", type=COUNT, default=6, show_default=True, help="Of the answer and the finalists.")
@click.option("--rounds", type=COUNT, default=4, show_default=True, help="Of each sitting, at least 3.")
@click.option("--first-rounds", type=COUNT, default=5, show_default=True, help="Of every contender.")
@click.option("--block", type=float, default=0.2, show_default=True, help="Seconds of one block.")
@click.option("--images", type=COUNT, default=32, show_default=True, help="That calibrate, for every tool.")
@click.option("--peers", default=sys.executable, help="The Python that has nncf.")
@click.option("--only", default="", help="Only peers whose names begin so: nncf,torch.compile bf16")
@click.option("--rows", "rows_path", type=click.Path(path_type=Path), help="Keep every row in this file.")
@click.option("--files", "files_path", type=click.Path(path_type=Path), help="Keep the files in this folder.")
@click.option("--all", "everyone", is_flag=True, help="Show every contender too.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the tables.")
def main(
    networks: tuple[str, ...],
    rows_path: Path | None,
    files_path: Path | None,
    everyone: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure fewbit's answer beside the peers and print the tables."""
    sources = networks or ZOO
    if set(sources) & set(ZOO):
        import_torchvision()
    pace = Pace.of_options(options)
    rows = read_rows(rows_path)
    machine = machine_row(rows, rows_path)
    found = [row for row in rows if "peak_gops" not in row]
    for source in sources:
        known = {key_of(row) for row in found}
        cases = list(itertools.product(options["batches"], options["threads"]))
        wanted = [(b, t) for b, t in cases if (source, b, t, pace.seed, options["only"]) not in known]
        if not wanted:
            continue
        try:
            network = open_network(source, pace.seed, options["images"])
        except FewbitError as error:
            raise click.UsageError(str(error)) from error

        def tell(doing: str, name: str = network.name) -> None:
            print(f"{name}: {doing}", file=sys.stderr, flush=True)

        kept = None if files_path is None else files_path / f"{network.name}-{pace.seed}"
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
        peers, only, peak = options["peers"], options["only"], machine["peak_gops"]
        measured = measure_network(network, wanted, pace, peers, only, peak, tell, kept)
        for case in measured:
            found += case
            keep(case, rows_path)
    if as_json:
        print(json.dumps({"machine": machine, "rows": found}, indent=1))
        return
    console = Console(width=_WIDTH)
    for table in tables_of(found, everyone):
        console.print(table)
    for line in lines_of(found):
        console.print(line, highlight=False, markup=False)


if __name__ == "__main__":
    main()
