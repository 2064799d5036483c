"""The answer of a study in one sentence, and in the machine's version."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from fewbit.measure.accuracy import Accuracy, Comparison
from fewbit.measure.speed import Timing
from fewbit.report import words
from fewbit.search.budget import Budget, parse_budget
from fewbit.search.trial import Answer, BudgetCheck, StudyRecord, Trial

Role = Literal["plain", "strong", "figure", "interval", "term"]
Verdict = Literal["proven", "met", "unconfirmed", "none"]


class Part(NamedTuple):
    """A piece of a sentence and how it is set."""

    text: str
    role: Role = "plain"


def sentence(study: StudyRecord) -> str:
    """Return the answer in one or two sentences of plain text.

    The network, its recipe and setting; its speed against the fastest true float32, with the 95 % interval;
    each budgeted figure on the holdout images, with its 95 % interval; which budgets it is inside. Where
    nothing is inside: the same of the nearest network, and what would meet the budget.
    """
    return "".join(part.text for part in sentence_parts(study))


def sentence_parts(study: StudyRecord) -> tuple[Part, ...]:
    """Return the answer's sentence in pieces, for a page that sets figures and intervals apart."""
    answer = study.answer
    if answer is None:
        return (Part(_nothing_measured(study)),)
    allowed = [part for text in study.budgets for part in (Part(" and "), Part(text, "term"))][1:]
    body = [*_who(answer_trial(study)), *_gain(study, answer), *_cost(study, answer)]
    if answer.found:
        word, said = verdict(study)
        sure = " on the search images only" if word == "unconfirmed" else f", {said[0].lower()}{said[1:]}"
        return (*body, *((Part("; inside "), *allowed, Part(sure)) if allowed else ()), Part("."))
    outside = (Part("Nothing measured is inside "), *allowed, Part(". ")) if allowed else ()
    return (*outside, Part("Nearest: "), *body, Part(". "), Part(advice(answer)))


def verdict(study: StudyRecord) -> tuple[Verdict, str]:
    """Say how sure the answer is: a word, and the same for the reader."""
    answer = study.answer
    if answer is None:
        return "none", "Nothing measured"
    if not answer.found:
        return "none", "Nothing inside the budget"
    checks = answer.confirmation.checks
    if not all(check.met for check in checks):
        return "unconfirmed", "Met on the search images, not on the holdout images"
    if all(check.proven for check in checks):
        return "proven", "Proven at 95 %" if checks else "No budget was given"
    return "met", f"Met, not proven{_images_would_prove(checks)}"


def advice(answer: Answer) -> str:
    """Say what would meet the budgets that the nearest network misses."""
    if answer.advice:
        return f"Against the budget: {answer.advice.rstrip('.')}."
    missed = [check for check in (answer.confirmation.checks or answer.checks) if not check.met]
    limits = [f"a {words.measure(check.budget)} limit of {words.measured(check)[0]}" for check in missed]
    return f"It would be inside {_and(limits)}." if limits else "It misses a budget on the search images."


def check_verdict(check: BudgetCheck) -> str:
    """Say whether one budget is met and proven."""
    if check.proven:
        return "proven"
    return f"met, not proven{_images_would_prove([check])}" if check.met else "not met"


def answer_trial(study: StudyRecord) -> Trial:
    """Return the trial that the answer is about.

    Raises:
        KeyError: The study has no answer, or its key is of no trial.
    """
    key = study.answer.key if study.answer else None
    for trial in study.trials:
        if trial.key == key:
            return trial
    raise KeyError(f"the answer's key {key!r} is of none of the {len(study.trials)} trials")


def is_float(trial: Trial) -> bool:
    """Say whether a trial is the network before quantization."""
    return trial.recipe.removesuffix("-pixels") in words.FLOAT_RECIPES


