"""What a running search tells: events for whoever draws progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fewbit.search.trial import Trial

EventKind = Literal["note", "rung", "begin", "progress", "end", "answer"]


@dataclass(frozen=True)
class Event:
    """Something happened.

    Attributes:
        kind: "note" (something a reader must know), "rung" (the ladder climbs), "begin" (a trial begins),
            "progress" (inside a trial or the final measurement), "end" (a trial is in the journal),
            "answer" (the search is over).
        text: In words, one line.
        fraction: Share of the whole search that is done, 0 to 1; an estimate.
        seconds_left: Time left, an estimate; none before there is anything to estimate from.
        inside: Share of the present trial that is done, 0 to 1.
        rung: Name of the present rung.
        trial: The trial of an "end".
    """

    kind: EventKind
    text: str
    fraction: float = 0.0
    seconds_left: float | None = None
    inside: float = 0.0
    rung: str = ""
    trial: Trial | None = None


Watch = Callable[[Event], None]


def silence(_: Event) -> None:
    """Watch without a word."""
