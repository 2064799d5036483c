"""Measuring how the time of a network depends on the precision of its regions, on one engine and setting."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewbit.clock import phase
from fewbit.engines.process import EngineProcess, RemoteSession
from fewbit.engines.profile import OperatorTime
from fewbit.engines.session import Setting
from fewbit.errors import EngineError
from fewbit.export.onnx_out import export_onnx
from fewbit.export.sizes import Sizes
from fewbit.measure.host import describe_host
from fewbit.measure.region_latency import Floats, RegionLatency
from fewbit.measure.speed import measure_interleaved
from fewbit.net import Net
from fewbit.place.regions import regions_of
from fewbit.place.targets import target
from fewbit.recipe import Prepared, Recipe, read_recipe
from fewbit.spec import Scheme
from fewbit.step import Context

Assignments = NDArray[np.bool_]
Tell = Callable[[float], None]

AT_ONCE = 6
"""Mixes that take turns with the network all in integers."""
_ROUNDS = 8
_BLOCK_S, _LEAST_CALLS = 0.1, 2
_PROFILED_MS, _LEAST_PROFILED, _MOST_PROFILED = 300.0, 20, 300
_NS_PER_VALUE = 0.15  # what fits ResNet-20 and MobileNetV2 on OpenVINO best: kernels round on the way out


def _chunks(assignments: Assignments) -> Iterator[Assignments]:
    """Give assignments a few at a time."""
    for start in range(0, len(assignments), AT_ONCE):
        yield assignments[start : start + AT_ONCE]


class RegionProbe:
    """Makes a network with any of its regions in float, and times it.

    What is calibrated with has no influence on the time, so one image of noise is enough.

    Args:
        net: As loaded.
        setting: The engine and how it runs; its float precision is that of regions in float.
        folder: Where the files go.
        recipe: Of the regions in integers.
        seed: Of the image and of the order in which files take turns.
        exact_sums: See `fewbit.place.targets.Target`.

    Attributes:
        regions: See `fewbit.place.regions.regions_of`.
        boundaries: Places of neighbours: the first makes a tensor that the second reads, or both read one
            after the other what a third makes.
    """

    def __init__(
        self,
        net: Net,
        setting: Setting,
        folder: Path,
        recipe: str = "int8",
        seed: int = 0,
        exact_sums: bool = True,
    ) -> None:
        self.net, self.setting, self.folder, self.seed = net, setting, folder, seed
        self.target = target(setting.engine, exact_sums, setting.float_precision == "bf16")
        self.recipe = read_recipe(recipe)
        self._prepared = Prepared(net)
        self.folded = self._prepared.exact(self.recipe, self._context())
        self.regions = regions_of(self.folded, self.target)
        self.boundaries = tuple(self._boundaries())

    def draw(self, assignments: int, seed: int) -> Assignments:
        """Return random assignments, from nearly none in float to nearly all: bool (n, regions)."""
        rng = np.random.default_rng(seed)
        drawn: Assignments = rng.random((assignments, len(self.regions))) < rng.uniform(
            0.05, 0.95, (assignments, 1)
        )
        return drawn

    def guess(self) -> RegionLatency:
        """Return the times that the engine's profiler gives the regions, in all integers and in all float.

        A boundary is guessed from the size of the tensor that is rounded or taken back there. That two
        readers of one tensor differ is guessed to cost nothing more.
        """
        whole = np.zeros(len(self.regions), bool)
        with EngineProcess(self.setting.engine) as process:
            sessions = [process.open(self.file(row), self.setting) for row in (whole, ~whole)]
            integers, floats = (self._by_region(session.profile())[0] for session in sessions)
            (timing,) = measure_interleaved(sessions[:1], _ROUNDS, _BLOCK_S, self.seed)
        sizes = Sizes(self.folded)
        edges = self._edges()
        values = [self._values(sizes, pair[0]) if pair in edges else 0 for pair in self.boundaries]
        return RegionLatency(
            host=describe_host().cpu,
            engine_version=importlib.metadata.version(self.setting.engine),
            setting=self.setting,
            regions=tuple(region.name for region in self.regions),
            base_ms=1000 * self.setting.batch / timing.images_per_s,
            float_ms=tuple((floats - integers).tolist()),
            boundaries=self.boundaries,
            boundary_ms=tuple(1e-6 * _NS_PER_VALUE * self.setting.batch * count for count in values),
        )

    def time(self, assignments: Assignments, base_ms: float, tell: Tell | None = None) -> NDArray[np.float64]:
        """Return the milliseconds that a batch takes off the engine with each assignment.

        A few at a time take turns with the network all in integers; what counts is the ratio to it, so that a
        busy moment of the machine does not.

        Args:
            assignments: Bool (n, regions).
            base_ms: Of the network all in integers.
            tell: Told the fraction done.
        """
        times = list[float]()
        for chunk in self._in_turns(_chunks(assignments), base_ms):
            for taken, _ in chunk:
                times.append(taken)
                if tell is not None:
                    tell(len(times) / len(assignments))
        return np.array(times)

    def measure(
        self, assignments: Assignments, base_ms: float, tell: Tell | None = None
    ) -> tuple[Floats, Floats]:
        """Return what `time` does, and the milliseconds of each region by the engine's profiler.

        Args:
            assignments: Bool (n, regions).
            base_ms: Of the network all in integers.
            tell: Told the fraction done.

        Returns:
            (n,) and (n, regions).

        Raises:
            EngineError: No mix is given, a file failed, or the profiler saw nothing of one.
        """
        found = np.zeros(0), np.zeros((0, len(self.regions)))
        for found in self.measure_each(_chunks(assignments), base_ms):
            if tell is not None:
                tell(len(found[0]) / len(assignments))
        if not len(found[0]):
            raise EngineError(
                f"{self.net.name} on {self.setting.engine}: no mix to measure; give one or more"
            )
        return found

    def measure_each(self, chunks: Iterable[Assignments], base_ms: float) -> Iterator[tuple[Floats, Floats]]:
        """Yield what `measure` returns of all mixes so far, after each chunk of them.

        A chunk is asked for when those before it are yielded, so it may follow from them. All of them are
        held against one opened file of the network all in integers: opened anew, it may be a few percent
        faster or slower.

        What the profiler does not see is spread over the operators, and the regions of a mix are scaled to
        add up to its time.

        Args:
            chunks: Bool (n, regions), which take turns; few at a time, for all their files are open at once.
            base_ms: Of the network all in integers.

        Raises:
            EngineError: A file failed, or the profiler saw nothing of one.
        """
        times, parts, ran = list[float](), list[Floats](), list[NDArray[np.int64]]()
        for chunk in self._in_turns(chunks, base_ms):
            for taken, session in chunk:
                calls = int(np.clip(_PROFILED_MS / taken, _LEAST_PROFILED, _MOST_PROFILED))
                profile, operators = self._by_region(session.profile(calls))
                if not profile.any():
                    raise EngineError(
                        f"{self.net.name} on {self.setting.engine}: the profiler saw no operator of a mix; "
                        "give a network that takes longer, or a larger batch"
                    )
                times.append(taken)
                parts.append(profile)
                ran.append(operators)
            ms, region_ms, counts = np.array(times), np.array(parts), np.array(ran)
            unseen_ms = max(0.0, float(np.median((ms - region_ms.sum(1)) / counts.sum(1))))
            region_ms = region_ms + unseen_ms * counts
            yield ms, region_ms * (ms / region_ms.sum(1))[:, None]

    def _in_turns(
        self, chunks: Iterable[Assignments], base_ms: float
    ) -> Iterator[list[tuple[float, RemoteSession]]]:
        """Give the times of each chunk of assignments, and their files still open."""
        base, place = self.file(np.zeros(len(self.regions), bool)), 0
        with EngineProcess(self.setting.engine) as process:
            against = process.open(base, self.setting)
            for chunk in chunks:
                paths = [self.file(row) for row in chunk]
                try:
                    sessions = [process.open(path, self.setting) for path in paths]
                    timings = measure_interleaved(
                        [against, *sessions], _ROUNDS, _BLOCK_S, self.seed + place, min_calls=_LEAST_CALLS
                    )
                    taken = [base_ms / cast(float, timing.ratio) for timing in timings[1:]]
                    yield list(zip(taken, sessions, strict=True))
                    for session in sessions:
                        session.close()
                    place += len(paths)
                finally:
                    for path in set(paths) - {base}:
                        path.unlink()

    def file(self, in_float: NDArray[np.bool_] | Sequence[bool]) -> Path:
        """Return the network with some regions in float."""
        bits = "".join("1" if left else "0" for left in in_float)
        path = self.folder / f"{self.net.name}-{int(bits, 2):x}.onnx"
        if not path.exists():
            net = self._prepared.run(self.recipe_of(in_float), self._context())
            with phase("export"):
                export_onnx(net, path, self.target)
        return path

    def recipe_of(self, in_float: NDArray[np.bool_] | Sequence[bool]) -> Recipe:
        """Return the recipe that leaves some regions in float."""
        return self.recipe.with_float(self.kept(in_float))

    def kept(self, in_float: NDArray[np.bool_] | Sequence[bool]) -> tuple[str, ...]:
        """Return the layers that rules have to name so that some regions are in float."""
        # An activation follows the layer that it is fused into; one that placing rewrites has no name there.
        fused = {kind for kinds in self.target.fuses.values() for kind in kinds}
        fused |= {"Silu"} if self.target.splits_silu else set()
        kinds = {layer.name: layer.kind for layer in self.folded.layers()}
        return tuple(
            name
            for region, left in zip(self.regions, in_float, strict=True)
            for name in region.layers
            if left and kinds[name] not in fused
        )

    def _context(self) -> Context:
        image = torch.rand((1, *self.net.input_size), generator=torch.Generator().manual_seed(self.seed))

        def batches() -> Iterator[Tensor]:
            yield 4 * image - 2

        return Context(Scheme(), self.target, batches, self.seed)

    def _boundaries(self) -> Iterator[tuple[int, int]]:
        edges = self._edges()
        yield from sorted(edges)
        siblings = set[tuple[int, int]]()
        for maker in range(len(self.regions)):
            readers = sorted(second for first, second in edges if first == maker)
            siblings |= set(pairwise(readers))
        yield from sorted(siblings - edges - {(second, first) for first, second in edges})

    def _edges(self) -> set[tuple[int, int]]:
        """Return which region reads what which other one makes."""
        place = self._place_of_layers()
        return {
            (place[source], place[layer.name])
            for layer in self.folded.layers()
            for source in layer.inputs
            if source in place and place[source] != place[layer.name]
        }

    def _by_region(self, operators: Sequence[OperatorTime]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the milliseconds of each region and how many operators run for it.

        What has no layer belongs to where its input is from.
        """
        place, owner = self._place_of_layers(), list[int]()
        for operator in operators:
            owners = [place[layer] for layer in operator.layers if layer in place]
            owners = owners or [owner[source] for source in operator.flow.sources if source < len(owner)]
            owner.append(owners[-1] if owners else 0)
        at, ms = np.array(owner, np.int64), np.array([operator.ms for operator in operators])
        region_ms = np.zeros(len(self.regions))
        np.add.at(region_ms, at, ms)
        return region_ms, np.bincount(at[ms > 0], minlength=len(self.regions))

    def _place_of_layers(self) -> dict[str, int]:
        return {name: index for index, region in enumerate(self.regions) for name in region.layers}

    def _values(self, sizes: Sizes, place: int) -> int:
        """Return how many values the last tensor of a region has, for one image."""
        last = self.folded.layer(self.regions[place].layers[-1])
        return math.prod(sizes.of(last.node)[1:])
