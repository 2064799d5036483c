"""Fewbit's candidates of `speed.py`: files of one network, each with the settings worth trying.

A new kind of file enters by a line in `files_of`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fewbit.engines.session import EngineName, FloatPrecision, Setting
from fewbit.errors import EngineError
from fewbit.export.onnx_out import export_onnx
from fewbit.files import write_text
from fewbit.measure.host import describe_host, sums_exactly
from fewbit.place.targets import target
from fewbit.recipe import Context, Recipe, read_recipe, run_recipe
from fewbit.search.cost import count_silus
from fewbit.search.mixed_precision import mix_precisions
from fewbit.search.region_probe import RegionProbe
from fewbit.spec import ImageInput, Scheme, SiluForm
from speed_networks import Network
from speed_turns import Form

_BATCH = 8
_MIXED = "mixed"
_FASTER = 0.97
_SENSITIVITY_IMAGES = 4


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


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        recipe: A shipped recipe, or "mixed": int8 with the regions in float that make it fastest.
        engine: Whose file it is.
        precision: What the engine computes float operators in.
        takes: What the file takes.
        silu: What takes the place of SiLU; none where it stays.
    """

    recipe: str
    engine: EngineName
    precision: FloatPrecision = "float32"
    takes: ImageInput = "float32"
    silu: SiluForm | None = None

    @property
    def name(self) -> str:
        """What the tables call it."""
        form = "" if self.silu is None else f", SiLU as {self.silu}"
        return f"{self.recipe} of pixels{form}" if self.takes == "uint8" else f"{self.recipe}{form}"


def files_of(network: Network) -> tuple[Kind, ...]:
    """Return the kinds of file worth trying for a network on this host."""
    wide: FloatPrecision = "bf16" if describe_host().bf16 else "float32"
    found = [Kind("float32", "onnxruntime"), Kind("int8", "onnxruntime"), Kind("float32", "openvino")]
    if wide == "bf16":
        found += [Kind("float32", "openvino", wide), Kind("int8", "openvino")]
    found += [Kind("int8", "openvino", wide), Kind(_MIXED, "openvino", wide)]
    if network.net.image_range is not None:
        found += [Kind("int8", "onnxruntime", takes="uint8"), Kind("float32", "openvino", wide, "uint8")]
        found += [Kind(recipe, "openvino", wide, "uint8") for recipe in ("int8", _MIXED)]
    if count_silus(network.net):  # hard-swish is too far from it to count without accuracy
        gelu = [k for k in found if (k.recipe, k.engine, k.precision) == ("int8", "openvino", wide)]
        found += [replace(kind, silu="gelu") for kind in gelu]
    return tuple(found)


def candidates(
    network: Network, folder: Path, batch: int, threads: int, seed: int
) -> list[tuple[Candidate, tuple[Candidate, ...]]]:
    """Return what might be the fastest way to run a network, and further ways of each that proves fast.

    The first way is one stream a thread with `_BATCH` images each, or the batch where that is smaller; the
    further ones take a part of the batch at a time, or all threads for one batch.
    """
    found = []
    for kind in files_of(network):
        path = (
            make_mix(network, kind, folder, min(batch, _BATCH), seed)
            if kind.recipe == _MIXED
            else make_file(network, kind, folder, seed, mark=f"-{kind.silu}" if kind.silu else "")
        )
        if path is None:
            continue
        form: Form = kind.precision if kind.recipe == "float32" else "int8"
        common = Setting(engine=kind.engine, float_precision=kind.precision, threads=threads)
        first, *further = (
            Candidate(kind.name, form, path, common.model_copy(update={"batch": part, "streams": streams}))
            for part, streams in ways_of(batch, threads)
        )
        found.append((first, tuple(further)))
    return found


def ways_of(batch: int, threads: int) -> list[tuple[int, int]]:
    """Return the (images a call, streams) worth trying where `batch` images are at hand.

    Example:
        >>> ways_of(32, 2)
        [(8, 2), (1, 2), (2, 2), (4, 2), (32, 2), (8, 1), (32, 1)]
    """
    first = min(batch, _BATCH)
    parts = [part for part in (1, 2, 4, 8, batch) if part <= batch]
    found = [(first, threads), *((part, threads) for part in dict.fromkeys(parts) if part != first)]
    if threads > 1:
        found += [(part, 1) for part in dict.fromkeys((first, batch))]
    return found


def make_file(
    network: Network, kind: Kind, folder: Path, seed: int, recipe: Recipe | None = None, mark: str = ""
) -> Path:
    """Run a recipe on a network for an engine, unless its file is there.

    Args:
        network: The network.
        kind: The kind of file.
        folder: Where it is made.
        seed: Of every random choice.
        recipe: What to run, where it is no shipped one.
        mark: What tells its file from others of its kind.
    """
    path = folder / f"{kind.recipe}-{kind.engine}-{kind.takes}{mark}.onnx"
    if not path.exists():
        recipe = recipe or read_recipe(kind.recipe)

        def batches() -> Iterator[Tensor]:
            return iter(torch.split(torch.from_numpy(network.images), _BATCH))

        aim = target(kind.engine, sums_exactly(kind.engine), describe_host().bf16)
        context = Context(Scheme(), aim, batches, seed)
        recipe = recipe if kind.silu is None else recipe.with_silu(kind.silu)
        recipe = recipe.with_pixels() if kind.takes == "uint8" else recipe
        made, _ = run_recipe(recipe, network.net, context)
        export_onnx(made, path, aim if recipe.places else None, image=kind.takes)
    return path


def make_mix(network: Network, kind: Kind, folder: Path, batch: int, seed: int) -> Path | None:
    """Make the fastest mix of precisions for a batch, measured once; none where integers are faster."""
    kept = folder / f"mix-{kind.engine}-{batch}.txt"
    if not kept.exists():
        setting = Setting(engine=kind.engine, float_precision=kind.precision, batch=batch)
        write_text(kept, "\n".join(measure_mix(network, setting, seed)))
    layers = kept.read_text(encoding="utf-8").splitlines()
    recipe = read_recipe("int8").with_float(layers)
    return make_file(network, kind, folder, seed, recipe, f"-{batch}") if layers else None


def measure_mix(network: Network, setting: Setting, seed: int) -> tuple[str, ...]:
    """Return the layers that are left in float in the fastest mix; none where no mix is faster by 3 %."""
    images = torch.from_numpy(network.images[:_SENSITIVITY_IMAGES])
    with TemporaryDirectory() as name:
        probe = RegionProbe(
            network.net, setting, Path(name), seed=seed, exact_sums=sums_exactly(setting.engine)
        )
        try:
            mixes = mix_precisions(probe, (images,))
        except EngineError:
            return ()
    return mixes[0].keep_float if mixes and mixes[0].ratio < _FASTER else ()
