from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fewbit import background
from fewbit.background import busy, quiet, working

SOON_S, NEVER_S = 10.0, 0.1


def test_quiet_waits_for_work_and_keeps_more_from_beginning() -> None:
    began, finish, second = threading.Event(), threading.Event(), threading.Event()
    seen: list[int] = []

    def first() -> None:
        with working():
            began.set()
            assert finish.wait(SOON_S)

    def later() -> None:
        with working():
            second.set()

    def ask(inside: threading.Event, leave: threading.Event) -> None:
        with quiet():
            seen.append(busy())
            inside.set()
            assert leave.wait(SOON_S)
            seen.append(busy())

    inside, leave = threading.Event(), threading.Event()
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(first)]
        assert began.wait(SOON_S)
        jobs.append(pool.submit(ask, inside, leave))
        assert not inside.wait(NEVER_S)
        finish.set()
        assert inside.wait(SOON_S)
        jobs.append(pool.submit(later))
        assert not second.wait(NEVER_S)
        leave.set()
        assert second.wait(SOON_S)
        for job in jobs:
            job.result()
    assert seen == [0, 0] and busy() == 0


def test_an_interrupt_while_it_waits_lets_others_work_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(background._changed, "wait_for", interrupt)
        with pytest.raises(KeyboardInterrupt), quiet():
            pass
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(count).result(SOON_S) == 1


def test_work_goes_on_beside_work() -> None:
    with working(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(count).result(SOON_S) == 2
    with quiet():
        assert busy() == 0


def count() -> int:
    with working():
        return busy()
