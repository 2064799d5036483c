from __future__ import annotations

import os
import resource
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewbit.errors import OutputError
from fewbit.files import write_atomically, write_text

MEGABYTE = 2**20


@pytest.fixture
def no_room() -> Iterator[int]:
    """No file of this process may pass 64 KiB meanwhile, so that writing fails half way as on a full disk."""
    limit = 64 * 1024
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_whole_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "model.onnx"
    with write_atomically(path) as beside:
        assert beside.parent == path.parent and beside.suffix == ".onnx"
        beside.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert names(path.parent) == ["model.onnx"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with write_atomically(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(type(error)), write_atomically(path) as beside:
        beside.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "top-1 ≤ 1 %")
    assert (tmp_path / "a.txt").read_bytes() == "top-1 ≤ 1 %".encode()


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path: Path, no_room: int) -> None:
    path = tmp_path / "model.onnx"
    write_text(path, "old")
    with (
        pytest.raises(OutputError, match=r"model\.onnx: writing failed \(File too large\); nothing was left"),
        write_atomically(path) as beside,
    ):
        beside.write_bytes(bytes(2 * no_room))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["model.onnx"]


def test_no_space_left_is_told_in_the_systems_words(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"a\.txt: writing failed \(No space left on device\)"),
        write_atomically(tmp_path / "a.txt"),
        Path("/dev/full").open("wb") as full,
    ):
        full.write(bytes(MEGABYTE))
    assert names(tmp_path) == []


def test_a_file_where_a_folder_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(OutputError, match=r"taken/a\.txt: cannot be written .*give a folder you may write"):
        write_text(tmp_path / "taken" / "a.txt", "x")


def test_a_folder_where_the_file_should_be_is_told_and_left(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OutputError, match=r"a\.txt: writing failed \(Is a directory\)"):
        write_text(tmp_path / "a.txt", "x")
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").is_dir()


def test_a_folder_without_permission_is_told(tmp_path: Path) -> None:
    closed = Path("/proc") if os.geteuid() == 0 else tmp_path / "closed"
    if os.geteuid():
        closed.mkdir(0o500)
    with pytest.raises(OutputError, match=r"a\.txt: cannot be written"):
        write_text(closed / "a.txt", "x")
