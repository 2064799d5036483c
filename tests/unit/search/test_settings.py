"""Which ways to run a file are timed."""

from __future__ import annotations

import pytest

from fewbit.engines.session import Setting
from fewbit.search.settings import evaluation, first_stage, second_stage


@pytest.mark.parametrize(("threads", "streams"), [(1, [1]), (2, [2, 1]), (4, [4, 2, 1]), (16, [16, 8, 1])])
def test_throughput_tries_streams_at_the_middle_batch(threads: int, streams: list[int]) -> None:
    tried = first_stage("throughput", "onnxruntime", "float32", (32, 1, 8), threads)
    assert [s.streams for s in tried] == streams
    assert {(s.batch, s.threads, s.engine) for s in tried} == {(8, threads, "onnxruntime")}


def test_then_the_other_batches() -> None:
    best = Setting(engine="openvino", float_precision="bf16", batch=8, threads=4, streams=4)
    tried = second_stage("throughput", best, (1, 8, 32))
    assert [(s.batch, s.streams, s.float_precision) for s in tried] == [(1, 4, "bf16"), (32, 4, "bf16")]
    assert second_stage("throughput", best, (8,)) == ()


def test_latency_is_one_image_in_one_stream() -> None:
    tried = first_stage("latency", "openvino", "float32", (1, 8, 32), 4)
    assert [(s.batch, s.threads, s.streams) for s in tried] == [(1, 4, 1), (1, 2, 1), (1, 1, 1)]
    assert second_stage("latency", tried[0], (1, 8, 32)) == ()


def test_accuracy_is_measured_in_one_setting_whatever_is_fast() -> None:
    assert evaluation("openvino", "bf16", 2) == Setting(
        engine="openvino", float_precision="bf16", batch=32, threads=2, streams=2
    )