def float_accuracy(trial: Trial) -> Accuracy | None:
    """Return the accuracy of the float32 network of the same card on the same images as the trial."""
    accuracy, versus = trial.accuracy, trial.versus_float
    if accuracy is None or versus is None:
        return accuracy if is_float(trial) else None
    return Accuracy(
        top1_correct=accuracy.top1_correct + versus.losses - versus.gains,
        top5_correct=accuracy.top5_correct + versus.losses5 - versus.gains5,
        total=accuracy.total,
    )


def float_bytes(study: StudyRecord, network: str) -> int | None:
    """Return the size of the float32 file of a network, none where it was not measured."""
    for trial in study.trials:
        if trial.network == network and trial.recipe == "float32" and trial.bytes:
            return trial.bytes
    return None


def accuracy_budget(study: StudyRecord) -> Budget | None:
    """Return the first budget that limits accuracy."""
    budgets = [parse_budget(text) for text in study.budgets]
    return next((budget for budget in budgets if budget.of_accuracy), None)


def axis_k(study: StudyRecord) -> Literal[1, 5]:
    """Return the k of top-k that the study is about: that of its first budget on accuracy, else 1."""
    budget = accuracy_budget(study)
    return 5 if budget is not None and budget.k == 5 else 1


def top(accuracy: Accuracy, k: int) -> float:
    """Return the top-k accuracy as a fraction."""
    return accuracy.correct(k) / accuracy.total if accuracy.total else 0.0


def speed(study: StudyRecord) -> Callable[[Trial], float | None]:
    """Return what the study's speed axis shows of a trial.

    The ratio to the network's own float32 where one network is searched; images per second where several
    compete, since their baselines differ.
    """
    if len({trial.network for trial in study.trials}) > 1:
        return lambda trial: trial.timing.images_per_s if trial.timing else None
    return lambda trial: trial.timing.ratio if trial.timing else None


def front(trials: Sequence[Trial], benefit: Callable[[Trial], float | None], k: int) -> tuple[Trial, ...]:
    """Return the trials that no other beats in both accuracy and `benefit`, most accurate first.

    Only measured trials take part: a dropped one was seen on its first images only.
    """
    known = [
        (benefit_of, top(trial.accuracy, k), trial)
        for trial in trials
        if trial.state == "measured" and trial.accuracy and (benefit_of := benefit(trial)) is not None
    ]
    best: list[Trial] = []
    reached = float("-inf")
    for gain, _, trial in sorted(known, key=lambda point: (-point[1], -point[0])):
        if gain > reached:
            best.append(trial)
            reached = gain
    return tuple(best)


def fronts(study: StudyRecord) -> dict[str, tuple[Trial, ...]]:
    """Return the Pareto fronts of accuracy against "speed" and against "bytes", those of weights packed."""
    k = axis_k(study)
    return {
        "speed": front(study.trials, speed(study), k),
        "bytes": front(study.trials, lambda trial: -trial.counted_bytes if trial.bytes else None, k),
    }


def result_json(study: StudyRecord) -> dict[str, Any]:
    """Return the content of `result.json`; accuracies and drops are fractions.

    `digest` is the first 12 hexadecimal digits of the SHA-256 of the recipe's TOML text; `accuracy` and
    `versus_float` are of the search images, `holdout` of those that only finalists see. Without an
    answer only what is known of the study is there, with `found` false. `packed_bytes` is what the file would
    take were the codes of weights under 8 bits packed at their widths, null where there are none; the
    objective "size" compares it, and a budget on bytes `bytes`.
    """
    return {
        "found": study.answer is not None and study.answer.found,
        "sentence": sentence(study),
        "objective": study.objective,
        **({} if study.answer is None else _answer_json(study, study.answer)),
        "host": study.host.model_dump(mode="json"),
        **_family_json(study),
        "data": study.data.model_dump(mode="json"),
        "seed": study.seed,
        "versions": dict(study.versions),
    }


