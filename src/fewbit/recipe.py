"""Recipe: a Scheme and an ordered list of Steps; TOML on disk, a digest as its name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.clock import each_timed, phase
from fewbit.data.image_set import ImageSet
from fewbit.errors import RecipeError, suggest
from fewbit.net import Net
from fewbit.place.targets import target
from fewbit.prepare.canonical import example_logits, relative_gap
from fewbit.registry import find
from fewbit.spec import Frozen, ImageInput, Rule, Scheme, SiluForm
from fewbit.step import Context, Step, StepReport

__all__ = [
    "Context",
    "Prepared",
    "Recipe",
    "StepReport",
    "image_context",
    "read_recipe",
    "run_recipe",
    "shipped_recipes",
]

_EXACT_STEPS = frozenset({"canonical", "fold_bn"})
_EXACT_GAP = 1e-3


class Recipe(Frozen):
    """What is done to a network.

    Attributes:
        name: A short name.
        summary: What it is for, in one line.
        scheme: Which values each tensor may take.
        steps: The methods in order: {"use": row of the registry, hyperparameters}.

    Example:
        >>> read_recipe("int8").steps[0]
        {'use': 'canonical'}
    """

    name: str
    summary: str = ""
    scheme: Scheme = Scheme()
    steps: tuple[dict[str, Any], ...] = ()

    def built_steps(self) -> tuple[tuple[str, Step], ...]:
        """Return (name, Step) for each step.

        Raises:
            RecipeError: A step has no name that the registry knows, or hyperparameters that it does not take.
        """
        built = []
        for index, entry in enumerate(self.steps):
            fields = dict(entry)
            name = fields.pop("use", None)
            if not isinstance(name, str):
                raise RecipeError(
                    f"recipe '{self.name}': step {index + 1} has no 'use'; `fewbit methods` lists them"
                )
            step: Step = find("steps", name).from_data(fields, f"recipe '{self.name}', step '{name}'")
            built.append((name, step))
        return tuple(built)

    @property
    def places(self) -> bool:
        """It places quantizers, so its file is made for one engine."""
        return any(step.get("use") == "place" for step in self.steps)

    @property
    def uses_images(self) -> bool:
        """It looks at calibration images, which then must not evaluate its file; else it is shown none."""
        steps = [step for _, step in self.built_steps()]
        if any(step.makes_images for step in steps):
            return False
        return any(step.reads_images(self.scheme) for step in steps)

    @property
    def takes(self) -> ImageInput:
        """What its file takes: pixels where the preprocessing is folded into the first layer."""
        folded = any(step.get("use") == "fold_input" for step in self.steps)
        return "uint8" if folded else "float32"

    def halves(self) -> tuple[Recipe, Recipe]:
        """Return the exact steps that it begins with as a recipe, and all the others as another.

        >>> [[step["use"] for step in half.steps] for half in read_recipe("int8").halves()]
        [['canonical', 'fold_bn'], ['place', 'calibrate']]
        """
        others = (place for place, step in enumerate(self.steps) if step.get("use") not in _EXACT_STEPS)
        cut = next(others, len(self.steps))
        first, rest = self.steps[:cut], self.steps[cut:]
        return self.model_copy(update={"steps": first}), self.model_copy(update={"steps": rest})

    def with_float(self, layers: Sequence[str]) -> Recipe:
        """Return the same recipe with some layers left in float."""
        rules = tuple(Rule(match=layer, keep_float=True) for layer in layers)
        scheme = self.scheme.model_copy(update={"rules": rules + self.scheme.rules})
        return self.model_copy(update={"scheme": scheme})

    def with_widths(self, bits: Mapping[str, int]) -> Recipe:
        """Return the same recipe with other widths for the weights of some layers.

        These take the place of the recipe's rules for the layers. Where `calibrate` finds the ranges of
        weights, those of least squared error are taken, for the largest weight alone sets the step of few
        codes too wide.

        Args:
            bits: Width by name of a layer.

        Example:
            >>> narrow = read_recipe("int8").with_widths({"conv1": 4})
            >>> [(rule.match, rule.weights.bits) for rule in narrow.scheme.rules]
            [('conv1', 4)]
            >>> narrow.steps[-1]
            {'use': 'calibrate', 'weights': 'mse'}
        """
        weights = self.scheme.weights
        rules = tuple(
            Rule(match=layer, weights=weights.model_copy(update={"bits": width}))
            for layer, width in bits.items()
        )
        scheme = self.scheme.model_copy(update={"rules": rules + self.scheme.rules})
        steps = tuple(s | {"weights": "mse"} if s.get("use") == "calibrate" else s for s in self.steps)
        return self.model_copy(update={"scheme": scheme, "steps": steps})

    def with_pixels(self) -> Recipe:
        """Return the same recipe with the preprocessing of images folded into the first layer.

        Its file may then take uint8 pixels; see `fewbit.prepare.fold_input`.

        >>> [step["use"] for step in read_recipe("int8").with_pixels().steps]
        ['canonical', 'fold_bn', 'fold_input', 'place', 'calibrate']
        """
        if self.takes == "uint8":
            return self
        return self._with_prepared({"use": "fold_input"}, "pixels")

    def with_silu(self, form: SiluForm) -> Recipe:
        """Return the same recipe with another function in the place of SiLU.

        See `fewbit.prepare.replace_silu`.

        >>> read_recipe("int8").with_silu("gelu").steps[2]
        {'use': 'replace_silu', 'form': 'gelu'}
        """
        return self._with_prepared({"use": "replace_silu", "form": form}, form.replace("_", "-"))

    def _with_prepared(self, step: dict[str, Any], mark: str) -> Recipe:
        """Put a step behind those that are exact."""
        exact = [place for place, own in enumerate(self.steps) if own.get("use") in _EXACT_STEPS]
        behind = max(exact, default=-1) + 1
        steps = (*self.steps[:behind], step, *self.steps[behind:])
        return self.model_copy(update={"name": f"{self.name}-{mark}", "steps": steps})


def shipped_recipes() -> dict[str, Recipe]:
    """Return the recipes that ship, by name."""
    found = {}
    for entry in sorted(
        resources.files("fewbit.recipes").iterdir(), key=lambda e: e.name.removesuffix(".toml")
    ):
        if entry.name.endswith(".toml"):
            recipe = Recipe.from_toml(entry.read_text(encoding="utf-8"), entry.name)
            found[recipe.name] = recipe
    return found


def read_recipe(name: str) -> Recipe:
    """Return a shipped recipe by its name, or read one from a file.

    Raises:
        RecipeError: There is no such recipe, or the file does not parse.
    """
    path = Path(name)
    if path.suffix == ".toml":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as reason:
            raise RecipeError(f"recipe {name}: cannot be read ({reason}); give a .toml file") from reason
        return Recipe.from_toml(text, f"recipe {name}")
    known = shipped_recipes()
    if name not in known:
        raise RecipeError(
            f"recipe '{name}'{suggest(name, known)}: there are {', '.join(known)}, or give a .toml file"
        )
    return known[name]


_CALIBRATION_VALUES = 8 * 3 * 224 * 224


def image_context(
    images: ImageSet | None,
    engine: str,
    seed: int = 0,
    advance: Callable[[str, float], None] | None = None,
    scratch: Path | None = None,
    exact_sums: bool = True,
) -> Context:
    """Return the Context of a recipe that calibrates with these images.

    The batch is small for large images, so that calibrating needs little memory.

    Args:
        images: Calibration images; none where no step needs them.
        engine: Whose Target to take.
        seed: Of every random choice.
        advance: Told the name of a step and the fraction done.
        scratch: A folder where long steps keep what they have done, to go on there after a kill.
        exact_sums: See `fewbit.place.targets.Target`.
    """

    def batches() -> Iterator[Tensor]:
        if images is None:
            return
        batch = _images_at_once(images.input_size)
        for done, pixels in enumerate(each_timed(images.batches(batch), "preprocess")):
            yield torch.from_numpy(pixels)
            if advance is not None:
                advance("calibrate", min(1.0, (done + 1) * batch / len(images)))

    return Context(Scheme(), target(engine, exact_sums), batches, seed, advance, scratch)


def _images_at_once(size: tuple[int, int, int]) -> int:
    return min(32, max(1, _CALIBRATION_VALUES // math.prod(size)))


def _batches_of(images: Tensor) -> Iterator[Tensor]:
    channels, rows, columns = images.shape[1:]
    return iter(torch.split(images, _images_at_once((channels, rows, columns))))


@phase("recipe")
def run_recipe(recipe: Recipe, net: Net, context: Context) -> tuple[Net, tuple[StepReport, ...]]:
    """Run a recipe on a copy of a network.

    Args:
        recipe: What to do; its scheme takes the place of the context's.
        net: Stays as it is.
        context: Target, images, seed. A recipe that uses no images is shown none, and images that a step
            makes take the place of these for every step after it.

    Returns:
        The new network and what each step did.

    Raises:
        RecipeError: A step needs a fact that no step before it gives, or an exact step changed the outputs.
    """
    context = replace(context, scheme=recipe.scheme)
    if not recipe.uses_images:
        context = replace(context, batches=lambda: iter(()))
    changed, reports = net.clone().eval(), []
    exact = any(step.get("use") in _EXACT_STEPS for step in recipe.steps)
    expected = example_logits(changed) if exact else torch.empty(0)
    for name, step in recipe.built_steps():
        missing = sorted(step.needs - changed.facts)
        if missing:
            raise RecipeError(
                f"recipe '{recipe.name}': step '{name}' needs a network that is {', '.join(missing)}; "
                "put the step that gives it before"
            )
        late = sorted(step.before & changed.facts)
        if late:
            raise RecipeError(
                f"recipe '{recipe.name}': step '{name}' cannot follow the step that made the network "
                f"{', '.join(late)}; put it before"
            )
        if changed.images is not None:
            context = replace(context, batches=partial(_batches_of, changed.images))
        context.tell(name, 0.0)
        begin = time.perf_counter()
        with phase(name):
            report = step(changed, context)
        reports.append(report.model_copy(update={"seconds": time.perf_counter() - begin}))
        changed = changed.with_facts(*step.gives)
        context.tell(name, 1.0)
        if (
            name in _EXACT_STEPS
            and not (gap := relative_gap(expected, example_logits(changed))) <= _EXACT_GAP
        ):
            raise RecipeError(
                f"recipe '{recipe.name}': step '{name}' changed {net.name}'s logits by {gap:.1e}; report it"
            )
    return changed, tuple(reports)


class Prepared:
    """A network that many recipes run on; what the exact steps at their beginning make of it is made once.

    Args:
        net: Stays as it is.
    """

    def __init__(self, net: Net) -> None:
        self.net = net
        self._made: tuple[str, Net] | None = None

    def exact(self, recipe: Recipe, context: Context) -> Net:
        """Return the network after the exact steps that a recipe begins with; it is shared, so look only."""
        first = recipe.halves()[0]
        key = f"{first.steps} {first.scheme.mode} {context.target.digest()}"
        if self._made is None or self._made[0] != key:
            self._made = (key, run_recipe(first, self.net, context)[0])
        return self._made[1]

    def run(self, recipe: Recipe, context: Context) -> Net:
        """Return what `run_recipe` makes of the network, the same bits."""
        return run_recipe(recipe.halves()[1], self.exact(recipe, context), context)[0]
