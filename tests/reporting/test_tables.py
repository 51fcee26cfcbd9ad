"""The terminal's tables and sentences."""

from __future__ import annotations

import dataclasses

import numpy as np
from support import synthetic_analysis as synthetic

from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.reporting import tables
from jaxcrit.reporting.analysis import analysis_report, warnings
from jaxcrit.selection import Certainty, SampleSizes


def test_a_row_says_what_was_measured():
    data = synthetic.dataset(num_layers=32)
    null = np.full(32, 0.9)
    lines = tables.layer_table(data.scores, data.chosen, null=null, probability=data.certainty.probability).splitlines()
    assert len(lines) == 33
    score, layer = data.scores["delta_debiased"], data.chosen.layers[0]
    assert lines[1 + layer].split() == [
        str(layer),
        f"{score.values[layer]:.4f}",
        "±",
        f"{score.stderr[layer]:.4f}",
        f"{data.scores['delta'].values[layer]:.4f}",
        "0.9000",
        f"{data.scores['step'].values[layer]:.4f}",
        "0.93",
        "◀",
        "critical",
    ]
    assert [line.split()[0] for line in lines[1:] if "◀" in line] == [str(layer) for layer in data.chosen.layers]
    assert lines[1].split() == ["0", "-", "-", "0.9000", "-", "-"], "edges are invalid, never invented"


def test_shows_where_the_papers_choice_differs():
    data = synthetic.dataset(num_layers=32)
    paper = dataclasses.replace(data.chosen, layers=(*data.chosen.layers[:-1], 20), criterion="delta")
    lines = tables.layer_table(data.scores, data.chosen, paper=paper).splitlines()
    assert lines[1 + 20].endswith("(by biased δ only)")
    assert lines[1 + data.chosen.layers[-1]].endswith("◀ critical (not by biased δ)")


def test_no_escape_codes_unless_asked(tmp_path):
    analysis = synthetic.analysis(tmp_path)
    assert "\x1b" not in analysis_report(analysis).text()
    styled = analysis_report(analysis).text(style=True)
    assert styled.replace(tables.BOLD, "").replace(tables.PLAIN, "") == analysis_report(analysis).text()


def test_fits_100_columns_whatever_the_names(tmp_path):
    names = tuple(f"a_dataset_with_a_long_name_{i}" for i in range(12))
    for analysis in (
        synthetic.analysis(tmp_path, warnings=("long " * 60,)),
        synthetic.analysis(tmp_path, names=names, num_layers=80),
    ):
        text = analysis_report(analysis).text()
        assert max(map(len, text.splitlines())) <= 100
    assert "more datasets are in the report" in text


def test_warnings_shared_by_datasets_stand_once(tmp_path):
    analysis = synthetic.analysis(tmp_path, names=("a", "b", "c"), warnings=("flat",))
    analysis.datasets["b"].warnings.append("odd")
    analysis.datasets["c"].warnings.append("odd")
    assert warnings(analysis) == ["flat", "b, c: odd"]


