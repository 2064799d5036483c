from __future__ import annotations

import io
import json
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fewbit.data import parquet, stores
from fewbit.data.images import open_images, read_labels
from fewbit.errors import DataError

LAYOUTS = ("set", "set.tar", "set.tar.gz", "set.tar.xz", "set.zip")


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_images(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_labels(path: Path, labels: object) -> Path:
    path.write_text(json.dumps(labels))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples(layout: str, tmp_path: Path, members: Any, write: Any) -> None:
    made = members({"dog": 3, "cat": 2, "eel": 1})
    shuffled = dict(sorted(made.items(), key=lambda item: hash_of(item[0])))
    extra = {"readme.txt": b"no image", "cat/.hidden.png": b"", "__MACOSX/cat/._000.png": b""}
    source = open_images(write(tmp_path / layout, shuffled | extra), classes=3)
    assert source.names == sorted(made)
    assert source.targets.tolist() == [0, 0, 1, 1, 1, 2] and source.targets.dtype == np.int64
    assert source.folders == ("cat", "dog", "eel")
    assert [source.read(index) for index in (5, 0, 3, 1, 2, 4)] == [
        made[source.names[index]] for index in (5, 0, 3, 1, 2, 4)
    ]
    assert source.sequential == layout.endswith((".gz", ".xz"))


def hash_of(text: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(text)) % 101


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_around_the_class_folders_are_skipped(
    layout: str, tmp_path: Path, members: Any, write: Any
) -> None:
    made = {f"./data/val/{name}": data for name, data in members({"cat": 1, "dog": 1}).items()}
    source = open_images(write(tmp_path / layout, made))
    assert source.folders == ("cat", "dog") and source.names == [
        "data/val/cat/000.png",
        "data/val/dog/000.png",
    ]


def test_folders_below_a_class_belong_to_it(tmp_path: Path, encode: Any, write: Any) -> None:
    made = {"cat/1.png": encode(0), "cat/more/deep/2.png": encode(1), "dog/1.png": encode(2)}
    source = open_images(write(tmp_path / "set", made))
    assert source.folders == ("cat", "dog") and source.targets.tolist() == [0, 0, 1]


def test_an_empty_class_folder_keeps_its_index(tmp_path: Path, members: Any, write: Any) -> None:
    path = write(tmp_path / "set", members({"ant": 1, "dog": 1}))
    (path / "cat").mkdir()
    source = open_images(path, classes=3)
    assert source.folders == ("ant", "cat", "dog") and source.targets.tolist() == [0, 2]
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(path, arcname="top")
    assert open_images(tmp_path / "set.tar").folders == ("ant", "cat", "dog")


def test_a_labels_file_gives_the_index(tmp_path: Path, members: Any, write: Any) -> None:
    path = write(tmp_path / "set.tar", members({"n01": 1, "n02": 2}))
    labels = write_labels(tmp_path / "labels.json", {"n01": 7, "n02": 3, "n03": 0})
    source = open_images(path, labels, classes=1000)
    assert source.targets.tolist() == [7, 3, 3] and source.folders == ()


@pytest.mark.parametrize("layout", ["set", "set.tar", "set.zip"])
def test_labels_that_do_not_fit(layout: str, tmp_path: Path, members: Any, write: Any) -> None:
    path = write(tmp_path / layout, members({"cat": 2, "dgo": 3, "eel": 1}))
    labels = write_labels(tmp_path / "labels.json", {"cat": 0, "dog": 1, "eel": 9})
    assert refused(path, labels=labels) == (
        f"{path}: class folder 'dgo' (3 images) (did you mean 'dog'?) not among the 3 names of {labels}; "
        "add what is missing there or take the folder out"
    )
    few = refused(path, classes=1000)
    assert (
        "has 3 class folders (cat, dgo, eel), the network has 1000 classes; which folder is which class"
        in few
    )
    assert (
        'add labels = "labels.json" (folder name -> class index) to the [network] section of the card' in few
    )
    assert "the network has 2 classes; give images of the network's classes only, or add" in refused(
        path, classes=2
    )
    fits = write_labels(tmp_path / "fits.json", {"cat": 0, "dgo": 1, "eel": 9})
    assert open_images(path, fits).targets.tolist() == [0, 0, 1, 1, 1, 9]
    with pytest.raises(
        DataError, match=r"'eel/000.png' has class index 9, the network has 5 classes, 0 to 4"
    ):
        open_images(path, fits).check_classes(5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list; give a JSON object of folder name -> class index"),
        ("{}", "holds nothing; give a JSON object"),
        ('{"cat": "0"}', "folder 'cat' has class index '0'; allowed is 0 to 1, as the network has 2 classes"),
        ('{"cat": true}', "folder 'cat' has class index True"),
        ('{"cat": -1}', "folder 'cat' has class index -1"),
        ('{"cat": 2}', "folder 'cat' has class index 2; allowed is 0 to 1"),
    ],
)
def test_wrong_labels_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_labels(path, classes=2)
    assert message in str(caught.value) and str(caught.value).startswith(f"{path}: ")


