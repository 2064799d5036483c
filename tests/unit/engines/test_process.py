from __future__ import annotations

import itertools
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from fewbit.background import busy, working
from fewbit.engines.child import Child, time_calls
from fewbit.engines.onnxruntime import OnnxRuntime
from fewbit.engines.process import EngineProcess, engines_cpu_s
from fewbit.engines.session import Setting
from fewbit.engines.wire import SLOT_BYTES, SLOTS
from fewbit.errors import EngineCrashed, EngineError, EngineHung, RecipeError
from fewbit.measure.speed import measure_interleaved

Files = dict[str, Path]
ENGINES = ("onnxruntime", "openvino", "reference")


def setting(engine: str, **more: int) -> Setting:
    return Setting.model_validate({"engine": engine, "batch": 4, **more})


@pytest.fixture
def process() -> Iterator[EngineProcess]:
    with EngineProcess("onnxruntime", timeout_s=60) as running:
        yield running


@pytest.mark.parametrize("engine", ENGINES)
def test_several_files_in_one_process(files: Files, images: np.ndarray, step: float, engine: str) -> None:
    here = {name: OnnxRuntime().open(files[name], Setting(batch=4)).run(images) for name in ("float", "int8")}
    with EngineProcess(engine) as process:
        first = process.open(files["float"], setting(engine))
        second = process.open(files["int8"], setting(engine))
        assert np.abs(first.run(images) - here["float"]).max() < 1e-4
        assert np.abs(second.run(images) - here["int8"]).max() <= 1.01 * step
        assert second.placement().float_matrix_operators() == ()
        assert second.placement().engine == engine
        block = second.time_block(0.01)
        assert block.images == 4 * len(block.latencies_ms)
        assert block.seconds >= 0.01
        first.close()
        assert second.run(images[:1]).shape == (1, 10)


def test_batches_of_any_size_come_back_in_order(process: EngineProcess, files: Files) -> None:
    many = np.random.default_rng(2).standard_normal((300, 3, 16, 16)).astype(np.float32)
    session = process.open(files["float"], setting("onnxruntime", threads=2, streams=2))
    cuts = [0, 1, 1, 5, 200, 201, 300]
    parts = [many[a:b] for a, b in itertools.pairwise(cuts)]
    whole = OnnxRuntime().open(files["float"], Setting(batch=300)).run(many)
    assert np.allclose(session.logits(parts), whole, atol=1e-5)
    assert session.logits([]).shape == (0, 0)


def test_the_next_batch_is_made_while_the_process_works(
    process: EngineProcess, files: Files, images: np.ndarray
) -> None:
    session = process.open(files["float"], setting("onnxruntime"))
    session.run(images)
    asked: list[str] = []
    wait = session._child.wait

    def batches() -> Iterator[np.ndarray]:
        for number in range(3):
            asked.append(f"made {number}")
            yield images

    def told(request: int, *rest: object) -> object:
        asked.append("waited")
        return wait(request, *rest)

    session._child.wait = told
    assert session.logits(batches()).shape == (33, 10)
    assert asked == ["made 0", "made 1", "made 2", "waited", "waited", "waited"]


def test_an_error_in_the_batches_leaves_the_session_usable(
    process: EngineProcess, files: Files, images: np.ndarray
) -> None:
    session = process.open(files["float"], setting("onnxruntime"))
    expected = session.run(images[:3])

    def batches() -> Iterator[np.ndarray]:
        yield images
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="the disk went away"):
        session.logits(batches())
    assert np.array_equal(session.run(images[:3]), expected)
    with pytest.raises(EngineError, match=r"^float.onnx: onnxruntime failed on images \(4, 2, 16, 16\)"):
        session.run(images[:, :2])
    assert np.array_equal(session.run(images[:3]), expected)


def test_what_the_engine_refuses_is_told_and_the_process_lives(
    process: EngineProcess, files: Files, tmp_path: Path
) -> None:
    pid = process.pid
    with pytest.raises(EngineError, match=r"^none.onnx: onnxruntime refuses it \("):
        process.open(tmp_path / "none.onnx", setting("onnxruntime"))
    assert process.open(files["float"], setting("onnxruntime")).run(
        np.zeros((1, 3, 16, 16), np.float32)
    ).shape == (1, 10)
    assert process.pid == pid


