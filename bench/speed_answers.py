"""Fewbit's candidates of `speed.py`: files of one network, each with the settings worth trying.

A new kind of file (mixed precision, images in uint8) enters by a line in `FILES`, or by another function that
`candidates` calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewbit.engines.session import EngineName, FloatPrecision, Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.measure.host import sums_exactly
from fewbit.place.targets import target
from fewbit.recipe import Context, read_recipe, run_recipe
from fewbit.spec import Scheme
from speed_networks import Network
from speed_turns import Form

# (recipe, engine, what the engine computes float operators in)
FILES: tuple[tuple[str, EngineName, FloatPrecision], ...] = (
    ("float32", "onnxruntime", "float32"),
    ("float32", "openvino", "float32"),
    ("float32", "openvino", "bf16"),
    ("int8", "onnxruntime", "float32"),
    ("int8", "openvino", "float32"),
    ("int8", "openvino", "bf16"),
)
_BATCH = 8


@dataclass(frozen=True)
class Candidate:
    """A file and one way to run it.

    Attributes:
        name: How the file was made.
        form: What its matrix products compute in.
        path: The file.
        setting: The way.
    """

    name: str
    form: Form
    path: Path
    setting: Setting


def candidates(network: Network, folder: Path, batch: int, threads: int, seed: int) -> list[Candidate]:
    """Return what might be the fastest way to run a network; files are made in `folder` once."""
    found = []
    for recipe, engine, precision in FILES:
        path = make_file(network, recipe, engine, folder, seed)
        form: Form = precision if recipe == "float32" else "int8"
        for streams in sorted({1, threads}):
            setting = Setting(
                engine=engine, float_precision=precision, batch=batch, threads=threads, streams=streams
            )
            found.append(Candidate(recipe, form, path, setting))
    return found


def make_file(network: Network, recipe: str, engine: EngineName, folder: Path, seed: int) -> Path:
    """Run a recipe on a network for an engine, unless its file is there."""
    path = folder / f"{recipe}-{engine}.onnx"
    if not path.exists():

        def batches() -> Iterator[Tensor]:
            return iter(torch.split(torch.from_numpy(network.images), _BATCH))

        aim = target(engine, sums_exactly(engine))
        made, _ = run_recipe(read_recipe(recipe), network.net, Context(Scheme(), aim, batches, seed))
        export_onnx(made, path, aim)
    return path
