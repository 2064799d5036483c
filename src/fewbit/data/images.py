"""Labelled images of any layout behind one class: names, class indexes, and bytes by index.

Layouts, told apart by content: a folder or a tar (also .gz, .bz2, .xz) or a zip of ``class/name.jpg``, a
parquet file or a folder of them with image bytes and labels.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewbit.data.stores import SUFFIXES, FolderStore, Store, TarStore, ZipStore, is_tar
from fewbit.errors import DataError, suggest

_LAYOUTS = "a folder, tar or zip of 'class/name.jpg', or parquet with image bytes and labels"
_LABELS = (
    'labels = "labels.json" (folder name -> class index) to the [network] section of the card, or --labels'
)


class ImageSource:
    """Labelled images, in the order of their class and then their name (parquet: of its rows).

    Attributes:
        path: The folder or file they come from.
        names: One name an image.
        targets: Class index of each, int64 (N,).
        folders: Class names that stand for the indexes 0, 1, ... ; empty where a labels file or parquet's
            integers say the index.
        strict: A broken image stops the run.
        positions: Place of each in the store, int64 (N,).
        sequential: Reading by rising `positions` is much faster than in any other order.
    """

    def __init__(
        self,
        path: Path,
        store: Store,
        positions: NDArray[np.int64],
        targets: NDArray[np.int64],
        folders: tuple[str, ...] = (),
        strict: bool = False,
    ) -> None:
        self.path = path
        self.names = [store.names[position] for position in positions.tolist()]
        self.targets = targets
        self.folders = folders
        self.strict = strict
        self.positions = positions
        self.sequential = store.sequential
        self._store = store

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one image, from any thread.

        Raises:
            BrokenImageError: They cannot be read.
        """
        return self._store.read(int(self.positions[index]))

    def check_classes(self, classes: int) -> None:
        """Check that the labels fit a network.

        Args:
            classes: The network's number of classes.

        Raises:
            DataError: An index is too large, or the class folders are fewer or more than the classes.
        """
        if self.folders and len(self.folders) != classes:
            few = len(self.folders) < classes
            advice = (
                f"which folder is which class is not known: add {_LABELS}"
                if few
                else (f"give images of the network's classes only, or add {_LABELS}")
            )
            raise DataError(
                f"{self.path}: has {len(self.folders)} class folders ({_some(self.folders)}), "
                f"the network has {classes} classes; {advice}"
            )
        worst = int(np.argmax(self.targets))
        if self.targets[worst] >= classes:
            raise DataError(
                f"{self.path}: '{self.names[worst]}' has class index {self.targets[worst]}, the network "
                f"has {classes} classes, 0 to {classes - 1}; correct the labels or give images of its own"
            )


def open_images(
    path: Path | str,
    labels: Path | str | Mapping[str, int] | None = None,
    strict: bool = False,
    classes: int | None = None,
) -> ImageSource:
    """List labelled images; none is read yet.

    Args:
        path: A folder, tar, zip or parquet.
        labels: Folder name -> class index, or a JSON file of it; without it the sorted folder names are
            0, 1, ...
        strict: A broken image stops the run; else it is skipped and counted.
        classes: The network's number of classes, to check the labels against.

    Raises:
        DataError: The path is missing, unreadable, damaged or of another kind, holds no images or images
            outside class folders; an archive's member would leave it; the labels do not fit.
    """
    path = Path(path)
    if labels is None or isinstance(labels, Mapping):
        known, told = None if labels is None else dict(labels), "the labels kept in the exported file"
    else:
        known, told = read_labels(Path(labels), classes), str(labels)
    store = _open_store(path)
    if not store.names:
        raise DataError(
            f"{path}: holds no images; allowed are {_LAYOUTS}, with names ending in {', '.join(SUFFIXES)}"
        )
    source = _label(path, store, known, told, strict)
    if classes is not None:
        source.check_classes(classes)
    return source


