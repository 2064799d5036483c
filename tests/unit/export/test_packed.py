"""What a file would take with its narrow weights packed, held against packing them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch import nn

from calibrated import matrices
from fewbit.export.onnx_out import export_onnx
from fewbit.export.packed import packed_bytes
from fewbit.load.capture import capture
from fewbit.place.targets import target
from fewbit.recipe import read_recipe, run_recipe
from networks import make_context, make_images, make_net, quantize

WIDTHS = {"stem": 8, "conv1": 3, "conv2": 2, "fc": 5}


@pytest.mark.parametrize("base", ["int8", "int8-weights-only"])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_it_is_the_file_with_each_code_at_its_width(base: str, engine: str, tmp_path: Path) -> None:
    net = quantize("residual", read_recipe(base).with_widths(WIDTHS), engine)
    path = tmp_path / "narrow.onnx"
    export_onnx(net, path, target(engine))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    saved = 0
    for layer, bits in WIDTHS.items():
        (codes,) = (a for n, a in stored.items() if n.startswith(layer) and a.dtype == np.int8 and a.ndim > 1)
        assert matrices(net)[layer].weight.numel() == codes.size
        assert np.abs(codes.astype(int)).max() == 2 ** (bits - 1) - 1
        bytes_each = codes.view(np.uint8).ravel()[:, None]
        packed = np.packbits(np.unpackbits(bytes_each, axis=1, bitorder="little")[:, :bits])
        saved += codes.nbytes - packed.nbytes
    assert packed_bytes(net, path.stat().st_size) == path.stat().st_size - saved


def test_weights_of_8_bits_and_of_none_are_packed_already() -> None:
    assert packed_bytes(make_net("residual"), 1000) == 0
    assert packed_bytes(quantize("residual", "int8"), 1000) == 0


def test_a_last_byte_that_is_not_full_counts_whole() -> None:
    net = capture(nn.Sequential(nn.Flatten(), nn.Linear(3, 5)), "fifteen", (3, 1, 1), 5)
    images = make_images(8)[:, :, :1, :1]
    narrow, _ = run_recipe(read_recipe("int8").with_widths({"1": 3}), net, make_context(images=images))
    assert packed_bytes(narrow, 1000) == 1000 - 15 + 6  # 45 bits
