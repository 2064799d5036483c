"""`fewbit inspect` as a doctor, on a tiny network that labelled its images itself."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from command import Fewbit
from fewbit.cli.main import main
from fewbit.doctor.records import Diagnosis
from fewbit.engines.placement_cost import PlacementCost
from fewbit.recipe import Recipe, read_recipe


@pytest.fixture(scope="session")
def clipping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that cuts off far too much."""
    path = tmp_path_factory.mktemp("recipe") / "clipping.toml"
    recipe = read_recipe("int8-percentile")
    steps = (*recipe.steps[:-1], {**recipe.steps[-1], "activation_options": {"percentile": 70.0}})
    path.write_text(recipe.model_copy(update={"name": "clipping", "steps": steps}).to_toml())
    return path


def test_a_finding_is_told_with_its_remedy_and_gain_before_the_table(
    fewbit: Fewbit, job: Path, clipping: Path
) -> None:
    said = fewbit("inspect", job / "tiny.toml", "--data", job / "images", "--recipe", clipping)
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[0].startswith("tiny, float: top-1 90.7 % [") and "on 86 images" in lines[0]
    assert lines[1].startswith("tiny in clipping, calibrated on 64 other images: top-1 ")
    first = next(line for line in lines if line.startswith("1. "))
    assert first.startswith("1. clipped tail in ")
    measured = next(line for line in lines if line.startswith("   measured: "))
    assert "values beyond the grid's ends" in measured and "share of the noise that is theirs" in measured
    helps = next(line for line in lines if line.startswith("   helps: Min-max ranges of activations: "))
    assert helps.endswith("on 86 images.") and "float labels kept" in helps
    table = next(place for place, line in enumerate(lines) if line.strip().startswith("layer "))
    assert lines.index(first) < lines.index(helps) < table
    placed = next(line for line in lines if line.startswith("onnxruntime: "))
    assert "in integers" in placed and lines.index(placed) > table
    assert any(line.startswith("One call on ONNX Runtime, batch 1, 1 thread takes ") for line in lines)
    assert lines[-1].startswith("The other ")


def test_the_json_carries_the_whole_diagnosis(fewbit: Fewbit, job: Path, clipping: Path) -> None:
    said = fewbit("inspect", job / "tiny.toml", "--data", job / "images", "--recipe", clipping, "--json")
    assert said.err == ""
    diagnosis = Diagnosis.from_data(said.answer)
    assert diagnosis.model_dump(mode="json") == said.answer
    assert (diagnosis.network, diagnosis.images, diagnosis.calibration_images) == ("tiny", 86, 64)
    finding = diagnosis.findings[0]
    assert finding.cause == "clipped_tail" and finding.remedies[0].helps
    assert finding.remedies[0].before == diagnosis.quality
    assert diagnosis.layers[0].name == "input" and diagnosis.placement is not None
    assert diagnosis.cost is not None and diagnosis.cost.setting.engine == "onnxruntime"


def test_a_healthy_network_has_nothing_to_mend(fewbit: Fewbit, job: Path) -> None:
    said = fewbit("inspect", job / "tiny.toml", "--data", job / "images", "--engine", "openvino")
    assert said.code == 0 and "Nothing to mend: no cause that was looked for costs accuracy." in said.out


def test_the_repaired_recipe_is_written_and_does_what_was_promised(
    fewbit: Fewbit, job: Path, clipping: Path, tmp_path: Path
) -> None:
    path = tmp_path / "repaired.toml"
    common = ("inspect", job / "tiny.toml", "--data", job / "images", "--json", "--recipe")
    sick = fewbit(*common, clipping, "--repair", path)
    recipe = Recipe.from_toml(path.read_text(encoding="utf-8"))
    assert recipe.name == "clipping-repaired" and recipe.steps[-1]["activations"] == "minmax"
    well = fewbit(*common, path)
    assert well.answer["findings"] == []
    promised = (sick.answer["together"] or sick.answer["findings"][0]["remedies"][0])["after"]["kl"]
    assert well.answer["quality"]["kl"] == pytest.approx(promised, rel=1e-6)


