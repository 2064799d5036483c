from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fewbit.engines.session import Setting
from fewbit.errors import CardError, RecipeError
from fewbit.place.targets import TARGETS, Target
from fewbit.spec import Frozen, QuantSpec, Rule, Scheme

SCHEME = Scheme(
    mode="dynamic",
    weights=QuantSpec(bits=4, symmetric=True, signed=True, granularity="channel"),
    rules=(
        Rule(match="first", keep_float=True),
        Rule(match="layer1.*", activations=QuantSpec(bits=6)),
    ),
)
SPECS = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    signed=st.booleans(),
    granularity=st.sampled_from(["tensor", "channel"]),
)


@given(SPECS)
def test_a_spec_comes_back_from_toml_and_json(spec: QuantSpec) -> None:
    assert QuantSpec.from_toml(spec.to_toml()) == spec
    assert QuantSpec.from_data(json.loads(spec.model_dump_json())) == spec


@pytest.mark.parametrize(
    "data",
    [SCHEME, Scheme(), Setting(batch=3), *TARGETS.values()],
    ids=["scheme", "plain", "setting", *TARGETS],
)
def test_nested_data_comes_back_from_toml_and_json(data: Frozen) -> None:
    again = type(data).from_toml(data.to_toml())
    assert again == data and again.digest() == data.digest()
    assert type(data).from_data(json.loads(data.model_dump_json())) == data


def test_a_digest_names_the_content_only() -> None:
    same = Scheme.from_data(
        {"rules": SCHEME.model_dump()["rules"], "weights": SCHEME.weights, "mode": "dynamic"}
    )
    assert same.digest() == SCHEME.digest()
    assert len(SCHEME.digest()) == 12 and int(SCHEME.digest(), 16) >= 0
    others = [SCHEME.model_copy(update={"mode": "static"}), SCHEME.model_copy(update={"rules": ()}), Scheme()]
    assert len({one.digest() for one in (SCHEME, *others)}) == 4


def test_a_digest_is_the_same_in_another_process() -> None:
    code = (
        "from fewbit.place.targets import TARGETS; from fewbit.spec import Scheme;"
        "print(Scheme().digest(), *(t.digest() for t in TARGETS.values()))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert found == {" ".join([Scheme().digest(), *(t.digest() for t in TARGETS.values())]) + "\n"}


def test_content_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Scheme().mode = "dynamic"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "unsigned", "expected"),
    [
        (QuantSpec(), False, (0, 255)),
        (QuantSpec(signed=True), False, (-128, 127)),
        (QuantSpec(symmetric=True, signed=True), False, (-127, 127)),
        (QuantSpec(symmetric=True, signed=True), True, (0, 255)),
        (QuantSpec(symmetric=True), False, (0, 255)),
        (QuantSpec(bits=4), False, (0, 15)),
        (QuantSpec(bits=4, symmetric=True, signed=True), False, (-7, 7)),
        (QuantSpec(bits=2, signed=True), False, (-2, 1)),
        (QuantSpec(bits=2, symmetric=True, signed=True), False, (-1, 1)),
    ],
)
def test_code_ranges(spec: QuantSpec, unsigned: bool, expected: tuple[int, int]) -> None:
    assert spec.code_range(unsigned) == expected


@given(SPECS, st.booleans())
def test_a_code_range_has_as_many_codes_as_its_bits_allow(spec: QuantSpec, unsigned: bool) -> None:
    low, high = spec.code_range(unsigned)
    restricted = spec.symmetric and spec.signed and not unsigned
    assert high - low + 1 == 2**spec.bits - restricted
    assert low <= 0 < high


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode = 'statik'", r"x\.toml: key 'mode' is 'statik': input should be 'static', 'dynamic' or"),
        (
            "mod = 'static'",
            r"x\.toml: unknown key 'mod' \(did you mean 'mode'\?\); known here: activations, mode",
        ),
        (
            "[weights]\nbit = 4",
            r"unknown key 'weights\.bit' \(did you mean 'bits'\?\); known here: bits, granu",
        ),
        ("[weights]\nbits = 9", r"key 'weights\.bits' is 9: input should be less than or equal to 8"),
        ("[weights]\nbits = 1", r"key 'weights' is .*'bits': 1.*: the uniform grid has 2 to 8 bits"),
        ("[weights]\nbits = 'four'", r"key 'weights\.bits' is 'four': input should be a valid integer"),
        ("[[rules]]\nkeep_float = true", r"key 'rules\.0\.match' is missing; add it"),
        ("[[rules]]\nmach = 'fc'", r"unknown key 'rules\.0\.mach' \(did you mean 'match'\?\)"),
        (
            "[[rules]]\nmatch='fc'\n[rules.weights]\nbitz=3",
            r"unknown key 'rules\.0\.weights\.bitz' \(did you mean",
        ),
        ("mode =", r"x\.toml: is not TOML \(Invalid value .*\); correct that line"),
        ("activations = 3", r"key 'activations' is 3: input should be a valid dictionary"),
        (
            "[activations]\ngranularity = 'channel'",
            r"key 'activations' is .*: activations have one scale a tensor; give granularity",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        Scheme.from_toml(text, "x.toml")
    assert "\n" not in str(caught.value)


def test_the_error_is_of_the_class_that_the_caller_reads() -> None:
    with pytest.raises(CardError, match="card: unknown key 'a'"):
        Scheme.from_data({"a": 1}, "card", CardError)
    with pytest.raises(RecipeError, match="data: is no table of keys but a list"):
        Scheme.from_data([1])


def test_an_endless_value_is_cut_short() -> None:
    with pytest.raises(RecipeError) as caught:
        Scheme.from_data({"mode": "x" * 10_000})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("given", [{"bits": 8, "symmetric": True}, {"bits": 4}, {"bits": 8, "signed": False}])
def test_weights_have_signed_codes_whatever_is_asked(given: dict[str, Any]) -> None:
    assert Scheme.from_data({"weights": given}).weights.signed
    rule = Rule.from_data({"match": "fc", "weights": given})
    assert rule.weights is not None and rule.weights.signed


def test_symmetric_activations_have_signed_codes() -> None:
    given = {"bits": 8, "symmetric": True}
    assert Scheme.from_data({"activations": given}).activations.signed
    rule = Rule.from_data({"match": "fc", "activations": given})
    assert rule.activations is not None and rule.activations.signed
    assert not Scheme().activations.signed


def test_what_a_layer_reads_is_checked_as_activations_are() -> None:
    rule = Rule.from_data({"match": "last", "inputs": {"bits": 8, "symmetric": True}})
    assert rule.inputs is not None and rule.inputs.signed and rule.activations is None
    assert Rule.from_toml(rule.to_toml()) == rule and Rule.from_data(rule.model_dump()) == rule
    plain = Rule(match="last")
    assert plain.inputs is None and plain.digest() != rule.digest()
    for wrong, message in (
        ({"granularity": "channel"}, "activations have one scale a tensor; give granularity"),
        ({"bits": 1}, "the uniform grid has 2 to 8 bits"),
        ({"grid": "power"}, "activations are on the uniform grid"),
    ):
        with pytest.raises(RecipeError, match=f"data: key 'inputs' is .*: {message}"):
            Rule.from_data({"match": "last", "inputs": wrong})


def test_none_is_left_out_of_toml() -> None:
    rule = Rule(match="fc", keep_float=True)
    assert rule.to_toml() == 'match = "fc"\nkeep_float = true\n'


def test_targets_are_frozen_data_too() -> None:
    assert Target.from_data(json.loads(TARGETS["openvino"].model_dump_json())) == TARGETS["openvino"]
