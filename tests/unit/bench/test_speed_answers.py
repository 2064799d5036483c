from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import speed_answers
from fewbit.load.capture import capture
from fewbit.measure.host import describe_host
from networks import WHOLE_RANGE, make_images, make_net
from speed_answers import Candidate, candidates
from speed_networks import Network
from speed_peers import PeerFiles


def network(ranged: bool = True) -> Network:
    net = make_net("residual", image_range=WHOLE_RANGE if ranged else None)
    return Network("residual", "residual", net, make_images(8).numpy())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches for which a mix was measured; one that leaves the classifier in float is the fastest."""
    batches: list[int] = []

    def measure(network: Network, setting: speed_answers.Setting, seed: int) -> tuple[str, ...]:
        batches.append(setting.batch)
        return ("fc",) if setting.batch == 8 else ()

    monkeypatch.setattr(speed_answers, "measure_mix", measure)
    return batches


def settings(found: list[tuple[Candidate, tuple[Candidate, ...]]]) -> dict[str, list[tuple[int, int]]]:
    return {
        f"{first.name} {first.setting.engine} {first.setting.float_precision}": [
            (one.setting.batch, one.setting.streams) for one in (first, *further)
        ]
        for first, further in found
    }


def test_every_kind_of_file_is_made_once_with_its_ways(tmp_path: Path, asked: list[int]) -> None:
    found = settings(candidates(network(), tmp_path, 32, 2, 0))
    wide = "bf16" if describe_host().bf16 else "float32"
    names = {"float32 onnxruntime float32", "int8 onnxruntime float32", "int8 of pixels onnxruntime float32"}
    names |= {"float32 openvino float32", f"float32 openvino {wide}", f"float32 of pixels openvino {wide}"}
    names |= {"int8 openvino float32"}
    names |= {f"{name}{of} openvino {wide}" for name in ("int8", "mixed") for of in ("", " of pixels")}
    assert set(found) == names
    assert set(map(tuple, found.values())) == {((8, 2), (1, 2), (2, 2), (4, 2), (32, 2), (8, 1), (32, 1))}
    assert asked == [8]
    made = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    candidates(network(), tmp_path, 8, 1, 0)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == made and asked == [8]


def test_where_integers_are_the_fastest_there_is_no_mix(tmp_path: Path, asked: list[int]) -> None:
    found = settings(candidates(network(ranged=False), tmp_path, 1, 1, 0))
    assert not [name for name in found if name.startswith("mixed") or "pixels" in name]
    assert set(map(tuple, found.values())) == {((1, 1),)} and asked == [1]
    candidates(network(ranged=False), tmp_path, 1, 2, 0)
    assert asked == [1]  # that there is none is kept too


def test_peers_get_a_response_norm_as_it_was_captured(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = capture(model.eval(), "normed", (3, 16, 16))
    given = Network("normed", "normed", net, torch.rand(8, 3, 16, 16).numpy())
    files = PeerFiles(given, tmp_path, sys.executable, 1, 0)
    own = speed_answers.make_file(given, speed_answers.Kind("int8", "onnxruntime"), tmp_path, 0)
    kinds = [[node.op_type for node in onnx.load(path).graph.node] for path in (files.float32(), own)]
    assert kinds[0].count("LRN") == 1 and "LRN" not in kinds[1]
