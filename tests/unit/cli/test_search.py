from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from command import Fewbit
from fewbit.cli.main import main

SHORT = ("--trials", "2", "--minutes", "0.2", "--batch", "1,4", "--engines", "onnxruntime")


def arguments(job: Path, *more: object, card: str = "tiny.toml", budget: str = "top1-drop<=5%") -> list[str]:
    given = ["search", job / card, "--data", job / "images", "--budget", budget, *SHORT, *more]
    return [str(word) for word in given]


@pytest.fixture(scope="module")
def found(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that found something."""
    out = tmp_path_factory.mktemp("study") / "found"
    assert main(arguments(job, "--out", out)) == 0
    return out


def test_it_leaves_the_file_its_recipe_and_the_report(found: Path) -> None:
    left = {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()}
    best = {"best/model.onnx", "best/recipe.toml", "best/result.json"}
    assert left >= {"report.html", "pareto.json", "study.db", *best}
    onnx.checker.check_model(onnx.load(found / "best" / "model.onnx"), full_check=True)
    assert json.loads((found / "best" / "result.json").read_text())["found"] is True
    assert "<html" in (found / "report.html").read_text()


def test_it_says_the_answer_in_one_sentence(fewbit: Fewbit, found: Path) -> None:
    said = fewbit("report", found)
    sentence, report = said.out.splitlines()
    assert said.code == 0 and sentence.startswith("tiny in ") and "inside top1-drop<=5%" in sentence
    assert report == f"report: {found / 'report.html'}"


def test_the_answer_as_json_is_that_of_the_file(fewbit: Fewbit, found: Path) -> None:
    said = fewbit("report", found, "--json")
    assert said.err == "" and said.answer == json.loads((found / "best" / "result.json").read_text())
    assert said.answer["network"] == "tiny" and said.answer["budgets"][0]["met"] is True


def test_resumed_at_its_end_it_gives_the_same_answer(fewbit: Fewbit, job: Path, found: Path) -> None:
    before = fewbit("report", found, "--json").answer
    said = fewbit(*arguments(job, "--resume", found, "--json"))
    assert said.code == 0
    assert (said.answer["key"], said.answer["recipe"]) == (before["key"], before["recipe"])


def test_without_resume_a_study_is_not_written_over(fewbit: Fewbit, job: Path, found: Path) -> None:
    said = fewbit(*arguments(job, "--out", found))
    assert said.code == 2 and "--resume" in said.line and str(found) in said.line


def test_a_study_of_another_network_or_other_images_is_told(
    fewbit: Fewbit, job: Path, found: Path, tmp_path: Path
) -> None:
    before = (found / "study.db").read_bytes()
    said = fewbit(*arguments(job, "--resume", found, card="other.toml"))
    assert said.code == 2 and "other" in said.line and str(found) in said.line
    (tmp_path / "images").mkdir()
    for folder in sorted((job / "images").iterdir()):
        copies = tmp_path / "images" / folder.name
        copies.mkdir()
        for path in sorted(folder.iterdir())[:10]:
            (copies / path.name).write_bytes(path.read_bytes())
    said = fewbit(
        *("search", job / "tiny.toml", "--data", tmp_path / "images", "--budget", "top1-drop<=5%", *SHORT),
        *("--resume", found),
    )
    assert said.code == 2 and "images" in said.line and str(found) in said.line
    assert (found / "study.db").read_bytes() == before


def test_a_budget_nobody_meets_exits_3_with_the_nearest_kept(
    fewbit: Fewbit, job: Path, tmp_path: Path
) -> None:
    said = fewbit(*arguments(job, "--out", tmp_path / "out", "--json", budget="top1-error<=0.1%"))
    assert said.code == 3
    assert said.answer["found"] is False and "would be met by" in said.answer["sentence"]
    assert (tmp_path / "out" / "best" / "model.onnx").is_file()
    assert "would be met by" in (tmp_path / "out" / "report.html").read_text()
    assert fewbit("report", tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            ("--engines", "onnxruntim"),
            "--engines names 'onnxruntim' (did you mean 'onnxruntime'?); allowed are onn",
        ),
        (("--engines", ","), "--engines is empty; give one or more of onnxruntime, openvino"),
        (("--batch", "0"), "fewbit search: Invalid value for '--batch': '0' has 0; each must be 1 or more"),
        (("--threads", "0"), "search: threads is 0; give a number above 0"),
        (("--minutes", "0"), "search: minutes is 0.0; give a number above 0"),
        (("--trials", "-1"), "search: trials is -1; give a number above 0"),
        (("--calibration-images", "0"), "search: calibration images is 0; give a number above 0"),
        (("--confidence", "1.5"), "search: confidence is 1.5; give 0.5 up to, not including, 1"),
        (("--objective", "speed"), "fewbit search: Invalid value for '--objective': 'speed' is not one of"),
        (
            ("--calibration", "nowhere"),
            "nowhere: there are no images at this path; give a folder, tar or zip",
        ),
        (("--classes", "6"), "tiny.toml: is a card, so --classes has no place beside it"),
    ],
)
def test_what_is_wrong_with_an_option_is_one_line(
    fewbit: Fewbit, job: Path, tmp_path: Path, more: tuple[str, str], line: str
) -> None:
    said = fewbit(*arguments(job, "--out", tmp_path / "out", *more))
    assert (said.code, said.out) == (2, "") and line in said.line
    assert not list(tmp_path.rglob("*.onnx")) and not list(tmp_path.rglob("*.html"))


def test_the_same_card_twice_is_told(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    said = fewbit("search", job / "tiny.toml", *arguments(job, "--out", tmp_path / "out")[1:])
    assert said.code == 2
    assert "search: two cards are named 'tiny'; give each network a name of its own" in said.line


def test_the_demo_needs_images_of_every_class(fewbit: Fewbit, tmp_path: Path) -> None:
    said = fewbit("demo", "--out", tmp_path / "demo", "--images", "5")
    assert said.code == 2 and "Invalid value for '--images': 5 is not in the range x>=1000" in said.line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_finds_a_network(fewbit: Fewbit, tmp_path: Path) -> None:
    said = fewbit("demo", "--out", tmp_path / "demo", "--images", "1000", "--json")
    assert said.code in (0, 3) and said.answer["network"].startswith("demo")
    assert said.err.startswith("making 1000 images of 100 classes: ")
    assert (tmp_path / "demo" / "report.html").is_file()


def test_resume_and_another_out_are_refused(fewbit: Fewbit, job: Path, found: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    said = fewbit(*arguments(job, "--resume", found, "--out", other))
    assert said.code == 2
    assert said.line == (
        f"fewbit: --resume {found} writes into that folder, so --out {other} has no place beside it"
    )


def test_resuming_where_nothing_is_says_so(fewbit: Fewbit, job: Path, tmp_path: Path) -> None:
    said = fewbit(*arguments(job, "--resume", tmp_path / "new", "--trials", "1", "--budget", "bytes<=1GB"))
    assert said.err.startswith(
        f"fewbit: {tmp_path / 'new'}: has no study to go on with; a new one begins there"
    )
