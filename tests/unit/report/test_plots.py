from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from fewbit.report import plots
from fewbit.report.summary import answer_trial, fronts

made = runpy.run_path(str(Path(__file__).parents[2] / "made_study.py"))
study = made["study"]


def drawn(record: Any, against: plots.Against = "speed") -> tuple[plots.Figure, dict[str, Any]]:
    figure = plots.accuracy_against(record, against)
    assert figure is not None
    return figure, json.loads(figure.json)


def test_every_trial_with_both_figures_is_drawn_once() -> None:
    record = study(("resnet20", "separable"))
    _, figure = drawn(record)
    keys = [key for trace in figure["data"] for key in trace.get("customdata", [])]
    assert sorted(keys) == sorted(t.key for t in record.trials if t.accuracy and t.timing)


def test_one_network_is_drawn_by_ratio_and_several_by_images_per_second() -> None:
    assert "times the fastest float32" in drawn(study())[1]["layout"]["xaxis"]["title"]["text"]
    several = drawn(study(("resnet20", "resnet56")))[1]
    assert several["layout"]["xaxis"]["title"]["text"] == "images per second"


def test_front_runs_through_the_unbeaten_trials() -> None:
    record = study(("resnet20", "resnet56"))
    _, figure = drawn(record)
    line = next(trace for trace in figure["data"] if trace["mode"] == "lines")
    assert line["x"] == [t.timing.images_per_s for t in fronts(record)["speed"]]


def test_error_bars_of_a_drop_budget_are_the_paired_interval() -> None:
    record = study()
    _, figure = drawn(record)
    best = answer_trial(record)
    trace = next(t for t in figure["data"] if best.key in t.get("customdata", []))
    place = trace["customdata"].index(best.key)
    interval = best.versus_float.interval(1)
    assert trace["error_y"]["array"][place] == pytest.approx(best.versus_float.top1_drop - interval.low)
    assert trace["error_y"]["arrayminus"][place] == pytest.approx(interval.high - best.versus_float.top1_drop)


def test_error_bars_of_an_error_budget_are_wilsons() -> None:
    record = study(budgets=("top5-error<=3%",))
    _, figure = drawn(record)
    best = answer_trial(record)
    trace = next(t for t in figure["data"] if best.key in t.get("customdata", []))
    place = trace["customdata"].index(best.key)
    assert trace["y"][place] == pytest.approx(best.accuracy.top5)
    assert trace["error_y"]["array"][place] == pytest.approx(
        best.accuracy.interval(5).high - best.accuracy.top5
    )


def test_budget_lines_lie_below_each_networks_float_accuracy() -> None:
    lines = plots.budget_lines(study(("resnet20", "resnet56")))
    assert lines == [
        ("top1-drop<=1%", pytest.approx(0.8103 - 0.01, abs=1e-3), "resnet20"),
        ("top1-drop<=1%", pytest.approx(0.8320 - 0.01, abs=1e-3), "resnet56"),
    ]
    assert plots.budget_lines(study(budgets=("top5-error<=3%",))) == [
        ("top5-error<=3%", pytest.approx(0.97), None)
    ]
    assert plots.budget_lines(study(budgets=("top1>=0.8", "bytes<=2MB"))) == [("top1>=0.8", 0.8, None)]


def test_a_collapsed_trial_does_not_squash_the_axis() -> None:
    figure, content = drawn(study())
    assert figure.hidden == 1
    low, high = content["layout"]["yaxis"]["range"]
    assert 0.7 < low < 0.80 < 0.811 < high < 0.85


def test_without_outliers_the_axis_is_plotlys() -> None:
    record = study()
    kept = tuple(t for t in record.trials if t.state == "measured")
    figure, content = drawn(record.model_copy(update={"trials": kept}))
    assert (figure.near, figure.hidden) == (None, 0)
    assert "range" not in content["layout"]["yaxis"]


def test_networks_differ_by_colour_engines_by_shape_and_float_is_hollow() -> None:
    figure, content = drawn(study(("resnet20", "resnet56")))
    keys = {key.name: key for key in figure.legend}
    assert keys["resnet20, OpenVINO"].colour != keys["resnet56, OpenVINO"].colour
    assert keys["resnet20, OpenVINO"].shape != keys["resnet20, ONNX Runtime"].shape
    symbols = content["data"][keys["resnet20, OpenVINO"].trace]["marker"]["symbol"]
    assert {"square", "square-open", "square-open-dot"} == set(symbols)


def test_names_are_escaped_for_plotly() -> None:
    _, content = drawn(hostile())
    texts = [text for trace in content["data"] for text in trace.get("hovertext", [])]
    assert texts
    assert not any("<a " in text or "<script" in text for text in texts)
    assert any("&lt;a href=" in text for text in texts)


def hostile() -> Any:
    record = study(("resnet20", "resnet56"))
    renamed = tuple(
        t.model_copy(update={"network": "<a href='x'>net</a>"}) if t.network == "resnet56" else t
        for t in record.trials
    )
    return record.model_copy(update={"trials": renamed})


def test_nothing_to_draw_gives_no_figure() -> None:
    assert plots.accuracy_against(study(trials=(), answer=None), "speed") is None


def test_label_names_the_ends_of_the_front() -> None:
    figure, _ = drawn(study())
    assert figure.label.startswith("Scatter plot of 11 trials: top-1 accuracy against speed")
    assert "the fastest resnet20 in int8 (percentile ranges) on OpenVINO" in figure.label
