from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fewbit.errors import RecipeError
from fewbit.net import Net
from fewbit.place.power_quantizer import PowerQuantizer
from fewbit.place.quantizer import Quantizer
from fewbit.place.regions import Region
from fewbit.ranges.calibrate import method
from fewbit.sensitivity.one_region import OneRegion, Walk, products, rounded_layer
from fewbit.sensitivity.score import LabelledBatch, ask
from fewbit.spec import QuantSpec
from networks import NETWORKS, make_images
from scored import WIDTHS, folded, labelled, regions


def by_hand(
    net: Net, region: Region, width: QuantSpec, images: Tensor, activations: QuantSpec | None = None
) -> Tensor:
    """Return the logits of a copy in which one region's layers were replaced, run from the image on."""
    copy, generator = net.clone(), method("minmax", {})
    for name in region.layers:
        layer = copy.layer(name)
        if not isinstance(layer.module, nn.Conv2d | nn.Linear):
            continue
        made: nn.Module = rounded_layer(layer, width, "minmax")
        if activations is not None:
            source = layer.node.all_input_nodes[0]
            finder = generator.start("x")
            finder.observe(value_of(net, source.name, images))
            quantizer = Quantizer(activations, "x")
            found = finder.find(activations)
            quantizer.set_range(found.low, found.high)
            made = nn.Sequential(quantizer, made)
        parent, _, leaf = name.rpartition(".")
        setattr(copy.graph.get_submodule(parent), leaf, made)
    with torch.no_grad():
        return copy(images)


def value_of(net: Net, name: str, images: Tensor) -> Tensor:
    """Return the value of a node, by the node's name."""

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.name == name:
                kept.append(value)
            return value

    kept: list[Tensor] = []
    with torch.no_grad():
        Keep(net.graph).run(images)
    return kept[0]


@pytest.mark.parametrize("activations", [None, QuantSpec(bits=4)])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_behind_the_float_prefix_is_that_of_the_whole_network(
    name: str, activations: QuantSpec | None
) -> None:
    net, images = folded(name), make_images(5)
    question = ask("KL", net, [(images, None)], regions(net), WIDTHS[:2])
    seen = list(Walk(question, OneRegion(activations=activations)).run())
    assert [one.place for one in seen] == [(r, w) for r in range(len(question.regions)) for w in range(2)]
    for one in seen:
        region, width = question.regions[one.place[0]], WIDTHS[one.place[1]]
        expected = by_hand(net, region, width, images, activations)
        torch.testing.assert_close(one.found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.exact, net(images).detach(), rtol=0, atol=0)
        assert not torch.equal(one.found, one.exact)


def test_what_the_region_reads_is_rounded_for_itself_alone() -> None:
    """The residual sum still reads the float tensor that the region's first layer reads rounded."""
    net, images = folded("residual"), make_images(4)
    coarse, fine = QuantSpec(bits=2), WIDTHS[2]
    region = Region("conv1", ("conv1",))
    question = ask("KL", net, [(images, None)], [region], [fine])
    (one,) = Walk(question, OneRegion(activations=coarse)).run()
    relu = value_of(net, "relu", images)
    quantizer = Quantizer(coarse, "relu")
    quantizer.set_range(0.0, float(relu.max()))
    conv1 = rounded_layer(net.layer("conv1"), fine, "minmax")
    with torch.no_grad():
        inner = net.layer("conv2").module(torch.relu(conv1(quantizer(relu))))
        expected = net.layer("fc").module(torch.relu(relu + inner).mean((2, 3)))
    torch.testing.assert_close(one.found, expected, rtol=1e-5, atol=1e-5)


def test_ranges_of_activations_are_those_of_all_batches() -> None:
    net = folded("residual")
    batches: list[LabelledBatch] = [(part, None) for part in make_images(6).split(2)]
    batches[2] = (batches[2][0] * 10, None)
    question = ask("KL", net, batches, regions(net), WIDTHS[:1])
    walk = Walk(question, OneRegion(activations=QuantSpec(bits=8)))
    grids = {q.name: q.range() for q in walk._calibrate(QuantSpec(bits=8)).values()}
    largest = max(float(images.max()) for images, _ in batches)
    assert set(grids) == {"input", "relu", "relu_1", "mean_flatten"}
    assert grids["input"][1] == pytest.approx(largest, rel=0.01)


def test_the_cost_is_counted_in_runs_of_the_whole_network() -> None:
    net = folded("residual")
    stem, conv, fc = 16 * 256 * 27, 16 * 256 * 144, 5 * 16
    whole = stem + 2 * conv + fc
    behind = {"stem": whole, "conv1": 2 * conv + fc, "conv2": conv + fc, "fc": fc}
    question = ask("KL", net, labelled(net, 6, 4), regions(net), WIDTHS)
    walk = Walk(question, OneRegion())
    assert len(list(walk.run())) == 2 * 4 * 3
    assert walk.forwards == pytest.approx(1 + 3 * sum(behind.values()) / whole)
    calibrated = Walk(question, OneRegion(activations=QuantSpec(bits=8)))
    list(calibrated.run())
    assert calibrated.forwards == pytest.approx(walk.forwards + 1)


def test_multiplications_of_an_image() -> None:
    assert products(nn.Conv2d(4, 8, 3, groups=2), torch.zeros(7, 8, 5, 5)) == 8 * 25 * 2 * 9
    assert products(nn.Linear(3, 2), torch.zeros(7, 2)) == 6
    assert products(nn.ReLU(), torch.zeros(7, 2)) == 0


def test_weights_on_a_power_grid_take_the_method_that_finds_it() -> None:
    layer = folded("residual").layer("conv1")
    spec = QuantSpec(bits=4, symmetric=True, signed=True, granularity="channel", grid="power")
    made = rounded_layer(layer, spec, "requant")
    assert isinstance(made.weight_quantizer, PowerQuantizer)
    with pytest.raises(RecipeError, match="only the range method 'requant' finds"):
        rounded_layer(layer, spec, "minmax")


def test_a_grid_that_activations_cannot_have_is_told() -> None:
    net = folded("residual")
    question = ask("KL", net, labelled(net), regions(net), WIDTHS)
    walk = Walk(question, OneRegion(activations=QuantSpec(granularity="channel")))
    with pytest.raises(RecipeError, match=r"KL sensitivity: key 'activations' .* have one scale a tensor"):
        next(walk.run())
