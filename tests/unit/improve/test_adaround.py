from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from calibrated import (
    H,
    calibrated,
    context_of,
    cost_of,
    matrices,
    same_bits,
    scheme_of,
    state_of,
    two_weights,
)
from fewbit.errors import RecipeError
from fewbit.improve.adaround import AdaRound
from fewbit.improve.soft_rounding import SoftRounding
from networks import NETWORKS
from solved_layers import output_error

QUICK = AdaRound(iterations=120, batch=12)


def test_worked_costs_of_two_weights() -> None:
    found = {}
    for ups in itertools.product((0, 1), repeat=2):
        dw = torch.tensor(ups, dtype=torch.float64) - 0.4
        found[ups] = float(dw @ H.double() @ dw)
    expected = {(0, 0): 0.608, (1, 0): 0.088, (0, 1): 0.088, (1, 1): 1.368}
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_best_rounding_of_two_weights_that_nearest_misses(seed: int) -> None:
    net, context = two_weights()
    assert cost_of(net) == pytest.approx(0.608, rel=1e-5)
    report = AdaRound(regularization=0.3)(net, replace(context, seed=seed))
    assert cost_of(net) == pytest.approx(0.088, rel=1e-5)
    assert report.changed == 1 and report.notes == ()


@pytest.mark.parametrize("name", NETWORKS)
def test_it_brings_the_networks_output_nearer(name: str) -> None:
    net = calibrated(name)
    before = output_error(name, net)
    QUICK(net, context_of(32))
    assert output_error(name, net) < 0.8 * before


def test_each_weight_goes_to_the_code_below_or_above_and_nothing_else_changes() -> None:
    net = calibrated()
    before = state_of(net)
    QUICK(net, context_of())
    after = state_of(net)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {key for key in after if key not in before} == {
        f"{name}.weight_quantizer.assigned" for name in matrices(net)
    }
    for layer in matrices(net).values():
        scale, _ = layer.weight_quantizer.grid(layer.weight.dim())
        steps = (layer.weight.detach() / scale).clamp(-3, 3)
        codes = layer.weight_quantizer.assigned
        assert codes is not None and float((codes - steps).abs().max()) <= 1 + 1e-4
        assert 0.002 < float((codes != steps.round()).float().mean()) < 0.5  # some, not all, are turned


def test_nearly_every_weight_has_decided_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []
    plain = SoftRounding.finish

    def finish(self: SoftRounding) -> float:
        up = self.up().detach()
        left.append(float(((up > 0.05) & (up < 0.95)).float().mean()))
        return plain(self)

    monkeypatch.setattr(SoftRounding, "finish", finish)
    report = AdaRound(batch=8)(calibrated("branches"), context_of())
    assert len(left) == 5 and max(left) < 0.01 and report.notes == ()


def test_it_is_told_when_weights_have_not_decided() -> None:
    report = AdaRound(iterations=10, batch=8)(calibrated(), context_of())
    assert [note.partition(":")[0] for note in report.notes] == ["stem", "conv1", "conv2", "fc"]
    assert all(note.endswith("of a layer's weights leant neither up nor down") for note in report.notes)


def test_asymmetric_weights_and_one_scale_a_tensor() -> None:
    for more in ({"symmetric": False}, {"granularity": "tensor"}):
        weights = scheme_of().weights.model_copy(update=more)
        scheme = scheme_of().model_copy(update={"weights": weights})
        net = calibrated(scheme=scheme)
        before = output_error("residual", net)
        QUICK(net, context_of(scheme=scheme))
        assert output_error("residual", net) < before


def test_after_codes_that_another_step_chose_it_starts_there() -> None:
    net = calibrated()
    layer = matrices(net)["fc"]
    chosen = layer.weight_quantizer.codes(layer.weight.detach()) * -1
    layer.weight_quantizer.assign(chosen)
    AdaRound(iterations=1, lr_rounding=1e-6, batch=4)(net, context_of())
    assert layer.weight_quantizer.assigned is not None
    assert torch.equal(layer.weight_quantizer.assigned, chosen)


def test_layers_left_in_float_stay_as_they_are() -> None:
    scheme = scheme_of().from_data(
        scheme_of().model_dump() | {"rules": [{"match": "conv1", "keep_float": True}]}
    )
    net = calibrated(scheme=scheme)
    before = state_of(net)
    report = AdaRound(iterations=5, batch=4)(net, context_of(scheme=scheme))
    after = state_of(net)
    assert report.changed == 3 and "conv1.weight" in after
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith("conv1"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("images", 0),
        ("iterations", 0),
        ("batch", 0),
        ("values", 0),
        ("lr_rounding", 0.0),
        ("regularization", -0.1),
        ("warm_up", 1.0),
        ("beta_start", 0.5),
        ("beta_end", 0.5),
    ],
)
def test_hyperparameters_have_limits(key: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"adaround: key '{key}' is {value}: input should be"):
        AdaRound.from_data({key: value}, "adaround")


def test_it_changes_the_caller_nothing_twice() -> None:
    states = []
    for _ in range(2):
        net = calibrated("depthwise")
        AdaRound(iterations=20, batch=8)(net, context_of())
        states.append(state_of(net))
    assert same_bits(*states)
