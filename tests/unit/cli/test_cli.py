from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import onnx
import pytest
import torch

from command import Fewbit, Said
from fewbit import __version__
from fewbit.cli.main import COMMANDS
from fewbit.cli.options import Numbers
from fewbit.engines.process import EngineProcess
from fewbit.errors import EngineCrashed, RecipeError
from fewbit.improve import qdrop
from fewbit.improve.descend import Descent
from fewbit.improve.reconstruct import Problem
from fewbit.measure.accuracy import Accuracy
from fewbit.recipe import Recipe, read_recipe, shipped_recipes
from fewbit.registry import ROWS
from fewbit.spec import Rule, Scheme


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The command itself


def test_help_lists_every_command_and_imports_no_torch() -> None:
    code = (
        "import sys; from fewbit.cli.main import main; code = main(['--help'])\n"
        "heavy = {'torch', 'onnxruntime', 'openvino', 'plotly', 'scipy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(code or (5 if heavy else 0))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert all(f"\n  {name} " in found.stdout for name in COMMANDS)


def test_it_runs_as_a_module() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "fewbit", "recipes", "--jso"], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("fewbit recipes: No such option") and "--json" in found.stderr
    assert found.stderr.endswith("(see fewbit recipes --help)\n") and found.stderr.count("\n") == 1


def test_alone_it_shows_its_help(fewbit: Fewbit) -> None:
    said = fewbit()
    assert (said.code, said.err) == (0, "") and said.out.startswith("Usage: fewbit [OPTIONS] COMMAND")
    assert fewbit("-h").out == said.out


def test_it_tells_its_version(fewbit: Fewbit) -> None:
    assert fewbit("--version").out == f"fewbit {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(fewbit: Fewbit, command: str) -> None:
    said = fewbit(command, "--help")
    assert (said.code, said.err) == (0, "") and said.out.startswith(f"Usage: fewbit {command}")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("frob",), "fewbit: no command 'frob'; there are search, quantize, eval, bench, inspect, report, "),
        (("quantise",), "fewbit: no command 'quantise' (did you mean 'quantize'?); there are search, "),
        (("quantize",), "fewbit quantize: Missing argument 'CARD'. (see fewbit quantize --help)"),
        (
            ("quantize", "a.toml", "--data", "x"),
            "fewbit quantize: Missing option '--out'. (see fewbit quantize",
        ),
        (("eval", "a.onnx"), "fewbit eval: Missing option '--data'. (see fewbit eval --help)"),
        (("search", "a.toml", "--data", "x"), "fewbit search: Missing option '--budget'. (see fewbit search"),
        (
            ("eval", "a", "--data", "x", "--engine", "ort"),
            "fewbit eval: Invalid value for '--engine': 'ort' is not",
        ),
        (
            ("eval", "a", "--data", "x", "--batch", "0"),
            "fewbit eval: Invalid value for '--batch': 0 is not in the",
        ),
        (
            ("bench", "a", "--batch", "1,x"),
            "fewbit bench: Invalid value for '--batch': '1,x' are not whole numbers",
        ),
        (
            ("bench", "a", "--batch", "1,0"),
            "fewbit bench: Invalid value for '--batch': '1,0' has 0; each must be 1",
        ),
        (
            ("bench", "a", "--rounds", "0"),
            "fewbit bench: Invalid value for '--rounds': 0 is not in the range",
        ),
        (
            ("bench", "a", "--streams", "-1"),
            "fewbit bench: Invalid value for '--streams': -1 is not in the range",
        ),
        (
            ("bench", "a", "--engine", ""),
            "fewbit: --engine is empty; give one or more of onnxruntime, openvino",
        ),
        (
            ("bench", "a", "--engine", "openvin"),
            "fewbit: --engine names 'openvin' (did you mean 'openvino'?); allowed are onnxruntime, openvino",
        ),
        (
            ("bench", "none.onnx"),
            "fewbit: none.onnx: there is no such file; give an exported .onnx file or a card",
        ),
        (("bench", "none"), "fewbit: 'none': is neither a .toml card nor a source of a network; give"),
        (("inspect", "none.toml"), "fewbit: none.toml: there is no such card; give the path of a .toml card"),
        (
            ("report", "none"),
            "fewbit: none: has no study.db; give the folder that 'fewbit search --out' wrote",
        ),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(fewbit: Fewbit, arguments: tuple[str, ...], line: str) -> None:
    said = fewbit(*arguments)
    assert (said.code, said.out) == (2, "")
    assert said.line.startswith(line)


