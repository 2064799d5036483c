"""Where the bytes of images lie: a folder, a tar, a zip. Members are read in place; nothing is extracted.

An archive is somebody else's: names that leave it, links and devices are refused, and what one member may
claim to hold is bounded.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import threading
import weakref
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from fewbit.errors import DataError

Labels = NDArray[np.int64] | list[str]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
MAX_IMAGE_BYTES = 256 * 2**20
_COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, OSError)


class BrokenImageError(DataError):
    """One image cannot be read or decoded; it is skipped, unless the run is strict."""


class Store(Protocol):
    """Bytes by index, from any thread.

    Attributes:
        names: One POSIX path an image, in the order of the store.
        folders: Every folder in it, empty ones too.
        labels: int64 (N,) class indexes or N class names; none where the folders' names are the class names.
        sequential: Reading in rising order of the index is much faster than in any other.
    """

    names: list[str]
    folders: set[str]
    labels: Labels | None
    sequential: bool

    def read(self, index: int) -> bytes:
        """Return the bytes of one image.

        Raises:
            BrokenImageError: They cannot be read.
        """
        ...


class FolderStore:
    """A directory, walked once; symbolic links in it are the user's own and are followed."""

    sequential = False
    labels: Labels | None = None

    def __init__(self, path: Path) -> None:
        """List the images.

        Raises:
            DataError: A folder in it cannot be listed.
        """
        self._path = path
        self.names: list[str] = []
        self.folders: set[str] = set()
        seen: set[tuple[int, int]] = set()
        for place, below, files in os.walk(path, followlinks=True, onerror=self._refuse):
            about = Path(place).stat()
            if (about.st_dev, about.st_ino) in seen:
                below.clear()
                continue
            seen.add((about.st_dev, about.st_ino))
            below[:] = sorted(name for name in below if not _is_hidden(name))
            prefix = Path(place).relative_to(path).as_posix()
            prefix = "" if prefix == "." else f"{prefix}/"
            self.folders.update(prefix + name for name in below)
            self.names.extend(prefix + name for name in files if is_image(name))

    def read(self, index: int) -> bytes:
        """Read one file."""
        name = self.names[index]
        try:
            with (self._path / name).open("rb") as file:
                data = file.read(MAX_IMAGE_BYTES + 1)
        except OSError as reason:
            raise BrokenImageError(f"{name}: cannot be read ({reason.strerror or reason})") from reason
        return _bounded(data, name)

    def _refuse(self, reason: OSError) -> None:
        what = reason.strerror or reason
        raise DataError(
            f"{reason.filename or self._path}: the image folder cannot be read ({what}); give one that can be"
        )


