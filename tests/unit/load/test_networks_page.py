from __future__ import annotations

import re
from pathlib import Path

import pytest

from fewbit.load import capture, onnx_in
from fewbit.load.builder import FUNCTIONS, METHODS
from fewbit.load.leaves import LEAVES
from fewbit.load.onnx_graph import OPERATORS
from fewbit.ops import KINDS

PAGE = Path(__file__).parents[3] / "docs" / "networks.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if re.match(r"\| `[A-Z]\w+` \|", line)
]
WORDS = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", PAGE.read_text(encoding="utf-8")))))
CALLS = {getattr(call, "__name__", str(call)).strip("_") for call in (*FUNCTIONS, *METHODS)}


def test_table_has_a_row_for_each_kind() -> None:
    assert {row[0].strip("`") for row in ROWS} == set(KINDS.values())


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("calls", CALLS),
        ("leaves", {name.partition(".")[2] for name in LEAVES}),
        ("modules", {kind.__name__ for kind in KINDS if kind.__module__.startswith("torch.")}),
        ("ONNX operators", set(OPERATORS)),
    ],
)
def test_page_names_everything_that_the_tables_convert(what: str, names: set[str]) -> None:
    assert len(names) > 10
    assert names - WORDS == set()


def test_page_names_no_onnx_operator_that_is_not_read() -> None:
    assert capture and onnx_in  # importing them has filled the tables
    column = set(re.findall(r"`(\w+)`", " ".join(row[2] for row in ROWS)))
    assert column - set(OPERATORS) == {"Erf"}