class TestHowSure:
    chosen = LayerSet((3, 4), "delta_debiased", "critical:2", 8)

    def of(self, *probability, confidence=(3,), same=0.7):
        sizes = SampleSizes(np.array([150, 300, 600]), np.array([0.5, same, 1.0]), np.ones(3))
        return Certainty(300, np.array(probability, float), confidence, sizes)

    def test_names_the_least_certain(self):
        sentences = tables.certainty(self.chosen, self.of(0, 0, 0, 0.9, 0.859, 0.1, 0, 0), 4)
        assert "another draw of 300 prompts" in sentences[0] and "in at least 85% of draws" in sentences[0]

    def test_never_is_more_than_the_draws_can_say(self):
        sentence = tables.certainty(self.chosen, self.of(*np.ones(8)), 4)[0]
        assert "in all of 2,000 bootstrap draws (at 95%, in over 99.85% of such draws)" in sentence
        almost = tables.certainty(self.chosen, self.of(*np.full(8, 0.9995)), 4)[0]
        assert "in at least 99% of draws" in almost

    def test_says_when_there_was_no_choice(self):
        assert "nothing to choose; 2 of 8" in tables.certainty(self.chosen, self.of(*np.ones(8)), 2)[0]

    def test_says_when_the_choice_is_not_settled(self):
        sentences = tables.certainty(self.chosen, self.of(0, 0, 0, 0.9, 0.4, 0.6, 0, 0), 4)
        assert "300 prompts do not settle layer 4:" in sentences[0]

    def test_says_when_it_does_not_know(self):
        assert "not estimated" in tables.certainty(self.chosen, None, 4)[0]

    def test_confidence_set(self):
        def sentence(*layers):
            return tables.certainty(self.chosen, self.of(*np.ones(8), confidence=layers), 4)[1]

        assert sentence(3).endswith(" of all: 3, at 95% confidence (of 4 candidates).")
        assert sentence(3, 5).endswith(" of all: among 3, 5, at 95% confidence (of 4 candidates).")
        assert "not told by 300 prompts" in sentence(2, 3, 4, 5)
        # Over several datasets the test is wide, so it must not deny what resampled prompts say.
        everything = self.of(*np.ones(8), confidence=(2, 3, 4, 5))
        assert "see each dataset's" in tables.certainty(self.chosen, everything, 4, 2)[1]

    def test_names_what_could_take_the_place_of_the_least_sure(self):
        firm = tables.certainty(self.chosen, self.of(0, 0, 0, 0.95, 0.6, 0.39, 0.05, 0), 4)[0]
        assert firm.endswith("in at least 60% of draws, layer 4 least often; in its place 5 (39%).")
        loose = tables.certainty(self.chosen, self.of(0, 0, 0, 0.95, 0.3, 0.6, 0.12, 0), 4)[0]
        assert loose.endswith("more often choose otherwise, such as 5 (60%), 6 (12%).")

    def test_sample_size(self):
        def sentence(same):
            return tables.certainty(self.chosen, self.of(*np.ones(8), same=same), 4)[2]

        assert sentence(0.9).startswith("Sample size: 300 prompts make this very choice 90% of the time; for 95%")
        assert "about 420" in sentence(0.9), "halfway between 300 and 600 on a scale of ratios"
        assert "over 99% of the time; for 95% it takes about 280" in sentence(1.0)

    def test_counts_datasets_that_agree(self):
        other = dataclasses.replace(self.chosen, layers=(4, 5))
        assert tables.agreement(self.chosen, {"a": self.chosen, "b": other}).endswith("itself: 4 by 2; 3 by 1.")

    def test_the_finding_is_in_the_first_sentence_and_is_not_denied_by_the_next(self):
        found = tables.headline(self.chosen, 2)
        assert found.startswith("Critical layers: 3, 4 of 8, there the hidden state changes most (debiased δ, ")
        assert "mean rank over 2 datasets; model.layers.3" in found
        assert "none stands out, for δ is flat; 3, 4 of 8 would be named" in tables.headline(self.chosen, flat=True)
        fixed = dataclasses.replace(self.chosen, rule="3,4", criterion="manual")
        assert tables.headline(fixed).startswith("Chosen layers: 3, 4 of 8 (manual, 3,4; ")


def test_tables_that_are_made_when_they_are_shown_fill_the_terminal(tmp_path):
    analysis = synthetic.analysis(tmp_path, names=tuple(f"dataset {number}" for number in range(6)))
    report = analysis_report(analysis)
    for width in (80, 100):
        assert width - 20 < max(map(len, report.text(width).splitlines())) <= width
    assert "more datasets are in the report" in report.text(80)


def test_a_wide_table_goes_on_below():
    columns = {f"score_{number}": ["0.5", "-"] for number in range(9)}
    text = tables.wide_table(["layer", "0", "1"], columns, ["", "a", "b"], margin=8, least=9)
    first, second = text.split("\n\n")
    assert first.splitlines()[0].split() == ["layer", *list(columns)[:8]] and max(map(len, first.splitlines())) <= 100
    assert [line.split() for line in second.splitlines()] == [["layer", "score_8"], ["0", "0.5", "a"], ["1", "-", "b"]]


def test_scores_are_named_in_words():
    names = ("an/gsm8k:delta_debiased", "delta", "sub:substitution", "x:gradient_norm")
    assert [tables.said(name) for name in names] == [
        "debiased δ, an/gsm8k",
        "biased δ",
        "loss after substitution, sub",
        "gradient norm, x",
    ]


def test_numbers_in_a_table():
    assert [tables.p_value(value) for value in (0.05, 2e-4, np.nan)] == ["0.050", "2.0e-04", "-"]
    score = LayerScores("x", np.array([1.0, np.nan]), np.array([True, False]), "low", np.array([0.25, np.nan]))
    assert [tables.estimate(score, layer) for layer in (0, 1)] == ["1.0000 ± 0.2500", "-"]
    assert tables.estimate(dataclasses.replace(score, stderr=None), 0) == "1.0000"
