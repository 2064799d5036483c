from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fewbit.doctor.records import Diagnosis
from fewbit.errors import OutputError
from fewbit.report.doctor import (
    quality_in_words,
    remedy_in_words,
    render_diagnosis,
    sentence_of,
    write_diagnosis,
)

HERE = Path(__file__)
made = runpy.run_path(str(HERE.parents[2] / "made_diagnosis.py"))
page_of = runpy.run_path(str(HERE.with_name("test_html.py")))
HOSTILE = page_of["HOSTILE"]


def parsed(diagnosis: Diagnosis, command: str = "fewbit inspect x") -> Any:
    return page_of["Page"](render_diagnosis(diagnosis, command))


def texts(page: Any) -> str:
    return page_of["words"](page.texts["body"])


def test_the_page_says_the_findings_first_with_their_gains() -> None:
    page = parsed(made["diagnosis"]())
    text = texts(page)
    assert "2 findings" in text and "depthwise range spread stage2.0.conv and 2 more" in text
    assert re.search(r"largest over smallest channel range\s*246x", text) and "68.8 %" in text
    assert re.search(
        r"helps a scale a channel for weights tried on 512 images\s*top-1\s*10.0 % → 80.1 %", text
    )
    assert re.search(r"does not help equalize .*float labels kept\s*12.0 % → 11.0 %", text)
    assert "Rounding these layers alone costs 2.9 nats." in text and "alone costs 0.4 nats" in text
    assert "No remedy that fewbit has fits." in text  # the second finding
    assert (
        "All remedies together" in text and 'name = "int8-per-tensor-repaired"' in text and "a note" in text
    )
    assert text.index("depthwise range spread stage2") < text.index("Layer by layer")


def test_every_layer_is_a_row_with_the_ends_of_its_grids() -> None:
    diagnosis = made["diagnosis"]()
    document = render_diagnosis(diagnosis)
    rows = re.findall(r'<tr data-key="([^"]+)" data-layer="([^"]+)"( data-shown="1")?>', document)
    assert [name for name, *_ in rows] == [layer.name for layer in diagnosis.layers]
    assert [name for name, _, shown in rows if shown] == ["stage2.0.conv"]
    drawn = {name: json.loads(data.replace("&#34;", '"')) for name, data, _ in rows}
    assert drawn["stage1.0.conv"]["weight_ends"] == [-0.5, 0.5] and len(drawn["stage1.0.conv"]["ends"]) == 2
    assert document.count('class="end"') == 2 * sum(
        one.weights is not None for one in diagnosis.layers
    ) + 2 * sum(one.activations is not None and one.low is not None for one in diagnosis.layers)


def test_a_healthy_network_has_nothing_to_mend() -> None:
    page = parsed(made["healthy"](), "")
    text = texts(page)
    assert "Nothing to mend" in text and "none of the causes looked for costs it accuracy" in text
    assert "None: the quantized network stays close to the float one." in text
    assert "To repeat it" not in text and "Accuracy against calibrating images" not in text


def test_the_study_has_its_figure_and_its_table() -> None:
    text = texts(parsed(made["diagnosis"]()))
    assert "calibrated on 1 to 1024 of 1024 images, 3 choices of each number, judged on 512 images" in text
    study = made["study"]()
    assert f"From {study.enough()} images on" in text
    assert "torch, every tensor rounded as the file will be" in text


def test_sentences() -> None:
    diagnosis = made["diagnosis"]()
    assert sentence_of(diagnosis) == (
        "resnet20 in int8 (per tensor) keeps 12.0 % of its float labels: depthwise range spread in "
        "stage2.0.conv and 2 more layers. A scale a channel for weights: float labels kept 12.0 % to 96.0 %, "
        "top-1 10.0 % to 80.1 % on 512 images."
    )
    lone = diagnosis.model_copy(update={"findings": diagnosis.findings[1:]})
    assert sentence_of(lone).endswith("clipped tail in stage3.0.conv. No remedy that was tried helps.")
    best = diagnosis.findings[0].remedies[0]
    plain = best.model_copy(update={"before": best.before.of_float(), "after": best.after.of_float()})
    assert remedy_in_words(plain) == "A scale a channel for weights: top-1 10.0 % to 80.1 % on 512 images."
    assert quality_in_words(diagnosis.quality).startswith(
        "top-1 10.0 %, 12.0 % of the float labels kept, div"
    )
    assert quality_in_words(diagnosis.quality.of_float()) == "top-1 10.0 %"


def hostile() -> Diagnosis:
    """Return a diagnosis in which every text that comes from outside is an attack."""
    diagnosis = made["diagnosis"]()
    layers = tuple(one.model_copy(update={"name": HOSTILE, "kind": HOSTILE}) for one in diagnosis.layers)
    remedies = tuple(
        one.model_copy(update={"action": HOSTILE, "change": HOSTILE})
        for one in diagnosis.findings[0].remedies
    )
    facts = tuple(one.model_copy(update={"name": HOSTILE}) for one in diagnosis.findings[0].evidence)
    update = {
        "layer": HOSTILE,
        "others": (HOSTILE,),
        "reason": HOSTILE,
        "remedies": remedies,
        "evidence": facts,
    }
    findings = (diagnosis.findings[0].model_copy(update=update),)
    return diagnosis.model_copy(
        update={
            "network": HOSTILE, "recipe": HOSTILE, "layers": layers, "findings": findings,
            "notes": (HOSTILE,), "repaired": HOSTILE,
        }
    )  # fmt: skip


@pytest.mark.parametrize("diagnosis", [made["diagnosis"](), made["healthy"](), hostile()], ids=str)
def test_the_page_holds_all_it_needs_and_runs_only_its_own_scripts(diagnosis: Diagnosis) -> None:
    page = parsed(diagnosis, HOSTILE)
    assert not {"img", "link", "iframe", "object"} & set(page.tags)
    running = [attributes for attributes, _ in page.scripts if attributes.get("type") != "application/json"]
    assert running == [{}, {}]
    assert all(value.startswith("#") for value in page.values("href"))
    assert page.values("src") == [] and not [name for _, name, _ in page.attributes if name.startswith("on")]
    policy = next(value for value in page.values("content") if "default-src" in value)
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2
    for attributes, text in page.scripts:
        if attributes.get("type") == "application/json":
            json.loads(text)


def test_the_report_needs_no_torch() -> None:
    code = (
        "import sys, fewbit.report.doctor\n"
        "sys.exit(3 if {'torch', 'onnxruntime', 'openvino'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_it_is_written_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_diagnosis(made["healthy"](), path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"page\.html: cannot be written"):
        write_diagnosis(made["healthy"](), tmp_path / "file" / "page.html")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "page.html"]
