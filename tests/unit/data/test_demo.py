from __future__ import annotations

import copy
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from fewbit.data.demo import demo_cards, make_images, write_tar
from fewbit.demo.networks import demo_depthwise, demo_residual
from fewbit.errors import DataError
from fewbit.load.card import read_card

FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "demo_residual": demo_residual,
    "demo_depthwise": demo_depthwise,
}
IMAGES = 2000


@pytest.fixture(scope="module")
def test_images() -> Iterator[tuple[Tensor, Tensor]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads that wait for each other are slower on a busy host
    pixels, labels = make_images("test", IMAGES)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    yield x.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels)
    torch.set_num_threads(threads)


def load(path: Path) -> nn.Module:
    card = read_card(path)
    assert card.input.mean == (0.5, 0.5, 0.5)
    assert card.input.std == (0.25, 0.25, 0.25)
    model = FACTORIES[card.network.name]()
    assert card.network.weights is not None
    model.load_state_dict(load_file(path.parent / card.network.weights), strict=True)
    return model.eval().to(memory_format=torch.channels_last)


def correct(model: nn.Module, images: tuple[Tensor, Tensor]) -> Tensor:
    """1 where the first class is right, else 0, float ``(N,)``."""
    with torch.inference_mode():
        scores = torch.cat([model(batch) for batch in images[0].split(100)])
    return (scores.argmax(1) == images[1]).float()


