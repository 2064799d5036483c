"""The tables of `fronts.py`, and whether a row dominates the solver's front."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

SOLVER = "integer_program"


def dominates(row: Mapping[str, Any]) -> bool:
    """Say whether a row surely reaches a larger volume than the solver's front, or beats all of it."""
    return bool(row["row"] != SOLVER and (row["more_volume_interval95"][0] > 0 or row["beats_all"]))


def show(console: Console, found: Mapping[str, Any]) -> None:
    """Print the table of one network, and whether the solver's front is beaten."""
    how = found["setting"]
    title = (
        f"{found['network']}, {how['engine']} int8 and {how['float_precision']}, batch {how['batch']}: "
        f"{found['judged']} files, {found['sittings']} sittings of {found['rounds']} rounds, "
        f"{found['images']} images"
    )
    heads = ("row", "points", "measuring s", "solving s", "beats the solver's", "beaten by")
    table = Table(*heads, "volume %, 95 %", "more than the solver's, 95 %", title=title)
    for row in found["rows"]:
        low, high = row["volume_interval95"]
        own = row["row"] == SOLVER
        table.add_row(
            row["row"],
            str(row["points"]),
            f"{row['measuring_s']:.0f}",
            f"{row['solving_s']:.2f}",
            "" if own else f"{row['beats_solver']} ({row['beats_solver_by_medians']} by medians)",
            "" if own else f"{row['beaten_by_solver']} ({row['beaten_by_solver_by_medians']} by medians)",
            f"{100 * row['volume']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
            ""
            if own
            else "{:.1f} [{:.1f}, {:.1f}]".format(
                *(100 * part for part in (row["more_volume"], *row["more_volume_interval95"]))
            ),
        )
    console.print(table)
    beaten = [row["row"] for row in found["rows"] if dominates(row)]
    told = f"dominated by {', '.join(beaten)}" if beaten else "dominated by none"
    most = max((row["beats_solver"] for row in found["rows"]), default=0)
    points = next(row["points"] for row in found["rows"] if row["row"] == SOLVER)
    console.print(f"the solver's front: {told}; at most {most} of its {points} choices are surely beaten\n")
