"""Which regions to leave in float: the front of measured time against sensitivity, by integer programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fewbit.clock import phase
from fewbit.measure.region_latency import RegionLatency, fit_region_latency
from fewbit.ranges.float_pass import keep_freed_memory
from fewbit.search.mixed.front import front
from fewbit.search.mixed.problem import Boundary, Option, Problem, Region
from fewbit.search.region_probe import AT_ONCE, Assignments, RegionProbe, Tell
from fewbit.sensitivity.kl import KL
from fewbit.spec import Frozen

INTEGERS, FLOAT = "int8", "float"
WORTH = 0.97
"""A mix is worth a trial for its speed where its predicted time is less than this share of all integers'."""
_POINTS = 24
_FIRST = 18  # fewer tell less than the guess: of 6 the fit was 18 % off on MobileNetV2, of 18 2 %


class Mix(Frozen):
    """One choice of regions that stay in float.

    Attributes:
        regions: Their names.
        keep_float: Their layers, as a recipe's rules name them.
        ms: Predicted milliseconds that a batch takes off the engine.
        loss: Sum of the sensitivities of the regions in integers.
        ratio: `ms` over that of the network all in integers.
    """

    regions: tuple[str, ...]
    keep_float: tuple[str, ...]
    ms: float
    loss: float
    ratio: float


def mix_precisions(
    probe: RegionProbe, images: Sequence[Tensor], assignments: int = 30, tell: Tell | None = None
) -> tuple[Mix, ...]:
    """Return the choices that no other one beats in predicted time and in sensitivity, the fastest first.

    The time of each region in integers and in float is the engine's own (`RegionProbe.guess`), boundaries
    between precisions included. Where the guess promises that some mix is faster than all integers by 3 % and
    more, it is fitted to measurements of `assignments` mixes first (`refine`), for such a gain is easily an
    error of the guess. The loss of a region is the KL divergence of the answers when it alone is in integers.

    Args:
        probe: The network on an engine and setting.
        images: Float32 (N, C, H, W), for the sensitivities.
        assignments: How many mixes to measure; 0 takes the guess.
        tell: Told the fraction done.

    Returns:
        None where all regions in float are the fastest: that is no mix.

    Raises:
        EngineError: The engine does not run one of the files.
    """
    latency = probe.guess()
    losses = region_losses(probe, images)
    found = _front(probe, latency, losses)
    if assignments and found and found[0].ratio < WORTH:
        for fitted in refine(probe, latency, losses, assignments, tell):
            latency = fitted
        found = _front(probe, latency, losses)
    return found


def refine(
    probe: RegionProbe,
    guess: RegionLatency,
    losses: dict[str, float],
    assignments: int,
    tell: Tell | None = None,
) -> Iterator[RegionLatency]:
    """Yield the times of regions, fitted to the measurements of ever more mixes, 18 at first.

    The first two are all regions in integers and all in float, near which fronts begin and end. The next 16
    are random, and tell what regions and boundaries cost. Then come, six at a time, mixes on the front of
    what is known so far, spread over it: a front is made of what the fit takes for fast, so it is there that
    its errors gather. Where all of them are measured, random ones follow.

    Args:
        probe: The network on an engine and setting.
        guess: What the engine's profiler says of it.
        losses: Of each region in integers.
        assignments: How many to measure.
        tell: Told the fraction done.

    Raises:
        EngineError: The engine does not run one of the files.
    """
    ends = np.repeat([[False], [True]], len(guess.regions), axis=1)
    drawn = iter(np.vstack([ends, probe.draw(2 * assignments, probe.seed)]))
    rows, latency = list[Assignments](), guess

    def chunks() -> Iterator[Assignments]:
        while len(rows) < assignments:
            count = min(AT_ONCE, assignments - len(rows))
            chosen = spread(_unmeasured(latency, losses, rows), count) if len(rows) >= _FIRST else []
            chosen += [next(drawn) for _ in range(count - len(chosen))]
            rows.extend(chosen)
            yield np.array(chosen)

    for measured in probe.measure_each(chunks(), guess.base_ms):
        if tell is not None:
            tell(len(rows) / assignments)
        if len(rows) >= min(_FIRST, assignments):
            latency = fit_region_latency(guess, rows, *measured)
            yield latency


def spread(items: Sequence[Assignments], count: int) -> list[Assignments]:
    """Return at most `count` items, evenly spread, the first and the last among them.

    Example:
        >>> spread([0, 1, 2, 3, 4], 3)
        [0, 2, 4]
    """
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round()
    return [items[place] for place in np.unique(places.astype(int))]


def _unmeasured(
    latency: RegionLatency, losses: dict[str, float], rows: Sequence[Assignments]
) -> list[Assignments]:
    """Return the mixes on the front that are not among rows, the fastest first."""
    known = {row.tobytes() for row in rows}
    points = front(problem_of(latency, losses), "ms", points=_POINTS).points
    mixes = [np.array([point.options[name] == FLOAT for name in latency.regions]) for point in points]
    return [mix for mix in mixes if mix.any() and not mix.all() and mix.tobytes() not in known]


@phase("sensitivities")
def region_losses(probe: RegionProbe, images: Sequence[Tensor]) -> dict[str, float]:
    """Return the KL divergence of the answers when each region alone is in integers, by its name.

    Args:
        probe: The network, and what its integers are.
        images: Float32 (N, C, H, W).
    """
    scheme = probe.recipe.scheme
    row = KL(activations=scheme.activations)
    shown = [(batch, None) for batch in images]
    with torch.no_grad(), keep_freed_memory():
        scores = row.score(probe.folded, shown, probe.regions, (scheme.weights,))
    return {name: values[0] for name, values in scores.losses.items()}


def problem_of(latency: RegionLatency, losses: dict[str, float]) -> Problem:
    """Return the choice between integers and float for each region, with its time and its loss."""
    regions = tuple(
        Region(
            name,
            (Option(INTEGERS, losses[name], {"ms": 0.0}), Option(FLOAT, 0.0, {"ms": more_ms})),
        )
        for name, more_ms in zip(latency.regions, latency.float_ms, strict=True)
    )
    boundaries = tuple(
        Boundary(
            latency.regions[first],
            latency.regions[second],
            {(INTEGERS, FLOAT): {"ms": ms}, (FLOAT, INTEGERS): {"ms": ms}},
        )
        for (first, second), ms in zip(latency.boundaries, latency.boundary_ms, strict=True)
    )
    return Problem(regions, boundaries, base_costs={"ms": latency.base_ms})


@phase("solve")
def _front(probe: RegionProbe, latency: RegionLatency, losses: dict[str, float]) -> tuple[Mix, ...]:
    found = []
    for point in front(problem_of(latency, losses), "ms", points=_POINTS).points:
        in_float = [point.options[name] == FLOAT for name in latency.regions]
        if all(in_float):
            continue
        names = tuple(n for n, left in zip(latency.regions, in_float, strict=True) if left)
        ms = point.costs["ms"]
        ratio = ms / latency.base_ms
        found.append(Mix(regions=names, keep_float=probe.kept(in_float), ms=ms, loss=point.loss, ratio=ratio))
    return tuple(found)
