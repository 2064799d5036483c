from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fewbit.improve.reconstruct
from calibrated import (
    STEPS,
    calibrated,
    coarse,
    context_of,
    in_float,
    matrices,
    same_bits,
    scheme_of,
    state_of,
    two_weights,
    values_of,
)
from fewbit.errors import DataError
from fewbit.improve.activations import Activations
from fewbit.improve.adaround import AdaRound
from fewbit.improve.brecq import BRECQ
from fewbit.improve.comq import COMQ
from fewbit.improve.qdrop import QDrop
from fewbit.improve.reconstruct import Problem, reconstruct
from fewbit.improve.units import Unit, split_into_blocks, split_into_layers
from fewbit.net import Net, name_of
from fewbit.place.quantizer import Quantizer
from fewbit.recipe import Recipe, run_recipe
from fewbit.spec import Rule
from fewbit.step import Context, Step, StepReport
from networks import NETWORKS, make_context, make_images, make_net
from solved_layers import output_error

QUICK = QDrop(iterations=12, batch=8)
LEARNERS = [
    QUICK,
    AdaRound(iterations=8, batch=8),
    BRECQ(weighting="fisher", iterations=8, step_iterations=4, batch=8),
    BRECQ(units="layer", iterations=8, step_iterations=4, batch=8),
]


def walk(
    net: Net,
    solve: Callable[[Problem], str],
    context: Context | None = None,
    split: Callable[[Net], list[Unit]] = split_into_blocks,
    images: int = 1024,
    step: Step | None = None,
) -> StepReport:
    return reconstruct(step or COMQ(), "test", net, context or context_of(), split(net), images, solve)


def shift(problem: Problem) -> str:
    """Change every layer of a unit at random."""
    for layer in problem.unit.layers.values():
        quantizer = layer.weight_quantizer
        codes = quantizer.codes(layer.weight.detach())
        by = torch.randint(-1, 2, codes.shape, generator=problem.generator)
        quantizer.assign((codes + by).clamp(quantizer.qmin, quantizer.qmax))
        assert layer.bias is not None
        layer.bias = nn.Parameter(layer.bias.detach() + 0.1, requires_grad=False)
    for own in problem.own_quantizers():
        own.scale = own.scale * 0.8
    return f"{problem.unit.name} shifted"


# What a unit is given


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("split", [split_into_layers, split_into_blocks])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_unit_gets_the_float_tensors_and_those_of_the_quantized_units_before_it(
    name: str, split: Callable[[Net], list[Unit]], engine: str
) -> None:
    net = calibrated(name, engine=engine)
    exact = values_of(in_float(net), make_images(24))
    seen: dict[fx.Node, Tensor] = {}

    def solve(problem: Problem) -> str:
        every = slice(0, problem.images)
        for node in (*problem.unit.inputs, *problem.unit.outputs):
            torch.testing.assert_close(problem.exact.take(node, every), exact[node.name])
        for node in problem.unit.inputs:
            seen[node] = problem.rounded.take(node, every).clone()
        return shift(problem)

    walk(net, solve, context_of(engine=engine), split)
    # What each unit was shown is what the finished network computes there: no step moved behind its back.
    finished = values_of(net, make_images(24))
    for node, value in seen.items():
        torch.testing.assert_close(value, finished[node.name], msg=f"{name_of(node)} of {name}")


def test_a_shared_step_moves_only_where_all_its_values_are_made() -> None:
    net = calibrated("branches")
    found: dict[str, list[str]] = {}
    every: dict[str, list[str]] = {}

    def solve(problem: Problem) -> str:
        found[problem.unit.name] = [quantizer.name for quantizer in problem.own_quantizers()]
        every[problem.unit.name] = [quantizer.name for quantizer in problem.quantizers()]
        return ""

    walk(net, solve, split=split_into_layers)
    joined = net.graph.get_submodule("quantizers.cat_1")
    assert isinstance(joined, Quantizer)
    # The branches c and d share their concatenation's quantizer; neither may move it alone.
    assert joined.name in every["c"] and joined.name in every["d"]
    assert all(joined.name not in names for names in found.values())
    found.clear()
    walk(net, solve, split=split_into_blocks)
    assert joined.name in found["c to d"]
    first = net.graph.get_submodule("quantizers.channel_shuffle_join")
    assert isinstance(first, Quantizer)
    # What the shuffle moves was rounded in the unit before, and its step learned there.
    assert first.name in found["a to b"] and first.name in every["c to d"]
    assert first.name not in found["c to d"]


