"""The snippets of docs/serving.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewbit.engines.onnxruntime import OnnxRuntime
from fewbit.engines.openvino import OpenVino
from fewbit.engines.session import Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.place.targets import target
from fewbit.recipe import read_recipe, run_recipe
from networks import SIZE, WHOLE_RANGE, make_context, make_net

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
ENGINES: dict[str, Any] = {"OpenVINO": OpenVino, "ONNX Runtime": OnnxRuntime}


@pytest.mark.parametrize("heading", ENGINES)
def test_a_snippet_gives_the_classes(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = heading.lower().replace(" ", "")
    float_net = make_net("residual", image_range=WHOLE_RANGE)
    classifier = float_net.graph.get_submodule("fc")
    torch.nn.init.orthogonal_(classifier.weight)  # so that not all images are of one class
    torch.nn.init.zeros_(classifier.bias)
    net, _ = run_recipe(read_recipe("int8").with_pixels(), float_net, make_context(engine))
    export_onnx(net, tmp_path / "model.onnx", target(engine), image="uint8")
    colours = np.random.default_rng(1).integers(0, 256, (19, 1, 1, SIZE[0]))
    images = np.broadcast_to(colours, (19, *SIZE[1:], SIZE[0])).astype(np.uint8)
    paths = [tmp_path / f"{place}.png" for place in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    session = ENGINES[heading]().open(tmp_path / "model.onnx", Setting(engine=engine, batch=8))  # type: ignore[arg-type]
    expected = session.run(images).argmax(1)
    assert names["classes"](paths).tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 1
