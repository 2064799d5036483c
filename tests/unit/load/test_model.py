from __future__ import annotations

import io
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewbit.errors import NetworkError
from fewbit.load.capture import load
from fewbit.load.card import Card, card_from_options
from fewbit.load.model import build_model

SOURCE = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, width=4, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def small(width=4):
    return Small(width)


def broken():
    raise KeyError("no such plan")


def leaves():
    raise SystemExit(3)


def text():
    return "a model"


width = 4
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(SOURCE)
    return tmp_path


def card(folder: Path, source: str = "nets.py:small", **options: Any) -> Card:
    plain: dict[str, Any] = {"classes": 5, "size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.2] * 3}
    return card_from_options(source, folder=folder, **(plain | options))


def state(folder: Path) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in build_model(card(folder), seed=7).state_dict().items()}


# --------------------------------------------------------------------------------------------- sources


def test_file_and_factory(folder: Path) -> None:
    model = build_model(card(folder, arguments={"width": 6}))
    assert model.fc.in_features == 6
    assert not model.training
    assert str(folder) not in sys.path


def test_class_as_factory(folder: Path) -> None:
    assert build_model(card(folder, "nets.py:Small")).fc.out_features == 5


def test_package_and_factory(folder: Path) -> None:
    model = build_model(card(folder, "torch.nn:Linear", arguments={"in_features": 2, "out_features": 5}))
    assert isinstance(model, nn.Linear)


def test_package_beside_the_card(folder: Path) -> None:
    (folder / "zoo_of_mine").mkdir()
    (folder / "zoo_of_mine" / "__init__.py").write_text(SOURCE)
    assert build_model(card(folder, "zoo_of_mine:small")).fc.out_features == 5
    assert "zoo_of_mine" not in sys.modules


def test_two_folders_may_have_files_of_one_name(folder: Path) -> None:
    models = []
    for width in (2, 3):
        place = folder / str(width)
        place.mkdir()
        (place / "plan.py").write_text(f"WIDTH = {width}\n")
        (place / "net.py").write_text(
            "from torch import nn\ndef net():\n    from plan import WIDTH\n    return nn.Linear(WIDTH, 5)\n"
        )
        models.append(build_model(card(place, "net.py:net")))
    assert [model.in_features for model in models] == [2, 3]
    assert "plan" not in sys.modules


