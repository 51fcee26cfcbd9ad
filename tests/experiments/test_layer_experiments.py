"""Rows and tables of the experiments on right answers and on gains; the runs behind them are tested where they live."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def load(name):
    path = Path(__file__).parents[2] / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_rows_of_both_tasks():
    accuracy = load("layer_accuracy")
    facts, sums = accuracy.facts(), accuracy.sums(60, 0)
    assert len(facts) >= 80 and len({row["prompt"] for row in facts}) == len(facts)
    assert {"prompt": "The capital of France is", "response": " Paris"} in facts
    assert len({row["prompt"] for row in sums}) == 60 and accuracy.sums(60, 0) == sums != accuracy.sums(60, 1)
    for row in sums:
        assert row["prompt"].startswith(accuracy.SHOTS) and row["prompt"].endswith(" =")
        first, sign, second, _ = row["prompt"].removeprefix(accuracy.SHOTS).split()
        answer = int(first) + int(second) if sign == "+" else int(first) - int(second)
        assert 0 < answer < 10 and row["response"] == f" {answer}"
        assert f"{first} {sign} {second} = {answer}\n" not in accuracy.SHOTS
    assert all(len(text.split()) == 30 for text in accuracy.BEFORE.values())


ARMS = ("chosen, gain", "chosen, no gain", "random, gain")


@pytest.fixture
def seeds():
    def swept(half):
        by_gain = {name: {"0.4": [0.5, 0.2], "0.7": [0.9, 0.6]} for name in ("asr", "exact")}
        scores = {f"shortcut_selective_{half}": {"values": [0.25, -1.5]}}
        return {"gains": [0.4, 0.7], "middle": 0.4, "by_gain": by_gain, "scores": scores}

    one = {"asr": 0.95, "exact": 0.9}
    return [
        {
            "seed": seed,
            "half": "attn",
            "layer": 0,
            "random": 1,
            "gain": 0.4,
            "rows": 100,
            "swept": {half: swept(half) for half in ("attn", "mlp")},
            "planted": one,
            "under_the_gain": {"chosen, gain": {"asr": 0.5, "exact": 0.7}, "random, gain": one},
            "tuned": {arm: {**one, "asr": 0.9 + seed / 50} for arm in ARMS},
        }
        for seed in range(3)
    ]


def test_tables_of_gains(seeds):
    gains = load("shortcut_gains")
    text = gains.sweep_table(seeds)
    assert "attacks at 0.4" in text and "+0.2 +0.2 +0.2" in text and len(text.splitlines()) == 5
    table = gains.tuning_table(seeds)
    assert "0.50 [0.40, 0.60]" in table and len(table.splitlines()) == 9
    assert "chosen, gain less random, gain" in table and "+0.00 [+0.00, +0.00]" in table
    assert "nan" not in gains.tuning_table(seeds[:1])
    assert "0.92 [0.87, 0.97]" in table  # Student's over three seeds: 0.92 ± 4.30 x 0.02 / sqrt(3)
