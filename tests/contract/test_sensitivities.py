"""What holds for every sensitivity of the registry; a new row is tested by being there."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fewbit.cli.lists import describe
from fewbit.errors import DataError, FewbitError, NetworkError, RecipeError
from fewbit.net import Net
from fewbit.place.regions import Region
from fewbit.registry import ROWS, find
from fewbit.sensitivity.score import LabelledBatch, Sensitivities, Sensitivity
from fewbit.spec import Frozen, QuantSpec
from networks import NETWORKS, make_images, make_net, quantize
from scored import WIDTHS, folded, labelled, regions

SENSITIVITIES = tuple(ROWS["sensitivity"])
QUICK: dict[str, dict[str, Any]] = {"hessian": {"samples": 3}}
LABELLED = ("drop",)


def row_of(name: str) -> Sensitivity:
    found: Sensitivity = find("sensitivity", name).from_data(QUICK.get(name, {}))
    return found


def scored(name: str, net: Net, batches: list[LabelledBatch] | None = None, seed: int = 0) -> Sensitivities:
    return row_of(name).score(net, batches or labelled(net), regions(net), WIDTHS, seed)


def result(found: Sensitivities) -> Sensitivities:
    """Return what does not depend on the machine."""
    return found.model_copy(update={"seconds": 0.0})


def set_weights(net: Net, low: int, high: int) -> None:
    """Set every weight to a whole number whose channels all reach `high`."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in net.layers():
            if isinstance(layer.module, nn.Conv2d | nn.Linear):
                weight = layer.module.weight
                weight.copy_(torch.randint(low, high + 1, weight.shape, generator=generator))
                weight.flatten(1)[:, 0] = high


@pytest.fixture(params=SENSITIVITIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_its_hyperparameters_come_back_from_toml_and_json(name: str) -> None:
    row: type[Frozen] = find("sensitivity", name)
    given = row.from_data(QUICK.get(name, {}) | {"ranges": "mse"})
    for one in (row(), given):
        assert row.from_toml(one.to_toml()) == one
        assert row.from_data(json.loads(one.model_dump_json())) == one
        assert row.from_toml(one.to_toml()).digest() == one.digest()
    assert given != row()
    if "activations" in row.model_fields:
        coarse = row.from_data({"activations": {"bits": 4}})
        assert row.from_toml(coarse.to_toml()) == coarse != row()


def test_it_says_what_it_is_where_it_is_from_and_how_it_differs(name: str) -> None:
    row: type[Frozen] = find("sensitivity", name)
    what, source = describe(row)
    text = inspect.getdoc(row) or ""
    assert what.endswith(".") and len(what) < 110 and "Differs:" in text
    assert "arXiv" in source or re.search(r"19\d\d|20\d\d", source)
    assert all(f"{field}:" in text for field in row.model_fields)


def test_unknown_hyperparameters_are_told(name: str) -> None:
    row: type[Frozen] = find("sensitivity", name)
    with pytest.raises(RecipeError, match="unknown key 'sample'"):
        row.from_data({"sample": 1})


@pytest.mark.parametrize("network", NETWORKS)
def test_each_region_has_a_number_for_each_width(name: str, network: str) -> None:
    net = folded(network)
    found = scored(name, net)
    assert list(found.losses) == [region.name for region in regions(net)]
    assert found.widths == WIDTHS and found.images == 6
    assert all(len(row) == len(WIDTHS) for row in found.losses.values())
    assert found.forwards > 1 and found.seconds > 0 and found.unit
    assert (found.counts is None) == (name != "drop")


def test_the_answer_comes_back_from_json(name: str) -> None:
    found = scored(name, folded("residual"))
    assert Sensitivities.from_data(json.loads(found.model_dump_json())) == found


def test_the_callers_network_is_untouched(name: str) -> None:
    net = folded("gated").train()
    first = next(iter(net.graph.parameters()))
    first.requires_grad_(False)
    before = {key: value.clone() for key, value in net.graph.state_dict().items()}
    asks = {key: value.requires_grad for key, value in net.graph.named_parameters()}
    text = repr(net)
    batches = labelled(net)
    kept = [images.clone() for images, _ in batches]
    scored(name, net, batches)
    assert repr(net) == text and net.graph.training
    assert all(torch.equal(value, before[key]) for key, value in net.graph.state_dict().items())
    assert {key: value.requires_grad for key, value in net.graph.named_parameters()} == asks
    assert all(parameter.grad is None for parameter in net.graph.parameters())
    assert all(torch.equal(images, one) for (images, _), one in zip(batches, kept, strict=True))


def test_same_seed_same_bits(name: str) -> None:
    net = folded("depthwise")
    first, second = (result(scored(name, net, seed=7)) for _ in range(2))
    assert first == second
    other = result(scored(name, net, seed=8))
    assert (other == first) == (name not in ("hessian", "fisher"))


def test_it_does_not_depend_on_the_callers_random_state_or_gradient_mode(name: str) -> None:
    net = folded("residual")
    torch.manual_seed(1)
    expected = result(scored(name, net))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert result(scored(name, net)) == expected
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("width", "low", "high"), [(0, -1, 1), (2, -127, 127)])
def test_weights_that_are_on_the_grid_cost_nothing(name: str, width: int, low: int, high: int) -> None:
    net = folded("residual")
    set_weights(net, low, high)
    found = row_of(name).score(net, labelled(net), regions(net), [WIDTHS[width]])
    assert set(found.losses.values()) == {(0.0,)}


