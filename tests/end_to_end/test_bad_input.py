"""Every bad input that a user may give: one line that says what to do, exit 2, nothing half-written."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import external_data_helper, helper, numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file

import small_search
from command import Fewbit, Said, command
from fewbit.export.onnx_out import export_onnx
from fewbit.load.capture import load
from fewbit.load.card import read_card

FACTS = ("--classes", 6, "--size", "3,16,16", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with its card, and images."""
    folder = tmp_path_factory.mktemp("job")
    small_search.make_card(folder)
    small_search.make_images(folder / "images", images=60)
    return folder


class Job:
    """A copy of the network and images to spoil; every run writes to `out`."""

    def __init__(self, folder: Path, run: Fewbit) -> None:
        self.folder, self.run = folder, run
        self.card, self.images, self.out = folder / "tiny.toml", folder / "images", folder / "out"
        self.weights = folder / "tiny.safetensors"

    def edit_card(self, old: str, new: str) -> None:
        text = self.card.read_text()
        assert old in text
        self.card.write_text(text.replace(old, new))

    def quantize(self, *more: object, source: object = None, out: object = None) -> Said:
        chosen = self.out / "net.onnx" if out is None else out
        given = ("quantize", source or self.card, "--data", self.images, "--out", chosen, *more)
        return self.run(*given)

    def search(self, *more: object, out: object = None) -> Said:
        chosen = ("--out", self.out if out is None else out)
        short = ("--trials", 2, "--minutes", 0.2, "--batch", 1, "--engines", "onnxruntime")
        budget = () if "--budget" in more else ("--budget", "top1-drop<=5%")
        return self.run("search", self.card, "--data", self.images, *budget, *short, *chosen, *more)

    def refused(self, said: Said, *parts: str) -> None:
        """Check that one line holds all parts and that nothing was left."""
        assert (said.code, said.out) == (2, "")
        assert said.line.startswith("fewbit: ")
        for part in parts:
            assert part in said.line, said.line
        left = [path for path in self.out.rglob("*") if path.is_file()] if self.out.exists() else []
        assert left == []


