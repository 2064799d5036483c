"""The page of a diagnosis in a real browser: no error, no request; rows and bars find each other."""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewbit.report.doctor import sentence_of, write_diagnosis

HERE = Path(__file__).parent
made = runpy.run_path(str(HERE.parent / "made_diagnosis.py"))
driver = runpy.run_path(str(HERE / "browser.py"))
HOSTILE = "<script>document.title='owned'</script>\"><img src=x onerror=\"document.title='owned'\">"
VIEWS = [
    pytest.param(1280, 900, False, False, id="desktop-light"),
    pytest.param(1280, 900, True, False, id="desktop-dark"),
    pytest.param(390, 844, False, True, id="phone-light"),
    pytest.param(390, 844, True, True, id="phone-dark"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program = driver["find_chromium"]()
    if program is None:
        why = "no Chromium here: install it (apt-get install chromium) to look at the page"
        if os.environ.get("CI") == "true":
            pytest.fail(why, pytrace=False)
        pytest.skip(why)
    with driver["Browser"](program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    folder = tmp_path_factory.mktemp("pages")
    sick = made["diagnosis"]()
    attacked = tuple(layer.model_copy(update={"name": HOSTILE + layer.name}) for layer in sick.layers)
    first = sick.findings[0].model_copy(update={"layer": HOSTILE + sick.findings[0].layer, "reason": HOSTILE})
    hostile = sick.model_copy(update={"network": HOSTILE, "layers": attacked, "findings": (first,)})
    records = {"sick": sick, "well": made["healthy"](), "hostile": hostile}
    for name, record in records.items():
        write_diagnosis(record, folder / f"{name}.html", "fewbit inspect resnet20.toml")
    return {name: (folder / f"{name}.html", record) for name, record in records.items()}


def quiet(browser: Any, path: Path) -> None:
    assert browser.troubles == []
    assert browser.requests == [path.as_uri()]


@pytest.mark.parametrize("name", ["sick", "well", "hostile"])
@pytest.mark.parametrize(("width", "height", "dark", "phone"), VIEWS)
def test_the_page_is_quiet_and_fits(
    browser: Any, pages: Any, name: str, width: int, height: int, dark: bool, phone: bool
) -> None:
    path, record = pages[name]
    browser.open(path, width, height, dark, phone)
    quiet(browser, path)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelector('h1').textContent") == sentence_of(record)
    assert browser.evaluate("[...document.querySelectorAll('.plot')].every(p => p.querySelector('svg'))")
    shade = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert shade == ("rgb(21, 23, 27)" if dark else "rgb(253, 253, 252)")
    assert browser.evaluate("document.title").startswith("fewbit inspect")


def test_the_worst_layer_is_shown_with_the_ends_of_its_grids(browser: Any, pages: Any) -> None:
    path, _ = pages["sick"]
    browser.open(path, 1280, 900)
    assert browser.evaluate("document.getElementById('layer-name').textContent") == "stage2.0.conv"
    shapes = "document.getElementById('layer-plot').layout.shapes.map(shape => [shape.xref, shape.x0])"
    (weights, low), (_, high), *output = browser.evaluate(shapes)
    assert (weights, low, high) == ("x", -0.5, 0.5) and [axis for axis, _ in output] == ["x2", "x2"]
    quiet(browser, path)


def test_a_click_on_a_bar_chooses_its_layer(browser: Any, pages: Any) -> None:
    path, _ = pages["sick"]
    browser.open(path, 1280, 900)
    spot = browser.evaluate(
        """(() => { document.getElementById('noise').scrollIntoView({behavior: 'instant'});
        const bar = document.querySelector('#plot-noise .barlayer .trace').querySelectorAll('.point')[5];
        const box = bar.getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2]; })()"""
    )
    x, y = spot
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        browser.evaluate("new Promise(done => setTimeout(done, 250))")
    named = browser.evaluate("document.getElementById('plot-noise').data[0].customdata[5]")
    assert browser.evaluate("document.getElementById('layer-name').textContent") == named
    quiet(browser, path)


def test_layers_sort_by_sensitivity(browser: Any, pages: Any) -> None:
    path, record = pages["sick"]
    browser.open(path, 1280, 900)
    head = "[...document.querySelectorAll('#panel thead button')].find(b => b.textContent === 'Sensitivity')"
    browser.evaluate(f"{head}.click()")
    order = browser.evaluate(
        "[...document.querySelectorAll('#panel .layer-table tbody tr')].map(r => r.dataset.key)"
    )
    known = {layer.name: layer.kl or 0.0 for layer in record.layers}
    assert [known[name] for name in order] == sorted(known.values(), reverse=True)
