from __future__ import annotations

import itertools

import pytest
import torch

from fewbit.errors import FewbitError
from fewbit.recipe import read_recipe, run_recipe
from fewbit.search import weight_widths
from fewbit.search.weight_widths import Widths, choose_widths
from fewbit.sensitivity.kl import kl_sensitivities
from fewbit.spec import Scheme
from networks import make_context, make_images, make_net

FEW = (2, 4, 8)


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    return list(make_images(16).split(8))


@pytest.fixture(scope="module")
def choices(images: list[torch.Tensor]) -> tuple[Widths, ...]:
    net, _ = run_recipe(read_recipe("float32"), make_net("residual"), make_context())
    return choose_widths(net, images, FEW)


def test_it_is_the_front_of_all_choices(choices: tuple[Widths, ...], images: list[torch.Tensor]) -> None:
    net, _ = run_recipe(read_recipe("float32"), make_net("residual"), make_context())
    grids = [Scheme().weights.model_copy(update={"bits": bits}) for bits in FEW]
    losses = kl_sensitivities(net, images, grids, "mse")
    sizes = {name: net.layer(name).module.weight.numel() for name in losses}  # type: ignore[union-attr,operator]
    best: dict[float, float] = {}
    for row in itertools.product(range(len(FEW)), repeat=len(sizes)):
        size = sum(sizes[name] * FEW[place] / 8 for name, place in zip(sizes, row, strict=True))
        loss = sum(losses[name][place] for name, place in zip(sizes, row, strict=True))
        best[size] = min(loss, best.get(size, float("inf")))
    assert [c.code_bytes for c in choices] == sorted(c.code_bytes for c in choices)
    for choice in choices:
        within = min(loss for size, loss in best.items() if size <= choice.code_bytes)
        assert choice.loss == pytest.approx(within, rel=1e-5)
        assert choice.code_bytes == sum(sizes[n] * bits / 8 for n, bits in choice.bits.items())
    assert choices[0].code_bytes == min(best) and set(choices[0].bits.values()) == {2}


def test_it_reads_back_from_json(choices: tuple[Widths, ...]) -> None:
    assert all(Widths.model_validate_json(c.model_dump_json()) == c for c in choices)


def test_it_says_what_it_would_take_where_there_is_no_time(
    images: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _ = run_recipe(read_recipe("float32"), make_net("residual"), make_context())
    monkeypatch.setattr(weight_widths, "_seconds", lambda *_: 10.0)
    said = r"^the sensitivities of 4 layers at 3 widths take about 70 s and 60 s may be spent on them; give "
    with pytest.raises(FewbitError, match=said + "more --minutes$"):
        choose_widths(net, images, FEW, limit_s=60.0)
    assert choose_widths(net, images[:1], (8,), limit_s=60.0)
