from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from fewbit.report.doctor_plots import noise_of_layers, study_of_calibration

made = runpy.run_path(str(Path(__file__).parents[2] / "made_diagnosis.py"))


def test_every_examined_layer_has_its_bars() -> None:
    diagnosis = made["diagnosis"]()
    figure = noise_of_layers(diagnosis)
    assert figure is not None
    data = json.loads(figure.json)["data"]
    layers = [layer for layer in diagnosis.layers if layer.sqnr_alone_db is not None]
    assert data[0]["y"] == [layer.sqnr_alone_db for layer in layers]
    assert data[1]["y"] == pytest.approx([layer.sqnr_db for layer in layers])
    assert [one["customdata"] for one in data] == [[layer.name for layer in layers]] * 4
    marked = [layer.name for layer, kl in zip(layers, data[3]["y"], strict=True) if kl is not None]
    assert set(marked) <= {"stage2.0.conv", "stage1.0.conv", "stage1.1.conv", "stage3.0.conv"} and marked
    both = [(a is None) != (b is None) for a, b in zip(data[2]["y"], data[3]["y"], strict=True)]
    assert all(both)
    assert [key.name for key in figure.legend][-1] == "sensitivity, layer of a finding"
    assert "The most sensitive is" in figure.label


def test_without_findings_no_bar_is_set_apart() -> None:
    figure = noise_of_layers(made["healthy"]())
    assert figure is not None and len(figure.legend) == 3


def test_a_float_network_has_no_figure() -> None:
    diagnosis = made["healthy"]()
    plain = tuple(layer.model_copy(update={"sqnr_alone_db": None}) for layer in diagnosis.layers)
    assert noise_of_layers(diagnosis.model_copy(update={"layers": plain})) is None


def test_the_study_shows_each_seed_the_mean_and_the_float_accuracy() -> None:
    study = made["study"]()
    figure = study_of_calibration(study)
    band, mean, seeds, exact = json.loads(figure.json)["data"]
    assert mean["x"] == [2**power for power in range(11)]
    assert mean["y"] == pytest.approx([point.mean for point in study.points])
    assert len(seeds["x"]) == 33 and len(band["x"]) == 22
    assert exact["y"] == [study.float_accuracy.top1] * 2
    low, high = json.loads(figure.json)["layout"]["yaxis"]["range"]
    assert low < min(seeds["y"]) - 0.004 and high > study.float_accuracy.top1 + 0.004
