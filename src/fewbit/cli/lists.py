"""`fewbit methods`, `recipes`, `engines`: what there is."""

from __future__ import annotations

import importlib.metadata
import inspect
import re

import click
from rich.console import Console
from rich.table import Table

from fewbit.cli.options import json_option, print_json


def describe(found: type) -> tuple[str, str]:
    """Return the first line of a class's docstring and its Source section, in one line each."""
    text = inspect.getdoc(found) or ""
    source = re.search(r"Source:\s*(.+?)(?:\n\s*\n|\nDiffers:|\nExample|\n>>>|\Z)", text, re.DOTALL)
    return text.splitlines()[0] if text else "", " ".join(source.group(1).split()) if source else ""


@click.command()
@json_option
def methods(as_json: bool) -> None:
    """List every method, with its source."""
    from fewbit.registry import ROWS, find, rows

    listed = []
    for kind in ROWS:
        for name in rows(kind):
            what, source = describe(find(kind, name))
            listed.append({"kind": kind, "name": name, "what": what, "source": source})
    if as_json:
        print_json(listed)
        return
    table = Table("kind", "name", "what", "source")
    for row in listed:
        table.add_row(*row.values())
    Console().print(table)


@click.command()
@json_option
def recipes(as_json: bool) -> None:
    """List the recipes that ship."""
    from fewbit.recipe import shipped_recipes

    listed = [
        {"name": r.name, "summary": r.summary, "digest": r.digest(), "mode": r.scheme.mode}
        for r in shipped_recipes().values()
    ]
    if as_json:
        print_json(listed)
        return
    table = Table("name", "summary", "digest")
    for row in listed:
        table.add_row(row["name"], row["summary"], row["digest"])
    Console().print(table)


@click.command()
@json_option
def engines(as_json: bool) -> None:
    """List the engines and what this host runs in integers."""
    from fewbit.engines.probe import probe_engines
    from fewbit.measure.host import describe_host

    host = describe_host()
    found = probe_engines()
    if as_json:
        print_json({"host": host.model_dump(mode="json"), "engines": [row.model_dump() for row in found]})
        return
    console = Console()
    console.print(f"{host.cpu}: {', '.join(host.isa)}")
    table = Table("engine", "version", *next(iter(found)).precisions, "u8 x s8 sums")
    for row in found:
        told = (*row.precisions.values(), row.sums)
        table.add_row(row.engine, row.version, *(text.partition(":")[0] for text in told))
    console.print(table)
    for row in found:
        for case, precision in row.precisions.items():
            if precision.startswith("none"):
                console.print(f"{row.engine}, {case}: {precision}", highlight=False, markup=False)


def version_of(package: str) -> str:
    """Return the installed version of a package."""
    return importlib.metadata.version(package)
