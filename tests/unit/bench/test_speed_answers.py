from __future__ import annotations

from pathlib import Path

import pytest

import speed_answers
from fewbit.measure.host import describe_host
from networks import WHOLE_RANGE, make_images, make_net
from speed_answers import Candidate, candidates
from speed_networks import Network


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
