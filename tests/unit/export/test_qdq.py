from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.engines.onnxruntime import OnnxRuntime
from fewbit.engines.openvino import OpenVino
from fewbit.engines.reference import Reference
from fewbit.engines.session import Setting
from fewbit.errors import RecipeError
from fewbit.export.onnx_out import export_onnx
from fewbit.export.qdq import bias_codes, weight_codes
from fewbit.load.capture import capture
from fewbit.net import Net
from fewbit.place.quantizer import QuantConv2d, Quantizer
from fewbit.place.simulate import simulate
from fewbit.place.targets import target
from fewbit.ranges.calibrate import input_quantizer
from fewbit.recipe import read_recipe, run_recipe
from networks import CLASSES, SIZE, make_context, make_images, make_net, quantize

ENGINES: dict[str, Any] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino, "reference": Reference}


class File:
    """An exported file with its nodes and constants by name."""

    def __init__(self, net: Net, path: Path, engine: str) -> None:
        export_onnx(net, path, target(engine))
        self.model = onnx.load(path)
        onnx.checker.check_model(self.model, full_check=True)
        self.nodes = {node.name: node for node in self.model.graph.node}
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.model.graph.initializer}

    def inputs(self, name: str) -> list[np.ndarray]:
        """Return the constant inputs of a node."""
        return [self.constants[key] for key in self.nodes[name].input if key in self.constants]


def with_scheme(recipe: str, **changes: Any) -> Any:
    plain = read_recipe(recipe)
    scheme = plain.scheme.from_data(plain.scheme.model_dump() | changes)
    return plain.model_copy(update={"scheme": scheme})


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_activations_are_pairs_named_after_their_tensor(engine: str, tmp_path: Path) -> None:
    net = quantize("residual", engine=engine)
    file = File(net, tmp_path / "net.onnx", engine)
    quantizers = {
        layer.inputs[0]: layer.module for layer in net.layers() if isinstance(layer.module, Quantizer)
    }
    for tensor, quantizer in quantizers.items():
        back = file.nodes[f"{tensor}:dq"]
        assert file.nodes[f"{tensor}:q"].op_type == "QuantizeLinear"
        assert back.op_type == "DequantizeLinear" and back.input[0] == f"{tensor}:q"
        scale, zero_point = file.inputs(f"{tensor}:q")
        assert file.nodes[f"{tensor}:q"].input[1:] == back.input[1:]
        assert scale == quantizer.scale.numpy()
        kind = np.uint8 if engine == "onnxruntime" or quantizer.unsigned else np.int8
        assert zero_point.dtype == kind and zero_point == quantizer.zero_point.numpy()


def test_onnxruntime_gets_symmetric_activations_shifted_into_unsigned_codes(tmp_path: Path) -> None:
    file = File(quantize("residual", "int8-symmetric"), tmp_path / "net.onnx", "onnxruntime")
    assert file.inputs("input:q")[1] == np.uint8(128)
    assert file.inputs("relu:q")[1] == np.uint8(0)
    assert all(file.inputs(name)[1].dtype == np.uint8 for name in file.nodes if name.endswith(":q"))


def test_weights_are_int8_with_a_scale_a_channel_and_biases_int32_at_the_product(tmp_path: Path) -> None:
    net = quantize("residual")
    file = File(net, tmp_path / "net.onnx", "onnxruntime")
    codes, scale, zero = file.inputs("conv1.weight:dq")
    assert codes.dtype == np.int8 and codes.shape == (16, 16, 3, 3) and codes.min() >= -127
    assert scale.shape == zero.shape == (16,) and zero.dtype == np.int8 and not zero.any()
    assert file.nodes["conv1.weight:dq"].attribute[0].i == 0
    bias, bias_scale, _ = file.inputs("conv1.bias:dq")
    x_scale = file.inputs("relu:q")[0]
    assert bias.dtype == np.int32
    np.testing.assert_array_equal(bias_scale, scale * x_scale)
    layer = net.layer("conv1")
    assert isinstance(layer.module, QuantConv2d) and layer.module.bias is not None
    reads = input_quantizer(net, layer.node)
    assert isinstance(reads, Quantizer)
    np.testing.assert_array_equal(codes, weight_codes(layer.module))
    np.testing.assert_array_equal(bias, bias_codes(layer.module, reads))
    np.testing.assert_allclose(bias * bias_scale, layer.module.bias.detach(), atol=0.51 * bias_scale.max())
    conv = file.nodes["conv1"]
    assert list(conv.input) == ["relu:dq", "conv1.weight:dq", "conv1.bias:dq"]


