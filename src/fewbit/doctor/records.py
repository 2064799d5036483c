"""What the doctor found: frozen data, no torch, which the command prints and the report draws."""

from __future__ import annotations

import math
from typing import Literal

from fewbit.engines.placement_cost import PlacementCost
from fewbit.engines.session import Placement
from fewbit.measure.accuracy import Accuracy, Comparison
from fewbit.sensitivity.records import LayerRecord
from fewbit.spec import Frozen

Cause = Literal[
    "depthwise_range_spread",
    "range_spread",
    "clipped_tail",
    "outlier_tail",
    "unbalanced_concat",
    "biased_rounding",
    "sensitive_layers",
    "wrong_preprocessing",
]

CAUSES: dict[Cause, str] = {
    "depthwise_range_spread": "depthwise range spread",
    "range_spread": "range spread across channels",
    "clipped_tail": "clipped tail",
    "outlier_tail": "outlier tail",
    "unbalanced_concat": "unbalanced concat",
    "biased_rounding": "biased rounding",
    "sensitive_layers": "sensitive layers",
    "wrong_preprocessing": "wrong preprocessing",
}


class SharedInput(Frozen):
    """One input of a concatenation whose inputs share a grid.

    Attributes:
        name: The layer that makes it.
        low: Its smallest value.
        high: Its largest value.
        codes: How many codes of the shared grid it reaches.
        sqnr_db: What the shared grid leaves of it.
    """

    name: str
    low: float
    high: float
    codes: float
    sqnr_db: float


class LayerExam(LayerRecord):
    """A layer's record and what was measured of it alone.

    "Alone" means that only this layer's weight and result are rounded, all else being float.

    Attributes:
        depthwise: It filters each channel by itself.
        per_channel: Its weight has a scale a channel; none where its weight is not rounded.
        weight_low: Lowest value of its weight's grid, of all channels.
        weight_high: Highest value of its weight's grid, of all channels.
        weight_sqnr_db: Signal to noise of its rounded weight.
        weak_channels: Share of its output channels that keep fewer than half of the grid's bits.
        weight_clip_share: Share of its weight's noise that comes from weights beyond the grid's ends.
        weight_minmax_gain_db: What min-max ranges would give its weight, in dB.
        sqnr_alone_db: Signal to noise of its result, alone.
        kl: Mean over images of KL(softmax(float) || softmax(alone)), in nats: its sensitivity.
        flips: Share of images whose label changes, alone.
        kurtosis: Of its result, 3 for a normal distribution; large with outliers.
        tail_ratio: Largest magnitude over that which 99.9 % of the values stay below.
        clipped: Share of the values beyond the ends of its grid.
        clip_share: Share of the noise of rounding its result that comes from those values.
        minmax_gain_db: What the range of its smallest and largest value would give its result, in dB.
        mse_gain_db: What the range of least squared error would give its result, in dB.
        shift: Mean shift of its output channels by rounding its weight, over their standard deviation (root
            mean square over channels).
        shift_share: Share of that noise's power which is the shift.
        inputs: The inputs of a concatenation that share its grid.
    """

    depthwise: bool = False
    per_channel: bool | None = None
    weight_low: float | None = None
    weight_high: float | None = None
    weight_sqnr_db: float | None = None
    weak_channels: float | None = None
    weight_clip_share: float | None = None
    weight_minmax_gain_db: float | None = None
    sqnr_alone_db: float | None = None
    kl: float | None = None
    flips: float | None = None
    kurtosis: float | None = None
    tail_ratio: float | None = None
    clipped: float | None = None
    clip_share: float | None = None
    minmax_gain_db: float | None = None
    mse_gain_db: float | None = None
    shift: float | None = None
    shift_share: float | None = None
    inputs: tuple[SharedInput, ...] = ()


class Quality(Frozen):
    """How a network does on images that did not calibrate it.

    Attributes:
        accuracy: Right answers.
        agreement: Share of images with the float network's label; none for the float network itself.
        kl: Mean KL(softmax(float) || softmax(quantized)), in nats; none likewise.
        sqnr_db: Signal to noise of the logits; none likewise.
    """

    accuracy: Accuracy
    agreement: float | None = None
    kl: float | None = None
    sqnr_db: float | None = None

    def of_float(self) -> Quality:
        """Return the accuracy alone."""
        return Quality(accuracy=self.accuracy)


class Fact(Frozen):
    """One measured number that speaks for a cause.

    Attributes:
        name: What it is.
        value: The number.
        unit: "dB", "%", "x" or empty.
    """

    name: str
    value: float
    unit: str = ""

    @property
    def text(self) -> str:
        """The number with its unit.

        >>> Fact(name="spread", value=246.3, unit="x").text, Fact(name="share", value=6.25, unit="%").text
        ('246x', '6.25 %')
        """
        number = f"{self.value:.3g}" if abs(self.value) < 9999.5 else f"{self.value:,.0f}"
        return f"{number}{self.unit}" if self.unit in ("x", "") else f"{number} {self.unit}"


