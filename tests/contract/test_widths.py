"""Any width, 2 to 8 bits: what is simulated is what the file says and what the engines run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from fewbit.engines.reference import Reference
from fewbit.engines.session import Session, Setting
from fewbit.export.onnx_out import export_onnx
from fewbit.net import Net
from fewbit.place.quantizer import QuantConv2d, QuantLinear
from fewbit.place.simulate import simulate_recorded
from fewbit.place.targets import TARGETS, target
from fewbit.recipe import Recipe
from fewbit.registry import find
from fewbit.spec import QuantSpec, Rule, Scheme
from networks import NETWORKS, make_images, quantize
from opened_files import open_all, run_all

WIDTHS = (2, 3, 4, 6, 8)
PAIRS = tuple(itertools.product(WIDTHS, WIDTHS))
# Each pair of widths takes one of these eight: symmetric activations, a scale a channel, ends in 8 bits.
CHOICES = tuple(itertools.product((False, True), repeat=3))
IMAGES = make_images(4, seed=5)


def weights_of(bits: int, channel: bool = True, symmetric: bool = True) -> QuantSpec:
    granularity = "channel" if channel else "tensor"
    return QuantSpec(bits=bits, symmetric=symmetric, signed=True, granularity=granularity)


def recipe_of(scheme: Scheme) -> Recipe:
    steps: list[dict[str, Any]] = [{"use": name} for name in ("canonical", "fold_bn", "place")]
    steps.append({"use": "calibrate", "weights": "mse", "activations": "mse"})
    return Recipe(name="widths", scheme=scheme, steps=tuple(steps))


def scheme_of(pair: tuple[int, int]) -> Scheme:
    """Return the scheme of a pair of widths."""
    weights, activations = pair
    symmetric, channel, ends = CHOICES[PAIRS.index(pair) % len(CHOICES)]
    eight = Rule(
        match="first", weights=weights_of(8, channel), activations=QuantSpec(bits=8, symmetric=symmetric)
    )
    return Scheme(
        weights=weights_of(weights, channel),
        activations=QuantSpec(bits=activations, symmetric=symmetric),
        rules=(eight, eight.model_copy(update={"match": "last"})) if ends else (),
    )


class File:
    """A quantized network and its file."""

    def __init__(self, name: str, scheme: Scheme, engine: str, folder: Path) -> None:
        self.net: Net = quantize(name, recipe_of(scheme), engine)
        self.path, self.engine, self.folder = folder / f"{name}.onnx", engine, folder
        export_onnx(self.net, self.path, target(engine))
        graph = onnx.load(self.path).graph
        self.constants = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
        self.clips = {node.input[0]: node.input[1:] for node in graph.node if node.op_type == "Clip"}

    @property
    def layers(self) -> dict[str, QuantConv2d | QuantLinear]:
        modules = {layer.name: layer.module for layer in self.net.layers()}
        return {n: m for n, m in modules.items() if isinstance(m, QuantConv2d | QuantLinear)}

    def clamped(self, name: str, codes: NDArray[Any]) -> NDArray[Any]:
        """Return the codes of a QuantizeLinear as the file's clip behind it leaves them."""
        if name not in self.clips:
            return codes
        low, high = (self.constants[limit] for limit in self.clips[name])
        return codes.clip(low, high)

    def session(self) -> Session:
        opened: Session = find("engines", self.engine)().open(
            self.path, Setting.from_data({"engine": self.engine, "batch": 4})
        )
        return opened

    def record(self, forced: dict[str, NDArray[Any]] | None = None) -> dict[str, NDArray[Any]]:
        session = Reference().open(self.path, Setting(engine="reference", batch=4))
        return session.run_recorded(IMAGES.numpy(), forced)


def assert_simulated(file: File) -> None:
    """The simulation has the reference's logits and codes, bit for bit."""
    logits, codes = simulate_recorded(file.net, IMAGES)
    record = file.record()
    np.testing.assert_array_equal(record["logits"], logits.numpy())
    for tensor, value in codes.items():
        found = file.clamped(f"{tensor}:q", record[f"{tensor}:q"]).astype(np.int64)
        shift = np.unique(found - value)  # signed codes in an unsigned container
        assert shift.tolist() in ([0], [128]), tensor


def assert_run(file: File) -> None:
    """Each quantized tensor of the engine is within one step of the reference that goes on with its codes."""
    everything, names = open_all(file.path, file.folder)
    logits, *found = run_all(file.engine, everything, names, IMAGES.numpy())
    codes = dict(zip(names, found, strict=True))
    record = file.record(codes)
    for name, value in codes.items():
        assert np.abs(value.astype(np.int64) - record[name].astype(np.int64)).max() <= 1, name
    np.testing.assert_allclose(logits, record["logits"], atol=1e-5 * float(np.abs(logits).max()))


