"""A response normalization in several operators: as fast operators, and everywhere still the one layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from fewbit.engines import reference_ops, reference_rounding
from fewbit.engines.causes import cause_of, read_parts
from fewbit.engines.exported import ExportedGraph
from fewbit.engines.process import EngineProcess
from fewbit.engines.reference import Reference
from fewbit.engines.reference_graph import Node
from fewbit.engines.session import EngineName, Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import capture, load
from fewbit.load.response_norms import Norm, find_norms, merge_norms
from fewbit.measure.host import describe_host, rounding_of
from fewbit.net import Net
from fewbit.place.targets import Target, target
from fewbit.recipe import read_recipe, run_recipe
from networks import make_context
from onnx_files import card
from opened_files import open_all, run_all

SIZE = (3, 20, 20)
ENGINES: tuple[EngineName, ...] = ("onnxruntime", "openvino")
KINDS = ["Mul", "Conv", "Sqrt", "Sqrt", "Mul", "Reciprocal", "Mul"]


def normed(beta: float = 0.75, channels: int = 192) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(3, channels, 3, padding=1)
    with torch.no_grad():
        first.weight *= 40  # so that the norms do something
    norm = nn.LocalResponseNorm(5, 0.02, beta, 1.0)
    last = nn.Conv2d(channels, 7, 3)
    return nn.Sequential(first, nn.ReLU(), norm, last, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(1))


class Forked(nn.Module):
    """What a norm reads, a convolution reads too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.beside = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.last = nn.LocalResponseNorm(5, 0.5), nn.Conv2d(16, 7, 3)
        with torch.no_grad():
            self.first.weight *= 10

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = self.norm(x) + torch.relu(self.beside(x))
        return torch.relu(self.last(x)).mean((2, 3))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "forked":
        return Forked()
    if name == "two norms":
        return nn.Sequential(nn.LocalResponseNorm(3, 0.1), *normed(channels=20), nn.Identity())
    if name == "norm of the image":
        return nn.Sequential(nn.LocalResponseNorm(3, 0.1), nn.Conv2d(3, 7, 3), *normed()[4:])
    return normed()


def exported(path: Path, engine: str, recipe: str = "int8", name: str = "normed") -> Net:
    net = capture(network(name).eval(), "normed", SIZE)
    made, _ = run_recipe(read_recipe(recipe), net, make_context(engine, images(8)))
    export_onnx(made, path, target(engine, native_bf16=True))
    return made


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node if node.op_type in {*KINDS, "LRN"}]


def split(path: Path, model: nn.Module, aim: Target | None) -> bool:
    """Say whether the norm of an exported network is several operators."""
    export_onnx(capture(model.eval(), "normed", SIZE), path, aim)
    norms, whole = len(find_norms(onnx.load(path).graph.node)), kinds(path).count("LRN")
    assert norms + whole == 1
    return norms == 1


