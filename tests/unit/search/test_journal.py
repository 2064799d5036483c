"""The journal: nothing lost, nothing twice, nobody else's."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fewbit.engines.session import Setting
from fewbit.errors import JournalError, OutputError
from fewbit.measure.accuracy import Accuracy, Predictions
from fewbit.search.journal import FILE, Journal, read_study
from fewbit.search.trial import Trial, TrialState

IDENTITY = {"fewbit": "0.1.0", "network resnet20": "abc", "data": "123", "seed": "0"}


def _trial(key: str, state: TrialState = "measured") -> Trial:
    return Trial(
        key=key,
        network="resnet20",
        recipe="int8",
        recipe_toml='name = "int8"\n',
        rung="int8",
        setting=Setting(),
        state=state,
        accuracy=Accuracy(top1_correct=3, top5_correct=4, total=5),
    )


def _predictions(images: int = 13, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    right = rng.random(images) < 0.5
    return Predictions(
        top1_right=right, top5_right=right | (rng.random(images) < 0.5), label=rng.integers(0, 1000, images)
    )


def test_trials_and_predictions_come_back_as_they_were(tmp_path: Path) -> None:
    kept = _predictions()
    with Journal(tmp_path, IDENTITY) as journal:
        journal.add(_trial("a"), {"search": kept})
        journal.add(_trial("b"), {})
        journal.add_predictions("a", "holdout", _predictions(3, 1))
        journal.decide("baseline", "first")
        journal.decide("baseline", "second")
    with Journal(tmp_path, IDENTITY, resume=True) as journal:
        assert journal.trials() == (_trial("a"), _trial("b"))
        again = journal.predictions("a", "search")
        assert again is not None
        np.testing.assert_array_equal(again.top1_right, kept.top1_right)
        np.testing.assert_array_equal(again.top5_right, kept.top5_right)
        np.testing.assert_array_equal(again.label, kept.label)
        holdout = journal.predictions("a", "holdout")
        assert holdout is not None and len(holdout.label) == 3
        assert journal.predictions("b", "search") is None
        assert journal.decision("baseline") == "second"
        assert journal.decision("other") is None


def test_write_ahead_log_and_full_synchronisation(tmp_path: Path) -> None:
    with Journal(tmp_path, IDENTITY) as journal:
        assert journal._base.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert journal._base.execute("PRAGMA synchronous").fetchone() == (2,)


def test_no_trial_is_stored_twice(tmp_path: Path) -> None:
    with Journal(tmp_path, IDENTITY) as journal:
        journal.add(_trial("a"), {"search": _predictions()})
        with pytest.raises(JournalError, match="trial a is there already"):
            journal.add(_trial("a", "failed"), {"search": _predictions(5)})
        kept = journal.predictions("a", "search")
        assert journal.trials() == (_trial("a"),)
        assert kept is not None and len(kept.label) == 13


def test_dropped_trials_can_be_forgotten(tmp_path: Path) -> None:
    with Journal(tmp_path, IDENTITY) as journal:
        journal.add(_trial("a"), {})
        journal.add(_trial("b", "dropped"), {"search": _predictions()})
        assert journal.forget_trials("dropped") == 1
        assert [t.key for t in journal.trials()] == ["a"]
        assert journal.predictions("b", "search") is None
        journal.add(_trial("b"), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"network resnet20": "abd"},
            "network resnet20 was abc when it was made, now it is abd; give what it was made",
        ),
        ({"fewbit": "0.2.0"}, "fewbit was 0.1.0 when it was made, now it is 0.2.0"),
        ({"data": "124"}, "data was 123 when it was made, now it is 124"),
        ({"calibration": "9"}, "was made without calibration"),
    ],
)
def test_another_study_is_refused_by_name(tmp_path: Path, change: dict[str, str], message: str) -> None:
    Journal(tmp_path, IDENTITY).close()
    with pytest.raises(JournalError) as error:
        Journal(tmp_path, IDENTITY | change, resume=True)
    assert message in str(error.value)
    assert str(tmp_path / FILE) in str(error.value)
    Journal(tmp_path, IDENTITY, resume=True).close()


def test_another_network_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, IDENTITY).close()
    other = {k: v for k, v in IDENTITY.items() if not k.startswith("network")} | {"network resnet56": "abc"}
    with pytest.raises(JournalError, match="is the journal of network resnet20, which is not given now"):
        Journal(tmp_path, other, resume=True)


def test_a_network_may_be_added(tmp_path: Path) -> None:
    Journal(tmp_path, IDENTITY).close()
    more = IDENTITY | {"network resnet56": "def"}
    Journal(tmp_path, more, resume=True).close()
    with pytest.raises(JournalError, match="network resnet56, which is not given now"):
        Journal(tmp_path, IDENTITY, resume=True)


def test_a_study_is_not_overwritten_without_resume(tmp_path: Path) -> None:
    Journal(tmp_path, IDENTITY).close()
    with pytest.raises(
        JournalError, match=r"there is a study already; go on with it by --resume .*, or give another"
    ):
        Journal(tmp_path, IDENTITY)


def test_resume_where_there_is_nothing_starts_anew(tmp_path: Path) -> None:
    with Journal(tmp_path / "new", IDENTITY, resume=True) as journal:
        assert journal.trials() == ()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"this is no database, and long enough to be read as a header" * 50)
    with pytest.raises(JournalError, match="is damaged or not a journal"):
        Journal(tmp_path, IDENTITY, resume=True)


def test_somebody_elses_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / FILE)
    other.execute("CREATE TABLE mine (x)")
    other.commit()
    other.close()
    with pytest.raises(JournalError, match="is not a journal of fewbit"):
        Journal(tmp_path, IDENTITY, resume=True)
    other = sqlite3.connect(tmp_path / FILE)
    assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("mine",)]
    other.close()


def test_a_later_journal_version_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path, IDENTITY) as journal:
        journal._put("schema", "99")
    with pytest.raises(JournalError, match="is of journal version 99, this fewbit writes 1"):
        Journal(tmp_path, IDENTITY, resume=True)


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="out: cannot be made"):
        Journal(tmp_path / "out", IDENTITY)


def test_a_full_disk_says_so_and_keeps_what_was_there(tmp_path: Path) -> None:
    with Journal(tmp_path, IDENTITY) as journal:
        journal.add(_trial("a"), {"search": _predictions()})
        pages = journal._base.execute("PRAGMA page_count").fetchone()[0]
        journal._base.execute(f"PRAGMA max_page_count={pages + 1}")
        with pytest.raises(
            OutputError, match=r"study\.db: cannot be written \(database or disk is full\); make room"
        ):
            journal.add(_trial("b"), {"search": _predictions(300_000)})
        assert [t.key for t in journal.trials()] == ["a"]
    with Journal(tmp_path, IDENTITY, resume=True) as journal:
        assert [t.key for t in journal.trials()] == ["a"]
        assert journal.predictions("b", "search") is None


def test_two_searches_do_not_write_one_journal(tmp_path: Path) -> None:
    code = (
        "import json, sys, time; from pathlib import Path; from fewbit.search.journal import Journal\n"
        "Journal(Path(sys.argv[1]), json.loads(sys.argv[2])); print('open', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(IDENTITY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"open\n"
        with pytest.raises(JournalError, match=f"process {other.pid} is writing it"):
            Journal(tmp_path, IDENTITY, resume=True)
        other.kill()
    Journal(tmp_path, IDENTITY, resume=True).close()


def test_killed_while_writing_keeps_every_finished_trial(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
from fewbit.engines.session import Setting
from fewbit.measure.accuracy import Predictions
from fewbit.search.journal import Journal
from fewbit.search.trial import Trial
right = np.ones(2000, bool)
with Journal(Path(sys.argv[1]), {"seed": "0"}) as journal:
    for i in range(100000):
        names = dict(network="n", recipe="r", recipe_toml="", rung="x")
        trial = Trial(key=str(i), setting=Setting(), state="failed", **names)
        journal.add(trial, {"search": Predictions(top1_right=right, top5_right=right, label=np.arange(2000))})
        print(i, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < 20:
            pass
        time.sleep(0.01)
        os.kill(writer.pid, signal.SIGKILL)
        told = [int(line) for line in writer.stdout.read().split() if line]
    with Journal(tmp_path, {"seed": "0"}, resume=True) as journal:
        keys = [int(t.key) for t in journal.trials()]
        assert keys == list(range(len(keys)))
        assert len(keys) >= max(told, default=20)
        assert all(journal.predictions(str(k), "search") is not None for k in keys)


def test_a_folder_without_a_study_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        JournalError, match=r"has no study\.db; give the folder that 'fewbit search --out' wrote"
    ):
        read_study(tmp_path)
    Journal(tmp_path, IDENTITY).close()
    with pytest.raises(JournalError, match="the search was ended before its first result"):
        read_study(tmp_path)
