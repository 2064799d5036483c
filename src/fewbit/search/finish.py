"""The end of a search: finalists are confirmed on the holdout images, then timed side by side."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fewbit.engines.placement_cost import measure_placement
from fewbit.engines.session import Setting
from fewbit.errors import EngineError
from fewbit.files import write_atomically, write_text
from fewbit.measure.accuracy import Predictions, compare
from fewbit.measure.speed import Timing
from fewbit.recipe import Recipe, read_recipe
from fewbit.search.answer import advice, describe, finalists, holdout_advice, told_apart
from fewbit.search.budget import Measured
from fewbit.search.settings import evaluation
from fewbit.search.standing import Standing
from fewbit.search.trial import Answer, BudgetCheck, Confirmation, Trial
from fewbit.search.trials import Trials

_MOST_CONFIRMED = 3
_MOST_TRIED = 16
_WORTH, _WORTH_ELSEWHERE = 0.93, 0.75
_ROUNDS = 20
_BLOCK_S = 0.2
_PROFILE_MS, _PROFILED = 2000.0, (3, 20)

Inside = Callable[[str, float], None]


class Finalist(NamedTuple):
    """A trial with what the holdout images say of it."""

    trial: Trial
    confirmation: Confirmation

    @property
    def confirmed(self) -> bool:
        """Every budget holds on the holdout images too."""
        return all(check.met for check in self.confirmation.checks)


class Finish:
    """Turns what was measured into an answer.

    Args:
        trials: Runs files.
        view: How the race stands.
        folder: The study's folder.
        budget_s: Seconds for timing; accuracy on the holdout images takes what it takes.
        inside: Told what is going on and the fraction done.
    """

    def __init__(self, trials: Trials, view: Standing, folder: Path, budget_s: float, inside: Inside) -> None:
        self.trials, self.view, self.folder, self.budget_s, self.inside = (
            trials,
            view,
            folder,
            budget_s,
            inside,
        )
        self.notes: list[str] = []

    def answer(self) -> Answer | None:
        """Return the answer, the nearest trial where none is inside; none where nothing ran at all."""
        confirmed, missed = self._confirm()
        while confirmed:
            chosen = self._choose(confirmed)
            answer = self._answer(chosen, True, "")
            if all(check.met for check in answer.confirmation.checks):
                self._keep(chosen.trial)
                return self._with_cost(answer, chosen.trial)
            confirmed.remove(chosen)
            missed.append(Finalist(chosen.trial, answer.confirmation))
            self.notes.append(f"{describe(chosen.trial)}: timed to the end it is outside a budget")
        if missed:
            chosen = min(missed, key=self._excess)
            text = holdout_advice(self.view, self._figures(chosen), describe(chosen.trial))
        else:
            nearest = self._nearest()
            if nearest is None:
                return None
            chosen, text = nearest, advice(self.view, nearest.trial)
        self._keep(chosen.trial)
        return self._with_cost(self._answer(chosen, False, text), chosen.trial)

    def refuted(self) -> set[str]:
        """Return the keys of the finalists that the holdout images refuse, up to the first they do not."""
        keys = set[str]()
        for trial in finalists(self.view)[:_MOST_TRIED]:
            finalist = self._try(trial)
            if finalist is not None and finalist.confirmed:
                break
            keys |= {trial.key} if finalist is not None else set()
        return keys

    def _confirm(self) -> tuple[list[Finalist], list[Finalist]]:
        """Walk down the finalists until enough are confirmed; return those that are and those not."""
        confirmed, missed = list[Finalist](), list[Finalist]()
        for trial in finalists(self.view)[:_MOST_TRIED]:
            if len(confirmed) == _MOST_CONFIRMED:
                break
            if confirmed and not self._rivals(trial, confirmed):
                continue
            finalist = self._try(trial)
            if finalist is None:
                continue
            (confirmed if finalist.confirmed else missed).append(finalist)
        if missed:
            names = ", ".join(describe(f.trial) for f in missed)
            self.notes.append(f"inside on the search images, refused by the holdout images: {names}")
        return confirmed, missed

    def _rivals(self, trial: Trial, confirmed: list[Finalist]) -> bool:
        """Say whether a trial may still turn out the best, timed side by side.

        Within a network the speeds were timed against one baseline; between networks they are less sure.
        """
        best, value = self.view.value(confirmed[0].trial), self.view.value(trial)
        same = any(f.trial.network == trial.network for f in confirmed)
        share = _WORTH if same or self.view.terms.objective == "size" else _WORTH_ELSEWHERE
        return value >= best - (1 - share) * abs(best)

    def _nearest(self) -> Finalist | None:
        left = Standing(self.view.terms, self.view.trials)
        while (nearest := left.nearest()) is not None:
            finalist = self._try(nearest)
            if finalist is not None:
                return finalist
            left = Standing(left.terms, [t for t in left.trials if t.key != nearest.key])
        return None

    def _try(self, trial: Trial) -> Finalist | None:
        try:
            return Finalist(trial, self._confirmation(trial))
        except EngineError as error:
            self.trials.sessions.forget(trial.setting.engine)
            self.notes.append(f"{describe(trial)}: could not be confirmed: {error}")
            return None

    def _confirmation(self, trial: Trial) -> Confirmation:
        bench = self.trials.benches[trial.network]
        reference = self.view.float_trial(bench.name)
        if reference is None:
            raise EngineError(f"{bench.name}: no engine ran it in float32, which the drop is against")
        before, after = self._holdout(reference), self._holdout(trial)
        looks = self._look(trial)
        figures = Measured(after.accuracy(), compare(before, after), trial.bytes, trial.timing)
        return Confirmation(
            key=trial.key,
            accuracy=after.accuracy(),
            float_accuracy=before.accuracy(),
            versus_float=compare(before, after),
            checks=self._checks(figures, looks),
            looks=looks,
        )

    def _look(self, trial: Trial) -> int:
        """Count a finalist among those held against the holdout images; return how many there were so far."""
        journal = self.trials.journal
        looked = set((journal.decision("holdout looks") or "").split())
        if trial.key not in looked:
            looked.add(trial.key)
            journal.decide("holdout looks", " ".join(sorted(looked)))
        return len(looked)

    def _checks(self, figures: Measured, looks: int) -> tuple[BudgetCheck, ...]:
        terms = self.view.terms
        found = (budget.check(figures, terms.confidence, looks) for budget in terms.budgets)
        return tuple(check for check in found if check is not None)

    def _holdout(self, trial: Trial) -> Predictions:
        kept = self.trials.journal.predictions(trial.key, "holdout")
        if kept is not None:
            return kept
        setting = evaluation(trial.setting.engine, trial.setting.float_precision, self.trials.speeds.threads)
        bench = self.trials.benches[trial.network]
        found = self.trials.predict(bench, self._file(trial), setting, "holdout", self.inside)
        self.trials.journal.add_predictions(trial.key, "holdout", found)
        return found

    def _figures(self, finalist: Finalist) -> Measured:
        trial, confirmation = finalist
        return Measured(confirmation.accuracy, confirmation.versus_float, trial.bytes, trial.timing)

    def _excess(self, finalist: Finalist) -> float:
        """Say how far a finalist is outside its worst budget on the holdout images."""
        return max(budget.excess(self._figures(finalist)) for budget in self.view.terms.budgets)

    def _choose(self, confirmed: list[Finalist]) -> Finalist:
        """Time the confirmed finalists side by side, take the fastest; for size take the smallest."""
        if len(confirmed) == 1 or self.view.terms.objective == "size":
            return confirmed[0]
        self.inside("timing the finalists", 0.0)
        run = [(self._file(f.trial), f.trial.setting) for f in confirmed]
        baseline = self._baseline(confirmed[0].trial)
        try:
            timings = self.trials.speeds.time_all(
                [baseline, *run], _ROUNDS // 2, _BLOCK_S, self.budget_s / 3
            )[1:]
        except EngineError as error:
            self.trials.sessions.forget(confirmed[0].trial.setting.engine)
            self.notes.append(f"the finalists could not be timed side by side: {error}")
            return confirmed[0]
        figures = []
        for finalist, timing in zip(confirmed, timings, strict=True):
            assert timing.ratio is not None and timing.ratio_interval is not None
            figures.append((finalist.trial, timing.ratio, timing.ratio_interval.low))
        best = told_apart(figures, self.view)
        return next(f for f in confirmed if f.trial.key == best.key)

    def _answer(self, chosen: Finalist, found: bool, text: str) -> Answer:
        trial = chosen.trial
        self.inside("timing the answer", 0.5)
        path, baseline = self._file(trial), self._baseline(trial)
        timing = self._time(trial, path, baseline)
        overall = self._overall(trial, path, baseline) if found else None
        looks, seen = self._look(trial), chosen.confirmation
        on_search = Measured(trial.accuracy, trial.versus_float, trial.bytes, timing)
        on_holdout = Measured(seen.accuracy, seen.versus_float, trial.bytes, timing)
        checks = self._checks(on_holdout, looks)
        return Answer(
            found=found,
            key=trial.key,
            timing=timing,
            float_setting=baseline[1],
            checks=self._checks(on_search, 1),
            confirmation=seen.model_copy(update={"checks": checks, "looks": looks}),
            advice=text,
            overall=overall,
        )

    def _time(self, trial: Trial, path: Path, baseline: tuple[Path, Setting]) -> Timing:
        try:
            return self.trials.speeds.time(
                path, (trial.setting,), baseline, _ROUNDS, _BLOCK_S, self.budget_s / 2
            )
        except EngineError as error:
            if trial.timing is None:
                raise
            self.trials.sessions.forget(trial.setting.engine)
            self.notes.append(f"the final timing failed, the trial's own stands: {error}")
            return trial.timing

    def _with_cost(self, answer: Answer, trial: Trial) -> Answer:
        """Add what keeps the answer's operators out of integers, by the engine's own profile."""
        self.inside("profiling the answer", 0.9)
        calls = int(_PROFILE_MS / answer.timing.ms_per_batch_p50)
        try:
            session = self.trials.sessions.get(self._file(trial), trial.setting)
            cost = measure_placement(session, min(max(calls, _PROFILED[0]), _PROFILED[1]))
        except EngineError as error:
            self.trials.sessions.forget(trial.setting.engine)
            self.notes.append(f"{describe(trial)}: could not be profiled: {error}")
            return answer
        return answer.model_copy(update={"cost": cost})

    def _overall(self, trial: Trial, path: Path, baseline: tuple[Path, Setting]) -> Timing | None:
        """Time the answer against the fastest float32 inside the budgets, where that is another network."""
        floats = [t for t in self.view.ranked() if t.recipe == "float32"]
        if not floats or floats[0].network == trial.network:
            return None
        other = self._baseline(floats[0])
        if other == baseline:
            return None
        try:
            return self.trials.speeds.time(
                path, (trial.setting,), other, _ROUNDS // 2, _BLOCK_S, self.budget_s / 3
            )
        except EngineError as error:
            self.trials.sessions.forget(trial.setting.engine)
            self.notes.append(f"{describe(trial)} could not be timed against {describe(floats[0])}: {error}")
            return None

    def _baseline(self, trial: Trial) -> tuple[Path, Setting]:
        bench = self.trials.benches[trial.network]
        path = self.trials.file(bench, read_recipe("float32"), trial.setting.engine)
        return path, self.trials.speeds.baseline(bench.name, path)

    def _file(self, trial: Trial) -> Path:
        bench = self.trials.benches[trial.network]
        return self.trials.file(
            bench, Recipe.from_toml(trial.recipe_toml, trial.recipe), trial.setting.engine
        )

    def _keep(self, trial: Trial) -> None:
        """Put the file to deploy and its recipe into best/."""
        best = self.folder / "best"
        with write_atomically(best / "model.onnx") as beside:
            shutil.copyfile(self._file(trial), beside)
        write_text(best / "recipe.toml", trial.recipe_toml)
