"""The rows of `speed.py` as tables, and what they come to over all networks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from fewbit.engines.causes import CAUSES
from fewbit.measure.intervals import Interval, z_value
from speed_turns import Standing

Row = dict[str, Any]
_PLAIN = 3


def rows_of(standings: Sequence[Standing], case: Row, macs: int, peak_gops: float) -> list[Row]:
    """Return a row for each entrant of a case; the answer's has its ratio to the best peer.

    Args:
        standings: How each did.
        case: Network, batch, threads, and whatever else every row shall say.
        macs: Multiplications of one image.
        peak_gops: Giga-operations a second that the machine can do with the case's threads.
    """
    best = best_peer(standings)
    rows = []
    for standing in standings:
        entrant, timing = standing.entrant, standing.timing
        row = case | {
            "contender": entrant.name,
            "how": entrant.how,
            "form": entrant.form,
            "own": entrant.own,
            "answer": standing.answer,
        }
        if timing is None:
            rows.append(row | ({"dropped": True} if standing.dropped else {"failed": standing.failed}))
            continue
        row |= {
            "images_per_s": timing.images_per_s,
            "interval95": [timing.interval.low, timing.interval.high],
            "ms_per_batch_p50": timing.ms_per_batch_p50,
            "rounds": timing.rounds,
            "peak_fraction": timing.images_per_s * 2 * macs / (peak_gops * 1e9),
        }
        told = best if standing.answer else standing
        if told is not None and told.ratio is not None and told.interval is not None:
            row |= {"ratio": told.ratio, "ratio_interval95": [told.interval.low, told.interval.high]}
        if standing.answer:
            row |= {
                "best_peer": "" if best is None else f"{best.entrant.name}, {best.entrant.how}",
                "int8_gain": int8_gain(standings),
            }
        rows.append(row)
    return rows


def best_peer(standings: Sequence[Standing]) -> Standing | None:
    """Return the peer that the answer's ratio is to: the one it beats by least."""
    finalists = [s for s in standings if not s.entrant.own and s.ratio is not None]
    return min(finalists, key=lambda s: s.ratio or math.inf, default=None)


def int8_gain(standings: Sequence[Standing]) -> float | None:
    """Return how many times as fast the best int8 peer is as the best float one; none without both."""
    speeds: dict[bool, float] = {}
    for standing in standings:
        if standing.timing is not None and not standing.entrant.own:
            int8 = standing.entrant.form == "int8"
            speeds[int8] = max(speeds.get(int8, 0.0), standing.timing.images_per_s)
    return speeds[True] / speeds[False] if len(speeds) == 2 else None


def geometric_mean(rows: Sequence[Row]) -> tuple[float, Interval] | None:
    """Return the geometric mean of the ratios of rows, and its 95 % interval; none without rows.

    The networks are the ones asked for, no sample of others, so the interval is that of the timing alone:
    each ratio's own interval is taken as ``exp(log ratio -+ z s_i)``, and the mean of n logarithms has
    ``s = sqrt(sum s_i^2) / n``.

    Example:
        >>> row = {"ratio": 2.0, "ratio_interval95": [1.0, 4.0]}
        >>> mean, interval = geometric_mean([row, row | {"ratio": 0.5, "ratio_interval95": [0.25, 1.0]}])
        >>> round(mean, 6), round(interval.low, 4), round(interval.high, 4)
        (1.0, 0.6125, 1.6325)
    """
    ratios = [row for row in rows if "ratio" in row]
    if not ratios:
        return None
    z = z_value(0.95)
    spans = [math.log(high / low) / (2 * z) for low, high in (row["ratio_interval95"] for row in ratios)]
    mean = statistics.fmean(math.log(row["ratio"]) for row in ratios)
    reach = z * math.sqrt(sum(span**2 for span in spans)) / len(ratios)
    interval = Interval(low=math.exp(mean - reach), high=math.exp(mean + reach))
    return math.exp(mean), interval


def verdict(row: Row) -> str:
    """Say whether the answer is ahead of the best peer, level with it within the interval, or below."""
    if "ratio" not in row:
        return "no peer ran"
    low, high = row["ratio_interval95"]
    return "ahead" if low > 1 else "below" if high < 1 else "level"