def test_a_finer_width_is_never_worse_on_average(name: str) -> None:
    for network in NETWORKS:
        net = folded(network)
        mean = np.mean(list(scored(name, net, labelled(net, 24, 8)).losses.values()), axis=0)
        assert mean[0] > mean[1] > mean[2] > 0, (network, mean)
        assert name == "drop" or mean[0] > 4 * mean[1] > 16 * mean[2], (network, mean)


def test_a_region_without_weights_costs_nothing_and_one_of_all_costs_most(name: str) -> None:
    net = folded("residual")
    every = Region("every", tuple(layer.name for layer in net.layers()))
    none, one = Region("none", ("relu", "add")), Region("one", ("conv1", "relu_1"))
    found = row_of(name).score(net, labelled(net), [none, one, every], WIDTHS).losses
    assert found["none"] == (0.0, 0.0, 0.0)
    assert name == "drop" or all(a < b for a, b in zip(found["one"], found["every"], strict=True))


def test_a_regions_number_does_not_depend_on_the_others(name: str) -> None:
    net = folded("residual")
    alone = row_of(name).score(net, labelled(net), regions(net)[1:2], WIDTHS[1:])
    whole = scored(name, net)
    (row,) = alone.losses.values()
    if name == "hessian":  # its vectors are drawn in turn for all layers
        assert all(value > 0 for value in row)
    else:
        assert row == whole.losses["conv1"][1:]


@pytest.mark.parametrize("method", [name for name in SENSITIVITIES if name != "hessian"])
def test_the_cut_into_batches_does_not_count(method: str) -> None:
    net = folded("residual")
    images = make_images(6)
    ways = [labelled(net, 6, batch) for batch in (6, 4, 1)]
    rows = [scored(method, net, batches).losses for batches in (*ways, [(images[:0], None), *ways[0]])]
    for other in rows[1:]:
        assert list(other) == list(rows[0])
        for key, row in other.items():
            assert row == pytest.approx(rows[0][key], rel=2e-3)


def test_ranges_of_weights_are_those_of_the_method_given(name: str) -> None:
    net = folded("residual")
    row = find("sensitivity", name).from_data(QUICK.get(name, {}) | {"ranges": "mse"})
    found = row.score(net, labelled(net), regions(net), WIDTHS)
    assert found.losses != scored(name, net).losses
    wrong = find("sensitivity", name).from_data(QUICK.get(name, {}) | {"ranges": "minmaks"})
    with pytest.raises(RecipeError, match="ranges: no 'minmaks'"):
        wrong.score(net, labelled(net), regions(net), WIDTHS)