def test_an_image_larger_than_the_shared_memory_is_refused(process: EngineProcess, files: Files) -> None:
    session = process.open(files["float"], setting("onnxruntime"))
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (1, 3, 3000, 3000), (0, 0, 0, 0))
    with pytest.raises(
        EngineError, match=r"^float.onnx: one image \(3, 3000, 3000\) is 108000000 bytes, .* up to 67108864"
    ):
        session.run(huge)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_crash_is_told_with_its_signal_and_the_next_open_goes_on(
    files: Files, images: np.ndarray, engine: str
) -> None:
    with EngineProcess(engine, timeout_s=60) as process:
        session = process.open(files["int8"], setting(engine))
        expected = session.run(images)
        pid = process.pid
        threading.Timer(0.3, os.kill, (pid, signal.SIGSEGV)).start()
        with pytest.raises(
            EngineCrashed, match=rf"^int8.onnx: {engine} crashed while timing it \(SIGSEGV\); use another"
        ):
            session.time_block(30)
        assert process.pid is None
        with pytest.raises(
            EngineCrashed, match=r"^int8.onnx: its process is gone: it died of SIGSEGV; open the file again$"
        ):
            session.run(images)
        session.close()
        again = process.open(files["int8"], setting(engine))
        assert process.pid not in (None, pid)
        assert np.array_equal(again.run(images), expected)


def test_a_process_that_falls_silent_is_ended(files: Files, images: np.ndarray) -> None:
    with EngineProcess("onnxruntime") as process:
        session = process.open(files["float"], setting("onnxruntime"))
        assert process._child is not None
        process._child.timeout_s = 1.0  # only now: a busy machine opens slowly
        pid = process.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        message = (
            r"^float.onnx: onnxruntime did not answer within 1 s while running it; its process was ended; use"
        )
        with pytest.raises(EngineHung, match=message):
            session.run(images)
        assert 0.9 < time.monotonic() - start < 10
        assert not psutil.pid_exists(pid)
        assert process.open(files["float"], setting("onnxruntime")).run(images).shape == (11, 10)


def test_a_block_may_take_longer_than_the_time_limit(files: Files) -> None:
    with EngineProcess("onnxruntime") as process:
        session = process.open(files["float"], setting("onnxruntime"))
        assert process._child is not None
        process._child.timeout_s = 1.0  # only now: a busy machine opens slowly
        assert session.time_block(1.5).seconds >= 1.5


def test_an_unknown_engine_is_told(files: Files) -> None:
    with (
        EngineProcess("onyxruntime") as process,
        pytest.raises(RecipeError, match=r"no 'onyxruntime' \(did you mean"),
    ):
        process._start().ask({"do": "load"}, None, "starting")
    with (
        EngineProcess("reference") as process,
        pytest.raises(ValueError, match="a setting of openvino given to the process of reference"),
    ):
        process.open(files["float"], setting("openvino"))


