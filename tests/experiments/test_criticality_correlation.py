"""The table of the criticality experiment, of made-up curves, and its rows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxcrit.core.layers import LayerScores
from jaxcrit.selection import correlate


@pytest.fixture(scope="module")
def experiment():
    path = Path(__file__).parents[2] / "experiments" / "criticality_correlation.py"
    spec = importlib.util.spec_from_file_location("criticality_correlation", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["criticality_correlation"] = module
    spec.loader.exec_module(module)
    return module


def test_every_row_has_its_controls(experiment):
    rng = np.random.default_rng(0)
    depth = np.arange(16.0)
    delta, loss = depth + rng.normal(0, 2, 16), -depth + rng.normal(0, 2, 16)
    pair = correlate(*(LayerScores(n, v, np.full(16, True), "low") for n, v in (("delta", delta), ("loss", loss))))
    rows = [experiment.Row("closed", 3.0, 1.0, pair, pair, -0.849), experiment.Row("order", 9.0, 1.0, pair, pair, None)]
    text = experiment.table(rows, "Llama-2-7B-Chat")
    assert max(map(len, text.splitlines())) <= 100
    first = next(line for line in text.splitlines() if line.endswith("closed")).split()
    shown = [f"{value:.2f}" for value in (pair.rho, *pair.depth, pair.partial)]
    assert all(value in first for value in shown) and "-0.849" in first
    assert "never below 0.062" in text


def test_published_values_are_the_papers(experiment):
    """Every value of Table 2 stands under its dataset."""
    assert dict(zip(experiment.DATASETS, experiment.TABLE_2["Llama-2-7B base"], strict=True)) == {
        "alpaca": -0.311,
        "dolly": -0.278,
        "gsm8k": -0.114,
        "boolq": -0.246,
        "openbookqa": 0.147,
    }
    assert all(-1 < value < -0.5 for row in list(experiment.TABLE_2.values())[:-1] for value in row)


def test_training_and_test_rows_are_apart(experiment, tmp_path):
    train, test = experiment.generated(tmp_path, "order", 40, 20)
    lines = [set(Path(path).read_text().splitlines()) for path in (train, test)]
    assert [len(part) for part in lines] == [40, 20] and not lines[0] & lines[1]
