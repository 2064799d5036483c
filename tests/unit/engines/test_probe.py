from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import onnx
import pytest

from fewbit.engines import probe
from fewbit.engines.probe import Probed, probe_engines
from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.errors import EngineCrashed
from fewbit.measure.host import describe_host


@pytest.fixture(scope="module")
def probed() -> dict[str, Probed]:
    return {row.engine: row for row in probe_engines()}


def test_each_engine_is_probed_in_its_installed_version(probed: dict[str, Probed]) -> None:
    assert list(probed) == ["onnxruntime", "openvino"]
    for name, row in probed.items():
        assert row.version == importlib.metadata.version(name)
        assert set(row.precisions) == {"convolution", "depthwise", "matrix product", "bf16 convolution"}


def test_both_engines_run_integers_here(probed: dict[str, Probed]) -> None:
    for row in probed.values():
        assert {row.precisions[case] for case in ("convolution", "depthwise", "matrix product")} == {"int8"}


def test_bf16_is_where_engine_and_host_have_it(probed: dict[str, Probed]) -> None:
    assert probed["onnxruntime"].precisions["bf16 convolution"].startswith("none: ")
    found = probed["openvino"].precisions["bf16 convolution"]
    if describe_host().bf16:
        assert found == "bf16"
    else:
        assert found.startswith("none: ") or found == "float32"


@pytest.mark.parametrize("case", ["convolution", "depthwise", "matrix product", "bf16 convolution"])
def test_the_probing_files_are_valid_and_run(case: str, tmp_path: Path) -> None:
    model = probe._model(case)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "net.onnx")
    sides = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).standard_normal(sides).astype(np.float32)
    session = Reference().open(tmp_path / "net.onnx", Setting(engine="reference"))
    assert np.abs(session.run(x)).max() > 0
    wide = case.startswith("bf16")
    assert [o.precision for o in session.placement().operators if o.matrix] == ["float32" if wide else "int8"]


def test_an_engine_that_crashes_is_told_and_the_others_are_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Crashing:
        def __init__(self, engine: str, timeout_s: float) -> None:
            self.engine = engine

        def __enter__(self) -> Crashing:
            raise EngineCrashed(f"{self.engine}: its process died")

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(probe, "EngineProcess", Crashing)
    rows = probe_engines()
    assert [row.engine for row in rows] == ["onnxruntime", "openvino"]
    assert rows[0].precisions["convolution"] == "none: onnxruntime: its process died"
