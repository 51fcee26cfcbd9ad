"""What is warned about and, as much, what is not: each threshold from both sides."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.selection.cautions import cautions, correlation_cautions
from jaxcrit.selection.correlation import Correlation
from jaxcrit.selection.leverage import Leverage

DEPTH = 9


def result(error=0.01, null=0.1, p=0.01, certain=None, share=None, **meta):
    """A result that nothing is to be said about, but for what is given."""
    score = LayerScores(
        "delta_debiased", np.arange(DEPTH) / DEPTH, np.full(DEPTH, True), "low", np.full(DEPTH, error),
        {"num_samples": 300} | meta,
    )  # fmt: skip
    cka = {"null_mean": np.full((DEPTH, DEPTH), null), "null_p": np.full((DEPTH, DEPTH), p)}
    most = None
    if share is not None:
        most = Leverage(np.zeros(DEPTH, int), np.linspace(-1, 0.5, DEPTH), np.full(DEPTH, 0.1))
        most.share[4] = share
    certainty = None if certain is None else SimpleNamespace(probability=np.full(DEPTH, certain))
    chosen = LayerSet((4,), "delta_debiased", "critical:1", DEPTH)
    return SimpleNamespace(
        scores={"delta_debiased": score}, cka=cka, chosen=chosen, certainty=certainty, leverage=most, sample_ids=["one"]
    )


def said(**given):
    dtype = given.pop("dtype", "float32")
    return cautions(result(**given), trim=2, dtype=dtype)


@pytest.mark.parametrize(
    ("below", "above", "line"),
    [
        ({"null": 0.5}, {"null": 0.51}, "biased CKA is inflated: unrelated layers would score 0.51 (layer 1) at 300"),
        ({"error": 0.29}, {"error": 0.3}, "flat δ curve: its range 0.8889 is within 3 standard errors (0.3000)"),
        ({"p": 0.05}, {"p": 0.051}, "layers 1-8 are no more like the layer before"),
        ({"certain": 0.5}, {"certain": 0.49}, "not determined by 300 samples: layer 4 is chosen in less than half"),
        ({"share": 0.5}, {"share": 0.51}, "one prompt makes up 51% of the variance of δ: prompt 0"),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, "the forward pass ran in bfloat16: scores carry its rounding"),
        (
            {"trained": None},
            {"trained": {"layers": [2, 3], "criteria": ["delta"]}},
            "only layers 2-3 of this model were trained, chosen by delta",
        ),
    ],
)
def test_a_line_of_its_own_from_its_threshold_on(below, above, line):
    assert said(**below) == []
    (found,) = said(**above)
    assert line in found


def test_the_layer_of_the_largest_null_is_named():
    one = result()
    one.cka["null_mean"][4, 5], one.cka["null_mean"][6, 7] = 0.7, 0.6
    (line,) = cautions(one, trim=2)
    assert "would score 0.70 (layer 5) at 300" in line


def test_prompts_of_layers_that_are_not_in_question():
    one = result(share=0.9, certain=0.6)
    one.leverage.share[:] = 0.9
    one.certainty.probability[:4], one.certainty.probability[5:] = 0.01, 0.011
    (line,) = cautions(one, trim=2)
    assert "at layers 4-8; without it δ of layer 8 changes by +0.5000" in line
    one.certainty = None
    (line,) = cautions(one, trim=3)
    assert "at layers 3-5; without it δ of layer 3" in line


PAIR = Correlation(
    num_layers=24, first=0, last=23, rho=-0.5, tau=-0.4, p_naive=0.06, p_shift=0.2, p_block=0.2, block=2, partial=-0.4,
    p_partial=0.2, depth=(0.1, -0.1), smallest=0.404,
)  # fmt: skip


@pytest.mark.parametrize(
    ("below", "above", "line"),
    [
        ({"num_layers": 20}, {"num_layers": 19}, "19 layers cannot bring the circular-shift p below 0.053"),
        ({}, {"p_naive": 0.04}, "the naive p of 4.0e-02 comes of neighbouring layers being alike: 20% of the circular"),
        ({"p_naive": 0.04, "p_shift": 0.05}, {"p_naive": 0.04, "p_shift": 0.06}, "the naive p of 4.0e-02 comes of"),
        ({"depth": (0.49, 0.1)}, {"depth": (0.5, 0.1)}, "depth alone predicts A (ρ 0.500) no worse than B does"),
        ({"depth": (0.1, -0.49)}, {"depth": (0.1, -0.5)}, "depth alone predicts B (ρ -0.500) no worse than A does"),
        ({}, {"partial": np.nan}, "monotone in depth leaves nothing to correlate given depth"),
        (
            {"num_layers": 24},
            {"num_layers": 7},
            "7 layers say little: even if they were independent, only |ρ| of",
        ),
    ],
)
def test_correlations(below, above, line):
    rng = np.random.default_rng(0)
    both = [LayerScores(name, rng.standard_normal(24), np.full(24, True), "low") for name in "ab"]
    assert correlation_cautions(dataclasses.replace(PAIR, **below), "AB", both) == []
    found = correlation_cautions(dataclasses.replace(PAIR, **above), "AB", both)
    # Of few layers the null's floor is told as well.
    assert line in found[0] and len(found) == (2 if above.get("num_layers") == 7 else 1)


def test_ties_and_training_are_told_of_each_score():
    values = np.arange(24.0)
    values[:6] = 0
    tied = LayerScores("a", values, np.full(24, True), "low")
    trained = LayerScores(
        "b", np.arange(24.0), np.full(24, True), "low", None, {"trained": {"layers": [3], "criteria": ["step"]}}
    )
    found = correlation_cautions(PAIR, ("A", "B"), (tied, trained))
    assert len(found) == 2 and found[0].startswith("A: 25% of its layers share") and found[1].startswith("B: only")
    values[5] = 5.5
    assert len(correlation_cautions(PAIR, ("A", "B"), (tied, trained))) == 1
