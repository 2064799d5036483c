"""One network in a search: its images, and the files made of it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewbit.clock import each_timed, phase
from fewbit.data.image_set import ImageSet
from fewbit.engines.session import EngineName, Setting
from fewbit.export.facts import describe_export, sums_of
from fewbit.export.onnx_out import export_onnx
from fewbit.export.packed import packed_bytes
from fewbit.load.card import Card
from fewbit.measure.host import describe_host
from fewbit.net import Net
from fewbit.place.targets import target
from fewbit.recipe import Prepared, Recipe, image_context, read_recipe
from fewbit.search.journal import Part
from fewbit.search.ladder import PLAIN
from fewbit.search.mixed_precision import Mix, mix_precisions
from fewbit.search.proposal import Proposal
from fewbit.search.ranking import images_for_ranking, rank_layers
from fewbit.search.region_probe import RegionProbe
from fewbit.search.trial import LayerRecord
from fewbit.search.weight_widths import Widths, choose_widths
from fewbit.sensitivity.sqnr import Signal, layer_records
from fewbit.step import Context
from fewbit.version import __version__

_BATCH_VALUES = 4 * 3 * 224 * 224
_FLOAT_FORM: EngineName = "openvino"  # whose rewrites a float file has
_RECORD_IMAGES = 32

Advance = Callable[[str, float], None]


@dataclass(frozen=True)
class Images:
    """The images of a network by what they are for; no image is in two parts of one source."""

    calibration: ImageSet
    search: ImageSet
    holdout: ImageSet

    def part(self, name: Part) -> ImageSet:
        """Return a part by its name."""
        return {"calibration": self.calibration, "search": self.search, "holdout": self.holdout}[name]


@dataclass(frozen=True)
class Built:
    """A recipe carried out: the file that is measured.

    Attributes:
        path: The file.
        recipe: What was done.
        net: The network in the file; none where the file was there already.
        float_net: The same before anything that is not exact was done to it.
    """

    path: Path
    recipe: Recipe
    net: Net | None = None
    float_net: Net | None = None

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    @property
    def packed_bytes(self) -> int:
        """Size of the file were its narrow weights packed; see `fewbit.export.packed.packed_bytes`."""
        return 0 if self.net is None else packed_bytes(self.net, self.bytes)  # a float file was there


def digest_network(card: Card, net: Net) -> str:
    """Name a network by all that its results depend on: its graph, its weights, its input and its classes."""
    total = hashlib.sha256()
    for part in (card.input.digest(), str(card.network.classes), str(net.graph.graph)):
        total.update(part.encode())
    for name, tensor in sorted(net.graph.state_dict().items()):
        total.update(name.encode())
        total.update(str(tensor.dtype).encode() + str(tuple(tensor.shape)).encode())
        total.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    return total.hexdigest()[:12]


class Workbench:
    """One network of a search.

    Args:
        card: Says what it is.
        net: The network, loaded.
        images: Its images.
        folder: Where its files go.
        seed: Of its recipes.
        saturating: Engines that do not sum products of u8 and s8 exactly on this processor.
    """

    def __init__(
        self,
        card: Card,
        net: Net,
        images: Images,
        folder: Path,
        seed: int,
        saturating: Collection[EngineName] = (),
    ) -> None:
        self.card, self.net, self.images, self.folder, self.seed = card, net, images, folder, seed
        self.saturating = frozenset(saturating)
        self.name = card.network.name
        self.digest = digest_network(card, net)
        self._prepared = Prepared(net)
        self._signals: dict[str, dict[str, Signal]] = {}
        self._ranked: dict[tuple[EngineName, str], tuple[str, ...]] = {}

    def key(self, proposal: Proposal) -> str:
        """Return the digest of all that determines a trial."""
        recipe = self.recipe(proposal)
        calibrates = self.images.calibration.digest if recipe.uses_images else ""
        parts = (
            self.name,
            self.digest,
            recipe.digest(),
            proposal.engine,
            proposal.float_precision,
            calibrates,
            self.images.search.digest,
            str(self.seed),
            __version__,
            *(("saturating",) if self._saturates(recipe, proposal.engine) else ()),
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]

    def recipe(self, proposal: Proposal) -> Recipe:
        """Return the recipe of a proposal."""
        made = read_recipe(proposal.base)
        if proposal.bits:
            made = made.with_widths(dict(proposal.bits))
        if proposal.keep_float:
            made = made.with_float(proposal.keep_float)
        if proposal.silu is not None:
            made = made.with_silu(proposal.silu)
        if proposal.takes == "uint8":
            made = made.with_pixels()
        changed = proposal.keep_float or proposal.bits or proposal.silu or proposal.takes == "uint8"
        return made.model_copy(update={"name": proposal.recipe}) if changed else made

    def file_of(self, recipe: Recipe, engine: EngineName) -> Path:
        """Return where the file of a recipe goes; one float file serves every engine."""
        suffix = f"-{engine}" if recipe.places else ""
        return self.folder / f"{self.name}-{recipe.name}{suffix}.onnx"

    def build(self, recipe: Recipe, engine: EngineName, advance: Advance | None = None) -> Built:
        """Carry a recipe out and export it, the same bytes each time; a float file is one for all engines.

        Raises:
            RecipeError: The recipe does not fit the network.
            OutputError: The file cannot be written.
        """
        try:
            context = self._context(engine if recipe.places else _FLOAT_FORM, advance)
            float_net, net = self._prepared.exact(recipe, context), self._prepared.run(recipe, context)
        except Exception:  # what is left of a kill serves the next run, what is left of a failure nobody
            shutil.rmtree(self._partial, ignore_errors=True)
            raise
        path = self.file_of(recipe, engine)
        with phase("export"):
            sums = sums_of(net, engine not in self.saturating)
            facts = describe_export(self.card, recipe, engine, self.images.calibration, sums)
            aim = target(engine, native_bf16=describe_host().bf16) if recipe.places else None
            export_onnx(net, path, aim, facts, recipe.takes)
        shutil.rmtree(self._partial, ignore_errors=True)
        return Built(path, recipe, net, float_net)

    @phase("layers")
    def records(self, built: Built) -> tuple[LayerRecord, ...]:
        """Look at each layer of what was built, on a few calibration images."""
        assert built.float_net is not None and built.net is not None
        kind = digest_network(self.card, built.float_net)
        signals = self._signals.setdefault(kind, {})
        return layer_records(built.float_net, built.net, self._some(_RECORD_IMAGES), signals)

    @phase("rank")
    def ranking(self, engine: EngineName, base: str, advance: Advance | None = None) -> tuple[str, ...]:
        """Return the layers in the order in which to leave them in float; see `rank_layers`."""
        if (engine, base) not in self._ranked:
            recipe = read_recipe(base)
            net = self._prepared.run(recipe, self._context(engine, advance))
            few = list(self._some(images_for_ranking(self.card.input.size)))
            self._ranked[engine, base] = rank_layers(self.net, net, few)
            shutil.rmtree(self._partial, ignore_errors=True)
        return self._ranked[engine, base]

    def mixes(self, setting: Setting, tell: Callable[[float], None]) -> tuple[Mix, ...]:
        """Return which regions to leave in float on an engine; see `mix_precisions`.

        Raises:
            EngineError: The engine does not run one of the files.
        """
        folder, exact = self.folder / "regions", setting.engine not in self.saturating
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe = RegionProbe(self.net, setting, folder, PLAIN, self.seed, exact)
            few = list(self._some(images_for_ranking(self.card.input.size)))
            return mix_precisions(probe, few, tell=tell)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def widths(self, limit_s: float | None, tell: Callable[[float], None]) -> tuple[Widths, ...]:
        """Return which widths to give the weights of each layer; see `choose_widths`.

        Args:
            limit_s: Seconds that this may take; none for as long as it takes.
            tell: Told the fraction done.

        Raises:
            FewbitError: It would take longer.
        """
        few = list(self._some(images_for_ranking(self.card.input.size)))
        context = self._context("onnxruntime", None)
        folded = self._prepared.run(read_recipe("float32"), context)
        return choose_widths(folded, few, limit_s=limit_s, tell=tell)

    def _context(self, engine: EngineName, advance: Advance | None) -> Context:
        exact = engine not in self.saturating
        return image_context(self.images.calibration, engine, self.seed, advance, self._partial, exact)

    def _saturates(self, recipe: Recipe, engine: EngineName) -> bool:
        return recipe.places and engine in self.saturating

    @property
    def _partial(self) -> Path:
        """Return where long steps keep what they have done until the file is there."""
        return self.folder / "partial"

    def _some(self, images: int) -> Iterator[Tensor]:
        """Give a few calibration images; few at once of large ones, whose activations need much memory."""
        channels, rows, columns = self.card.input.size
        batch = min(32, max(1, _BATCH_VALUES // (channels * rows * columns)))
        few = np.arange(min(images, len(self.images.calibration)))
        for pixels in each_timed(self.images.calibration.batches(batch, few), "preprocess"):
            yield torch.from_numpy(pixels)
