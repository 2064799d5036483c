"""Measuring one proposal: build, run, compare, time; an engine that fails costs this trial and no more."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fewbit.clock import phase
from fewbit.engines.session import EngineName, Placement, Setting
from fewbit.errors import EngineError, RecipeError
from fewbit.measure.accuracy import Predictions, compare
from fewbit.measure.speed import Surveyed, Timing
from fewbit.recipe import Recipe, read_recipe
from fewbit.search.answer import describe
from fewbit.search.evaluate import evaluate, races
from fewbit.search.journal import Journal, Part
from fewbit.search.ladder import PLAIN
from fewbit.search.proposal import Proposal
from fewbit.search.settings import EVALUATION_BATCH, evaluation
from fewbit.search.speeds import Sessions, Speeds
from fewbit.search.standing import Standing
from fewbit.search.trial import LayerRecord, Trial
from fewbit.search.weight_widths import WIDTHS
from fewbit.search.workbench import Built, Workbench

_ROUNDS = 8
_BLOCK_S = 0.1
_TIMING_S = 3.0
_TIMED_SETTINGS = 2

Inside = Callable[[str, float], None]


@dataclass
class _Findings:
    """What is known of a trial so far."""

    setting: Setting
    predictions: dict[Part, Predictions] = field(default_factory=dict)
    timing: Timing | None = None
    survey: tuple[Surveyed, ...] = ()
    placement: Placement | None = None
    layers: tuple[LayerRecord, ...] = ()
    bytes: int = 0
    packed_bytes: int = 0
    dropped: str = ""


class Trials:
    """Carries proposals out.

    Args:
        benches: The networks by name.
        expected: For each network, the parts of the images that its first float32 trial is run on besides.
        journal: Where predictions of float32 are found again.
        sessions: Where files are opened.
        speeds: How files are timed.
    """

    def __init__(
        self,
        benches: Sequence[Workbench],
        expected: dict[str, tuple[Part, ...]],
        journal: Journal,
        sessions: Sessions,
        speeds: Speeds,
    ) -> None:
        self.benches = {bench.name: bench for bench in benches}
        self.expected, self.journal, self.sessions, self.speeds = expected, journal, sessions, speeds
        self.changed: list[str] = []

    def measure(
        self, proposal: Proposal, view: Standing, inside: Inside
    ) -> tuple[Trial, dict[Part, Predictions]]:
        """Measure a proposal.

        Args:
            proposal: What to measure.
            view: How the race stands.
            inside: Told what is going on and the fraction done.

        Returns:
            The trial, and its predictions by part of the images.

        Raises:
            OutputError: A file cannot be written.
            InputError: The images cannot be read any more.
        """
        begin, bench = time.perf_counter(), self.benches[proposal.network]
        recipe = bench.recipe(proposal)
        found = _Findings(evaluation(proposal.engine, proposal.float_precision, self.speeds.threads))
        reason = ""
        try:
            self._find(proposal, bench, recipe, view, found, inside)
        except (EngineError, RecipeError) as error:
            reason = str(error)
            self.sessions.forget(proposal.engine)
        finally:
            self.sessions.free()
        search = found.predictions.get("search")
        reference = self.reference(bench, view) if search is not None else None
        if reference is None:
            reference = search
        trial = Trial(
            key=bench.key(proposal),
            network=proposal.network,
            recipe=proposal.recipe,
            recipe_toml=recipe.to_toml(),
            rung=proposal.rung,
            setting=found.setting,
            state="failed" if reason else "dropped" if found.dropped else "measured",
            reason=reason or found.dropped,
            accuracy=search.accuracy() if search is not None else None,
            versus_float=compare(reference[: len(search)], search)
            if search is not None and reference is not None
            else None,
            timing=found.timing,
            bytes=found.bytes,
            packed_bytes=found.packed_bytes,
            placement=found.placement,
            layers=found.layers,
            seconds=time.perf_counter() - begin,
            keep_float=proposal.keep_float,
            survey=found.survey,
            takes=proposal.takes,
            silu=proposal.silu,
        )
        return trial, found.predictions

    def reference(self, bench: Workbench, view: Standing, part: Part = "search") -> Predictions | None:
        """Return what the float32 network predicted on a part of the images, none before it was run."""
        trial = view.float_trial(bench.name)
        return None if trial is None else self.journal.predictions(trial.key, part)

    def file(self, bench: Workbench, recipe: Recipe, engine: EngineName) -> Path:
        """Return the file of a recipe, made again where it is gone or was changed since it was measured.

        Where it then is another than was measured, `changed` has its name.
        """
        path = bench.file_of(recipe, engine)
        if not self._is_kept(path):
            kept = self.journal.decision(f"file {path.name}")
            again = _sha256(self._build(bench, recipe, engine, lambda *_: None).path)
            if kept is not None and again != kept:
                self.changed.append(path.name)
        return path

    def predict(
        self, bench: Workbench, path: Path, setting: Setting, part: Part, inside: Inside
    ) -> Predictions:
        """Run a file on all images of a part.

        Raises:
            EngineError: The engine failed.
        """
        images = bench.images.part(part)
        runner = self.sessions.get(path, setting)
        batch = EVALUATION_BATCH * setting.streams
        return evaluate(runner, images, batch, (), lambda done: inside(f"{part} images", done))[0]

    def _find(
        self,
        proposal: Proposal,
        bench: Workbench,
        recipe: Recipe,
        view: Standing,
        found: _Findings,
        inside: Inside,
    ) -> None:
        """Fill the findings in, the cheap and telling first; what was found stays when an engine fails."""
        built = self._build(bench, recipe, proposal.engine, inside)
        found.bytes, found.packed_bytes = built.bytes, built.packed_bytes
        found.placement = self.sessions.get(built.path, found.setting).placement()
        plain = proposal.recipe == PLAIN
        if plain:  # its speed bounds what every later rung can reach, so it is always timed
            self._time(proposal, bench, built, view, found, inside)
            found.dropped = self._too_slow(proposal, view, found)
        if not found.dropped:
            self._evaluate(proposal, bench, built, view, found, inside)
        if not found.dropped and not plain:
            self._time(proposal, bench, built, view, found, inside)
        if not found.dropped and recipe.places:
            inside("layers", 0.9)
            found.layers = _with_precisions(bench.records(built), found.placement)

    def _is_kept(self, path: Path) -> bool:
        """Say whether a file is there as it was made."""
        kept = self.journal.decision(f"file {path.name}")
        return kept is not None and path.is_file() and _sha256(path) == kept

    def _build(self, bench: Workbench, recipe: Recipe, engine: EngineName, inside: Inside) -> Built:
        path = bench.file_of(recipe, engine)
        if not recipe.places and self._is_kept(path):  # one float file serves every engine and precision
            return Built(path, recipe)
        built = bench.build(recipe, engine, inside)
        self.sessions.shut(built.path)
        self.journal.decide(f"file {built.path.name}", _sha256(built.path))
        return built

    def _evaluate(
        self,
        proposal: Proposal,
        bench: Workbench,
        built: Built,
        view: Standing,
        found: _Findings,
        inside: Inside,
    ) -> None:
        setting = evaluation(proposal.engine, proposal.float_precision, self.speeds.threads)
        reference = self.reference(bench, view)
        never_dropped = proposal.recipe == "float32" or reference is None
        images = bench.images.search
        against = [] if never_dropped else races(view.terms.budgets, reference, len(images))
        runner = self.sessions.get(built.path, setting)
        batch = EVALUATION_BATCH * setting.streams
        found.predictions["search"], found.dropped = evaluate(
            runner, images, batch, against, lambda done: inside("search images", done)
        )
        if reference is None:
            for part in ("calibration", "holdout"):
                if part == "holdout" or part in self.expected.get(bench.name, ()):
                    found.predictions[part] = self.predict(bench, built.path, setting, part, inside)

    def _time(
        self,
        proposal: Proposal,
        bench: Workbench,
        built: Built,
        view: Standing,
        found: _Findings,
        inside: Inside,
    ) -> None:
        inside("timing", 0.0)
        baseline_file = self.file(bench, read_recipe("float32"), proposal.engine)
        baseline = self.speeds.baseline(bench.name, baseline_file)
        settings: tuple[Setting, ...]
        like = view.find(proposal.network, proposal.engine, PLAIN)
        if like is not None and like.timing is not None and built.recipe.places:
            settings = (like.setting.model_copy(update={"float_precision": proposal.float_precision}),)
        else:
            found.survey = self.speeds.survey(built.path, proposal.engine, proposal.float_precision)
            settings = self.speeds.best(found.survey, _TIMED_SETTINGS)
        inside("timing", 0.5)
        found.timing = self.speeds.time(
            built.path, settings, (baseline_file, baseline), _ROUNDS, _BLOCK_S, _TIMING_S
        )
        found.setting = found.timing.setting

    def _too_slow(self, proposal: Proposal, view: Standing, found: _Findings) -> str:
        """Say which proven trial is better already in what is asked for, empty where none is."""
        if view.terms.objective == "size":
            return too_large(proposal, view, found.packed_bytes or found.bytes)
        assert found.timing is not None
        faster = view.too_slow(proposal.network, found.timing)
        if faster is None or faster.timing is None:
            return ""
        return (
            f"{found.timing.images_per_s:,.0f} images/s; {describe(faster)} runs at about "
            f"{view.value(faster):,.0f} and is proven"
        )


def too_large(proposal: Proposal, view: Standing, size: int) -> str:
    """Say which proven trial is smaller even than plain int8 with the fewest bits a weight there are."""
    cost = next((c for c in view.terms.costs if c.network == proposal.network), None)
    spare = 0 if cost is None else cost.weights - math.ceil(cost.weights * min(WIDTHS) / 8)
    smaller = next((t for t in view.ranked() if view.proven(t) and t.counted_bytes <= size - spare), None)
    return "" if smaller is None else f"{size} bytes; {describe(smaller)} has {smaller.counted_bytes}"


def _with_precisions(layers: Sequence[LayerRecord], placement: Placement | None) -> tuple[LayerRecord, ...]:
    """Let the engine's word on what a layer ran in replace what was planned."""
    ran = placement.by_layer() if placement is not None else {}
    return tuple(
        layer.model_copy(update={"precision": ran[layer.name].precision}) if layer.name in ran else layer
        for layer in layers
    )


@phase("digest")
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
