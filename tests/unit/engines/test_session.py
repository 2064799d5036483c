from __future__ import annotations

import pytest

from fewbit.engines.session import BlockTime, PlacedOperator, Placement, Setting
from fewbit.errors import InputError


def operator(kind: str, precision: str, *layers: str, matrix: bool = False) -> PlacedOperator:
    return PlacedOperator(name=kind.lower(), kind=kind, precision=precision, layers=layers, matrix=matrix)


def test_placement_counts_work_and_leaves_conversions_out() -> None:
    placement = Placement(
        engine="onnxruntime",
        operators=(
            operator("QuantizeLinear", "float32"),
            operator("Transpose", "int8"),
            operator("QLinearConv", "int8", "conv", "relu", matrix=True),
            operator("DequantizeLinear", "int8"),
            operator("HardSigmoid", "float32", "act"),
            operator("FusedConv", "float32", "last", matrix=True),
            operator("Conv", "bf16", "half", matrix=True),
        ),
    )
    assert (placement.integer_operators, placement.float_operators) == (1, 3)
    assert [o.layers for o in placement.float_matrix_operators()] == [("last",), ("half",)]
    assert {layer: o.precision for layer, o in placement.by_layer().items()} == {
        "conv": "int8",
        "relu": "int8",
        "act": "float32",
        "last": "float32",
        "half": "bf16",
    }


@pytest.mark.parametrize(("threads", "streams", "each"), [(1, 1, 1), (4, 2, 2), (3, 2, 1), (1, 2, 1)])
def test_threads_are_shared_by_streams(threads: int, streams: int, each: int) -> None:
    assert Setting(threads=threads, streams=streams).threads_per_stream == each


@pytest.mark.parametrize("key", ["batch", "threads", "streams"])
def test_a_setting_of_nothing_is_refused(key: str) -> None:
    with pytest.raises(
        InputError, match=rf"^setting: key '{key}' is 0: input should be greater than or equal to 1$"
    ):
        Setting.from_data({key: 0}, "setting")


def test_throughput_of_a_block() -> None:
    assert BlockTime(images=30, seconds=0.5, latencies_ms=(1.0,)).images_per_s == 60