def test_an_engine_that_fails_is_one_line_and_exit_4(
    fewbit: Fewbit, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: EngineProcess, path: Path, setting: object) -> None:
        raise EngineCrashed("onnxruntime: its process died\n(signal 11)")

    monkeypatch.setattr(EngineProcess, "open", crash)
    said = fewbit("bench", exported)
    assert (said.code, said.line) == (4, "fewbit: onnxruntime: its process died (signal 11)")


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), click.Abort()])
def test_a_user_who_stops_it_is_told_how_to_go_on(
    fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch, reason: BaseException
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise reason

    monkeypatch.setattr(click.Group, "invoke", stop)
    said = fewbit("recipes")
    assert (said.code, said.err.strip()) == (130, "stopped; nothing was written")
    said = fewbit("demo")
    assert said.err.strip() == "stopped; what was measured is kept: the same command with --resume goes on"


@pytest.mark.parametrize(
    ("text", "numbers"), [("1,8,32", (1, 8, 32)), ("7", (7,)), (" 1, 2", (1, 2)), ((3, 4), (3, 4))]
)
def test_numbers_with_commas(text: str, numbers: tuple[int, ...]) -> None:
    assert Numbers(int, 1).convert(text, None, None) == numbers


# Lists


def test_methods_recipes_and_engines_are_listed(fewbit: Fewbit) -> None:
    methods = fewbit("methods", "--json").answer
    assert {(row["kind"], row["name"]) for row in methods} == {(k, name) for k in ROWS for name in ROWS[k]}
    percentile = next(row for row in methods if row["name"] == "percentile")
    assert "2004.09602" in percentile["source"] and percentile["what"].endswith(".")
    recipes = fewbit("recipes", "--json").answer
    assert {row["name"]: row["digest"] for row in recipes} == {
        r.name: r.digest() for r in shipped_recipes().values()
    }
    for command in ("methods", "recipes"):
        said = fewbit(command)
        assert (said.code, said.err) == (0, "") and "int8" in said.out + "int8"


def test_engines_say_what_this_host_runs_in_integers(fewbit: Fewbit) -> None:
    said = fewbit("engines", "--json")
    assert [row["engine"] for row in said.answer["engines"]] == ["onnxruntime", "openvino"]
    assert said.answer["engines"][0]["precisions"]["convolution"] == "int8"
    assert said.answer["host"]["cores"] >= 1


# quantize


def test_quantize_twice_gives_the_same_bytes(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    common = ("quantize", job / "tiny.toml", "--data", job / "images", "--recipe", "int8-mse", "--json")
    for name in ("a", "b"):
        said = fewbit(*common, "--out", tmp_path / f"{name}.onnx")
        assert (said.code, said.err) == (0, "")
    assert digest(tmp_path / "a.onnx") == digest(tmp_path / "b.onnx")
    other = fewbit(*common, "--out", tmp_path / "c.onnx", "--seed", 1, "--calibration-images", 20)
    assert other.code == 0 and digest(tmp_path / "c.onnx") != digest(tmp_path / "a.onnx")


def test_quantize_says_what_each_step_did(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "net.onnx"
    said = fewbit("quantize", job / "tiny.toml", "--data", job / "images", "--out", out)
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines[:-2]] == ["canonical", "fold_bn", "place", "calibrate"]
    assert lines[-2] == "calibrated on 150 images; evaluate it on others"
    assert lines[-1] == f"{out}: {out.stat().st_size:,} bytes, for onnxruntime"
    onnx.checker.check_model(onnx.load(out), full_check=True)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_quantize_as_json(fewbit: Fewbit, job: Path, tmp_path: Path, engine: str) -> None:
    out = tmp_path / "net.onnx"
    said = fewbit(
        *("quantize", job / "tiny.toml", "--data", job / "images", "--out", out, "--engine", engine),
        *("--calibration-images", 30, "--json"),
    )
    answer = said.answer
    assert (answer["network"], answer["recipe"]) == ("tiny", "int8")
    assert answer["digest"] == read_recipe("int8").digest()
    assert (answer["calibration_images"], answer["bytes"]) == (30, out.stat().st_size)
    facts = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert facts["fewbit.engine"] == engine
    assert Recipe.from_toml(facts["fewbit.recipe"]) == read_recipe("int8")


def test_quantize_takes_the_cards_facts_as_options(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    facts = ("--classes", 6, "--size", "3,16,16", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")
    source = f"{job / 'tiny.py'}:tiny"
    weights = ("--weights", job / "tiny.safetensors", "--name", "tiny")
    fewbit("quantize", source, *facts, *weights, "--data", job / "images", "--out", tmp_path / "a.onnx")
    fewbit("quantize", job / "tiny.toml", "--data", job / "images", "--out", tmp_path / "b.onnx")
    assert digest(tmp_path / "a.onnx") == digest(tmp_path / "b.onnx")


def test_quantize_refuses_facts_beside_a_card(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    said = fewbit(
        *("quantize", job / "tiny.toml", "--data", job / "images", "--out", tmp_path / "a.onnx"),
        *("--classes", 6),
    )
    assert said.code == 2 and said.line.endswith(
        "tiny.toml: is a card, so --classes has no place beside it; write the fact into the card"
    )


def test_quantize_by_a_recipe_of_ones_own(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    scheme = Scheme(rules=(Rule(match="first", keep_float=True),))
    own.write_text(read_recipe("int8").model_copy(update={"name": "own", "scheme": scheme}).to_toml())
    said = fewbit(
        *("quantize", job / "tiny.toml", "--data", job / "images", "--out", tmp_path / "a.onnx"),
        *("--recipe", own, "--json"),
    )
    assert said.answer["recipe"] == "own"
    assert "left in float: 0" in said.answer["steps"][2]["notes"]


def test_quantize_with_no_image_to_calibrate_is_told(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    said = fewbit(
        *("quantize", job / "tiny.toml", "--data", job / "images", "--out", tmp_path / "a.onnx"),
        *("--calibration-images", 0),
    )
    assert (said.code, said.line) == (2, "fewbit: --calibration-images is 0; give 1 or more")
    assert list(tmp_path.iterdir()) == []


def test_quantize_without_images_by_a_recipe_that_needs_none(
    fewbit: Fewbit, job: Path, tmp_path: Path
) -> None:
    card, out = job / "tiny.toml", tmp_path / "net.onnx"
    said = fewbit("quantize", card, "--recipe", "int8-dfq", "--out", out)
    assert (said.code, said.err) == (0, "")
    assert "calibrated on" not in said.out and said.out.splitlines()[-1].endswith("bytes, for onnxruntime")
    facts = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert json.loads(facts["fewbit.card"])["calibration_images"] == []
    given = ("--data", tmp_path / "none", "--json")
    again = fewbit("quantize", card, "--recipe", "int8-dfq", "--out", tmp_path / "b.onnx", *given)
    assert again.answer["calibration_images"] == 0
    assert digest(tmp_path / "b.onnx") == digest(out)


def test_quantize_without_images_by_a_recipe_that_needs_some_is_told(
    fewbit: Fewbit, job: Path, tmp_path: Path
) -> None:
    said = fewbit("quantize", job / "tiny.toml", "--out", tmp_path / "a.onnx")
    assert said.code == 2 and said.line == (
        "fewbit quantize: Missing option '--data'. Recipe 'int8' calibrates on images; "
        "one that needs none is 'int8-dfq' (see fewbit quantize --help)"
    )
    other = fewbit(
        "quantize", job / "tiny.toml", "--calibration", job / "images", "--out", tmp_path / "a.onnx"
    )
    assert other.code == 0 and "calibrated on 150 images" in other.out


def _told(said: Said) -> list[str]:
    """Return the lines on stderr but those of progress, which a slow machine has more of."""
    return [line for line in said.err.splitlines() if line and not line.startswith("[")]


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LEARNED = """name = "learned"
[scheme.weights]
bits = 3
symmetric = true
signed = true
granularity = "channel"
[[steps]]
use = "canonical"
[[steps]]
use = "fold_bn"
[[steps]]
use = "place"
[[steps]]
use = "calibrate"
[[steps]]
use = "qdrop"
iterations = 4
group = 1
"""


@pytest.mark.usefixtures("one_thread")
def test_a_quantization_that_was_stopped_goes_on_where_it_was(
    fewbit: Fewbit, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out, calm = tmp_path / "learned.toml", tmp_path / "net.onnx", tmp_path / "calm.onnx"
    recipe.write_text(LEARNED)
    common = ("quantize", job / "tiny.toml", "--data", job / "images", "--recipe", recipe)
    assert _told(fewbit(*common, "--out", calm)) == []

    learn = qdrop.descend

    def stop(problem: Problem, how: Descent) -> str:
        if problem.unit.name == "5":
            raise KeyboardInterrupt
        return learn(problem, how)

    with monkeypatch.context() as patch:
        patch.setattr(qdrop, "descend", stop)
        said = fewbit(*common, "--out", out)
    assert said.code == 130 and _told(said) == [
        "stopped; no file was written; the layers that were learned are kept: the same command goes on"
    ]
    partial = tmp_path / "net.onnx.partial"
    assert not out.exists() and len([path for path in partial.rglob("*") if path.is_file()]) == 2

    said = fewbit(*common, "--out", out)
    assert _told(said) == [f"{partial}: a run was stopped; what it had done is taken up where it fits"]
    assert "2 of 4 units had been done when a run was stopped" in said.out
    assert digest(out) == digest(calm)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm.onnx", "learned.toml", "net.onnx"]


def test_a_quantization_that_fails_before_anything_is_learned_leaves_nothing(
    fewbit: Fewbit, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(problem: Problem, how: Descent) -> str:
        raise RecipeError("odd")

    recipe = tmp_path / "learned.toml"
    recipe.write_text(LEARNED)
    monkeypatch.setattr(qdrop, "descend", fail)
    common = ("quantize", job / "tiny.toml", "--data", job / "images", "--recipe", recipe)
    said = fewbit(*common, "--out", tmp_path / "net.onnx")
    assert (said.code, _told(said)) == (2, ["fewbit: odd"])
    assert [path.name for path in tmp_path.iterdir()] == ["learned.toml"]


# eval


def test_eval_leaves_out_what_calibrated_the_file(fewbit: Fewbit, job: Path, exported: Path) -> None:
    said = fewbit("eval", exported, "--data", job / "images", "--json")
    answer = said.answer
    assert said.err == "" and answer["calibration_images_left_out"] == 48 and answer["skipped"] == 0
    accuracy = answer["accuracy"]
    assert accuracy["images"] == 150 - 48
    found = Accuracy(
        top1_correct=accuracy["top1_correct"], top5_correct=accuracy["top5_correct"], total=accuracy["images"]
    )
    assert accuracy["top1"] == found.top1 > 0.7  # nine of ten are labelled by the network itself
    assert accuracy["interval95"] == [found.interval().low, found.interval().high]


def test_eval_leaves_them_out_under_another_name_too(
    fewbit: Fewbit, job: Path, exported: Path, tmp_path: Path
) -> None:
    shutil.copytree(job / "images", tmp_path / "renamed" / "c")
    moved = tmp_path / "renamed" / "c"
    for place, path in enumerate(sorted(moved.rglob("*.png"))):
        path.rename(path.with_name(f"other{place}.png"))
    said = fewbit("eval", exported, "--data", moved, "--json")
    assert said.answer["calibration_images_left_out"] == 48 and said.answer["accuracy"]["images"] == 150 - 48


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "reference"])
def test_eval_against_the_card_on_every_engine(
    fewbit: Fewbit, job: Path, exported: Path, engine: str
) -> None:
    said = fewbit(
        *("eval", exported, "--data", job / "images", "--against", job / "tiny.toml", "--engine", engine),
        *("--batch", 8, "--json"),
    )
    versus = said.answer["versus"]
    assert abs(versus["top1_drop"]) <= 0.06 and versus["flips"] <= 0.1
    assert versus["interval95"][0] <= versus["top1_drop"] <= versus["interval95"][1]
    assert 0 <= versus["p_value"] <= 1


def test_eval_says_it_in_words(fewbit: Fewbit, job: Path, exported: Path) -> None:
    said = fewbit("eval", exported, "--data", job / "images", "--against", job / "tiny.toml")
    first, second, third = said.out.splitlines()
    assert first.startswith(f"{exported} on onnxruntime: top-1 ") and first.endswith("of 102 images right")
    assert second == "0 broken images skipped, 48 left out because they calibrated the file"
    assert third.startswith(f"against {job / 'tiny.toml'}: top-1 drop ") and "(exact McNemar)" in third


def test_eval_of_a_file_whose_images_all_calibrated_it(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.onnx"
    fewbit("quantize", job / "tiny.toml", "--data", job / "images", "--out", path)
    said = fewbit("eval", path, "--data", job / "images")
    assert said.code == 2
    assert said.line.endswith("images: all 150 images calibrated all; give others to evaluate")


def test_eval_with_labels_kept_in_the_file(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    """The card's labels file turns the classes round; the exported file carries it, the card is gone."""
    (tmp_path / "turned.json").write_text(str({f"c{i}": 5 - i for i in range(6)}).replace("'", '"'))
    card = tmp_path / "turned.toml"
    text = (job / "tiny.toml").read_text().replace("classes = 6", 'classes = 6\nlabels = "turned.json"')
    text = text.replace('"tiny.py:tiny"', f'"{job}/tiny.py:tiny"')
    card.write_text(text.replace('"tiny.safetensors"', f'"{job}/tiny.safetensors"'))
    out = tmp_path / "net.onnx"
    common = ("--data", job / "images", "--json")
    assert fewbit("quantize", card, "--out", out, "--calibration-images", 30, *common).code == 0
    card.unlink()
    turned, straight = fewbit("eval", out, *common), fewbit("eval", job / "tiny.toml", *common)
    assert turned.code == 0 and turned.answer["accuracy"]["images"] == 120
    assert turned.answer["accuracy"]["top1"] < 0.4 < straight.answer["accuracy"]["top1"]


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_options_that_a_file_of_ours_answers_itself_are_refused(
    fewbit: Fewbit, job: Path, exported: Path, command: str
) -> None:
    data = ("--data", job / "images") if command == "eval" else ()
    said = fewbit(command, exported, "--mean", "0.5,0.5,0.5", *data)
    assert said.code == 2 and said.line.endswith(
        f"{exported}: was written by fewbit and says itself how its images are prepared, so --mean has no "
        "place beside it; leave it out"
    )


def test_eval_of_a_file_of_another_program(fewbit: Fewbit, job: Path, exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported)
    del model.metadata_props[:]
    path = tmp_path / "theirs.onnx"
    onnx.save(model, path)
    said = fewbit("eval", path, "--data", job / "images")
    assert said.code == 2 and said.line.endswith(
        "theirs.onnx: was not written by fewbit, so its preprocessing is not known; "
        "give --card, or --classes, --size, --mean and --std"
    )
    said = fewbit("eval", path, "--data", job / "images", "--card", job / "tiny.toml", "--json")
    assert said.answer["accuracy"]["images"] == 150


def test_eval_skips_broken_images_and_stops_when_strict(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for path in sorted((job / "images").rglob("*.png"))[::3]:
        copy = images / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    broken = images / "c0" / "0000-broken.png"
    broken.write_bytes(next((job / "images").rglob("*.png")).read_bytes()[:-200])
    said = fewbit("eval", job / "tiny.toml", "--data", images, "--json")
    assert (said.answer["skipped"], said.answer["accuracy"]["images"]) == (1, 50)
    said = fewbit("eval", job / "tiny.toml", "--data", images, "--strict")
    assert said.code == 2 and "0000-broken.png" in said.line


# bench


def test_bench_compares_side_by_side(fewbit: Fewbit, job: Path, exported: Path) -> None:
    said = fewbit(
        *("bench", exported, job / "tiny.toml", "--engine", "onnxruntime,openvino", "--batch", "1,4"),
        *("--rounds", 2, "--threads", 1, "--json"),
    )
    assert said.err == ""
    rows = said.answer
    assert [(row["subject"], row["setting"]["engine"], row["setting"]["batch"]) for row in rows] == [
        (name, engine, batch)
        for name in ("int8", "tiny")
        for engine in ("onnxruntime", "openvino")
        for batch in (1, 4)
    ]
    assert all(row["images_per_s"] > 0 and row["setting"]["threads"] == 1 for row in rows)
    assert rows[0]["ratio"] == 1.0 and all(row["ratio"] > 0 for row in rows)


def test_bench_as_a_table(fewbit: Fewbit, exported: Path) -> None:
    said = fewbit("bench", exported, "--rounds", 2, "--threads", 1)
    assert (said.code, said.err) == (0, "")
    assert "images/s" in said.out and "int8" in said.out


# inspect


def test_inspect_shows_layers_and_with_images_also_noise_and_placement(fewbit: Fewbit, job: Path) -> None:
    plain = fewbit("inspect", job / "tiny.toml", "--json").answer
    assert [layer["kind"] for layer in plain["layers"]].count("Conv") == 3 and plain["placement"] is None
    assert all(layer["sqnr_db"] is None for layer in plain["layers"])
    full = fewbit("inspect", job / "tiny.toml", "--data", job / "images", "--json").answer
    convs = [layer for layer in full["layers"] if layer["kind"] == "Conv"]
    assert all(layer["precision"] == "int8" and layer["sqnr_db"] > 20 for layer in convs)
    assert sum(operator["matrix"] for operator in full["placement"]["operators"]) == 4


def test_inspect_as_a_table(fewbit: Fewbit, job: Path) -> None:
    said = fewbit("inspect", job / "tiny.toml", "--data", job / "images", "--engine", "openvino")
    assert said.code == 0
    assert "SQNR" in said.out and "openvino: " in said.out and "in integers" in said.out