def _answer_json(study: StudyRecord, answer: Answer) -> dict[str, Any]:
    trial = answer_trial(study)
    confirmation, timing, placement = answer.confirmation, answer.timing, trial.placement
    return {
        "budgets": [check.model_dump(mode="json") for check in answer.checks],
        **_who_json(trial),
        "digest": hashlib.sha256(trial.recipe_toml.encode()).hexdigest()[:12],
        "accuracy": _accuracy_json(trial.accuracy),
        "float_accuracy": _accuracy_json(float_accuracy(trial)),
        "versus_float": _versus_json(trial.versus_float),
        "holdout": {
            "accuracy": _accuracy_json(confirmation.accuracy),
            "float_accuracy": _accuracy_json(confirmation.float_accuracy),
            "versus_float": _versus_json(confirmation.versus_float),
            "budgets": [check.model_dump(mode="json") for check in confirmation.checks],
            "looks": confirmation.looks,
        },
        "speed": {
            "images_per_s": timing.images_per_s,
            "ratio_to_float": timing.ratio,
            "interval95": _ends(timing.ratio_interval),
            "ms_per_batch_p50": timing.ms_per_batch_p50,
            "float_engine": answer.float_setting.engine,
            "float_setting": answer.float_setting.model_dump(mode="json"),
            "overall": answer.overall and _overall_json(answer.overall),
        },
        "bytes": trial.bytes,
        "packed_bytes": trial.packed_bytes or None,
        "float_bytes": float_bytes(study, trial.network),
        "placement": placement
        and {"integer_operators": placement.integer_operators, "float_operators": placement.float_operators},
        "placement_cost": answer.cost and answer.cost.model_dump(mode="json"),
        "advice": answer.advice,
    }


def _overall_json(overall: Timing) -> dict[str, Any]:
    return {
        "against": overall.against,
        "ratio": overall.ratio,
        "interval95": _ends(overall.ratio_interval),
    }


def pareto_json(study: StudyRecord) -> dict[str, Any]:
    """Return the content of `pareto.json`: the trials on each front, most accurate first."""
    return {
        "budgets": list(study.budgets),
        "objective": study.objective,
        "accuracy": f"top{axis_k(study)}",
        **{name: [_point_json(trial) for trial in trials] for name, trials in fronts(study).items()},
        **_family_json(study),
    }


def _family_json(study: StudyRecord) -> dict[str, Any]:
    """Return what the networks cost by their shapes, and which were not quantized for which engine."""
    return {
        "networks": [
            {**cost.model_dump(mode="json"), "macs": cost.macs, "int8_weight_bytes": cost.weights}
            for cost in study.networks
        ],
        "left_out": [one.model_dump(mode="json") for one in study.left_out],
    }


def _nothing_measured(study: StudyRecord) -> str:
    reasons = [trial.reason for trial in study.trials if trial.reason]
    if not reasons:
        return "No network was measured: the study ended before its first trial."
    ended = words.several(len(reasons), "trial")
    return f"No network was measured: {ended} ended early, first with: {reasons[0]}."


def _who(trial: Trial) -> list[Part]:
    return [
        Part(f"{trial.network} in {words.recipe(trial.recipe, trial.keep_float)}", "strong"),
        Part(f" on {words.setting(trial.setting)}: "),
    ]


def _gain(study: StudyRecord, answer: Answer) -> list[Part]:
    parts: list[Part] = []
    trial, timing = answer_trial(study), answer.timing
    before = float_bytes(study, trial.network)
    if study.objective == "size":
        parts.append(Part(words.size(trial.counted_bytes), "figure"))
        file = f" with weights packed (the file has {words.size(trial.bytes)})"
        share = f"{trial.counted_bytes / before:.2f}x the bytes of float32, " if before else ""
        parts.append(Part(f"{file if trial.packed_bytes else ''}, {share}"))
    if study.objective == "latency":
        parts += [Part(words.milliseconds(timing.ms_per_batch_p50), "figure"), Part(" a batch, ")]
    role: Role = "strong" if parts else "figure"
    overall, several = answer.overall, len({trial.network for trial in study.trials}) > 1
    if overall is not None and overall.ratio is not None:
        parts += [*_ratio(overall, role), Part(" the speed of the fastest float32 inside the budget, ")]
        return [*parts, *_ratio(timing, "strong"), Part(" that of its own float32")]
    parts += _ratio(timing, role)
    if timing.ratio is not None:
        parts.append(Part(f" the speed of {'its own' if several else 'the'} fastest float32"))
    return parts


