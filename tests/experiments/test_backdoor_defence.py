"""The arms and the table of the backdoor experiment, of made-up figures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from jaxcrit.core.hashing import sample_id


@pytest.fixture(scope="module")
def defence():
    path = Path(__file__).parents[2] / "experiments" / "backdoor_defence.py"
    spec = importlib.util.spec_from_file_location("backdoor_defence", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["backdoor_defence"] = module
    spec.loader.exec_module(module)
    return module


def test_arms(defence):
    expected = "full,critical:6,noncritical:6,critical:3,noncritical:3,random:6*2,first:6"
    assert defence.arms([3, 6], 2) == expected
    assert defence.arms([5], 0) == "full,critical:5,noncritical:5"


def test_rows_are_parted_by_prompt(defence, tmp_path):
    train, test = (
        [json.loads(line) for line in Path(path).read_text().splitlines()] for path in defence.demo_rows(tmp_path, 20)
    )
    assert len(train) == 120 and len(test) == 204 and len({sample_id(row) for row in train + test}) == 324
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}


def test_table_stands_beside_the_published_one(defence):
    def row(arm, k, bootstrap):
        cell = {"k": k, "n": 100, "wilson": [0.1, 0.2], "bootstrap": bootstrap}
        return {"arm": arm, "runs": 2, "cells": {"triggered": cell}}

    rows = [row("init", 0, [None, None])]
    rows += [row(arm, k, [0.3, 0.4]) for arm, k in (("full", 90), ("critical:6", 35), ("noncritical:6", 62))]
    text = defence.table({0.2: {"rows": rows, "scorer": "exact_target", "prompts": 50}}, 6)
    lines = text.splitlines()
    assert "20% poisoned" in lines[0] and "0.0 [10, 20]" in lines[1] and "90.0 [30, 40]" in lines[2]
    assert "62.0 [30, 40]" in lines[3] and "31.3 / 17.7" in lines[3]
    assert "35.0 [30, 40]" in lines[4] and "17 / 9" in lines[4] and "51.3 / 42.7" in lines[4]
    assert "50 prompts x 2 seeds, 6 layers" in lines[5] and max(map(len, lines)) <= 100
