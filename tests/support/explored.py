"""Runs as `jaxcrit analyze` leaves them, made up from a formula, for what reads many of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support import synthetic_analysis

from jaxcrit.core.files import write_json, write_npz
from jaxcrit.core.groups import AnalyzeOptions
from jaxcrit.core.layers import write_scores
from jaxcrit.core.run import Facts, running


def write_run(
    folder: Path, *, num_layers: int = 16, seed: int = 0, dataset: str = "alpaca", model: str = "small"
) -> Path:
    """A complete run of one dataset, with digests."""
    rng = np.random.default_rng(seed)
    made = synthetic_analysis.dataset(dataset, num_layers, num_layers * rng.uniform(0.3, 0.6))
    noise = rng.uniform(0, 0.01, (num_layers, num_layers))
    cka = {
        name: np.where(np.eye(num_layers), 1.0, matrix * 0.95 + noise + noise.T) for name, matrix in made.cka.items()
    }
    cka["null_stddev"] = np.where(np.eye(num_layers), 0.0, 0.01 + noise + noise.T)
    facts = {"path": f"models/{model}", "hash": model, "family": "llama", "num_layers": num_layers}
    rows = Facts(dataset, {"num_samples": made.num_samples, "hash": f"{dataset} {seed}"})
    shape = {"model_hash": model, "num_samples": 300, "dataset": dataset}
    with running(
        "analyze", AnalyzeOptions(out=str(folder)), models={"model": Facts(model, facts)}, datasets=[rows]
    ) as run:
        for name, score in made.scores.items():
            bias = "debiased" if "debiased" in name else "biased"
            score.values[score.valid] += rng.normal(0, 0.002, score.valid.sum())
            made.scores[name].__dict__["meta"] = {**shape, "bias": bias, "window": 5, "include_self": True}
        write_scores(run.path / "scores.json", made.scores)
        write_npz(run.path / "cka.npz", cka, {"format": "jaxcrit.cka", "format_version": 1})
        made.chosen.save(run.path / "layers.json")
        assert made.certainty is not None
        content = {"criterion": made.chosen.criterion, "rule": made.chosen.rule, "choice": made.certainty.to_json()}
        write_json(run.path / "uncertainty.json", "jaxcrit.uncertainty", content)
    return folder
