"""The doctor: examines a quantized network, names likely causes, tries remedies, measures their gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fewbit.doctor import concat, range_spread, rounding_bias, sensitive, tails
from fewbit.doctor.case import Case, Rule, Suspicion
from fewbit.doctor.changes import Change, in_words
from fewbit.doctor.exam import Exam
from fewbit.doctor.judge import Judge, Verdict, helps, versus
from fewbit.doctor.preprocessing import Expectation, check_preprocessing, look_at_input
from fewbit.doctor.records import CAUSES, Diagnosis, Finding, InputFacts, Remedy
from fewbit.doctor.sample import Sample
from fewbit.load.card import InputSection
from fewbit.net import Net
from fewbit.place.targets import target
from fewbit.recipe import Recipe, run_recipe
from fewbit.spec import Scheme
from fewbit.step import Context

RULES: tuple[Rule, ...] = (
    range_spread.suspect,
    tails.suspect_clipped,
    tails.suspect_clipped_weights,
    tails.suspect_outliers,
    concat.suspect,
    rounding_bias.suspect,
)
HARMLESS = 0.02
_SHARE_OF_HARM = 0.1
_MENDED = 0.5
_AS_GOOD = 1.25
_EQUAL_KL = 0.001
_EXAMINED_PIXELS = 800_000

Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Images:
    """The images of an examination; none is in both.

    Attributes:
        calibration: They set ranges.
        judging: Recipes and remedies are judged on them.
    """

    calibration: Sample
    judging: Sample


def images_to_examine(input_size: tuple[int, int, int]) -> int:
    """Return on how many images each layer is looked at alone, fewer of larger ones: 16 to 64.

    >>> images_to_examine((3, 32, 32)), images_to_examine((3, 224, 224))
    (64, 16)
    """
    return max(16, min(64, _EXAMINED_PIXELS // math.prod(input_size[1:])))


def images_to_judge(input_size: tuple[int, int, int]) -> int:
    """Return how many images judge a recipe, fewer of larger ones: 128 to 512.

    >>> images_to_judge((3, 32, 32)), images_to_judge((3, 224, 224))
    (512, 159)
    """
    return max(128, min(512, 8_000_000 // math.prod(input_size[1:])))


def diagnose(
    net: Net,
    recipe: Recipe,
    images: Images,
    *,
    section: InputSection | None = None,
    expected: float | None = None,
    engine: str = "onnxruntime",
    seed: int = 0,
    advance: Tell | None = None,
) -> Diagnosis:
    """Examine a network that a recipe quantizes.

    Everything is measured in torch, on images that do not calibrate. A cause is named where its numbers
    speak for it and the layers that show it, rounded alone, do a tenth or more of the whole harm; below a
    mean divergence of 0.02 nats from the float network the recipe counts as harmless and none is named.

    Args:
        net: The float network, as captured.
        recipe: Quantizes it.
        images: To calibrate and to judge with.
        section: The card's `[input]`, to look for a wrong preprocessing; none looks for none.
        expected: The float accuracy that the card tells, a share.
        engine: Whose target to quantize for.
        seed: Of every random choice.
        advance: Told the name of what is done and the fraction done.

    Raises:
        RecipeError: The recipe does not fit the network.
        DataError: There is no image to calibrate or to judge with.
    """
    doctor = _Doctor(net, recipe, images, engine, seed, advance or (lambda what, fraction: None))
    facts = look_at_input(net, images.judging.first(images_to_examine(net.input_size)))
    wrong = None
    if section is not None:
        expectation = Expectation(net.classes, expected)
        wrong = check_preprocessing(net, section, doctor.judge, expectation, facts, doctor.tell)
    return doctor.diagnosis(facts, wrong, expected, section is not None)


class _Doctor:
    """One examination."""

    def __init__(self, net: Net, recipe: Recipe, images: Images, engine: str, seed: int, tell: Tell) -> None:
        self.net, self.recipe, self.images = net, recipe, images
        self.engine, self.seed, self.tell = engine, seed, tell
        self.helpful: list[tuple[Finding, Change]] = []
        tell("float network", 0.0)
        self.judge = Judge(net, images.judging)

    def diagnosis(
        self, facts: InputFacts, wrong: Finding | None, expected: float | None, looked_at_input: bool
    ) -> Diagnosis:
        """Quantize, examine and try remedies."""
        self.tell("quantizing", 0.2)
        prepared, made = self._quantize(self.recipe)
        verdict = self.judge.judge(made)
        self.tell("layers alone", 0.3)
        examined = images_to_examine(self.net.input_size)
        exam = Exam(prepared, made, self.images.judging.first(examined).batches())
        layers = exam.records()
        findings, notes = [] if wrong is None else [wrong], []
        if wrong is not None and any(remedy.helps for remedy in wrong.remedies):
            notes.append("repair the preprocessing first; what rounding costs was not looked into")
        else:
            findings += self._findings(Case(self.recipe, exam, layers), verdict)
        together, repaired = self._together(verdict)
        return Diagnosis(
            network=self.net.name,
            recipe=self.recipe.name,
            engine=self.engine,
            seed=self.seed,
            calibration_images=len(self.images.calibration),
            images=len(self.images.judging),
            examined=exam.images,
            float_accuracy=self.judge.exact.quality.accuracy,
            expected=expected,
            quality=verdict.quality,
            input=facts,
            layers=layers,
            findings=tuple(findings),
            checked=tuple(c for c in CAUSES if looked_at_input or c != "wrong_preprocessing"),
            together=together,
            repaired=repaired,
            notes=tuple(notes),
        )

    def _findings(self, case: Case, verdict: Verdict) -> list[Finding]:
        whole = case.exam.whole()
        if max(whole, verdict.quality.kl or 0.0) < HARMLESS:
            return []
        found = []
        for rule in RULES:
            suspicion = rule(case)
            if suspicion is None:
                continue
            harm = case.exam.harm(suspicion.layers)
            if harm >= _SHARE_OF_HARM * whole:
                found.append(self._finding(suspicion, harm, verdict))
        if min((_kl_after(finding, whole) for finding in found), default=whole) > _MENDED * whole:
            suspicion = sensitive.suspect(case)
            if suspicion is not None:
                found.append(self._finding(suspicion, case.exam.harm(suspicion.layers), verdict))
        return sorted(found, key=lambda finding: _kl_after(finding, math.inf))

    def _finding(self, suspicion: Suspicion, harm: float, before: Verdict) -> Finding:
        self.tell(f"{CAUSES[suspicion.cause]} in {in_words(suspicion.layers, 2)}", 0.6)
        changes = [change for change in suspicion.changes if change.apply(self.recipe) != self.recipe]
        tried = [(self._try(change, before), change) for change in changes]
        best = min((one.after.kl or 0.0 for one, _ in tried if one.helps), default=0.0)
        tried.sort(key=lambda pair: _rank(pair[0], best))
        finding = Finding(
            cause=suspicion.cause,
            layer=suspicion.layers[0],
            others=suspicion.layers[1:],
            evidence=suspicion.evidence,
            reason=suspicion.reason,
            kl=harm,
            remedies=tuple(remedy for remedy, _ in tried),
        )
        if tried and tried[0][0].helps:
            self.helpful.append((finding, tried[0][1]))
        return finding

    def _together(self, before: Verdict) -> tuple[Remedy | None, str]:
        """Try the best remedies of all findings at once; return that, and the best recipe of all as TOML."""
        if not self.helpful:
            return None, ""
        ordered = [change for _, change in sorted(self.helpful, key=lambda pair: _kl_after(pair[0], 0.0))]
        changes = list({change.lines: change for change in ordered}.values())
        best, together = changes[:1], None
        if _joined(changes).apply(self.recipe) != _joined(best).apply(self.recipe):
            self.tell("all remedies together", 0.9)
            together = self._try(_joined(changes), before)
            alone = min(_kl_after(finding, math.inf) for finding, _ in self.helpful)
            if together.helps and (together.after.kl or 0.0) <= alone:
                best = changes
        recipe = _joined(best).apply(self.recipe)
        named = recipe.model_copy(update={"name": f"{self.recipe.name}-repaired", "summary": ""})
        return together, named.to_toml()

    def _try(self, change: Change, before: Verdict) -> Remedy:
        after = self.judge.judge(self._quantize(change.apply(self.recipe))[1])
        seen = versus(before, after)
        return Remedy(
            action=change.action,
            change=change.lines,
            before=before.quality,
            after=after.quality,
            versus=seen,
            helps=helps(before.quality, after.quality, seen),
        )

    def _quantize(self, recipe: Recipe) -> tuple[Net, Net]:
        """Return the network as it is before quantizers are placed, and quantized."""
        first, rest = split(recipe)
        context = Context(Scheme(), target(self.engine), self.images.calibration.batches, self.seed, None)
        prepared, _ = run_recipe(first, self.net, context)
        made, _ = run_recipe(rest, prepared, context)
        return prepared, made


def split(recipe: Recipe) -> tuple[Recipe, Recipe]:
    """Return a recipe's steps up to the placing of quantizers, and the rest."""
    steps = recipe.steps
    place = next((i for i, step in enumerate(steps) if step.get("use") == "place"), len(steps))
    first, rest = recipe.steps[:place], recipe.steps[place:]
    return recipe.model_copy(update={"steps": first}), recipe.model_copy(update={"steps": rest})


def _joined(changes: Sequence[Change]) -> Change:
    """Return several changes as one."""

    def apply(recipe: Recipe) -> Recipe:
        for change in changes:
            recipe = change.apply(recipe)
        return recipe

    return Change(
        "; ".join(change.action for change in changes), "\n".join(change.lines for change in changes), apply
    )


def _rank(remedy: Remedy, best: float) -> tuple[bool, bool, float]:
    """Order remedies: of those nearly as good as the best the first stays first, the others by harm left."""
    left = remedy.after.kl or 0.0
    near = remedy.helps and left <= _AS_GOOD * best + _EQUAL_KL
    return not remedy.helps, not near, 0.0 if near else left


def _kl_after(finding: Finding, otherwise: float) -> float:
    """Return the divergence with a finding's best remedy, where one helps."""
    return next((one.after.kl or 0.0 for one in finding.remedies if one.helps), otherwise)
