"""What `eval` and `bench` are given: an exported file, or a card whose float network is exported."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from fewbit.cli.options import find_card
from fewbit.data.image_set import ImageSet
from fewbit.data.images import open_images
from fewbit.engines.session import EngineName
from fewbit.errors import CardError, DataError
from fewbit.load.card import Card
from fewbit.load.exported import Exported, read_exported


@dataclass(frozen=True)
class Subject:
    """One network to run.

    Attributes:
        name: What to call it.
        path: The file that an engine opens.
        card: Its card.
        exported: What the file says about itself, none for a card's own float network.
    """

    name: str
    path: Path
    card: Card
    exported: Exported | None = None


def find_subjects(
    arguments: Sequence[str], facts: dict[str, Any], folder: Path, beside: Card | None = None
) -> list[Subject]:
    """Return what each argument names; see `find_subject`.

    Raises:
        CardError: A file says nothing about itself and no options do, or all say everything and options come.
    """
    found = [find_subject(argument, facts, folder, beside) for argument in arguments]
    given = [key for key, value in facts.items() if value is not None]
    if given and all(subject.exported is not None for subject in found):
        raise CardError(
            f"{found[0].path}: was written by fewbit and says itself how its images are prepared, so "
            f"--{given[0]} has no place beside it; leave it out"
        )
    return found


def find_subject(argument: str, facts: dict[str, Any], folder: Path, beside: Card | None = None) -> Subject:
    """Return what an argument names, ready to run.

    Args:
        argument: An exported .onnx file, a card, or a source of a network with a card's facts as options.
        facts: The options.
        folder: Where a card's float network is exported to.
        beside: A card whose facts hold for a file that says nothing about itself.

    Raises:
        CardError: The file says nothing about itself and no options do.
    """
    path = Path(argument)
    if path.suffix == ".onnx":
        exported = read_exported(path)
        if exported is not None:
            return Subject(path.stem, path, exported.card(path), exported)
        if beside is not None:
            return Subject(path.stem, path, beside)
        if facts.get("classes") is None:
            raise CardError(
                f"{path}: was not written by fewbit, so its preprocessing is not known; "
                "give --card, or --classes, --size, --mean and --std"
            )
    card = find_card(argument, facts)
    return Subject(card.network.name, export_float(card, folder), card)


def tell_of_sums(subjects: Sequence[Subject], engines: Sequence[EngineName]) -> None:
    """Warn of files that were made for processors which add products of u8 and s8 otherwise than this one."""
    from fewbit.engines.saturation import saturating_engines
    from fewbit.measure.host import describe_host

    told = [subject for subject in subjects if subject.exported is not None and subject.exported.sums]
    saturating = saturating_engines(engines, describe_host().saturates_u8s8) if told else ()
    for subject, engine in itertools.product(told, engines):
        assert subject.exported is not None
        if engine in saturating and subject.exported.sums == "exact":
            click.echo(
                f"{subject.path}: was made for processors that add products of u8 and s8 exactly, and "
                f"{engine} does not on this one: its results can be wrong; quantize it again here, or with "
                "--sums saturating",
                err=True,
            )
        if engine not in saturating and subject.exported.sums == "saturating":
            click.echo(
                f"{subject.path}: has weights of 7 bits, for processors that add products of u8 and s8 in 16 "
                f"bits; {engine} adds them exactly on this one: quantize it again here for more accuracy",
                err=True,
            )


def export_float(card: Card, folder: Path) -> Path:
    """Export the float network of a card."""
    from fewbit.export.onnx_out import export_onnx
    from fewbit.load.capture import load
    from fewbit.recipe import image_context, read_recipe, run_recipe

    net, _ = run_recipe(read_recipe("float32"), load(card), image_context(None, "onnxruntime"))
    path = folder / f"{card.network.name}-float32.onnx"
    export_onnx(net, path)
    return path


def open_sets(
    subjects: Sequence[Subject], data: Path, strict: bool = False
) -> tuple[list[ImageSet], int, int]:
    """Open the same labelled images for each subject, without those that calibrated any of them.

    Returns:
        One set of images a subject, how many images were left out, and how many of all could not be decoded
        where that is known already.

    Raises:
        DataError: Every image calibrated one of them.
    """
    out = frozenset[str]()
    for subject in subjects:
        out |= subject.exported.calibration_images if subject.exported is not None else frozenset()
    sets, left_out, skipped = [], 0, 0
    for subject in subjects:
        labels = subject.exported.labels if subject.exported else subject.card.labels_path
        source = open_images(data, labels, strict, subject.card.network.classes)
        whole = ImageSet(source, subject.card.input, subject.card.network.classes)
        if out:
            skipped = len(whole.skipped)
            kept = np.array([i for i, image in enumerate(whole.hashes) if image not in out], np.int64)
            if not len(kept):
                raise DataError(
                    f"{data}: all {len(whole)} images calibrated {subject.name}; give others to evaluate"
                )
            left_out = len(whole) - len(kept)
            whole = whole.subset(kept)
        sets.append(whole)
    return sets, left_out, skipped
