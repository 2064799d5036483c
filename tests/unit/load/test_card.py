from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from fewbit.data.demo import demo_cards
from fewbit.errors import CardError
from fewbit.load.capture import load
from fewbit.load.card import Card, InputSection, Source, card_from_options, parse_source, read_card

NETWORK: dict[str, Any] = {
    "name": "tiny",
    "source": "tiny.py:build",
    "arguments": {"width": 8, "norm": "batch"},
    "weights": "weights/tiny.safetensors",
    "classes": 10,
    "labels": "labels.json",
}
INPUT: dict[str, Any] = {"size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
EXPECTED = {"data": "../images.tar", "images": 100, "top1_correct": 80, "top5_correct": 99}
OPTIONS: dict[str, Any] = {"classes": 10, "size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    for name in ("tiny.py", "weights/tiny.safetensors", "labels.json", "model.onnx"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def write(folder: Path, **changes: Any) -> Path:
    """Write a card; a change is section__key, None takes the key out."""
    card: dict[str, Any] = {"network": dict(NETWORK), "input": dict(INPUT), "expected": dict(EXPECTED)}
    for place, value in changes.items():
        section, _, key = place.partition("__")
        holder = card.setdefault(section, {}) if key else card
        if value is None:
            del holder[key or section]
        else:
            holder[key or section] = value
    path = folder / "tiny.toml"
    path.write_text(tomli_w.dumps(card))
    return path


def refused(path: Path) -> str:
    with pytest.raises(CardError) as caught:
        read_card(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path))
    return message.removeprefix(f"{path}: ")


def test_a_card_says_everything(folder: Path) -> None:
    card = read_card(write(folder))
    assert card.folder == folder
    assert card.source == Source("file", path=folder / "tiny.py", factory="build")
    assert card.network.arguments == {"width": 8, "norm": "batch"}
    assert card.weights_path == folder / "weights" / "tiny.safetensors"
    assert card.labels_path == folder / "labels.json"
    assert card.expected_data_path == folder.parent / "images.tar"
    assert card.input.size == (3, 32, 32)
    assert (card.input.scale, card.input.channels, card.input.interpolation) == (255.0, "rgb", "bilinear")
    assert card.expected is not None and card.expected.top5_correct == 99


def test_the_range_of_values_is_that_of_black_and_white() -> None:
    card = read_card(demo_cards()[0])
    assert card.input.value_range == ((-2.0,) * 3, (2.0,) * 3)
    section = InputSection(size=(3, 8, 8), scale=1.0, mean=(0.0, 10.0, 20.0), std=(1.0, 5.0, 2.0))
    assert section.value_range == ((0.0, -2.0, -10.0), (255.0, 49.0, 117.5))
    assert load(card).image_range == card.input.value_range


def test_optional_parts_may_be_left_out(folder: Path) -> None:
    card = read_card(write(folder, expected=None, network__labels=None, network__weights=None))
    assert card.expected is card.labels_path is card.weights_path is card.expected_data_path is None


def test_a_relative_path_to_a_card_gives_absolute_paths(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder)
    monkeypatch.chdir(folder / "weights")
    card = read_card("../tiny.toml")
    assert card.weights_path == folder / "weights" / "tiny.safetensors"


def test_toml_round_trip_and_digest(folder: Path) -> None:
    card = read_card(write(folder, input__resize=36, input__crop=[32, 32]))
    again = Card.from_toml(card.to_toml()).placed_in(folder)
    assert again == card and again.digest() == card.digest()
    assert card.placed_in(folder / "weights").digest() == card.digest(), (
        "the place does not change the content"
    )
    assert read_card(write(folder)).digest() != card.digest()


def test_moved_to_another_folder_it_names_the_same_files(folder: Path) -> None:
    card = read_card(write(folder))
    moved = card.moved_to(folder / "out" / "best")
    assert moved.network.weights == "../../weights/tiny.safetensors"
    assert tomllib.loads(moved.to_toml())["network"]["source"] == "../../tiny.py:build"
    assert (moved.source, moved.weights_path, moved.labels_path, moved.expected_data_path) == (
        card.source,
        card.weights_path,
        card.labels_path,
        card.expected_data_path,
    )
    package = card_from_options("torchvision:resnet18", **OPTIONS)
    assert package.moved_to(folder).network.source == "torchvision:resnet18"


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("nets/a.py:build", Source("file", path=Path("/cards/nets/a.py"), factory="build")),
        ("../a.py:build", Source("file", path=Path("/a.py"), factory="build")),
        ("package.module:Net.small", Source("package", module="package.module", factory="Net.small")),
        ("torchvision:resnet18", Source("torchvision", module="torchvision", factory="resnet18")),
        ("timm:resnet50.a1_in1k", Source("timm", module="timm", factory="resnet50.a1_in1k")),
        ("model.onnx", Source("onnx", path=Path("/cards/model.onnx"))),
        ("/models/model.onnx", Source("onnx", path=Path("/models/model.onnx"))),
    ],
)
def test_forms_of_source(text: str, source: Source) -> None:
    assert parse_source(text, Path("/cards")) == source


