from __future__ import annotations

import ctypes
import os
import threading

import pytest

from fewbit.search.mixed.quiet import quiet_stdout

LIBC = ctypes.CDLL(None)


def test_what_c_prints_is_thrown_away_and_what_was_waiting_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    LIBC.printf(b"before ")
    with quiet_stdout():
        LIBC.printf(b"inside ")
        os.write(1, b"inside too ")
        os.write(2, b"an error")
    LIBC.printf(b"after")
    LIBC.fflush(None)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("before after", "an error")


def test_it_comes_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="gone wrong"), quiet_stdout():
        raise ValueError("gone wrong")
    os.write(1, b"heard")
    assert capfd.readouterr().out == "heard"


def test_without_a_standard_output_the_block_just_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: int) -> int:
        raise OSError("bad file descriptor")

    monkeypatch.setattr(os, "dup", none)
    ran = []
    with quiet_stdout():
        ran.append(True)
    assert ran == [True]


def test_threads_may_overlap(capfd: pytest.CaptureFixture[str]) -> None:
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with quiet_stdout():
            first_in.set()
            assert second_in.wait(10)
        first_out.set()

    def second() -> None:
        assert first_in.wait(10)
        with quiet_stdout():
            second_in.set()
            assert first_out.wait(10)
            os.write(1, b"still inside")

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    os.write(1, b"heard")
    assert capfd.readouterr().out == "heard"
