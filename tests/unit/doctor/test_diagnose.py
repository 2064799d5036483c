"""Each deliberately broken network has its cause named on the right layer, with the gain of the remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import broken_networks as broken
from fewbit.doctor.diagnose import Images, diagnose, split
from fewbit.doctor.records import CAUSES, Diagnosis, Finding
from fewbit.doctor.sample import Sample
from fewbit.errors import DataError, RecipeError
from fewbit.recipe import Recipe, read_recipe
from fewbit.spec import QuantSpec, Rule

ENGINES = ["onnxruntime", "openvino"]


def calibrated(recipe: str, **changes: Any) -> Recipe:
    """Return a shipped recipe whose calibration is changed."""
    chosen = read_recipe(recipe)
    steps = tuple({**step, **changes} if step["use"] == "calibrate" else step for step in chosen.steps)
    return chosen.model_copy(update={"steps": steps})


def found(diagnosis: Diagnosis, cause: str) -> Finding:
    finding = next((one for one in diagnosis.findings if one.cause == cause), None)
    assert finding is not None, [one.cause for one in diagnosis.findings]
    return finding


def gains(finding: Finding) -> bool:
    """Tell whether the first remedy mends most of the harm, told with figures from the same images."""
    best = finding.remedies[0]
    assert best.images == best.before.accuracy.total == best.after.accuracy.total
    assert best.before.kl is not None and best.after.kl is not None
    assert best.before.agreement is not None and best.after.agreement is not None
    return best.helps and best.after.kl < best.before.kl / 10 and best.after.agreement > best.before.agreement


@pytest.mark.parametrize("engine", ENGINES)
def test_depthwise_range_spread(engine: str) -> None:
    patient = broken.spread_channels()
    made = diagnose(patient.net, read_recipe("int8-per-tensor"), patient.images(), engine=engine)
    finding = made.findings[0]
    assert (finding.cause, finding.layer) == ("depthwise_range_spread", "dw")
    assert gains(finding) and "equalize" in finding.remedies[0].action
    facts = {fact.name: fact for fact in finding.evidence}
    assert facts["largest over smallest channel range"].value > 512
    assert facts["channels that keep fewer than half of the bits"].text == "62.5 %"


def test_a_remedy_that_does_not_help_is_told_too() -> None:
    """The pointwise weights spread too, by input channel, which a scale an output channel cannot mend."""
    patient = broken.spread_channels()
    made = diagnose(patient.net, read_recipe("int8-per-tensor"), patient.images())
    last = found(made, "depthwise_range_spread").remedies[-1]
    assert last.action == "a scale a channel for weights" and not last.helps
    assert last.before == made.quality and last.after.kl is not None and last.after.accuracy.total == 192


@pytest.mark.parametrize("engine", ENGINES)
def test_clipped_tail(engine: str) -> None:
    patient = broken.bright_spots()
    recipe = calibrated("int8", activations="percentile", activation_options={"percentile": 99.9})
    made = diagnose(patient.net, recipe, patient.images(), engine=engine)
    assert made.quality.accuracy.top1 < 0.3 < made.float_accuracy.top1
    finding = made.findings[0]
    assert (finding.cause, finding.layer) == ("clipped_tail", "relu")
    assert gains(finding) and finding.remedies[0].action == "min-max ranges of activations"
    assert finding.remedies[0].after.accuracy.top1 == 1.0
    assert {fact.name: round(fact.value) for fact in finding.evidence}[
        "share of the noise that is theirs"
    ] == 100


def test_clipped_weights() -> None:
    patient = broken.biased_weights()
    recipe = calibrated("int8", weights="percentile", weight_options={"percentile": 90.0})
    made = diagnose(patient.net, recipe, patient.images())
    finding = found(made, "clipped_tail")
    assert finding.layer == "second" and "weight" in finding.reason
    assert finding.evidence[0].value > 99


@pytest.mark.parametrize("engine", ENGINES)
def test_unbalanced_concat(engine: str) -> None:
    patient = broken.joined_branches()
    made = diagnose(patient.net, read_recipe("int8"), patient.images(), engine=engine)
    finding = made.findings[0]
    assert (finding.cause, finding.layer) == ("unbalanced_concat", "cat")
    assert (
        gains(finding)
        and finding.remedies[0].change == '[[scheme.rules]]\nmatch = "after"\nkeep_float = true'
    )
    assert finding.evidence[0].value == pytest.approx(73, abs=2) and finding.evidence[1].value < 5
    cat = next(layer for layer in made.layers if layer.name == "cat")
    assert [one.name for one in cat.inputs] == ["relu", "relu_1"]


@pytest.mark.parametrize("engine", ENGINES)
def test_biased_rounding(engine: str) -> None:
    patient = broken.biased_weights()
    made = diagnose(patient.net, read_recipe("int8"), patient.images(), engine=engine)
    finding = made.findings[0]
    assert (finding.cause, finding.layer) == ("biased_rounding", "second")
    assert gains(finding) and finding.remedies[0].change == '[[steps]]\nuse = "correct_bias"'
    assert finding.evidence[0].value > 100 and finding.evidence[1].value > 95


def test_corrected_biases_are_not_suspected() -> None:
    patient = broken.biased_weights()
    recipe = read_recipe("int8")
    recipe = recipe.model_copy(update={"steps": (*recipe.steps, {"use": "correct_bias"})})
    made = diagnose(patient.net, recipe, patient.images())
    assert "biased_rounding" not in [one.cause for one in made.findings]


def test_outlier_tail() -> None:
    patient = broken.rare_outliers()
    made = diagnose(patient.net, read_recipe("int8"), patient.images())
    finding = made.findings[0]
    assert (finding.cause, finding.layer) == ("outlier_tail", "relu")
    assert gains(finding) and finding.remedies[0].action == "percentile ranges of activations"


def test_a_remedy_that_the_recipe_has_is_not_tried() -> None:
    patient = broken.rare_outliers()
    made = diagnose(patient.net, read_recipe("int8-mse"), patient.images())
    assert [one.action for one in found(made, "outlier_tail").remedies] == [
        "percentile ranges of activations"
    ]


def test_sensitive_layers(demo: Any) -> None:
    recipe = read_recipe("int8")
    two = QuantSpec(bits=2, symmetric=True, signed=True, granularity="channel")
    scheme = recipe.scheme.model_copy(update={"rules": (Rule(match="blocks.1.conv2", weights=two),)})
    recipe = recipe.model_copy(update={"scheme": scheme})
    made = diagnose(demo.net, recipe, demo.images())
    finding = found(made, "sensitive_layers")
    assert (finding.layer, finding.others) == ("blocks.1.conv2", ())
    assert gains(finding) and finding.remedies[0].action == "8 bits for blocks.1.conv2"


HEALTHY = [
    ("spread", lambda: broken.spread_channels(False), "int8-per-tensor"),
    ("spots", broken.bright_spots, "int8"),
    ("joined", lambda: broken.joined_branches(1.0), "int8"),
    ("biased", lambda: broken.biased_weights(False), "int8"),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("make", "recipe"), [pytest.param(m, r, id=n) for n, m, r in HEALTHY])
def test_the_same_networks_when_whole_have_no_finding(make: Any, recipe: str, engine: str) -> None:
    patient = make()
    made = diagnose(patient.net, read_recipe(recipe), patient.images(), engine=engine)
    assert made.findings == () and made.together is None and made.repaired == ""


@pytest.mark.parametrize("engine", ENGINES)
def test_trained_networks_in_int8_have_no_finding(engine: str, demo: Any, demo_depthwise: Any) -> None:
    for one in (demo, demo_depthwise):
        made = diagnose(one.net, read_recipe("int8"), one.images(), section=one.section, engine=engine)
        assert made.findings == ()
        assert made.quality.kl is not None and made.quality.kl < 0.005
        assert made.checked == tuple(CAUSES)


@pytest.mark.parametrize(
    ("change", "action"),
    [
        ({"scale": 1.0}, "scale = 255"),
        ({"mean": (127.5,) * 3, "std": (63.75,) * 3}, "scale = 1"),
        ({"mean": (0.0,) * 3, "std": (1.0,) * 3}, "the images' own mean and std"),
        ({"channels": "bgr"}, 'channels = "rgb"'),
    ],
    ids=["scale", "pixel-units", "no-mean-and-std", "bgr"],
)
def test_wrong_preprocessing(demo_depthwise: Any, change: dict[str, Any], action: str) -> None:
    wrong = demo_depthwise.section.model_copy(update=change)
    made = diagnose(
        demo_depthwise.net, read_recipe("int8"), demo_depthwise.images(wrong), section=wrong, expected=0.85
    )
    (finding,) = made.findings
    assert (finding.cause, finding.layer) == ("wrong_preprocessing", "input")
    (remedy,) = finding.remedies
    assert remedy.helps and action in remedy.action and remedy.images == 64
    assert remedy.before.accuracy.top1 < 0.6 and remedy.after.accuracy.top1 > 0.8
    assert remedy.change.startswith("[input]\nchannels = ")
    assert "repair the preprocessing first" in made.notes[0] and made.repaired == ""


def test_all_remedies_together_and_the_repaired_recipe(demo: Any) -> None:
    recipe = read_recipe("int8")
    four = QuantSpec(bits=4, symmetric=True, signed=True, granularity="channel")
    scheme = recipe.scheme.model_copy(update={"weights": four})
    recipe = recipe.model_copy(update={"scheme": scheme})
    images = demo.images()
    made = diagnose(demo.net, recipe, images)
    assert len([one for one in made.findings if one.remedies[0].helps]) > 1
    assert made.together is not None and made.together.helps
    repaired = Recipe.from_toml(made.repaired)
    assert repaired.name == "int8-repaired" and repaired != recipe
    again = diagnose(demo.net, repaired, images)
    assert again.quality.kl == pytest.approx(made.together.after.kl, rel=1e-6)


def test_same_seed_same_diagnosis_and_the_network_stays_as_it_is() -> None:
    patient = broken.joined_branches()
    before = {key: value.clone() for key, value in patient.net.graph.state_dict().items()}
    first, second = (diagnose(patient.net, read_recipe("int8"), patient.images(), seed=3) for _ in range(2))
    assert first == second and first.seed == 3
    assert all(torch.equal(value, patient.net.graph.state_dict()[key]) for key, value in before.items())


def test_a_float_recipe_has_nothing_to_mend() -> None:
    patient = broken.joined_branches()
    made = diagnose(patient.net, read_recipe("float32"), patient.images())
    assert made.findings == () and made.quality.agreement == 1.0
    assert all(layer.sqnr_alone_db is None for layer in made.layers)


def test_split_before_the_quantizers() -> None:
    first, rest = split(read_recipe("int8-equalized"))
    assert [step["use"] for step in first.steps] == ["canonical", "fold_bn", "equalize"]
    assert [step["use"] for step in rest.steps] == ["place", "calibrate", "correct_bias"]


def test_progress_is_told() -> None:
    patient, told = broken.joined_branches(), []
    diagnose(patient.net, read_recipe("int8"), patient.images(), advance=lambda *what: told.append(what))
    assert [what for what, _ in told][:3] == ["float network", "quantizing", "layers alone"]
    assert "unbalanced concat in cat" in [what for what, _ in told]
    assert all(0 <= fraction <= 1 for _, fraction in told)


def test_no_image_to_judge_with_is_told() -> None:
    patient = broken.joined_branches()
    images = Sample.of_tensor(patient.pixels, patient.targets)
    none = images.subset(np.zeros(0, np.int64))
    with pytest.raises(DataError, match="doctor: no image is left to judge with; give at least two"):
        diagnose(patient.net, read_recipe("int8"), Images(images, none))


def test_a_recipe_that_does_not_fit_is_told() -> None:
    patient = broken.joined_branches()
    recipe = read_recipe("int8").with_float(["nowhere"])
    with pytest.raises(RecipeError, match="rule 'nowhere'"):
        diagnose(patient.net, recipe, patient.images())
