"""What a search is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewbit.engines.session import EngineName
from fewbit.errors import BudgetError, CardError, InputError
from fewbit.load.card import Card
from fewbit.search.budget import Budget
from fewbit.search.standing import Objective
from fewbit.spec import ImageInput

CALIBRATION_IMAGES = 512
HOLDOUT_FRACTION = 0.4


@dataclass(frozen=True)
class StudyOptions:
    """Everything that a search is told.

    Attributes:
        cards: The networks that compete; their names differ.
        data: Labelled images.
        budgets: All of them have to hold.
        out: The study's folder.
        objective: See `fewbit.search.standing.Terms`.
        engines: Which engines may run the answer.
        batches: Batch sizes allowed.
        threads: Threads of a run; none for all cores.
        minutes: End after so long, with what was found; none for no limit.
        trials: End after so many trials; none for no limit.
        seed: Of every choice.
        resume: Go on with the study in `out`.
        confidence: See `Budget.check`.
        strict: A broken image stops the search.
        calibration: Other images to calibrate with; else some of `data`, which then never evaluate.
        calibration_images: How many; at most a sixth of `data` where they are taken from it.
        holdout_fraction: Share of the images left that only confirm the answer.
        inputs: What the file of the answer may take.
        pace: Seconds spent on timing, as a multiple of the usual; less gives wider intervals.
        command: What the user typed, for the report.
    """

    cards: tuple[Card, ...]
    data: Path
    budgets: tuple[Budget, ...]
    out: Path
    objective: Objective = "throughput"
    engines: tuple[EngineName, ...] = ("onnxruntime", "openvino")
    batches: tuple[int, ...] = (1, 8, 32)
    threads: int | None = None
    minutes: float | None = None
    trials: int | None = None
    seed: int = 0
    resume: bool = False
    confidence: float = 0.5
    strict: bool = False
    calibration: Path | None = None
    calibration_images: int = CALIBRATION_IMAGES
    holdout_fraction: float = HOLDOUT_FRACTION
    inputs: tuple[ImageInput, ...] = ("float32", "uint8")
    pace: float = 1.0
    command: str = ""

    @property
    def timing_pace(self) -> float:
        """The pace, quicker where less than four minutes are given."""
        return self.pace if self.minutes is None else self.pace * min(1.0, max(0.1, self.minutes / 4))

    def __post_init__(self) -> None:
        """Check what no other part checks.

        Raises:
            InputError: Something is missing, out of range, or there twice.
        """
        if not self.cards:
            raise CardError("search: no network; give one card or more")
        names = [card.network.name for card in self.cards]
        for name in names:
            if names.count(name) > 1:
                raise CardError(f"search: two cards are named '{name}'; give each network a name of its own")
        if not self.budgets:
            raise BudgetError('search: no budget; give one like --budget "top1-drop<=1%"')
        for what, given in (("engine", self.engines), ("batch", self.batches)):
            if not given:
                raise InputError(f"search: no {what}; give one or more")
        if not 0 < self.holdout_fraction < 1:
            raise InputError(
                f"search: holdout fraction is {self.holdout_fraction}; give a share inside 0 and 1"
            )
        if not 0.5 <= self.confidence < 1:
            raise InputError(f"search: confidence is {self.confidence}; give 0.5 up to, not including, 1")
        for what, number in (
            ("batch", min(self.batches)),
            ("threads", self.threads),
            ("minutes", self.minutes),
            ("trials", self.trials),
            ("calibration images", self.calibration_images),
            ("pace", self.pace),
        ):
            if number is not None and number <= 0:
                raise InputError(f"search: {what} is {number}; give a number above 0")
