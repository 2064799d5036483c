from __future__ import annotations

from fewbit.search.proposal import Proposal
from fewbit.search.standing import Standing
from fewbit.search.trials import too_large
from unit.search.test_family import cost, terms, trial

INT8 = Proposal(rung="int8", network="large", engine="openvino", recipe="int8", base="int8")


def view(size: int, packed: int = 0) -> Standing:
    proven = trial("small", "openvino", "int8", 100.0, 50.0, size=size, packed_bytes=packed)
    costs = (cost("small"), cost("large", weights=100_000))
    return Standing(terms(["small", "large"], "top1-drop<=5%", objective="size", costs=costs), [proven])


def test_plain_int8_is_too_large_where_two_bits_a_weight_would_be() -> None:
    # 130,000 bytes, of them 100,000 codes: 55,000 with 2 bits each
    assert too_large(INT8, view(56_000), 130_000) == ""
    assert too_large(INT8, view(55_000), 130_000).startswith("130000 bytes; ")
    assert too_large(INT8, view(112_000, packed=55_000), 130_000).endswith(" has 55000")
    assert too_large(INT8, view(112_000), 130_000) == ""
