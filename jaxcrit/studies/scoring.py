"""Layers scored by other criteria than δ: one pass for all that need the same, one scores.json for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.core import processes
from jaxcrit.core.deletions import write_deletions
from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerScores, write_scores
from jaxcrit.core.options import Options
from jaxcrit.core.run import running
from jaxcrit.criteria.registry import of_chosen, parse_criteria
from jaxcrit.data.dataset import Dataset
from jaxcrit.data.templates import describe_template
from jaxcrit.evidence.backward import response_gradients
from jaxcrit.evidence.criterion import Criterion, Measured, Needs, Own
from jaxcrit.evidence.forward import forward_pass
from jaxcrit.evidence.weights import weight_changes, weight_spectra
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.model import Bars, Model, open_model
from jaxcrit.parallel.mesh import batch_rows
from jaxcrit.selection.choice import mean_rank
from jaxcrit.studies.options import ScoreOptions


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
    given: Sequence[Options] = (),
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
        given: options of single criteria; those of criteria that are not asked for must stand at their defaults.
        model: model in place of the one that the options name.
        rows: rows in place of those that the options name.
        progress: maker of progress bars (tqdm's signature), or None for silence.
        finish: called with the result before the run counts as complete; it writes the report.
        keep: whether a run directory is written.

    Raises:
        UserError: any mistake in flags, checkpoints or data; then nothing is left in the run directory.
    """
    chosen = parse_criteria(options.criteria, two_models=bool(options.base))
    own = of_chosen(chosen, given)
    needs = {one.needs for one in chosen.values()}
    model = open_model(options.model if model is None else model, mesh=options.mesh, dtype=options.dtype)
    base = open_model(options.base, mesh=model.mesh, dtype=options.dtype) if "two models" in needs else None
    datasets = model.read(options, rows, responses="backward" in needs) if needs & {"forward", "backward"} else []
    models = {"model": model} | ({} if base is None else {"base": base})
    template = describe_template(model.tokenizer, options)
    with running(
        "score",
        options,
        models=models,
        datasets=datasets,
        template=template,
        resolved={"criteria": list(chosen), "dtype": model.dtype},
        further=tuple(own.values()),
        keep=keep,
    ) as run:
        without: dict[str, str] = {}
        of_model = _of_model(chosen, own, model, base, progress)
        of_data = _of_data(options, chosen, own, model, datasets, run.path if run.kept else None, without, progress)
        scores = {
            key: of_model[key] if key in of_model else mean_rank([one[key] for one in of_data.values()])
            for key in chosen
            if key not in without
        }
        warnings = [*_warnings(scores), *(f"{key}: is left out: {why}" for key, why in without.items())]
        found = Scored(scores, of_data, warnings, run.record, run.path if run.kept else None)
        run.record["warnings"] = found.warnings
        if found.out is not None:
            write_scores(found.out / "scores.json", scores)
        if finish is not None:
            finish(found)
    return found


def _needing(needs: Needs, chosen: Mapping[str, Criterion]) -> dict[str, Criterion]:
    return {key: one for key, one in chosen.items() if one.needs == needs}


def _of_model(
    chosen: Mapping[str, Criterion], own: Own, model: Model, base: Model | None, progress: Bars | None
) -> dict[str, LayerScores]:
    """Scores that need no data."""
    evidence: dict[str, Any] = {}
    layers = model.config.num_layers
    if spectral := _needing("weights", chosen):
        with _Bar(progress, layers, "weights") as step:
            evidence |= dict.fromkeys(spectral, weight_spectra(model, step))
    if base is not None:
        with _Bar(progress, layers, "both models") as step:
            evidence |= dict.fromkeys(_needing("two models", chosen), weight_changes(base, model, step))
    meta = model.meta() | ({} if base is None else {"base_hash": base.model_hash})
    results = _measured(chosen, own, evidence)
    return {key: chosen[key].scores(key, one, meta) for key, one in results.items()}


def _measured(
    chosen: Mapping[str, Criterion], own: Own, evidence: Mapping[str, Any], without: dict[str, str] | None = None
) -> dict[str, Measured]:
    """By key, every criterion whose evidence is there.

    A function that serves several keys is called once. A criterion that refuses its evidence goes into ``without``
    with the reason; where that is None, the refusal is raised.
    """
    made: dict[tuple[Any, int], Any] = {}
    found: dict[str, Measured] = {}
    for key in (key for key in chosen if key in evidence):
        call = chosen[key].score, id(evidence[key])
        try:
            if call not in made:
                made[call] = chosen[key].measured(evidence[key], own)
        except UserError as error:
            if without is None:
                raise
            without[key] = str(error)
            continue
        found[key] = made[call][key] if isinstance(made[call], Mapping) else made[call]
    return found


def _of_data(
    options: ScoreOptions,
    chosen: Mapping[str, Criterion],
    own: Own,
    model: Model,
    datasets: Sequence[Dataset],
    out: Path | None,
    without: dict[str, str],
    progress: Bars | None,
) -> dict[str, dict[str, LayerScores]]:
    """Scores of each dataset, written beside each other with their deletions."""
    found: dict[str, dict[str, LayerScores]] = {}
    for dataset in datasets:
        evidence = _evidence(options, chosen, own, model, model.decoder(progress), dataset, progress)
        results = _measured(chosen, own, evidence, None if options.criteria else without)
        meta = {**model.meta(), "dataset": dataset.name, "num_samples": len(dataset.examples)}
        found[dataset.name] = {key: chosen[key].scores(key, one, meta) for key, one in results.items()}
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
    options: ScoreOptions,
    chosen: Mapping[str, Criterion],
    own: Own,
    model: Model,
    decoder: Decoder,
    dataset: Dataset,
    progress: Bars | None,
) -> dict[str, Any]:
    """By key, what its pass finds on a dataset."""
    evidence: dict[str, Any] = {}
    rows, count = batch_rows(options.batch_size, model.mesh), len(dataset.examples)
    if tapped := _needing("forward", chosen):
        with _Bar(progress, count, f"{dataset.name}, forward") as step:
            evidence |= forward_pass(
                model,
                decoder,
                dataset.examples,
                rows,
                tapped,
                own=own,
                precision=options.precision,
                progress=step,
            )
    if trained := _needing("backward", chosen):
        with _Bar(progress, count, f"{dataset.name}, backward") as step:
            gradients = response_gradients(
                model,
                decoder,
                dataset.examples,
                rows,
                per_sample=any(one.per_sample for one in trained.values()),
                precision=options.precision,
                progress=step,
            )
            evidence |= dict.fromkeys(trained, gradients)
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
