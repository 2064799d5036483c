"""Files that take pixels, on real networks: the same logits, and no accuracy lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fewbit.data.image_set import ImageSet
from fewbit.engines.process import EngineProcess
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.measure.accuracy import Predictions, compare
from fewbit.net import Net
from fewbit.place.targets import target
from fewbit.recipe import image_context, read_recipe, run_recipe
from real_names import ENGINES

pytestmark = pytest.mark.needs_shared
COUNTS = {"resnet20": 1000, "mobilenet_v1_025": 100, "squeezenet_v11": 60, "googlenet": 40}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", COUNTS)
def test_pixels_give_the_logits_of_preprocessed_images(
    name: str,
    engine: str,
    net_of: Callable[[str], Net],
    images_of: Callable[[str, int], ImageSet],
    tmp_path: Path,
) -> None:
    calibrating, images = images_of(name, 32), images_of(name, COUNTS[name])
    recipe = read_recipe("int8").with_pixels()
    net, _ = run_recipe(recipe, net_of(name), image_context(calibrating, engine))
    plain, _ = run_recipe(read_recipe("int8"), net_of(name), image_context(calibrating, engine))
    paths = [tmp_path / f"{kind}.onnx" for kind in ("floats", "pixels", "plain")]
    export_onnx(net, paths[0], target(engine))
    export_onnx(net, paths[1], target(engine), image="uint8")
    export_onnx(plain, paths[2], target(engine))
    setting = Setting(engine=engine, batch=20)
    with EngineProcess(engine) as process:
        floats, pixels, before = (process.open(path, setting) for path in paths)
        assert pixels.placement().float_matrix_operators() == ()
        logits = floats.logits(images.batches(20))
        assert np.array_equal(pixels.logits(images.pixels(20)), logits)
        found, other = (
            Predictions.from_logits(values, images.targets)
            for values in (logits, before.logits(images.batches(20)))
        )
    versus = compare(other, found)
    assert versus.interval().low <= 0.0, "no worse than with the image rounded to a grid of its own"
    assert versus.flips <= 0.15
