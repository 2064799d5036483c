from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbit.report.summary import (
    Part,
    answer_trial,
    float_accuracy,
    front,
    fronts,
    pareto_json,
    result_json,
    sentence,
    sentence_parts,
    verdict,
)

made = runpy.run_path(str(Path(__file__).parents[2] / "made_study.py"))
study, trial, accuracies, comparison = (made[n] for n in ("study", "trial", "accuracies", "comparison"))


def test_sentence_names_network_setting_speed_drop_images_and_budget() -> None:
    assert sentence(study()) == (
        "resnet20 in int8 (percentile ranges) on OpenVINO, batch 8, 2 threads: 2.41x [2.33, 2.48] the speed "
        "of the fastest float32, top-1 drop 0.2 points [-0.4, 0.8] on 3,000 holdout images; "
        "inside top1-drop<=1%, proven at 95 %."
    )


def test_sentence_is_its_parts_and_marks_figures_and_intervals() -> None:
    parts = sentence_parts(study())
    assert "".join(part.text for part in parts) == sentence(study())
    assert Part("2.41x", "figure") in parts
    assert Part(" [2.33, 2.48]", "interval") in parts
    assert Part("0.2 points", "strong") in parts


def test_sentence_of_an_error_budget_gives_the_error() -> None:
    text = sentence(study(budgets=("top5-error<=3%",)))
    assert (
        "top-5 error 1.3 % [1.0, 1.8] on 3,000 holdout images; inside top5-error<=3%, proven at 95 %." in text
    )
    assert "drop" not in text


def test_sentence_of_two_budgets_gives_both_and_counts_images_once() -> None:
    text = sentence(study(budgets=("bytes<=2MB", "top1-drop<=1%")))
    assert (
        "top-1 drop 0.2 points [-0.4, 0.8] on 3,000 holdout images, size 310 kB; inside bytes<=2MB and"
        in text
    )
    assert text.count("images") == 1


def test_sentence_without_a_budget_on_accuracy_gives_the_drop_all_the_same() -> None:
    text = sentence(study(budgets=("latency<=5ms",)))
    assert ", top-1 drop 0.2 points [-0.4, 0.8] on 3,000 holdout images, latency 1.55 ms; inside" in text


def test_sentence_for_size_leads_with_bytes_and_says_them_once() -> None:
    text = sentence(study(budgets=("top1-drop<=1%", "bytes<=2MB"), objective="size"))
    assert ": 310 kB, 0.28x the bytes of float32, 2.41x [2.33, 2.48] the speed" in text
    assert text.count("310 kB") == 1


def test_packed_weights_are_told_from_the_file() -> None:
    record = study(objective="size")
    best = answer_trial(record)
    narrow = best.model_copy(update={"packed_bytes": 150_000})
    packed = record.model_copy(
        update={"trials": tuple(narrow if t.key == best.key else t for t in record.trials)}
    )
    assert "150 kB with weights packed (the file has 310 kB), 0.14x the bytes of float32, " in sentence(
        packed
    )
    assert result_json(packed)["bytes"] == best.bytes and result_json(packed)["packed_bytes"] == 150_000
    assert result_json(record)["packed_bytes"] is None
    assert narrow.key in [t.key for t in fronts(packed)["bytes"]]
    points = pareto_json(packed)["bytes"]
    assert [p["packed_bytes"] for p in points if p["packed_bytes"]] == [150_000]


def test_sentence_for_latency_leads_with_the_time_of_a_batch() -> None:
    text = sentence(study(budgets=("top1-drop<=1%", "latency<=5ms"), objective="latency"))
    assert ": 1.55 ms a batch, 2.41x [2.33, 2.48] the speed" in text
    assert text.count("1.55 ms") == 1


def test_sentence_when_nothing_is_inside_names_the_nearest_and_what_would_do() -> None:
    text = sentence(study(budgets=("top1-drop<=0.1%",)))
    assert text.startswith(
        "Nothing measured is inside top1-drop<=0.1%. Nearest: resnet20 in int8 (percentile"
    )
    assert "top-1 drop 0.20 points [-0.40, 0.80]" in text
    assert text.endswith("holdout images. It would be inside a top-1 drop limit of 0.20 points.")


def test_sentence_prefers_the_advice_of_the_search() -> None:
    nearest = study(budgets=("top1-drop<=0.1%",))
    answer = nearest.answer.model_copy(update={"advice": "leaving conv1 in float would do"})
    text = sentence(nearest.model_copy(update={"answer": answer}))
    assert text.endswith(" holdout images. Against the budget: leaving conv1 in float would do.")


def test_sentence_of_several_networks_tells_own_float32_from_the_fastest() -> None:
    record = study(("resnet20", "resnet56"))
    assert "2.41x [2.33, 2.48] the speed of its own fastest float32, top-1 drop" in sentence(record)
    best = answer_trial(record)
    overall = made["timing"](best.setting, 5157.0, 1.31)
    record = record.model_copy(update={"answer": record.answer.model_copy(update={"overall": overall})})
    assert (
        ": 1.31x [1.27, 1.35] the speed of the fastest float32 inside the budget, "
        "2.41x [2.33, 2.48] that of its own float32, top-1 drop"
    ) in sentence(record)
    assert result_json(record)["speed"]["overall"]["ratio"] == 1.31