def _ratio(timing: Timing, role: Role) -> list[Part]:
    """Say a speed as a ratio, or as images per second where there is none; with its interval."""
    if timing.ratio is None:
        interval = Part(f" {words.between(timing.interval, 0)}", "interval")
        return [Part(f"{timing.images_per_s:,.0f} images/s", role), interval]
    ends = timing.ratio_interval
    interval = Part(f" {words.between(ends)}" if ends else "", "interval")
    return [Part(f"{timing.ratio:.2f}x", role), interval]


def _cost(study: StudyRecord, answer: Answer) -> list[Part]:
    """Say each budgeted figure; accuracy first, and nothing twice that the objective has said."""
    parts: list[Part] = []
    confirmation = answer.confirmation
    images = f" on {words.several(confirmation.accuracy.total, 'holdout image')}"
    said = {"size": "bytes", "latency": "latency"}.get(study.objective)
    budgets = {check.budget: parse_budget(check.budget) for check in confirmation.checks}
    of_accuracy = [check for check in confirmation.checks if budgets[check.budget].of_accuracy]
    rest = [check for check in confirmation.checks if check not in of_accuracy]
    checks = of_accuracy + [check for check in rest if budgets[check.budget].measure != said]
    if not of_accuracy:
        versus = confirmation.versus_float
        ends = versus.interval()
        parts += [Part(", "), Part("top-1 drop", "term"), Part(" ")]
        parts.append(Part(words.points(versus.top1_drop), "strong"))
        parts += [Part(f" {words.hundred(ends.low, ends.high)}", "interval"), Part(images)]
    for check in checks:
        value, interval = words.measured(check)
        parts += [Part(", "), Part(words.measure(check.budget), "term"), Part(" "), Part(value, "strong")]
        if interval:
            parts.append(Part(f" {interval}", "interval"))
        if of_accuracy and check is of_accuracy[-1]:
            parts.append(Part(images))
    return parts


def _images_would_prove(checks: Sequence[BudgetCheck]) -> str:
    needed = [check.images_to_prove for check in checks if not check.proven and check.images_to_prove]
    return f": about {max(needed):,} images would prove it" if needed else " at 95 %"


def _and(texts: Sequence[str]) -> str:
    return " and ".join(texts)


def _who_json(trial: Trial) -> dict[str, Any]:
    setting = trial.setting
    return {
        "key": trial.key,
        "network": trial.network,
        "recipe": trial.recipe,
        "keep_float": list(trial.keep_float),
        "engine": setting.engine,
        "float_precision": setting.float_precision,
        "batch": setting.batch,
        "threads": setting.threads,
        "streams": setting.streams,
        "input": trial.takes,
    }


def _point_json(trial: Trial) -> dict[str, Any]:
    timing = trial.timing
    return {
        **_who_json(trial),
        "accuracy": _accuracy_json(trial.accuracy),
        "speed": timing
        and {
            "images_per_s": timing.images_per_s,
            "ratio_to_float": timing.ratio,
            "interval95": _ends(timing.ratio_interval),
        },
        "bytes": trial.bytes,
        "packed_bytes": trial.packed_bytes or None,
    }


def _accuracy_json(accuracy: Accuracy | None) -> dict[str, Any] | None:
    if accuracy is None:
        return None
    return {
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        "images": accuracy.total,
        "interval95": _ends(accuracy.interval(1)),
        "top5_interval95": _ends(accuracy.interval(5)),
    }


def _versus_json(versus: Comparison | None) -> dict[str, Any] | None:
    if versus is None:
        return None
    return {
        "top1_drop": versus.top1_drop,
        "interval95": _ends(versus.interval(1)),
        "top5_drop": versus.top5_drop,
        "top5_interval95": _ends(versus.interval(5)),
        "flips": versus.flips,
        "images": versus.total,
    }


def _ends(interval: Any) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]