def test_a_norm_is_split_where_that_was_measured_to_be_faster(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    ort, plain, wide = target("onnxruntime"), target("openvino"), target("openvino", native_bf16=True)
    assert split(path, normed(), ort) and split(path, normed(), wide)
    assert not split(path, normed(), plain), "its convolution in float32 is slower than its LRN"
    assert not split(path, normed(), None), "a float file is for all engines"
    assert not split(path, normed(0.5), ort), "its power is not made of square roots"
    assert split(path, normed(channels=256), wide) and not split(path, normed(channels=257), wide)
    assert split(path, normed(channels=257), ort)
    exported(path, "openvino", "float32")
    assert kinds(path) == ["Conv", *KINDS, "Conv"]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_computes_what_the_network_does(engine: EngineName, tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    exported(path, engine, "float32")
    with EngineProcess(engine) as process:
        logits = process.open(path, Setting(engine=engine, batch=4)).run(images().numpy())
    with torch.no_grad():
        wanted = normed().eval()(images()).numpy()
    np.testing.assert_allclose(logits, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_reference_rounds_a_norm_as_the_engine_does(engine: EngineName, tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    exported(path, engine, "float32")
    model = onnx.load(path)
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in "12")
    onnx.save(model, tmp_path / "all.onnx")
    _, x, normal = run_all(engine, tmp_path / "all.onnx", ["1", "2"], images().numpy())
    (merged,) = merge_norms(model.graph)
    (proto,) = (node for node in model.graph.node if node.output[0] == merged)
    numbers = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}
    node = Node("2", "LRN by roots", ("1",), ("2",), numbers, 17)
    exact = reference_ops.OPERATORS["LRN by roots"](node, [x])
    followed = reference_rounding.OPERATORS[f"{engine}.LRN by roots"](node, [x])
    assert (exact != normal).mean() > 0.05 and (followed != normal).sum() <= 0.001 * x.size
    assert engine == "onnxruntime" or np.array_equal(followed, normal)  # it begins anew behind 128 channels
    np.testing.assert_allclose(exact, normal, rtol=1e-6)


@pytest.mark.parametrize("name", ["normed", "forked", "two norms", "norm of the image"])
@pytest.mark.parametrize("engine", ENGINES)
def test_codes_behind_a_norm_are_the_engines(engine: EngineName, name: str, tmp_path: Path) -> None:
    path, pixels = tmp_path / "int8.onnx", images().numpy()
    exported(path, engine, name=name)
    everything, names = open_all(path, tmp_path)
    _, *found = run_all(engine, everything, names, pixels)
    codes = dict(zip(names, found, strict=True))
    session = Reference().open(
        path, Setting(engine="reference", rounding=rounding_of(engine, describe_host()))
    )
    record = session.run_recorded(pixels, forced=codes)
    assert sum(o.kind.endswith("LRN by roots") for o in session.placement().operators) == len(
        find_norms(onnx.load(path).graph.node)
    )
    for tensor in names:
        assert codes[tensor].std() > 5, tensor
        assert (record[tensor].astype(int) != codes[tensor].astype(int)).sum() <= 2, tensor


@pytest.mark.parametrize("engine", ENGINES)
def test_its_convolution_is_none_of_the_networks(engine: EngineName, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    exported(path, engine)
    with EngineProcess(engine) as process:
        session = process.open(path, Setting(engine=engine, batch=4))
        placement, operators = session.placement(), session.profile(2)
    assert [o.name for o in placement.float_matrix_operators()] == []
    assert sum(o.matrix for o in placement.operators) == 2
    parts, graph = read_parts(path), ExportedGraph(path)
    assert len(parts.matrices) == 2
    causes = {cause_of(o, parts, True) for o in operators if graph.all_norm(o.layers)}
    assert causes == {"rest"}
    sums = next(name for name in graph.nodes if name.endswith(".sums"))
    assert graph.why_float(sums) == "engines normalize responses in float" and not graph.is_matrix(sums)


def test_a_float_file_is_read_as_the_layer_that_it_was(tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    made = exported(path, "openvino", "float32")
    net = load(card(path, 7, SIZE))
    assert [layer.kind for layer in net.layers()] == [layer.kind for layer in made.layers()]
    norm = next(layer.module for layer in net.layers() if layer.kind == "LRN")
    assert isinstance(norm, nn.LocalResponseNorm)
    assert (norm.size, norm.beta, norm.k) == (5, 0.75, 1.0) and norm.alpha == pytest.approx(0.02)
    with torch.no_grad():
        torch.testing.assert_close(net(images()), made(images()), rtol=1e-5, atol=1e-4)


def test_tools_that_rename_and_rewrite_leave_it_readable(tmp_path: Path) -> None:
    exported(tmp_path / "float.onnx", "openvino", "float32", "two norms")
    model = onnx.compose.add_prefix(onnx.load(tmp_path / "float.onnx"), "some/")
    for node in model.graph.node:
        node.name = ""
    onnx.save(onnx.version_converter.convert_version(model, 20), tmp_path / "other.onnx")
    nets = [load(card(tmp_path / name, 7, SIZE)) for name in ("float.onnx", "other.onnx")]
    assert [sum(layer.kind == "LRN" for layer in net.layers()) for net in nets] == [2, 2]
    with torch.no_grad():
        torch.testing.assert_close(nets[0](images()), nets[1](images()))


def test_what_others_read_of_it_stays(tmp_path: Path) -> None:
    exported(tmp_path / "float.onnx", "openvino", "float32")
    model = onnx.load(tmp_path / "float.onnx")
    (norm,) = find_norms(model.graph.node)
    squares, sums = norm.squares.output[0], norm.sums.output[0]
    model.graph.output.append(onnx.helper.make_tensor_value_info(sums, 1, ["n", 192, 20, 20]))
    assert merge_norms(model.graph) == {"2"}
    made = {value for node in model.graph.node for value in node.output}
    assert {squares, sums, "2"} <= made and norm.root.output[0] not in made
    onnx.checker.check_model(model)


def _weights(graph: onnx.GraphProto, place: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    (norm,) = find_norms(graph.node)
    tensor = next(c for c in graph.initializer if c.name == norm.sums.input[place])
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))


def _more_of_one(values: np.ndarray) -> np.ndarray:
    values.flat[0] += 1
    return values


BREAKS: dict[str, Callable[[onnx.GraphProto, Norm], object]] = {
    "window": lambda graph, norm: _weights(graph, 1, _more_of_one),
    "empty window": lambda graph, norm: _weights(graph, 1, np.zeros_like),
    "shape of the window": lambda graph, norm: _weights(graph, 1, lambda w: w[:, :1]),
    "type of the window": lambda graph, norm: _weights(graph, 1, lambda w: w.astype(np.float64)),
    "offset": lambda graph, norm: _weights(graph, 2, _more_of_one),
    "no offset": lambda graph, norm: norm.sums.input.pop(),
    "computed window": lambda graph, norm: norm.sums.input.__setitem__(1, "input"),
    "stride": lambda graph, norm: norm.sums.attribute.append(onnx.helper.make_attribute("strides", [2, 2])),
    "pads": lambda graph, norm: norm.sums.attribute.append(onnx.helper.make_attribute("pads", [1, 0, 0, 0])),
    "kind": lambda graph, norm: setattr(norm.root, "op_type", "Relu"),
    "domain": lambda graph, norm: setattr(norm.sums, "domain", "com.example"),
    "one root": lambda graph, norm: norm.power.input.__setitem__(1, norm.root.output[0]),
    "product": lambda graph, norm: norm.squares.input.__setitem__(1, norm.sums.input[2]),
    "end": lambda graph, norm: norm.last.input.__setitem__(0, norm.root.output[0]),
}


@pytest.mark.parametrize("what", BREAKS)
def test_what_computes_something_else_is_left_as_it_is(what: str, tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    exported(path, "openvino", "float32")
    graph = onnx.load(path).graph
    (norm,) = find_norms(graph.node)
    BREAKS[what](graph, norm)
    before = [node.op_type for node in graph.node]
    assert merge_norms(graph) == frozenset() and [node.op_type for node in graph.node] == before


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("channels", [2, 5, 40])
def test_every_window_is_read_back(size: int, channels: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    norm = nn.LocalResponseNorm(size, 0.37, 0.75, 1.3)
    model = nn.Sequential(nn.Conv2d(3, channels, 1), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    made = capture(model.eval(), "net", SIZE)
    export_onnx(made, tmp_path / "net.onnx", target("onnxruntime"))
    assert kinds(tmp_path / "net.onnx") == ["Conv", *KINDS]
    net = load(card(tmp_path / "net.onnx", channels, SIZE))
    assert "LRN" in [layer.kind for layer in net.layers()]
    with torch.no_grad():
        torch.testing.assert_close(net(images()), made(images()))