def test_wrong_forms_of_source() -> None:
    with pytest.raises(CardError, match=r"names a file but no factory; write 'a.py:NAME_OF_THE_FUNCTION'"):
        parse_source("a.py", Path())
    for text in ("resnet18", "a.pt", "", "a b:c", "a.py:", ":x", "timm:"):
        with pytest.raises(CardError, match=r"'file\.py:factory'"):
            parse_source(text, Path())


def test_missing_and_unreadable_cards(tmp_path: Path) -> None:
    assert "there is no such card; give the path of a .toml card" in refused(tmp_path / "none.toml")
    assert "the card cannot be read (Is a directory)" in refused(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "is not a card: not UTF-8 text" in refused(tmp_path / "binary.toml")
    (tmp_path / "broken.toml").write_text("[network\nname = 1")
    assert "is not TOML (Expected ']'" in refused(tmp_path / "broken.toml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"network__weigths": "a"},
            "unknown key 'network.weigths' (did you mean 'weights'?); known here: arguments, classes, ",
        ),
        ({"input__men": [0], "input__mean": None}, "unknown key 'input.men' (did you mean 'mean'?)"),
        (
            {"inputs": {}},
            "unknown key 'inputs' (did you mean 'input'?); known here: expected, input, network",
        ),
        ({"input": None}, "key 'input' is missing; add it"),
        ({"input__std": None}, "key 'input.std' is missing; add it"),
        ({"network__classes": 1}, "key 'network.classes' is 1: a classifier has at least 2 classes"),
        (
            {"network__source": "tiny.py"},
            "key 'network.source' is 'tiny.py': write 'tiny.py:NAME_OF_THE_FUNCTION'",
        ),
        ({"network__source": "tiny"}, "key 'network.source' is 'tiny': write 'file.py:factory'"),
        ({"network__source": "model.onnx"}, "key 'network.arguments' is {'width': 8"),
        (
            {"network__source": "model.onnx", "network__arguments": None},
            "is 'weights/tiny.safetensors': an ONNX file brings its own weights; remove this",
        ),
        ({"input__size": [3, 32]}, "key 'input.size' is [3, 32]: give three whole numbers [C, H, W]"),
        ({"input__size": [3, 32, 32.5]}, "give three whole numbers [C, H, W]"),
        ({"input__size": "3x32x32"}, "key 'input.size' is '3x32x32': give three whole numbers"),
        ({"input__size": [3, 0, 32]}, "each of channels, height and width must be at least 1"),
        ({"input__size": [4, 32, 32]}, "the first number, the channels, must be 3 or 1 (grayscale)"),
        ({"input__mean": [0.5]}, "key 'input.mean' is [0.5]: has 1 number where size has 3 channels"),
        ({"input__std": [0.1] * 4}, "has 4 numbers where size has 3 channels; give one a channel"),
        ({"input__std": [0.1, 0.0, 0.1]}, "key 'input.std' is [0.1, 0.0, 0.1]: each must be above 0"),
        ({"input__std": [0.1, -1, 0.1]}, "each must be above 0"),
        ({"input__mean": [float("nan")] * 3}, "input should be a finite number"),
        ({"input__scale": 0}, "key 'input.scale' is 0: must be above 0, such as 255.0"),
        (
            {"input__channels": "cmyk"},
            "key 'input.channels' is 'cmyk': input should be 'rgb', 'bgr' or 'gray'",
        ),
        (
            {"input__channels": "gray"},
            "size has 3 channels; 'rgb' and 'bgr' go with 3 channels, 'gray' with 1",
        ),
        ({"input__interpolation": "area"}, "should be 'nearest', 'bilinear', 'bicubic' or 'lanczos'"),
        ({"input__crop": 28}, "key 'input.crop' is 28: gives 28 x 28, but size asks for 32 x 32 (H x W)"),
        ({"input__crop": 0}, "give a positive number of pixels, or two of them, [H, W]"),
        ({"input__resize": [32]}, "key 'input.resize' is [32]: give a positive number of pixels"),
        (
            {"input__resize": [40, 40]},
            "key 'input.crop' is not given: resize does not give the height and width",
        ),
        ({"expected__top5_correct": 79}, "must lie between top1_correct (80) and images (100)"),
        ({"expected__top5_correct": 101}, "must lie between top1_correct (80) and images (100)"),
    ],
)
def test_wrong_cards(folder: Path, changes: dict[str, Any], message: str) -> None:
    assert message in refused(write(folder, **changes))


