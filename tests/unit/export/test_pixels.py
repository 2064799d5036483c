from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from fewbit.engines.onnxruntime import OnnxRuntime
from fewbit.engines.openvino import OpenVino
from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.errors import EngineError, RecipeError
from fewbit.export.onnx_out import export_onnx
from fewbit.net import Net
from fewbit.place.simulate import simulate
from fewbit.place.targets import target
from fewbit.recipe import read_recipe, run_recipe
from networks import SIZE, WHOLE_RANGE, make_context, make_net

OPENERS: dict[str, Any] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino, "reference": Reference}
ENGINES = ("onnxruntime", "openvino")
NAMES = ("residual", "depthwise", "branches")
COUNT = 6


def pixels(count: int = COUNT) -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, (count, *SIZE[1:], SIZE[0]), np.uint8)


def preprocessed(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return what a card of WHOLE_RANGE makes of pixels."""
    return np.ascontiguousarray((images.astype(np.float32) / 64 - 2).transpose(0, 3, 1, 2))


def made(name: str, engine: str, recipe: str = "int8") -> Net:
    net = make_net(name, image_range=WHOLE_RANGE)
    context = make_context(engine, torch.from_numpy(preprocessed(pixels(8))))
    return run_recipe(read_recipe(recipe).with_pixels(), net, context)[0]


def both_files(net: Net, engine: str, folder: Path) -> tuple[Path, Path]:
    """Return the file that takes float32 images and the one that takes pixels."""
    paths = folder / "float32.onnx", folder / "uint8.onnx"
    aim = target(engine) if "placed" in net.facts else None
    export_onnx(net, paths[0], aim)
    export_onnx(net, paths[1], aim, image="uint8")
    return paths


def logits(engine: str, path: Path, images: NDArray[Any], batch: int = 3) -> NDArray[np.float32]:
    found: NDArray[np.float32] = OPENERS[engine]().open(path, Setting(engine=engine, batch=batch)).run(images)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_pixels_give_bit_for_bit_what_preprocessed_images_give(
    name: str, engine: str, tmp_path: Path
) -> None:
    floats, whole = both_files(made(name, engine), engine, tmp_path)
    images = pixels()
    for runs_on in (engine, "reference"):
        expected = logits(runs_on, floats, preprocessed(images))
        assert np.array_equal(logits(runs_on, whole, images), expected)
        assert np.ptp(expected) > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_the_simulation_is_the_exported_file(name: str, engine: str, tmp_path: Path) -> None:
    net = made(name, engine)
    floats, whole = both_files(net, engine, tmp_path)
    images = preprocessed(pixels())
    expected = simulate(net, torch.from_numpy(images)).numpy()
    assert np.array_equal(logits("reference", floats, images), expected)
    assert np.array_equal(logits("reference", whole, pixels()), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_engines_stay_near_and_in_integers(name: str, engine: str, tmp_path: Path) -> None:
    net = made(name, engine)
    _, whole = both_files(net, engine, tmp_path)
    session = OPENERS[engine]().open(whole, Setting(engine=engine, batch=COUNT))
    assert session.takes == "uint8"
    assert session.placement().float_matrix_operators() == ()
    kinds = [operator.kind for operator in session.placement().operators]
    assert not {"Quantize", "QuantizeLinear", "Pad"} & set(kinds)  # nothing is rounded on the way in
    exact = logits("reference", whole, pixels())
    assert float(np.abs(session.run(pixels()) - exact).max()) < 0.05 * float(np.ptp(exact))


@pytest.mark.parametrize("name", NAMES)
def test_a_float_network_takes_pixels_too(name: str, tmp_path: Path) -> None:
    net = made(name, "openvino", "float32")
    floats, whole = both_files(net, "openvino", tmp_path)
    with torch.no_grad():
        expected = make_net(name)(torch.from_numpy(preprocessed(pixels()))).numpy()
    for engine in OPENERS:
        for path, images in ((floats, preprocessed(pixels())), (whole, pixels())):
            assert np.allclose(logits(engine, path, images), expected, rtol=1e-3, atol=1e-3)


def test_weights_only_and_dynamic_networks_take_pixels(tmp_path: Path) -> None:
    for recipe in ("int8-weights-only", "int8-dynamic"):
        floats, whole = both_files(made("residual", "onnxruntime", recipe), "onnxruntime", tmp_path)
        found = logits("onnxruntime", whole, pixels())
        assert np.allclose(found, logits("onnxruntime", floats, preprocessed(pixels())), rtol=1e-4, atol=1e-4)


def test_any_batch_goes_through(tmp_path: Path) -> None:
    for engine in ENGINES:
        _, whole = both_files(made("residual", engine), engine, tmp_path)
        expected = logits(engine, whole, pixels(), COUNT)
        for batch in (1, 4):
            assert np.array_equal(logits(engine, whole, pixels(), batch), expected)


def test_the_input_is_what_decoders_give(tmp_path: Path) -> None:
    _, whole = both_files(made("residual", "onnxruntime"), "onnxruntime", tmp_path)
    entry = onnx.load(whole).graph.input[0]
    assert entry.name == "input" and entry.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    sizes = [d.dim_value or d.dim_param for d in entry.type.tensor_type.shape.dim]
    assert sizes == ["N", 16, 16, 3]
    onnx.checker.check_model(onnx.load(whole), full_check=True)


def test_a_network_without_the_step_cannot_take_pixels(tmp_path: Path) -> None:
    net = run_recipe(read_recipe("int8"), make_net("residual"), make_context())[0]
    with pytest.raises(
        RecipeError,
        match="residual: takes preprocessed images; put the step 'fold_input' behind 'fold_bn' for a file "
        "that takes uint8 pixels",
    ):
        export_onnx(net, tmp_path / "net.onnx", image="uint8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", OPENERS)
def test_images_of_the_other_kind_are_refused(engine: str, tmp_path: Path) -> None:
    net = made("residual", "onnxruntime")
    floats, whole = both_files(net, "onnxruntime", tmp_path)
    with pytest.raises(
        EngineError, match=r"uint8\.onnx: takes uint8 pixels \(N, H, W, C\), not float32 \(2, 16, 16, 3\)"
    ):
        logits(engine, whole, pixels(2).astype(np.float32))
    with pytest.raises(
        EngineError,
        match=r"float32\.onnx: takes preprocessed float32 images \(N, C, H, W\), not uint8 \(2, 3, 16, 16\); "
        "preprocess them as its card says, or make the file with --input uint8",
    ):
        logits(engine, floats, pixels(2).transpose(0, 3, 1, 2))
