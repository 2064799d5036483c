"""The report in a real browser: no error, no request, no sideways scroll; it sorts, filters and prints."""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewbit.report.html import write_report
from fewbit.report.summary import sentence

HERE = Path(__file__).parent
made = runpy.run_path(str(HERE.parent / "made_study.py"))
driver = runpy.run_path(str(HERE / "browser.py"))
study = made["study"]
HOSTILE = "<script>document.title='owned'</script>\"><img src=x onerror=\"document.title='owned'\">"
VIEWS = [
    pytest.param(1280, 900, False, False, id="desktop-light"),
    pytest.param(1280, 900, True, False, id="desktop-dark"),
    pytest.param(390, 844, False, True, id="phone-light"),
    pytest.param(390, 844, True, True, id="phone-dark"),
    pytest.param(360, 740, False, True, id="small-phone"),
]
COLUMN = """(title => {
  const heads = [...document.querySelectorAll('#trials thead th')];
  const place = heads.findIndex(head => head.textContent.trim() === title);
  return [...document.querySelectorAll('#trials tbody tr')].map(row => row.cells[place].dataset.sort);
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program = driver["find_chromium"]()
    if program is None:
        why = "no Chromium here: install it (apt-get install chromium) to look at the report"
        if os.environ.get("CI") == "true":
            pytest.fail(why, pytrace=False)
        pytest.skip(why)
    with driver["Browser"](program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def renamed(record: Any) -> Any:
    """Name one network, its layers and its reasons so that a careless page would run code."""

    def attack(trial: Any) -> Any:
        layers = tuple(layer.model_copy(update={"name": HOSTILE + layer.name}) for layer in trial.layers)
        changes = {"network": HOSTILE, "layers": layers, "reason": trial.reason and HOSTILE}
        return trial.model_copy(update=changes) if trial.network == "resnet20" else trial

    return record.model_copy(update={"trials": tuple(attack(trial) for trial in record.trials)})


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    folder = tmp_path_factory.mktemp("reports")
    records = {
        "several": study(("resnet20", "resnet56", "separable"), ("top1-error<=20%",)),
        "hostile": renamed(study(("resnet20", "resnet56"))),
        "nearest": study(budgets=("top1-drop<=0.1%",)),
        "empty": study(trials=(), answer=None),
    }
    for name, record in records.items():
        write_report(record, folder / f"{name}.html")
    return {name: (folder / f"{name}.html", record) for name, record in records.items()}


def quiet(browser: Any, path: Path) -> None:
    assert browser.troubles == []
    assert browser.requests == [path.as_uri()]


@pytest.mark.parametrize(("width", "height", "dark", "phone"), VIEWS)
def test_page_is_quiet_and_fits(
    browser: Any, reports: Any, width: int, height: int, dark: bool, phone: bool
) -> None:
    check(browser, *reports["several"], width, height, dark, phone)


@pytest.mark.parametrize("name", ["hostile", "nearest", "empty"])
def test_other_answers_are_quiet_and_fit_a_small_phone(browser: Any, reports: Any, name: str) -> None:
    check(browser, *reports[name], 360, 740, True, True)


def check(browser: Any, path: Path, record: Any, width: int, height: int, dark: bool, phone: bool) -> None:
    browser.open(path, width, height, dark, phone)
    quiet(browser, path)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    heading = browser.evaluate("document.querySelector('h1').textContent").replace("\u00a0", " ")
    assert heading == sentence(record)
    shade = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert shade == ("rgb(21, 23, 27)" if dark else "rgb(253, 253, 252)")
    drawn = browser.evaluate("[...document.querySelectorAll('.plot')].every(p => p.querySelector('svg'))")
    assert drawn
    assert browser.evaluate("document.title").startswith("fewbit")


def test_every_trial_is_a_point_and_the_theme_colours_it(browser: Any, reports: Any) -> None:
    path, record = reports["several"]
    browser.open(path, 1280, 900)
    count = "document.querySelectorAll('#plot-speed .scatterlayer .point').length"
    browser.evaluate("document.querySelector('#speed [data-range]').click()")
    shown = sum(t.accuracy is not None and t.timing is not None for t in record.trials)
    assert browser.evaluate(count) == shown + 1  # the ring around the answer
    colour = "getComputedStyle(document.querySelector('#plot-speed .xtick text')).fill"
    light = browser.evaluate(colour)
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.call("Emulation.setEmulatedMedia", features=[scheme])
    browser.evaluate("new Promise(done => setTimeout(done, 300))")
    assert browser.evaluate(colour) != light
    quiet(browser, path)


def test_columns_sort_by_keyboard(browser: Any, reports: Any) -> None:
    browser.open(reports["several"][0], 1280, 900)
    head = "[...document.querySelectorAll('#trials thead button')].find(b => b.textContent === 'Speed')"
    browser.evaluate(f"{head}.focus()")
    for wanted in ("descending", "ascending"):
        browser.press("Enter", 13)
        assert browser.evaluate(f"{head}.closest('th').getAttribute('aria-sort')") == wanted
        values = [float(value) for value in browser.evaluate(f"{COLUMN}('Speed')")]
        assert values == sorted(values, reverse=wanted == "descending")
    others = browser.evaluate("document.querySelectorAll('#trials th[aria-sort=ascending]').length")
    assert others == 1


def test_rows_are_filtered_and_counted(browser: Any, reports: Any) -> None:
    path, record = reports["several"]
    browser.open(path, 1280, 900)
    rows = "[...document.querySelectorAll('#trials tbody tr:not([hidden])')].map(r => r.dataset.key)"
    measured = [t for t in record.trials if t.state == "measured"]
    browser.evaluate("document.querySelector('#filter [name=text]').focus()")
    browser.call("Input.insertText", text="mse OPENVINO")
    assert sorted(browser.evaluate(rows)) == sorted(t.key for t in measured if t.recipe == "int8-mse")
    assert browser.evaluate("document.querySelector('#count').textContent") == f"3 of {len(measured)}"
    browser.evaluate("document.querySelector('#filter').reset()")
    browser.evaluate("document.querySelector('#filter [name=network]').value = 'resnet56'")
    browser.evaluate("document.querySelector('#filter [name=front]').click()")
    kept = browser.evaluate(rows)
    assert kept
    assert all(key.startswith("resnet56-") for key in kept)
    assert len(kept) < sum(t.network == "resnet56" for t in measured)


def test_a_layer_is_chosen_by_key_or_click_and_its_histograms_shown(browser: Any, reports: Any) -> None:
    path, _ = reports["several"]
    browser.open(path, 1280, 900)
    bars = "document.getElementById('layer-plot').data.map(trace => trace.y.length)"
    assert browser.evaluate(bars) == [64, 64]
    name = "document.getElementById('layer-name').textContent"
    assert browser.evaluate(name) == "stage1.0.conv"
    browser.evaluate("document.querySelectorAll('#panel button.layer')[2].focus()")
    browser.press("Enter", 13)
    assert browser.evaluate(name) == "stage1.2.add"
    assert browser.evaluate(bars) == [0, 64]
    pressed = "[...document.querySelectorAll('#panel button.layer')].map(b => b.ariaPressed).indexOf('true')"
    assert browser.evaluate(pressed) == 2
    choose = """(() => { const select = document.getElementById('panel-of');
      select.value = [...select.options].find(o => o.text.includes('resnet56, int8 (MSE')).value;
      select.dispatchEvent(new Event('change', {bubbles: true})); })()"""
    browser.evaluate(choose)
    assert browser.evaluate("document.querySelectorAll('#panel .layer-table tbody tr').length") == 24
    quiet(browser, path)


def test_a_trial_without_layers_shows_its_placement_only(browser: Any, reports: Any) -> None:
    path, _ = reports["several"]
    browser.open(path, 1280, 900)
    browser.evaluate(
        """(() => { const select = document.getElementById('panel-of');
        select.value = [...select.options].find(o => o.text.includes('float32')).value;
        select.dispatchEvent(new Event('change', {bubbles: true})); })()"""
    )
    assert "No layer of this trial was recorded" in browser.evaluate(
        "document.getElementById('panel').textContent"
    )
    assert browser.evaluate("document.querySelector('.layers aside').offsetHeight") == 0
    quiet(browser, path)


def test_a_click_on_a_point_finds_its_row(browser: Any, reports: Any) -> None:
    browser.open(reports["nearest"][0], 1280, 900)
    spot = browser.evaluate(
        """(() => { document.getElementById('speed').scrollIntoView({behavior: 'instant'});
        const trace = document.querySelectorAll('#plot-speed .scatterlayer .trace')[2];
        const box = trace.querySelector('.point').getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2]; })()"""
    )
    x, y = spot
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        browser.evaluate("new Promise(done => setTimeout(done, 250))")
    hover = browser.evaluate("document.querySelector('#plot-speed .hoverlayer').textContent")
    assert "resnet20: " in hover
    assert "images/s" in hover
    found = browser.evaluate("[...document.querySelectorAll('#trials tr.found')].map(row => row.dataset.key)")
    assert len(found) == 1


def test_legend_hides_a_trace_and_all_shows_the_outliers(browser: Any, reports: Any) -> None:
    browser.open(reports["nearest"][0], 1280, 900)
    low = "document.getElementById('plot-speed')._fullLayout.yaxis.range[0]"
    assert browser.evaluate(low) > 0.7
    browser.evaluate("document.querySelector('#speed [data-range]').click()")
    assert browser.evaluate(low) < 0.2
    browser.evaluate("document.querySelector('#speed [data-trace=\"2\"]').click()")
    assert browser.evaluate("document.getElementById('plot-speed').data[2].visible") is False
    pressed = "document.querySelector('#speed [data-trace=\"2\"]').getAttribute('aria-pressed')"
    assert browser.evaluate(pressed) == "false"


def test_hostile_names_are_text(browser: Any, reports: Any) -> None:
    path, _ = reports["hostile"]
    browser.open(path, 1280, 900)
    assert browser.evaluate("document.images.length") == 0
    assert browser.evaluate("document.querySelectorAll('a[href]:not([href^=\"#\"])').length") == 0
    assert HOSTILE in browser.evaluate("document.querySelector('h1').textContent")
    assert browser.evaluate("document.getElementById('layer-name').textContent").startswith(HOSTILE)
    assert browser.evaluate("document.title") != "owned"
    quiet(browser, path)


def test_copy_says_that_it_copied(browser: Any, reports: Any) -> None:
    path, _ = reports["several"]
    browser.open(path, 1280, 900)
    browser.evaluate("document.getElementById('copy').click()")
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    assert browser.evaluate("document.getElementById('copy').textContent") == "Copied"
    quiet(browser, path)


def test_paper_is_light_open_and_as_wide_as_the_sheet(browser: Any, reports: Any, tmp_path: Path) -> None:
    path, _ = reports["several"]
    browser.open(path, 1280, 900, dark=True)
    opened = "[...document.querySelectorAll('details')].filter(d => d.open).length"
    widths = "[...document.querySelectorAll('.plot .main-svg')].map(s => s.getBoundingClientRect().width)"
    before = browser.evaluate(opened)
    browser.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert browser.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    assert max(browser.evaluate(widths)) <= 670
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 252)"
    browser.evaluate("dispatchEvent(new Event('afterprint'))")
    assert browser.evaluate(opened) == before
    assert max(browser.evaluate(widths)) > 1000
    browser.print(tmp_path / "report.pdf")
    printed = (tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF-")
    assert 4 <= printed.count(b"/Type /Page\n") <= 12
    quiet(browser, path)