@pytest.mark.parametrize("busy", [False, True])
def test_killing_the_parent_leaves_no_child(files: Files, busy: bool) -> None:
    program = (
        "import sys, time; from pathlib import Path; from fewbit.engines.process import EngineProcess; "
        "from fewbit.engines.session import Setting; process = EngineProcess('onnxruntime'); "
        f"session = process.open(Path({str(files['float'])!r}), Setting()); "
        "print(process.pid, flush=True); "
        f"session.time_block(60) if {busy} else time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        time.sleep(0.2)
        parent.kill()
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine process outlived its parent"
        time.sleep(0.02)


def test_it_can_be_started_from_a_thread_that_ends(files: Files, images: np.ndarray) -> None:
    made: list[EngineProcess] = []
    thread = threading.Thread(target=lambda: made.append(EngineProcess("onnxruntime").__enter__()))
    thread.start()
    thread.join()
    with made[0] as process:
        session = process.open(files["float"], setting("onnxruntime"))
        time.sleep(0.1)
        assert session.run(images).shape == (11, 10)


def test_a_system_without_anonymous_files_shares_a_temporary_one(
    monkeypatch: pytest.MonkeyPatch, files: Files, images: np.ndarray
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    with EngineProcess("onnxruntime") as process:
        expected = OnnxRuntime().open(files["float"], Setting(batch=4)).run(images)
        assert np.array_equal(process.open(files["float"], setting("onnxruntime")).run(images), expected)
        shared = Path(process._start()._shared.name)
        assert shared.exists()
    assert not shared.exists()


def test_the_process_imports_no_torch() -> None:
    heavy = ("torch", "onnx", "scipy", "PIL")
    program = f"import fewbit.engines.child, sys; print([m for m in {heavy} if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_an_engine_whose_package_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "fewbit.engines.onnxruntime", raising=False)
    reply, _ = Child("onnxruntime", mmap.mmap(-1, SLOTS * SLOT_BYTES)).answer({"do": "load"})
    assert reply["error"] == "EngineError"
    assert reply["text"].startswith("engine onnxruntime: cannot be imported (import of onnxruntime halted;")
    assert reply["text"].endswith("; install its package")


class Sleeper:
    """A session whose calls take 20 ms, whatever runs beside them."""

    def run(self, batch: np.ndarray) -> np.ndarray:
        time.sleep(0.02)
        if batch[0, 0] < 0:
            raise EngineError("negative")
        return batch


@pytest.mark.parametrize("streams", [1, 3])
def test_streams_are_timed_side_by_side(streams: int) -> None:
    block = time_calls(Sleeper(), np.ones((5, 2), np.float32), streams, seconds=0.3)
    calls = len(block.latencies_ms)
    assert 0.3 <= block.seconds < 0.6
    assert 0.5 * streams * 15 <= calls <= streams * 16
    assert block.images == 5 * calls
    assert min(block.latencies_ms) >= 20
    assert len(time_calls(Sleeper(), np.ones((5, 2), np.float32), streams, seconds=0).latencies_ms) == streams


def test_an_error_in_any_stream_is_raised() -> None:
    with pytest.raises(EngineError, match="negative"):
        time_calls(Sleeper(), -np.ones((1, 1), np.float32), 2, seconds=0.1)


def test_sessions_are_what_interleaved_measuring_takes(process: EngineProcess, files: Files) -> None:
    sessions = [process.open(files["int8"], setting("onnxruntime", batch=batch)) for batch in (1, 16)]
    single, sixteen = measure_interleaved(sessions, rounds=6, block_s=0.02, min_calls=2, against="batch 1")
    assert sixteen.ms_per_batch_p50 > single.ms_per_batch_p50
    assert sixteen.ratio is not None and sixteen.ratio_interval is not None
    assert sixteen.ratio_interval.low <= sixteen.ratio <= sixteen.ratio_interval.high
    assert (single.setting.batch, sixteen.setting.batch, sixteen.against, sixteen.rounds) == (
        1,
        16,
        "batch 1",
        6,
    )


@pytest.mark.parametrize("doing", ["time_block", "profile"])
def test_nothing_of_ours_works_while_an_engine_is_timed(
    process: EngineProcess, files: Files, monkeypatch: pytest.MonkeyPatch, doing: str
) -> None:
    session = process.open(files["float"], setting("onnxruntime"))
    seen, events = list[int](), list[str]()
    original = session._child.ask

    def slow(*arguments: Any) -> Any:
        job.append(pool.submit(work))
        seen.append(busy())
        time.sleep(0.2)  # the job has every chance to begin
        reply = original(*arguments)
        events.append("timed")
        return reply

    def work() -> None:
        with working():
            events.append("worked")

    job: list[Future[None]] = []
    monkeypatch.setattr(session._child, "ask", slow)
    with ThreadPoolExecutor(1) as pool:
        session.time_block(0.01) if doing == "time_block" else session.profile(2)
        job[0].result()
    assert seen == [0] and events == ["timed", "worked"]


def test_the_seconds_of_engines_outlive_their_processes(files: Files) -> None:
    before = engines_cpu_s()
    with EngineProcess("onnxruntime") as process:
        process.open(files["float"], setting("onnxruntime")).time_block(0.1)
        alive = engines_cpu_s()
    assert before < alive <= engines_cpu_s() + 0.02  # a living process is read in hundredths
