"""What keeps the operators of a file out of integers, as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fewbit.cli.options import print_json
from fewbit.engines.placement_cost import PlacementCost, measure_placement
from fewbit.engines.session import Placement, Setting
from fewbit.report import words
from fewbit.report.costs import cost_view


def show_file(path: Path, engine: str, setting: Setting, options: dict[str, Any]) -> int | None:
    """Profile a file that can run as it is, and show what keeps its operators out of integers.

    Args:
        path: What the user named.
        engine: The engine asked for; empty for the one that the file was made for.
        setting: How to run it.
        options: Those of the command.

    Returns:
        How the command ends; none where the argument is no such file, or options ask for something else.

    Raises:
        EngineError: The engine does not run it.
    """
    if path.suffix != ".onnx" or any(options[name] is not None for name in ("page", "repair", "study")):
        return None
    from fewbit.engines.process import EngineProcess
    from fewbit.load.exported import quantized_for

    made_for = quantized_for(path)
    if made_for is None:
        return None
    if not engine and made_for:
        setting = Setting.model_validate({**setting.model_dump(), "engine": made_for})
    with EngineProcess(setting.engine) as process:
        session = process.open(path, setting)
        placement, cost = session.placement(), measure_placement(session)
    if options["as_json"]:
        print_json(
            {
                "file": path.name,
                "placement": placement.model_dump(mode="json"),
                "cost": cost.model_dump(mode="json"),
            }
        )
        return 0
    from fewbit.cli.diagnosis import make_console

    console = make_console()
    print_placement(placement, console)
    print_cost(cost, console)
    return 0


def print_placement(placement: Placement, console: Console) -> None:
    """Print how many operators run in integers, and which convolutions do not."""
    plain: dict[str, Any] = {"highlight": False, "markup": False}
    console.print(
        f"{placement.engine}: {placement.integer_operators} operators in integers, "
        f"{placement.float_operators} in float",
        **plain,
    )
    for operator in placement.float_matrix_operators():
        console.print(f"in float: {operator.name} ({operator.kind}) {operator.why}", **plain)


def print_cost(cost: PlacementCost, console: Console) -> None:
    """Print the costliest findings as a table, and what the rest of the time is for."""
    view = cost_view(cost)
    console.print(view.lead, highlight=False, markup=False, soft_wrap=True)
    if view.rows:
        table = Table(Column("ms", justify="right"), "share", "what", "in the file", "why", "what to do")
        table.box = SIMPLE_HEAD
        for row in view.rows:
            what = f"{row.kind}, {row.asked}" if row.asked else row.kind
            cells = (row.ms.removesuffix(" ms"), row.share, what, row.where, row.why, row.remedy)
            table.add_row(*map(escape, cells))
        console.print(table)
    if view.more:
        console.print(f"{words.several(len(view.more), 'cause')} that cost less", highlight=False)
    console.print(view.rest, highlight=False, markup=False, soft_wrap=True)
