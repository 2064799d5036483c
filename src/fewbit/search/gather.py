"""What a search needs before its first trial: networks loaded, images decoded and split."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from fewbit.clock import phase
from fewbit.data.image_set import ImageSet
from fewbit.data.images import ImageSource, open_images
from fewbit.data.sample import choose_balanced, split
from fewbit.engines.limit import onednn_limit
from fewbit.engines.session import EngineName
from fewbit.errors import DataError
from fewbit.load.capture import load
from fewbit.load.card import Card, ExpectedSection
from fewbit.measure.accuracy import Accuracy
from fewbit.measure.host import Host
from fewbit.net import Net
from fewbit.search.journal import Part
from fewbit.search.options import StudyOptions
from fewbit.search.trial import DataRecord, Skipped
from fewbit.search.workbench import Images, Workbench
from fewbit.version import __version__

_NAMED = 5
_CALIBRATION_SHARE = 6

Tell = Callable[[str, float], None]
_Kind = tuple[Path | None, str, int]


def gather(
    options: StudyOptions, tell: Tell, saturating: Collection[EngineName] = ()
) -> tuple[tuple[Workbench, ...], DataRecord]:
    """Load the networks, open and decode the images, and split them.

    Args:
        options: What the search is told.
        tell: Told what is going on and the fraction done.
        saturating: Engines that do not sum products of u8 and s8 exactly on this processor.

    Returns:
        One workbench a card, and what the images are.

    Raises:
        InputError: A network or the images cannot be used.
    """
    shared: dict[_Kind, Images] = {}
    opened = {_kind(card): card for card in options.cards}
    wholes = {kind: _open(options, card, options.data) for kind, card in opened.items()}
    try:
        for whole in wholes.values():  # threads decode while the networks are loaded
            whole.begin()
        nets = _load(options, tell)
        benches = []
        for card, net in zip(options.cards, nets, strict=True):
            kind = _kind(card)
            if kind not in shared:
                with phase("decode"):
                    wholes[kind].decode(lambda fraction: tell("decoding images", fraction))
                shared[kind] = _split(options, card, wholes[kind])
            folder = options.out / "files"
            benches.append(Workbench(card, net, shared[kind], folder, options.seed, saturating))
    except BaseException:  # else the process would decode all that is queued before it ends
        for whole in wholes.values():
            whole.close()
        raise
    return tuple(benches), _record(options, benches[0], wholes[_kind(options.cards[0])])


def _load(options: StudyOptions, tell: Tell) -> list[Net]:
    nets = []
    for place, card in enumerate(options.cards):
        tell(f"loading {card.network.name}", place / len(options.cards))
        with phase("load"):
            nets.append(load(card, options.seed))
    return nets


def identity(
    options: StudyOptions, benches: tuple[Workbench, ...], host: Host, versions: dict[str, str]
) -> dict[str, str]:
    """Return what the trials of a search depend on, by readable name; see `Journal`."""
    found = {
        "fewbit": __version__,
        "host": f"{host.cpu}, {host.cores} cores, {' '.join(host.isa)}",
        "objective": options.objective,
        "engines": ",".join(sorted(options.engines)),
        "batch": ",".join(str(batch) for batch in sorted(options.batches)),
        "threads": str(options.threads or host.cores),
        "seed": str(options.seed),
        "number of calibration images": str(options.calibration_images),
        "holdout fraction": str(options.holdout_fraction),
    }
    found |= {name: versions[name] for name in ("torch", "onnxruntime", "openvino") if name in versions}
    if onednn_limit() != "ALL":
        found["limit of oneDNN"] = onednn_limit()
    if benches[0].saturating:
        found["engines with saturating sums"] = ",".join(sorted(benches[0].saturating))
    for bench in benches:
        found[f"network {bench.name}"] = bench.digest
        found[f"network {bench.name} search images"] = bench.images.search.digest
        found[f"network {bench.name} calibration images"] = bench.images.calibration.digest
    return found


def expected_parts(options: StudyOptions, bench: Workbench) -> tuple[Part, ...]:
    """Return the parts of the images that the card's expected figures are of; none where of other images."""
    card, images = bench.card, bench.images
    parts: tuple[Part, ...] = ("search", "holdout")
    if options.calibration is None:
        parts = ("calibration", *parts)
    if card.expected is None or card.expected_data_path is None or not card.expected_data_path.exists():
        return ()
    same = options.data.samefile(card.expected_data_path)
    return parts if same and card.expected.images == sum(len(images.part(part)) for part in parts) else ()


def expected_note(name: str, engine: str, accuracy: Accuracy, expected: ExpectedSection) -> str:
    """Say how float32 compares with what its card expects, and what to do where it does not match."""
    came = (accuracy.top1_correct, accuracy.top5_correct)
    wanted = (expected.top1_correct, expected.top5_correct)
    said = f"{name}: float32 on {engine} is right on {came[0]} (top-5: {came[1]}) of {accuracy.total} images"
    if came == wanted:
        return f"{said}, as its card expects"
    most = max(1, accuracy.total // 1000)
    near = all(abs(a - b) <= most for a, b in zip(came, wanted, strict=True))
    why = "within rounding" if near else "check scale, mean, std, channels, resize and crop of the card"
    return f"{said}, its card expects {wanted[0]} (top-5: {wanted[1]}): {why}"


def _kind(card: Card) -> _Kind:
    """Return what the images of a network depend on."""
    return card.labels_path, card.input.digest(), card.network.classes


def _open(options: StudyOptions, card: Card, path: Path) -> ImageSet:
    source = _source(options, card, path)
    return ImageSet(source, card.input, card.network.classes)


def _source(options: StudyOptions, card: Card, path: Path) -> ImageSource:
    return open_images(path, card.labels_path, options.strict, card.network.classes)


def _split(options: StudyOptions, card: Card, whole: ImageSet) -> Images:
    """Choose calibration images, then split what does not calibrate into search and holdout."""
    if options.calibration is not None:
        source = _source(options, card, options.calibration)
        chosen = choose_balanced(source.targets, options.calibration_images, options.seed)
        calibration = ImageSet(source, card.input, card.network.classes, indices=chosen)
        calibration.decode()
        calibrates = set(calibration.hashes)
        kept = [place for place, image in enumerate(whole.hashes) if image not in calibrates]
        if not kept:
            raise DataError(f"{options.data}: all {len(whole)} images calibrate; give others to evaluate")
        whole = whole.subset(np.array(kept, np.int64))
        parts = split(whole.targets, 0, options.holdout_fraction, options.seed)
    else:
        count = min(options.calibration_images, len(whole) // _CALIBRATION_SHARE)
        parts = split(whole.targets, max(1, count), options.holdout_fraction, options.seed)
        calibration = whole.subset(parts.calibration)
    return Images(calibration, whole.subset(parts.search), whole.subset(parts.holdout))


def _record(options: StudyOptions, bench: Workbench, whole: ImageSet) -> DataRecord:
    skipped = whole.skipped
    return DataRecord(
        source=str(options.data),
        images_digest=whole.digest,
        calibration=len(bench.images.calibration),
        search=len(bench.images.search),
        holdout=len(bench.images.holdout),
        classes=bench.card.network.classes,
        calibrating=len(whole)
        - sum(
            len(part)
            for part in (bench.images.search, bench.images.holdout)
            + ((bench.images.calibration,) if options.calibration is None else ())
        ),
        skipped=Skipped(count=len(skipped), names=tuple(image.name for image in skipped[:_NAMED])),
    )
