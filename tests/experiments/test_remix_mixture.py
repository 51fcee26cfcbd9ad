"""The mixture that is made of a dense model, and how re-mixing of several is told."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from support.family_models import error
from support.tiny_training import RAW, random_weights

from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder, forward, logits
from jaxcrit.models.mixture import ROUTING

DENSE = {**RAW, "rope_theta": 10000.0, "rms_norm_eps": 1e-5}  # which Mixtral would have otherwise
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def experiment():
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        spec = importlib.util.spec_from_file_location("remix_experiment", EXPERIMENTS / "remix_mixture.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXPERIMENTS))
    return module


@pytest.mark.parametrize("experts", [2, 4])
def test_upcycled_is_the_dense_model_until_it_is_broken(experiment, experts):
    making, dense = experiment.train_demo_mixture, random_weights()
    config = ModelConfig.from_hf(making.mixture_config(DENSE, experts))
    weights = making.upcycled(dense, experts, seed=3)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (3, 12)))

    def scores(config, weights):
        decoder = Decoder(config, {path: jnp.asarray(value) for path, value in weights.items()})
        out = forward(decoder, tokens, tap=ROUTING if config.experts else None)
        return np.asarray(logits(decoder, out.hidden)), out.taps

    expected, (found, taps) = scores(ModelConfig.from_hf(DENSE), dense)[0], scores(config, weights)
    assert error(found, expected) < 1e-5
    shares = taps["router"].shares
    assert (shares.std(axis=-1) > 1e-3).all(), "routers tell experts apart"
    other, _ = scores(config, making.broken(weights, making.NOISE, seed=3))
    assert error(other, expected) > 1e-2
    np.testing.assert_array_equal(making.broken(weights, 0.0, 3)["blocks.up"], weights["blocks.up"])


def test_rows_of_a_seed(experiment):
    one, other = (experiment.rows_of("train", 20, seed) for seed in (0, 1))
    assert one != other and {row["family"] for row in one} == {"arithmetic"}
    assert not {row["prompt"] for row in one} & {row["prompt"] for row in experiment.rows_of("test", 20, 0)}


def test_pooled_over_mixtures_and_rows(experiment):
    def of(before, after):
        rows = [
            {
                "before": {"exact": bool(b), "loss": 1.0 - b / 2},
                "after": {"mean": {"exact": bool(a), "loss": 1.0 - a / 4}},
            }
            for b, a in zip(before, after, strict=True)
        ]
        return SimpleNamespace(rows=rows)

    runs = [of([0, 1, 0, 1], [1, 1, 0, 1]), of([0, 0, 1, 1], [1, 0, 0, 1])]
    found = experiment.pooled(runs, "mean")
    assert (found["won"], found["lost"], found["p"], found["exact"]) == (2, 1, 1.0, 0.625)
    assert found["exact_change"][0] == 0.125 and found["exact_by_seed"] == [0.75, 0.5]
    assert found["exact_change"][1] <= 0.125 <= found["exact_change"][2]
    assert found["loss_change"][0] == pytest.approx((1 - 0.625 / 4) - (1 - 0.5 / 2))
    base = experiment.pooled(runs, "")
    assert base["exact"] == 0.5 and base["exact_change"] == [0, 0, 0] and base["name"] == "model as it is"
    assert experiment.line(found)[:2] == ["mean", "0.625"] and experiment.line(found)[3:6] == ["2", "1", "1.000"]


def test_what_is_run_can_be_asked(experiment):
    for asked in experiment.RUNS.values():
        options = experiment.RemixOptions(**asked)
        assert dataclasses.asdict(options)["layers"] in ("last:5", "all")


def test_a_method_beside_its_control_row_by_row(experiment):
    def run(*answers):
        return SimpleNamespace(rows=[{"after": {"mean": {"exact": a}, "own": {"exact": b}}} for a, b in answers])

    found = experiment.beside([run((1, 0), (1, 1), (0, 1)), run((1, 0), (1, 0), (0, 0))], "mean", "own")
    assert (found["won"], found["lost"], found["change"][0]) == (3, 1, 2 / 6)
    assert found["change"][1] <= 2 / 6 <= found["change"][2] and found["p"] == 0.625
