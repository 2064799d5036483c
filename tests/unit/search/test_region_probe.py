from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fewbit.engines.process import EngineProcess, RemoteSession
from fewbit.engines.profile import OperatorTime
from fewbit.engines.session import EngineName, Setting
from fewbit.errors import EngineError
from fewbit.load.capture import capture
from fewbit.search.region_probe import RegionProbe
from networks import make_net

ENGINES: tuple[EngineName, ...] = ("onnxruntime", "openvino")


def probe(name: str, engine: EngineName, folder: Path) -> RegionProbe:
    return RegionProbe(make_net(name), Setting(engine=engine, batch=2), folder)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["residual", "depthwise", "branches", "gated"])
def test_what_is_asked_to_be_in_float_is(name: str, engine: EngineName, tmp_path: Path) -> None:
    made = probe(name, engine, tmp_path)
    matrices = {layer.name for layer in made.folded.layers() if layer.kind in ("Conv", "Linear")}
    rng = np.random.default_rng(0)
    chosen = [np.zeros(len(made.regions), bool), np.ones(len(made.regions), bool)]
    chosen += [rng.random(len(made.regions)) < 0.5 for _ in range(3)]
    with EngineProcess(engine) as process:
        for in_float in chosen:
            placement = process.open(made.file(in_float), made.setting).placement()
            ran = {name: o.precision == "int8" for o in placement.operators if o.matrix for name in o.layers}
            for region, left in zip(made.regions, in_float, strict=True):
                found = {ran[layer] for layer in region.layers if layer in matrices}
                assert found == {not left}, region.name


def test_every_edge_between_regions_is_a_boundary(tmp_path: Path) -> None:
    made = probe("residual", "openvino", tmp_path)
    names = [region.name for region in made.regions]
    assert names == ["stem", "conv1", "conv2", "fc"]
    assert made.boundaries == ((0, 1), (0, 2), (1, 2), (2, 3))


