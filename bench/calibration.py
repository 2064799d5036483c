"""Time and memory of quantizing one network: fewbit beside ONNX Runtime and NNCF.

    python bench/calibration.py ../shared/networks/resnet20.toml --data ../shared/data/cifar10/train.tar \
        --images 64,512 --peers PYTHON

All tools read the same preprocessed float32 images from one file, in batches of the same size, and the peers
read the float network, BatchNorm folded, as ONNX. Each measurement is a process of its own
(`calibration_child.py`), on all cores; with `--rounds` the tools take turns and the median is shown.
"seconds" is from the float network on disk to the quantized one on disk, imports left out (they stand beside
it), "cpu s" the same in processor time, which other work on the machine disturbs less. "MiB" is the peak of
the resident memory, "over start" what of it came after the imports. `--peers` names the Python that has
onnxruntime and nncf; a tool that it does not have is left out with a line. A measurement that needs more than
`--limit-gib` is stopped and says so. `--cores 1` keeps each tool to one core.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from fewbit.data.image_set import ImageSet
from fewbit.data.images import open_images
from fewbit.data.sample import choose_balanced
from fewbit.load.card import Card, read_card

CHILD = Path(__file__).with_name("calibration_child.py")
PEERS = {
    "onnxruntime:MinMax": "onnxruntime",
    "onnxruntime:Percentile": "onnxruntime",
    "nncf:onnx": "nncf",
    "nncf:openvino": "nncf",
}
OWN = ("fewbit:int8", "fewbit:int8-moving-average", "fewbit:int8-percentile", "fewbit:int8-mse")
FLOAT = "fewbit:float32"
Figures = dict[str, float]


def write_images(card: Card, data: Path, images: int, seed: int, path: Path) -> int:
    """Write preprocessed images, chosen class-balanced, as raw float32 (N, C, H, W); return N."""
    source = open_images(data, card.labels_path)
    chosen = choose_balanced(source.targets, images, seed)
    with (
        ImageSet(source, card.input, card.network.classes, indices=chosen) as decoded,
        path.open("wb") as file,
    ):
        for batch in decoded.batches(32):
            batch.astype(np.float32).tofile(file)
        return len(decoded)


def measure(python: str, job: dict[str, Any]) -> Figures | str:
    """Run one child to its end; return its figures, or in a few words why there are none."""
    limit_bytes = job["limit_bytes"]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [python, str(CHILD), json.dumps(job)], stdout=output, stderr=errors, text=True
        )
        process, begin = psutil.Process(child.pid), time.perf_counter()
        while child.poll() is None:
            if process.memory_info().rss > limit_bytes:
                child.kill()
                child.wait()
                return f"over {limit_bytes / 2**30:.0f} GiB after {time.perf_counter() - begin:.0f} s"
            time.sleep(0.02)
        output.seek(0)
        errors.seek(0)
        if child.returncode:
            lines = errors.read().strip().splitlines() or ["no message"]
            return f"exit {child.returncode}: {lines[-1][:80]}"
        figures: Figures = json.loads(output.read().strip().splitlines()[-1])
        return figures


def has(python: str, module: str) -> bool:
    """Tell whether a Python has a module."""
    return (
        subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0
    )


def median(rounds: list[Figures | str]) -> Figures | str:
    """Return the median of each figure, or the first failure."""
    figures = [one for one in rounds if isinstance(one, dict)]
    if len(figures) < len(rounds):
        return next(one for one in rounds if isinstance(one, str))
    return {key: statistics.median(one[key] for one in figures) for key in figures[0]}


def show(results: dict[tuple[str, int], Figures | str], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    for heading in (
        "tool",
        "images",
        "seconds",
        "cpu s",
        "imports s",
        "peak MiB",
        "over start MiB",
        "file KiB",
    ):
        table.add_column(heading, justify="left" if heading == "tool" else "right")
    for (tool, images), found in results.items():
        if isinstance(found, str):
            table.add_row(tool, str(images), found, "", "", "", "", "")
            continue
        mib = found["peak_bytes"] / 2**20, (found["peak_bytes"] - found["start_bytes"]) / 2**20
        table.add_row(
            tool,
            str(images),
            f"{found['seconds']:.2f}",
            f"{found['cpu_s']:.2f}",
            f"{found['import_s']:.1f}",
            f"{mib[0]:.0f}",
            f"{mib[1]:.0f}",
            f"{found['file_bytes'] / 1024:.0f}",
        )
    Console(width=110).print(table)


def take_turns(
    common: dict[str, Any], tools: list[str], counts: list[int], rounds: int, peers: str
) -> dict[tuple[str, int], list[Figures | str]]:
    """Write the float network, then measure each tool on each number of images, `rounds` times."""
    failed = measure(sys.executable, common | {"tool": FLOAT, "images": 0, "out": common["float_file"]})
    if isinstance(failed, str):
        raise click.ClickException(f"{common['card']}: the float network could not be written ({failed})")
    results: dict[tuple[str, int], list[Figures | str]] = {}
    for count in counts:
        for _ in range(rounds):
            for tool in tools:
                suffix = ".xml" if tool == "nncf:openvino" else ".onnx"
                out = Path(common["float_file"]).with_name(f"out-{tool.replace(':', '-')}{suffix}")
                job = common | {"tool": tool, "images": count, "out": str(out)}
                python = peers if tool in PEERS else sys.executable
                results.setdefault((tool, count), []).append(measure(python, job))
    return results


@click.command()
@click.argument("card", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path), help="Labelled images.")
@click.option(
    "--images", "counts", default="64,512", show_default=True, help="Numbers of calibration images."
)
@click.option("--batch", default=8, show_default=True, help="Images in one call, for every tool.")
@click.option("--rounds", default=1, show_default=True, help="Measurements of each tool; they take turns.")
@click.option("--peers", default=sys.executable, help="The Python that has onnxruntime and nncf.")
@click.option("--only", default="", help="Only these tools: fewbit, nncf:openvino, ...; several with commas.")
@click.option(
    "--target", default="onnxruntime", show_default=True, help="The engine that fewbit quantizes for."
)
@click.option("--cores", default=os.cpu_count(), show_default=True, help="Cores that a tool may use.")
@click.option("--limit-gib", default=8.0, show_default=True, help="Stop a measurement beyond this memory.")
@click.option("--seed", default=0, show_default=True, help="Of the choice of images.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
def main(
    card: Path,
    data: Path,
    counts: str,
    batch: int,
    rounds: int,
    peers: str,
    only: str,
    target: str,
    cores: int,
    limit_gib: float,
    seed: int,
    as_json: bool,
) -> None:
    """Measure time and memory of quantizing CARD with fewbit and its peers."""
    wanted = [int(count) for count in counts.split(",")]
    described = read_card(card)
    names = tuple(only.split(","))
    tools = [
        t for t in (*PEERS, *OWN) if t in names or t.startswith(tuple(f"{n}:" for n in names)) or not only
    ]
    missing = {module for module in set(PEERS.values()) if not has(peers, module)}
    for tool in [tool for tool in tools if PEERS.get(tool) in missing]:
        click.echo(f"{tool}: left out, {peers} has no {PEERS[tool]}", err=True)
        tools.remove(tool)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = write_images(described, data, max(wanted), seed, folder / "images.raw")
        common = {
            "card": str(card.absolute()),
            "float_file": str(folder / "float.onnx"),
            "images_file": str(folder / "images.raw"),
            "size": described.input.size,
            "batch": batch,
            "target": target,
            "cores": cores,
            "limit_bytes": limit_gib * 2**30,
        }
        results = take_turns(common, tools, sorted({min(count, found) for count in wanted}), rounds, peers)
        ordered = sorted(results.items(), key=lambda item: (item[0][1], tools.index(item[0][0])))
        medians = {key: median(rounds_) for key, rounds_ in ordered}
    if as_json:
        rows = [{"tool": tool, "images": n, "found": found} for (tool, n), found in medians.items()]
        click.echo(json.dumps(rows, indent=1))
    else:
        show(medians, f"Quantizing {described.network.name}, batches of {batch}, {cores} cores")


if __name__ == "__main__":
    main()
