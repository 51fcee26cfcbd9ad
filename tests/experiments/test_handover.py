"""Dips of δ beside interventions: the second statistic by loops, a planted coincidence, and what is refused."""

import handover
import numpy as np
import pytest
from evidence_table2 import FORMAT

from jaxcrit.core.files import read_json, write_json
from jaxcrit.core.layers import LayerScores, read_scores, write_scores

COUNT = 30
NAMES = ("one", "two", "three")


def curve(*places, seed=0):
    """Noise, and a dip of one at some layers."""
    values = 0.01 * np.random.default_rng(seed).normal(size=COUNT)
    values[list(places)] -= 1
    return values


def score(key, values, **meta):
    return LayerScores(key, values, (np.arange(COUNT) > 1) & (np.arange(COUNT) < 28), "low", meta=meta)


def test_dips_are_interior_and_deepest_first():
    values = -np.array([-9.0, 0, 3, 1, 2, 0, 5, 5, 6, -7])
    assert handover.minima(values, 9).tolist() == [3, 5] and handover.minima(values, 1).tolist() == [5]
    assert not len(handover.minima(np.arange(5.0), 3)), "no turn, no dip"


def test_what_stands_at_dips_by_loops():
    rng = np.random.default_rng(1)
    layers, scores, curves = np.arange(2, 15), rng.normal(size=(2, 13)), rng.normal(size=(2, 13))
    found, p = handover.at_dips(scores, curves, layers, 2)
    every = []
    for shift in range(13):
        for back in (1, -1):
            means = []
            for row, other in zip(scores, curves, strict=True):
                ranks = np.argsort(np.argsort(other)).astype(float)
                ranks -= np.polyval(np.polyfit(layers, ranks, 1), layers)
                ranks = np.roll(ranks / ranks.std(), -shift)[::back]
                inside = [v for v in range(1, 12) if row[v - 1] < row[v] >= row[v + 1]]
                means.append(np.mean([ranks[v] for v in sorted(inside, key=lambda v: -row[v])[:2]]))
            every.append(np.mean(means))
    assert found == pytest.approx(every[0], abs=1e-12)
    assert p == pytest.approx(np.mean(np.abs(every) >= abs(every[0]) - 1e-9))


@pytest.fixture
def table(tmp_path):
    """Of three datasets that dip in layers 3, 13 and 22; skipping a layer costs most there in "one" alone."""

    def base(name, seed):
        scores = {key: score(key, curve(3, 13, 22, seed=seed + len(key)), window=5) for key in handover.KEYS}
        lost = -curve(*((3, 13, 22) if name == "one" else (8, 18, 25)), seed=seed + 9)
        return scores | {handover.LOSS: LayerScores(handover.LOSS, lost, np.full(COUNT, True), "high")}

    cells = {
        f"base-{name}": {"scores": {k: s.to_json() for k, s in base(name, 100 * n).items()}}
        for n, name in enumerate(NAMES)
    }
    write_json(tmp_path / "t.json", FORMAT, {"settings": {"model_hash": "ab" * 32}, "cells": cells})
    return tmp_path


def test_a_planted_coincidence_reaches_the_floor(table, capsys):
    write_scores(
        table / "scores.json",
        {
            "arrives": LayerScores(
                "arrives", -curve(3, 13, 22, seed=5), np.full(COUNT, True), "high", meta={"model_hash": "ab" * 32}
            )
        },
    )
    (table / "part").mkdir()
    write_scores(table / "part" / "scores.json", read_scores(table))
    write_json(table / "run.json", "jaxcrit.run", {"time": {"seconds": 7.0}})  # of both, so counted once
    asked = [f"--table2={table}/t.json", f"--interventions={table}:arrives,{table}/part:arrives", f"--out={table}/out"]
    assert handover.main(asked) == 0
    text = capsys.readouterr().out
    assert "3 datasets, 3 dips each; p never below 0.019" in text and "3,13,22" in text
    content = read_json(table / "out" / "handover.json", handover.FORMAT)
    rows = {(row["score"], row["intervention"]): row for row in content["rows"]}
    planted = rows["delta_debiased", f"{table.name}:arrives"]
    assert planted["d"] > 1 and planted["p_d"] == planted["floor"] and planted["dips"] == [[3, 13, 22]] * 3
    spent = content["time"]["seconds"]
    assert spent[str(table)] == 7 and set(spent) == {str(table), "handover"}
    own = rows["delta_debiased", handover.LOSS]
    assert own["by_dataset"][0] > own["by_dataset"][1] and own["p_d"] > planted["p_d"]
    assert handover.main([f"--read={table}/out/handover.json"]) == 0 and capsys.readouterr().out == text


def test_what_is_refused(table, capsys):
    write_scores(table / "scores.json", {"arrives": score("arrives", curve(3), model_hash="cd" * 32)})
    for asked, told in {
        "": "expected --table2=FILE",
        f"--table2={table}/none.json": "none.json",
        f"--table2={table}/t.json --interventions=runs": "expected RUN:KEY, such as",
        f"--table2={table}/t.json --interventions={table}:nothing": "no score 'nothing'",
        f"--table2={table}/t.json --interventions={table}:arrives": "is of model cdcdcdcdcdcd, and --table2 of abab",
    }.items():
        assert handover.main([*asked.split(), f"--out={table}/out"]) == 2
        assert told in capsys.readouterr().err
    assert not (table / "out").exists()