def test_no_more_images_than_asked_for_and_never_none() -> None:
    seen: list[int] = []

    def solve(problem: Problem) -> str:
        seen.append(problem.images)
        return ""

    walk(calibrated(), solve, images=10)
    assert seen == [10, 10, 10]
    with pytest.raises(
        DataError, match="test: no image came; give at least one with --data or --calibration"
    ):
        walk(calibrated(), solve, context_of(0))


@pytest.mark.parametrize("limit", [0, 20_000, 1 << 30])
def test_the_memory_limit_holds(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[int, int] = {}

    class Watched(Activations):
        def put(self, *given: Any, **more: Any) -> None:
            super().put(*given, **more)
            held[id(self)] = max(held.get(id(self), 0), self.held_bytes)

    monkeypatch.setattr(fewbit.improve.reconstruct, "Activations", Watched)
    walk(calibrated(), lambda _: "", context_of(limit_bytes=limit))
    assert sum(held.values()) <= limit and (limit == 0 or max(held.values()) > 0)


@pytest.mark.parametrize("step", [*LEARNERS, COMQ()], ids=lambda step: type(step).__name__)
def test_the_result_does_not_depend_on_the_memory_limit(step: Step) -> None:
    states = []
    for limit in (1 << 30, 30_000, 0):
        net = calibrated("branches")
        step(net, context_of(limit_bytes=limit))
        states.append(state_of(net))
    assert same_bits(states[0], states[1]) and same_bits(states[0], states[2])


@pytest.mark.parametrize("step", LEARNERS, ids=lambda step: type(step).__name__)
def test_same_seed_same_bits_and_another_seed_others(step: Step) -> None:
    states = []
    for seed in (0, 0, 1):
        net = calibrated()
        step(net, context_of(seed=seed))
        states.append(state_of(net))
    assert same_bits(states[0], states[1]) and not same_bits(states[0], states[2])


def test_notes_changes_and_progress() -> None:
    told: list[tuple[str, float]] = []

    def solve(problem: Problem) -> str:
        problem.tell(0.5)
        problem.tell(1.0)
        return "" if problem.unit.name == "stem" else f"{problem.unit.name} is odd"

    context = context_of(advance=lambda what, share: told.append((what, share)))
    report = walk(calibrated(), solve, context)
    assert report.notes == ("conv1 to conv2 is odd", "fc is odd")
    assert report.changed == 4
    shares = [share for _, share in told]
    assert {what for what, _ in told} == {"test"}
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == pytest.approx(1)


def test_parameters_that_ask_for_a_gradient_do_so_again() -> None:
    net = calibrated()
    net.graph.get_submodule("conv1").weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    before = {key: value.requires_grad for key, value in net.graph.named_parameters()}
    assert len(set(before.values())) == 2

    def solve(problem: Problem) -> str:
        assert not any(parameter.requires_grad for parameter in net.graph.parameters())
        return shift(problem)

    walk(net, solve)
    assert {key: value.requires_grad for key, value in net.graph.named_parameters()} == before

    def fail(problem: Problem) -> str:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        walk(net, fail)
    assert {key: value.requires_grad for key, value in net.graph.named_parameters()} == before


def test_the_float_network_is_still_there_afterwards() -> None:
    net, images = calibrated(), make_images(5)
    expected = in_float(net)(images)
    walk(net, shift)
    assert torch.equal(in_float(net)(images), expected)


@pytest.mark.parametrize(
    ("name", "mode"), [("residual", "dynamic"), ("gated", "dynamic"), ("depthwise", "weights_only")]
)
def test_networks_without_fixed_activation_grids_are_learned_too(name: str, mode: str) -> None:
    net = calibrated(name, scheme_of(mode=mode))
    before = output_error(name, net)
    QDrop(iterations=200, batch=16)(net, context_of(scheme=scheme_of(mode=mode)))
    assert output_error(name, net) < 0.6 * before


def test_a_bias_that_a_smaller_step_would_drive_out_of_int32_is_held() -> None:
    net = calibrated()
    layer = matrices(net)["conv2"]
    reads = net.graph.get_submodule("quantizers.relu_1")
    assert isinstance(reads, Quantizer) and layer.bias is not None
    quantizer = layer.weight_quantizer
    with torch.no_grad():
        layer.weight[3] *= 1e-7  # a dead channel: next to no weight beside its bias
        layer.bias[3] = 1.0
        quantizer.scale[3] = 1.0 / (float(reads.scale) * 0.6 * 2**31)

    def solve(problem: Problem) -> str:
        for own in problem.own_quantizers():
            own.scale = own.scale * 0.3
        for one in problem.unit.layers.values():
            one.weight_quantizer.assign(one.weight_quantizer.codes(one.weight.detach()))
        return ""

    before = quantizer.codes(layer.weight.detach())[3] * quantizer.scale[3]
    report = walk(net, solve)
    unit = float(reads.scale) * quantizer.scale.double()
    assert bool((layer.bias.detach().double().abs() / unit <= 2**31 - 1).all())
    assert report.notes == ("conv2: 1 weight grids widened so that the bias fits int32",)
    after = quantizer.codes(layer.weight.detach())[3] * quantizer.scale[3]
    assert float((after - before).abs().max()) <= 0.51 * float(quantizer.scale[3])
    assert torch.equal(quantizer.codes(layer.weight.detach()), quantizer.codes(layer.weight.detach()).round())


# Going on after a stop


class Stopped(Exception):
    """What a kill is in these tests."""


class Counting:
    """Solves units, stops before one of them, and remembers which it solved."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.solved, self.stop_at = list[str](), stop_at

    def __call__(self, problem: Problem) -> str:
        if len(self.solved) == self.stop_at:
            raise Stopped
        self.solved.append(problem.unit.name)
        return shift(problem)


def stopped(folder: Path, units: int, **more: Any) -> None:
    with pytest.raises(Stopped):
        walk(calibrated(), Counting(units), context_of(scratch=folder, **more))


@pytest.mark.parametrize("done", [0, 1, 2])
def test_it_goes_on_at_the_unit_that_it_was_on_with_the_same_bits(tmp_path: Path, done: int) -> None:
    calm = calibrated()
    calm_report = walk(calm, Counting())
    stopped(tmp_path, done)
    net, counting = calibrated(), Counting()
    report = walk(net, counting, context_of(scratch=tmp_path))
    assert counting.solved == ["stem", "conv1 to conv2", "fc"][done:]
    assert same_bits(state_of(net), state_of(calm))
    told = (f"{done} of 3 units had been done when a run was stopped",) if done else ()
    assert report.notes == (*told, *calm_report.notes)


def test_a_step_that_was_done_when_a_later_one_was_stopped_is_not_repeated(tmp_path: Path) -> None:
    walk(calibrated(), Counting(), context_of(scratch=tmp_path))
    counting = Counting()
    walk(calibrated(), counting, context_of(scratch=tmp_path))
    assert counting.solved == []


@pytest.mark.parametrize("step", LEARNERS, ids=lambda step: type(step).__name__)
def test_a_network_stopped_while_it_learns_goes_on_with_the_same_bits(tmp_path: Path, step: Step) -> None:
    calm = calibrated("branches")
    step(calm, context_of())

    def stop(_: str, share: float) -> None:
        if share > 0.6:
            raise Stopped

    with pytest.raises(Stopped):
        step(calibrated("branches"), context_of(scratch=tmp_path, advance=stop))
    net = calibrated("branches")
    report = step(net, context_of(scratch=tmp_path))
    assert "units had been done when a run was stopped" in report.notes[0]
    assert same_bits(state_of(net), state_of(calm))


def _other_weights(net: Net) -> Net:
    with torch.no_grad():
        matrices(net)["fc"].weight[0, 0] += 1e-3
    return net


def _other_bias(net: Net) -> Net:
    matrices(net)["fc"].bias = nn.Parameter(torch.zeros(5))
    return net


def _other_geometry(net: Net) -> Net:
    matrices(net)["stem"].pads = (0, 0, 2, 2)
    return net


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"context": context_of(seed=1)},
    "images": {"context": context_of(23)},
    "engine": {"context": context_of(engine="openvino")},
    "scheme": {"context": context_of(scheme=scheme_of(activations=7))},
    "hyperparameter": {"step": COMQ(sweeps=5)},
    "method": {"step": QDrop()},
    "fewer images": {"images": 20},
    "weights": {"net": _other_weights},
    "bias": {"net": _other_bias},
    "geometry": {"net": _other_geometry},
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_another_run_had_done_is_not_used(tmp_path: Path, what: str) -> None:
    stopped(tmp_path, 2)
    change = dict(CHANGES[what])
    net = change.pop("net", lambda net: net)(calibrated())
    context = replace(change.pop("context", context_of()), scratch=tmp_path)
    counting = Counting()
    report = walk(net, counting, context, **change)
    assert len(counting.solved) == 3
    assert not any("stopped" in note for note in report.notes)


def test_other_pixels_of_as_many_images_are_other_images(tmp_path: Path) -> None:
    stopped(tmp_path, 2)
    counting = Counting()
    images = make_images(24)
    images[-1, -1, -1, -1] += 1e-3
    context = replace(make_context(images=images), scheme=scheme_of(), scratch=tmp_path)
    walk(calibrated(), counting, context)
    assert len(counting.solved) == 3


@pytest.mark.parametrize("cut", [0, 100, -1])
def test_a_file_cut_short_is_solved_again(tmp_path: Path, cut: int) -> None:
    calm = calibrated()
    walk(calm, Counting())
    stopped(tmp_path, 2)
    second = sorted(tmp_path.rglob("*.safetensors"))[1]
    second.write_bytes(second.read_bytes()[:cut])
    net, counting = calibrated(), Counting()
    walk(net, counting, context_of(scratch=tmp_path))
    assert counting.solved == ["conv1 to conv2", "fc"]
    assert same_bits(state_of(net), state_of(calm))


def test_only_the_units_files_are_left_in_the_folder(tmp_path: Path) -> None:
    stopped(tmp_path, 2, limit_bytes=0)
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["unit-0000.safetensors", "unit-0001.safetensors"]


def test_two_steps_of_a_recipe_keep_apart(tmp_path: Path) -> None:
    steps = (*STEPS, {"use": "comq"}, {"use": "qdrop", "iterations": 6, "batch": 8})
    scheme = scheme_of().model_copy(update={"rules": (Rule(match="first", weights=coarse(8)),)})
    recipe = Recipe(name="test", scheme=scheme, steps=steps)
    calm, _ = run_recipe(recipe, make_net("residual"), context_of())
    _, reports = run_recipe(recipe, make_net("residual"), context_of(scratch=tmp_path))
    assert not any("stopped" in note for report in reports for note in report.notes)
    net, reports = run_recipe(recipe, make_net("residual"), context_of(scratch=tmp_path))
    said = [report.notes[0] for report in reports[-2:]]
    assert said == [f"{n} of {n} units had been done when a run was stopped" for n in (4, 3)]
    assert same_bits(state_of(net), state_of(calm))


def test_a_layer_without_bias_gets_one_for_the_mean_error_of_its_codes() -> None:
    net, context = two_weights()
    images = torch.cat(list(context.batches()))
    with torch.no_grad():
        exact = in_float(net)(images)
        COMQ(learn_scale=False)(net, context)
        (layer,) = matrices(net).values()
        assert layer.bias is not None and layer.float_bias is None
        assert float(net(images).mean()) == pytest.approx(float(exact.mean()), rel=1e-4)
        assert torch.equal(in_float(net)(images), exact)
