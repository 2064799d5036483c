"""What a search records: frozen data that the journal keeps and the report reads."""

from __future__ import annotations

from typing import Literal

from fewbit.clock import PhaseTime
from fewbit.engines.placement_cost import PlacementCost
from fewbit.engines.process import ENGINE_PHASES
from fewbit.engines.session import EngineName, Placement, Setting
from fewbit.measure.accuracy import Accuracy, Comparison
from fewbit.measure.host import Host
from fewbit.measure.speed import Surveyed, Timing
from fewbit.sensitivity.records import Histogram, LayerRecord
from fewbit.spec import Frozen, ImageInput, SiluForm

__all__ = [
    "Answer",
    "BudgetCheck",
    "Confirmation",
    "DataRecord",
    "Histogram",
    "LayerRecord",
    "LeftOut",
    "NetworkCost",
    "Skipped",
    "StudyRecord",
    "Trial",
    "TrialState",
]

TrialState = Literal["measured", "dropped", "failed"]
Reason = Literal["accuracy", "speed", "bytes"]


class Trial(Frozen):
    """One recipe of one network on one engine setting, measured.

    Attributes:
        key: Digest of everything that determines the trial; no key is measured twice.
        network: Name of the card.
        recipe: Name of the recipe ("float32", "bf16", "int8-percentile", ...).
        recipe_toml: The recipe itself, to repeat it.
        rung: The step of the ladder that proposed it.
        setting: How it was run.
        state: "measured", "dropped" (the race ended early, the accuracy is of the first images) or "failed".
        reason: Why it was dropped or failed, in one line; empty otherwise.
        accuracy: On the search images.
        versus_float: The same images, against the float32 network of the same card.
        timing: Speed and its ratio to the true float32 baseline of the fastest engine; none where not timed.
        bytes: Size of the exported file.
        packed_bytes: What it would be were the codes of weights under 8 bits packed at their widths, of which
            the file has a byte each; 0 where no weight has less than 8.
        placement: What ran in which precision.
        layers: One record a layer.
        seconds: What the trial cost.
        keep_float: Layers that the recipe leaves in float beyond its own rules.
        survey: The settings that were tried to find `setting`, the best first.
        takes: What the file takes.
        silu: What takes the place of SiLU; none where it stays.
    """

    key: str
    network: str
    recipe: str
    recipe_toml: str
    rung: str
    setting: Setting
    state: TrialState
    reason: str = ""
    accuracy: Accuracy | None = None
    versus_float: Comparison | None = None
    timing: Timing | None = None
    bytes: int = 0
    packed_bytes: int = 0
    placement: Placement | None = None
    layers: tuple[LayerRecord, ...] = ()
    seconds: float = 0.0
    keep_float: tuple[str, ...] = ()
    survey: tuple[Surveyed, ...] = ()
    takes: ImageInput = "float32"
    silu: SiluForm | None = None

    @property
    def counted_bytes(self) -> int:
        """What the objective "size" compares: the file, weights under 8 bits counted as packed."""
        return self.packed_bytes or self.bytes


class NetworkCost(Frozen):
    """What a network costs by its shapes alone; see `fewbit.search.cost.count_cost`.

    Attributes:
        network: Name of the card.
        dense_macs: Multiplications of one image in convolutions over several pixels and channels.
        pointwise_macs: In convolutions of one pixel, linear layers and products of activations.
        depthwise_macs: In convolutions that filter each channel by itself.
        weights: Weights of all these, biases not counted; in 8 bits as many bytes.
        silus: How many of its SiLU `replace_silu` can replace.
    """

    network: str
    dense_macs: int
    pointwise_macs: int
    depthwise_macs: int
    weights: int
    silus: int = 0

    @property
    def matrix_macs(self) -> int:
        """Those that a processor's matrix instructions can take: all but the depthwise ones."""
        return self.dense_macs + self.pointwise_macs

    @property
    def macs(self) -> int:
        """Multiplications of one image."""
        return self.matrix_macs + self.depthwise_macs


