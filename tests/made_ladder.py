"""Made histories of a search: trials without files, and the ladder climbed over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fewbit.engines.session import EngineName, Setting
from fewbit.measure.accuracy import Accuracy, Comparison, Interval
from fewbit.measure.speed import Timing
from fewbit.search.budget import parse_budget
from fewbit.search.ladder import Ladder
from fewbit.search.mixed_precision import Mix
from fewbit.search.proposal import Aids, Proposal
from fewbit.search.standing import Objective, Standing, Terms
from fewbit.search.trial import Trial, TrialState
from fewbit.search.weight_widths import Widths

IMAGES = 4000
FLOAT_ERRORS = 600  # 15 %
LAYERS = tuple(f"conv{i}" for i in range(16))


def trial(
    proposal: Proposal,
    errors: int,
    speed: float,
    state: TrialState = "measured",
    size: int = 1000,
    images: int = IMAGES,
    packed: int = 0,
) -> Trial:
    """A trial whose float32 has 15 % errors and whose every surplus error is a loss."""
    lost = max(0, errors - FLOAT_ERRORS * images // IMAGES)
    setting = Setting(engine=proposal.engine, float_precision=proposal.float_precision, batch=8, threads=2)
    timing = Timing(
        setting=setting,
        images_per_s=speed,
        interval=Interval(low=speed * 0.98, high=speed * 1.02),
        ms_per_batch_p50=8000 / speed,
        rounds=5,
        ratio=speed / 100,
        ratio_interval=Interval(low=speed / 102, high=speed / 98),
        against="float32",
    )
    right = images - errors
    return Trial(
        key=f"{proposal.network}-{proposal.engine}-{proposal.recipe}",
        network=proposal.network,
        recipe=proposal.recipe,
        recipe_toml="",
        rung=proposal.rung,
        setting=setting,
        state=state,
        reason="" if state == "measured" else "made",
        accuracy=None
        if state == "failed"
        else Accuracy(top1_correct=right, top5_correct=right, total=images),
        versus_float=None
        if state == "failed"
        else Comparison(total=images, losses=lost, gains=0, label_changes=lost, losses5=lost, gains5=0),
        timing=None if state == "failed" else timing,
        bytes=size,
        packed_bytes=packed,
        keep_float=proposal.keep_float,
        takes=proposal.takes,
        silu=proposal.silu,
    )


Answers = Callable[[Proposal], Trial]


def climb(
    terms: Terms,
    answer: Answers,
    most: int = 60,
    mixes: Sequence[Mix] | None = None,
    choices: Mapping[str, Sequence[Widths]] | None = None,
) -> list[Trial]:
    """Run the ladder to its end against made measurements."""
    history: list[Trial] = []
    aids = Aids(
        lambda *_: LAYERS,
        None if mixes is None else lambda *_: tuple(mixes),
        None if choices is None else lambda network: tuple(choices.get(network, ())),
    )
    ladder = Ladder(lambda trials: Standing(terms, trials), aids)
    while (proposal := ladder.propose(history)) is not None:
        again = ladder.propose(tuple(history))
        assert again == proposal
        history.append(answer(proposal))
        assert len(history) <= most
    keys = [t.key for t in history]
    assert len(set(keys)) == len(keys)
    return history


def terms(
    *budgets: str,
    networks: tuple[str, ...] = ("net",),
    engines: tuple[EngineName, ...] = ("onnxruntime", "openvino"),
    objective: Objective = "throughput",
    bf16: tuple[EngineName, ...] = (),
) -> Terms:
    return Terms(
        networks=networks,
        engines=engines,
        budgets=tuple(parse_budget(b) for b in budgets),
        objective=objective,
        bf16_engines=bf16,
    )


def names(history: list[Trial]) -> list[tuple[str, str]]:
    return [(t.setting.engine, t.recipe) for t in history]