def test_a_missing_labels_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels file cannot be read \(No such file or directory\)"):
        read_labels(tmp_path / "none.json")


def test_missing_empty_and_foreign_paths(tmp_path: Path, encode: Any, write: Any) -> None:
    assert "there are no images at this path; give a folder, tar or zip" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds no images; allowed are a folder, tar or zip of 'class/name.jpg'" in refused(
        tmp_path / "empty"
    )
    assert "holds no images" in refused(write(tmp_path / "text.tar", {"cat/readme.txt": b"x"}))
    assert "holds no images" in refused(write(tmp_path / "void.zip", {}))
    (tmp_path / "cat.png").write_bytes(encode(0))
    assert "is neither a tar, zip nor parquet file" in refused(tmp_path / "cat.png")
    (tmp_path / "zero").write_bytes(b"")
    assert "is neither a tar, zip nor parquet file" in refused(tmp_path / "zero")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_outside_class_folders(
    layout: str, tmp_path: Path, members: Any, encode: Any, write: Any
) -> None:
    flat = write(tmp_path / layout, {"1.png": encode(0), "2.png": encode(1)})
    assert refused(flat) == (
        f"{flat}: 2 of 2 images lie outside class folders, such as '1.png'; put each into a folder named "
        "after its class: 'class/name.jpg'"
    )
    mixed = write(tmp_path / f"mixed-{layout}", {**members({"cat": 2}), "stray.png": encode(9)})
    assert "1 of 3 images lie outside class folders, such as 'stray.png'" in refused(mixed)


def test_an_unreadable_folder(tmp_path: Path, members: Any, write: Any) -> None:
    path = write(tmp_path / "set", members({"cat": 1, "dog": 1}))
    (path / "dog").chmod(0)
    before = os.geteuid()
    try:
        if before == 0:
            tmp_path.chmod(0o755)
            os.seteuid(65534)
        with pytest.raises(DataError, match=r"cannot be read \(Permission denied\); give "):
            open_images(path)
    finally:
        os.seteuid(before)
        (path / "dog").chmod(0o755)


def test_an_unreadable_image_is_broken_not_fatal(tmp_path: Path, members: Any, write: Any) -> None:
    path = write(tmp_path / "set", members({"cat": 2}))
    source = open_images(path)
    (path / "cat" / "000.png").unlink()
    with pytest.raises(
        stores.BrokenImageError, match=r"^cat/000.png: cannot be read \(No such file or directory\)$"
    ):
        source.read(0)
    assert len(source.read(1)) > 0


def test_a_loop_of_links_in_a_folder_ends(tmp_path: Path, members: Any, write: Any) -> None:
    path = write(tmp_path / "set", members({"cat": 2, "dog": 1}))
    (path / "cat" / "again").symlink_to(path / "cat")
    (path / "dog" / "up").symlink_to(path)
    assert open_images(path).names == ["cat/000.png", "cat/001.png", "dog/000.png"]


