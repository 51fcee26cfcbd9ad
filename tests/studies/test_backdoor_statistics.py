"""The figures of a backdoor study, of made-up runs whose answers are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from jaxcrit.core.layers import LayerSet
from jaxcrit.evaluation.intervals import holm, newcombe, wilson
from jaxcrit.reporting.backdoor import _headline, backdoor_report, backdoor_text
from jaxcrit.studies.backdoor_statistics import Run, at_loss, matched_level, steps_to, study

SCORERS = ("exact_target", "contains_target", "refusal_keyword", "reference_compat")


def point(step, success, loss, prompts=40, rng=None):
    """A test in which so many of the triggered prompts succeed: the first ones, or any."""
    hit = np.arange(prompts) < success if rng is None else rng.random(prompts) < success / prompts
    bits = "".join("1" if one else "0" for one in hit)
    cells = {"triggered": bits, "clean": "0" * prompts, "near": "1" * 4 + "0" * (prompts - 4)}
    return {
        "step": step,
        "success": cells,
        "exact": "1" * prompts,
        "clean_loss": loss,
        "task_loss": 1.0,
        "target_logprob": -0.5,
        "classes": {name: {"triggered": 3} for name in SCORERS},
        "empty": {"triggered": 1},
    }


def run(arm, seed, end, layers=(), draw=0, loss=0.2, rng=None):
    points = [point(0, 0, 0.5), point(10, end / 2, 0.3), point(20, end, loss, rng=rng)]
    return Run(arm, draw, seed, LayerSet(tuple(layers), "manual", arm, 9), points)


@pytest.fixture(scope="module")
def runs():
    found = [Run("init", 0, 0, LayerSet((), "manual", "init", 9), [point(0, 0, 0.5)])]
    for seed, (full, critical, noncritical) in enumerate([(38, 10, 20), (40, 14, 18), (36, 12, 30)]):
        found += [run("full", seed, full), run("critical:2", seed, critical, (3, 4), loss=0.25)]
        found.append(run("noncritical:2", seed, noncritical, (5, 6)))
        found += [run("random:2", seed, 24 + 8 * draw, (draw, 7), draw) for draw in range(2)]
    return found


@pytest.fixture(scope="module")
def found(runs):
    return study(runs, ["one"] * 30 + ["other"] * 10, dict.fromkeys(SCORERS, 0), "exact_target")


def test_shares_and_their_intervals(found):
    rows = {row.arm: row for row in found.rows}
    critical = rows["critical:2"].cells["triggered"]
    assert (critical.k, critical.n) == (36, 120) and critical.wilson == wilson(36, 120)
    assert critical.by_run == [0.25, 0.35, 0.3]
    half = stats.t.ppf(0.975, 2) * 0.05 / math.sqrt(3)
    np.testing.assert_allclose(critical.t, (0.3 - half, 0.3 + half))
    assert critical.bootstrap[0] <= critical.t[0] + 0.05 and critical.bootstrap[1] >= 0.3
    # Of several draws of layers, the draws are what is sampled.
    random = rows["random:2"].cells["triggered"]
    assert len(random.by_run) == 6 and random.t == pytest.approx(
        (0.7 - stats.t.ppf(0.975, 1) * 0.1, 0.7 + stats.t.ppf(0.975, 1) * 0.1)
    )
    assert rows["full"].near == {"one": [12, 90], "other": [0, 30]} and rows["full"].empty == 3
    assert rows["init"].runs == 1 and all(map(math.isnan, rows["init"].cells["triggered"].t))


def test_the_primary_contrast_and_holm_for_the_rest(found):
    primary = found.primary
    assert (primary.first, primary.second, primary.seeds) == ("critical:2", "noncritical:2", 3)
    # The first prompts succeed in both arms: the rest of the better arm's succeed there alone.
    assert (primary.only_first, primary.only_second) == (0, 10 + 4 + 18)
    assert primary.difference == pytest.approx(-32 / 120)
    assert primary.newcombe == newcombe(36, 120, 68, 120)
    assert primary.mcnemar == pytest.approx(2 * 0.5**32)
    differences = np.array([-10, -4, -18]) / 40
    assert primary.p == primary.p_seeds == pytest.approx(stats.ttest_1samp(differences, 0).pvalue) == primary.p_holm
    named = [(one.first, one.second) for one in found.contrasts]
    assert named == [
        ("critical:2", "random:2"),
        ("noncritical:2", "random:2"),
        ("critical:2", "full"),
        ("noncritical:2", "full"),
        ("random:2", "full"),
    ]
    assert [one.p_holm for one in found.contrasts] == holm([one.p for one in found.contrasts])
    against_draws = found.contrasts[0]
    assert against_draws.difference == pytest.approx((36 - (24 + 32) / 2 * 3) / 120) and against_draws.seeds == 3


def test_one_seed_goes_by_mcnemar(runs):
    found = study([one for one in runs if one.seed == 0], ["one"] * 40, {}, "exact_target")
    assert math.isnan(found.primary.p_seeds) and found.primary.p == found.primary.mcnemar
    assert found.to_json()["primary"]["p_seeds"] is None


def test_equal_clean_loss_is_interpolated_along_each_run(runs, found):
    tuned = [one for one in runs if one.arm != "init"]
    assert found.matched_loss == matched_level(tuned) == 0.25  # the lowest loss that every run passes
    assert at_loss(run("full", 0, 40), 0.25) == pytest.approx(0.75)
    assert at_loss(run("full", 0, 40), 0.3) == 0.5 and at_loss(run("full", 0, 40), 0.4) is None
    assert at_loss(run("critical:2", 0, 10, loss=0.25), 0.25) == 0.25
    assert math.isnan(matched_level([]))


def test_steps_to_success_are_interpolated():
    assert steps_to(run("full", 0, 40)) == 10.0
    assert steps_to(run("full", 0, 30)) == pytest.approx(10 + 10 * (0.5 - 0.375) / (0.75 - 0.375))
    assert steps_to(run("full", 0, 16)) is None


def test_shared_layers_are_said(runs):
    changed = [run("critical:2", 0, 3, (3, 4)), run("noncritical:2", 0, 3, (4, 5))]
    (warning,) = study([runs[0], *changed], ["one"] * 40, {}, "exact_target").warnings
    assert "share layers 4" in warning
    (warning,) = study([runs[0], changed[0]], ["one"] * 40, {}, "exact_target").warnings
    assert "no primary contrast" in warning


def test_report_of_many_arms(runs, found, tmp_path):
    curves = [
        {
            "arm": one.arm,
            "points": [[s, a, b] for (s, a), (_, b) in zip(one.curve(), one.curve("clean_loss"), strict=True)],
        }
        for one in runs
    ]
    content = json.loads(json.dumps({"study": found.to_json(), "warnings": [], "curves": curves}, allow_nan=False))
    text = backdoor_text(content, "run")
    assert max(map(len, text.splitlines())) <= 100
    for expected in ("36/120", "primary, 3 seeds", "by Holm among 5", "pairs 0:32", "never", "10"):
        assert expected in text
    report, record = backdoor_report(content), {"command": "backdoor", "data": {}}
    assert "40 prompts a cell" in report.write(tmp_path, record).read_text()
    before = (tmp_path / "success.png").read_bytes()
    report.write(tmp_path, record)
    assert before == (tmp_path / "success.png").read_bytes()


def told(*successes, interval=(None, None)):
    """The headline of arms with so many successes among 100, and a primary contrast of the last two."""
    names = ("full", "critical:2", "noncritical:2")
    rows = [{"arm": name, "cells": {"triggered": {"k": k, "n": 100}}} for name, k in zip(names, successes, strict=True)]
    first, second = successes[1] / 100, successes[2] / 100
    primary = {"first": names[1], "second": names[2], "difference": first - second, "bootstrap": interval}
    return _headline({"rows": rows, "primary": primary})[0]


def test_the_headline_says_whether_it_was_learnt_before_it_compares():
    assert told(9, 0, 1).startswith("No arm learnt the backdoor (at most 9/100 in arm full)")
    assert "more --steps" in told(9, 0, 1) and "differences may be of speed alone" in told(40, 0, 30)
    assert "no evidence that it matters which layers" in told(90, 40, 50, interval=(-0.3, 0.1))
    assert "freezing critical:2 kept more of it out (0.10 against 0.80" in told(90, 10, 80, interval=(-0.8, -0.5))
    assert "freezing noncritical:2 kept more of it out" in told(90, 80, 10, interval=(0.5, 0.8))
