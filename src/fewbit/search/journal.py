"""The journal of a study: every finished trial, and every decision that depended on a clock, in SQLite.

A process may be killed at any moment. A trial and its predictions go in with one transaction that is on disk
before the next step begins (write-ahead log, ``synchronous=FULL``); what is not in the journal did not happen
and is done again. A trial's key is unique there, so no trial is stored twice.
"""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

import numpy as np
import psutil
from pydantic import ValidationError

from fewbit.clock import phase
from fewbit.errors import JournalError, OutputError
from fewbit.measure.accuracy import Predictions
from fewbit.search.trial import StudyRecord, Trial, TrialState

SCHEMA = 1
FILE = "study.db"

Part = Literal["calibration", "search", "holdout"]

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE trials (position INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, trial TEXT);
CREATE TABLE predictions (key TEXT NOT NULL, part TEXT NOT NULL, arrays BLOB, PRIMARY KEY (key, part));
CREATE TABLE decisions (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_ANOTHER = "give what it was made with, or another folder with --out"


class Journal:
    """An open journal; use as a context manager.

    Args:
        folder: The study's folder; made when missing.
        identity: What the trials depend on, by readable name ("seed", "network resnet20"). A name that begins
            with "network " may be new: a card can be added to a study, not taken out or changed.
        resume: Go on with a journal that is there; else one that is there is refused.

    Raises:
        JournalError: It is of another network, data, version or host, damaged, or in use.
        OutputError: The folder cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str], resume: bool = False) -> None:
        self.path = Path(folder) / FILE
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be made ({error.strerror or error}); "
                "give a folder you may write to with --out"
            ) from error
        there = self.path.exists() and self.path.stat().st_size > 0
        refuse_another(Path(folder), resume)
        with _explained(self.path):
            self._base = sqlite3.connect(self.path, isolation_level=None, timeout=5.0)
        try:
            with _explained(self.path):
                self._open(dict(identity))
        except BaseException:
            self._base.close()
            if not there:  # half a journal would stand in the way of the next search
                for end in ("", "-wal", "-shm"):
                    self.path.with_name(self.path.name + end).unlink(missing_ok=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; the write-ahead log is merged into it."""
        with _explained(self.path):
            self._base.execute("DELETE FROM meta WHERE name = 'writer'")
        self._base.close()

    # Trials

    def trials(self) -> tuple[Trial, ...]:
        """Return the trials in the order in which they finished."""
        rows = self._base.execute("SELECT trial FROM trials ORDER BY position").fetchall()
        return tuple(Trial.model_validate_json(row[0]) for row in rows)

    def add(self, trial: Trial, predictions: Mapping[Part, Predictions]) -> None:
        """Store a finished trial and its predictions, both or neither.

        Raises:
            JournalError: A trial of this key is there already.
        """
        with self._transaction():
            try:
                self._base.execute(
                    "INSERT INTO trials (key, trial) VALUES (?, ?)", (trial.key, trial.model_dump_json())
                )
            except sqlite3.IntegrityError as error:
                raise JournalError(f"{self.path}: trial {trial.key} is there already; report this") from error
            for part, kept in predictions.items():
                self._add_predictions(trial.key, part, kept)

    def forget_trials(self, state: TrialState) -> int:
        """Take out the trials that ended so, and return their count."""
        with self._transaction():
            gone = [t.key for t in self.trials() if t.state == state]
            for key in gone:
                self._base.execute("DELETE FROM trials WHERE key = ?", (key,))
                self._base.execute("DELETE FROM predictions WHERE key = ?", (key,))
        return len(gone)

    def predictions(self, key: str, part: Part) -> Predictions | None:
        """Return what a trial predicted on a part of the images, none where it was not run on it."""
        row = self._base.execute(
            "SELECT arrays FROM predictions WHERE key = ? AND part = ?", (key, part)
        ).fetchone()
        return None if row is None else _unpack(row[0])

    def add_predictions(self, key: str, part: Part, kept: Predictions) -> None:
        """Store predictions of a trial that was stored before (the holdout images of a finalist)."""
        with self._transaction():
            self._add_predictions(key, part, kept)

    # Decisions

    def decision(self, name: str) -> str | None:
        """Return what was decided under this name, none where nothing was."""
        row = self._base.execute("SELECT value FROM decisions WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def decide(self, name: str, value: str) -> None:
        """Keep a decision; a later one of the same name takes its place."""
        with self._transaction():
            self._base.execute("INSERT OR REPLACE INTO decisions (name, value) VALUES (?, ?)", (name, value))

    def forget(self, name: str) -> None:
        """Take a decision out."""
        with self._transaction():
            self._base.execute("DELETE FROM decisions WHERE name = ?", (name,))

    def _add_predictions(self, key: str, part: Part, kept: Predictions) -> None:
        self._base.execute(
            "INSERT OR REPLACE INTO predictions (key, part, arrays) VALUES (?, ?, ?)",
            (key, part, _pack(kept)),
        )

    def _open(self, identity: dict[str, str]) -> None:
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.execute("PRAGMA synchronous=FULL")
        with self._transaction():
            if not self._base.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                if self._base.execute("SELECT 1 FROM sqlite_master").fetchone():
                    raise JournalError(f"{self.path}: is not a journal of fewbit; {_ANOTHER}")
                for statement in _TABLES.strip().split(";\n"):
                    self._base.execute(statement)
                self._put("schema", str(SCHEMA))
            elif self._get("schema") != str(SCHEMA):
                raise JournalError(
                    f"{self.path}: is of journal version {self._get('schema')}, this fewbit writes {SCHEMA}; "
                    "give another folder with --out"
                )
            self._check(identity)
            self._take(f"{psutil.Process().pid}@{psutil.Process().create_time()}")

    def _check(self, identity: dict[str, str]) -> None:
        known: dict[str, str] = json.loads(self._get("identity") or "{}")
        gone = [name for name in known if name not in identity]
        if gone:
            raise JournalError(
                f"{self.path}: is the journal of {gone[0]}, which is not given now; {_ANOTHER}"
            )
        for name, now in identity.items():
            if known.get(name, now) != now:
                raise JournalError(
                    f"{self.path}: {name} was {known[name]} when it was made, now it is {now}; {_ANOTHER}"
                )
        new = [name for name in identity if name not in known and not name.startswith("network ")]
        if known and new:
            raise JournalError(f"{self.path}: was made without {new[0]}; {_ANOTHER}")
        self._put("identity", json.dumps(identity, sort_keys=True))

    def _take(self, me: str) -> None:
        """Sign as the writer, unless another living process has."""
        writer = self._get("writer")
        if writer and writer != me:
            pid, _, started = writer.partition("@")
            try:
                alive = psutil.Process(int(pid)).create_time() == float(started)
            except psutil.Error:
                alive = False
            if alive:
                raise JournalError(f"{self.path}: process {pid} is writing it; wait for its end, or end it")
        self._put("writer", me)

    def _get(self, name: str) -> str | None:
        row = self._base.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def _put(self, name: str, value: str) -> None:
        self._base.execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", (name, value))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with phase("journal"), _explained(self.path):
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._base.in_transaction:  # a full disk has rolled back by itself
                    self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")


def refuse_another(folder: Path, resume: bool) -> None:
    """Refuse a folder that has a study, unless it is to be gone on with.

    Raises:
        JournalError: It has one.
    """
    path = folder / FILE
    if path.exists() and path.stat().st_size > 0 and not resume:
        raise JournalError(
            f"{path}: there is a study already; go on with it by --resume {folder}, "
            "or give another folder with --out"
        )


def read_study(folder: Path) -> StudyRecord:
    """Read the record of a study that a search wrote, without changing anything.

    Raises:
        JournalError: The folder has no study, one that was ended before its first trial, or a damaged one.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise JournalError(f"{folder}: has no {FILE}; give the folder that 'fewbit search --out' wrote")
    with _explained(path):
        base = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            row = base.execute("SELECT value FROM decisions WHERE name = 'record'").fetchone()
        finally:
            base.close()
    if row is None:
        raise JournalError(
            f"{path}: the search was ended before its first result; go on by --resume {folder}"
        )
    try:
        return StudyRecord.model_validate_json(row[0])
    except ValidationError as error:
        raise JournalError(f"{path}: its record is of another version of fewbit; search again") from error


def _pack(kept: Predictions) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(
        file,
        images=np.array(len(kept.label)),
        top1_right=np.packbits(kept.top1_right),
        top5_right=np.packbits(kept.top5_right),
        label=kept.label.astype(np.int32),
    )
    return file.getvalue()


def _unpack(blob: bytes) -> Predictions:
    with np.load(io.BytesIO(blob), allow_pickle=False) as arrays:
        images = int(arrays["images"])
        return Predictions(
            top1_right=np.unpackbits(arrays["top1_right"], count=images).astype(bool),
            top5_right=np.unpackbits(arrays["top5_right"], count=images).astype(bool),
            label=arrays["label"].astype(np.int64),
        )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into one line that says what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise JournalError(f"{path}: another process holds it; wait for its end, or end it") from error
        raise OutputError(
            f"{path}: cannot be written ({error}); make room, or give a folder you may write to with --out"
        ) from error
    except sqlite3.DatabaseError as error:
        raise JournalError(
            f"{path}: is damaged or not a journal ({error}); give another folder with --out"
        ) from error