class LeftOut(Frozen):
    """A network on an engine that was not quantized, since nothing it may reach can be the answer.

    Attributes:
        network: Name of the card.
        engine: Which engine.
        reason: What it cannot reach: a budget of accuracy, the speed of the best, or bytes.
        low, high: What it may reach by the forecast: images a second, or for "bytes" the fewest bytes; none
            for "accuracy".
        to_beat: What it had to be better than, or inside of; none for "accuracy".
        text: The whole in one line.
    """

    network: str
    engine: EngineName
    reason: Reason
    low: float | None = None
    high: float | None = None
    to_beat: float | None = None
    text: str


class Skipped(Frozen):
    """Images that could not be decoded: their count and the first few names."""

    count: int = 0
    names: tuple[str, ...] = ()


class DataRecord(Frozen):
    """Which images a study used: counts, and the digest of images and preprocessing.

    Attributes:
        source: Where they come from.
        images_digest: Names the images and their preprocessing.
        calibration, search, holdout: How many are for what.
        classes: How many classes.
        skipped: Those that could not be decoded.
        calibrating: How many were left out of search and holdout because they also calibrate.
    """

    source: str
    images_digest: str
    calibration: int
    search: int
    holdout: int
    classes: int
    skipped: Skipped = Skipped()
    calibrating: int = 0


class BudgetCheck(Frozen):
    """One budget against one measured network.

    Attributes:
        budget: As written by the user ("top1-drop<=1%").
        limit: The limit as a fraction.
        value: What was measured.
        low, high: Its 95 % interval.
        met: The value is inside the limit at the confidence asked for.
        proven: The one-sided 95 % bound is inside the limit too.
        images_to_prove: About how many images it would take to prove it, where more would do; else none.
    """

    budget: str
    limit: float
    value: float
    low: float
    high: float
    met: bool
    proven: bool
    images_to_prove: int | None = None


class Confirmation(Frozen):
    """A finalist on the holdout images, which choose nothing but between finalists.

    Attributes:
        key: The trial's key.
        accuracy: On the holdout images.
        float_accuracy: Of the float32 network on the same images.
        versus_float: The two paired.
        checks: Each budget; what is proven is so for all finalists held against these images (Bonferroni).
        looks: How many those were.
    """

    key: str
    accuracy: Accuracy
    float_accuracy: Accuracy
    versus_float: Comparison
    checks: tuple[BudgetCheck, ...]
    looks: int = 1


class Answer(Frozen):
    """What a search found.

    Attributes:
        found: A network inside every budget.
        key: The trial's key; the nearest one where none is inside.
        timing: Measured at the end, interleaved with the float32 baseline.
        float_setting: The fastest true float32 setting of the same network, which `timing` is a ratio to.
        overall: Where several networks compete, the same as a ratio to the fastest float32 network inside the
            budgets; none where there is no other, or none is inside.
        checks: Each budget on the search images.
        confirmation: The same on the holdout images.
        advice: Where nothing was found: what would meet the budget.
        cost: What keeps its operators out of integers; none where the engine could not be asked, and in a
            study that is older than the question.
    """

    found: bool
    key: str
    timing: Timing
    float_setting: Setting
    checks: tuple[BudgetCheck, ...]
    confirmation: Confirmation
    advice: str = ""
    overall: Timing | None = None
    cost: PlacementCost | None = None


class StudyRecord(Frozen):
    """Everything that a report needs; `phases` say where the search's own time went."""

    command: str
    budgets: tuple[str, ...]
    objective: Literal["throughput", "latency", "size"]
    seed: int
    minutes: float | None
    data: DataRecord
    host: Host
    versions: dict[str, str]
    trials: tuple[Trial, ...]
    answer: Answer | None
    seconds: float
    notes: tuple[str, ...] = ()
    networks: tuple[NetworkCost, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    phases: tuple[PhaseTime, ...] = ()

    @property
    def engine_share(self) -> float:
        """Share of the search's time in which an engine was at work; 0 where no phase was recorded."""
        total = sum(one.seconds for one in self.phases)
        return sum(one.seconds for one in self.phases if one.phase in ENGINE_PHASES) / total if total else 0.0
