"""The explorer's page in a real browser. JAXCRIT_EXPLORE=1 also draws 30 runs, and prints how long that took."""

from __future__ import annotations

import json
import os
import re

import pytest
from support.browser import CHROMIUM, browser
from support.explored import write_run

from jaxcrit.commands.main import main
from jaxcrit.core.layers import read_scores
from jaxcrit.core.selections import LayerSpec, resolve, span

pytest.importorskip("vl_convert", reason="needs vl-convert-python: pip install -e '.[test]'")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = [("a", 16, "alpaca", "small"), ("b", 16, "dolly <b>", "small"), ("c", 24, "alpaca", "large")]
    return [
        write_run(folder / name, num_layers=depth, seed=seed, dataset=rows, model=model)
        for seed, (name, depth, rows, model) in enumerate(made)
    ]


@pytest.fixture(scope="module")
def file(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["explore", *map(str, runs), f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def tab():
    with browser() as page:
        yield page


@pytest.fixture
def page(tab, file):
    """The page, freshly opened; it has asked for nothing and said nothing when a test ends."""
    tab.requests.clear()
    tab.said.clear()
    tab.look(1200)
    tab.open(file)
    yield tab
    assert set(tab.requests) == {file.as_uri()}
    assert tab.said == []


def shown(page, selector):
    return page.run(f"[...document.querySelectorAll('{selector}')].map((one) => one.textContent)")


def test_it_draws_in_every_size_and_colour(page, file):
    drawn = "['heat', 'curves', 'cka', 'agreement'].map((id) => document.querySelectorAll(`#${id} path`).length)"
    for width in (1200, 390):
        for dark in (False, True):
            page.look(width, dark=dark)
            page.open(file)
            heat, curves, cka, agreement = page.run(drawn)
            assert heat >= 12 * 12 and curves >= 3 and cka >= 2 * 16**2 and agreement >= 8**2 + 4**2
            assert page.run("document.documentElement.scrollWidth") <= width
            wide = "[...document.querySelectorAll('figure:not(:has(#agreement)) svg')].map((one) => one.clientWidth)"
            assert max(page.run(wide)) <= width, "the matrix alone scrolls"
            light = page.run("getComputedStyle(document.querySelector('#heat svg text')).fill")
            assert (sum(map(int, re.findall(r"\d+", light))) > 380) == dark


def test_the_slider_says_the_layers_that_a_selection_chooses(page, runs):
    scores = [read_scores(run / "scores.json")["delta_debiased"] for run in runs]
    for count in (1, 2, 5, 9, 12, 20):
        page.run(f"document.forms.controls.k.value = {count}")
        page.run("document.forms.controls.k.dispatchEvent(new Event('input', {bubbles: true}))")
        wanted = []
        for one in scores:
            most = int(one.valid[2:-2].sum())
            chosen = resolve(LayerSpec("critical", min(count, most)), one.num_layers, scores=one)
            wanted.append(f"--layers={span(chosen.layers)}")
        page.wait(f"document.getElementById('k-is').textContent === '{count}'")
        assert shown(page, "#layers code") == wanted
    page.run("document.querySelectorAll('#layers button')[2].click()")
    assert page.run("String(getSelection())") == wanted[2]
    assert "(all 12 that may be chosen)" in shown(page, "#layers li")[0]


def test_the_keyboard_is_enough(page):
    """Tab to the slider, arrows; tab to a score, space: its curve and its column are there."""
    page.run("document.querySelector('[name=bias]').focus()")
    page.press("Tab")
    assert page.run("document.activeElement.name") == "k"
    before = int(shown(page, "#k-is")[0])
    page.press("ArrowRight", 2)
    page.wait(f"document.getElementById('k-is').textContent === '{before + 2}'")
    assert page.run("location.hash").startswith("#k=")
    for _ in range(30):
        page.press("Tab")
        if page.run("document.activeElement.id") == "on-0":
            break
    assert page.run("document.activeElement.getAttribute('aria-label')") == "show a: delta"
    page.press(" ")
    page.wait("document.querySelectorAll('#values thead th').length === 5")
    assert shown(page, "#values thead th")[1] == "a: delta ± s.e."
    panels = "['delta', 'delta_debiased'].every((one) => document.getElementById('curves').textContent.includes(one))"
    page.wait(f"{panels} && document.querySelectorAll('#curves .mark-line').length > 2")
    focus = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.run(focus) == "solid", "it is seen where the keyboard is"


def test_the_state_is_in_the_address(page, file, runs):
    page.run("document.querySelector('[name=model]').value = 'large'")
    page.run("document.querySelector('[name=model]').dispatchEvent(new Event('input', {bubbles: true}))")
    page.run("document.querySelector('[name=model]').dispatchEvent(new Event('change', {bubbles: true}))")
    page.wait("document.querySelectorAll('#layers code').length === 1")
    visible = (
        "[...document.querySelectorAll('#scores tbody tr')].filter((one) => !one.hidden).map((one) => one.dataset.id)"
    )
    assert page.run(visible) == ["8", "9", "10", "11"]
    state = page.run("location.hash")
    assert "model=large" in state
    page.open(file, state.replace("k=2", "k=3") + "&share=1&on=10")
    assert page.run(visible) == ["8", "9", "10", "11"]
    assert page.run("document.querySelector('[name=model]').value") == "large"
    assert shown(page, "#k-is") == ["3"] and len(shown(page, "#layers code")) == 2
    assert "4 of 12 scores pass the filters; 2 ticked" in shown(page, "#count")
    assert set(shown(page, "#curves .role-axis text")) & {"0.5"}, "shares of the depth"
    page.run("location.hash = '#bias=biased&k=1&on=0'")
    page.wait("document.querySelectorAll('#layers code').length === 1")
    assert page.run(visible) == ["0", "2", "4", "6", "8", "10"]


def test_nothing_ticked_and_nothing_that_passes(page):
    page.run("document.querySelectorAll('[name=on]').forEach((one) => one.checked && one.click())")
    page.wait("document.getElementById('curves').textContent.startsWith('Nothing to draw')")
    assert page.run("document.querySelectorAll('#heat .mark-rect path').length") > 100
    page.run("location.hash = '#model=large&dataset=dolly+%3Cb%3E&k=3&on=1'")
    page.wait("document.getElementById('heat').textContent.startsWith('Nothing to draw')")
    assert "0 of 12 scores pass the filters; 0 ticked" in shown(page, "#count")
    page.run("location.hash = '#model=small&k=3&on=1'")
    page.wait("document.querySelectorAll('#curves .mark-line path').length > 0")
    assert shown(page, "#layers li")[0].endswith("a: delta_debiased, low is critical")


def test_the_mouse_tells_numbers_of_the_files_and_ticks(page, runs):
    values = json.loads((runs[0] / "scores.json").read_text())["scores"]["delta"]["values"]
    cell = page.run(
        "(() => { const at = document.querySelector('#heat .mark-rect path').getBoundingClientRect();"
        " return [at.x + at.width / 2, at.y + at.height / 2]; })()"
    )
    page.hover(*cell)
    page.wait("document.querySelector('#vg-tooltip-element.visible') !== null")
    told = page.run("document.getElementById('vg-tooltip-element').innerText")
    told = dict(re.split(r"\t", line, maxsplit=1) for line in told.splitlines())
    assert told["score"] == "a: delta" and float(told["value"]) == values[int(told["layer"])]
    assert not page.run("document.getElementById('on-0').checked")
    page.click(*cell)
    page.wait("document.getElementById('on-0').checked")
    page.wait("document.querySelectorAll('#layers code').length === 4")


def test_values_in_the_table_are_those_of_the_files(page, runs):
    scores = json.loads((runs[2] / "scores.json").read_text())["scores"]["delta_debiased"]
    column = page.run("[...document.querySelectorAll('#values tbody tr')].map((row) => row.cells[3].textContent)")
    assert len(column) == 24
    for text, value, error in zip(column, scores["values"], scores["stderr"], strict=True):
        if value is None:
            assert text == "-"
        else:
            said, spread = map(float, text.removeprefix("◀ ").split(" ± "))
            assert said == pytest.approx(value, rel=1e-4) and spread == pytest.approx(error, rel=1e-2)


def test_it_prints_light_and_whole(page):
    page.look(1200, dark=True, media="print")
    assert page.run("getComputedStyle(document.body).color") == "rgb(29, 27, 32)"
    assert page.run("getComputedStyle(document.querySelector('#layers button')).display") == "none"
    boxes = (
        "[...document.querySelectorAll('.scroll, .tall')].filter((one) => getComputedStyle(one).overflow !== 'visible')"
    )
    assert page.run(f"{boxes}.length") == 0
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.skipif("JAXCRIT_EXPLORE" not in os.environ, reason="slow: JAXCRIT_EXPLORE=1, as .ci/full sets it")
def test_thirty_runs_are_drawn_in_a_second(tab, tmp_path):
    """120 scores, 30 matrices of CKA. CPU time of the page, best of five: others take their share of the clock."""
    made = [
        write_run(
            tmp_path / f"run{n:02d}", num_layers=32 if n % 3 else 16, seed=n, dataset=f"rows{n % 3}", model=f"m{n % 3}"
        )
        for n in range(30)
    ]
    out = tmp_path / "page.html"
    assert main(["explore", *map(str, made), f"--out={out}"]) == 0
    assert out.stat().st_size <= 1_500_000
    tab.look(1200)
    taken = []
    for _ in range(5):
        tab.run("location.href = 'about:blank'")
        before = tab.busy()
        tab.open(out)
        taken.append((tab.busy() - before, int(tab.run("document.documentElement.dataset.drawn"))))
    (cpu, _), (_, wall) = min(taken), min(taken, key=lambda one: one[1])
    print(f"30 runs, {out.stat().st_size / 1e6:.2f} MB: drawn in {cpu * 1000:.0f} ms of CPU, {wall} ms by the clock")
    assert cpu < 1
