from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from fewbit.report import marks, tables
from fewbit.report.summary import answer_trial, fronts
from fewbit.search.trial import Histogram

made = runpy.run_path(str(Path(__file__).parents[2] / "made_study.py"))
study = made["study"]


def test_trials_table_has_the_answer_first_and_only_measured_trials() -> None:
    record = study(("resnet20", "resnet56"))
    table = tables.trials_table(record)
    assert table.rows[0].answer
    assert table.rows[0].key == record.answer.key
    assert len(table.rows) == sum(t.state == "measured" for t in record.trials)
    assert all(len(row.cells) == len(table.columns) for row in table.rows)
    front = {t.key for trials in fronts(record).values() for t in trials}
    assert {row.key for row in table.rows if row.front} == front


def test_number_columns_sort_by_numbers_and_missing_ones_are_empty() -> None:
    record = study()
    bare = answer_trial(record).model_copy(
        update={"key": "bare", "timing": None, "placement": None, "versus_float": None, "bytes": 0}
    )
    table = tables.trials_table(record.model_copy(update={"trials": (*record.trials, bare)}))
    numbers = [place for place, column in enumerate(table.columns) if column.kind == "number"]
    rows = {row.key: row for row in table.rows}
    for place in numbers:
        assert float(rows[record.answer.key].cells[place].sort) >= 0
    empty = [table.columns[place].title for place in numbers if rows["bare"].cells[place].sort == ""]
    assert empty == ["Speed", "Images/s", "Top-1 drop", "Flips", "Size", "In integers"]


def test_layers_table_carries_the_histograms_of_each_row() -> None:
    trial = answer_trial(study())
    table = tables.layers_table(trial.layers)
    assert all(len(row.cells) == len(table.columns) for row in table.rows)
    data = json.loads(table.rows[0].data)
    first = trial.layers[0]
    assert data["weights"]["counts"] == list(first.weights.counts)
    assert data["ends"] == [first.low, first.high]
    assert data["weights"]["low"] + 64 * data["weights"]["width"] == pytest.approx(first.weights.high)


def test_long_histograms_are_merged_and_keep_their_scale() -> None:
    trial = answer_trial(study())
    wide = Histogram(low=-1.0, high=1.0, counts=(1,) * 300)
    layer = trial.layers[0].model_copy(update={"weights": wide})
    data = json.loads(tables.layers_table([layer]).rows[0].data)["weights"]
    assert sum(data["counts"]) == 300
    assert len(data["counts"]) <= tables.BINS
    assert data["width"] == pytest.approx(2 / 300 * 4)


def test_budget_rows_hold_holdout_and_search_against_the_limit() -> None:
    rows = tables.budget_rows(study(budgets=("top1-drop<=1%", "bytes<=2MB")))
    assert [(row.budget, row.measured_on) for row in rows] == [
        ("top1-drop<=1%", "3,000 holdout images"),
        ("top1-drop<=1%", "6,000 search images"),
        ("bytes<=2MB", "the file"),
    ]
    assert rows[0].value == "0.2 points"
    assert rows[0].verdict == "proven"


def test_placement_view_puts_float_operators_first_and_open() -> None:
    view = tables.placement_view(answer_trial(study()).placement)
    assert view.title == "11 of 12 operators run in integers on OpenVINO"
    assert [(group.title, group.open) for group in view.groups] == [
        ("In float: 1", True),
        ("In integers: 11", False),
        ("Conversions and copies: 1", False),
    ]
    assert view.groups[0].operators[0].why == "no integer kernel for this shape"


def test_whisker_lays_the_interval_inside_its_picture() -> None:
    check = study().answer.checks[0]
    low, high = marks.whisker_range([check])
    assert low < check.low < check.value < check.limit < high
    drawing = marks.whisker(check, low, high, width=200)
    assert 'aria-label="0.2 points [-0.3, 0.6], budget top1-drop&lt;=1%"' in drawing


def test_a_spark_of_no_counts_is_empty_and_of_one_bin_is_full() -> None:
    assert marks.spark(None, "weights") == ""
    assert marks.spark(Histogram(low=0, high=1, counts=(0, 0)), "weights") == ""
    assert "M0 22V0H72V22Z" in marks.spark(Histogram(low=0, high=1, counts=(5,)), "weights")


def test_sqnr_bar_is_full_at_sixty_decibel() -> None:
    assert marks.sqnr_bar(None) == ""
    assert "width:50%" in marks.sqnr_bar(30.0)
    assert "width:100%" in marks.sqnr_bar(99.0)
    assert "width:0%" in marks.sqnr_bar(-5.0)