def test_per_tensor_weights_have_one_scale_and_no_axis(tmp_path: Path) -> None:
    file = File(quantize("residual", "int8-per-tensor"), tmp_path / "net.onnx", "onnxruntime")
    assert file.inputs("conv1.weight:dq")[1].shape == ()
    assert not file.nodes["conv1.weight:dq"].attribute
    assert file.inputs("conv1.bias:dq")[1].shape == ()


def test_fewer_bits_are_clipped_between_the_pair(tmp_path: Path) -> None:
    recipe = with_scheme("int8", activations={"bits": 5}, weights={"bits": 3, "symmetric": True})
    file = File(quantize("residual", recipe), tmp_path / "net.onnx", "onnxruntime")
    clip = file.nodes["relu:clip"]
    assert (
        clip.op_type == "Clip" and clip.input[0] == "relu:q" and file.nodes["relu:dq"].input[0] == "relu:clip"
    )
    assert [int(v) for v in file.inputs("relu:clip")] == [0, 31]
    assert np.abs(file.inputs("conv1.weight:dq")[0]).max() == 3
    shifted = with_scheme("int8", activations={"bits": 5, "symmetric": True})
    file = File(quantize("residual", shifted), tmp_path / "net.onnx", "onnxruntime")
    assert [int(v) for v in file.inputs("input:clip")] == [128 - 15, 128 + 15]


def test_weights_only_keeps_its_arithmetic_and_biases_in_float(tmp_path: Path) -> None:
    file = File(quantize("residual", "int8-weights-only"), tmp_path / "net.onnx", "onnxruntime")
    kinds = {node.op_type for node in file.nodes.values()}
    assert "QuantizeLinear" not in kinds
    assert file.constants["conv1.bias"].dtype == np.float32
    assert file.constants["conv1.weight:q"].dtype == np.int8


def test_dynamic_sums_codes_of_each_sample_in_integers(tmp_path: Path) -> None:
    file = File(quantize("residual", "int8-dynamic"), tmp_path / "net.onnx", "onnxruntime")
    assert (
        file.nodes["conv1:acc"].op_type == "ConvInteger" and file.nodes["fc:acc"].op_type == "MatMulInteger"
    )
    assert int(file.inputs("conv1:acc")[1]) == 128  # the codes' zero point
    assert list(file.inputs("relu:peak")[0]) == [1, 2, 3]  # over everything but the batch
    assert "DynamicQuantizeLinear" not in {
        node.op_type for node in file.nodes.values()
    }  # it takes the batch's


def test_dynamic_refuses_weights_with_a_zero_point() -> None:
    recipe = with_scheme("int8-dynamic", weights={"bits": 8, "symmetric": False})
    with pytest.raises(
        RecipeError, match=r"layer 'stem': dynamic quantization takes symmetric weights; set sym"
    ):
        run_recipe(recipe, make_net("residual"), make_context())


def runs_as_simulated(net: Net, path: Path, engine: str, batch: int = 4) -> None:
    """Run the file on its engine and on the reference: the reference exactly, the engine within a step."""
    export_onnx(net, path, target(engine))
    images = make_images(4, seed=5)
    expected = simulate(net, images).numpy()
    for name in ("reference", engine):
        session = ENGINES[name]().open(path, Setting(engine=name, batch=batch))  # type: ignore[arg-type]
        found = session.run(images.numpy())
        if name == "reference":
            np.testing.assert_array_equal(found, expected)
        else:
            assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("recipe", ["int8", "int8-weights-only"])
def test_weights_with_a_zero_point_run_as_simulated(
    recipe: str, granularity: str, engine: str, tmp_path: Path
) -> None:
    weights = {"bits": 8, "symmetric": False, "granularity": granularity}
    chosen = with_scheme(recipe, weights=weights)
    runs_as_simulated(quantize("residual", chosen, engine), tmp_path / "net.onnx", engine)


