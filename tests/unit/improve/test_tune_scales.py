from __future__ import annotations

import pytest
import torch

from fewbit.improve.soft_rounding import FixedCodes
from fewbit.improve.tune_scales import TuneScales
from fewbit.place.quantizer import QuantConv2d, Quantizer, QuantLinear
from networks import make_context, make_images
from solved_layers import output_error, three_bit


def codes_of(net: object) -> list[torch.Tensor]:
    layers = [m for m in net.graph.modules() if isinstance(m, QuantConv2d | QuantLinear)]  # type: ignore[attr-defined]
    return [layer.weight_quantizer.codes(layer.weight.detach()) for layer in layers]


@pytest.mark.parametrize("units", ["network", "block"])
@pytest.mark.parametrize("name", ["residual", "gated"])
def test_it_brings_the_logits_nearer_and_keeps_every_code(name: str, units: str) -> None:
    before, after = three_bit(name, TuneScales(units=units))
    assert output_error(name, after) < 0.8 * output_error(name, before)
    for a, b in zip(codes_of(before), codes_of(after), strict=True):
        assert torch.equal(a, b)


def test_rates_of_zero_change_nothing() -> None:
    before, after = three_bit("residual", TuneScales(lr_scale=0, lr_step=0, lr_bias=0))
    images = make_images(8, seed=3)
    with torch.no_grad():
        assert torch.equal(before(images), after(images))


def test_each_rate_moves_its_own_numbers_only() -> None:
    before, after = three_bit("residual", TuneScales(lr_step=0, lr_bias=0))
    old = {n: m for n, m in before.graph.named_modules() if isinstance(m, Quantizer)}
    moved = {n for n, m in after.graph.named_modules() if n in old and not torch.equal(m.scale, old[n].scale)}
    assert moved and all(n.endswith("weight_quantizer") for n in moved)
    for (_, a), (_, b) in zip(before.graph.named_parameters(), after.graph.named_parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_brings_images_it_did_not_learn_from_no_nearer_is_left_as_it_was() -> None:
    net, _ = three_bit("residual", None)
    copy, images = net.clone(), make_images(8, seed=3)
    report = TuneScales(lr_scale=2.0, iterations=2)(copy, make_context(images=make_images(20)))
    assert report.notes == ("stem to fc: left as it was, images that were not learned from came no nearer",)
    with torch.no_grad():
        assert torch.equal(net(images), copy(images))


def test_scales_of_powers_of_two_stay() -> None:
    net, _ = three_bit("residual", None)
    layer = next(m for m in net.graph.modules() if isinstance(m, QuantConv2d))
    quantizer = layer.weight_quantizer
    quantizer.spec = quantizer.spec.model_copy(update={"power_of_two": True})
    quantizer.scale = torch.full_like(quantizer.scale, 0.25)
    fixed = FixedCodes(layer)
    with torch.no_grad():
        fixed.log_gain.add_(0.1)
    fixed.finish()
    assert torch.equal(quantizer.scale, torch.full_like(quantizer.scale, 0.25))
