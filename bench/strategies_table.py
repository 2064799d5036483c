"""The rows of `strategies.py` and its tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from fewbit.measure.accuracy import Predictions, compare
from fewbit.measure.host import describe_host
from fewbit.measure.intervals import Interval
from fewbit.search.budget import Measured, parse_budget
from fewbit.search.trial import StudyRecord
from speed_turns import Standing

Row = dict[str, Any]


def strategy_row(
    name: str,
    standing: Standing,
    found: Predictions | None,
    exact: Predictions,
    budgets: Sequence[str],
    looks: int,
    chosen: bool = False,
) -> Row:
    """Return the row of one strategy.

    Args:
        name: What it is called.
        standing: Its speed, with the ratio to the fastest float32; or why it failed.
        found: What it predicts; none where it failed.
        exact: What float32 predicts of the same images.
        budgets: Of accuracy; each is held against its figures.
        looks: How many strategies are held against these images; what is proven is so for all of them.
        chosen: It was chosen on some of these images, so they prove nothing of it.
    """
    row: Row = {"strategy": name, "how": standing.entrant.how, "form": standing.entrant.form}
    if (timing := standing.timing) is not None:
        row |= {"images_per_s": timing.images_per_s, "interval95": _ends(timing.interval)}
        row |= {"rounds": timing.rounds}
        if timing.ratio is not None and timing.ratio_interval is not None:
            row |= {"ratio_to_float": timing.ratio, "ratio_interval95": _ends(timing.ratio_interval)}
    if found is None or timing is None:
        return row | {"failed": standing.failed or "its accuracy is not known"}
    accuracy, versus = found.accuracy(), compare(exact, found)
    top5 = accuracy.interval(5)
    row |= {
        "images": accuracy.total,
        "top1": accuracy.top1,
        "top1_drop": versus.top1_drop,
        "top1_drop_interval95": _ends(versus.interval()),
        "top5_error": 1 - accuracy.top5,
        "top5_error_interval95": [1 - top5.high, 1 - top5.low],
    }
    measured, checks = Measured(accuracy, versus), {}
    for text in budgets:
        check = parse_budget(text).check(measured, looks=looks)
        assert check is not None  # budgets of accuracy, which was measured
        checks[text] = "missed" if not check.met else "proven" if check.proven and not chosen else "met"
    return row | {"budgets": checks}


def answer_row(budget: str, study: StudyRecord, standings: Sequence[Standing], seconds: float) -> Row:
    """Return the row of a search's answer: its holdout figure, and its ratios to float32 and to peers.

    Args:
        budget: What was asked for.
        study: The search.
        standings: The answer first, then others that sat with it.
        seconds: That the search took.
    """
    answer, *others = standings
    assert study.answer is not None
    trial = next(trial for trial in study.trials if trial.key == study.answer.key)
    held = study.answer.confirmation
    row: Row = {
        "budget": budget,
        "found": study.answer.found,
        "recipe": trial.recipe,
        "left_in_float": len(trial.keep_float),
        "how": answer.entrant.how,
        "seconds": seconds,
        "trials": len(study.trials),
        "host": describe_host().cpu,
        "versions": study.versions,
        "holdout_images": held.accuracy.total,
        "holdout": [check.model_dump() for check in held.checks],
    }
    if answer.timing is not None:
        row |= {"images_per_s": answer.timing.images_per_s, "interval95": _ends(answer.timing.interval)}
        row |= {"rounds": answer.timing.rounds}
    else:
        row["failed"] = answer.failed
    row["over"] = {
        other.entrant.name: {
            "how": other.entrant.how,
            "ratio": other.ratio,
            "interval95": _ends(other.interval),
        }
        for other in others
        if other.ratio is not None and other.interval is not None
    }
    return row


def tables_of(rows: Sequence[Row]) -> list[Table]:
    """Return a table of strategies for each network, the fastest first, and one of the answers."""
    names = dict.fromkeys(row["network"] for row in rows)
    tables = [_strategies([r for r in rows if r["network"] == name and "strategy" in r]) for name in names]
    return [*tables, _answers([row for row in rows if "budget" in row])]


def _strategies(rows: Sequence[Row]) -> Table:
    images = max((row["images"] for row in rows if "images" in row), default=0)
    budgets = list(dict.fromkeys(text for row in rows for text in row.get("budgets", ())))
    rounds = max((row["rounds"] for row in rows if "rounds" in row), default=0)
    name = rows[0]["network"] if rows else ""
    table = Table(
        *(f"{name}, {images:,} images", "run as", f"images/s, 95 % within a sitting of {rounds} rounds"),
        "to the fastest float32, 95 %",
        *("top-5 error %, 95 %", "top-1 drop, points, 95 %", *budgets),
        box=box.MARKDOWN,
    )
    for row in sorted(rows, key=lambda row: -row.get("images_per_s", 0.0)):
        if "failed" in row:
            table.add_row(row["strategy"], "", "", escape(f"failed: {row['failed'][:80]}"))
            continue
        table.add_row(
            row["strategy"],
            row["how"],
            _cell(row["images_per_s"], row["interval95"], 1, ",.0f"),
            _cell(row["ratio_to_float"], row["ratio_interval95"], 1, ".2f")
            if "ratio_to_float" in row
            else "",
            _cell(row["top5_error"], row["top5_error_interval95"], 100, ".1f"),
            _cell(row["top1_drop"], row["top1_drop_interval95"], 100, ".1f"),
            *(row["budgets"].get(text, "") for text in budgets),
        )
    return table


def _answers(rows: Sequence[Row]) -> Table:
    table = Table(
        *("network", "budget", "answer", "on holdout images, 95 %", "images/s, 95 %"),
        *("over ONNX Runtime float32", "over OpenVINO float32", "best peer", "over the best peer, 95 %"),
        *("search, s", "trials"),
        box=box.MARKDOWN,
    )
    for row in rows:
        over = row["over"]
        peer = min(over, key=lambda name: over[name]["ratio"], default=None)
        held = row["holdout"][0]
        state = "proven" if held["proven"] else "met" if held["met"] else "missed"
        value = _cell(held["value"], [held["low"], held["high"]], 100, ".1f")
        table.add_row(
            row["network"],
            row["budget"],
            f"{row['recipe']}, {row['how']}" + ("" if row["found"] else " (nothing is inside; the nearest)"),
            f"{value}, {row['holdout_images']:,} images, {state}",
            _cell(row["images_per_s"], row["interval95"], 1, ",.0f")
            if "images_per_s" in row
            else escape(f"failed: {row['failed'][:80]}"),
            *(_over(over.get(name)) for name in ("onnxruntime float32", "openvino float32")),
            "" if peer is None else f"{peer}, {over[peer]['how']}",
            "" if peer is None else _over(over[peer]),
            f"{row['seconds']:.0f}",
            str(row["trials"]),
        )
    return table


def _over(found: Row | None) -> str:
    return "" if found is None else _cell(found["ratio"], found["interval95"], 1, ".2f")


def _ends(interval: Interval | None) -> list[float]:
    return [math.nan, math.nan] if interval is None else [interval.low, interval.high]


def _cell(value: float, interval: Sequence[float], factor: float, form: str) -> str:
    """Return "value [low, high]", with the bracket escaped for rich."""
    low, high = (factor * end for end in interval)
    return escape(f"{factor * value:{form}} [{low:{form}}, {high:{form}}]")
