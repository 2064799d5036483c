from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from fewbit.engines.session import Setting
from fewbit.errors import EngineCrashed, EngineError
from fewbit.export.onnx_out import export_onnx
from networks import make_images, make_net
from speed_child import COMPILERS
from speed_networks import Network
from speed_peers import PeerFiles, peer_entrants
from speed_process import EngineTimed, PeerTimed
from tiny_card import CARD, MODEL

JOB = {"tool": "openvino", "batch": 2, "threads": 2, "size": [3, 16, 16]}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files") / "net.onnx"
    export_onnx(make_net("residual"), made)
    return made


@pytest.mark.parametrize(
    ("way", "streams"),
    [({"hint": "LATENCY"}, {1}), ({"hint": "THROUGHPUT"}, {1, 2}), ({"hint": "", "streams": 2}, {2})],
)
def test_openvino_runs_as_its_users_run_it(path: Path, way: dict[str, object], streams: set[int]) -> None:
    peer = PeerTimed("peer", JOB | way | {"path": str(path)})
    try:
        assert (peer.setting.batch, peer.setting.threads) == (2, 2) and peer.setting.streams in streams
        block = peer.time_block(0.02)
        assert block.images == 2 * len(block.latencies_ms) and block.seconds >= 0.02
        assert len(peer.time_block(0.0).latencies_ms) == peer.setting.streams
    finally:
        peer.close()
    peer.close()


def test_a_peer_that_crashes_is_told_with_its_signal(path: Path) -> None:
    peer = PeerTimed("nncf int8", JOB | {"hint": "LATENCY", "path": str(path)})
    os.kill(peer._child.pid, signal.SIGSEGV)
    with pytest.raises(EngineCrashed, match=r"^nncf int8: crashed while timing it \(SIGSEGV"):
        peer.time_block(1.0)
    with pytest.raises(EngineCrashed, match=r"^nncf int8: its process is gone$"):
        peer.time_block(0.0)
    peer.close()


def test_what_a_peer_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^nncf int8: RuntimeError: .*Could not open the file"):
        PeerTimed("nncf int8", JOB | {"hint": "LATENCY", "path": str(tmp_path / "none.xml")})


def test_torch_without_a_compiler_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    message = r"^torch.compile: RuntimeError: torch.compile needs a C\+\+ compiler, .*; install g\+\+$"
    with pytest.raises(EngineError, match=message):
        PeerTimed("torch.compile", JOB | {"tool": "torch", "source": "x", "seed": 0, "precision": "bf16"})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_torch_compiles_and_runs(tmp_path: Path, precision: str) -> None:
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("needs a C++ compiler")
    (tmp_path / "tiny.py").write_text(MODEL, encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(CARD, encoding="utf-8")
    job = {"tool": "torch", "source": str(tmp_path / "tiny.toml"), "seed": 0, "precision": precision}
    peer = PeerTimed("torch.compile", JOB | job)
    try:
        assert peer.setting.streams == 1
        assert peer.time_block(0.0).images == 2
    finally:
        peer.close()


def test_a_file_that_an_engine_refuses_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^none.onnx: onnxruntime refuses it"):
        EngineTimed(tmp_path / "none.onnx", Setting())


def files(tmp_path: Path, python: str = sys.executable) -> PeerFiles:
    net = make_net("residual")
    return PeerFiles(Network("residual", "residual", net, make_images(8).numpy()), tmp_path, python, 1, 0)


def test_every_peer_enters_in_every_setting(tmp_path: Path) -> None:
    two = {(e.name, e.how): e for e in peer_entrants(files(tmp_path), 8, 2)}
    streams = {"1 stream", "2 streams"}
    for name in ("onnxruntime float32", "onnxruntime int8", "openvino float32", "openvino bf16"):
        assert {(name, how) for how in streams} <= two.keys()
    hints = {"latency hint", "throughput hint"}
    assert {how for name, how in two if name == "nncf int8"} == hints | streams
    assert {how for name, how in two if name == "openvino as it comes"} == hints
    assert {how for name, how in two if name.startswith("torch.compile")} == {"2 threads"}
    assert not any(e.own for e in two.values())
    one = [(e.name, e.how) for e in peer_entrants(files(tmp_path), 8, 1)]
    assert len(one) == len(set(one)) == 11 and ("torch.compile bf16", "1 thread") in one


def test_onnxruntimes_own_int8_is_made_once_and_runs(tmp_path: Path) -> None:
    made = files(tmp_path)
    path = made.onnxruntime()
    stamp = path.stat().st_mtime_ns
    assert made.onnxruntime() == path and path.stat().st_mtime_ns == stamp
    timed = EngineTimed(path, Setting(batch=2))
    try:
        kinds = [o.kind for o in timed.session.placement().operators if o.matrix]
        assert set(kinds) == {"QLinearConv", "QGemm"}
        assert timed.time_block(0.0).images == 2
    finally:
        timed.close()


def test_a_python_without_nncf_is_told_each_time(tmp_path: Path) -> None:
    made = files(tmp_path, python="/bin/false")
    for _ in range(2):
        with pytest.raises(EngineError) as told:
            made.nncf()
        assert str(told.value) == (
            "residual: nncf:openvino made no file (/bin/false has no nncf; give one that has with --peers)"
        )
