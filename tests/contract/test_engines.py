"""What holds for every engine of the registry; a new row is tested by being there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fewbit.engines.session import Session, Setting
from fewbit.errors import EngineError
from fewbit.export.onnx_out import export_onnx
from fewbit.place.targets import TARGETS, target
from fewbit.registry import ROWS, find
from networks import CLASSES, NETWORKS, make_images, quantize

ENGINES = tuple(ROWS["engines"])
RECIPES = ("float32", "int8", "int8-dynamic", "int8-weights-only")
Floats = NDArray[np.float32]


def setting(engine: str, **more: int) -> Setting:
    return Setting.from_data({"engine": engine, **more})


def opened(engine: str, path: Path, **more: int) -> Session:
    session: Session = find("engines", engine)().open(path, setting(engine, **more))
    return session


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Path]:
    """Every network by every recipe for every target: (engine, recipe, network) -> file."""
    folder, made = tmp_path_factory.mktemp("files"), {}
    for engine in TARGETS:
        for recipe in RECIPES:
            for name in NETWORKS:
                path = folder / f"{engine}-{recipe}-{name}.onnx"
                export_onnx(quantize(name, recipe, engine), path, target(engine))
                made[engine, recipe, name] = path
    return made


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def of(files: dict[tuple[str, str, str], Path], engine: str, recipe: str, name: str) -> Path:
    """Return the file for an engine; the reference reads those of any."""
    return files[engine if engine in TARGETS else "onnxruntime", recipe, name]


def images(count: int) -> Floats:
    found: Floats = make_images(count, seed=3).numpy()
    return found


def step_of(logits: Floats) -> float:
    """Return one step of the 8-bit grid over these logits."""
    return float(np.ptp(logits)) / 255


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_are_the_references_within_one_step(files: Any, engine: str, recipe: str, name: str) -> None:
    path = of(files, engine, recipe, name)
    found = opened(engine, path, batch=4).run(images(8))
    expected = opened("reference", path, batch=4).run(images(8))
    assert found.dtype == np.float32 and found.shape == (8, CLASSES)
    assert np.abs(found - expected).max() <= step_of(expected)
    assert (np.abs(found - expected) <= 0.02 * step_of(expected)).mean() > 0.9 or recipe == "int8"


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_number_of_images_goes_through_any_batch(files: Any, engine: str, recipe: str) -> None:
    path = of(files, engine, recipe, "branches")
    whole = opened(engine, path, batch=7).run(images(7))
    for batch in (1, 2, 3):
        session = opened(engine, path, batch=batch)
        for count in (1, 2, 7):
            found = session.run(images(7)[:count])
            assert found.shape == (count, CLASSES)
            assert np.abs(found - whole[:count]).max() <= 0.02 * step_of(whole)


@pytest.mark.parametrize("name", ["gated", "depthwise"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_images_result_does_not_depend_on_its_neighbours(
    files: Any, engine: str, recipe: str, name: str
) -> None:
    session = opened(engine, of(files, engine, recipe, name), batch=4)
    quiet = images(4)
    loud = quiet.copy()
    loud[1:] *= 100
    beside_quiet, beside_loud = session.run(quiet)[0], session.run(loud)[0]
    alone = session.run(quiet[:1])[0]
    scale = max(step_of(alone), 1e-6)
    assert np.abs(beside_loud - beside_quiet).max() <= 0.02 * scale
    assert np.abs(alone - beside_quiet).max() <= 0.02 * scale


def test_threads_and_streams_change_nothing_but_the_speed(files: Any, engine: str) -> None:
    path = of(files, engine, "int8", "residual")
    plain = opened(engine, path, batch=2).run(images(6))
    wide = opened(engine, path, batch=2, threads=2, streams=2).run(images(6))
    assert np.abs(wide - plain).max() <= 0.02 * step_of(plain)


def test_the_same_run_gives_the_same_bits(files: Any, engine: str) -> None:
    session = opened(engine, of(files, engine, "int8", "gated"), batch=4)
    np.testing.assert_array_equal(session.run(images(4)), session.run(images(4)))


@pytest.mark.parametrize("name", NETWORKS)
def test_placement_tells_every_matrix_product(files: Any, engine: str, name: str) -> None:
    matrices = {"residual": 4, "depthwise": 4, "branches": 5, "gated": 5}[name]
    quantized = opened(engine, of(files, engine, "int8", name)).placement()
    assert quantized.engine == engine and quantized.float_matrix_operators() == ()
    assert sum(operator.matrix for operator in quantized.operators) == matrices
    plain = opened(engine, of(files, engine, "float32", name)).placement()
    assert plain.integer_operators == 0 and len(plain.float_matrix_operators()) == matrices


def test_the_images_given_are_not_touched(files: Any, engine: str) -> None:
    given = images(3)
    before = given.copy()
    opened(engine, of(files, engine, "int8", "residual"), batch=2).run(given)
    np.testing.assert_array_equal(given, before)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "missing"])
def test_a_file_that_cannot_be_opened_is_told_in_one_line(
    files: Any, engine: str, damage: str, tmp_path: Path
) -> None:
    data = of(files, engine, "int8", "residual").read_bytes()
    path = tmp_path / "broken.onnx"
    content = {"empty": b"", "cut": data[: len(data) // 2], "text": b"no network"}
    if damage != "missing":
        path.write_bytes(content[damage])
    with pytest.raises(EngineError, match=r"broken\.onnx") as caught:
        opened(engine, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 3, 8, 16), (2, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_size_are_told_in_one_line(files: Any, engine: str, shape: tuple[int, ...]) -> None:
    session = opened(engine, of(files, engine, "int8", "residual"))
    with pytest.raises(EngineError) as caught:
        session.run(np.zeros(shape, np.float32))
    assert "\n" not in str(caught.value)


def test_it_says_what_it_is(engine: str) -> None:
    text = (find("engines", engine).__doc__ or "").strip()
    assert text.splitlines()[0].endswith(".")