def read_labels(path: Path, classes: int | None = None) -> dict[str, int]:
    """Read a labels file: a JSON object, folder name -> class index.

    Args:
        path: The file.
        classes: The network's number of classes; indexes must be below it.

    Raises:
        DataError: It is missing, is not JSON of that form, or an index does not fit.
    """
    form = 'give a JSON object of folder name -> class index, such as {"cat": 0, "dog": 1}'
    try:
        data = json.loads(path.read_bytes())
    except OSError as reason:
        raise DataError(
            f"{path}: the labels file cannot be read ({reason.strerror or reason}); {form}"
        ) from reason
    except ValueError as reason:
        raise DataError(f"{path}: the labels file is not JSON ({reason}); {form}") from reason
    if not isinstance(data, dict) or not data:
        raise DataError(
            f"{path}: the labels file holds {'nothing' if data == {} else f'a {type(data).__name__}'}; {form}"
        )
    top = (
        "any index from 0" if classes is None else f"0 to {classes - 1}, as the network has {classes} classes"
    )
    for name, index in data.items():
        if type(index) is not int or index < 0 or (classes is not None and index >= classes):
            raise DataError(
                f"{path}: folder '{name}' has class index {index!r}; allowed is {top}; correct the file"
            )
    return data


def _open_store(path: Path) -> Store:
    try:
        if path.is_dir():
            folder = FolderStore(path)
            parquet = (
                [] if folder.names else sorted(found for found in path.rglob("*.parquet") if found.is_file())
            )
            return _open_parquet(path, parquet) if parquet else folder
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError as reason:
        raise DataError(f"{path}: there are no images at this path; give {_LAYOUTS}") from reason
    except OSError as reason:
        raise DataError(f"{path}: cannot be read ({reason.strerror or reason}); give {_LAYOUTS}") from reason
    if start == b"PAR1":
        return _open_parquet(path, [path])
    if start.startswith(b"PK"):
        return ZipStore(path)
    if is_tar(path):
        return TarStore(path)
    raise DataError(f"{path}: is neither a tar, zip nor parquet file; give {_LAYOUTS}")


def _open_parquet(path: Path, files: list[Path]) -> Store:
    from fewbit.data.parquet import ParquetStore  # pyarrow takes long to import

    return ParquetStore(path, files)


def _by_folder(path: Path, store: Store) -> tuple[NDArray[np.int64], list[str], set[str]]:
    """Order of the images, the class folder of each, and all class folders, empty ones too."""
    skip = _common_folders(store.names)
    parts = [name.split("/")[skip:] for name in store.names]
    flat = [name for name, rest in zip(store.names, parts, strict=True) if len(rest) < 2]
    if flat:
        raise DataError(
            f"{path}: {len(flat)} of {len(parts)} images lie outside class folders, such as '{min(flat)}'; "
            "put each into a folder named after its class: 'class/name.jpg'"
        )
    order = sorted(range(len(parts)), key=parts.__getitem__)
    twice = next((a for a, b in pairwise(order) if store.names[a] == store.names[b]), None)
    if twice is not None:
        raise DataError(f"{path}: member '{store.names[twice]}' is in it twice; make the archive again")
    prefix = store.names[0].split("/")[:skip]
    below = [folder.split("/") for folder in store.folders]
    empty = {folder[skip] for folder in below if len(folder) == skip + 1 and folder[:skip] == prefix}
    words = [parts[position][0] for position in order]
    return (
        np.array(order, np.int64),
        words,
        {*words, *(name for name in empty if name not in (".", "__MACOSX"))},
    )


def _common_folders(names: list[str]) -> int:
    """How many leading folders all images share before 'class/name' (archives often have their own)."""
    paths = [name.split("/")[:-1] for name in (min(names), max(names))]
    shortest = min(name.count("/") for name in names)
    shared = 0
    while shared < shortest - 1 and paths[0][shared] == paths[1][shared]:
        shared += 1
    return shared


def _label(path: Path, store: Store, known: dict[str, int] | None, told: str, strict: bool) -> ImageSource:
    """Give each image its class index: the store's, else by the labels file, else by the sorted names."""
    if isinstance(store.labels, np.ndarray):
        return ImageSource(path, store, np.arange(len(store.labels)), store.labels, strict=strict)
    if store.labels is None:
        order, words, classes = _by_folder(path, store)
    else:
        order, words, classes = np.arange(len(store.labels)), store.labels, set(store.labels)
    if known is None:
        folders = tuple(sorted(classes))
        known = {name: place for place, name in enumerate(folders)}
    else:
        folders = ()
        _check_known(path, words, known, told)
    return ImageSource(
        path, store, order, np.array([known[word] for word in words], np.int64), folders, strict
    )


def _check_known(path: Path, words: list[str], known: dict[str, int], told: str) -> None:
    strange = Counter(word for word in words if word not in known)
    if strange:
        word, count = min(strange.items())
        others = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise DataError(
            f"{path}: class folder '{word}' ({count} images){suggest(word, known)}{others} not among the "
            f"{len(known)} names of {told}; add what is missing there or take the folder out"
        )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