def test_initial_weights_come_from_the_seed_alone(folder: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, again, other = (build_model(card(folder), seed).conv.weight for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_load_makes_a_net(folder: Path) -> None:
    net = load(card(folder, name="mine"))
    assert (net.name, net.classes, net.input_size) == ("mine", 5, (3, 8, 8))
    assert [layer.name for layer in net.layers()] == ["conv", "bn", "relu", "mean", "mean_flatten", "fc"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "nets.py:smal",
            r"nets\.py: has no factory 'smal' \(did you mean 'small'\?\); correct \[network\] source",
        ),
        ("nets.py:width", r"nets\.py: 'width' is a int, not a function that returns a model"),
        (
            "nets.py:broken",
            r"nets\.py: broken\(\) failed with KeyError: 'no such plan'; correct \[network\] arguments or",
        ),
        ("nets.py:leaves", r"nets\.py: leaves\(\) failed with SystemExit: 3"),
        ("nets.py:text", r"nets\.py: text\(\) returned an object of type str, not a torch.nn.Module"),
        (
            "no_such_package.nets:small",
            r"source 'no_such_package.nets:small': there is no module 'no_such_package'",
        ),
        ("torch.nn:Linaer", r"torch.nn: has no factory 'Linaer' \(did you mean 'Linear'\?\)"),
    ],
)
def test_wrong_factory(folder: Path, source: str, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        build_model(card(folder, source))


def test_wrong_arguments(folder: Path) -> None:
    with pytest.raises(NetworkError, match=r"nets\.py: small\(depth=3\) failed with TypeError: .*'depth'"):
        build_model(card(folder, arguments={"depth": 3}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def small(:\n",
            r"nets\.py: cannot be imported \(SyntaxError: invalid syntax.*\); correct the file",
        ),
        (
            "import no_such_thing\n",
            r"cannot be imported \(ModuleNotFoundError: No module named 'no_such_thing'\)",
        ),
        ("raise SystemExit\n", r"nets\.py: cannot be imported \(SystemExit\)"),
    ],
)
def test_file_that_cannot_be_imported(folder: Path, text: str, message: str) -> None:
    (folder / "nets.py").write_text(text)
    with pytest.raises(NetworkError, match=message) as error:
        build_model(card(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_package_that_is_not_installed(package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in sys.modules if key.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, key)
    monkeypatch.setitem(sys.modules, package, None)  # what Python does for "must not be imported"
    with pytest.raises(
        NetworkError,
        match=f"'{package}:resnet18' needs the package {package}, which is not installed; pip install",
    ):
        build_model(card(folder, f"{package}:resnet18"))


# --------------------------------------------------------------------------------------------- weights


def weighted(folder: Path, content: Any, name: str = "w.pt") -> Card:
    if name.endswith(".safetensors"):
        save_file(content, folder / name)
    else:
        torch.save(content, folder / name)
    return card(folder, weights=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin"])
def test_weights_of_each_kind_and_type(folder: Path, name: str, dtype: torch.dtype) -> None:
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state(folder).items()}
    read = build_model(weighted(folder, stored, name)).state_dict()
    assert read["conv.weight"].dtype == torch.float32
    assert all(torch.equal(read[key], value.to(read[key].dtype)) for key, value in stored.items())


@pytest.mark.parametrize("legacy", [True, False])
def test_weights_in_both_of_torchs_formats(folder: Path, legacy: bool) -> None:
    torch.save(state(folder), folder / "w.pt", _use_new_zipfile_serialization=not legacy)
    read = build_model(card(folder, weights="w.pt")).state_dict()
    assert torch.equal(read["fc.weight"], state(folder)["fc.weight"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 90, "best": 0.7},
        lambda s: {"model": s, "optimizer": {"lr": 0.1}},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    ],
    ids=["state_dict", "model", "module.", "_orig_mod.", "before num_batches_tracked"],
)
def test_weights_as_training_scripts_leave_them(folder: Path, wrap: Any) -> None:
    read = build_model(weighted(folder, wrap(state(folder)))).state_dict()
    assert all(torch.equal(read[key], value) for key, value in state(folder).items())


def _without(*keys: str) -> Any:
    return lambda s: {k: v for k, v in s.items() if k not in keys}


UNFIT: list[tuple[str, Any, str]] = [
    (
        "missing",
        _without("conv.bias", "fc.bias"),
        r"w\.pt: does not fit network 'small': lacks conv.bias, fc.bias; give the weights of this factory",
    ),
    (
        "unexpected",
        lambda s: s | {f"extra.{i}": torch.zeros(1) for i in range(5)},
        r"has extra.0, extra.1, extra.2 and 2 more \(5 in all\) which the model does not know",
    ),
    (
        "wrong shape",
        lambda s: s | {"fc.weight": torch.zeros(7, 4)},
        r"has other shapes than the model: fc.weight \(7, 4\) for \(5, 4\); give",
    ),
    (
        "NaN",
        lambda s: s | {"conv.bias": torch.tensor([0, float("nan"), 1, float("inf")])},
        r"w\.pt: tensor 'conv.bias' has 2 values of 4 that are NaN or infinite; give weights",
    ),
    (
        "a number among tensors",
        lambda s: s | {"epoch": 3},
        r"w\.pt: key 'epoch' holds int 3, not a tensor; save",
    ),
    ("a list", lambda s: [1, 2], r"w\.pt: holds an object of type list, not a state dict; save"),
    ("a tensor", lambda s: torch.zeros(3), r"w\.pt: holds an object of type Tensor, not a state dict"),
    ("empty", lambda s: {}, r"w\.pt: holds an empty dict, not a state dict"),
    (
        "int8",
        lambda s: s | {"fc.weight": torch.zeros(5, 4, dtype=torch.int8)},
        r"w\.pt: tensor 'fc.weight' is stored as torch.int8: it is already quantized; give the float weights",
    ),
    (
        "complex",
        lambda s: s | {"fc.weight": torch.zeros(5, 4, dtype=torch.complex64)},
        r"w\.pt: tensor 'fc.weight' is stored as torch.complex64; give float16, bfloat16 or float32",
    ),
]


@pytest.mark.parametrize(("change", "message"), [u[1:] for u in UNFIT], ids=[u[0] for u in UNFIT])
def test_weights_that_do_not_fit(folder: Path, change: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=message) as error:
        build_model(weighted(folder, change(state(folder))))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.97])