def test_sentence_without_any_trial_says_so() -> None:
    assert "ended before its first trial" in sentence(study(trials=(), answer=None))
    crashed = made["ended"]("resnet20")[1]
    text = sentence(study(trials=(crashed,), answer=None))
    assert text.startswith("No network was measured: 1 trial ended early, first with: openvino died with")


def test_sentence_of_a_search_that_only_the_search_images_pass() -> None:
    found = study(holdout_drop=0.02)
    found = found.model_copy(update={"answer": found.answer.model_copy(update={"found": True})})
    assert verdict(found) == ("unconfirmed", "Met on the search images, not on the holdout images")
    assert sentence(found).endswith("; inside top1-drop<=1% on the search images only.")


def test_sentence_of_layers_left_in_float_counts_them() -> None:
    assert "in int8 (percentile ranges, 2 layers in float) on OpenVINO" in sentence(
        study(winner="int8-percentile-float2")
    )


def test_verdict_proven_met_and_none() -> None:
    assert verdict(study()) == ("proven", "Proven at 95 %")
    word, text = verdict(study(budgets=("top1-drop<=0.5%",)))
    needed = study(budgets=("top1-drop<=0.5%",)).answer.confirmation.checks[0].images_to_prove
    assert word == "met"
    assert text == f"Met, not proven: about {needed:,} images would prove it"
    assert verdict(study(budgets=("top1-drop<=0.1%",)))[0] == "none"


def test_float_accuracy_is_recovered_from_the_pairs() -> None:
    versus = comparison(0.004, 0.03, 6000)
    before, after = accuracies("resnet20", versus)
    one = trial("resnet20", "int8", answer_trial(study()).setting, accuracy=after, versus_float=versus)
    assert float_accuracy(one) == before


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_front_keeps_exactly_the_trials_that_none_beats(points: list[tuple[int, int]]) -> None:
    template = made["ended"]("resnet20")[0]
    trials = [
        template.model_copy(
            update={
                "key": str(place),
                "state": "measured",
                "bytes": gain,
                "accuracy": template.accuracy.model_copy(update={"top1_correct": right}),
            }
        )
        for place, (gain, right) in enumerate(points)
    ]
    kept = {(t.bytes, t.accuracy.top1_correct) for t in front(trials, lambda t: float(t.bytes), 1)}
    unbeaten = {
        (gain, right)
        for gain, right in points
        if not any(g >= gain and r >= right and (g, r) != (gain, right) for g, r in points)
    }
    assert kept == unbeaten


def test_front_leaves_out_dropped_trials() -> None:
    assert all(t.state == "measured" for trials in fronts(study()).values() for t in trials)


def test_result_json_has_the_documented_keys_and_figures() -> None:
    got = json.loads(json.dumps(result_json(study())))
    documented = (
        "network recipe digest engine batch threads accuracy float_accuracy versus_float holdout speed bytes "
        "float_bytes placement host seed versions"
    )
    assert set(documented.split()) <= got.keys()
    assert (got["network"], got["recipe"], got["engine"]) == ("resnet20", "int8-percentile", "openvino")
    assert (got["batch"], got["threads"], got["seed"]) == (8, 2, 7)
    assert got["accuracy"]["images"] == 6000
    assert got["holdout"]["accuracy"]["images"] == 3000
    assert got["holdout"]["versus_float"]["top1_drop"] == pytest.approx(0.002)
    drop = got["float_accuracy"]["top1"] - got["accuracy"]["top1"]
    assert got["versus_float"]["top1_drop"] == pytest.approx(drop)
    assert {"top1_drop", "interval95", "flips"} <= got["versus_float"].keys()
    assert got["speed"]["ratio_to_float"] == pytest.approx(2.41)
    assert got["speed"]["float_engine"] == "onnxruntime"
    assert got["bytes"] < got["float_bytes"] == 1_104_300
    assert got["placement"] == {"integer_operators": 11, "float_operators": 1}


def test_result_json_without_an_answer_says_so_and_keeps_the_rest() -> None:
    got = json.loads(json.dumps(result_json(study(trials=(), answer=None))))
    assert got["found"] is False
    assert "ended before its first trial" in got["sentence"]
    assert got["seed"] == 7
    assert "network" not in got


def test_an_answer_of_no_trial_is_an_error() -> None:
    with pytest.raises(KeyError, match="resnet20-int8-percentile-openvino' is of none of the 0 trials"):
        answer_trial(study(trials=()))


def test_pareto_json_is_sorted_and_unbeaten() -> None:
    got = json.loads(json.dumps(pareto_json(study(("resnet20", "resnet56")))))
    speeds = [point["speed"]["images_per_s"] for point in got["speed"]]
    accurate = [point["accuracy"]["top1"] for point in got["speed"]]
    assert speeds == sorted(speeds)
    assert accurate == sorted(accurate, reverse=True)
    sizes = [point["bytes"] for point in got["bytes"]]
    assert sizes == sorted(sizes, reverse=True)