class Rows(nn.Module):
    """ConvNeXt's block: matrix products over the channels of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm(8)
        self.up, self.down, self.fc = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1)))))
        return self.fc((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("recipe", ["int8", "int8-per-tensor", "int8-dynamic", "int8-weights-only"])
def test_matrix_products_over_pixels_run_as_simulated(recipe: str, engine: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = capture(Rows().eval(), "rows", SIZE, CLASSES)
    made, _ = run_recipe(read_recipe(recipe), net, make_context(engine))
    runs_as_simulated(made, tmp_path / "net.onnx", engine, batch=2)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_matrix_products_over_pixels_run_in_integers(engine: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = capture(Rows().eval(), "rows", SIZE, CLASSES)
    made, _ = run_recipe(read_recipe("int8"), net, make_context(engine))
    export_onnx(made, tmp_path / "net.onnx", target(engine))
    placement = ENGINES[engine]().open(tmp_path / "net.onnx", Setting(engine=engine)).placement()  # type: ignore[arg-type]
    assert placement.float_matrix_operators() == ()
    assert sum(operator.matrix for operator in placement.operators) == 4


class Joined(nn.Module):
    """Signed tensors joined, something between, a convolution."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 6, 3)
        self.between, self.c = between, nn.Conv2d(14, CLASSES, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.between(torch.cat((self.a(x), self.b(x)), 1))).mean((2, 3))


class Behind(nn.Module):
    """An activation that rises and falls, behind a maximum pool behind a convolution."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.a, self.pool, self.act, self.b = (
            nn.Conv2d(3, 8, 3),
            nn.MaxPool2d(2),
            activation,
            nn.Conv2d(8, CLASSES, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.pool(self.a(x)))).mean((2, 3))


WRONG_IN_OPENVINO: dict[str, Callable[[], nn.Module]] = {
    "joined": lambda: Joined(nn.Identity()),
    "joined, normed": lambda: Joined(nn.Sequential(nn.BatchNorm2d(14), nn.BatchNorm2d(14))),
    "joined, averaged": lambda: Joined(nn.AvgPool2d(3, 1, 1)),
    "joined, averaged beyond": lambda: Joined(nn.AvgPool2d(4, 3, 1, ceil_mode=True)),
    "silu": lambda: Behind(nn.SiLU()),
    "hardswish": lambda: Behind(nn.Hardswish()),
    "gelu": lambda: Behind(nn.GELU()),
    "mish": lambda: Behind(nn.Mish()),
    "prelu": lambda: Behind(nn.PReLU(8, init=-0.5)),
}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("recipe", ["float32", "int8", "int8-weights-only"])
@pytest.mark.parametrize("name", WRONG_IN_OPENVINO)
def test_what_openvino_gets_wrong_is_written_so_that_it_does_not(
    name: str, recipe: str, engine: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = capture(WRONG_IN_OPENVINO[name]().eval(), name, SIZE, CLASSES)
    made, _ = run_recipe(read_recipe(recipe), net, make_context(engine))
    runs_as_simulated(made, tmp_path / "net.onnx", engine)


def test_signed_tensors_that_are_joined_get_unsigned_codes_on_openvino(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = capture(Joined(nn.Identity()).eval(), "joined", SIZE, CLASSES)
    made, _ = run_recipe(read_recipe("int8"), net, make_context("openvino"))
    file = File(made, tmp_path / "net.onnx", "openvino")
    assert [file.inputs(f"{name}:q")[1] for name in ("a", "b", "cat")] == [np.uint8(128)] * 3
    assert file.inputs("input:q")[1].dtype == np.int8
    session = OpenVino().open(tmp_path / "net.onnx", Setting(engine="openvino"))
    assert session.placement().float_matrix_operators() == ()


def test_joined_tensors_that_are_never_negative_need_none_of_it(tmp_path: Path) -> None:
    class Inception(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(14, CLASSES, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat((F.relu(self.a(x)), F.relu(self.b(x))), 1)
            return self.c(F.avg_pool2d(y, 3, 1, 1)).mean((2, 3))

    torch.manual_seed(0)
    net = capture(Inception().eval(), "inception", SIZE, CLASSES)
    made, _ = run_recipe(read_recipe("int8"), net, make_context("openvino"))
    file = File(made, tmp_path / "net.onnx", "openvino")
    kinds = [node.op_type for node in file.nodes.values()]
    assert "MaxPool" not in kinds and "Pad" not in kinds
    assert file.inputs("cat:q")[1] == np.uint8(0)
    runs_as_simulated(made, tmp_path / "net.onnx", "openvino")
