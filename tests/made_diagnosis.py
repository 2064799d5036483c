"""A diagnosis made by hand for the tests of its page: realistic figures, no network behind them.

The tests load this file by its path, since the test folders are not packages.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from fewbit.doctor.records import (
    CAUSES,
    CalibrationStudy,
    Diagnosis,
    Fact,
    Finding,
    InputFacts,
    LayerExam,
    Quality,
    Remedy,
    SharedInput,
    StudyPoint,
)
from fewbit.measure.accuracy import Accuracy, Comparison

IMAGES = 512
study_of = runpy.run_path(str(Path(__file__).with_name("made_study.py")))


def accuracy(right: int) -> Accuracy:
    """Make a count of right answers."""
    return Accuracy(top1_correct=right, top5_correct=min(IMAGES, right + 60), total=IMAGES)


def quality(right: int, agreement: float, kl: float) -> Quality:
    """Make what a quantized network does."""
    return Quality(accuracy=accuracy(right), agreement=agreement, kl=kl, sqnr_db=30 - 40 * kl)


def remedy(action: str, right: int, agreement: float, kl: float, helps: bool = True) -> Remedy:
    """Make a remedy against a network that is right on 51 images."""
    seen = Comparison(
        total=IMAGES, losses=3, gains=right - 48, label_changes=right, losses5=0, gains5=right // 2
    )
    return Remedy(
        action=action,
        change='[scheme.weights]\ngranularity = "channel"',
        before=quality(51, 0.12, 3.2),
        after=quality(right, agreement, kl),
        versus=seen,
        helps=helps,
    )


def layers() -> tuple[LayerExam, ...]:
    """Make the layers of the study's network, examined."""
    made = []
    for place, record in enumerate(study_of["layers"]("int8", "resnet20")):
        more: dict[str, Any] = {
            "sqnr_alone_db": 44.0 - place,
            "kl": 10.0 ** (-5 + place % 6),
            "flips": 0.01 * place,
        }
        if record.weights is not None:
            more |= {"per_channel": False, "weight_low": -0.5, "weight_high": 0.5, "weight_sqnr_db": 41.0}
            more |= {"weak_channels": 0.25, "shift": 0.031, "shift_share": 0.8, "depthwise": place == 4}
        else:
            more |= {"kurtosis": 3.4, "tail_ratio": 1.9, "clipped": 0.0, "clip_share": 0.0}
        made.append(LayerExam(**{**dict(record), **more}))
    shared = tuple(SharedInput(name=n, low=0, high=h, codes=c, sqnr_db=d) for n, h, c, d in
                   (("left", 6.0, 256, 44.0), ("right", 0.1, 5.2, 9.0)))  # fmt: skip
    made.append(LayerExam(name="joined", kind="Concat", precision="int8", kl=0.01, flips=0.02, inputs=shared))
    return tuple(made)


def findings() -> tuple[Finding, ...]:
    """Make two findings."""
    spread = Finding(
        cause="depthwise_range_spread",
        layer="stage2.0.conv",
        others=("stage1.0.conv", "stage1.1.conv"),
        evidence=(
            Fact(name="largest over smallest channel range", value=246.25, unit="x"),
            Fact(name="channels that keep fewer than half of the bits", value=68.75, unit="%"),
            Fact(name="SQNR of its weight", value=32.69, unit="dB"),
        ),
        reason="one scale for the whole weight is set by its largest channel",
        kl=2.9,
        remedies=(
            remedy("a scale a channel for weights", 410, 0.96, 0.011),
            remedy("equalize", 49, 0.11, 3.3, False),
        ),
    )
    alone = Finding(
        cause="clipped_tail",
        layer="stage3.0.conv",
        evidence=(Fact(name="values beyond the grid's ends", value=0.0954, unit="%"),),
        reason="its range leaves out large values",
        kl=0.4,
    )
    return spread, alone


def study() -> CalibrationStudy:
    """Make a calibration-set study."""
    points = tuple(
        StudyPoint(
            images=2**power,
            accuracies=tuple(accuracy(400 + 2 * power - 3 * seed) for seed in range(3)),
            agreements=tuple(0.97 + 0.001 * power for _ in range(3)),
        )
        for power in range(11)
    )
    return CalibrationStudy(
        recipe="int8-per-tensor",
        method="torch, every tensor rounded as the file will be",
        images=IMAGES,
        pool=1024,
        seeds=(0, 1, 2),
        float_accuracy=accuracy(420),
        points=points,
    )


def diagnosis(**changes: Any) -> Diagnosis:
    """Make a diagnosis."""
    fields: dict[str, Any] = {
        "network": "resnet20",
        "recipe": "int8-per-tensor",
        "engine": "onnxruntime",
        "seed": 7,
        "calibration_images": 64,
        "images": IMAGES,
        "examined": 64,
        "float_accuracy": accuracy(420),
        "expected": 0.81,
        "quality": quality(51, 0.12, 3.2),
        "input": InputFacts(mean=(0.01, -0.2, 0.3), std=(0.9, 1.0, 1.1), norm="bn1", norm_gap=0.012),
        "layers": layers(),
        "findings": findings(),
        "checked": tuple(CAUSES),
        "together": remedy("all of them", 415, 0.97, 0.009),
        "repaired": 'name = "int8-per-tensor-repaired"\n',
        "placement": study_of["placement"]("int8", "resnet20", "onnxruntime"),
        "study": study(),
        "notes": ("a note",),
    }
    return Diagnosis(**{**fields, **changes})


def healthy() -> Diagnosis:
    """Make a diagnosis without findings."""
    return diagnosis(
        findings=(), together=None, repaired="", notes=(), study=None, placement=None, expected=None,
        quality=quality(419, 0.995, 0.0004),
    )  # fmt: skip
