from __future__ import annotations

import gc
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewbit.data import decoded, stores
from fewbit.data.image_set import ImageSet
from fewbit.data.images import open_images
from fewbit.data.preprocess import decode, normalize
from fewbit.errors import DataError, OutputError


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "CHUNK_BYTES", 5 * 8 * 8 * 3)


@pytest.fixture
def made(members: Any) -> dict[str, bytes]:
    return dict(sorted(members({"ant": 20, "bee": 15, "cat": 8}).items()))


def expected(made: dict[str, bytes], facts: Any, names: list[str] | None = None) -> Any:
    return normalize(np.stack([decode(made[name], facts) for name in names or made]), facts)


def damage(path: Path, *names: str) -> None:
    for name in names:
        (path / name).write_bytes((path / name).read_bytes()[:100])


@pytest.mark.parametrize("layout", ["set", "set.tar", "set.tar.gz", "set.zip"])
def test_batches_in_order(layout: str, tmp_path: Path, made: Any, write: Any, section: Any) -> None:
    shuffled = {name: made[name] for name in np.random.default_rng(0).permutation(list(made)).tolist()}
    source = open_images(write(tmp_path / layout, shuffled))
    with ImageSet(source, section(), classes=3) as images:
        batches = list(images.batches(8))
        assert [len(batch) for batch in batches] == [8, 8, 8, 8, 8, 3]
        assert all(batch.dtype == np.float32 and batch.flags.c_contiguous for batch in batches)
        assert (np.concatenate(batches) == expected(made, section())).all()
        assert (np.concatenate(list(images.batches(100))) == expected(made, section())).all(), (
            "from the cache"
        )
        assert images.names == tuple(made) and len(images) == 43 and images.skipped == ()
        assert images.targets.tolist() == [0] * 20 + [1] * 15 + [2] * 8 and images.targets.dtype == np.int64
        assert (images.input_size, images.classes) == ((3, 8, 8), 3)


def test_chosen_indices_in_any_order(tmp_path: Path, made: Any, write: Any, section: Any) -> None:
    order = np.array([40, 3, 3, 17, 0])
    with ImageSet(open_images(write(tmp_path / "set.tar", made)), section(), classes=3) as images:
        got = np.concatenate(list(images.batches(2, order)))
        assert (got == expected(made, section())[order]).all()
        part = images.subset(order[:3])
        assert (np.concatenate(list(part.batches(2))) == expected(made, section())[order[:3]]).all()
        assert part.targets.tolist() == [2, 0, 0] and part.names == tuple(
            np.array(list(made))[order[:3]].tolist()
        )
        assert part.subset(np.array([1])).names == (list(made)[3],)


@pytest.mark.parametrize("layout", ["set.tar", "set.tar.gz"])
def test_only_the_chosen_images_are_read(
    layout: str, tmp_path: Path, made: Any, write: Any, section: Any
) -> None:
    names = list(made)
    rest = {
        name: data if name in (names[30], names[4], names[5]) else b"broken" for name, data in made.items()
    }
    source = open_images(write(tmp_path / layout, rest), strict=True)
    with ImageSet(source, section(), classes=3, indices=np.array([30, 4, 5])) as images:
        assert (np.concatenate(list(images.batches(2))) == expected(made, section())[[30, 4, 5]]).all()
        assert images.targets.tolist() == [1, 0, 0]