@pytest.fixture
def job(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Job:
    shutil.copytree(made, tmp_path / "job")
    return Job(tmp_path / "job", command(capsys))


BOTH = pytest.mark.parametrize("do", ["quantize", "search"])


# Images


@BOTH
def test_a_missing_image_folder(job: Job, do: str) -> None:
    shutil.rmtree(job.images)
    said = getattr(job, do)()
    job.refused(
        said, "images: there are no images at this path; give a folder, tar or zip of 'class/name.jpg'"
    )


@BOTH
def test_an_empty_image_folder(job: Job, do: str) -> None:
    shutil.rmtree(job.images)
    job.images.mkdir()
    job.refused(getattr(job, do)(), "images: holds no images; allowed are", ".jpg")


def truncated_jpeg(job: Job) -> str:
    """Put a truncated JPEG among the images and return its name."""
    whole = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(whole, format="JPEG")
    (job.images / "c0" / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    return "c0/cut.jpg"


def test_a_truncated_jpeg_is_skipped_and_counted(job: Job) -> None:
    truncated_jpeg(job)
    said = job.run("eval", job.card, "--data", job.images, "--json")
    assert (said.code, said.answer["skipped"], said.answer["accuracy"]["images"]) == (0, 1, 60)
    said = job.quantize("--json")
    assert (said.code, said.answer["calibration_images"]) == (0, 60)


@BOTH
def test_a_truncated_jpeg_stops_a_strict_run(job: Job, do: str) -> None:
    name = truncated_jpeg(job)
    said = getattr(job, do)("--strict")
    job.refused(
        said, f"images: image {name}: ", "repair it or take it out, or run without --strict to skip it"
    )


def test_class_folders_that_do_not_fit_the_network(job: Job) -> None:
    shutil.rmtree(job.images / "c5")
    job.refused(
        job.quantize(), "has 5 class folders (c0, c1, ..., c4), the network has 6 classes; which folder is"
    )
    (job.images / "c5").mkdir()
    (job.images / "c6").mkdir()
    for folder in ("c5", "c6"):
        shutil.copy(next((job.images / "c0").iterdir()), job.images / folder)
    job.refused(
        job.search(), "has 7 class folders (c0, c1, ..., c6), the network has 6 classes; give images of"
    )


def test_a_label_beyond_the_classes(job: Job) -> None:
    (job.folder / "labels.json").write_text('{"c0": 0, "c1": 1, "c2": 2, "c3": 3, "c4": 4, "c5": 6}')
    job.edit_card("classes = 6", 'classes = 6\nlabels = "labels.json"')
    job.refused(
        job.quantize(), "labels.json: folder 'c5' has class index 6; allowed is 0 to 5, as the network has"
    )


@pytest.mark.parametrize("name", ["/absolute/c0/1.png", "../c0/1.png", "c0/../../1.png"])
def test_a_tar_with_members_that_leave_it(job: Job, name: str) -> None:
    archive = job.folder / "images.tar"
    picture = next((job.images / "c0").iterdir()).read_bytes()
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(picture)
        tar.addfile(member, io.BytesIO(picture))
    job.images = archive
    for said in (job.quantize(), job.search()):
        job.refused(
            said, f"images.tar: member '{name}' would leave the archive; only relative paths without '..'"
        )
    assert not list(job.folder.parent.glob("*.png"))


# The network


def test_wrong_classes_in_the_card(job: Job) -> None:
    job.edit_card("classes = 6", "classes = 7")
    job.refused(
        job.quantize(), "tiny: returns 6 classes, the card says 7; set [network] classes = 6 or pass the"
    )


def test_a_wrong_input_size(job: Job) -> None:
    job.edit_card("[3, 16, 16]", "[1, 16, 16]")
    job.edit_card("mean = [0.5, 0.5, 0.5]\nstd = [0.25, 0.25, 0.25]", "mean = [0.5]\nstd = [0.25]")
    said = job.quantize()
    job.refused(said, "tiny: refuses images of size (1, 16, 16)", "set [input] size to what the model takes")
    job.edit_card("[1, 16, 16]", "[16, 16]")
    job.refused(job.quantize(), "key 'input.size' is [16, 16]: give three whole numbers [C, H, W]")


@BOTH
def test_a_truncated_weights_file(job: Job, do: str) -> None:
    data = job.weights.read_bytes()
    job.weights.write_bytes(data[: len(data) // 2])
    job.refused(
        getattr(job, do)(), "tiny.safetensors: is cut short or damaged (", "copy or download it again"
    )


def test_weights_of_another_network_are_told_by_their_keys(job: Job) -> None:
    weights = load_file(job.weights)
    weights["head.weight"] = weights.pop("9.weight")
    weights["0.weight"] = weights["0.weight"][:4]
    save_file(weights, job.weights)
    job.refused(
        job.quantize(),
        "tiny.safetensors: does not fit network 'tiny': lacks 9.weight; has head.weight which the model does",
        "has other shapes than the model: 0.weight (4, 3, 3, 3) for (8, 3, 3, 3)",
    )


def test_weights_that_are_not_finite(job: Job) -> None:
    weights = load_file(job.weights)
    weights["3.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, job.weights)
    job.refused(
        job.quantize(), "tiny.safetensors: tensor '3.weight' has 1 values of", "that are NaN or infinite"
    )


class Trap:
    """Its unpickling leaves a file, if anybody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_that_is_not_a_plain_state_dict(job: Job) -> None:
    sprung = job.folder / "sprung"
    torch.save({"0.weight": Trap(sprung)}, job.folder / "trap.pt")
    job.edit_card("tiny.safetensors", "trap.pt")
    job.refused(
        job.quantize(),
        "trap.pt: is a pickle that is not a plain state dict (it asks for ",
        "nothing in it was executed: save model.state_dict() with safetensors",
    )
    assert not sprung.exists()


def onnx_of(job: Job) -> onnx.ModelProto:
    path = job.folder / "float.onnx"
    export_onnx(load(read_card(job.card)), path)
    return onnx.load(path)


def test_a_damaged_onnx_file(job: Job) -> None:
    onnx_of(job)
    path = job.folder / "float.onnx"
    path.write_bytes(path.read_bytes()[:-1000])
    said = job.quantize(*FACTS, source=path)
    job.refused(said, "float.onnx: is damaged or cut short, or no ONNX file; export it again")


def test_an_onnx_file_with_an_unsupported_operator_is_told_by_operator_and_node(job: Job) -> None:
    model = onnx_of(job)
    last = model.graph.node[-1]
    last.output[0] = "before"
    model.graph.node.append(helper.make_node("Hardmax", ["before"], ["logits"], "odd_node"))
    onnx.save(model, job.folder / "odd.onnx")
    said = job.quantize(*FACTS, source=job.folder / "odd.onnx")
    job.refused(said, "odd.onnx: ", "operator Hardmax", "'odd_node'")


def test_an_onnx_file_with_data_outside_its_folder(job: Job) -> None:
    model = onnx_of(job)
    tensor = next(t for t in model.graph.initializer if t.name == "0.weight")
    (job.folder / "secret.bin").write_bytes(numpy_helper.to_array(tensor).tobytes())
    external_data_helper.set_external_data(tensor, "../secret.bin", 0, 864)
    tensor.ClearField("raw_data")
    (job.folder / "inner").mkdir()
    path = job.folder / "inner" / "net.onnx"
    path.write_bytes(model.SerializeToString())
    said = job.quantize(*FACTS, source=path)
    job.refused(
        said, "net.onnx: tensor '0.weight' keeps its data in '../secret.bin', outside the file's folder"
    )


def test_a_card_with_an_unknown_key(job: Job) -> None:
    job.edit_card("weights =", "weigths =")
    job.refused(
        job.quantize(), "tiny.toml: unknown key 'network.weigths' (did you mean 'weights'?); known here: "
    )
    job.edit_card("weigths =", "weights =")
    job.edit_card("[input]", "[inputs]")
    job.refused(
        job.search(), "tiny.toml: unknown key 'inputs' (did you mean 'input'?); known here: expected, input"
    )


# What is asked for


@pytest.mark.parametrize(
    ("budget", "parts"),
    [
        (
            "top1-drop",
            ("budget 'top1-drop': is not a measure, a sign and a number", 'give one like "top5-error'),
        ),
        ("top-drop<=1%", ("no measure 'top-drop' (did you mean 'top1-drop'?); allowed are top1-error",)),
        ("top1-drop>=1%", ('smaller top1-drop is better; write "top1-drop<=1%"',)),
        ("top1-drop<=1MB", ("top1-drop has unit 'MB'; allowed units are %, none",)),
        ("top1-error<=17", ("17 is more than all images; write 17% or a share under 1",)),
    ],
)
def test_a_budget_that_does_not_parse(job: Job, budget: str, parts: tuple[str, ...]) -> None:
    job.refused(job.search("--budget", budget), f"budget '{budget}': ", *parts)


def test_a_budget_nobody_can_meet(job: Job) -> None:
    said = job.search("--budget", "top1-error<=0.01%", "--json")
    assert said.code == 3 and said.answer["found"] is False
    onnx.checker.check_model(onnx.load(job.out / "best" / "model.onnx"), full_check=True)
    assert "would be met by" in (job.out / "report.html").read_text()


# Where it is written


def closed_folder(folder: Path) -> Path:
    """Return a folder that cannot be written, for root too."""
    if os.geteuid() == 0:
        return Path("/proc/fewbit")
    folder.mkdir(0o500)
    return folder


def test_an_output_folder_that_cannot_be_written(job: Job) -> None:
    closed = closed_folder(job.folder / "closed")
    job.refused(job.quantize(out=closed / "net.onnx"), "net.onnx: cannot be written (", "with --out")
    job.refused(job.search(out=closed), "cannot be ", "folder you may write to with --out")


def test_an_output_folder_that_is_a_file(job: Job) -> None:
    taken = job.folder / "taken"
    taken.write_text("mine")
    job.refused(job.quantize(out=taken / "net.onnx"), "taken/net.onnx: cannot be written (")
    job.refused(job.search(out=taken), "taken: is a file; give a folder with --out")
    assert taken.read_text() == "mine"


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """Mount a disk of a few kilobytes; skip where this user may not."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [4, 8])
def test_a_full_disk_under_quantize(job: Job, kilobytes: int) -> None:
    with small_disk(job.folder / "disk", kilobytes) as disk:
        job.refused(job.quantize(out=disk / "net.onnx"), "net.onnx: writing failed (No space left on device)")
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("kilobytes", [4, 16, 48, 64])
def test_a_full_disk_under_search(job: Job, kilobytes: int) -> None:
    with small_disk(job.folder / "disk", kilobytes) as disk:
        said = job.search(out=disk / "out")
        assert said.code == 2
        last = said.err.splitlines()[-1]
        assert last.startswith(f"fewbit: {disk}") and (
            "writing failed (" in last or "cannot be written (" in last
        )
        whole = [path for path in disk.rglob("*.onnx") if path.stat().st_size]
        for path in whole:
            onnx.checker.check_model(onnx.load(path))
        assert not list(disk.rglob(".*")), "a temporary file is left"
        if not (disk / "out" / "study.db").exists():
            assert not list(disk.rglob("study.db*"))


def test_a_file_limit_while_the_model_is_written(job: Job) -> None:
    """The same where no disk may be mounted: the process may write 4 KiB into any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        said = job.quantize()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    job.refused(said, "net.onnx: writing failed (File too large); nothing was left behind")


# Journals


@pytest.fixture
def searched(job: Job) -> Job:
    assert job.search("--json").code == 0
    return job


def test_a_journal_of_another_network_and_of_another_version(searched: Job) -> None:
    job = searched
    base = job.out / "study.db"
    resume = ("--resume", job.out)
    weights = load_file(job.weights)
    weights["9.bias"] += 0.5
    save_file(weights, job.weights)
    before = base.read_bytes()
    said = job.search(*resume)
    assert (
        said.code == 2
        and f"{base}: network tiny was " in said.line
        and "when it was made, now it is" in said.line
    )
    assert base.read_bytes() == before
    with contextlib.closing(sqlite3.connect(base)) as journal, journal:
        journal.execute("UPDATE meta SET value = '99' WHERE name = 'schema'")
    said = job.search(*resume)
    assert said.code == 2
    assert (
        f"{base}: is of journal version 99, this fewbit writes 1; give another folder with --out" in said.line
    )


def test_a_damaged_journal(searched: Job) -> None:
    job = searched
    base = job.out / "study.db"
    base.write_bytes(b"not a database at all, but long enough to be read as one" * 100)
    said = job.search("--resume", job.out)
    assert said.code == 2 and f"{base}: " in said.line and "--out" in said.line
    said = job.run("report", job.out)
    assert said.code == 2 and f"{base}: " in said.line
