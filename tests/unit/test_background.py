from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

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


def test_work_goes_on_beside_work() -> None:
    with working(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(count).result(SOON_S) == 2
    with quiet():
        assert busy() == 0


def count() -> int:
    with working():
        return busy()