def test_each_image_is_decoded_once(
    tmp_path: Path, made: Any, write: Any, section: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def counting(data: bytes, facts: Any, name: str) -> Any:
        seen.append(name)
        return decode(data, facts, name)

    monkeypatch.setattr(decoded, "decode", counting)
    with ImageSet(open_images(write(tmp_path / "set.tar", made)), section(), classes=3) as images:
        first = next(images.batches(1))
        assert first.shape == (1, 3, 8, 8) and len(seen) < 43, "a batch comes before everything is decoded"
        for _ in range(2):
            assert sum(len(batch) for batch in images.batches(7)) == 43
        assert images.subset(np.arange(5)).digest != images.digest
    assert sorted(seen) == sorted(made)


def test_broken_images_are_skipped_and_named(tmp_path: Path, made: Any, write: Any, section: Any) -> None:
    path = write(tmp_path / "set", made)
    bad = ("ant/000.png", "ant/007.png", "cat/007.png")
    damage(path, *bad)
    good = [name for name in made if name not in bad]
    for first in ("batches", "len"):
        with ImageSet(open_images(path), section(), classes=3) as images:
            if first == "len":
                assert len(images) == 40
            got = np.concatenate(list(images.batches(6)))
            assert (got == expected(made, section(), good)).all()
            assert images.names == tuple(good) and len(images.targets) == 40
            assert [one.name for one in images.skipped] == list(bad)
            assert "truncated" in images.skipped[1].why and "ant" not in images.skipped[1].why
            assert (np.concatenate(list(images.batches(6, np.array([0, 39])))) == got[[0, 39]]).all()


def test_strict_stops_at_a_broken_image(tmp_path: Path, made: Any, write: Any, section: Any) -> None:
    path = write(tmp_path / "set", made)
    damage(path, "cat/003.png")
    with (
        ImageSet(open_images(path, strict=True), section(), classes=3) as images,
        pytest.raises(DataError) as caught,
    ):
        list(images.batches(8))
    assert str(caught.value).startswith(f"{path}: image cat/003.png: ") and "truncated" in str(caught.value)
    assert str(caught.value).endswith("; repair it or take it out, or run without --strict to skip it")


def test_no_image_at_all_can_be_decoded(tmp_path: Path, write: Any, section: Any) -> None:
    path = write(tmp_path / "set.tar", {"cat/1.png": b"no image", "dog/1.png": b""})
    with ImageSet(open_images(path), section(), classes=2) as images:
        for use in (lambda: len(images), lambda: images.digest, images.decode):
            with pytest.raises(
                DataError, match=r"none of 2 images can be decoded; the first, cat/1.png: is not an"
            ):
                use()


def test_images_of_the_wrong_size(tmp_path: Path, made: Any, encode: Any, write: Any, section: Any) -> None:
    path = write(tmp_path / "set.tar", made | {"cat/odd.png": encode(99, height=9, width=7)})
    with ImageSet(open_images(path), section(), classes=3) as images, pytest.raises(DataError) as caught:
        list(images.batches(8))
    assert str(caught.value) == (
        f"{path}: image cat/odd.png: is 9 x 7 (H x W) after no resize and no crop; the network takes 8 x 8; "
        "add resize = 8 and crop = 8 to [input] of the card, or give images of that size"
    )


def test_labels_must_fit_the_network(tmp_path: Path, made: Any, write: Any, section: Any) -> None:
    source = open_images(write(tmp_path / "set.tar", made))
    with pytest.raises(DataError, match=r"has 3 class folders \(ant, bee, cat\), the network has 10 classes"):
        ImageSet(source, section(), classes=10)


def test_the_digest_names_bytes_labels_and_preprocessing(
    tmp_path: Path, made: Any, write: Any, section: Any
) -> None:
    def digest(layout: str, content: Any, labels: Any = None, indices: Any = None, **changes: Any) -> str:
        path = tmp_path / layout
        source = open_images(path if path.exists() else write(path, content), labels)
        with ImageSet(source, section(**changes), classes=3, indices=indices) as images:
            return images.digest

    plain = digest("set", made)
    assert len(plain) == 12 and plain == digest("set.tar", made) == digest("set.tar.gz", made) == digest(
        "set.zip", made
    )
    renamed = {name.replace("000", "00"): data for name, data in made.items()}
    assert digest("renamed.tar", renamed) == plain, "names do not count"
    assert digest("set", made, std=(0.5, 0.25, 0.25)) != plain
    assert digest("set", made, indices=np.arange(42)) != plain
    assert digest("set", made, indices=np.arange(43)[::-1]) != plain
    labels = tmp_path / "labels.json"
    labels.write_text('{"ant": 0, "bee": 2, "cat": 1}')
    assert digest("set", made, labels) != plain
    name = next(iter(made))
    assert digest("other.tar", made | {name: made[name] + b"\0"}) != plain, "same pixels, other bytes"
    with ImageSet(open_images(tmp_path / "set"), section(), classes=3) as images:
        assert images.subset(np.arange(42)).digest == digest("set", made, indices=np.arange(42))


def test_what_does_not_fit_the_cache_is_decoded_again(
    tmp_path: Path, made: Any, write: Any, section: Any
) -> None:
    want = expected(made, section())
    for cache_bytes in (0, 10 * 8 * 8 * 3):
        source = open_images(write(tmp_path / "set.tar", made))
        with ImageSet(source, section(), classes=3, cache_bytes=cache_bytes) as images:
            for _ in range(2):
                assert (np.concatenate(list(images.batches(8))) == want).all()
            held = (images._decoded.state == decoded.CACHED).sum()
            assert held == cache_bytes // (8 * 8 * 3)
            assert os.fstat(images._decoded._file.fileno()).st_size <= cache_bytes


def test_a_full_disk_only_costs_time(tmp_path: Path, made: Any, write: Any, section: Any) -> None:
    source = open_images(write(tmp_path / "set.tar", made))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ImageSet(source, section(), classes=3) as images:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # bytes a file may grow to
            images.decode()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (images._decoded.state == decoded.UNCACHED).sum() == 43 - 1000 // (8 * 8 * 3)
        assert (np.concatenate(list(images.batches(8))) == expected(made, section())).all()


def test_no_place_for_the_cache(
    tmp_path: Path, made: Any, write: Any, section: Any, monkeypatch: Any
) -> None:
    source = open_images(write(tmp_path / "set.tar", made))
    monkeypatch.setattr(decoded.tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(
        OutputError, match=r"image cache: no temporary file can be made .*; set TMPDIR to a folder"
    ):
        ImageSet(source, section(), classes=3)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in Linux's /proc")
def test_nothing_stays_open_or_on_disk(
    tmp_path: Path, made: Any, write: Any, section: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "set.tar", made)
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(decoded.tempfile, "tempdir", str(cache))
    gc.collect()
    before, threads = open_files(), threading.active_count()
    for way in ("close", "collect"):
        images = ImageSet(open_images(path), section(), classes=3)
        assert len(next(iter(images.batches(4)))) == 4
        assert open_files() == before + 2 and list(cache.iterdir()) == []
        if way == "close":
            images.close()
            images.close()
        del images
        gc.collect()
        assert soon(lambda: open_files() == before), "jobs in flight end first, then the files are closed"
    assert soon(lambda: threading.active_count() == threads)


def test_decoding_runs_ahead_of_the_caller(
    tmp_path: Path, made: Any, write: Any, section: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    ahead = threading.Event()

    def counting(data: bytes, facts: Any, name: str) -> Any:
        done.append(name)
        if len(done) >= 20:
            ahead.set()
        return decode(data, facts, name)

    monkeypatch.setattr(decoded, "decode", counting)
    with ImageSet(open_images(write(tmp_path / "set.tar", made)), section(), classes=3) as images:
        batches = images.batches(2)
        next(batches)
        assert ahead.wait(10), "while the caller has the first batch, more is decoded"
        assert len(done) < 43, "but not everything: the run ahead is bounded"
        assert sum(len(batch) for batch in batches) == 41


def test_progress_and_wrong_batch(tmp_path: Path, made: Any, write: Any, section: Any) -> None:
    path = write(tmp_path / "set", made)
    damage(path, "ant/001.png")
    told: list[float] = []
    with ImageSet(open_images(path), section(), classes=3) as images:
        images.decode(told.append)
        images.decode(told.append)
        assert told == sorted(told) and told[-1] == 1.0 and len(set(told)) == len(told) > 3
        with pytest.raises(DataError, match=r"batch is 0; give 1 or more images"):
            next(images.batches(0))


def test_a_compressed_tar_is_read_forwards(
    tmp_path: Path, made: Any, write: Any, section: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_images(write(tmp_path / "set.tar.gz", dict(reversed(made.items()))))
    asked: list[int] = []
    read = stores.TarStore.read
    monkeypatch.setattr(stores.TarStore, "read", lambda self, index: asked.append(index) or read(self, index))
    with ImageSet(source, section(), classes=3, threads=1) as images:
        assert (np.concatenate(list(images.batches(8))) == expected(made, section())).all()
        assert asked.count(0) == 1 and len(asked) == 43
        assert asked == sorted(asked), "an archive in the opposite order takes one pass"


@pytest.fixture(autouse=True)
def no_thread_errors() -> Iterator[None]:
    failures: list[Any] = []
    hook = threading.excepthook
    threading.excepthook = failures.append
    yield
    threading.excepthook = hook
    assert failures == []


def test_pixels_are_what_batches_are_made_of(tmp_path: Path, made: Any, write: Any, section: Any) -> None:
    source = open_images(write(tmp_path / "images", made))
    facts = section(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    with ImageSet(source, facts, 3) as images:
        pixels = list(images.pixels(40))
        assert [part.shape for part in pixels] == [(40, 8, 8, 3), (3, 8, 8, 3)]
        assert all(part.dtype == np.uint8 for part in pixels)
        for part, batch in zip(pixels, images.batches(40), strict=True):
            np.testing.assert_array_equal(normalize(part, facts), batch)


def test_decoding_begins_before_anybody_waits(
    tmp_path: Path, made: Any, write: Any, section: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Semaphore(0)

    def counted(*given: Any) -> Any:
        pixels = decode(*given)
        done.release()
        return pixels

    monkeypatch.setattr(decoded, "decode", counted)
    with ImageSet(open_images(write(tmp_path / "set", made)), section(), classes=3) as images:
        images.begin()
        for _ in made:
            assert done.acquire(timeout=10)
        assert len(images) == len(made) and not done.acquire(blocking=False), "each once"
