"""The calibration-set study: accuracy of a recipe against the number of images that calibrate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fewbit.data.sample import choose_balanced
from fewbit.doctor.judge import Judge
from fewbit.doctor.records import CalibrationStudy, Quality, StudyPoint
from fewbit.doctor.sample import Sample
from fewbit.errors import DataError
from fewbit.net import Net
from fewbit.place.targets import target
from fewbit.recipe import Recipe, run_recipe
from fewbit.spec import Scheme
from fewbit.step import Context

LARGEST = 1024
METHOD = "torch, every tensor rounded as the file will be"


def counts_up_to(most: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... up to the number of images there are, at most 1024.

    >>> counts_up_to(20)
    (1, 2, 4, 8, 16)
    """
    return tuple(2**power for power in range(LARGEST.bit_length()) if 2**power <= most)


def study_calibration(
    net: Net,
    recipe: Recipe,
    pool: Sample,
    judging: Sample,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    engine: str = "onnxruntime",
    advance: Callable[[str, float], None] | None = None,
) -> CalibrationStudy:
    """Calibrate a recipe on 1, 2, 4, ... 1024 images for several seeds, and judge each result.

    Each seed takes a class-balanced choice of the pool, of which the smaller ones are the beginning of the
    larger ones. All are judged on the same images, which never calibrate.

    Args:
        net: The float network.
        recipe: Uses images.
        pool: To calibrate with.
        judging: To judge with.
        seeds: Of the choices, one or more.
        engine: Whose target to quantize for.
        advance: Told the name of what is done and the fraction done.

    Raises:
        DataError: The recipe uses no images, or there is none.
    """
    if not recipe.uses_images:
        raise DataError(
            f"recipe '{recipe.name}': uses no images, so their number cannot matter; study another recipe"
        )
    counts = counts_up_to(len(pool))
    if not counts:
        raise DataError("calibration study: no image is left to calibrate with; give more images")
    judge = Judge(net, judging)

    def quality(count: int, seed: int) -> Quality:
        chosen = pool.subset(choose_balanced(pool.targets, count, seed))
        context = Context(Scheme(), target(engine), chosen.batches, seed)
        return judge.judge(run_recipe(recipe, net, context)[0]).quality

    points = []
    for place, count in enumerate(counts):
        seen = []
        for index, seed in enumerate(seeds):
            if advance is not None:
                done = (place + index / len(seeds)) / len(counts)
                advance(f"calibrating on {count} of {len(pool)} images, seed {seed}", done)
            seen.append(quality(count, seed))
        points.append(_point(count, seen))
    return CalibrationStudy(
        recipe=recipe.name,
        method=METHOD,
        images=len(judging),
        pool=len(pool),
        seeds=tuple(seeds),
        float_accuracy=judge.exact.quality.accuracy,
        points=tuple(points),
    )


def _point(images: int, seen: Sequence[Quality]) -> StudyPoint:
    return StudyPoint(
        images=images,
        accuracies=tuple(one.accuracy for one in seen),
        agreements=tuple(one.agreement or 0.0 for one in seen),
    )
