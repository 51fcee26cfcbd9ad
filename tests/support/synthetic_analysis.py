"""An analysis made up from a formula: two blocks of alike layers with a transition between them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.core.selections import LayerSpec, resolve
from jaxcrit.criteria.delta import delta
from jaxcrit.selection.confidence import Certainty, SampleSizes


@dataclasses.dataclass(frozen=True)
class Dataset:
    name: str
    num_samples: int
    scores: dict[str, LayerScores]
    cka: dict[str, np.ndarray]
    chosen: LayerSet
    certainty: Certainty | None
    warnings: list[str]


@dataclasses.dataclass(frozen=True)
class Analysis:
    run: dict[str, Any]
    datasets: dict[str, Dataset]
    consensus: LayerScores | None
    chosen: LayerSet
    certainty: Certainty | None
    out: Path


META = {"model_type": "llama", "model_hash": "0123456789abcdef"}


def dataset(name: str = "alpaca", num_layers: int = 32, transition: float = 12.0, warnings: tuple[str, ...] = ()):
    """CKA of layers that lie on a curve which moves fast near ``transition``."""
    layers = np.arange(num_layers)
    place = layers / num_layers + 2.5 / (1 + np.exp(-(layers - transition) / 1.5))
    debiased = np.exp(-((place[:, None] - place[None]) ** 2))
    biased = 0.3 * debiased + 0.7 + 0.0 * debiased
    np.fill_diagonal(biased, 1.0)
    null = np.full_like(debiased, 0.88)
    scores = {}
    for key, matrix in (("delta", biased), ("delta_debiased", debiased)):
        values, valid = delta(matrix, 5, True)
        scores[key] = LayerScores(key, values, valid, "low", np.where(valid, 0.02 * (1.05 - values), np.nan), META)
    for key, matrix in (("step", biased), ("step_debiased", debiased)):
        values = np.concatenate([[np.nan], np.diagonal(matrix, 1)])
        scores[key] = LayerScores(key, values, layers > 0, "low", None, META)
    chosen = resolve(LayerSpec.parse("critical"), num_layers, scores=scores["delta_debiased"])
    cka = {"biased": biased, "debiased": debiased, "null_mean": null}
    return Dataset(name, 300, scores, cka, chosen, certainty(chosen), list(warnings))


def certainty(chosen: LayerSet, num_prompts: int = 300, least: float = 0.93) -> Certainty:
    """Of a choice that is made this often."""
    probability = np.where(np.isin(np.arange(chosen.num_layers), chosen.layers), least, 0.02)
    same = np.array([0.3, 0.5, 0.7, 0.9, 0.96, 0.99, 1.0])
    sizes = SampleSizes(np.array([75, 150, 300, 600, 1200, 2400, 4800]) * num_prompts // 300, same, (1 + same) / 2)
    return Certainty(num_prompts, probability, chosen.layers[:2], sizes)


def analysis(out: Path, names: tuple[str, ...] = ("alpaca",), num_layers: int = 32, warnings: tuple[str, ...] = ()):
    """One dataset, or several whose transitions lie a layer apart."""
    datasets = {
        name: dataset(name, num_layers, 0.35 * num_layers + shift, warnings) for shift, name in enumerate(names)
    }
    ranks = [d.scores["delta_debiased"].values.argsort().argsort() for d in datasets.values()]
    valid = next(iter(datasets.values())).scores["delta"].valid
    consensus = LayerScores("delta_debiased", np.where(valid, np.mean(ranks, 0), np.nan), valid, "low")
    chosen = next(iter(datasets.values())).chosen
    if len(datasets) > 1:
        chosen = resolve(LayerSpec.parse("critical"), num_layers, scores=consensus)
        for name in names:
            (out / name).mkdir(parents=True, exist_ok=True)
    run = {
        "command": "analyze",
        "config": {"model": "<b>dir</b>", "window": 5, "include_self": True, "trim": 2, "bias": "debiased", "out": ""},
        "versions": {"jax": "0.10.2"},
        "model_hash": META["model_hash"],
    }
    return Analysis(run, datasets, consensus, chosen, certainty(chosen, 300 * len(names)), out)