def test_nothing_to_repair_writes_nothing(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    path = tmp_path / "repaired.toml"
    said = fewbit("inspect", job / "tiny.toml", "--data", job / "images", "--repair", path)
    assert said.code == 0
    assert said.err.endswith(f"{path} was not written: no remedy that was tried helps\n")
    assert list(tmp_path.iterdir()) == []


def test_the_page_is_written(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    data = ("--data", job / "images")
    said = fewbit("inspect", job / "tiny.toml", *data, "--html", path, "--seed", 3)
    assert said.out.rstrip().endswith(f"written: {path}")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and "Nothing to mend" in text
    assert f"fewbit inspect {job / 'tiny.toml'} --data {job / 'images'} --recipe int8" in text


def test_the_study_of_calibrating_images(fewbit: Fewbit, job: Path) -> None:
    common = ("inspect", job / "tiny.toml", "--data", job / "images", "--study", 2)
    answer = fewbit(*common, "--json").answer["study"]
    assert [point["images"] for point in answer["points"]] == [1, 2, 4, 8, 16, 32, 64]
    assert answer["images"] == 86 and answer["pool"] == 64 and answer["seeds"] == [0, 1]
    assert answer["enough"] in [point["images"] for point in answer["points"]] and answer["noise"] >= 0.005
    said = fewbit(*common)
    assert "calibrating images" in said.out
    assert "2 seeds, judged on 86 images (torch, every tensor rounded as the file will be)" in said.out


def test_a_wrong_preprocessing_is_the_first_thing_told(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    card = tmp_path / "wrong.toml"
    text = (job / "tiny.toml").read_text().replace('"tiny.py:tiny"', f'"{job}/tiny.py:tiny"')
    text = text.replace('"tiny.safetensors"', f'"{job}/tiny.safetensors"')
    card.write_text(text.replace("[input]", "[input]\nscale = 1.0"))
    said = fewbit("inspect", card, "--data", job / "images")
    assert "1. wrong preprocessing in input" in said.out and "helps: " in said.out
    assert "repair the preprocessing first; what rounding costs was not looked into" in said.out


@pytest.fixture(scope="module")
def made(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is quantized for OpenVINO."""
    path = tmp_path_factory.mktemp("made") / "tiny.onnx"
    given = ["--data", str(job / "images"), "--engine", "openvino", "--out", str(path)]
    assert main(["quantize", str(job / "tiny.toml"), *given, "--calibration-images", "8"]) == 0
    return path


def test_a_quantized_file_is_profiled_on_the_engine_it_was_made_for(fewbit: Fewbit, made: Path) -> None:
    said = fewbit("inspect", made, "--batch", 4)
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0].startswith("openvino: ") and "in integers" in lines[0]
    assert lines[1].startswith("One call on OpenVINO, batch 4, 1 thread takes ")
    assert "input conversion" in said.out and "uint8 pixels in" in said.out
    assert lines[-1].startswith("The other ")


def test_a_quantized_file_as_json_on_another_engine(fewbit: Fewbit, made: Path) -> None:
    answer = fewbit("inspect", made, "--engine", "onnxruntime", "--json").answer
    cost = PlacementCost.from_data(answer["cost"])
    assert answer["file"] == "tiny.onnx" and answer["placement"]["engine"] == "onnxruntime"
    assert cost.setting.engine == "onnxruntime" and cost.integers
    assert sum(f.ms for f in cost.findings) + cost.rest_ms == pytest.approx(cost.ms)


def test_a_quantized_file_is_no_card(fewbit: Fewbit, job: Path, made: Path) -> None:
    said = fewbit("inspect", made, "--data", job / "images", "--classes", 4)
    assert said.code == 2 and "is quantized already, by fewbit with recipe 'int8' for openvino" in said.err


def test_without_images_it_says_how_to_get_more(fewbit: Fewbit, job: Path) -> None:
    said = fewbit("inspect", job / "tiny.toml")
    assert (said.code, said.err) == (0, "")
    assert said.out.rstrip().endswith(
        "give --data to see what rounding costs each layer, why, and what helps"
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--html", "a.html"), "fewbit: --html needs images to measure with; give --data"),
        (("--study", 2), "fewbit: --study needs images to measure with; give --data"),
        (("--repair", "a.toml"), "fewbit: --repair needs images to measure with; give --data"),
        (("--data", "x", "--html", "a.txt"), "fewbit: --html names 'a.txt'; give a .html file"),
        (("--data", "x", "--repair", "a.json"), "fewbit: --repair names 'a.json'; give a .toml file"),
        (("--study", 0), "fewbit inspect: Invalid value for '--study': 0 is not in the range x>=1."),
    ],
)
def test_options_that_do_not_go_together(
    fewbit: Fewbit, job: Path, options: tuple[object, ...], line: str
) -> None:
    said = fewbit("inspect", job / "tiny.toml", *options)
    assert said.code == 2 and said.line.startswith(line)


def test_one_image_is_too_few(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    source = next((job / "images").rglob("*.png"))
    for name in range(6):
        (tmp_path / "images" / f"c{name}").mkdir(parents=True)
    (tmp_path / "images" / "c0" / "a.png").write_bytes(source.read_bytes())
    said = fewbit("inspect", job / "tiny.toml", "--data", tmp_path / "images")
    assert (said.code, said.line) == (
        2,
        f"fewbit: {tmp_path / 'images'}: has 1 image that can be decoded; give two or more",
    )


@pytest.mark.parametrize("command", ["inspect", "quantize", "search"])
def test_a_file_that_fewbit_quantized_is_said_to_be_quantized(
    fewbit: Fewbit, job: Path, exported: Path, tmp_path: Path, command: str
) -> None:
    more: tuple[object, ...] = ("--data", job / "images")
    more += {"quantize": ("--out", tmp_path / "a.onnx"), "search": ("--budget", "top1-drop<=1%")}.get(
        command, ()
    )
    said = fewbit(command, exported, *more)
    assert (said.code, said.out) == (2, "")
    assert said.line == (
        f"fewbit: {exported}: is quantized already, by fewbit with recipe 'int8' for onnxruntime; give the "
        "card or the float32 file that it was made from; `fewbit eval` and `fewbit bench` run it as it is"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_program_quantized(
    fewbit: Fewbit, job: Path, exported: Path, tmp_path: Path
) -> None:
    model = onnx.load(exported)
    del model.metadata_props[:]
    path = tmp_path / "theirs.onnx"
    onnx.save(model, path)
    said = fewbit("inspect", path, "--data", job / "images")
    assert (
        said.code == 2
        and f"fewbit: {path}: is quantized already (operator QuantizeLinear, node '" in said.line
    )
    assert said.line.endswith("with --card, `fewbit eval` and `fewbit bench` run it as it is")
