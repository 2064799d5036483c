"""The ladder's rungs of mixed precision: regions in float, and layers in fewer than 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from fewbit.search.budget import parse_budget
from fewbit.search.ladder import BETTER_RANGES, CORRECTED, RECONSTRUCTED, Ladder, pixels
from fewbit.search.mixed_precision import Mix
from fewbit.search.proposal import Aids, Proposal
from fewbit.search.standing import Objective, Standing, Terms
from fewbit.search.trial import Trial
from fewbit.search.weight_widths import Widths
from made_ladder import FLOAT_ERRORS, LAYERS, climb, terms, trial


def mixes_of(*ratios: float) -> tuple[Mix, ...]:
    """Return a front of one region more in float from choice to choice, with their predicted times."""
    return tuple(
        Mix(
            regions=LAYERS[: place + 1],
            keep_float=LAYERS[: place + 1],
            ms=10 * ratio,
            loss=1.0 / (place + 1),
            ratio=ratio,
        )
        for place, ratio in enumerate(ratios)
    )


def with_mixes(
    mixes: Sequence[Mix] | None,
    needed: int,
    budget: str = "top1-drop<=1%",
    objective: Objective = "throughput",
) -> list[Trial]:
    """Climb where int8 loses 3 points, and `needed` regions in float and more lose none."""
    budget = parse_budget("top1-drop<=1%")
    terms = Terms(networks=("net",), engines=("openvino",), budgets=(budget,), objective=objective)

    def answer(proposal: Proposal) -> Trial:
        if proposal.base == "float32":
            return trial(proposal, FLOAT_ERRORS, 100)
        lossless = len(proposal.keep_float) >= needed
        return trial(proposal, FLOAT_ERRORS if lossless else 720, 500 - 10 * len(proposal.keep_float))

    return climb(terms, answer, mixes=mixes)


def test_the_fastest_mix_that_holds_is_found_by_halving() -> None:
    history = with_mixes(mixes_of(*(1.0 + 0.05 * place for place in range(12))), needed=5)
    tried = [len(t.keep_float) for t in history if t.rung == "mixed"]
    assert min(count for count in tried if count >= 5) == 5 and 4 in tried and len(tried) <= 4
    assert not [t for t in history if t.rung == "float-layers"]


def test_a_mix_that_is_faster_is_tried_where_int8_holds() -> None:
    history = with_mixes(mixes_of(0.85, 0.9, 1.0), needed=0)
    assert [t.recipe for t in history if t.rung == "mixed"] == ["int8-mixed0"]
    assert [t.keep_float for t in history if t.rung == "mixed"] == [LAYERS[:1]]


def test_a_mix_that_is_hardly_faster_is_not_worth_a_trial() -> None:
    assert not [t for t in with_mixes(mixes_of(0.98, 1.0), needed=0) if t.rung == "mixed"]


def test_without_mixes_layers_are_left_in_float_by_rank() -> None:
    for none in (None, ()):
        history = with_mixes(none, needed=4)
        assert not [t for t in history if t.rung == "mixed"]
        assert [t for t in history if t.rung == "float-layers"]


def test_where_no_mix_holds_each_is_tried_but_once() -> None:
    history = with_mixes(mixes_of(1.0, 1.1, 1.2), needed=99)
    tried = [t.recipe for t in history if t.rung == "mixed"]
    assert len(set(tried)) == len(tried) and any(name.endswith("-mixed2") for name in tried)


def test_bytes_are_no_matter_of_regions() -> None:
    assert not [t for t in with_mixes(mixes_of(0.8), 0, objective="size") if t.rung == "mixed"]


def test_what_the_answer_may_not_take_does_not_count() -> None:
    proposal = Proposal(
        rung="pixels", network="net", engine="openvino", recipe="int8-pixels", base="int8", takes="uint8"
    )
    budgets = (parse_budget("top1-drop<=2%"),)
    terms = Terms(networks=("net",), engines=("openvino",), budgets=budgets, inputs=("float32",))
    view = Standing(terms, [trial(proposal, 600, 500.0)])
    assert view.best() is None and view.trials == []


def test_a_twin_with_pixels_does_not_stop_the_climb_of_its_own_pair() -> None:
    budgets, inputs = (parse_budget("top1-drop<=1%"),), ("float32", "uint8")
    terms = Terms(networks=("net",), engines=("openvino",), budgets=budgets, inputs=inputs)
    common = {"network": "net", "engine": "openvino", "base": "int8"}
    float32 = Proposal(rung="float32", network="net", engine="openvino", recipe="float32", base="float32")
    plain = Proposal(rung="int8", recipe="int8", **common)  # type: ignore[arg-type]
    twin = Proposal(rung="pixels", recipe="int8-pixels", takes="uint8", **common)  # type: ignore[arg-type]
    history = [trial(float32, 600, 100.0), trial(plain, 660, 300.0), trial(twin, 638, 320.0)]
    aids = Aids(lambda *_: LAYERS)
    proposal = Ladder(lambda trials: Standing(terms, trials), aids).propose(history)
    assert proposal is not None and proposal.recipe == BETTER_RANGES[0]


@pytest.mark.parametrize(
    ("recipe", "base"),
    [("int8", "int8"), ("int8-mse-float4", "int8-mse"), ("int8-mixed0", "int8"), ("bf16", "float32")],
)
def test_the_recipe_behind_a_trial_is_read_off_its_name(recipe: str, base: str) -> None:
    """As a journal written before there were pixels has nothing else."""
    budgets, inputs = (parse_budget("top1-drop<=1%"),), ("float32", "uint8")
    terms = Terms(networks=("net",), engines=("openvino",), budgets=budgets, inputs=inputs)
    best = Proposal(rung="int8", network="net", engine="openvino", recipe=recipe, base=base)
    proposal = pixels(Standing(terms, [trial(best, 600, 500.0)]), Aids(lambda *_: LAYERS))
    assert proposal is not None and (proposal.recipe, proposal.base) == (f"{recipe}-pixels", base)


CHOICES = tuple(  # of 800 weights
    Widths(bits={"conv1": bits}, code_bytes=100.0 * bits, loss=1.0 / bits) for bits in range(2, 9)
)


def by_width(
    needed: dict[str, int], objective: Objective = "size", int8_holds: bool = True, most: int = 40
) -> list[Trial]:
    """Climb for size where a rounding holds the budget from a place of the front on."""

    def answer(p: Proposal) -> Trial:
        if p.recipe == "float32":
            return trial(p, 600, 100.0, size=4000)
        if not p.bits:
            return trial(p, 600 if int8_holds or len(p.keep_float) > 2 else 900, 300.0, size=1000)
        place = int(p.recipe.rpartition("widths")[2])
        assert dict(p.bits) == CHOICES[place].bits
        holds = place >= needed[p.base]
        return trial(p, 600 if holds else 900, 300.0, size=1010, packed=410 + 100 * place)

    asked = terms("top1-drop<=1%", engines=("onnxruntime",), objective=objective)
    return climb(asked, answer, most, choices={"net": CHOICES})


def test_fewer_bits_are_halved_for_first_rounded_then_reconstructed() -> None:
    history = by_width({"int8": 4, "int8-reconstructed": 2})
    tried = [t.recipe for t in history if t.rung == "widths"]
    assert tried == [
        *("int8-widths2", "int8-widths4", "int8-widths3"),  # of 6 places with less than 8 bits
        *("int8-reconstructed-widths1", "int8-reconstructed-widths2"),
    ]
    asked = terms("top1-drop<=1%", engines=("onnxruntime",), objective="size")
    best = Standing(asked, history).best()
    assert best is not None and best.recipe == "int8-reconstructed-widths2" and best.counted_bytes == 610


def test_fewer_bits_only_for_size_and_only_below_what_holds() -> None:
    for history in (
        by_width({"int8": 0, "int8-reconstructed": 0}, objective="throughput"),
        by_width({"int8": 0, "int8-reconstructed": 0}, objective="latency"),
    ):
        assert not [t for t in history if t.rung == "widths"]


def test_layers_that_had_to_stay_in_float_stay_so_with_fewer_bits_elsewhere() -> None:
    history = by_width(
        dict.fromkeys(("int8", *BETTER_RANGES, *CORRECTED, *RECONSTRUCTED), 3), int8_holds=False
    )
    narrow = [t for t in history if t.rung == "widths"]
    assert narrow and all(t.keep_float == LAYERS[:3] for t in narrow)
    assert all("-float3-widths" in t.recipe for t in narrow)
    assert [len(t.keep_float) for t in history if t.rung == "float-layers"] == [1, 2, 4, 3]


def test_what_the_holdout_images_refused_is_stepped_over_once() -> None:
    history = by_width({"int8": 4, "int8-reconstructed": 2})
    asked = terms("top1-drop<=1%", engines=("onnxruntime",), objective="size")
    refused = {t.key for t in history if t.recipe == "int8-reconstructed-widths2"}
    ladder = Ladder(
        lambda trials: Standing(asked, trials, refused),
        Aids(lambda *_: LAYERS, None, lambda *_: CHOICES),
    )
    following = ladder.propose(history)
    assert following is not None and following.recipe == "int8-reconstructed-widths3"


def test_a_smaller_network_leaves_no_room_for_fewer_bits_of_a_larger_one() -> None:
    choices = {
        "small": [Widths(bits={"conv1": 4}, code_bytes=50.0, loss=1.0)],
        "large": [Widths(bits={"conv1": 4}, code_bytes=500.0, loss=1.0)],
    }

    def answer(p: Proposal) -> Trial:
        small = p.network == "small"
        size = (400 if small else 4000) // (1 if p.recipe == "float32" else 4)
        packed = 0 if not p.bits else 90 if small else 550
        return trial(p, 600, 100.0, size=size, packed=packed)

    asked = terms("top1-drop<=1%", networks=("large", "small"), engines=("onnxruntime",), objective="size")
    history = climb(asked, answer, choices=choices)
    assert not [t for t in history if t.rung == "widths" and t.network == "large"]


def widths_beside(held_by: Mapping[str, int], more: int = 0, drops: bool = True) -> tuple[list[str], Trial]:
    """Climb for size with `small` of 30,000 bytes in int8 and `b` of 65,000, 56,000 of them weights.

    The codes of b take 14,000 bytes at place 0 and 800 more at each next one, beside 9,000 of other bytes and
    `more` that only its files of fewer bits have. It holds the budget from the given places on; a file
    that is larger than a proven one may be dropped before an image is run.
    """
    choices = [
        Widths(bits={"conv1": 2, "fc": min(7, 2 + place)}, code_bytes=14_000.0 + 800 * place, loss=1.0)
        for place in range(26)
    ]

    def answer(p: Proposal) -> Trial:
        int8 = 30_000 if p.network == "small" else 65_000
        if not p.bits:
            return trial(p, 600, 100.0, size=int8 * (4 if p.recipe == "float32" else 1))
        place = int(p.recipe.rpartition("widths")[2])
        packed = 23_000 + more + 800 * place
        errors = 600 if place >= held_by[p.base] else 900
        found = trial(p, errors, 100.0, size=int8 + more, packed=packed)
        unseen = {"state": "dropped", "accuracy": None, "versus_float": None}
        return found.model_copy(update=unseen) if drops and packed >= 30_000 else found

    asked = terms("top1-drop<=1%", networks=("b", "small"), engines=("onnxruntime",), objective="size")
    history = climb(asked, answer, choices={"b": choices})
    best = Standing(asked, history).best()
    assert best is not None
    return [t.recipe for t in history if t.rung == "widths"], best


@pytest.mark.parametrize("drops", [True, False])
def test_choices_that_are_too_large_with_the_rest_of_the_file_are_no_choices(drops: bool) -> None:
    tried, best = widths_beside({"int8": 5, "int8-reconstructed": 5}, drops=drops)
    assert tried == [
        *("int8-widths4", "int8-widths6", "int8-widths5"),  # of 9 with less than 30,000 bytes
        *("int8-reconstructed-widths2", "int8-reconstructed-widths3", "int8-reconstructed-widths4"),
    ]
    assert (best.network, best.recipe, best.counted_bytes) == ("b", "int8-widths5", 27_000)


def test_what_came_out_too_large_turns_to_smaller_choices() -> None:
    """Files of fewer bits have 4,000 bytes more than int8 lets expect: only places 0 to 3 are small enough.

    Where one was run on images all the same and is outside, the smaller ones are so too.
    """
    tried, best = widths_beside({"int8": 3, "int8-reconstructed": 2}, more=4000)
    assert tried == [
        *("int8-widths4", "int8-widths1", "int8-widths2", "int8-widths3"),
        *("int8-reconstructed-widths1", "int8-reconstructed-widths2"),
    ]
    assert (best.network, best.recipe, best.counted_bytes) == ("b", "int8-reconstructed-widths2", 28_600)
    tried, best = widths_beside({"int8": 9, "int8-reconstructed": 9}, more=9000)
    assert tried == ["int8-widths4", "int8-widths1", "int8-widths0"] and best.recipe == "int8"
    tried, best = widths_beside({"int8": 9, "int8-reconstructed": 9}, more=9000, drops=False)
    assert tried == ["int8-widths4", "int8-reconstructed-widths1"] and best.network == "small"
