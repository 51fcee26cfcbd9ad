"""The shares and the table of the adaptation experiment, of made-up curves."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def adaptation():
    path = Path(__file__).parents[2] / "experiments" / "domain_adaptation.py"
    spec = importlib.util.spec_from_file_location("domain_adaptation", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["domain_adaptation"] = module
    spec.loader.exec_module(module)
    return module


def made(module, arm, seed, end, layers=(2, 3)):
    points = [(0, 3.0), (10, end)]
    return module.Curve(arm, seed, list(layers), points, points)


def test_shares_are_paired_by_seed(adaptation):
    curves = [
        made(adaptation, "full", 0, 1.0),
        made(adaptation, "full", 1, 2.0),
        made(adaptation, "critical", 0, 2.0),
        made(adaptation, "critical", 1, 2.5),
        made(adaptation, "random", 4, 1.5),
    ]
    np.testing.assert_allclose(adaptation.shares(curves, "critical"), [0.5, 0.5])
    np.testing.assert_allclose(adaptation.shares(curves, "random"), [1.0])  # no full run of seed 4: over their mean
    text = adaptation.table(curves)
    assert "0.500 ± 0.000" in text and "0.96, 0.94" in text and max(map(len, text.splitlines())) <= 100
    assert adaptation.mean_curves(curves)["full"] == [(0, 3.0), (10, 1.5)]


def test_interval_is_students(adaptation):
    assert adaptation.interval(np.array([1.0, 2.0, 3.0])) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(adaptation.interval(np.array([1.0])))
