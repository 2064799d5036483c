"""A response normalization in several operators: as fast operators, and everywhere still the one layer."""

from __future__ import annotations

import json
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
from fewbit.load.response_norms import merge_norms
from fewbit.measure.host import describe_host, rounding_of
from fewbit.net import Net
from fewbit.place.targets import TARGETS
from fewbit.recipe import read_recipe, run_recipe
from fewbit.spec import NORM
from networks import make_context
from onnx_files import card
from opened_files import open_all, run_all

SIZE = (3, 20, 20)
ENGINES: tuple[EngineName, ...] = ("onnxruntime", "openvino")
KINDS = ["Mul", "Conv", "Sqrt", "Sqrt", "Mul", "Reciprocal", "Mul"]


def normed(beta: float = 0.75, channels: int = 192) -> nn.Module:
    torch.manual_seed(0)
    first = nn.Conv2d(3, channels, 3, padding=1)
    with torch.no_grad():
        first.weight *= 40  # so that the norms do something
    norm = nn.LocalResponseNorm(5, 0.02, beta, 1.0)
    last = nn.Conv2d(channels, 7, 3)
    return nn.Sequential(first, nn.ReLU(), norm, last, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(1))


def exported(path: Path, engine: str, recipe: str = "int8", beta: float = 0.75) -> Net:
    net = capture(normed(beta).eval(), "normed", SIZE)
    made, _ = run_recipe(read_recipe(recipe), net, make_context(engine, images(8)))
    export_onnx(made, path, TARGETS[engine])
    return made


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node if node.op_type in {*KINDS, "LRN"}]


def test_the_file_has_the_fast_operators_and_as_captured_the_norm(tmp_path: Path) -> None:
    net = capture(normed().eval(), "normed", SIZE)
    export_onnx(net, tmp_path / "captured.onnx")
    assert [k for k in kinds(tmp_path / "captured.onnx") if k != "Conv"] == ["LRN"]
    exported(tmp_path / "float.onnx", "openvino", "float32")
    assert kinds(tmp_path / "float.onnx") == ["Conv", *KINDS, "Conv"]
    exported(tmp_path / "other.onnx", "openvino", "float32", beta=0.5)
    assert [k for k in kinds(tmp_path / "other.onnx") if k != "Conv"] == ["LRN"]


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


@pytest.mark.parametrize("engine", ENGINES)
def test_codes_behind_a_norm_are_the_engines(engine: EngineName, tmp_path: Path) -> None:
    path, pixels = tmp_path / "int8.onnx", images().numpy()
    exported(path, engine)
    everything, names = open_all(path, tmp_path)
    _, *found = run_all(engine, everything, names, pixels)
    codes = dict(zip(names, found, strict=True))
    session = Reference().open(
        path, Setting(engine="reference", rounding=rounding_of(engine, describe_host()))
    )
    behind = session.run_recorded(pixels, forced=codes)["2:q"].astype(int)
    assert behind.size == 307_200 and behind.std() > 20 and (behind != codes["2:q"]).sum() <= 2


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


BREAKS = ["mark", "keys", "type", "window", "offset", "kind", "wire", "beta"]


@pytest.mark.parametrize("what", BREAKS)
def test_what_is_marked_but_computes_something_else_is_left_as_it_is(what: str, tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    exported(path, "openvino", "float32")
    graph = onnx.load(path).graph
    assert len(merge_norms(onnx.load(path).graph)) == 1, "the file as it was written is merged"
    parts = [n for n in graph.node if any(entry.key == NORM for entry in n.metadata_props)]
    mark = next(entry for entry in parts[-1].metadata_props if entry.key == NORM)
    numbers = json.loads(mark.value)
    if what in ("window", "offset"):
        tensor = next(c for c in graph.initializer if c.name == parts[1].input[1 + (what == "offset")])
        changed = numpy_helper.to_array(tensor).copy()
        changed.flat[0] += 1
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    elif what == "kind":
        parts[2].op_type = "Relu"
    elif what == "wire":
        parts[6].input[1] = parts[4].output[0]
    else:
        other = {
            "mark": "{no numbers",
            "keys": json.dumps({"size": 5}),
            "type": json.dumps(numbers | {"size": "5"}),
            "beta": json.dumps(numbers | {"beta": 0.5}),
        }
        mark.value = other[what]
    before = [node.op_type for node in graph.node]
    assert merge_norms(graph) == frozenset() and [node.op_type for node in graph.node] == before