@pytest.mark.parametrize(
    "name", ["/etc/cat.png", "cat/../../1.png", "..\\cat\\1.png", "C:/cat/1.png", "../notes.txt"]
)
@pytest.mark.parametrize("layout", ["set.tar", "set.tar.gz", "set.zip"])
def test_members_that_leave_the_archive(
    layout: str, name: str, tmp_path: Path, encode: Any, write: Any
) -> None:
    path = write(tmp_path / layout, {"cat/1.png": encode(0), name: encode(1)})
    assert refused(path) == (
        f"{path}: member '{name}' would leave the archive; only relative paths without '..' are allowed, "
        "make it again"
    )


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "link"),
        (tarfile.LNKTYPE, "link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
    ],
)
def test_links_and_devices_in_a_tar(kind: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        about = tarfile.TarInfo("cat/1.png")
        about.type, about.linkname = kind, "/etc/passwd"
        tar.addfile(about)
    message = refused(path)
    assert (
        "member 'cat/1.png' is a" in message and what in message and "only plain files and folders" in message
    )


def test_links_and_passwords_in_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    about = zipfile.ZipInfo("cat/1.png")
    about.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr(about, "/etc/passwd")
    assert "member 'cat/1.png' is a link" in refused(path)
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("cat/1.png", b"12345")
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1
    path.write_bytes(data)
    assert "member 'cat/1.png' needs a password; give a zip without one" in refused(path)


@pytest.mark.parametrize("layout", ["set.tar", "set.tar.gz", "set.tar.xz", "set.zip"])
def test_damaged_archives(layout: str, tmp_path: Path, members: Any, write: Any) -> None:
    path = write(tmp_path / layout, members({"cat": 30, "dog": 30}))
    whole = path.read_bytes()
    kind = "zip" if layout == "set.zip" else "tar"
    for cut in (0, 100, 1024, len(whole) // 2, len(whole) // 2 + 50):
        path.write_bytes(whole[:cut] or whole[:4] * (kind == "zip"))
        message = refused(path)
        assert message.startswith(f"{path}: the {kind} is damaged (") and "make or fetch it again" in message


def test_a_tar_cut_after_it_was_listed(tmp_path: Path, members: Any, write: Any) -> None:
    path = write(tmp_path / "set.tar", members({"cat": 2}))
    source = open_images(path)
    os.truncate(path, 600)
    with pytest.raises(stores.BrokenImageError, match=r"cat/000.png: the tar ends inside it"):
        source.read(0)


def test_a_damaged_member_of_a_zip_is_broken_not_fatal(tmp_path: Path, members: Any, write: Any) -> None:
    path = write(tmp_path / "set.zip", members({"cat": 2}))
    data = bytearray(path.read_bytes())
    place = data.index(b"cat/000.png") + 60
    data[place : place + 40] = bytes(40)
    path.write_bytes(data)
    source = open_images(path)
    with pytest.raises(stores.BrokenImageError, match=r"^cat/000.png: cannot be read from the zip"):
        source.read(0)
    assert source.read(1).startswith(b"\x89PNG")


def test_the_same_name_twice(tmp_path: Path, encode: Any) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for seed in range(2):
            data = encode(seed)
            about = tarfile.TarInfo("cat/1.png")
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    assert "member 'cat/1.png' is in it twice; make the archive again" in refused(path)


def test_what_a_member_may_claim_is_bounded(
    tmp_path: Path, members: Any, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "MAX_IMAGE_BYTES", 4096)
    bomb = {**members({"cat": 1}), "dog/1.png": bytes(5000)}
    for layout in ("set.tar", "set.tar.gz", "set.zip"):
        message = refused(write(tmp_path / layout, bomb))
        assert "member 'dog/1.png' has 5000 bytes; an image may have 4096, take it out" in message
    source = open_images(write(tmp_path / "set", bomb))
    with pytest.raises(stores.BrokenImageError, match=r"dog/1.png: has more than the 4096 bytes"):
        source.read(1)
    path = tmp_path / "header.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 9000}) as tar:
        tar.addfile(tarfile.TarInfo("cat/1.png"))
    assert "the tar is damaged (a header of 9216 bytes)" in refused(path)


def write_rows(path: Path, images: list[Any], labels: list[Any], **names: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    table = pa.table({names.get("image", "image"): images, names.get("label", "label"): labels})
    pq.write_table(table, path, row_group_size=names.get("group", 100))
    return path


def hugging_face(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": None}


@pytest.mark.parametrize(
    ("wrap", "image", "label"),
    [(hugging_face, "image", "label"), (hugging_face, "img", "fine_label"), (bytes, "bytes", "class")],
)
def test_parquet(wrap: Callable[[bytes], Any], image: str, label: str, tmp_path: Path, encode: Any) -> None:
    data = [encode(seed) for seed in range(300)]
    labels = [seed % 7 for seed in range(300)]
    rows = [wrap(one) for one in data]
    path = write_rows(tmp_path / "test.parquet", rows, labels, image=image, label=label)
    source = open_images(path, classes=10)
    assert source.targets.tolist() == labels and source.folders == () and source.sequential
    order = [*range(300), *np.random.default_rng(0).permutation(300)[:40].tolist()]
    assert [source.read(index) for index in order] == [data[index] for index in order]
    assert source.names[17] == "test.parquet row 17"
    assert "has class index 6, the network has 5 classes" in refused(path, classes=5)


def test_parquet_in_shards_and_with_words(tmp_path: Path, encode: Any) -> None:
    data = [encode(seed) for seed in range(6)]
    for shard in range(2):
        part = slice(3 * shard, 3 * shard + 3)
        words = pa.array(["dog", "cat", "dog"]).dictionary_encode()
        write_rows(tmp_path / "hf" / f"test-0000{shard}-of-00002.parquet", data[part], words, group=2)
    source = open_images(tmp_path / "hf", classes=2)
    assert source.folders == ("cat", "dog") and source.targets.tolist() == [1, 0, 1, 1, 0, 1]
    assert [source.read(index) for index in range(6)] == data
    labels = write_labels(tmp_path / "labels.json", {"cat": 5, "dog": 8})
    assert open_images(tmp_path / "hf", labels, classes=10).targets.tolist() == [8, 5, 8, 8, 5, 8]
    write_rows(tmp_path / "hf" / "train-00000-of-00001.parquet", data[:1], ["cat"])
    assert "holds several sets (test, train); give one file or a folder of one set" in refused(
        tmp_path / "hf"
    )


def test_wrong_parquet(tmp_path: Path, encode: Any) -> None:
    path, one = tmp_path / "test.parquet", encode(0)
    write_rows(path, [one], [0], image="photo")
    assert "has no image column among photo, label; name it one of image, img, bytes" in refused(path)
    write_rows(path, [one], [0], label="y")
    assert "has no label column among image, y; name it one of label, class" in refused(path)
    write_rows(path, ["cat.png"], [0])
    assert "column 'image' is string; allowed are binary" in refused(path)
    write_rows(path, [one], [0.5])
    assert "column 'label' is double; allowed are integers (the class index) or text" in refused(path)
    write_rows(path, [one, one], [0, None])
    assert "row 1 has no label; take the row out" in refused(path)
    write_rows(path, [one, one], [0, -1])
    assert "row 1 has label -1; allowed are class indexes from 0" in refused(path)
    write_rows(path, [one, None], [0, 0])
    with pytest.raises(stores.BrokenImageError, match=r"test.parquet row 1: has no image bytes"):
        open_images(path).read(1)
    path.write_bytes(path.read_bytes()[:-20])
    assert "the parquet file is damaged" in refused(path)
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), path)
    assert "holds no images" in refused(path)


def test_parquet_streams_a_large_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_ROWS", 4)
    data = [bytes([index]) * 100 for index in range(50)]
    source = open_images(write_rows(tmp_path / "test.parquet", data, [0] * 50, group=50))
    assert [source.read(index)[0] for index in (0, 1, 30, 29, 2, 49, 0)] == [0, 1, 30, 29, 2, 49, 0]
