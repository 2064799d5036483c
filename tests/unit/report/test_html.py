from __future__ import annotations

import base64
import hashlib
import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fewbit.clock import PhaseTime
from fewbit.errors import OutputError
from fewbit.report import html
from fewbit.report.html import render, write_report
from fewbit.report.summary import sentence

made = runpy.run_path(str(Path(__file__).parents[2] / "made_study.py"))
study = made["study"]
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)></template>{{ 7*7 }}&amp;"
VOID = {"meta", "input", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """What a document holds, and whether its elements are nested well."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.texts: dict[str, str] = {}
        self.styles = ""
        self._open: list[str] = []
        self.feed(document)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append(({name: value or "" for name, value in attrs}, ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag] = self.texts.get(tag, "") + data
        if self._open and self._open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        if self._open and self._open[-1] == "style":
            self.styles += data

    def values(self, name: str) -> list[str]:
        return [value for _, found, value in self.attributes if found == name]


def words(text: str) -> str:
    return " ".join(text.replace("\u00a0", " ").split())


def hostile() -> Any:
    """A study in which every text that comes from outside is an attack."""
    record = study(("resnet20", "resnet56"))

    def renamed(trial: Any) -> Any:
        layers = tuple(layer.model_copy(update={"name": HOSTILE, "kind": HOSTILE}) for layer in trial.layers)
        placement = trial.placement and trial.placement.model_copy(
            update={
                "operators": tuple(
                    o.model_copy(update={"name": HOSTILE, "why": HOSTILE, "layers": (HOSTILE,)})
                    for o in trial.placement.operators
                )
            }
        )
        changes = {"layers": layers, "placement": placement, "reason": trial.reason and HOSTILE}
        name = HOSTILE if trial.network == "resnet20" else trial.network
        key = HOSTILE + trial.key
        return trial.model_copy(update={**changes, "network": name, "rung": HOSTILE, "key": key})

    answer = record.answer.model_copy(update={"key": HOSTILE + record.answer.key})
    data = record.data.model_copy(update={"source": HOSTILE})
    return record.model_copy(
        update={
            "trials": tuple(renamed(trial) for trial in record.trials),
            "answer": answer,
            "data": data,
            "command": HOSTILE,
            "notes": (HOSTILE,),
            "host": record.host.model_copy(update={"cpu": HOSTILE}),
            "versions": {"fewbit": HOSTILE},
        }
    )


def cases() -> Iterator[tuple[str, Any]]:
    bare = {"layers": (), "placement": None, "survey": ()}
    yield "one network", study()
    yield "three networks", study(("resnet20", "resnet56", "separable"), ("top1-error<=20%",))
    yield "nothing inside", study(budgets=("top1-drop<=0.1%",))
    yield "two budgets", study(budgets=("top5-error<=3%", "bytes<=2MB"), objective="size")
    yield "no budget", study(budgets=())
    yield "no layers", study(trials=tuple(t.model_copy(update=bare) for t in study().trials))
    yield "only failures", study(trials=(made["ended"]("resnet20")[1],), answer=None)
    yield "no trial", study(trials=(), answer=None)
    yield "hostile", hostile()


@pytest.mark.parametrize(("name", "record"), list(cases()), ids=[name for name, _ in cases()])
def test_every_case_is_sound_and_reaches_for_nothing(name: str, record: Any) -> None:
    page = Page(render(record))
    assert words(page.texts["h1"]) == words(sentence(record))
    assert not page.values("src")
    assert all(link.startswith("#") for link in page.values("href"))
    assert not re.search(r"url\(|@import", page.styles)
    assert not [found for _, found, _ in page.attributes if found.startswith("on")]
    names = page.values("id")
    assert len(names) == len(set(names))
    targets = [link[1:] for link in page.values("href")] + page.values("aria-labelledby")
    assert set(targets) <= set(names)
    assert Counter(page.tags)["h1"] == 1


def test_only_the_packages_scripts_may_run() -> None:
    page = Page(render(study()))
    policy = next(v for tag, name, v in page.attributes if tag == "meta" and "default-src" in v)
    assert "default-src 'none'" in policy
    code = [text for attributes, text in page.scripts if "type" not in attributes]
    assert len(code) == 2
    for text in code:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]
    for attributes, text in page.scripts:
        if "type" in attributes:
            assert attributes["type"] == "application/json"
            json.loads(text)


def test_hostile_names_change_no_element() -> None:
    record = hostile()
    page = Page(render(record))
    tame = record.model_dump_json().replace(json.dumps(HOSTILE)[1:-1], "tame")
    assert Counter(page.tags) == Counter(Page(render(type(record).model_validate_json(tame))).tags)
    assert HOSTILE in page.texts["h1"]
    assert HOSTILE in page.texts["pre"]
    assert "49" not in page.texts["h1"]


def test_report_says_what_was_found_and_how() -> None:
    document = render(study())
    text = words(" ".join(Page(document).texts.values()))
    for said in (
        "Proven at 95 %",
        "12 trials of 1 network in 4 min 12 s: 10 measured, 1 dropped early, 1 failed.",
        "On a CPU fewer than 8 bits buy bytes, not milliseconds",
        "fewbit search resnet20.toml --data images.tar --budget 'top1-drop<=1%' --minutes 5 --seed 7",
        "openvino died with signal 11 (segmentation fault) while it opened the file",
        "11 of 12 operators run in integers on OpenVINO",
        "no integer kernel for this shape",
        "512 images",
        "4be07c19a2f3",
        "2 (dog/0411.jpg, frog/0007.jpg)",
        "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
        "2026.4.1",
        "Wilson",
        "Settings tried: 4",
    ):
        assert said in text, said


def test_a_figure_has_a_label_and_a_table_a_heading_for_each_column() -> None:
    document = render(study())
    labels = re.findall(r'class="plot"[^>]*aria-label="([^"]+)"', document)
    assert len(labels) == 3
    for body in re.findall(r"<thead.*?</thead>.*?<tr.*?</tr>", document, re.S):
        head, _, first = body.partition("</thead>")
        assert head.count("<th") - 1 == first.count("<td") + first.count("<th "), body


def test_panels_are_one_for_each_distinct_network_recipe_and_engine() -> None:
    document = render(study())
    options = re.findall(r'<option value="\d+"( selected)?>([^<]+)</option>', document)
    assert options[0] == (" selected", "resnet20, int8 (percentile ranges), OpenVINO (the answer)")
    assert len({name for _, name in options}) == len(options) == 11


def test_same_study_same_bytes(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_report(study(), tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(study(), tmp_path / "file" / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_report_never_loads_torch_or_an_engine() -> None:
    code = (
        "import sys, fewbit.report.html; "
        "sys.exit(sum(m in sys.modules for m in ('torch', 'onnx', 'onnxruntime', 'openvino')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_texts_and_marks_stand_out_in_both_themes() -> None:
    style = (Path(html.__file__).parent / "style.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part)) for part in style.split("@media screen", 2)[:2]
    )
    assert light.keys() == dark.keys()
    for theme in (light, dark):
        for ground in ("paper", "card", "wash", "accent-wash"):
            for ink in ("ink", "ink-2", "accent"):
                assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
        for place in range(6):
            assert contrast(theme[f"net-{place}"], theme["paper"]) >= 4.5
        assert contrast(theme["ink-3"], theme["card"]) >= 3


def spent(phase: str, seconds: float, stage: str = "trials") -> PhaseTime:
    return PhaseTime(stage=stage, phase=phase, seconds=seconds, cpu_s=0.0, child_cpu_s=0.0, times=1)


def test_report_says_where_the_time_went() -> None:
    assert "Where the time went" not in render(study())
    phases = (
        spent("time", 120.0),
        spent("time", 30.0, "finish"),
        spent("evaluate", 35.0),
        spent("place", 1.0),
    )
    page = render(study(phases=(*phases, spent("<b>", 14.0))))
    listing = page.split("Where the time went")[1].split("</dl>")[0]
    rows = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", listing)
    assert rows == [
        ("Engines at work", "92.5 %"),
        ("timing files on an engine", "2 min 30 s"),
        ("running images on an engine", "35.0 s"),
        ("&lt;b&gt;", "14.0 s"),
        ("All else", "1.0 s"),
    ]
