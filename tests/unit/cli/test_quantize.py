"""`fewbit quantize`: its files, its words, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch

from command import Fewbit, Said
from fewbit.errors import RecipeError
from fewbit.improve import qdrop
from fewbit.improve.descend import Descent
from fewbit.improve.reconstruct import Problem
from fewbit.recipe import Recipe, read_recipe
from fewbit.spec import Rule, Scheme


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_quantize_twice_gives_the_same_bytes(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    common = ("quantize", job / "tiny.toml", "--data", job / "images", "--recipe", "int8-mse", "--json")
    for name in ("a", "b"):
        said = fewbit(*common, "--out", tmp_path / f"{name}.onnx")
        assert (said.code, said.err) == (0, "")
    assert digest(tmp_path / "a.onnx") == digest(tmp_path / "b.onnx")
    other = fewbit(*common, "--out", tmp_path / "c.onnx", "--seed", 1, "--calibration-images", 20)
    assert other.code == 0 and digest(tmp_path / "c.onnx") != digest(tmp_path / "a.onnx")


def test_quantize_says_what_each_step_did(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "net.onnx"
    said = fewbit("quantize", job / "tiny.toml", "--data", job / "images", "--out", out)
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines[:-2]] == ["canonical", "fold_bn", "place", "calibrate"]
    assert lines[-2] == "calibrated on 150 images; evaluate it on others"
    assert lines[-1] == f"{out}: {out.stat().st_size:,} bytes, for onnxruntime"
    onnx.checker.check_model(onnx.load(out), full_check=True)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_quantize_as_json(fewbit: Fewbit, job: Path, tmp_path: Path, engine: str) -> None:
    out = tmp_path / "net.onnx"
    said = fewbit(
        *("quantize", job / "tiny.toml", "--data", job / "images", "--out", out, "--engine", engine),
        *("--calibration-images", 30, "--json"),
    )
    answer = said.answer
    assert (answer["network"], answer["recipe"]) == ("tiny", "int8")
    assert answer["digest"] == read_recipe("int8").digest()
    assert (answer["calibration_images"], answer["bytes"]) == (30, out.stat().st_size)
    facts = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert facts["fewbit.engine"] == engine
    assert Recipe.from_toml(facts["fewbit.recipe"]) == read_recipe("int8")


def test_quantize_takes_the_cards_facts_as_options(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    facts = ("--classes", 6, "--size", "3,16,16", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")
    source = f"{job / 'tiny.py'}:tiny"
    weights = ("--weights", job / "tiny.safetensors", "--name", "tiny")
    fewbit("quantize", source, *facts, *weights, "--data", job / "images", "--out", tmp_path / "a.onnx")
    fewbit("quantize", job / "tiny.toml", "--data", job / "images", "--out", tmp_path / "b.onnx")
    assert digest(tmp_path / "a.onnx") == digest(tmp_path / "b.onnx")


def test_quantize_refuses_facts_beside_a_card(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    said = fewbit(
        *("quantize", job / "tiny.toml", "--data", job / "images", "--out", tmp_path / "a.onnx"),
        *("--classes", 6),
    )
    assert said.code == 2 and said.line.endswith(
        "tiny.toml: is a card, so --classes has no place beside it; write the fact into the card"
    )


def test_quantize_by_a_recipe_of_ones_own(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    scheme = Scheme(rules=(Rule(match="first", keep_float=True),))
    own.write_text(read_recipe("int8").model_copy(update={"name": "own", "scheme": scheme}).to_toml())
    said = fewbit(
        *("quantize", job / "tiny.toml", "--data", job / "images", "--out", tmp_path / "a.onnx"),
        *("--recipe", own, "--json"),
    )
    assert said.answer["recipe"] == "own"
    assert "left in float: 0" in said.answer["steps"][2]["notes"]


def test_quantize_with_no_image_to_calibrate_is_told(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    said = fewbit(
        *("quantize", job / "tiny.toml", "--data", job / "images", "--out", tmp_path / "a.onnx"),
        *("--calibration-images", 0),
    )
    assert (said.code, said.line) == (2, "fewbit: --calibration-images is 0; give 1 or more")
    assert list(tmp_path.iterdir()) == []


def test_quantize_without_images_by_a_recipe_that_needs_none(
    fewbit: Fewbit, job: Path, tmp_path: Path
) -> None:
    card, out = job / "tiny.toml", tmp_path / "net.onnx"
    said = fewbit("quantize", card, "--recipe", "int8-dfq", "--out", out)
    assert (said.code, said.err) == (0, "")
    assert "calibrated on" not in said.out and said.out.splitlines()[-1].endswith("bytes, for onnxruntime")
    facts = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert json.loads(facts["fewbit.card"])["calibration_images"] == []
    given = ("--data", tmp_path / "none", "--json")
    again = fewbit("quantize", card, "--recipe", "int8-dfq", "--out", tmp_path / "b.onnx", *given)
    assert again.answer["calibration_images"] == 0
    assert digest(tmp_path / "b.onnx") == digest(out)


def test_quantize_without_images_by_a_recipe_that_needs_some_is_told(
    fewbit: Fewbit, job: Path, tmp_path: Path
) -> None:
    said = fewbit("quantize", job / "tiny.toml", "--out", tmp_path / "a.onnx")
    assert said.code == 2 and said.line == (
        "fewbit quantize: Missing option '--data'. Recipe 'int8' calibrates on images; "
        "one that needs none is 'int8-dfq' (see fewbit quantize --help)"
    )
    other = fewbit(
        "quantize", job / "tiny.toml", "--calibration", job / "images", "--out", tmp_path / "a.onnx"
    )
    assert other.code == 0 and "calibrated on 150 images" in other.out


def _told(said: Said) -> list[str]:
    """Return the lines on stderr but those of progress, which a slow machine has more of."""
    return [line for line in said.err.splitlines() if line and not line.startswith("[")]


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LEARNED = """name = "learned"
[scheme.weights]
bits = 3
symmetric = true
signed = true
granularity = "channel"
[[steps]]
use = "canonical"
[[steps]]
use = "fold_bn"
[[steps]]
use = "place"
[[steps]]
use = "calibrate"
[[steps]]
use = "qdrop"
iterations = 4
group = 1
"""


@pytest.mark.usefixtures("one_thread")
def test_a_quantization_that_was_stopped_goes_on_where_it_was(
    fewbit: Fewbit, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out, calm = tmp_path / "learned.toml", tmp_path / "net.onnx", tmp_path / "calm.onnx"
    recipe.write_text(LEARNED)
    common = ("quantize", job / "tiny.toml", "--data", job / "images", "--recipe", recipe)
    assert _told(fewbit(*common, "--out", calm)) == []

    learn = qdrop.descend

    def stop(problem: Problem, how: Descent) -> str:
        if problem.unit.name == "5":
            raise KeyboardInterrupt
        return learn(problem, how)

    with monkeypatch.context() as patch:
        patch.setattr(qdrop, "descend", stop)
        said = fewbit(*common, "--out", out)
    assert said.code == 130 and _told(said) == [
        "stopped; no file was written; the layers that were learned are kept: the same command goes on"
    ]
    partial = tmp_path / "net.onnx.partial"
    assert not out.exists() and len([path for path in partial.rglob("*") if path.is_file()]) == 2

    said = fewbit(*common, "--out", out)
    assert _told(said) == [f"{partial}: a run was stopped; what it had done is taken up where it fits"]
    assert "2 of 4 units had been done when a run was stopped" in said.out
    assert digest(out) == digest(calm)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm.onnx", "learned.toml", "net.onnx"]


def test_a_quantization_that_fails_before_anything_is_learned_leaves_nothing(
    fewbit: Fewbit, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(problem: Problem, how: Descent) -> str:
        raise RecipeError("odd")

    recipe = tmp_path / "learned.toml"
    recipe.write_text(LEARNED)
    monkeypatch.setattr(qdrop, "descend", fail)
    common = ("quantize", job / "tiny.toml", "--data", job / "images", "--recipe", recipe)
    said = fewbit(*common, "--out", tmp_path / "net.onnx")
    assert (said.code, _told(said)) == (2, ["fewbit: odd"])
    assert [path.name for path in tmp_path.iterdir()] == ["learned.toml"]
