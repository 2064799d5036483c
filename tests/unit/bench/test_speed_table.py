from __future__ import annotations

import doctest
import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

import speed
import speed_table
from fewbit.engines.session import Setting
from fewbit.measure.intervals import Interval
from fewbit.measure.speed import Timing
from speed_table import best_peer, geometric_mean, int8_gain, lines_of, rows_of, tables_of, verdict
from speed_turns import Entrant, Standing

CASE = {"network": "net", "source": "net", "batch": 8, "threads": 2, "seed": 0}


def standing(
    name: str, images_per_s: float, form: str = "int8", ratio: float | None = None, **more: Any
) -> Standing:
    entrant = Entrant(name, "1 stream", form, name.startswith("fewbit"), lambda: None)
    interval = Interval(low=0.9 * images_per_s, high=1.1 * images_per_s)
    timing = Timing(
        setting=Setting(), images_per_s=images_per_s, interval=interval, ms_per_batch_p50=2.0, rounds=20
    )
    span = None if ratio is None else Interval(low=0.8 * ratio, high=1.25 * ratio)
    return Standing(entrant, timing, ratio=ratio, interval=span, **more)


STANDINGS = [
    standing("fewbit int8", 120, answer=True),
    standing("nncf int8", 110, ratio=1.2),
    standing("onnxruntime int8", 115, ratio=1.1),
    standing("openvino bf16", 60, form="bf16"),
    Standing(Entrant("fewbit float32", "2 streams", "float32", True, lambda: None), dropped=True),
    Standing(Entrant("torch.compile bf16", "1 thread", "bf16", False, lambda: None), failed="no compiler"),
]


def answer(ratio: float, low: float, high: float, network: str = "net", gain: float = 2.0) -> dict[str, Any]:
    row = {"network": network, "batch": 1, "threads": 1, "contender": "fewbit int8", "how": "1 stream"}
    row |= {"answer": True, "images_per_s": 10.0, "interval95": [9.0, 11.0], "best_peer": "p", "rounds": 3}
    figures = {"ratio": ratio, "ratio_interval95": [low, high], "int8_gain": gain, "peak_fraction": 0.2}
    return row | figures


def test_the_answers_ratio_is_to_the_peer_that_it_beats_by_least() -> None:
    rows = rows_of(STANDINGS, CASE, macs=1_000_000, peak_gops=1.0)
    first = rows[0]
    assert first["answer"] and first["best_peer"] == "onnxruntime int8, 1 stream"
    assert first["ratio"] == 1.1 and first["ratio_interval95"] == pytest.approx([0.88, 1.375])
    assert first["peak_fraction"] == pytest.approx(120 * 2e6 / 1e9)
    assert first["int8_gain"] == pytest.approx(115 / 60)
    assert [row.get("ratio") for row in rows[1:4]] == [1.2, 1.1, None]
    assert rows[4]["dropped"] and "failed" not in rows[4]
    assert rows[5]["failed"] == "no compiler" and "images_per_s" not in rows[5]
    assert all(row["network"] == "net" and row["batch"] == 8 for row in rows)
    json.dumps(rows)


def test_a_case_without_peers_has_no_ratio() -> None:
    rows = rows_of(STANDINGS[:1], CASE, macs=1, peak_gops=1.0)
    assert "ratio" not in rows[0] and rows[0]["best_peer"] == "" and rows[0]["int8_gain"] is None
    assert verdict(rows[0]) == "no peer ran"
    assert best_peer(STANDINGS[:1]) is None and geometric_mean(rows) is None
    assert int8_gain([STANDINGS[1]]) is None
    assert not any("Geometric mean" in line for line in lines_of(rows))