def rounded_to_4_bits(rows: Tensor) -> Tensor:
    """Round each row to 16 even steps between its least and its greatest value."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    step = (high - low) / 15
    return ((rows - low) / step).round() * step + low


def with_4_bit_weights(model: nn.Module) -> nn.Module:
    rounded = copy.deepcopy(model)
    for module in layers_with_weights(rounded):
        weight = module.weight.data
        module.weight.data = rounded_to_4_bits(weight.flatten(1)).reshape(weight.shape)
    return rounded


def with_4_bit_inputs(model: nn.Module) -> nn.Module:
    rounded = copy.deepcopy(model)
    for module in layers_with_weights(rounded):
        module.register_forward_pre_hook(
            lambda _, inputs: (rounded_to_4_bits(inputs[0].reshape(1, -1)).reshape(inputs[0].shape),)
        )
    return rounded


def layers_with_weights(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def test_same_arguments_give_the_same_images() -> None:
    first, again = make_images("train", 150, seed=3), make_images("train", 150, seed=3)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])


def test_the_images_are_these_on_every_host() -> None:
    pixels, _ = make_images("test", 100)
    assert pixels.astype(np.int64).sum() == 39_659_885
    assert pixels[7, 16, 16].tolist() == [207, 143, 162]


def test_hardness_changes_the_images_but_not_the_labels() -> None:
    gentle, full = make_images("train", 200, hardness=0.0), make_images("train", 200)
    assert (gentle[0] != full[0]).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(gentle[1], full[1])


def test_split_and_seed_change_every_image() -> None:
    base = make_images("train", 100)[0]
    for other in (make_images("test", 100)[0], make_images("train", 100, seed=1)[0]):
        assert (base != other).any(axis=(1, 2, 3)).all()


def test_fewer_images_are_a_prefix_of_more() -> None:
    few, many = make_images("test", 130), make_images("test", 320)
    np.testing.assert_array_equal(few[0], many[0][:130])
    np.testing.assert_array_equal(few[1], many[1][:130])


def test_images_inside_a_class_differ() -> None:
    pixels, labels = make_images("test", 300)
    of_class = pixels[labels == 42].astype(np.int64)
    assert np.abs(of_class[0] - of_class[1]).mean() > 5
    assert np.abs(of_class[1] - of_class[2]).mean() > 5


@pytest.mark.parametrize(("images", "least", "most"), [(500, 5, 5), (250, 2, 3), (1, 0, 1)])
def test_classes_are_balanced(images: int, least: int, most: int) -> None:
    pixels, labels = make_images("train", images)
    assert pixels.shape == (images, 32, 32, 3)
    assert pixels.dtype == np.uint8
    assert labels.shape == (images,)
    assert labels.dtype == np.int64
    counts = np.bincount(labels, minlength=100)
    assert len(counts) == 100
    assert (counts.min(), counts.max()) == (least, most)


def test_images_use_the_whole_range() -> None:
    pixels, _ = make_images("train", 500)
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert 80 < pixels.mean() < 180


def test_a_thousand_images_take_less_than_a_second_of_processor_time() -> None:
    make_images("train", 100)
    start = time.process_time()
    make_images("train", 1000)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("split", "images", "seed", "hardness", "message"),
    [
        ("validation", 10, 0, 1.0, "demo images: split is 'validation'; allowed are 'train' and 'test'"),
        ("test", 0, 0, 1.0, "demo images: 0 images asked for; ask for at least 1"),
        ("test", 10, -1, 1.0, "demo images: seed is -1; give an integer >= 0"),
        ("test", 10, 0, 1.5, "demo images: hardness is 1.5; give a number in 0..1"),
    ],
)
def test_wrong_arguments_are_named(split: str, images: int, seed: int, hardness: float, message: str) -> None:
    with pytest.raises(DataError) as caught:
        make_images(split, images, seed, hardness)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_tar_twice_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, "test", 120, seed=5)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_tar_holds_the_images_losslessly_in_sorted_class_folders(tmp_path: Path) -> None:
    write_tar(tmp_path / "demo.tar", "test", 120)
    pixels, labels = make_images("test", 120)
    with tarfile.open(tmp_path / "demo.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == sorted(member.name for member in members)
        assert {member.mtime for member in members} == {0}
        assert len(members) == 120
        for member in members:
            folder, file = member.name.split("/")
            index = int(file.removesuffix(".png"))
            assert folder == f"class_{labels[index]:03d}"
            stream = tar.extractfile(member)
            assert stream is not None
            np.testing.assert_array_equal(np.asarray(Image.open(stream)), pixels[index])


def test_failed_tar_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "demo.tar"
    path.write_bytes(b"old")
    with pytest.raises(DataError):
        write_tar(path, "test", 0)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_of_both_networks_stay_small() -> None:
    sizes_bytes = [card.with_suffix(".safetensors").stat().st_size for card in demo_cards()]
    assert sum(sizes_bytes) < 2_500_000


@pytest.mark.parametrize(
    ("card", "least_drop_of_weights", "least_drop_of_both"),
    [(demo_cards()[0], 0.01, 0.02), (demo_cards()[1], 0.0, 0.03)],
    ids=["demo_residual", "demo_depthwise"],
)
def test_networks_are_good_but_not_perfect_and_suffer_from_4_bits(
    card: Path,
    least_drop_of_weights: float,
    least_drop_of_both: float,
    test_images: tuple[Tensor, Tensor],
) -> None:
    model = load(card)
    float_correct = correct(model, test_images)
    assert 0.75 <= float_correct.mean() <= 0.90
    half = (test_images[0][: IMAGES // 2], test_images[1][: IMAGES // 2])
    accuracy = float_correct[: IMAGES // 2].mean()
    narrow = with_4_bit_weights(model)
    assert accuracy - correct(narrow, half).mean() >= least_drop_of_weights
    assert accuracy - correct(with_4_bit_inputs(narrow), half).mean() >= least_drop_of_both


@pytest.mark.parametrize("card", demo_cards(), ids=lambda card: card.stem)
def test_weights_are_float32_and_batchnorm_is_kept(card: Path) -> None:
    weights = load_file(card.with_suffix(".safetensors"))
    assert {value.dtype for name, value in weights.items() if "num_batches" not in name} == {torch.float32}
    assert any(name.endswith("running_var") for name in weights)
    assert all(torch.isfinite(value).all() for value in weights.values())
