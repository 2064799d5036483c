"""The ladder's last rungs: files that take pixels, and other functions in the place of SiLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from fewbit.engines.session import EngineName
from fewbit.search.budget import parse_budget
from fewbit.search.proposal import Proposal
from fewbit.search.standing import Objective, Standing, Terms
from fewbit.search.trial import NetworkCost, Trial
from made_ladder import FLOAT_ERRORS, climb, trial


def with_pixels(
    speeds: dict[str, float], budget: str = "top1-drop<=2%", objective: Objective = "throughput"
) -> list[Trial]:
    """Climb where a file that takes pixels is a tenth faster."""
    names: tuple[EngineName, ...] = ("onnxruntime", "openvino")
    terms = Terms(
        networks=("net",),
        engines=names,
        budgets=(parse_budget(budget),),
        objective=objective,
        inputs=("float32", "uint8"),
    )

    def answer(proposal: Proposal) -> Trial:
        if proposal.base == "float32":
            return trial(proposal, FLOAT_ERRORS, 100)
        return trial(proposal, 610, speeds[proposal.engine] * (1.1 if proposal.takes == "uint8" else 1.0))

    return climb(terms, answer)


def test_the_best_is_tried_with_pixels_at_the_end() -> None:
    history = with_pixels({"onnxruntime": 200.0, "openvino": 500.0})
    found = [(t.recipe, t.setting.engine, t.takes) for t in history if t.rung == "pixels"]
    assert found == [("int8-pixels", "openvino", "uint8")] and history[-1].rung == "pixels"


def test_another_engine_that_pixels_may_lift_above_the_best_is_tried_too() -> None:
    history = with_pixels({"onnxruntime": 480.0, "openvino": 500.0})
    assert [t.setting.engine for t in history if t.rung == "pixels"] == ["openvino", "onnxruntime"]


def test_pixels_are_not_tried_for_bytes_nor_where_nothing_is_inside() -> None:
    speeds = {"onnxruntime": 200.0, "openvino": 500.0}
    assert not [t for t in with_pixels(speeds, objective="size") if t.rung == "pixels"]
    assert not [t for t in with_pixels(speeds, "top1-error<=10%") if t.rung == "pixels"]


def test_nothing_is_built_on_a_trial_that_takes_pixels() -> None:
    proposal = Proposal(
        rung="pixels", network="net", engine="openvino", recipe="int8-pixels", base="int8", takes="uint8"
    )
    budgets, inputs = (parse_budget("top1-drop<=2%"),), ("float32", "uint8")
    terms = Terms(networks=("net",), engines=("openvino",), budgets=budgets, inputs=inputs)
    view = Standing(terms, [trial(proposal, 610, 500.0)])
    pair = view.pairs()[0]
    assert view.int8_trials(pair) == [] and view.most_accurate(pair) is None


# Activations

WITH_SILU = NetworkCost(
    network="net", dense_macs=10**8, pointwise_macs=10**8, depthwise_macs=0, weights=10**6, silus=49
)


def with_silu(
    errors: Mapping[str, int],
    engines: tuple[EngineName, ...] = ("openvino",),
    objective: Objective = "throughput",
    cost: NetworkCost = WITH_SILU,
    gelu: float = 1.2,
) -> list[Trial]:
    """Climb where a scaled GELU is faster than SiLU and hard-swish much faster."""
    budget = (parse_budget("top1-drop<=1%"),)
    terms = Terms(
        networks=("net",), engines=engines, budgets=budget, objective=objective, costs=(cost,),
        inputs=("float32", "uint8"),
    )  # fmt: skip

    def answer(proposal: Proposal) -> Trial:
        if proposal.base == "float32" and proposal.silu is None:
            return trial(proposal, FLOAT_ERRORS, 100)
        gains = {None: 1.0, "gelu": gelu, "hard_swish": 1.8}
        speed = 300 * gains[proposal.silu] * (1.05 if proposal.takes == "uint8" else 1.0)
        return trial(proposal, errors.get(proposal.recipe.removesuffix("-pixels"), FLOAT_ERRORS), speed)

    return climb(terms, answer)


def test_silu_is_replaced_by_the_nearest_first_and_then_by_the_fastest() -> None:
    history = with_silu({})
    tried = [(t.rung, t.recipe, t.silu) for t in history[-3:]]
    assert tried == [
        ("activations", "int8-gelu", "gelu"),
        ("activations", "int8-hard-swish", "hard_swish"),
        ("pixels", "int8-hard-swish-pixels", "hard_swish"),
    ]


def test_a_farther_function_is_not_tried_where_the_nearer_is_outside() -> None:
    history = with_silu({"int8-gelu": 700})
    assert [t.recipe for t in history if t.silu] == ["int8-gelu"]
    assert history[-1].recipe == "int8-pixels"


def test_where_only_the_nearest_function_holds_it_is_the_one_with_pixels() -> None:
    history = with_silu({"int8-hard-swish": 700})
    assert [t.recipe for t in history[-3:]] == ["int8-gelu", "int8-hard-swish", "int8-gelu-pixels"]
    assert history[-1].silu == "gelu"


def test_hard_swish_is_hoped_for_where_the_nearest_alone_could_not_win() -> None:
    def answer(proposal: Proposal) -> Trial:
        if proposal.network == "plain":
            return trial(proposal, FLOAT_ERRORS, 100 if proposal.base == "float32" else 330)
        gains = {None: 1.0, "gelu": 1.2, "hard_swish": 1.8}
        return trial(
            proposal, FLOAT_ERRORS, (100 if proposal.base == "float32" else 200) * gains[proposal.silu]
        )

    budget = (parse_budget("top1-drop<=1%"),)
    both = Terms(networks=("plain", "net"), engines=("openvino",), budgets=budget, costs=(WITH_SILU,))
    history = climb(both, answer)
    assert [t.recipe for t in history if t.silu] == ["int8-gelu", "int8-hard-swish"]
    assert {t.network for t in history if t.silu} == {"net"}


def test_plain_int8_is_not_given_up_for_what_a_replaced_silu_may_still_gain() -> None:
    fast = Proposal(rung="int8", network="plain", engine="openvino", recipe="int8", base="int8")
    slow = fast.model_copy(update={"network": "net"})
    trials = [trial(fast, FLOAT_ERRORS, 400), trial(slow, FLOAT_ERRORS, 200)]
    budgets = (parse_budget("top1-drop<=1%"),)
    given: dict[str, Any] = {"networks": ("plain", "net"), "engines": ("openvino",), "budgets": budgets}
    timing = trials[1].timing
    assert timing is not None
    assert Standing(Terms(**given), trials).too_slow("net", timing) is not None
    assert Standing(Terms(**given, costs=(WITH_SILU,)), trials).too_slow("net", timing) is None


def test_float_and_integers_are_tried_apart() -> None:
    budget = (parse_budget("top1-drop<=1%"),)
    one = Terms(
        networks=("net",),
        engines=("openvino",),
        budgets=budget,
        costs=(WITH_SILU,),
        bf16_engines=("openvino",),
    )

    def answer(proposal: Proposal) -> Trial:
        speeds = {"float32": 100, "bf16": 300, "bf16-gelu": 330, "int8": 280, "int8-gelu": 380}
        outside = "hard-swish" in proposal.recipe
        return trial(proposal, 700 if outside else FLOAT_ERRORS, speeds.get(proposal.recipe, 400))

    tried = [t.recipe for t in climb(one, answer) if t.silu]
    assert tried == ["bf16-gelu", "bf16-hard-swish", "int8-gelu", "int8-hard-swish"]


def test_where_the_fastest_misses_with_gelu_the_most_accurate_is_tried() -> None:
    budget = (parse_budget("top1-drop<=1%"),)
    one = Terms(networks=("net",), engines=("openvino",), budgets=budget, costs=(WITH_SILU,))
    errors = {"int8": 636, "int8-gelu": 680, "int8-mse": 615, "int8-mse-gelu": 620}

    def answer(proposal: Proposal) -> Trial:
        speed = 100 if proposal.base == "float32" else 360 if proposal.silu else 300
        speed += 5 * (proposal.recipe == "int8")
        return trial(proposal, errors.get(proposal.recipe, 600 if proposal.base == "float32" else 650), speed)

    history = climb(one, answer)
    forms = [t.recipe for t in history if t.silu]
    assert forms[:2] == ["int8-gelu", "int8-mse-gelu"]


@pytest.mark.parametrize(
    "more",
    [
        {"engines": ("onnxruntime",)},  # it runs SiLU as a sigmoid and a product, both in integers
        {"objective": "size"},
        {"cost": WITH_SILU.model_copy(update={"silus": 0})},
    ],
    ids=lambda more: next(iter(more)),
)
def test_silu_stays_where_nothing_is_to_be_gained(more: dict[str, Any]) -> None:
    assert not [t for t in with_silu({}, **more) if t.silu]


def test_nothing_else_is_built_on_a_trial_without_its_silu() -> None:
    proposal = Proposal(
        rung="activations", network="net", engine="openvino", recipe="int8-gelu", base="int8", silu="gelu"
    )
    budgets = (parse_budget("top1-drop<=2%"),)
    view = Standing(
        Terms(networks=("net",), engines=("openvino",), budgets=budgets), [trial(proposal, 610, 5.0)]
    )
    assert view.int8_trials(view.pairs()[0]) == []