def test_the_geometric_mean_and_its_interval_by_hand() -> None:
    rows = [answer(1.2, 1.1, 1.3), answer(1.0, 0.9, 1.2), answer(2.0, 1.9, 2.1)]
    found = geometric_mean([*rows, {"answer": True}])
    assert found is not None
    mean, interval = found
    assert mean == pytest.approx((1.2 * 1.0 * 2.0) ** (1 / 3), rel=1e-9)
    halves = [math.log(1.3 / 1.1) / 2, math.log(1.2 / 0.9) / 2, math.log(2.1 / 1.9) / 2]
    reach = math.sqrt(sum(half**2 for half in halves)) / 3
    assert interval.low == pytest.approx(mean * math.exp(-reach), rel=1e-9)
    assert interval.high == pytest.approx(mean * math.exp(reach), rel=1e-9)


def test_one_ratio_keeps_its_own_width() -> None:
    found = geometric_mean([answer(2.0, 1.6, 2.5)])
    assert found is not None
    assert (found[0], found[1].low, found[1].high) == pytest.approx((2.0, 1.6, 2.5))


@pytest.mark.parametrize(
    ("low", "high", "told"), [(1.01, 1.2, "ahead"), (0.9, 1.1, "level"), (0.8, 0.99, "below")]
)
def test_verdicts(low: float, high: float, told: str) -> None:
    assert verdict(answer(1.0, low, high)) == told


def test_the_lines_name_where_it_is_below_and_where_int8_gains_least() -> None:
    rows = [
        answer(1.3, 1.2, 1.4, "a", gain=3.0),
        answer(0.9, 0.85, 0.95, "b", gain=0.8),
        answer(1.0, 0.95, 1.05, "c", gain=1.1),
        answer(1.5, 1.4, 1.6, "d", gain=1.2),
        CASE | {"contender": "torch.compile bf16", "failed": "no compiler"},
        CASE | {"contender": "torch.compile bf16", "failed": "no compiler", "batch": 1},
    ]
    told = lines_of(rows)
    assert told[0].startswith("Geometric mean ratio of 4 case(s): 1.15 [")
    assert told[1:3] == ["Below: b b1 t1 0.90", "Level: c b1 t1 1.00"]
    assert [line.split(":")[0] for line in told[3:6]] == [f"Plain int8 gains little on {n}" for n in "bcd"]
    assert told[4] == "Plain int8 gains little on c: 1.10 of the best float; the answer 1.00 [0.95, 1.05]"
    assert told[6:] == ["Failed: torch.compile bf16: no compiler (2 times, first net b8 t2)"]
    assert lines_of([answer(1.3, 1.2, 1.4)])[1:3] == ["Below: nowhere", "Level: nowhere"]


def test_the_tables_show_every_figure_in_markdown() -> None:
    rows = rows_of(STANDINGS, CASE, macs=1_000_000, peak_gops=1.0)
    rows[0]["ms_by_cause"] = {"1x1": 1.25, "pools": 0.5}
    console = Console(width=200, record=True, file=io.StringIO())
    for table in tables_of(rows, everyone=True):
        console.print(table)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    first = "| net | 8 | 2 | int8, 1 stream | 120 [108, 132] | onnxruntime int8, 1 stream "
    assert f"{first}| 1.10 [0.88, 1.38] | 24.0% |" in lines
    assert "| network | batch | threads | ms of a call, alone | 1x1 | pools |" in lines
    assert "| net | 8 | 2 | 1.75 | 1.25 | 0.50 |" in lines
    assert "| net | 1 | 1.10 [0.88, 1.38] | 1.92 |" in lines
    assert "| net | 8 | 2 | nncf int8, 1 stream | 110 [99, 121] | 20 | 1.20 [0.96, 1.50] | 22.0% |" in lines
    assert "| net | 8 | 2 | torch.compile bf16, 1 thread | failed | | | |" in lines
    assert not any("2 streams" in line for line in lines)  # a candidate that was dropped
    assert len(tables_of(rows, everyone=False)) == 3


@pytest.mark.parametrize("module", [speed, speed_table])
def test_examples_of_the_docstrings_run(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0
