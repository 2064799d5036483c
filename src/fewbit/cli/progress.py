"""Progress with the time left: bars in a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from fewbit.search.trial import Trial
from fewbit.search.watch import Event, Watch

Tell = Callable[[str, float], None]
_PLAIN_EVERY_S = 10.0
_SAMPLE_EVERY_S, _WINDOW_S = 1.0, 30.0


@contextmanager
def search_progress(quiet: bool = False) -> Iterator[Watch]:
    """Give the listener of a search: a bar and the finished trials in a terminal, one line each elsewhere."""
    if quiet:
        yield lambda event: None
    elif sys.stderr.isatty():
        with _bar() as progress:
            yield _Bar(progress)
    else:
        yield _Lines()


@contextmanager
def step_progress(title: str, quiet: bool = False) -> Iterator[Tell]:
    """Give the listener of one piece of work: told what it does and the fraction done of that.

    A bar with the time left in a terminal; elsewhere a line every ten seconds.
    """
    pace = _Pace()
    if quiet:
        yield lambda what, fraction: None
    elif not sys.stderr.isatty():
        told = time.monotonic()

        def say(what: str, fraction: float) -> None:
            nonlocal told
            left = time_left(pace.seconds_left(what, fraction))
            if time.monotonic() - told >= _PLAIN_EVERY_S:
                told = time.monotonic()
                _print_line(fraction, f"{title}: {what}", left)

        yield say
    else:
        with _bar() as progress:
            task = progress.add_task(title, total=1.0, left="")

            def tell(what: str, fraction: float) -> None:
                left = time_left(pace.seconds_left(what, fraction))
                progress.update(task, description=f"{title}: {what}", completed=fraction, left=left)

            yield tell


class _Pace:
    """Estimates the time left from the last half minute, which a resumed run's leap soon falls out of."""

    def __init__(self) -> None:
        self.what, self.seen = "", deque[tuple[float, float]]()

    def seconds_left(self, what: str, fraction: float) -> float | None:
        """Take what is done and how far it is; return the seconds left, or none while nobody can know."""
        now = time.monotonic()
        if what != self.what or (self.seen and fraction < self.seen[-1][1]):
            self.what = what
            self.seen.clear()
        if not self.seen or now - self.seen[-1][0] >= _SAMPLE_EVERY_S:
            self.seen.append((now, fraction))
        while len(self.seen) > 2 and now - self.seen[1][0] >= _WINDOW_S:
            self.seen.popleft()
        begin, done = self.seen[0]
        if now - begin < _SAMPLE_EVERY_S or fraction <= done:
            return None
        return (1 - fraction) * (now - begin) / (fraction - done)


def _bar() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def describe_trial(trial: Trial) -> str:
    """Say in one line what a trial measured."""
    words = [f"{trial.network} {trial.recipe} on {trial.setting.engine}"]
    if trial.accuracy is not None:
        words.append(f"top-1 {trial.accuracy.top1:.2%} of {trial.accuracy.total} images")
    if trial.timing is not None:
        words.append(f"{trial.timing.images_per_s:,.0f} images/s")
        if trial.timing.ratio is not None:
            words.append(f"{trial.timing.ratio:.2f}x float32")
    if trial.state != "measured":
        words.append(f"{trial.state}: {trial.reason}")
    return ", ".join(words)


def time_left(seconds: float | None) -> str:
    """Say a duration the way a person would.

    >>> time_left(75)
    '1 min 15 s left'
    >>> time_left(None)
    ''
    """
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s left" if minutes else f"{rest} s left"


class _Bar:
    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: TaskID = progress.add_task("starting", total=1.0, left="")

    def __call__(self, event: Event) -> None:
        if event.kind == "end" and event.trial is not None:
            self.progress.console.print(describe_trial(event.trial), highlight=False, markup=False)
        elif event.kind == "note":
            self.progress.console.print(event.text, highlight=False, markup=False)
        self.progress.update(
            self.task, description=event.text, completed=event.fraction, left=time_left(event.seconds_left)
        )


class _Lines:
    def __init__(self) -> None:
        self.told = time.monotonic()

    def __call__(self, event: Event) -> None:
        if event.kind == "progress" and time.monotonic() - self.told < _PLAIN_EVERY_S:
            return
        if event.kind == "begin":
            return
        self.told = time.monotonic()
        text = describe_trial(event.trial) if event.kind == "end" and event.trial is not None else event.text
        left = time_left(event.seconds_left)
        _print_line(event.fraction, text, left)


def _print_line(fraction: float, text: str, left: str) -> None:
    print(f"[{fraction:4.0%}] {text}{f' ({left})' if left else ''}", file=sys.stderr, flush=True)
