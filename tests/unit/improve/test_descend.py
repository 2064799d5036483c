from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from calibrated import at_unit, calibrated, context_of, matrices, same_bits, scheme_of, state_of
from fewbit.improve.descend import Descent, _Walk, descend
from fewbit.improve.learned_step import LearnedStep
from fewbit.improve.reconstruct import Problem
from fewbit.improve.soft_rounding import starting_v, undecided
from fewbit.net import Net
from fewbit.place.quantizer import Quantizer

BLOCK = "conv1 to conv2"


def how(**more: Any) -> Descent:
    return Descent.model_validate(
        {"iterations": 20, "batch": 8, "values": 1 << 30, "lr_rounding": 0.1, **more}
    )


def learned(
    settings: Descent,
    name: str = BLOCK,
    net: Net | None = None,
    weights: Callable[[Tensor], Tensor] | None = None,
    prepare: Callable[[Problem], None] = lambda _: None,
) -> Net:
    """Return a network after a descent in one of its units."""
    made = net or calibrated()

    def learn(problem: Problem) -> None:
        prepare(problem)
        descend(problem, settings, weights)

    at_unit(made, name, learn)
    return made


def losses(settings: Descent, name: str = BLOCK, net: Net | None = None) -> list[float]:
    """Return the loss of each iteration, by what the optimizer is told to go down."""
    found: list[float] = []
    plain = Tensor.backward

    def backward(self: Tensor, *given: Any, **more: Any) -> None:
        found.append(float(self.detach()))
        plain(self, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "backward", backward)
        learned(settings, name, net)
    return found


def run_by_hand(problem: Problem, which: Tensor, rounding: bool, inputs: str) -> dict[fx.Node, Tensor]:
    """Run a unit as the network itself does, with or without its quantizers of activations."""
    source = problem.rounded if inputs == "rounded" else problem.exact
    values = {node: source.take(node, which) for node in problem.unit.inputs}
    for node in problem.unit.nodes:
        module = problem.net.graph.get_submodule(str(node.target))
        given = [values[one] for one in node.all_input_nodes]
        skipped = isinstance(module, Quantizer) and not (rounding or node in problem.unit.outputs)
        values[node] = given[0] if skipped else module(*given)
    return values


def distance(problem: Problem, values: dict[fx.Node, Tensor], which: Tensor) -> float:
    total = 0.0
    for node in problem.unit.outputs:
        error = (values[node] - problem.exact.take(node, which)).square()
        total += float(error.sum(1).mean())  # summed over channels, averaged over images and positions
    return total


@pytest.mark.parametrize("name", ["stem", BLOCK, "fc"])
def test_the_loss_is_the_squared_distance_summed_over_channels(name: str) -> None:
    settings = how(rounding=False, lr_rounding=0, lr_bias=1e-3, iterations=1, batch=24)
    wanted: list[float] = []

    def check(problem: Problem) -> None:
        generator = torch.Generator().manual_seed(problem.generator.initial_seed())
        chosen = torch.randint(0, 24, (24,), generator=generator)
        wanted.append(distance(problem, run_by_hand(problem, chosen, True, "rounded"), chosen))

    at_unit(calibrated(), name, check)
    assert losses(settings, name)[0] == pytest.approx(wanted[0], rel=1e-4)


def test_the_regulariser_comes_after_the_warm_up_with_its_lambda() -> None:
    plain = losses(how(iterations=10, lr_rounding=1e-9, warm_up=0.3))
    found = losses(how(iterations=10, lr_rounding=1e-9, warm_up=0.3, regularization=0.5))
    net, expected = calibrated(), 0.0
    for name in ("conv1", "conv2"):
        layer = matrices(net)[name]
        steps = (layer.weight.detach() / layer.weight_quantizer.grid(4)[0]).clamp(-3, 3)
        fraction = steps - torch.minimum(steps.floor(), torch.tensor(2.0))
        expected += float(undecided(fraction.clamp(1e-4, 1 - 1e-4), 20.0))
    added = [a - b for a, b in zip(found, plain, strict=True)]
    assert added[:3] == pytest.approx([0, 0, 0], abs=1e-3)
    assert added[3] == pytest.approx(0.5 * expected, rel=1e-4)
    assert added[4] < added[3] and added[9] < 0.95 * added[3]  # beta falls, and so does each term