class Forks(nn.Module):
    """Three convolutions that read one tensor, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.forks = nn.ModuleList([nn.Conv2d(8, 8, size, padding=size // 2) for size in (1, 3, 5)])
        self.fc = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.stem(x).relu()
        joined = torch.cat([fork(made).relu() for fork in self.forks], 1)
        scores: Tensor = self.fc(joined.mean((2, 3)))
        return scores


def test_readers_of_one_tensor_are_neighbours_too(tmp_path: Path) -> None:
    net = capture(Forks().eval(), "forks", (3, 8, 8))
    made = RegionProbe(net, Setting(engine="openvino", batch=2), tmp_path)
    assert [region.name for region in made.regions] == ["stem", "forks.0", "forks.1", "forks.2", "fc"]
    edges = ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3), (3, 4))
    assert made.boundaries == (*edges, (1, 2))  # the last convolution's region joins them
    costs = dict(zip(made.boundaries, made.guess().boundary_ms, strict=True))
    assert costs[1, 2] == 0 and all(costs[pair] > 0 for pair in edges)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_guess_has_all_regions(engine: EngineName, tmp_path: Path) -> None:
    made = probe("residual", engine, tmp_path)
    guess = made.guess()
    assert guess.regions == tuple(region.name for region in made.regions)
    assert guess.base_ms > 0 and all(ms > 0 for ms in guess.boundary_ms)
    assert guess.setting == made.setting and guess.engine_version


def test_more_assignments_than_take_turns_at_once(tmp_path: Path) -> None:
    made, told = probe("residual", "openvino", tmp_path), list[float]()
    drawn = made.draw(9, 0)
    drawn[2] = False  # all in integers, as what all others take turns with
    times = made.time(drawn, 5.0, told.append)
    assert times.shape == (9,) and (times > 0).all() and told[-1] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["residual-0.onnx"]


@pytest.mark.parametrize("engine", ENGINES)
def test_times_of_regions_add_up_to_that_of_the_mix(engine: EngineName, tmp_path: Path) -> None:
    made, told = probe("residual", engine, tmp_path), list[float]()
    drawn = made.draw(7, 0)
    ms, region_ms = made.measure(drawn, 5.0, told.append)
    assert ms.shape == (7,) and region_ms.shape == (7, len(made.regions)) and told[-1] == 1.0
    assert np.allclose(region_ms.sum(1), ms)
    assert (region_ms >= 0).all() and (region_ms[:, :3] > 0).all()
    assert [path.name for path in tmp_path.iterdir()] == ["residual-0.onnx"]


@pytest.mark.parametrize("profile", ["raises", "tells nothing"])
def test_a_profiler_that_fails_leaves_no_file(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def profiled(self: RemoteSession, calls: int) -> tuple[OperatorTime, ...]:
        if profile == "raises":
            raise EngineError("no profiler here")
        return ()

    made = probe("residual", "openvino", tmp_path)
    monkeypatch.setattr(RemoteSession, "profile", profiled)
    told = "no profiler here" if profile == "raises" else "residual on openvino: the profiler saw no operator"
    with pytest.raises(EngineError, match=told):
        made.measure(made.draw(3, 0), 5.0)
    assert [path.name for path in tmp_path.iterdir()] == ["residual-0.onnx"]


def test_all_assignments_are_timed_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, started, opened = probe("residual", "openvino", tmp_path), list[int | None](), list[str]()
    original = EngineProcess.open

    def counted(self: EngineProcess, path: Path, setting: Setting) -> RemoteSession:
        session = original(self, path, setting)
        started.append(self.pid)
        opened.append(path.name)
        return session

    monkeypatch.setattr(EngineProcess, "open", counted)
    drawn = made.draw(8, 1)
    made.time(drawn, 5.0)
    assert len(set(started)) == 1
    assert opened.count("residual-0.onnx") == 1 + int((~drawn.any(1)).sum())


def test_chunks_follow_from_those_before_in_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, opened, seen = probe("residual", "openvino", tmp_path), list[str](), list[int]()
    original = EngineProcess.open

    def counted(self: EngineProcess, path: Path, setting: Setting) -> RemoteSession:
        opened.append(path.name)
        return original(self, path, setting)

    def chunks() -> Iterator[NDArray[np.bool_]]:
        for place in range(3):
            assert len(seen) == place, "a chunk is asked for when those before it are there"
            yield np.eye(4, dtype=bool)[place : place + 1]

    monkeypatch.setattr(EngineProcess, "open", counted)
    for ms, region_ms in made.measure_each(chunks(), 5.0):
        seen.append(len(ms))
        assert np.allclose(region_ms.sum(1), ms) and region_ms.shape == (len(ms), 4)
    assert seen == [1, 2, 3] and opened.count("residual-0.onnx") == 1 and len(opened) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["residual-0.onnx"]


def test_no_mix_cannot_be_measured(tmp_path: Path) -> None:
    made = probe("residual", "openvino", tmp_path)
    with pytest.raises(EngineError, match="residual on openvino: no mix to measure; give one or more"):
        made.measure(np.zeros((0, 4), bool), 5.0)


def test_the_same_seed_draws_the_same(tmp_path: Path) -> None:
    made = probe("residual", "openvino", tmp_path)
    assert np.array_equal(made.draw(20, 3), made.draw(20, 3))
    assert not np.array_equal(made.draw(20, 3), made.draw(20, 4))
    shares = made.draw(400, 0).mean(1)
    assert shares.min() < 0.1 and shares.max() > 0.9


def test_a_layer_of_several_operators_costs_what_they_all_do(tmp_path: Path) -> None:
    norm = nn.LocalResponseNorm(5)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    setting = Setting(engine="onnxruntime", batch=2)
    made = RegionProbe(capture(model.eval(), "normed", (3, 12, 12)), setting, tmp_path)
    (place,) = (at for at, region in enumerate(made.regions) if "1" in region.layers)
    with EngineProcess("onnxruntime") as process:
        operators = process.open(made.file(np.zeros(len(made.regions), bool)), setting).profile(2)
    parts = [o for o in operators if any(name == "1" or name.startswith("1.") for name in o.layers)]
    assert len(parts) >= 5 and any("1.sums" in o.layers for o in parts)
    ms, counts = made._by_region(operators)
    assert ms[place] >= sum(o.ms for o in parts) and counts[place] >= len(parts)
    assert ms.sum() == pytest.approx(sum(o.ms for o in operators))
