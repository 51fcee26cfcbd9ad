"""Runs as `jaxcrit analyze` leaves them, made up from a formula, for what reads many of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from jaxcrit.core.files import write_json, write_npz
from jaxcrit.core.groups import AnalyzeOptions
from jaxcrit.core.layers import write_scores
from jaxcrit.core.run import Facts, running
from support import synthetic_analysis


def write_run(
    folder: Path, *, num_layers: int = 16, seed: int = 0, dataset: str = "alpaca", model: str = "small"
) -> Path:
    """A complete run of one dataset, with digests."""
    rng = np.random.default_rng(seed)
    made = synthetic_analysis.dataset(dataset, num_layers, num_layers * rng.uniform(0.3, 0.6))
    noise = rng.uniform(0, 0.01, (num_layers, num_layers))
    noise += noise.T
    # Exponentials of a vector differ in the last bit by where they stand in it; CKA is symmetric to the last one.
    cka = {name: 0.475 * (matrix + matrix.T) + noise for name, matrix in made.cka.items()}
    for name, itself in {**dict.fromkeys(cka, 1.0), "null_stddev": 0.0}.items():
        cka[name] = np.where(np.eye(num_layers), itself, cka.get(name, 0.01 + noise))
    facts = {"path": f"models/{model}", "hash": model, "family": "llama", "num_layers": num_layers}
    rows = Facts(dataset, {"num_samples": made.num_samples, "hash": f"{dataset} {seed}"})
    shape = {"model_hash": model, "num_samples": 300, "dataset": dataset, "window": 5, "include_self": True}
    with running(
        "analyze", AnalyzeOptions(out=str(folder)), models={"model": Facts(model, facts)}, datasets=[rows]
    ) as run:
        scores = {}
        for name, score in made.scores.items():
            meta = {**shape, "bias": "debiased" if "debiased" in name else "biased"}
            values = score.values + rng.normal(0, 0.002, num_layers)
            scores[name] = dataclasses.replace(score, values=values, meta=meta)
        write_scores(run.path / "scores.json", scores)
        write_npz(run.path / "cka.npz", cka, {"format": "jaxcrit.cka", "format_version": 1})
        made.chosen.save(run.path / "layers.json")
        assert made.certainty is not None
        content = {"criterion": made.chosen.criterion, "rule": made.chosen.rule, "choice": made.certainty.to_json()}
        write_json(run.path / "uncertainty.json", "jaxcrit.uncertainty", content)
    return folder