def test_share_1_is_full_rounding_bit_for_bit() -> None:
    common: dict[str, Any] = {"lr_step": 0.01, "lr_bias": 0.003, "regularization": 0.02}
    dropped = learned(how(activations="dropped", share=1.0, **common))
    assert same_bits(state_of(dropped), state_of(learned(how(activations="rounded", **common))))
    half = learned(how(activations="dropped", share=0.5, **common))
    assert not same_bits(state_of(dropped), state_of(half))


def test_share_0_is_float_activations_bit_for_bit() -> None:
    def from_float(problem: Problem) -> None:
        for node in problem.unit.inputs:
            every = problem.exact.take(node, slice(0, problem.images)).clone()
            problem.rounded.drop(node)
            problem.rounded.put(node, every, 0, problem.images)

    # The last unit has no quantizer at its output, which is rounded whatever the share.
    states = []
    for activations, prepare in (
        ("dropped", lambda _: None),
        ("float", from_float),
        ("rounded", lambda _: None),
    ):
        settings = how(activations=activations, share=0.0, lr_bias=0.01)
        net = calibrated(scheme=scheme_of(activations=3))
        states.append(state_of(learned(settings, "fc", net, prepare=prepare)))
    assert same_bits(states[0], states[1]) and not same_bits(states[0], states[2])


@pytest.mark.parametrize(("share", "rounding", "inputs"), [(0.0, False, "exact"), (1.0, True, "rounded")])
def test_the_first_loss_of_both_ends_by_hand(share: float, rounding: bool, inputs: str) -> None:
    settings = how(
        activations="dropped", share=share, rounding=False, lr_rounding=0, lr_bias=1e-3, iterations=1
    )
    wanted: list[float] = []

    def check(problem: Problem) -> None:
        generator = torch.Generator().manual_seed(problem.generator.initial_seed())
        chosen = torch.randint(0, 24, (8,), generator=generator)
        wanted.append(distance(problem, run_by_hand(problem, chosen, rounding, inputs), chosen))

    at_unit(calibrated(), BLOCK, check)
    assert losses(settings)[0] == pytest.approx(wanted[0], rel=1e-4)


EACH = 8 * 16 * 16 * 16  # values of the block's nodes for one image


@pytest.mark.parametrize(
    ("batch", "values", "images"),
    [
        (8, 99 * EACH, 8),
        (32, 99 * EACH, 24),
        (16, 10 * EACH, 10),
        (16, 10 * EACH - 1, 9),
        (16, EACH, 4),
        (2, 1, 2),
    ],
)
def test_large_tensors_take_fewer_images_but_never_under_4(batch: int, values: int, images: int) -> None:
    seen: list[Tensor] = []

    def weights(chosen: Tensor) -> Tensor:
        seen.append(chosen)
        return torch.ones(())

    learned(how(batch=batch, values=values, iterations=3), weights=weights)
    assert [len(chosen) for chosen in seen] == [images] * 3
    assert not torch.equal(seen[0], seen[1])
    assert all(int(chosen.min()) >= 0 and int(chosen.max()) < 24 for chosen in seen)


def test_what_weighs_nothing_changes_nothing() -> None:
    before = matrices(calibrated())["fc"].bias.detach()
    settings, found = how(rounding=False, lr_rounding=0, lr_bias=0.01), []
    for factors in (F.one_hot(torch.tensor(0), 5).float(), torch.ones(5)):
        net = learned(settings, "fc", weights=partial(_given, factors))
        found.append(matrices(net)["fc"].bias.detach())
    assert torch.equal(found[0][1:], before[1:]) and bool((found[1] != before).all())
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-6) != float(before[0])


def _given(factors: Tensor, chosen: Tensor) -> Tensor:
    return factors


def test_what_has_no_learning_rate_stays() -> None:
    before = state_of(calibrated())
    for rates, kept in (
        ({"lr_rounding": 0.1}, ("scale", "bias")),
        ({"lr_rounding": 0.1, "lr_bias": 0.01}, ("scale",)),
        ({"lr_rounding": 0.1, "lr_step": 0.01}, ("bias", "weight_quantizer.scale")),
        ({"rounding": False, "lr_rounding": 0, "lr_scale": 0.01}, ("bias", "zero_point")),
        ({"rounding": False, "lr_rounding": 0, "lr_bias": 0.01}, ("scale", "zero_point")),
    ):
        net = learned(how(**rates))
        after = state_of(net)
        assert all(torch.equal(after[k], v) for k, v in before.items() if k.endswith(kept)), rates
        changed = {k for k, v in after.items() if k not in before or not torch.equal(v, before[k])}
        assert any(key.startswith(("conv", "quantizers")) for key in changed), rates