def assert_small_integers(file: File) -> None:
    """Every weight is an int8 tensor of the file with codes of its width."""
    for name, module in file.layers.items():
        codes, spec = file.constants[f"{name}.weight:q"], module.weight_quantizer.spec
        assert codes.dtype == np.int8 and codes.size == module.weight.numel()
        least, greatest = spec.code_range()
        assert least <= codes.min() and codes.max() <= greatest
        assert len(np.unique(codes)) > 1


@pytest.mark.parametrize("engine", TARGETS)
@pytest.mark.parametrize("pair", PAIRS, ids=[f"W{w}A{a}" for w, a in PAIRS])
def test_simulation_reference_and_engine_agree_in_integers(
    pair: tuple[int, int], engine: str, tmp_path: Path
) -> None:
    half = (PAIRS.index(pair) + list(TARGETS).index(engine)) % 2  # the other half on the other engine
    for name in list(NETWORKS)[half::2]:
        file = File(name, scheme_of(pair), engine, tmp_path)
        assert_simulated(file)
        assert_run(file)
        assert_small_integers(file)
        placement = file.session().placement()
        assert [o.name for o in placement.float_matrix_operators()] == [], name
        assert sum(o.matrix for o in placement.operators) == len(file.layers), name


@pytest.mark.parametrize("engine", TARGETS)
def test_each_layer_may_have_its_own_widths(engine: str, tmp_path: Path) -> None:
    rules = (
        Rule(match="first", weights=weights_of(8), activations=QuantSpec(bits=8)),
        Rule(match="conv1", weights=weights_of(2), activations=QuantSpec(bits=3)),
        Rule(match="conv*", weights=weights_of(3, channel=False), keep_float=False),
        Rule(match="last", keep_float=True),
    )
    scheme = Scheme(weights=weights_of(6), activations=QuantSpec(bits=4), rules=rules)
    file = File("residual", scheme, engine, tmp_path)
    assert_simulated(file)
    widest = {n: int(np.abs(file.constants[f"{n}.weight:q"].astype(int)).max()) for n in file.layers}
    assert widest == {"stem": 127, "conv1": 1, "conv2": 3}
    assert file.layers["conv2"].weight_quantizer.scale.dim() == 0
    assert file.constants["fc.weight"].dtype == np.float32
    found = file.session().run(IMAGES.numpy())
    assert np.abs(found - file.record()["logits"]).max() < 0.03 * np.abs(found).max()


@pytest.mark.parametrize("engine", TARGETS)
@pytest.mark.parametrize("pair", [(8, 8), (4, 4), (2, 8)])
@pytest.mark.parametrize("channel", [False, True])
def test_weights_that_are_not_symmetric(
    channel: bool, pair: tuple[int, int], engine: str, tmp_path: Path
) -> None:
    for name in NETWORKS:
        weights = weights_of(pair[0], channel, symmetric=False)
        scheme = Scheme(weights=weights, activations=QuantSpec(bits=pair[1]))
        file = File(name, scheme, engine, tmp_path)
        assert_simulated(file)
        assert_small_integers(file)
        assert any(bool(m.weight_quantizer.zero_point.any()) for m in file.layers.values())
        assert_run(file)
        if engine == "onnxruntime":  # OpenVINO computes them in float, see QuantSpec
            assert [o.name for o in file.session().placement().float_matrix_operators()] == []


@pytest.mark.parametrize("engine", TARGETS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_only(bits: int, engine: str, tmp_path: Path) -> None:
    for name in NETWORKS:
        scheme = Scheme(mode="weights_only", weights=weights_of(bits, channel=bits != 3))
        file = File(name, scheme, engine, tmp_path)
        assert_simulated(file)
        assert_small_integers(file)
        expected = file.record()["logits"]
        found = file.session().run(IMAGES.numpy())
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))


def test_a_clip_that_the_codes_do_is_left_out_and_changes_nothing(tmp_path: Path) -> None:
    file = File("depthwise", Scheme(activations=QuantSpec(bits=4)), "onnxruntime", tmp_path)
    nodes = {node.name: node for node in onnx.load(file.path).graph.node}
    clips = [layer.name for layer in file.net.layers() if layer.kind == "Clip"]
    assert len(clips) == 3 and not nodes.keys() & set(clips)
    with torch.no_grad():
        _, codes = simulate_recorded(file.net, IMAGES * 3)  # far beyond what calibrated it
    record = Reference().open(file.path, Setting()).run_recorded(IMAGES.numpy() * 3)
    for name in clips:
        found = file.clamped(f"{name}:q", record[f"{name}:q"])
        assert int(record[f"{name}:q"].max()) > 15 and int(found.max()) == 15
        np.testing.assert_array_equal(found.astype(np.int64), codes[name])
