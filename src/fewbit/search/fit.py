"""Fewer images where all of them would not fit the minutes given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fewbit.errors import EngineError
from fewbit.recipe import read_recipe
from fewbit.search.settings import evaluation
from fewbit.search.trials import Trials
from fewbit.search.workbench import Images, Workbench

_FOR_ACCURACY = 0.4
_PROBE_S = 0.2
_LEAST = 200


def share_of_images(trials: Trials, benches: Sequence[Workbench], minutes: float) -> float:
    """Return the share of the search and holdout images that the minutes allow, 1 where all fit.

    Two fifths of the time are for accuracy: float32 and int8 of each network on each engine, by the speed of
    float32 on the first engine that runs it.

    Args:
        trials: Runs files.
        benches: The networks.
        minutes: Of the whole search.
    """
    runs = 2 * len(trials.speeds.terms.engines) + 1
    needed_s = 0.0
    for bench in benches:
        images = len(bench.images.search) + len(bench.images.holdout)
        needed_s += runs * images * _image_s(trials, bench)
    return min(1.0, _FOR_ACCURACY * 60 * minutes / needed_s) if needed_s > 0 else 1.0


def fewer(images: Images, share: float) -> Images:
    """Return the first of the search and of the holdout images, 200 at least; they are in random order."""
    if share >= 1:
        return images
    counts = (max(_LEAST, round(share * len(part))) for part in (images.search, images.holdout))
    search, holdout = (np.arange(count) for count in counts)
    return replace(
        images,
        search=images.search.subset(search[: len(images.search)]),
        holdout=images.holdout.subset(holdout[: len(images.holdout)]),
    )


def _image_s(trials: Trials, bench: Workbench) -> float:
    """Seconds that float32 needs for an image; 0 where no engine runs it."""
    for engine in trials.speeds.terms.engines:
        setting = evaluation(engine, "float32", trials.speeds.threads)
        try:
            path = trials.file(bench, read_recipe("float32"), engine)
            block = trials.sessions.get(path, setting).time_block(_PROBE_S)
        except EngineError:
            trials.sessions.forget(engine)
            continue
        finally:
            trials.sessions.free()
        return block.seconds / block.images
    return 0.0
