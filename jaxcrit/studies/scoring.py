"""Layers scored by other criteria than δ: one pass for all that need the same, one scores.json for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.core import processes
from jaxcrit.core.deletions import write_deletions
from jaxcrit.core.layers import LayerScores, write_scores
from jaxcrit.core.run import running
from jaxcrit.criteria.registry import LAYER_CRITERIA, Needs, needed, parse_criteria
from jaxcrit.data.dataset import Dataset
from jaxcrit.data.templates import describe_template
from jaxcrit.evidence.backward import response_gradients
from jaxcrit.evidence.criterion import Measured
from jaxcrit.evidence.forward import prompt_states
from jaxcrit.evidence.weights import weight_changes, weight_spectra
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.model import Bars, Model, open_model
from jaxcrit.selection.choice import mean_rank
from jaxcrit.studies.options import ScoreOptions

_OF_MODEL: tuple[Needs, ...] = ("weights", "two models")


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """A finished run.

    Attributes:
        scores: by key; of several datasets their mean ranks, for criteria that need data.
        datasets: by dataset, what needs its data.
        warnings: what would mislead a reader.
        run: what ``run.json`` holds.
        out: run directory; None where nothing is written.
    """

    scores: dict[str, LayerScores]
    datasets: dict[str, dict[str, LayerScores]]
    warnings: list[str]
    run: dict[str, Any]
    out: Path | None


def run_score(
    options: ScoreOptions,
    *,
    model: Any = None,
    rows: Any = None,
    progress: Bars | None = None,
    finish: Callable[[Scored], Any] | None = None,
    keep: bool = True,
) -> Scored:
    """Runs ``jaxcrit score`` and writes ``scores.json`` and ``deletions.npz``.

    Args:
        options: what is asked.
        model: model in place of the one that the options name.
        rows: rows in place of those that the options name.
        progress: maker of progress bars (tqdm's signature), or None for silence.
        finish: called with the result before the run counts as complete; it writes the report.
        keep: whether a run directory is written.

    Raises:
        UserError: any mistake in flags, checkpoints or data; then nothing is left in the run directory.
    """
    keys = parse_criteria(options.criteria, two_models=bool(options.base))
    needs = needed(keys)
    model = open_model(options.model if model is None else model, mesh=options.mesh, dtype=options.dtype)
    base = open_model(options.base, mesh=model.mesh, dtype=options.dtype) if "two models" in needs else None
    training = "gradients" in needs
    datasets = model.read(options, rows, responses=training) if needs - set(_OF_MODEL) else []
    models = {"model": model} | ({} if base is None else {"base": base})
    resolved = {"criteria": list(keys), "dtype": model.dtype}
    template = describe_template(model.tokenizer, options)
    with running(
        "score",
        options,
        models=models,
        datasets=datasets,
        template=template,
        resolved=resolved,
        keep=keep,
    ) as run:
        of_model = _of_model(keys, model, base, progress)
        of_data = _of_data(options, keys, model, datasets, run.path if run.kept else None, progress)
        joined = {key: mean_rank([scores[key] for scores in of_data.values()]) for key in keys if key not in of_model}
        scores = {key: {**of_model, **joined}[key] for key in keys}
        found = Scored(scores, of_data, _warnings(scores), run.record, run.path if run.kept else None)
        run.record["warnings"] = found.warnings
        if found.out is not None:
            write_scores(found.out / "scores.json", scores)
        if finish is not None:
            finish(found)
    return found


def _meta(session: Model) -> dict[str, Any]:
    return {"model_type": session.config.family, "model_hash": session.model_hash}


def _of_model(keys: Sequence[str], session: Model, base: Model | None, progress: Bars | None) -> dict[str, LayerScores]:
    """Scores that need no data."""
    evidence: dict[str, Any] = {}
    needs, layers = needed(keys), session.config.num_layers
    if "weights" in needs:
        with _Bar(progress, layers, "weights") as step:
            evidence["weights"] = weight_spectra(session, step)
    if base is not None:
        with _Bar(progress, layers, "both models") as step:
            evidence["two models"] = weight_changes(base, session, step)
    meta = _meta(session) | ({} if base is None else {"base_hash": base.model_hash})
    return {key: LAYER_CRITERIA[key].scores(key, one, meta) for key, one in _measured(keys, evidence).items()}


def _measured(keys: Sequence[str], evidence: Mapping[str, Any]) -> dict[str, Measured]:
    """By key, every criterion whose evidence is there."""
    there = {key: LAYER_CRITERIA[key] for key in keys if LAYER_CRITERIA[key].needs in evidence}
    return {key: one.function(evidence[one.needs]) for key, one in there.items()}


def _of_data(
    config: ScoreOptions, keys: Sequence[str], session: Model, datasets: Sequence[Dataset], out: Path | None,
    progress: Bars | None,
) -> dict[str, dict[str, LayerScores]]:  # fmt: skip
    """Scores of each dataset, written beside each other with their deletions."""
    found: dict[str, dict[str, LayerScores]] = {}
    decoder: Decoder | None = None
    for dataset in datasets:
        decoder = decoder or session.decoder(progress)
        results = _measured(keys, _evidence(config, keys, session, decoder, dataset, progress))
        meta = {**_meta(session), "dataset": dataset.name, "num_samples": len(dataset.examples)}
        found[dataset.name] = {key: LAYER_CRITERIA[key].scores(key, one, meta) for key, one in results.items()}
        if out is None:
            continue
        folder = out if len(datasets) == 1 else out / dataset.name
        processes.make_directory(folder)
        if len(datasets) > 1:
            write_scores(folder / "scores.json", found[dataset.name])
        left = {key: one.without_each for key, one in results.items() if one.without_each is not None}
        if left:
            write_deletions(folder, left, dataset.sample_ids)
    return found


def _evidence(
    config: ScoreOptions, keys: Sequence[str], session: Model, decoder: Decoder, dataset: Dataset,
    progress: Bars | None,
) -> dict[str, Any]:  # fmt: skip
    evidence: dict[str, Any] = {}
    split = session.mesh.shape["data"] * session.mesh.shape["fsdp"]
    rows, count = -(-config.batch_size // split) * split, len(dataset.examples)
    if "states" in needed(keys):
        with _Bar(progress, count, f"{dataset.name}, forward") as step:
            evidence["states"] = prompt_states(
                session, decoder, dataset.examples, rows,
                lens="lens_kl" in keys, precision=config.precision, progress=step,
            )  # fmt: skip
    if "gradients" in needed(keys):
        with _Bar(progress, count, f"{dataset.name}, backward") as step:
            evidence["gradients"] = response_gradients(
                session, decoder, dataset.examples, rows,
                per_sample="fisher" in keys, precision=config.precision, progress=step,
            )  # fmt: skip
    return evidence


class _Bar:
    """A progress bar as a context, or nothing where none is wanted."""

    def __init__(self, bars: Bars | None, total: int, name: str):
        self.bar = None if bars is None else bars(total=total, desc=name)

    def __enter__(self) -> Any:
        return None if self.bar is None else lambda done, total: self.bar.update(done - self.bar.n)

    def __exit__(self, *exception: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _warnings(scores: Mapping[str, LayerScores]) -> list[str]:
    found = []
    for key, score in scores.items():
        invalid = np.flatnonzero(~score.valid)
        if len(invalid):
            found.append(f"{key}: has no finite value in layers {', '.join(map(str, invalid))}; they are left out")
        elif np.ptp(score.values) == 0:
            found.append(f"{key}: is the same in every layer, and chooses none")
    return found
