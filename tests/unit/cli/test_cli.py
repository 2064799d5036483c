from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click
import onnx
import pytest

from command import Fewbit
from fewbit import __version__
from fewbit.cli.main import COMMANDS
from fewbit.cli.options import Numbers
from fewbit.engines.process import EngineProcess
from fewbit.errors import EngineCrashed
from fewbit.measure.accuracy import Accuracy
from fewbit.recipe import shipped_recipes
from fewbit.registry import ROWS

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
