from __future__ import annotations

import pytest
import torch

from fewbit.errors import NetworkError, RecipeError
from fewbit.place.regions import Region
from fewbit.sensitivity.score import PairedCounts, Sensitivities, activation_grid, ask
from fewbit.spec import QuantSpec
from networks import make_images
from scored import WIDTHS, folded, labelled, regions


def test_a_question_knows_its_images_layers_and_grids() -> None:
    net = folded("residual")
    batches = [*labelled(net, 6, 4), (make_images(3)[:0], None)]
    unsigned = QuantSpec(bits=3, symmetric=True)
    question = ask("KL", net, batches, [Region("a", ("conv1", "relu_1")), Region("b", ("add",))], [unsigned])
    assert question.images == 6 and len(question.batches) == 2
    assert list(question.layers) == ["conv1"]
    assert [len(layers) for layers in question.matrices.values()] == [1, 0]
    assert question.widths == (unsigned.model_copy(update={"signed": True}),)
    assert question.net is not net and question.layers["conv1"].module is not net.layer("conv1").module


def test_an_answer_has_a_row_for_each_region() -> None:
    net = folded("residual")
    question = ask("KL", net, labelled(net), regions(net)[:2], WIDTHS)
    counts = {name: (PairedCounts(images=6, losses=1, gains=0),) * 3 for name in ("stem", "conv1")}
    found = question.answer("nats", [[3, 2, 1], [6.0, 5.0, 4.0]], 2.5, counts)
    assert found.losses == {"stem": (3.0, 2.0, 1.0), "conv1": (6.0, 5.0, 4.0)}
    assert (found.unit, found.widths, found.images, found.forwards) == ("nats", WIDTHS, 6, 2.5)
    assert found.counts == counts and found.seconds > 0
    assert Sensitivities.from_toml(found.to_toml()) == found


def test_a_loss_that_is_no_number_is_told_by_its_region() -> None:
    net = folded("residual")
    question = ask("KL", net, labelled(net), regions(net)[:2], WIDTHS)
    with pytest.raises(
        NetworkError,
        match=r"KL sensitivity: the losses of region 'conv1' are \(1\.0, nan, 1\.0\), not all finite; check",
    ):
        question.answer("nats", [[1, 1, 1], [1, float("nan"), 1]], 1.0)


def test_images_whose_logits_are_no_numbers_are_counted() -> None:
    net = folded("residual")
    question = ask("KL", net, labelled(net), regions(net), WIDTHS)
    logits = torch.zeros(3, 5)
    assert question.finite(logits) is logits
    logits[1, 2] = float("nan")
    logits[2] = float("inf")
    with pytest.raises(NetworkError, match="residual: the logits of 2 of 3 images are not finite; check the"):
        question.finite(logits)


def test_grids_of_activations_are_taken_as_a_scheme_takes_them() -> None:
    symmetric = activation_grid("KL", QuantSpec(bits=5, symmetric=True))
    assert symmetric.signed and symmetric.bits == 5
    with pytest.raises(
        RecipeError, match=r"KL sensitivity: key 'activations' .*activations have one scale a te"
    ):
        activation_grid("KL", QuantSpec(granularity="channel"))
