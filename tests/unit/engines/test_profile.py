from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fewbit.engines import onnxruntime, openvino
from fewbit.engines.process import EngineProcess
from fewbit.engines.profile import WARM_CALLS, Profiled, Taken, join_times
from fewbit.engines.session import PlacedOperator, Setting
from fewbit.errors import EngineError
from fewbit.registry import find

Files = dict[str, Path]
ENGINES = ("onnxruntime", "openvino")
MATRICES = {
    "float": {"conv1", "dw", "fc"},
    "int8": {"conv1", "dw", "pw", "branch", "fc"},
    "mixed": {"symmetric", "wide", "open", "weights_only", "plain", "fc"},
}
BATCH, CALLS = 1024, 6


def setting(engine: str, **more: int) -> Setting:
    return Setting.model_validate({"engine": engine, "batch": BATCH, **more})


def placed(name: str, kind: str, *layers: str) -> PlacedOperator:
    return PlacedOperator(name=name, kind=kind, precision="int8", layers=layers)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("engine", ENGINES)
def test_operators_add_up_to_the_calls_and_every_matrix_is_named(
    files: Files, monkeypatch: pytest.MonkeyPatch, engine: str, name: str
) -> None:
    session = find("engines", engine)().open(files[name], setting(engine))
    images = np.random.default_rng(0).standard_normal((BATCH, 3, 16, 16)).astype(np.float32)
    call, taken_ms = session._call, []

    def watched(*given: object) -> object:
        before = time.perf_counter()
        found = call(*given)
        taken_ms.append(1e3 * (time.perf_counter() - before))
        return found

    monkeypatch.setattr(session, "_call", watched)
    assert isinstance(session, Profiled)
    operators = session.profile(images, CALLS)
    assert len(taken_ms) == WARM_CALLS + CALLS
    call_ms = sum(taken_ms[-CALLS:]) / CALLS
    assert 0.5 * call_ms < sum(o.ms for o in operators) < 1.1 * call_ms
    spent = {layer: o.ms for o in operators if o.matrix for layer in o.layers}
    assert MATRICES[name] <= spent.keys() and all(spent[layer] > 0 for layer in MATRICES[name])
    layers = [layer for o in operators for layer in o.layers]
    assert len(layers) == len(set(layers))
    plain = session.placement().operators
    assert [(o.kind, o.layers, o.precision) for o in operators][: len(plain)] == [
        (o.kind, o.layers, o.precision) for o in plain
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_profile_comes_through_the_process_in_any_setting(files: Files, engine: str) -> None:
    with EngineProcess(engine) as process:
        session = process.open(files["int8"], setting(engine, threads=2, streams=2))
        operators = session.profile(calls=3)
        assert MATRICES["int8"] <= {layer for o in operators if o.ms > 0 for layer in o.layers}
        assert {o.precision for o in operators if o.matrix} == {"int8"}
        assert session.time_block(0.0).images == 2 * BATCH  # the session itself runs on as before


def test_an_engine_without_a_profiler_says_so(files: Files) -> None:
    with EngineProcess("reference") as process:
        session = process.open(files["float"], setting("reference"))
        message = r"^float.onnx: reference has no profiler; use onnxruntime or openvino$"
        with pytest.raises(EngineError, match=message):
            session.profile()


@pytest.mark.parametrize("engine", ENGINES)
def test_images_of_another_size_are_told(files: Files, engine: str) -> None:
    session = find("engines", engine)().open(files["float"], setting(engine))
    with pytest.raises(
        EngineError, match=rf"^float.onnx: {engine} (failed on|got) images \(\d*,? ?2, 16, 16\)"
    ):
        session.profile(np.zeros((BATCH, 2, 16, 16), np.float32), 1)


def test_times_go_to_operators_by_name_and_to_nameless_ones_by_order() -> None:
    operators = [placed("a", "Conv", "conv"), placed("", "Mul"), placed("", "Mul"), placed("idle", "Reshape")]
    taken = [
        Taken(name="", kind="Mul", ms=2.0),
        Taken(name="a", kind="Conv", ms=1.0),
        Taken(name="", kind="Mul", ms=3.0),
        Taken(name="w", kind="DequantizeLinear", ms=4.0, precision="int8"),
        Taken(name="input", kind="Parameter", ms=0.0),
        Taken(name="", kind="Add", ms=5.0),
    ]
    found = join_times(operators, taken)
    assert [(o.name, o.kind, o.ms) for o in found] == [
        ("a", "Conv", 1.0),
        ("", "Mul", 2.0),
        ("", "Mul", 3.0),
        ("idle", "Reshape", 0.0),
        ("w", "DequantizeLinear", 4.0),
        ("", "Add", 5.0),
    ]
    assert found[0].layers == ("conv",) and found[4].precision == "int8"


def test_warm_calls_do_not_count_in_openvinos_means() -> None:
    def counters(ms: float) -> list[SimpleNamespace]:
        return [SimpleNamespace(node_name="c", node_type="Convolution", real_time=timedelta(milliseconds=ms))]

    # 3 warm calls of 10 ms and 2 of 5 ms: the counters say 10, then (30 + 10) / 5
    assert WARM_CALLS == 3
    (found,) = openvino._taken(counters(10), counters(8), calls=2)
    assert (found.name, found.kind) == ("c", "Convolution")
    assert found.ms == pytest.approx(5.0, rel=1e-9)


def test_warm_calls_do_not_count_in_onnxruntimes_events() -> None:
    def event(name: str, kind: str, us: int) -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": us, "args": {"op_name": kind}}

    events = [{"cat": "Session", "name": "model_run", "dur": 9, "args": {}}]
    for us in (900, 900, 900, 200, 400):
        events += [
            event("conv", "QLinearConv", us),
            event("Mul_17", "Mul", 2 * us),
            event("Mul_3", "Mul", us),
        ]
    found = list(onnxruntime._taken(events, {"conv", "Mul_3"}, calls=2))
    assert [(t.name, t.kind, t.ms) for t in found] == [
        ("conv", "QLinearConv", pytest.approx(0.3)),
        ("", "Mul", pytest.approx(0.6)),
        ("Mul_3", "Mul", pytest.approx(0.3)),
    ]