def answers_of(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the answers."""
    return [row for row in rows if row.get("answer")]


def tables_of(rows: Sequence[Row], everyone: bool) -> list[Table]:
    """Return the tables: the answers, milliseconds by cause, the networks; and everyone where asked."""
    answers = answers_of(rows)
    found = [_answers(answers), _causes(answers), _networks(answers)]
    return [*found, _everyone(rows)] if everyone else found


def lines_of(rows: Sequence[Row]) -> list[str]:
    """Return in words what the rows come to: means, where the answer is below, what failed."""
    answers = answers_of(rows)
    lines = []
    if (mean := geometric_mean(answers)) is not None:
        lines.append(f"Geometric mean ratio of {sum('ratio' in a for a in answers)} case(s): {_mean(mean)}")
    for named in ("below", "level"):
        where = [f"{_case(a)} {a['ratio']:.2f}" for a in answers if verdict(a) == named]
        lines.append(f"{named.capitalize()}: {'; '.join(where) or 'nowhere'}")
    least = sorted((gain, name) for name, gain in _gains(answers).items())[:_PLAIN]
    for gain, name in least:
        own = geometric_mean([a for a in answers if a["network"] == name])
        told = "" if own is None else f"; the answer {_mean(own)}"
        lines.append(f"Plain int8 gains little on {name}: {gain:.2f} of the best float{told}")
    failed: dict[str, list[str]] = {}
    for row in rows:
        if "failed" in row:
            failed.setdefault(f"{row['contender']}: {row['failed']}", []).append(_case(row))
    lines += [f"Failed: {what} ({len(cases)} times, first {cases[0]})" for what, cases in failed.items()]
    return lines


def _gains(answers: Sequence[Row]) -> dict[str, float]:
    gains: dict[str, list[float]] = {}
    for row in answers:
        if row.get("int8_gain"):
            gains.setdefault(row["network"], []).append(row["int8_gain"])
    return {name: statistics.median(found) for name, found in gains.items()}


def _answers(answers: Sequence[Row]) -> Table:
    table = _table(
        *("network", "batch", "threads", "fewbit's answer", "images/s, 95 %", "best peer"),
        *("ratio, 95 %", "of int8 peak"),
    )
    for row in answers:
        ratio = _cell(row["ratio"], row["ratio_interval95"], ".2f") if "ratio" in row else ""
        table.add_row(
            row["network"],
            str(row["batch"]),
            str(row["threads"]),
            f"{row['contender'].removeprefix('fewbit ')}, {row['how']}",
            _cell(row["images_per_s"], row["interval95"], ",.0f"),
            row["best_peer"],
            ratio,
            f"{row['peak_fraction']:.1%}",
        )
    return table


def _causes(answers: Sequence[Row]) -> Table:
    seen = [cause for cause in CAUSES if any(cause in row.get("ms_by_cause", {}) for row in answers)]
    table = _table("network", "batch", "threads", "ms of a call, alone", *seen)
    for row in answers:
        causes = row.get("ms_by_cause", {})
        cells = [f"{causes[cause]:.2f}" if cause in causes else "" for cause in seen]
        head = [row["network"], str(row["batch"]), str(row["threads"])]
        table.add_row(*head, f"{sum(causes.values()):.2f}", *cells)
    return table


def _networks(answers: Sequence[Row]) -> Table:
    table = _table("network", "cases", "mean ratio, 95 %", "best int8 peer over best float peer")
    gains = _gains(answers)
    for name in dict.fromkeys(row["network"] for row in answers):
        own = [row for row in answers if row["network"] == name]
        mean = geometric_mean(own)
        shown = "" if mean is None else escape(_mean(mean))
        table.add_row(name, str(len(own)), shown, f"{gains[name]:.2f}" if name in gains else "")
    return table


def _everyone(rows: Sequence[Row]) -> Table:
    table = _table(
        *("network", "batch", "threads", "contender", "images/s, 95 %", "rounds"),
        *("answer over it, 95 %", "of int8 peak"),
    )
    for row in rows:
        if row.get("dropped"):
            continue
        head = [row["network"], str(row["batch"]), str(row["threads"]), f"{row['contender']}, {row['how']}"]
        if "failed" in row:
            table.add_row(*head, "failed", "", "", "")
            continue
        shown = "ratio" in row and not row["answer"]
        ratio = _cell(row["ratio"], row["ratio_interval95"], ".2f") if shown else ""
        speed = _cell(row["images_per_s"], row["interval95"], ",.0f")
        table.add_row(*head, speed, str(row["rounds"]), ratio, f"{row['peak_fraction']:.1%}")
    return table


def _table(*headings: str) -> Table:
    return Table(*headings, box=box.MARKDOWN)


def _case(row: Row) -> str:
    return f"{row['network']} b{row['batch']} t{row['threads']}"


def _mean(found: tuple[float, Interval]) -> str:
    return _with_interval(found[0], [found[1].low, found[1].high], ".2f")


def _with_interval(value: float, interval: Sequence[float], form: str) -> str:
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def _cell(value: float, interval: Sequence[float], form: str) -> str:
    """Return "value [low, high]", with the bracket escaped for rich."""
    return escape(_with_interval(value, interval, form))
