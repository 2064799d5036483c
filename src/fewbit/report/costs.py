"""What keeps operators out of integers, in words: for the pages and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fewbit.engines.placement_cost import PlacementCost, PlacementFinding
from fewbit.report import words

SHOWN = 12
_NAMED = 3


class CostRow(NamedTuple):
    """Findings with one cause: what they cost, what they are, where, why, and what to do."""

    ms: str
    share: str
    kind: str
    asked: str
    where: str
    runs: str
    why: str
    remedy: str


class CostView(NamedTuple):
    """A section of a page: its lead, the costliest findings, and the others."""

    lead: str
    rows: tuple[CostRow, ...]
    more: tuple[CostRow, ...]
    rest: str


def cost_view(cost: PlacementCost) -> CostView:
    """Put a cost into words: findings with the same cause and remedy in one row, the costliest first."""
    causes: dict[tuple[object, ...], list[PlacementFinding]] = {}
    for finding in cost.findings:
        causes.setdefault((finding.kind, finding.why, finding.remedy, finding.on_purpose), []).append(finding)
    grouped = sorted(causes.values(), key=lambda members: -sum(finding.ms for finding in members))
    rows = tuple(_row(members) for members in grouped)
    return CostView(lead_of(cost), rows[:SHOWN], rows[SHOWN:], rest_of(cost))


def lead_of(cost: PlacementCost) -> str:
    """Say what one call takes, and how much of that is no integer work.

    Example:
        >>> from fewbit.engines.session import Setting
        >>> cost = PlacementCost(setting=Setting(), integers=True, ms=2, findings=(), rest={"1x1": 2})
        >>> lead_of(cost).rpartition(" takes ")[2]
        '2 ms in its own profile: nothing stands in the way.'
    """
    alone = cost.setting.model_copy(update={"threads": cost.setting.threads_per_stream, "streams": 1})
    call = f"One call on {words.setting(alone)} takes {words.milliseconds(cost.ms)} in its own profile"
    if not cost.integers:
        return f"{call}; the file is in float and asks for no integers."
    if not cost.findings:
        return f"{call}: nothing stands in the way."
    ms = cost.accidental_ms()
    share = words.percent(ms / cost.ms if cost.ms else 0.0)
    asked = sum(finding.ms for finding in cost.findings if finding.on_purpose)
    more = f" The recipe keeps {words.milliseconds(asked)} in float on purpose." if asked else ""
    return f"{call}; {words.milliseconds(ms)} of that, {share}, go into what is named here.{more}"


def rest_of(cost: PlacementCost) -> str:
    """Say what the other milliseconds are for, the most first."""
    parts = sorted(cost.rest.items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {words.milliseconds(ms)}" for name, ms in parts)
    return f"The other {words.milliseconds(cost.rest_ms)}: {told}." if parts else ""


def _row(members: Sequence[PlacementFinding]) -> CostRow:
    first = members[0]
    names = list(dict.fromkeys(name for finding in members for name in finding.layers))
    more = len(names) - _NAMED
    others = f" and {more} more" if more > 0 else ""
    operators = (operator for finding in members for operator in finding.operators)
    runs = dict.fromkeys(f"{o.kind} ({o.kernel})" if o.kernel else o.kind for o in operators)
    return CostRow(
        ms=words.milliseconds(sum(finding.ms for finding in members)),
        share=words.percent(sum(finding.share for finding in members)),
        kind=first.kind if len(members) == 1 else f"{len(members)} x {first.kind}",
        asked="asked for" if first.on_purpose else "",
        where=", ".join(names[:_NAMED]) + others,
        runs=", ".join(runs),
        why=first.why,
        remedy=first.remedy,
    )
