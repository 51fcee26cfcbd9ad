"""Figures and the report page: deterministic, self-contained, escaped."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure as MatplotlibFigure
from PIL import Image
from support import synthetic_analysis as synthetic

from jaxcrit.reporting import plots, tables
from jaxcrit.reporting.analysis import analysis_report, heatmap, null_delta, paper_choice, write_configs
from jaxcrit.reporting.report import Figure, Report, Section, on_axes

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Collects text, attributes that could fetch something, and unclosed tags."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.links, self.open, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "link", "br", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def write_analysis(analysis):
    write_configs(analysis, analysis.out)
    return analysis_report(analysis).write(analysis.out, analysis.run)


def figures():
    data = synthetic.dataset(num_layers=16)
    delta = data.scores["delta"]
    null = np.full(16, 0.9)

    def curve(canvas):
        plots.delta_panels(data.scores, data.chosen, null, canvas, window=5, title="t")

    return tuple(
        figure.png()
        for figure in (
            heatmap(data.cka, "CKA."),
            Figure("delta.png", curve, "δ."),
            Figure(
                "consensus.png",
                lambda canvas: plots.consensus_figure({"a": delta, "b": delta}, delta, data.chosen, canvas),
                "δ.",
            ),
        )
    )


def test_figures_are_png_and_the_same_every_time():
    first, second = figures(), figures()
    assert first == second
    for content in first:
        assert content.startswith(PNG)
        assert b"matplotlib" not in content, "a version in the file would change its bytes"


@pytest.mark.parametrize("names", [("alpaca",), ("alpaca", "gsm8k")])
def test_run_directory_and_page(tmp_path, names):
    analysis = synthetic.analysis(tmp_path, names=names, warnings=("N < D & so on",))
    path = write_analysis(analysis)
    html = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    assert page.open == []
    assert "script" not in page.tags
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links), "opens offline"
    assert not re.search(r"url\(|@import", html)
    dark, light = ([base64.b64decode(link.partition(",")[2]) for link in page.links[first::2]] for first in (0, 1))
    assert set(light) == {file.read_bytes() for file in tmp_path.rglob("*.png")}
    for one, other in zip(light, dark, strict=True):
        bright, dim = (np.asarray(Image.open(io.BytesIO(png)).convert("L"), float) for png in (one, other))
        assert bright.shape == dim.shape and np.median(bright) > 200 > 60 > np.median(dim)
    text = "".join(page.text)
    assert f"of {analysis.chosen.num_layers}" in text and "How sure" in text
    assert "<b>dir</b>" in text, "what the user typed is shown, not rendered"
    assert "N < D & so on" in text
    assert synthetic.META["model_hash"] in text
    places = [tmp_path] if len(names) == 1 else [tmp_path, *(tmp_path / name for name in names)]
    for place in places:
        assert (place / "configs/peft.json").exists()
    assert write_analysis(analysis).read_text(encoding="utf-8") == html, "same input, same bytes"


def test_several_datasets_share_one_scale_which_holds_every_error():
    scores = [synthetic.dataset(num_layers=16, name=name).scores for name in ("a", "b")]
    scores[1] = {key: dataclasses.replace(one, values=one.values - 0.3) for key, one in scores[1].items()}
    low, high = plots.delta_limits(scores)
    for one in (score for both in scores for score in (both["delta"], both["delta_debiased"])):
        half = 0 if one.stderr is None else 1.96 * one.stderr
        assert low < np.nanmin(one.values - half) and np.nanmax(one.values + half) < high


def test_numbers_of_layers_that_are_near_each_other_stand_together():
    axes = MatplotlibFigure().subplots()
    plots.mark(axes, [2, 3, 5, 40, 41, 42, 70])
    assert [text.get_text() for text in axes.texts] == ["2-3,5", "40-42", "70"]


def test_names_of_points_do_not_lie_on_each_other():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 30))
    sides = np.ptp(x), np.ptp(y)
    places = np.stack([x, y], axis=1) * np.array([280, 240]) / sides + plots._beside(x, y, sides)
    gaps = np.abs(places[:, None] - places) / (9, 8)
    assert (gaps.max(axis=2) >= 1)[np.triu_indices(30, 1)].mean() > 0.99


def test_null_delta_counts_a_layer_with_itself_as_one():
    data = synthetic.dataset(num_layers=16)
    config = {"window": 5, "include_self": True}
    values = null_delta(data.cka, config)
    np.testing.assert_allclose(values[2:-2], (4 * 0.88 + 1) / 5)
    assert np.isnan(values[[0, 1, -2, -1]]).all()
    np.testing.assert_allclose(null_delta(data.cka, {**config, "include_self": False})[2:-2], 0.88)


def test_paper_choice_has_as_many_layers_by_biased_delta():
    data = synthetic.dataset(num_layers=32)
    choice = paper_choice(data, {"trim": 2})
    assert choice.criterion == "delta" and len(choice.layers) == len(data.chosen.layers)


NAME = "$x^{$ \x1b[2J \u202egnp"


def test_names_from_data_are_text_on_the_page_in_the_terminal_and_in_figures(tmp_path):
    def draw(axes):
        axes.set_title(NAME)
        axes.plot([0, 1], label=NAME)
        axes.legend()

    figure = Figure("a.png", on_axes(draw), NAME)
    assert figure.write(tmp_path).startswith(PNG)  # unbalanced, it would be no formula
    section = Section(NAME, NAME, lambda style: tables.table([NAME, "b"], [["1", NAME]], [style]), [figure])
    report = Report([NAME], [NAME], [section], [NAME], configs={NAME: NAME})
    page = report.write(tmp_path, {"command": "test", "data": {NAME: NAME}}).read_text(encoding="utf-8")
    for text in (report.text(), report.text(style=True).replace(tables.BOLD, "").replace(tables.PLAIN, ""), page):
        assert not re.search("[\x1b\u202e]", text) and r"$x^{$ \x1b[2J \u202egnp" in text.replace("\n  ", " ")
