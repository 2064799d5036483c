"""Which ways to run a file are worth timing."""

from __future__ import annotations

from collections.abc import Sequence

from fewbit.engines.session import EngineName, FloatPrecision, Setting
from fewbit.search.standing import Objective

EVALUATION_BATCH = 32


def first_stage(
    objective: Objective,
    engine: EngineName,
    float_precision: FloatPrecision,
    batches: Sequence[int],
    threads: int,
) -> tuple[Setting, ...]:
    """Return the settings to time first.

    For latency one image at a time, with all threads, half of them, or one: small networks lose more by
    handing work over than they win. Otherwise the middle batch with one to all threads' worth of streams:
    two streams of one thread beat one of two on most CNNs.

    Args:
        objective: What the search is for.
        engine: Which engine.
        float_precision: What it computes float operators in.
        batches: The batch sizes allowed.
        threads: Threads of the whole run.

    Example:
        >>> [s.streams for s in first_stage("throughput", "openvino", "float32", (1, 8, 32), 2)]
        [2, 1]
    """
    common = Setting(engine=engine, float_precision=float_precision, threads=threads)
    halves = sorted({threads, max(1, threads // 2), 1}, reverse=True)
    if objective == "latency":
        return tuple(common.model_copy(update={"threads": count}) for count in halves)
    batch = sorted(batches)[len(batches) // 2]
    return tuple(common.model_copy(update={"batch": batch, "streams": count}) for count in halves)


def second_stage(objective: Objective, best: Setting, batches: Sequence[int]) -> tuple[Setting, ...]:
    """Return the settings to time beside the best of the first stage: the other batch sizes.

    Example:
        >>> [s.batch for s in second_stage("throughput", Setting(batch=8, streams=2), (1, 8, 32))]
        [1, 32]
    """
    if objective == "latency":
        return ()
    return tuple(best.model_copy(update={"batch": batch}) for batch in sorted(set(batches) - {best.batch}))


def evaluation(engine: EngineName, float_precision: FloatPrecision, threads: int) -> Setting:
    """Return the one setting that accuracy is measured with.

    It depends on no timing, so that accuracies are the same in every run: sums in float may differ in the
    last bit between batch sizes.
    """
    return Setting(
        engine=engine,
        float_precision=float_precision,
        batch=EVALUATION_BATCH,
        threads=threads,
        streams=threads,
    )
