"""The speed side of a search: which setting runs a file best, and by how much it beats float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import TypeAdapter

from fewbit.engines.process import EngineProcess, RemoteSession
from fewbit.engines.session import EngineName, FloatPrecision, Setting
from fewbit.errors import EngineError
from fewbit.measure.speed import Goal, Surveyed, Timing, measure_interleaved, survey
from fewbit.search.journal import Journal
from fewbit.search.settings import first_stage, second_stage
from fewbit.search.standing import Terms

_SURVEY_S, _SURVEY_CALLS = 1.5, 6
_VAGUE = 0.3
_RACED = 2
_SURVEYS = TypeAdapter(tuple[Surveyed, ...])


class Sessions:
    """Opened files, one process an engine; a process that died is replaced when the next file is opened."""

    def __init__(self) -> None:
        self._processes: dict[EngineName, EngineProcess] = {}
        self._open: dict[tuple[Path, Setting], RemoteSession] = {}
        self._held: tuple[Path, Setting] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.close()

    def get(self, path: Path, setting: Setting) -> RemoteSession:
        """Return the file opened with a setting, opening it where it is not.

        Raises:
            EngineError: The engine refuses the file, crashed or hung.
        """
        if (path, setting) not in self._open:
            if setting.engine not in self._processes:
                self._processes[setting.engine] = EngineProcess(setting.engine)
            self._open[path, setting] = self._processes[setting.engine].open(path, setting)
        return self._open[path, setting]

    def hold(self, path: Path, setting: Setting) -> None:
        """Let a file stay open when others are freed, in place of the one before: what all are timed with."""
        self._held = path, setting

    def free(self, keep: Sequence[tuple[Path, Setting]] = ()) -> None:
        """Close every file but those to keep and the one held; those of a dead process are forgotten."""
        self._close([key for key in self._open if key != self._held and key not in keep])

    def shut(self, path: Path) -> None:
        """Close a file in every setting, since another is to take its place."""
        self._close([key for key in self._open if key[0] == path])

    def _close(self, keys: Sequence[tuple[Path, Setting]]) -> None:
        for key in keys:
            session = self._open.pop(key)
            try:
                session.close()
            except EngineError:
                self.forget(key[1].engine)

    def forget(self, engine: EngineName) -> None:
        """Let go of an engine's process and of all that was open in it."""
        for key in [key for key in self._open if key[1].engine == engine]:
            del self._open[key]
        process = self._processes.pop(engine, None)
        if process is not None:
            process.close()


