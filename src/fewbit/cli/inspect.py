"""`fewbit inspect`: layers, noise, what runs in integers and what keeps the rest out, and what to do."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fewbit.cli.options import COUNT, card_options, find_card, json_option, print_json, take_card_facts
from fewbit.cli.progress import Tell, step_progress

if TYPE_CHECKING:
    from fewbit.data.image_set import ImageSet
    from fewbit.doctor.records import CalibrationStudy, Diagnosis
    from fewbit.engines.placement_cost import PlacementCost
    from fewbit.engines.session import Placement, Setting
    from fewbit.load.card import Card
    from fewbit.net import Net
    from fewbit.recipe import Recipe

_STUDIED = 1024


@click.command()
@click.argument("card", metavar="CARD|FILE")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Labelled images: adds noise, causes, remedies and placement.",
)
@click.option("--recipe", default="int8", show_default=True)
@click.option(
    "--engine", type=click.Choice(["onnxruntime", "openvino"]), default="onnxruntime", show_default=True
)
@click.option("--calibration-images", type=COUNT, default=64, show_default=True)
@click.option("--html", "page", type=click.Path(path_type=Path), help="Write a page with histograms.")
@click.option(
    "--repair", type=click.Path(path_type=Path), help="Write the recipe with the remedies that help (.toml)."
)
@click.option(
    "--study",
    type=COUNT,
    metavar="SEEDS",
    help="Accuracy against 1 to 1024 calibrating images, for so many seeds.",
)
@click.option("--batch", type=COUNT, default=1, show_default=True, help="Of what is profiled.")
@click.option("--threads", type=COUNT, default=1, show_default=True, help="Of what is profiled.")
@click.option(
    "--float-precision", type=click.Choice(["float32", "bf16"]), default="float32", show_default=True
)
@click.option("--seed", type=int, default=0, show_default=True)
@card_options
@json_option
def inspect(card: str, data: Path | None, recipe: str, engine: str, seed: int, **options: Any) -> int:
    """Show every layer; with images also name what costs accuracy, and try remedies.

    Of a file that is quantized already (or was exported by fewbit) show what keeps its operators out of
    integers on the engine, with the milliseconds that it costs.
    """
    from fewbit.load.capture import load
    from fewbit.recipe import read_recipe
    from fewbit.sensitivity.sqnr import layer_records

    facts = take_card_facts(options)
    if data is None and not any(value is not None for value in facts.values()):
        from fewbit.cli.costs import show_file

        shown = show_file(Path(card), _engine_given(engine), _setting_of(engine, options), options)
        if shown is not None:
            return shown
    given = find_card(card, facts)
    _check_options(data, options)
    chosen = read_recipe(recipe)
    net = load(given)
    if data is None:
        return _show_weights(given, layer_records(net, net, ()), options["as_json"])
    with step_progress("inspect", options["as_json"]) as tell:
        found = _examine(given, net, data, chosen, engine, seed, options, tell)
    if options["page"] is not None:
        from fewbit.report.doctor import write_diagnosis

        write_diagnosis(found, options["page"], _command(card, data, recipe, engine, seed, options))
    repaired = _write_repaired(found, options["repair"])
    if options["as_json"]:
        print_json(_answer(found))
        return 0
    from fewbit.cli.diagnosis import print_diagnosis

    print_diagnosis(found)
    for path in (repaired, options["page"]):
        if path is not None:
            click.echo(f"written: {path}")
    return 0


def _setting_of(engine: Any, options: dict[str, Any]) -> Setting:
    from fewbit.engines.session import Setting

    return Setting(
        engine=engine,
        batch=options["batch"],
        threads=options["threads"],
        float_precision=options["float_precision"],
    )


def _engine_given(engine: str) -> str:
    """Return the engine that the user asked for, empty for the default."""
    from click.core import ParameterSource

    source = click.get_current_context().get_parameter_source("engine")
    return "" if source == ParameterSource.DEFAULT else engine


def _answer(found: Diagnosis) -> dict[str, Any]:
    """Return a diagnosis as plain data, with what else it tells."""
    answer = found.model_dump(mode="json")
    if found.study is not None:
        answer["study"] |= {"enough": found.study.enough(), "noise": found.study.noise}
    return answer


def _check_options(data: Path | None, options: dict[str, Any]) -> None:
    from fewbit.errors import InputError

    for name in ("html", "repair", "study"):
        if data is None and options["page" if name == "html" else name] is not None:
            raise InputError(f"--{name} needs images to measure with; give --data")
    for name, suffix in (("repair", ".toml"), ("page", ".html")):
        path = options[name]
        if path is not None and path.suffix != suffix:
            option = "html" if name == "page" else name
            raise InputError(f"--{option} names '{path}'; give a {suffix} file")


def _show_weights(given: Card, records: Any, as_json: bool) -> int:
    if as_json:
        layers = [record.model_dump(mode="json") for record in records]
        print_json({"network": given.network.name, "layers": layers, "placement": None})
        return 0
    from fewbit.cli.diagnosis import print_layers

    print_layers(records)
    click.echo("give --data to see what rounding costs each layer, why, and what helps")
    return 0


def _examine(
    given: Card,
    net: Net,
    data: Path,
    recipe: Recipe,
    engine: str,
    seed: int,
    options: dict[str, Any],
    tell: Tell,
) -> Diagnosis:
    import numpy as np

    from fewbit.data.image_set import ImageSet
    from fewbit.data.images import open_images
    from fewbit.data.sample import choose_balanced
    from fewbit.doctor.diagnose import Images, diagnose, images_to_judge
    from fewbit.doctor.sample import Sample
    from fewbit.errors import DataError

    source = open_images(data, given.labels_path, False, given.network.classes)
    judging, calibrating = images_to_judge(given.input.size), options["calibration_images"]
    wanted = judging + (max(calibrating, _STUDIED) if options["study"] else calibrating)
    chosen = choose_balanced(source.targets, min(wanted, len(source)), seed)
    with ImageSet(source, given.input, given.network.classes, indices=chosen) as images:
        if len(images) < 2:
            raise DataError(f"{data}: has 1 image that can be decoded; give two or more")
        judging = min(judging, len(images) - min(calibrating, len(images) // 2))
        places = np.arange(len(images))
        seen = Images(
            calibration=Sample.of_set(images.subset(places[judging:][:calibrating])),
            judging=Sample.of_set(images.subset(places[:judging])),
        )
        expected = given.expected
        found = diagnose(
            net,
            recipe,
            seen,
            section=given.input,
            expected=None if expected is None else expected.top1_correct / expected.images,
            engine=engine,
            seed=seed,
            advance=tell,
        )
        few, setting = images.subset(places[judging:]), _setting_of(engine, options)
        placement, cost = _placement(net, recipe, few, setting, seed, tell)
        update: dict[str, Any] = {"placement": placement, "cost": cost}
        if options["study"]:
            pool = Sample.of_set(images.subset(places[judging:]))
            update["study"] = _study(net, recipe, pool, seen.judging, engine, seed, options["study"], tell)
    return found.model_copy(update=update)


def _study(
    net: Net, recipe: Recipe, pool: Any, judging: Any, engine: str, seed: int, seeds: int, tell: Tell
) -> CalibrationStudy:
    from fewbit.doctor.calibration_study import study_calibration

    chosen = range(seed, seed + seeds)
    return study_calibration(net, recipe, pool, judging, seeds=chosen, engine=engine, advance=tell)


def _placement(
    net: Net, recipe: Recipe, images: ImageSet, setting: Setting, seed: int, tell: Tell
) -> tuple[Placement, PlacementCost]:
    """Ask the engine which operators it runs in integers, and what the others cost."""
    import numpy as np

    from fewbit.engines.placement_cost import measure_placement
    from fewbit.engines.process import EngineProcess
    from fewbit.export.onnx_out import export_onnx
    from fewbit.place.targets import target
    from fewbit.recipe import image_context, run_recipe

    few, engine = images.subset(np.arange(min(8, len(images)))), setting.engine
    made, _ = run_recipe(recipe, net, image_context(few, engine, seed))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inspected.onnx"
        aim = target(engine, native_bf16=setting.float_precision == "bf16")
        export_onnx(made, path, aim if recipe.places else None)
        tell(f"placement on {engine}", 0.95)
        with EngineProcess(engine) as process:
            session = process.open(path, setting)
            return session.placement(), measure_placement(session)


def _write_repaired(found: Diagnosis, path: Path | None) -> Path | None:
    if path is None:
        return None
    if not found.repaired:
        click.echo(f"{path} was not written: no remedy that was tried helps", err=True)
        return None
    from fewbit.files import write_text

    write_text(path, found.repaired)
    return path


def _command(card: str, data: Path, recipe: str, engine: str, seed: int, options: dict[str, Any]) -> str:
    import shlex

    words = ["fewbit", "inspect", card, "--data", str(data), "--recipe", recipe, "--engine", engine]
    words += ["--calibration-images", str(options["calibration_images"]), "--seed", str(seed)]
    words += ["--study", str(options["study"])] if options["study"] else []
    return shlex.join([*words, "--html", str(options["page"])])