class Remedy(Frozen):
    """One remedy and what it did when it was tried.

    Attributes:
        action: What to do, in words.
        change: The same as lines of TOML for the recipe or the card.
        before: Without it.
        after: With it, on the same images.
        versus: Right answers with it against without it, image by image; a negative drop is a gain.
        helps: Whether it did, see `fewbit.doctor.remedies.helps`.
    """

    action: str
    change: str
    before: Quality
    after: Quality
    versus: Comparison
    helps: bool

    @property
    def images(self) -> int:
        """Images that it was tried on."""
        return self.versus.total


class Finding(Frozen):
    """One likely cause, named from measured facts, and the remedies that were tried.

    Attributes:
        cause: Its name.
        layer: The layer where it shows most; "input" for the images.
        others: Further layers with the same cause, the worst first.
        evidence: The numbers at that layer.
        reason: What they mean, in one sentence.
        kl: What the rounding of these layers alone costs: mean KL in nats; none for preprocessing.
        remedies: Tried, the best first; empty where none fits.
    """

    cause: Cause
    layer: str
    others: tuple[str, ...] = ()
    evidence: tuple[Fact, ...]
    reason: str
    kl: float | None = None
    remedies: tuple[Remedy, ...] = ()

    @property
    def title(self) -> str:
        """The cause in words."""
        return CAUSES[self.cause]


class InputFacts(Frozen):
    """What the network's input looks like.

    Attributes:
        mean: Of each channel.
        std: Of each channel.
        norm: The first BatchNorm that a convolution or matrix product feeds; empty where there is none.
        norm_gap: How far its input is from what it was trained with: mean over channels of
            KL(N(seen) || N(trained)), in nats; none without such a layer.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    norm: str = ""
    norm_gap: float | None = None


class StudyPoint(Frozen):
    """The recipe calibrated on so many images, once for each seed.

    Attributes:
        images: How many calibrated.
        accuracies: On the images that judge, one a seed.
        agreements: Share of images with the float network's label, one a seed.
    """

    images: int
    accuracies: tuple[Accuracy, ...]
    agreements: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean top-1 over the seeds."""
        return sum(one.top1 for one in self.accuracies) / len(self.accuracies)

    @property
    def low(self) -> float:
        """Worst top-1 of a seed."""
        return min(one.top1 for one in self.accuracies)

    @property
    def high(self) -> float:
        """Best top-1 of a seed."""
        return max(one.top1 for one in self.accuracies)


class CalibrationStudy(Frozen):
    """Accuracy against the number of calibrating images.

    Attributes:
        recipe: Its name.
        method: How accuracy was measured, in words.
        images: Images that judge and never calibrate, the same for all.
        pool: Images to calibrate with.
        seeds: Seeds that chose among them.
        float_accuracy: Of the float network on the same images.
        points: By rising number of images.
    """

    recipe: str
    method: str
    images: int
    pool: int
    seeds: tuple[int, ...]
    float_accuracy: Accuracy
    points: tuple[StudyPoint, ...]

    @property
    def noise(self) -> float:
        """How far two equally good networks may lie apart on these images at 95 %, half a point at least.

        The half width of a paired difference, from the share of labels that differ from the float network's.
        """
        last = self.points[-1].agreements
        changed = 1 - sum(last) / len(last)
        return max(0.005, 1.96 * math.sqrt(changed / self.images))

    def enough(self) -> int:
        """Return from how many images on every seed stays within the noise of the mean at the most images."""
        goal, found = self.points[-1].mean, self.points[-1].images
        for point in reversed(self.points):
            if goal - point.low > self.noise:
                break
            found = point.images
        return found


class Diagnosis(Frozen):
    """All that `fewbit inspect` says of a network and a recipe.

    Attributes:
        network: Its name.
        recipe: Its name.
        engine: Whose target it was quantized for.
        seed: Of the choice of images.
        calibration_images: Images that calibrated.
        images: Images that judged recipes and remedies.
        examined: Images, among those, on which each layer was looked at alone.
        float_accuracy: Of the float network on the images that judged.
        expected: What the card says of it, a share; none where it says nothing.
        quality: Of the recipe.
        input: What the network's input looks like.
        layers: In the order in which they run.
        findings: The gravest first.
        checked: Causes that were looked for.
        together: The best remedies of all findings at once; none where fewer than two help.
        repaired: The recipe with the remedies that did best, as TOML; empty where none helps.
        placement: Which operators the engine runs in integers; none where it was not asked.
        cost: What keeps the others out of integers, in milliseconds; none where it was not asked.
        study: Accuracy against calibrating images; none where it was not asked for.
        notes: What else a reader should know.
    """

    network: str
    recipe: str
    engine: str
    seed: int
    calibration_images: int
    images: int
    examined: int
    float_accuracy: Accuracy
    expected: float | None = None
    quality: Quality
    input: InputFacts
    layers: tuple[LayerExam, ...]
    findings: tuple[Finding, ...]
    checked: tuple[Cause, ...] = ()
    together: Remedy | None = None
    repaired: str = ""
    placement: Placement | None = None
    cost: PlacementCost | None = None
    study: CalibrationStudy | None = None
    notes: tuple[str, ...] = ()
