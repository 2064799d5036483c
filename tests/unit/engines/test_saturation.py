from __future__ import annotations

import platform

import numpy as np
import onnx
import pytest

from fewbit.engines import saturation
from fewbit.engines.limit import ISA_LIMIT, onednn_limit
from fewbit.engines.reference import Reference
from fewbit.engines.saturation import may_saturate, saturates, saturating_engines
from fewbit.engines.session import EngineName, Setting
from fewbit.errors import EngineCrashed
from fewbit.measure.host import describe_host, forbids_bf16

ENGINES: tuple[EngineName, ...] = ("onnxruntime", "openvino")
on_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's limit of instruction sets is for x86"
)


def test_the_file_tells_half_of_a_sum_from_all_of_it(tmp_path: object) -> None:
    path = f"{tmp_path}/sums.onnx"
    onnx.checker.check_model(saturation._model(), full_check=True)
    onnx.save(saturation._model(), path)
    images = np.full((1, 64, 4, 4), 255, np.float32)
    found = Reference().open(path, Setting(engine="reference")).run(images)  # type: ignore[arg-type]
    step = 64 * 255 * 127 / 100
    assert np.allclose(found[0, 0], 100 * step) and np.allclose(found[0, 1], -100 * step)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_flags_of_the_processor_say_what_the_engine_does(
    engine: EngineName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ISA_LIMIT, raising=False)
    assert saturates(engine) == describe_host().saturates_u8s8


@on_x86
@pytest.mark.parametrize(("limit", "expected"), [("AVX2", True), ("AVX512_CORE", True), ("AVX2_VNNI", False)])
def test_a_processor_without_vnni_as_openvino_is_told_to_be_one(
    limit: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not expected and describe_host().saturates_u8s8:
        pytest.skip("this processor has no VNNI")
    monkeypatch.setenv(ISA_LIMIT, limit)
    assert saturates("openvino") is expected
    assert may_saturate(lacks_vnni=False)


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_either_name_of_the_limit_counts_and_default_is_none(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(other, raising=False)
    assert onednn_limit() == "ALL" and not may_saturate(lacks_vnni=False)
    monkeypatch.setenv(name, "default")
    assert onednn_limit() == "ALL" and not may_saturate(lacks_vnni=False)
    monkeypatch.setenv(name, "avx512_core")
    assert onednn_limit() == "AVX512_CORE" and may_saturate(lacks_vnni=False) and forbids_bf16()


def test_nothing_is_asked_where_the_processor_has_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ISA_LIMIT, raising=False)

    def saturates(engine: EngineName) -> bool:
        raise AssertionError("asked")

    monkeypatch.setattr(saturation, "saturates", saturates)
    assert saturating_engines(ENGINES, lacks_vnni=False) == ()


def test_an_engine_that_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturates(engine: EngineName) -> bool:
        if engine == "openvino":
            raise EngineCrashed("openvino: died")
        return True

    monkeypatch.setattr(saturation, "saturates", saturates)
    assert saturating_engines(ENGINES, lacks_vnni=True) == ("onnxruntime",)