class TarStore:
    """A tar: its members' offsets are listed once, their bytes read from there.

    A compressed tar (.gz, .bz2, .xz) can only be read forwards, so its images are wanted in its own order.
    """

    labels: Labels | None = None

    def __init__(self, path: Path) -> None:
        """List the images.

        Raises:
            DataError: It is damaged, or has a member that leaves it, a link or a device.
        """
        self._path = path
        self._file, self.sequential = _open_tar(path)
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()
        self.names: list[str] = []
        self.folders: set[str] = set()
        spans: list[tuple[int, int]] = []
        try:
            claims = cast(IO[bytes], _Claims(self._file, path))
            with tarfile.open(fileobj=claims, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it grows by 1 KB a member
                    self._list(member, spans)
                self._file.seek(tar.offset)
                if self._file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it ends too early")
        except _DAMAGE as reason:
            raise DataError(f"{path}: the tar is damaged ({reason}); make or fetch it again") from reason
        self._spans: NDArray[np.int64] = np.array(spans, np.int64).reshape(-1, 2)

    def _list(self, member: tarfile.TarInfo, spans: list[tuple[int, int]]) -> None:
        name = member_name(member.name, self._path)
        if member.isdir():
            self.folders.add(name)
        elif not member.isreg() or member.issparse():
            what = "link" if member.issym() or member.islnk() else "device, pipe or sparse file"
            raise DataError(
                f"{self._path}: member '{member.name}' is a {what}; only plain files and folders are allowed"
            )
        elif is_image(name):
            if member.size > MAX_IMAGE_BYTES:
                raise DataError(_too_large(self._path, member.name, member.size))
            self.names.append(name)
            spans.append((member.offset_data, member.size))

    def read(self, index: int) -> bytes:
        """Read one member."""
        offset, size = self._spans[index].tolist()
        try:
            if self.sequential:
                with self._lock:
                    self._file.seek(offset)
                    data = self._file.read(size)
            else:
                data = os.pread(self._file.fileno(), size, offset)
        except _DAMAGE as reason:
            raise BrokenImageError(f"{self.names[index]}: cannot be read from the tar ({reason})") from reason
        if len(data) != size:
            raise BrokenImageError(f"{self.names[index]}: the tar ends inside it")
        return data


class ZipStore:
    """A zip; each member is decompressed when asked for."""

    sequential = False
    labels: Labels | None = None

    def __init__(self, path: Path) -> None:
        """List the images.

        Raises:
            DataError: It is damaged, or has a member that leaves it, is a link, or needs a password.
        """
        try:
            self._zip = zipfile.ZipFile(path)
        except _DAMAGE as reason:
            raise DataError(f"{path}: the zip is damaged ({reason}); make or fetch it again") from reason
        weakref.finalize(self, self._zip.close)
        self._members: list[zipfile.ZipInfo] = []
        self.names: list[str] = []
        self.folders: set[str] = set()
        for member in self._zip.infolist():
            name = member_name(member.filename, path)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise DataError(
                    f"{path}: member '{member.filename}' is a link; only plain files and folders are allowed"
                )
            if member.is_dir():
                self.folders.add(name)
            elif is_image(name):
                self._list(member, name, path)

    def _list(self, member: zipfile.ZipInfo, name: str, path: Path) -> None:
        if member.flag_bits & 1:
            raise DataError(f"{path}: member '{member.filename}' needs a password; give a zip without one")
        if member.file_size > MAX_IMAGE_BYTES:
            raise DataError(_too_large(path, member.filename, member.file_size))
        self._members.append(member)
        self.names.append(name)

    def read(self, index: int) -> bytes:
        """Decompress one member."""
        try:
            with self._zip.open(self._members[index]) as file:
                data = file.read(MAX_IMAGE_BYTES + 1)
        except (*_DAMAGE, NotImplementedError) as reason:
            raise BrokenImageError(f"{self.names[index]}: cannot be read from the zip ({reason})") from reason
        return _bounded(data, self.names[index])


class _Claims:
    """The bytes of a tar; a header that claims more than an image may have is refused, not read."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._path = path
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_IMAGE_BYTES:
            raise DataError(
                f"{self._path}: the tar is damaged (a header of {size} bytes); make or fetch it again"
            )
        return self._file.read(size)


def _open_tar(path: Path) -> tuple[IO[bytes], bool]:
    with path.open("rb") as file:
        start = file.read(8)
    opener = next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)
    return (path.open("rb"), False) if opener is None else (opener(path, "rb"), True)


def is_tar(path: Path) -> bool:
    """Tell a tar by its first header, or a damaged one by its name."""
    try:
        file, _ = _open_tar(path)
        with file:
            tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            return True
    except _DAMAGE:
        return any(suffix in (".tar", ".tgz", ".tbz2", ".txz") for suffix in path.suffixes)


def member_name(name: str, path: Path) -> str:
    """Return a member's name without a leading './', with '/' between folders.

    Raises:
        DataError: It is absolute or has '..': it would leave the archive.
    """
    plain = PurePosixPath(name.replace("\\", "/"))
    if plain.is_absolute() or ".." in plain.parts or (plain.parts and plain.parts[0].endswith(":")):
        raise DataError(
            f"{path}: member '{name}' would leave the archive; only relative paths without '..' are allowed, "
            "make it again"
        )
    return plain.as_posix()


def is_image(name: str) -> bool:
    """Tell by its suffix whether a member counts as an image; hidden files and folders never do.

    >>> is_image("cat/1.JPEG"), is_image("__MACOSX/cat/._1.jpg"), is_image("cat/readme.txt")
    (True, False, False)
    """
    return name.lower().endswith(SUFFIXES) and not any(_is_hidden(part) for part in name.split("/"))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _too_large(path: Path, name: str, size: int) -> str:
    return f"{path}: member '{name}' has {size} bytes; an image may have {MAX_IMAGE_BYTES}, take it out"


def _bounded(data: bytes, name: str) -> bytes:
    if len(data) > MAX_IMAGE_BYTES:
        raise BrokenImageError(f"{name}: has more than the {MAX_IMAGE_BYTES} bytes that an image may have")
    return data