def test_without_any_learning_rate_nothing_is_done() -> None:
    before = state_of(calibrated())
    assert same_bits(state_of(learned(how(lr_rounding=0))), before)


def test_the_steps_of_the_units_inputs_stay() -> None:
    net = calibrated()
    before = state_of(net)
    after = state_of(learned(how(lr_step=0.05), net=net))
    moved = {key for key in before if key.endswith("scale") and not torch.equal(before[key], after[key])}
    assert moved == {f"quantizers.{name}.scale" for name in ("relu_1", "conv2", "relu_2")}


def test_scales_that_are_powers_of_two_stay() -> None:
    powers = {"power_of_two": True}
    scheme = scheme_of()
    scheme = scheme.model_copy(
        update={
            "weights": scheme.weights.model_copy(update=powers),
            "activations": scheme.activations.model_copy(update=powers),
        }
    )
    net = calibrated(scheme=scheme)
    before = state_of(net)
    settings = how(lr_step=0.05, lr_bias=0.01)
    after = state_of(learned(settings, net=net))
    assert all(torch.equal(after[key], before[key]) for key in before if key.endswith("scale"))
    assert matrices(net)["conv1"].weight_quantizer.assigned is not None
    again = how(rounding=False, lr_rounding=0, lr_scale=0.05, lr_step=0.05, lr_bias=0.01)
    after = state_of(learned(again, net=net))
    assert all(torch.equal(after[key], before[key]) for key in before if key.endswith("scale"))


@pytest.mark.parametrize("name", ["stem", BLOCK])
def test_the_loss_falls(name: str) -> None:
    net = calibrated()
    for layer in matrices(net).values():
        codes = layer.weight_quantizer.codes(layer.weight.detach())
        layer.weight_quantizer.assign(codes, 1.3 * layer.weight_quantizer.scale)
    settings = how(iterations=60, lr_step=0.01, lr_bias=0.003, rounding=False, lr_scale=0.02)
    found = losses(settings, name, net)
    assert sum(found[-10:]) < 0.6 * sum(found[:10])


def test_weights_that_lean_to_neither_side_are_told_of() -> None:
    said: list[str] = []
    strong = {"iterations": 500, "regularization": 0.1, "lr_rounding": 0.3, "activations": "float"}
    for settings in (how(iterations=1), how(**strong)):
        at_unit(calibrated(), "fc", lambda problem, one=settings: said.append(descend(problem, one)))
    share, _, rest = said[0].partition("%")
    assert rest == " of a layer's weights leant neither up nor down"
    assert share.startswith("fc: ") and 50 < int(share.removeprefix("fc: ")) <= 100
    assert said[1] == ""


def test_progress_is_told() -> None:
    told: list[float] = []
    context = context_of(advance=lambda _, share: told.append(share))

    def learn(problem: Problem) -> None:
        begin = len(told)
        descend(problem, how(iterations=5))
        assert len(told) == begin + 5 and told[begin:] == sorted(told[begin:])

    at_unit(calibrated(), BLOCK, learn, context)


def test_v_starts_where_the_worked_numbers_say() -> None:
    assert float(starting_v(torch.tensor(0.25))) == pytest.approx(-0.887303, rel=1e-5)


@pytest.mark.parametrize("case", ["skipped", "signed grid", "float inside", "read by another too"])
def test_a_relu_is_skipped_where_only_a_grid_from_zero_reads_it(case: str) -> None:
    found: list[bool] = []

    def look(problem: Problem) -> None:
        quantizers = {node: problem.net.graph.get_submodule(str(node.target)) for node in problem.unit.nodes}
        relu = next(node for node in quantizers if isinstance(quantizers[node], torch.nn.ReLU))
        if case == "signed grid":
            for user in relu.users:
                quantizer = quantizers[user]
                assert isinstance(quantizer, Quantizer)
                quantizer.set_range(-1.0, 1.0)
        steps = {quantizer: LearnedStep(quantizer) for quantizer in problem.quantizers()}
        walk = _Walk(problem, how(activations="float" if case == "float inside" else "rounded"), {}, steps)
        last = list(problem.unit.layers)[-1]
        args = last.args
        if case == "read by another too":
            last.args = (*args, relu)
        found.append(relu in walk._idle())
        last.args = args

    at_unit(calibrated(), BLOCK, look)
    assert found == [case == "skipped"]