def test_truncated_file(folder: Path, name: str, share: float) -> None:
    place = weighted(folder, state(folder), name)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(
        NetworkError, match=rf"{name}: is cut short or damaged \(.+\); copy or download it again$"
    ):
        build_model(place)


def test_truncated_legacy_file(folder: Path) -> None:
    buffer = io.BytesIO()
    torch.save(state(folder), buffer, _use_new_zipfile_serialization=False)
    (folder / "w.pt").write_bytes(buffer.getvalue()[:700])
    with pytest.raises(NetworkError, match=r"w\.pt: is (cut short or damaged|a pickle that is not a plain)"):
        build_model(card(folder, weights="w.pt"))


def test_other_kind_of_file(folder: Path) -> None:
    (folder / "w.h5").write_bytes(b"HDF")
    with pytest.raises(
        NetworkError, match=r"w\.h5: is no kind of weights file that is read; give one that ends with \.saf"
    ):
        build_model(card(folder, weights="w.h5"))


def test_garbage_and_other_pickles(folder: Path) -> None:
    (folder / "w.pt").write_bytes(b"not a checkpoint at all")
    with pytest.raises(
        NetworkError, match=r"w\.pt: is cut short or damaged \(not written by torch.save\); copy"
    ):
        build_model(card(folder, weights="w.pt"))
    (folder / "w.pt").write_bytes(b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00}\x94.")
    with pytest.raises(
        NetworkError, match=r"a pickle that is not a plain state dict \(not written by torch.save\); noth"
    ):
        build_model(card(folder, weights="w.pt"))


class Hostile:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [True, False])
def test_hostile_pickle_is_not_executed(folder: Path, legacy: bool) -> None:
    target = folder / "executed"
    torch.save({"fc.weight": Hostile(target)}, folder / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        NetworkError,
        match=r"w\.pt: is a pickle that is not a plain state dict \(it asks for posix\.mkdir\); nothing in "
        r"it was executed: save model.state_dict\(\) with safetensors",
    ):
        build_model(card(folder, weights="w.pt"))
    assert not target.exists()


def test_whole_model_is_refused(folder: Path) -> None:
    torch.save(nn.Linear(2, 3), folder / "w.pt")
    with pytest.raises(
        NetworkError, match=r"not a plain state dict \(it asks for torch\.nn\.modules\.linear\.Linear\)"
    ):
        build_model(card(folder, weights="w.pt"))


def test_torchscript_archive_is_refused(folder: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, buffer)
    path = folder / "w.pt"
    with zipfile.ZipFile(io.BytesIO(buffer.getvalue())) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.namelist():
            new.writestr(item, old.read(item))
        new.writestr(item.split("/")[0] + "/constants.pkl", b"\x80\x02).")
    with pytest.raises(
        NetworkError, match=r"w\.pt: is a pickle that is not a plain state dict \(a TorchScript archive\)"
    ):
        build_model(card(folder, weights="w.pt"))


def test_nan_in_initial_weights(folder: Path) -> None:
    (folder / "nets.py").write_text(
        SOURCE + "\n\ndef bad():\n    m = Small()\n    m.fc.bias.data[0] = float('nan')\n    return m\n"
    )
    with pytest.raises(
        NetworkError, match=r"network 'bad': tensor 'fc.bias' has 1 values of 5 that are NaN or infinite"
    ):
        build_model(card(folder, "nets.py:bad"))