def test_it_tells_how_far_it_is(name: str) -> None:
    told: list[float] = []
    net = folded("residual")
    row_of(name).score(net, labelled(net), regions(net), WIDTHS, 0, told.append)
    assert told == sorted(told) and len(told) > 1 and told[0] > 0 and told[-1] == 1.0


def test_labels_are_asked_for_only_where_they_are_needed(name: str) -> None:
    net = folded("residual")
    bare: list[LabelledBatch] = [(images, None) for images, _ in labelled(net)]
    mixed = [labelled(net)[0], bare[1]]
    if name not in LABELLED:
        scored(name, net, bare)
        scored(name, net, mixed)
        return
    for batches, which in ((bare, 1), (mixed, 2)):
        with pytest.raises(
            DataError, match=f"Drop sensitivity: batch {which} of 2 has no labels; give labelled images, or"
        ):
            scored(name, net, batches)


def refused(name: str, kind: type[FewbitError], text: str, net: Net, **changed: Any) -> None:
    given: dict[str, Any] = {"batches": labelled(folded("residual")), "widths": WIDTHS} | changed
    given.setdefault("regions", [Region("conv1", ("conv1",))])
    called = type(row_of(name)).__name__
    with pytest.raises(kind, match=re.escape(text.replace("ROW", f"{called} sensitivity"))):
        row_of(name).score(net, **given)


def test_networks_that_cannot_be_scored_are_told(name: str) -> None:
    text = "residual: is quantized already; give the float network"
    refused(name, RecipeError, text, quantize("residual"))
    text = "residual: its BatchNorms are not folded; run the recipe 'float32' on it first"
    refused(name, RecipeError, text, make_net("residual"))
    broken = folded("residual")
    with torch.no_grad():
        broken.layer("fc").module.bias[0] = float("inf")  # type: ignore[index,operator,union-attr]
    batches = labelled(folded("residual"), 6, 6)
    text = "images are not finite; check the network's weights and the card's scale, mean and std"
    refused(name, NetworkError, text, broken, batches=batches)
    with torch.no_grad():
        broken.layer("conv1").module.weight[0] = float("nan")  # type: ignore[index,operator,union-attr]
    refused(name, NetworkError, "not finite", broken)


def test_images_and_labels_that_do_not_fit_are_told(name: str) -> None:
    net = folded("residual")
    ((images, labels),) = labelled(net, 4, 4)
    assert labels is not None
    text = "ROW: no image came; give at least one, or distil some"
    refused(name, DataError, text, net, batches=[])
    refused(name, DataError, text, net, batches=[(images[:0], labels[:0])])
    text = "ROW: batch 1 of 1 has images of shape (4, 3, 16); give (N, C, H, W) with (C, H, W) = (3, 16, 16)"
    refused(name, DataError, text, net, batches=[(images[..., 0], labels)])
    text = "ROW: batch 1 of 1 has 4 images and labels of shape (3,); give one label an image"
    refused(name, DataError, text, net, batches=[(images, labels[:3])])
    text = (
        "ROW: batch 1 of 1 has labels from 5 to 5, the network has classes 0 to 4; check its card's classes"
    )
    refused(name, DataError, text, net, batches=[(images, torch.full((4,), 5))])


def test_regions_and_widths_that_do_not_fit_are_told(name: str) -> None:
    net = folded("residual")
    refused(name, RecipeError, "ROW: 0 regions and 3 widths; give one of each or more", net, regions=[])
    refused(name, RecipeError, "ROW: 1 regions and 0 widths; give one of each or more", net, widths=[])
    twice = [Region("a", ("conv1",)), Region("a", ("conv2",))]
    text = "ROW: region 'a' comes twice; give each region a name of its own"
    refused(name, RecipeError, text, net, regions=twice)
    text = "residual: has no layer 'conv9'; `fewbit inspect` lists them"
    refused(name, RecipeError, text, net, regions=[Region("a", ("conv9",))])
    text = "ROW: key 'weights' is"
    refused(name, RecipeError, text, net, widths=[QuantSpec(bits=1)])