@pytest.mark.parametrize(
    ("key", "path"), [("source", "other.py:build"), ("weights", "gone.safetensors"), ("labels", "gone.json")]
)
def test_files_that_a_card_names_must_be_there(folder: Path, key: str, path: str) -> None:
    missing = folder / path.partition(":")[0]
    message = refused(write(folder, **{f"network__{key}": path}))
    assert message == f"key 'network.{key}' names {missing}, which is missing; correct the path"
    missing.mkdir()
    assert "a folder, not a file" in refused(write(folder, **{f"network__{key}": path}))


def test_grayscale(folder: Path) -> None:
    card = read_card(write(folder, input__size=[1, 28, 28], input__mean=[0.5], input__std=[0.5]))
    assert card.input.channels == "gray"
    wrong = {"input__size": [1, 28, 28], "input__mean": [0.5], "input__std": [0.5], "input__channels": "rgb"}
    assert "size has 1 channel; 'rgb' and 'bgr' go with 3" in refused(write(folder, **wrong))


def test_options_give_the_same_facts_as_a_card(folder: Path) -> None:
    card = read_card(write(folder, expected=None, input__resize=36, input__crop=32, input__channels="bgr"))
    same = card_from_options(
        NETWORK["source"],
        **{key: NETWORK[key] for key in ("name", "arguments", "weights", "classes", "labels")},
        **INPUT,
        resize=36,
        crop=32,
        channels="bgr",
        folder=folder,
    )
    assert same == card and same.digest() == card.digest() and same.folder == folder


def test_a_bare_onnx_file_is_named_after_itself(folder: Path) -> None:
    card = card_from_options("model.onnx", **OPTIONS, folder=folder)
    assert card.network.name == "model"
    assert card.source == Source("onnx", path=folder / "model.onnx")


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("timm:x", {"mean": None}, "timm:x: option --mean is missing; add it, or give a .toml card"),
        ("timm:x", {"classes": None}, "timm:x: option --classes is missing; add it, or give a .toml card"),
        (
            "timm:x",
            {"size": [32, 32]},
            "timm:x: option --size is [32, 32]: give three whole numbers [C, H, W]",
        ),
        ("timm:x", {"std": [0.5]}, "timm:x: option --std is [0.5]: has 1 number where size has 3 channels"),
        ("timm:x", {"labels": "gone.json"}, "option --labels names"),
        ("gone.onnx", {}, "gone.onnx: the network names"),
        (
            "net.toml.bak",
            {},
            "'net.toml.bak': is neither a .toml card nor a source of a network; give 'file.py:fac",
        ),
    ],
)
def test_wrong_options(tmp_path: Path, source: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CardError) as caught:
        card_from_options(source, **(OPTIONS | changes), folder=tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@given(
    size=st.tuples(st.sampled_from([1, 3]), st.integers(1, 512), st.integers(1, 512)),
    scale=st.floats(1e-3, 1e4),
    data=st.data(),
)
def test_any_input_section_survives_toml(
    size: tuple[int, int, int], scale: float, data: st.DataObject
) -> None:
    numbers = st.floats(1e-6, 1e6)
    mean = data.draw(st.lists(numbers, min_size=size[0], max_size=size[0]))
    std = data.draw(st.lists(numbers, min_size=size[0], max_size=size[0]))
    crop = data.draw(st.sampled_from([None, size[1:]]))
    card = card_from_options("timm:x", classes=2, size=size, mean=mean, std=std, scale=scale, crop=crop)
    assert Card.from_toml(card.to_toml()) == card


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "a\\\\b", ".hidden", "new\\nline"])
def test_a_name_that_cannot_be_part_of_a_files_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "card.toml"
    path.write_text(f'[network]\nname = "{name}"\nsource = "net.onnx"\nclasses = 3\n')
    with pytest.raises(CardError, match="cannot be part of a file's name; use letters, digits, blanks"):
        read_card(path)
