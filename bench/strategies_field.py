"""Who takes part in `strategies.py`: answers of searches, fewbit's recipes and the peers of one network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from fewbit.data.image_set import ImageSet
from fewbit.engines.process import EngineProcess
from fewbit.engines.session import EngineName, FloatPrecision, Setting
from fewbit.errors import EngineError, FewbitError
from fewbit.load.card import Card
from fewbit.measure.accuracy import Predictions
from fewbit.measure.host import describe_host, sums_exactly, usable_cores
from fewbit.recipe import read_recipe
from fewbit.search.budget import parse_budget
from fewbit.search.evaluate import evaluate
from fewbit.search.gather import gather
from fewbit.search.options import StudyOptions
from fewbit.search.settings import EVALUATION_BATCH, evaluation
from fewbit.search.trial import DataRecord, StudyRecord
from fewbit.search.workbench import Workbench
from speed import describe
from speed_networks import Network
from speed_peers import COMPILED, PeerFiles, peer_entrants
from speed_process import EngineTimed
from speed_turns import Entrant, Form, Opened

RECIPES = (
    "float32",
    "int8",
    "int8-symmetric",
    "int8-per-tensor",
    "int8-per-tensor-equalized",
    "int8-equalized",
    "int8-mse",
    "int8-power-of-two",
    "int8-weights-only",
    "int8-dynamic",
)
FLOATS = ("onnxruntime float32", "openvino float32")
_CALIBRATING = 512


@dataclass(frozen=True)
class Strategy:
    """A way to make a network faster, and the ways to run what it makes.

    Attributes:
        name: What the tables call it.
        form: What its matrix products compute in.
        ways: One entrant a setting; none where it failed.
        path: The file; none where it failed.
        judged: The engine and precision that its accuracy is measured with.
        failed: Why there is no file.
    """

    name: str
    form: Form
    ways: tuple[Entrant, ...]
    path: Path | None
    judged: Setting
    failed: str = ""


def open_bench(card: Card, budget: str, folder: Path, seed: int) -> tuple[Workbench, DataRecord]:
    """Load a network with its images, split as `fewbit search` splits them; say what the images are.

    Raises:
        FewbitError: The card or its images cannot be used.
    """
    assert card.expected_data_path is not None
    options = StudyOptions(
        (card,), card.expected_data_path, (parse_budget(budget),), folder, seed=seed, threads=usable_cores()
    )
    engines: tuple[EngineName, ...] = ("onnxruntime", "openvino")
    saturating = [engine for engine in engines if not sums_exactly(engine)]
    (bench,), record = gather(options, lambda _, __: None, saturating)
    return bench, record


def answer_of(study: StudyRecord, folder: Path, name: str) -> Strategy:
    """Return what a search found, run as it says; with the nearest where nothing is inside the budget."""
    assert study.answer is not None
    setting, path = study.answer.timing.setting, folder / "best" / "model.onnx"
    trial = next(trial for trial in study.trials if trial.key == study.answer.key)
    form: Form = setting.float_precision if trial.recipe.startswith(("float32", "bf16")) else "int8"
    entrant = Entrant(name, describe(setting), form, True, partial(_open, path, setting))
    return Strategy(name, form, (entrant,), path, _judged(setting.engine, setting.float_precision, setting))


def own_strategies(
    bench: Workbench, recipes: Sequence[str], settings: Sequence[Setting]
) -> Iterator[Strategy]:
    """Yield fewbit's recipes on every engine.

    Where the host has bf16, OpenVINO computes what is left in float with it, and float32 both ways.
    """
    wide: FloatPrecision = "bf16" if describe_host().bf16 else "float32"
    for name in recipes:
        kinds: list[tuple[EngineName, FloatPrecision]] = [("onnxruntime", "float32"), ("openvino", wide)]
        if name == "float32" and wide == "bf16":
            kinds.insert(1, ("openvino", "float32"))
        for engine, precision in kinds:
            form: Form = precision if name == "float32" else "int8"
            yield _own(bench, name, engine, precision, form, settings)


def _own(
    bench: Workbench,
    recipe: str,
    engine: EngineName,
    precision: FloatPrecision,
    form: Form,
    settings: Sequence[Setting],
) -> Strategy:
    shown = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[engine]
    name = f"fewbit {recipe} on {shown}{' with bf16' if precision == 'bf16' else ''}"
    judged = _judged(engine, precision, settings[0])
    try:
        path = bench.build(read_recipe(recipe), engine).path
    except FewbitError as error:
        return Strategy(name, form, (), None, judged, str(error))
    update = {"engine": engine, "float_precision": precision}
    chosen = [setting.model_copy(update=update) for setting in settings]
    ways = [Entrant(name, describe(s), form, True, partial(_open, path, s)) for s in chosen]
    return Strategy(name, form, tuple(ways), path, judged)


def peer_strategies(
    bench: Workbench, source: str, folder: Path, python: str, batches: Sequence[int], threads: int, seed: int
) -> Iterator[Strategy]:
    """Yield the peers of `speed.py` that are files, calibrated on the images that calibrate the searches."""
    few = bench.images.calibration.subset(np.arange(min(_CALIBRATING, len(bench.images.calibration))))
    images = np.concatenate([batch.astype(np.float32) for batch in few.batches(EVALUATION_BATCH)])
    files = PeerFiles(Network(bench.name, source, bench.net, images), folder, python, usable_cores(), seed)
    entrants = [
        replace(entrant, how=f"{entrant.how}, {batch} at a time")
        for batch in batches
        for entrant in peer_entrants(files, batch, threads)
    ]
    makers = {"onnxruntime int8": files.onnxruntime, "nncf int8": files.nncf}
    host_precision: FloatPrecision = "bf16" if describe_host().bf16 else "float32"
    for name in dict.fromkeys(entrant.name for entrant in entrants):
        if name in COMPILED:
            continue
        ways = tuple(entrant for entrant in entrants if entrant.name == name)
        engine: EngineName = "onnxruntime" if name.startswith("onnxruntime") else "openvino"
        left = engine == "openvino" and name != "openvino float32"  # to the engine, or asked for
        judged = _judged(engine, host_precision if left else "float32", Setting(threads=threads))
        try:
            path = makers.get(name, files.float32)()
        except EngineError as error:
            yield Strategy(name, ways[0].form, (), None, judged, str(error))
        else:
            yield Strategy(name, ways[0].form, ways, path, judged)


def settings_of(batches: Sequence[int], threads: int) -> list[Setting]:
    """Return the ways to run a file that are worth trying.

    Example:
        >>> [(setting.batch, setting.streams) for setting in settings_of((8, 32), 2)]
        [(8, 2), (8, 1), (32, 2), (32, 1)]
    """
    streams = sorted({1, threads}, reverse=True)
    return [Setting(batch=b, threads=threads, streams=n) for b, n in itertools.product(batches, streams)]


def predict(strategy: Strategy, parts: Sequence[ImageSet]) -> Predictions:
    """Return what the engine that is timed predicts from a strategy's file.

    Raises:
        EngineError: It does not run.
    """
    assert strategy.path is not None
    with EngineProcess(strategy.judged.engine, timeout_s=300.0) as process:
        runner = process.open(strategy.path, strategy.judged)
        return Predictions.concat([evaluate(runner, part, EVALUATION_BATCH)[0] for part in parts])


def _open(path: Path, setting: Setting) -> Opened:
    return EngineTimed(path, setting)


def _judged(engine: EngineName, precision: FloatPrecision, like: Setting) -> Setting:
    return evaluation(engine, precision, like.threads)
