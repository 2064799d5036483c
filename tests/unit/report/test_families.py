from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from fewbit.report import words
from fewbit.report.families import families_plot, families_table, members
from fewbit.report.html import render
from fewbit.report.summary import pareto_json, result_json
from fewbit.search.trial import LeftOut, NetworkCost

made = runpy.run_path(str(Path(__file__).parents[2] / "made_study.py"))
NAMES = ("resnet20", "resnet56", "separable")
TEXT = "separable on {}: it may reach 400 to 900 images/s, by its <b>multiplications</b>"


def family(**changes: Any) -> Any:
    """Make a study of three networks, one of them not quantized."""
    record = made["study"](NAMES)
    kept = tuple(t for t in record.trials if t.network != "separable" or t.recipe == "float32")
    costs = tuple(
        NetworkCost(network=n, dense_macs=40_000_000, pointwise_macs=1000, depthwise_macs=0, weights=270_000)
        for n in NAMES
    )
    out = tuple(
        LeftOut(
            network="separable",
            engine=engine,
            reason="speed",
            low=low,
            high=900.0,
            to_beat=4000.0,
            text=TEXT.format(engine),
        )
        for engine, low in (("onnxruntime", 400.0), ("openvino", 600.0))
    )
    return record.model_copy(update={"trials": kept, "networks": costs, "left_out": out, **changes})


def drawn(record: Any) -> dict[str, Any]:
    figure = families_plot(record)
    assert figure is not None
    found: dict[str, Any] = json.loads(figure.json)
    return found


def test_one_mark_a_network_joined_to_its_float32() -> None:
    record = family()
    marks = {t["text"][-1]: t for t in drawn(record)["data"] if "markers" in t["mode"]}
    assert set(marks) == set(NAMES)
    best = next(t for t in record.trials if t.key == record.answer.key)
    mark = marks["resnet20"]
    assert mark["customdata"][-1] == best.key and len(mark["x"]) == 2
    assert mark["x"][-1] == best.timing.images_per_s and mark["y"][-1] == pytest.approx(best.accuracy.top1)
    assert mark["marker"]["symbol"] == ["circle-open", "circle"]
    assert marks["separable"]["marker"]["symbol"] == ["circle-open"]


def test_what_a_network_might_have_reached_is_a_dotted_line() -> None:
    (line,) = [t for t in drawn(family())["data"] if t["mode"] == "lines"]
    assert line["x"] == [400.0, 900.0] and line["line"]["dash"] == "dot"
    assert [t for t in drawn(family(left_out=()))["data"] if t["mode"] == "lines"] == []


def test_the_best_is_inside_the_budget_before_it_is_fast() -> None:
    found = {m.name: m for m in members(family(answer=None))}
    assert found["resnet56"].best is not None and found["resnet56"].inside
    inside = [t for t in family().trials if t.network == "resnet56" and t.versus_float is not None]
    fast = max(
        (t for t in inside if t.state == "measured" and t.versus_float.top1_drop <= 0.01),
        key=lambda t: t.timing.images_per_s,
    )
    assert found["resnet56"].best.key == fast.key
    assert [m.best is None for m in members(family())] == [False, False, True]


def narrow(study: Any, network: str, **sizes: int) -> Any:
    """Put a twin with weights under 8 bits beside the int8 of a network."""
    like = next(t for t in study.trials if (t.network, t.recipe) == (network, "int8-percentile"))
    changes = {"key": "narrow", "recipe": "int8-widths3", "rung": "widths", **sizes}
    return study.model_copy(update={"trials": (*study.trials, like.model_copy(update=changes))})


def test_for_size_weights_under_8_bits_count_as_packed() -> None:
    record = family(objective="size", answer=None)
    least = min(t.bytes for t in record.trials if t.network == "resnet56" and t.bytes)
    record = narrow(record, "resnet56", bytes=least + 900, packed_bytes=least // 2)
    found = {m.name: m for m in members(record)}
    assert found["resnet56"].best is not None and found["resnet56"].best.key == "narrow"
    table = families_table(record)
    place = [column.title for column in table.columns].index("Size")
    cell = next(row for row in table.rows if row.network == "resnet56").cells[place]
    assert cell.text == words.size(least + 900) and cell.sort == str(least // 2)
    assert cell.note == f"{words.size(least // 2)} with weights packed"


def test_for_size_a_trial_without_a_file_is_not_the_smallest() -> None:
    record = narrow(family(objective="size", answer=None), "resnet56", bytes=0)
    assert {m.name: m.best.key for m in members(record) if m.best is not None}["resnet56"] != "narrow"


def test_the_table_says_what_each_came_to() -> None:
    table = families_table(family())
    titles = [column.title for column in table.columns]
    rows = {row.network: dict(zip(titles, row.cells, strict=True)) for row in table.rows}
    assert rows["resnet20"]["Came to"].text == "the answer"
    assert rows["resnet20"]["MACs"].text == "40 M" and rows["resnet20"]["MACs"].note == "100 % dense"
    assert rows["resnet56"]["Came to"].text == "inside the budget"
    last = rows["separable"]["Came to"]
    assert (last.text, last.note) == ("left out", "float32 is inside the budget")
    cut_short = families_table(family(left_out=()))
    assert [row.cells[1].text for row in cut_short.rows][-1] == "not tried"
    assert rows["separable"]["Gain"].text == ""


def test_the_page_has_the_section_only_where_several_compete() -> None:
    page = render(family())
    assert 'id="networks"' in page and page.count("Not quantized: separable on ") == 2
    assert "&lt;b&gt;multiplications" in page and "<b>multiplications" not in page
    one = made["study"]()
    assert members(one) == () and families_plot(one) is None
    assert 'id="networks"' not in render(one)


def test_the_json_has_costs_and_reasons() -> None:
    record = family()
    for found in (pareto_json(record), result_json(record)):
        assert found["networks"][0] == {
            "network": "resnet20",
            "dense_macs": 40_000_000,
            "pointwise_macs": 1000,
            "depthwise_macs": 0,
            "weights": 270_000,
            "silus": 0,
            "macs": 40_001_000,
            "int8_weight_bytes": 270_000,
        }
        assert found["left_out"][1]["engine"] == "openvino" and found["left_out"][1]["high"] == 900.0
        json.dumps(found)
