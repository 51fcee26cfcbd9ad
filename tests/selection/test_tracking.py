"""CCA curves as scores, and which of several tracks δ; the paper's own curves among them."""

import csv

import numpy as np
import pytest
from conftest import SHARED
from scipy.stats import spearmanr
from support import oracles

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerScores
from jaxcrit.criteria.delta import component_scores, measure_scores
from jaxcrit.selection.tracking import tracking
from jaxcrit.similarity import cca, centred_grams, decompose

PAPER = SHARED / "paper"


def score(name, values):
    values = np.asarray(values, float)
    return LayerScores(name, values, np.isfinite(values), "low")


def test_cca_of_the_neighbours():
    """Mean over the layers at distance 1 and 2, the layer itself left out; edges stay empty."""
    hidden = oracles.states(samples=40, layers=8, planted=4)
    spectrum = decompose(centred_grams(hidden))
    scores = component_scores(spectrum, (1, 3), meta={"dataset": "x"})
    assert list(scores) == ["cca_1", "cca_3"]
    for k in (1, 3):
        matrix, found = cca(spectrum, k), scores[f"cca_{k}"]
        assert found.valid.tolist() == [False] * 2 + [True] * 4 + [False] * 2 and np.isnan(found.values[:2]).all()
        for layer in range(2, 6):
            expected = np.mean([matrix[layer, layer + offset] for offset in (-2, -1, 1, 2)])
            assert found.values[layer] == pytest.approx(expected)
        assert (found.stderr[2:6] > 0).all() and found.meta["components"] == k and found.direction == "low"
    assert component_scores(decompose(centred_grams(hidden), 3), (3,), errors=False, meta={})["cca_3"].stderr is None


def test_standard_errors_are_those_of_fresh_samples():
    """Against the spread of CCA over draws of new samples from one population with well separated components."""
    rng = np.random.default_rng(0)
    scale = np.array([8.0, 5.0, 3.0, 0.4, 0.3, 0.2])
    mix = [np.linalg.qr(rng.standard_normal((6, 6)))[0] for _ in range(3)]

    def draw():
        state = rng.standard_normal((60, 6))
        layers = []
        for turn in mix:
            state = 0.9 * state + np.sqrt(1 - 0.81) * rng.standard_normal((60, 6))
            layers.append((state * scale) @ turn)
        return np.stack([oracles.gram(x) for x in layers])

    spread, errors = [], []
    for _ in range(150):
        found = component_scores(decompose(draw()), (3,), window=3, meta={})["cca_3"]
        spread.append(found.values[1])
        errors.append(found.stderr[1])
    assert 0.85 < np.mean(errors) / np.std(spread) < 1.2


def test_delta_of_a_measure():
    matrix = np.eye(6) + 0.5 * (1 - np.eye(6))
    found = measure_scores({"rsa": matrix}, window=3, include_self=False, meta={"dataset": "x"})
    assert list(found) == ["delta_rsa"] and found["delta_rsa"].meta["measure"] == "rsa"
    np.testing.assert_allclose(found["delta_rsa"].values[1:5], 0.5)
    assert found["delta_rsa"].valid.tolist() == [False, True, True, True, True, False]


def test_the_best_of_several_pays_for_the_choice():
    """p of the best counts the shifts at which any curve does as well."""
    rng = np.random.default_rng(3)
    reference = score("delta", rng.standard_normal(24))
    curves = [score(f"cca_{k}", rng.standard_normal(24)) for k in range(1, 9)]
    found = tracking(reference, curves)
    rhos = [spearmanr(reference.values, curve.values).statistic for curve in curves]
    assert found.best == curves[int(np.argmax(rhos))].name
    shifts = [max(abs(spearmanr(np.roll(reference.values, s), c.values).statistic) for c in curves) for s in range(24)]
    assert found.p_best == pytest.approx(np.mean(np.array(shifts) >= max(rhos) - 1e-12))
    assert found.p_best >= found.correlations[found.best].p_shift
    same = tracking(reference, [score("cca_99", reference.values), *curves])
    assert same.best == "cca_99" and same.p_best == pytest.approx(1 / 24)
    with pytest.raises(UserError, match="same value"):
        tracking(reference, [score("cca_1", np.ones(24))])


@pytest.mark.skipif(not PAPER.is_dir(), reason=f"the paper's numbers are not at {PAPER}")
def test_the_papers_curves():
    """Spearman's ρ with δ that follows from the paper's own figure: the top-3 curve 0.87, top-10 0.71, top-1 -0.32."""

    def columns(name):
        with open(PAPER / name, newline="") as file:
            return list(csv.DictReader(file))

    curves, deltas = (
        columns("llama2_7b_chat_dolly_cca_topk_digitised.csv"),
        columns("llama2_7b_chat_delta5_figures.csv"),
    )

    def full(rows, field):
        values = np.full(32, np.nan)
        for row in rows:
            values[int(row["center_layer"])] = float(row[field])
        return values

    reference = score("delta", full(deltas, "dolly"))
    found = tracking(reference, [score(f"cca_{k}", full(curves, f"top{k}")) for k in (1, 3, 10)])
    rhos = {name: one.rho for name, one in found.correlations.items()}
    ps = {name: one.p_shift for name, one in found.correlations.items()}
    print(f"the paper's curves: rho {rhos}, circular-shift p {ps}, best {found.best}, p {found.p_best:.3f}")
    for name, expected in {"cca_1": -0.32, "cca_3": 0.87, "cca_10": 0.71}.items():
        assert rhos[name] == pytest.approx(expected, abs=0.02), rhos
    assert found.best == "cca_3"
