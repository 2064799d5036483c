"""`run_study`: many recipes and networks under budgets, every trial in a journal, an answer at the end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import NamedTuple

from pydantic import TypeAdapter

from fewbit.clock import Clock, PhaseTime, phase
from fewbit.engines.process import engines_cpu_s
from fewbit.engines.saturation import saturating_engines
from fewbit.errors import InputError
from fewbit.files import write_text
from fewbit.measure.accuracy import Predictions
from fewbit.measure.host import Host, describe_host, versions
from fewbit.search.cost import count_cost
from fewbit.search.family import Family, most_matrix_gain, new_ones
from fewbit.search.finish import Finish
from fewbit.search.fit import fewer, share_of_images
from fewbit.search.gather import expected_note, expected_parts, gather, identity
from fewbit.search.journal import Journal, Part, read_study, refuse_another
from fewbit.search.kept_aids import KeptAids, Run
from fewbit.search.ladder import Ladder
from fewbit.search.options import StudyOptions
from fewbit.search.proposal import Aids, Proposal
from fewbit.search.speeds import Sessions, Speeds
from fewbit.search.standing import Standing, Terms
from fewbit.search.trial import Answer, DataRecord, LeftOut, StudyRecord, Trial
from fewbit.search.trials import Trials
from fewbit.search.watch import Event, EventKind, Watch, silence
from fewbit.search.workbench import Workbench

__all__ = ["read_study", "run_study"]

_FINISH_S = 16.0
_FIRST_TRIAL_S = 8.0
_MOST_REFUTED = 6
_LEFT_OUT = TypeAdapter(tuple[LeftOut, ...])
_PHASES = TypeAdapter(tuple[PhaseTime, ...])


class _Known(NamedTuple):
    """What does not change while a search runs."""

    options: StudyOptions
    terms: Terms
    host: Host
    versions: dict[str, str]
    benches: tuple[Workbench, ...]
    data: DataRecord


def run_study(options: StudyOptions, watch: Watch = silence) -> StudyRecord:
    """Search for the fastest (or smallest) network inside the budgets.

    Every finished trial is in the journal `out/study.db`; a search that was killed goes on from there with
    `resume`. The deployable file and its recipe are left in `out/best/`.

    Args:
        options: What to search.
        watch: Told what happens.

    Returns:
        Everything that a report needs. Its `answer.found` says whether a network is inside every budget; the
        answer is none only where no engine ran any network.

    Raises:
        InputError: The networks, the images, the folder or its journal cannot be used.
    """
    begin = time.perf_counter()

    def tell(text: str, fraction: float) -> None:
        watch(Event("progress", text, inside=fraction))

    with ExitStack() as stack:
        stack.enter_context(_folder(options))
        clock = stack.enter_context(Clock("search", engines_cpu_s))
        with phase("host"):
            host, known_versions = describe_host(), versions()
            saturating = saturating_engines(options.engines, host.saturates_u8s8)
        with phase("gather"):
            benches, data = gather(options, tell, saturating)
        known = _Known(options, _terms(options, host, benches), host, known_versions, benches, data)
        journal = stack.enter_context(
            Journal(options.out, identity(options, benches, host, known_versions), options.resume)
        )
        sessions = stack.enter_context(Sessions())
        return _Search(known, journal, sessions, watch, begin, clock).run()


class _Search:
    """One run of a search; an earlier run of the same study may have done a part."""

    def __init__(
        self,
        known: _Known,
        journal: Journal,
        sessions: Sessions,
        watch: Watch,
        begin: float,
        clock: Clock,
    ) -> None:
        self.known, self.journal, self.watch, self.begin = known, journal, watch, begin
        self.clock = clock
        clock.add(_PHASES.validate_json(journal.decision("phases") or "[]"))
        options, terms = known.options, known.terms
        threads = options.threads or known.host.cores
        speeds = Speeds(terms, options.batches, threads, journal, sessions, options.seed, options.timing_pace)
        expected = {bench.name: expected_parts(options, bench) for bench in known.benches}
        self.trials = Trials(known.benches, expected, journal, sessions, speeds)
        self.earlier_s = float(journal.decision("seconds") or 0.0)
        self.notes, self.data = _first_notes(known), known.data
        self.history: list[Trial] = []
        self.refuted: set[str] = set()
        self.rung, self.told = "", 0.0

    def run(self) -> StudyRecord:
        """Climb the ladder, then find the answer among what was measured."""
        for note in self.notes:
            self._tell("note", note)
        self._meet_terms()
        self._fit_images()
        self.history = list(self.journal.trials())
        self.refuted = set((self.journal.decision("refuted") or "").split())
        proposal = self._climb()
        while self._refute():
            proposal = self._climb()
        self._check_expected()
        answer = self._earlier_answer() if proposal is None else None
        if answer is None:
            answer = self._finish()
        record = self._record(answer)
        self.journal.decide("record", record.model_dump_json())
        self._keep_time()
        text = "nothing ran" if answer is None else "found" if answer.found else "nothing inside the budget"
        self._tell("answer", text, fraction=1.0)
        return record

    def _climb(self) -> Proposal | None:
        """Measure what the ladder proposes; return what it would next where time or trials are out."""
        ladder = Ladder(lambda history: self._standing(), self._aids)
        while (proposal := ladder.propose(self.history)) is not None and self._may_go_on():
            self._tell_left_out()
            self._measure(proposal)
        self._tell_left_out()
        return proposal

    @cached_property
    def _aids(self) -> Aids:
        """What rungs may ask for: one for the whole run, which remembers what was refused."""
        run = Run(
            self._standing,
            self._may_go_on,
            self._left_s,
            lambda text, done: self._tell("progress", text, inside=done),
            self._note,
        )
        return KeptAids(self.trials, self.journal, run, self.known.options.minutes).aids()

    def _tell_left_out(self) -> None:
        """Say who has no hope any more, once; the journal keeps what was known when it was decided."""
        kept = self.journal.decision("left out")
        before = () if kept is None else _LEFT_OUT.validate_json(kept)
        new = new_ones(before, Family(self._standing()).left_out())
        for one in new:
            self._tell("note", f"not quantized: {one.text}")
        if new:
            self.journal.decide("left out", _LEFT_OUT.dump_json((*before, *new)).decode())

    @phase("finish")
    def _refute(self) -> bool:
        """Hold the best against the holdout images; say whether to climb on, since they refused some."""
        if len(self.refuted) >= _MOST_REFUTED or not self._may_go_on():
            return False
        finish = self._make_finish()
        refuted = finish.refuted() - self.refuted
        for note in finish.notes:
            self._note(note)
        self.trials.sessions.free()
        self.refuted |= refuted
        self.journal.decide("refuted", " ".join(sorted(self.refuted)))
        return bool(refuted)

    def _standing(self) -> Standing:
        return Standing(self.known.terms, self.history, self.refuted)

    @phase("trials")
    def _measure(self, proposal: Proposal) -> None:
        if proposal.rung != self.rung:
            self.rung = proposal.rung
            self._tell("rung", proposal.rung)
        name = f"{proposal.network} {proposal.recipe} on {proposal.engine}"
        self._tell("begin", name)
        trial, predictions = self.trials.measure(
            proposal,
            self._standing(),
            lambda text, done: self._tell("progress", f"{name}: {text}", inside=done),
        )
        self._add(trial, predictions)
        self._tell("end", _told(trial), trial=trial)
        if proposal.rung == "float32":
            self._check_expected()

    def _add(self, trial: Trial, predictions: dict[Part, Predictions]) -> None:
        self.journal.add(trial, predictions)
        self.history.append(trial)
        self._keep_time()
        self.journal.decide("record", self._record(None).model_dump_json())

    def _keep_time(self) -> None:
        self.journal.decide("seconds", str(self._seconds()))
        self.journal.decide("phases", _PHASES.dump_json(self.clock.phases()).decode())

    def _make_finish(self) -> Finish:
        left = self._left_s()
        budget_s = _FINISH_S if left is None else max(2.0, min(_FINISH_S, left))
        return Finish(
            self.trials,
            Standing(self.known.terms, self.history),
            self.known.options.out,
            budget_s,
            lambda text, done: self._tell("progress", text, inside=done),
        )

    @phase("finish")
    def _finish(self) -> Answer | None:
        finish = self._make_finish()
        answer = finish.answer()
        for note in finish.notes:
            self._note(note)
        for name in self.trials.changed:
            self._note(f"files/{name} was gone or changed; made again it is another than was measured")
        if answer is not None:
            self.journal.decide("answer", f"{len(self.history)}\n{answer.model_dump_json()}")
        return answer

    def _earlier_answer(self) -> Answer | None:
        """Return the answer of an earlier run that ended, where nothing was measured since."""
        count, _, kept = (self.journal.decision("answer") or "").partition("\n")
        there = (self.known.options.out / "best" / "model.onnx").is_file()
        return (
            Answer.model_validate_json(kept) if kept and there and int(count) == len(self.history) else None
        )

    def _meet_terms(self) -> None:
        """Where the budgets are others than before, measure again what was dropped because of those."""
        none: dict[str, tuple[()]] = dict.fromkeys(
            ("networks", "engines", "bf16_engines", "costs", "gains"), ()
        )
        terms = self.known.terms.model_copy(update=none)
        now = terms.model_dump_json()
        before = self.journal.decision("terms")
        if self.journal.forget_trials("failed"):
            self._note("trials that failed before may come again")
        if before is not None and _latency(Terms.model_validate_json(before)) != _latency(terms):
            count = sum(self.journal.forget_trials(state) for state in ("measured", "dropped"))
            for bench in self.known.benches:
                self.journal.forget(f"baseline {bench.name}")
            self.journal.forget("answer")
            self.journal.forget("refuted")
            self.journal.forget("left out")
            self.journal.forget("holdout looks")
            self._note(
                f"the limit of latency is another than before: {count} trials, timed in settings chosen for "
                "that, come again"
            )
        elif before is not None and before != now:
            count = self.journal.forget_trials("dropped")
            self.journal.forget("answer")
            self.journal.forget("refuted")
            self.journal.forget("left out")
            same = Terms.model_validate_json(before).budgets == terms.budgets
            what = "what the answer may take is" if same else "the budgets are"
            others = "another" if same else "others"
            self._note(
                f"{what} {others} than before: what was measured stands, "
                f"{count} dropped trials may come again"
            )
        self.journal.decide("terms", now)

    @phase("fit images")
    def _fit_images(self) -> None:
        """Take fewer images where all would not fit the minutes; a resumed search takes as many as before."""
        kept, minutes = self.journal.decision("share of images"), self.known.options.minutes
        if kept is None:
            benches = self.known.benches
            share = 1.0 if minutes is None else share_of_images(self.trials, benches, minutes)
            self.journal.decide("share of images", kept := str(share))
        if (share := float(kept)) == 1.0:
            return
        for bench in self.known.benches:
            before, bench.images = bench.images, fewer(bench.images, share)
            self.trials.expected[bench.name] = ()
        used, search = len(bench.images.search), len(before.search)
        self.data = self.data.model_copy(update={"search": used, "holdout": len(bench.images.holdout)})
        self._note(f"{used} of {search} search images are used, so that the minutes given suffice")

    def _check_expected(self) -> None:
        """Hold float32 against what its card expects, the first thing that a reader must know."""
        for bench in self.known.benches:
            trial = Standing(self.known.terms, self.history).float_trial(bench.name)
            expected, parts = bench.card.expected, self.trials.expected[bench.name]
            kept = [self.journal.predictions(trial.key, part) for part in parts] if trial is not None else []
            found = [k for k in kept if k is not None]
            if expected is None or trial is None or not parts or len(found) != len(parts):
                continue
            accuracy = Predictions.concat(found).accuracy()
            self._note(expected_note(bench.name, trial.setting.engine, accuracy, expected))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self._tell("note", text)

    # Time

    def _seconds(self) -> float:
        return self.earlier_s + time.perf_counter() - self.begin

    def _left_s(self) -> float | None:
        minutes = self.known.options.minutes
        return None if minutes is None else 60 * minutes - (time.perf_counter() - self.begin)

    def _trial_s(self) -> float:
        """What a trial takes, by the last ones; the first of all measures far more than the others."""
        took = [trial.seconds for trial in self.history[-4:]]
        return statistics.median(took) / (2 if len(took) == 1 else 1) if took else _FIRST_TRIAL_S

    def _may_go_on(self) -> bool:
        """Say whether time and trials are left for another; the first that runs always gets its time."""
        if not any(trial.state == "measured" for trial in self.history):
            return True
        left, most = self._left_s(), self.known.options.trials
        if most is not None and len(self.history) >= most:
            self._note(f"ended after {len(self.history)} trials, as asked by --trials; --resume goes on")
            return False
        if left is not None and left < self._trial_s() + _FINISH_S / 2:
            self._note(f"ended after {len(self.history)} trials, as asked by --minutes; --resume goes on")
            return False
        return True

    def _tell(
        self,
        kind: EventKind,
        text: str,
        inside: float = 0.0,
        trial: Trial | None = None,
        fraction: float | None = None,
    ) -> None:
        elapsed = time.perf_counter() - self.begin
        pairs = len(self.known.terms.networks) * (
            2 * len(self.known.terms.engines) + len(self.known.terms.bf16_engines)
        )
        to_come = max(pairs - len(self.history), 1) - min(inside, 1.0)
        left = to_come * self._trial_s() + _FINISH_S
        limit = self._left_s()
        if limit is not None:
            left = min(left, max(limit, 0.0))
        left = 0.0 if fraction == 1.0 else left
        self.told = max(self.told, elapsed / (elapsed + left) if fraction is None else fraction)
        self.watch(Event(kind, text, self.told, left, inside, self.rung, trial))

    def _record(self, answer: Answer | None) -> StudyRecord:
        options = self.known.options
        names = set(self.known.terms.networks)
        return StudyRecord(
            command=options.command,
            budgets=tuple(budget.text for budget in options.budgets),
            objective=options.objective,
            seed=options.seed,
            minutes=options.minutes,
            data=self.data,
            host=self.known.host,
            versions=self.known.versions,
            trials=tuple(trial for trial in self.history if trial.network in names),
            answer=answer,
            seconds=self._seconds(),
            notes=tuple(self.notes),
            networks=self.known.terms.costs,
            left_out=Family(self._standing()).left_out(),
            phases=self.clock.phases(),
        )


def _terms(options: StudyOptions, host: Host, benches: Sequence[Workbench]) -> Terms:
    return Terms(
        networks=tuple(card.network.name for card in options.cards),
        engines=options.engines,
        budgets=options.budgets,
        objective=options.objective,
        confidence=options.confidence,
        bf16_engines=tuple(e for e in options.engines if e == "openvino") if host.bf16 else (),
        inputs=options.inputs,
        costs=tuple(count_cost(bench.net) for bench in benches),
        gains=tuple((engine, most_matrix_gain(engine, host)) for engine in options.engines),
    )


def _latency(terms: Terms) -> list[str]:
    return sorted(b.model_dump_json() for b in terms.budgets if b.measure == "latency")


def _first_notes(known: _Known) -> list[str]:
    notes = []
    skipped = known.data.skipped
    if skipped.count:
        notes.append(
            f"{skipped.count} images could not be decoded and were left out, such as {skipped.names[0]}"
        )
    notes.extend(
        f"{bench.name}: its card names no weights, so those of its factory are measured"
        for bench in known.benches
        if bench.card.network.weights is None and bench.card.source.kind != "onnx"
    )
    if known.data.calibrating:
        notes.append(
            f"{known.data.calibrating} images also calibrate, so they were left out of search and holdout"
        )
    if len(known.benches) > 1 and any(budget.of_drop for budget in known.terms.budgets):
        notes.append(
            "a drop is counted from each network's own float32: a weak network may lose little and be worse"
        )
    notes.extend(
        f"{engine} adds products of u8 and s8 in 16 bits on this processor, where two of the largest do not "
        "fit: weights have 7 bits, but in depthwise convolutions, whose sums are exact"
        for engine in sorted(known.benches[0].saturating)
    )
    return notes


def _told(trial: Trial) -> str:
    """Say in one line what a trial brought."""
    parts = [f"{trial.network} {trial.recipe} on {trial.setting.engine}"]
    if trial.accuracy is not None:
        parts.append(f"top-1 {100 * trial.accuracy.top1:.2f} %")
    if trial.timing is not None:
        parts.append(f"{trial.timing.images_per_s:,.0f} images/s")
        if trial.timing.ratio is not None:
            parts.append(f"{trial.timing.ratio:.2f}x float32")
    if trial.state != "measured":
        parts.append(f"{trial.state}: {trial.reason}")
    return ", ".join(parts)


@contextmanager
def _folder(options: StudyOptions) -> Iterator[None]:
    """Make the study's folder before the work begins; where the input cannot be used, leave none behind.

    Raises:
        InputError: It cannot be written, or has a study already.
    """
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"{options.out}: is a file; give a folder with --out")
    refuse_another(options.out, options.resume)
    made = [folder for folder in (options.out / "files", options.out) if not folder.exists()]
    probe = options.out / "files" / ".probe"
    write_text(probe, "")
    probe.unlink()
    try:
        yield
    except InputError:
        for folder in made:
            if not any(folder.iterdir()):
                folder.rmdir()
        raise