class Speeds:
    """Chooses settings and times files; choices go into the journal, so that a resumed search repeats them.

    Args:
        terms: What is better, and which latency is allowed.
        batches: Batch sizes allowed.
        threads: Threads of a run.
        journal: Where choices are kept.
        sessions: Where files are opened.
        seed: Of the order of rounds.
        pace: Time spent, as a multiple of the usual.
    """

    def __init__(
        self,
        terms: Terms,
        batches: Sequence[int],
        threads: int,
        journal: Journal,
        sessions: Sessions,
        seed: int,
        pace: float = 1.0,
    ) -> None:
        self.terms, self.batches, self.threads = terms, tuple(batches), threads
        self.journal, self.sessions, self.seed, self.pace = journal, sessions, seed, pace

    def survey(self, path: Path, engine: EngineName, float_precision: FloatPrecision) -> tuple[Surveyed, ...]:
        """Try the settings worth trying for a file, the best first.

        Raises:
            EngineError: The engine does not run the file in any setting.
        """
        name = f"survey {path.stem} {engine} {float_precision}"
        kept = self.journal.decision(name)
        if kept is not None:
            return _SURVEYS.validate_json(kept)
        first = first_stage(self.terms.objective, engine, float_precision, self.batches, self.threads)
        found = self._survey(path, first)
        others = second_stage(self.terms.objective, found[0].setting, self.batches)
        if others:
            try:
                found = self._survey(path, (found[0].setting, *others)) + found[1:]
            except EngineError:  # a batch too large for it takes its process down; the first stage stands
                self.sessions.forget(engine)
        self.journal.decide(name, _SURVEYS.dump_json(found).decode())
        return found

    def best(self, surveyed: Sequence[Surveyed], most: int = 1) -> tuple[Setting, ...]:
        """Return the best settings of a survey, of those inside budgets of latency where there are any."""
        inside = [s for s in surveyed if s.images_per_s and self._fast_enough(s.ms_per_batch)]
        return tuple(s.setting for s in (inside or list(surveyed))[:most])

    def baseline(self, network: str, path: Path) -> Setting:
        """Return the setting in which true float32 of a network is fastest, whichever engine runs it.

        Raises:
            EngineError: No engine runs it.
        """
        name = f"baseline {network}"
        kept = self.journal.decision(name)
        if kept is not None:
            return Setting.model_validate_json(kept)
        found, reasons = list[Setting](), list[str]()
        for engine in self.terms.engines:
            try:
                surveyed = self.survey(path, engine, "float32")
            except EngineError as error:
                self.sessions.forget(engine)
                reasons.append(str(error))
                continue
            found += self.best(surveyed, _RACED)
            self.sessions.free([(path, setting) for setting in found])
        if not found:
            raise EngineError(reasons[0])
        chosen = self._race(path, found)
        self.journal.decide(name, chosen.model_dump_json())
        return chosen

    def time(
        self,
        path: Path,
        settings: Sequence[Setting],
        against: tuple[Path, Setting],
        rounds: int,
        block_s: float,
        budget_s: float,
    ) -> Timing:
        """Time a file side by side with the float32 baseline, twice as long where the ratio stays vague.

        Args:
            path: The file.
            settings: How it may be run; the timing of the fastest inside the budgets of latency is returned.
            against: The baseline.
            rounds: See `measure_interleaved`.
            block_s: See `measure_interleaved`.
            budget_s: Seconds for the pair of a setting and the baseline.

        Raises:
            EngineError: One of them failed.
        """
        self.sessions.hold(*against)
        every = [against, *((path, setting) for setting in settings)]
        share = budget_s * len(every) / 2
        timing = max(
            self.time_all(every, rounds, block_s, share)[1:],
            key=lambda t: (self._fast_enough(t.ms_per_batch_p50), t.images_per_s),
        )
        pair = (against, (path, timing.setting))
        if timing.ratio and timing.ratio_interval is not None:
            width = (timing.ratio_interval.high - timing.ratio_interval.low) / timing.ratio
            if width > _VAGUE:  # others use the machine: more rounds mend it
                timing = self.time_all(pair, 2 * rounds, block_s, 2 * budget_s)[1]
        return timing

    def time_all(
        self, candidates: Sequence[tuple[Path, Setting]], rounds: int, block_s: float, budget_s: float
    ) -> list[Timing]:
        """Time files side by side; the ratios are against the first.

        Raises:
            EngineError: One of them failed.
        """
        opened = [self.sessions.get(*candidate) for candidate in candidates]
        return measure_interleaved(
            opened,
            rounds,
            block_s * self.pace,
            self.seed,
            baseline=0,
            against=_name(candidates[0][1]),
            budget_s=budget_s * self.pace,
        )

    def _race(self, path: Path, settings: Sequence[Setting]) -> Setting:
        """Return the fastest of the engines' best settings, side by side."""
        if len(settings) == 1:
            return settings[0]
        timings = measure_interleaved(
            [self.sessions.get(path, s) for s in settings],
            6,
            0.1 * self.pace,
            self.seed,
            baseline=None,
            budget_s=_SURVEY_S * self.pace * len(settings) / 2,
        )
        return max(timings, key=lambda t: t.images_per_s).setting

    def _survey(self, path: Path, settings: Sequence[Setting]) -> tuple[Surveyed, ...]:
        sessions, reasons = list[RemoteSession](), list[str]()
        for setting in settings:
            try:
                sessions.append(self.sessions.get(path, setting))
            except EngineError as error:
                reasons.append(str(error))
        goal: Goal = "latency" if self.terms.objective == "latency" else "throughput"
        found = tuple(survey(sessions, self._survey_s(sessions), 1, self.seed, goal=goal)) if sessions else ()
        if not any(s.images_per_s for s in found):
            reasons = [s.reason for s in found if s.reason] + reasons
            raise EngineError(reasons[0] if reasons else f"{path.name}: it did not run")
        return found

    def _survey_s(self, sessions: Sequence[RemoteSession]) -> float:
        """The usual time, or more where a large network would not get a few calls of each setting."""
        try:
            call = sessions[0].time_block(0.0)
        except EngineError:  # the survey says so of each candidate
            return _SURVEY_S * self.pace
        images = sum(s.setting.batch * s.setting.streams for s in sessions)
        return max(_SURVEY_S * self.pace, _SURVEY_CALLS * images * call.seconds / call.images)

    def _fast_enough(self, ms: float) -> bool:
        """Say whether the time of a call is inside every budget of latency."""
        return all(b.holds(ms) for b in self.terms.budgets if b.measure == "latency")


def _name(setting: Setting) -> str:
    how = f"batch {setting.batch}, threads {setting.threads}, streams {setting.streams}"
    return f"float32 on {setting.engine}, {how}"
