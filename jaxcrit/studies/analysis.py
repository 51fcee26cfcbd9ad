"""The main job: from a checkpoint and prompts to layer scores, critical layers, and how sure they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.core import processes
from jaxcrit.core.deletions import write_deletions
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import write_json, write_npz
from jaxcrit.core.groups import AnalyzeOptions, TrainingOptions
from jaxcrit.core.layers import LayerScores, LayerSet, write_scores
from jaxcrit.core.run import running
from jaxcrit.core.selections import LayerSpec, resolve
from jaxcrit.criteria.delta import CURVES, curves, measure_scores
from jaxcrit.data.dataset import Dataset, text_of
from jaxcrit.data.published import names_published
from jaxcrit.evidence.captures import Captures, Swept
from jaxcrit.evidence.measures import measured
from jaxcrit.evidence.states import GivenModel, HiddenStates, model_of
from jaxcrit.evidence.states_files import read_all
from jaxcrit.models.model import Bars, Model, open_model
from jaxcrit.selection.cautions import cautions
from jaxcrit.selection.choice import mean_rank
from jaxcrit.selection.confidence import UNCERTAINTY_FORMAT, Certainty, certainty
from jaxcrit.selection.leverage import Leverage, leverage
from jaxcrit.similarity import from_tables, parse_measures, participation_ratio, permutation_null

_TRAINING_PROMPTS = 300


@dataclasses.dataclass(frozen=True, eq=False)
class DatasetResult:
    """What one dataset says.

    Attributes:
        name: name of the dataset.
        num_samples: N.
        scores: by score key.
        measures: by name, ``[L, L]``; what ``--measures`` asked for.
        cka: ``biased``, ``debiased``, ``null_mean`` (what unrelated layers would score by the biased one), ``[L, L]``;
            where samples are prompts also ``null_stddev`` and ``null_p``, how likely they would score as much.
        chosen: layers this dataset alone would choose.
        certainty: certainty of the choice; None for fixed layers, and where too few prompts are left to estimate it.
        leverage: the prompt that moves each layer's selecting score most; None where not estimated.
        participation_ratio: ``[L]``, how many directions carry a layer.
        warnings: what would mislead a reader.
        without_each: ``[U, L]`` the selecting score with each prompt left out; None where not estimated.
        deletions: the same of every score that has it.
        sample_ids: id of each prompt.
    """

    name: str
    num_samples: int
    scores: dict[str, LayerScores]
    measures: dict[str, np.ndarray]
    cka: dict[str, np.ndarray]
    chosen: LayerSet
    certainty: Certainty | None
    leverage: Leverage | None
    participation_ratio: np.ndarray
    warnings: list[str]
    without_each: np.ndarray | None
    deletions: dict[str, np.ndarray]
    sample_ids: list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """A finished run.

    Attributes:
        config: what was asked.
        run: what ``run.json`` holds.
        datasets: by name, in the order given.
        scores: by score key: the dataset's own, or mean ranks over several.
        chosen: the layers.
        certainty: certainty of the choice over all datasets, or None.
        out: run directory; None where nothing is written.
    """

    config: AnalyzeOptions
    run: dict[str, Any]
    datasets: dict[str, DatasetResult]
    scores: dict[str, LayerScores]
    chosen: LayerSet
    certainty: Certainty | None
    out: Path | None

    @property
    def consensus(self) -> LayerScores | None:
        """Mean ranks over several datasets by the score that selects; None for one dataset."""
        key = _selecting(self.config, LayerSpec.parse(self.config.layers))
        return self.scores[key] if len(self.datasets) > 1 else None


def run_analysis(
    options: AnalyzeOptions,
    *,
    model: Any = None,
    rows: Any = None,
    progress: Bars | None = None,
    finish: Callable[[Analysis], Any] | None = None,
    keep: bool = True,
    split: str = "",
) -> Analysis:
    """Runs ``jaxcrit analyze``: captures, scores, selects, and writes the run directory's data files.

    Args:
        options: what is asked.
        model: model in place of the one that the options name.
        rows: rows, or `HiddenStates`, in place of those that the options name.
        progress: maker of progress bars (tqdm's signature), or None for silence.
        finish: called with the result before the run counts as complete; it writes the report.
        keep: whether a run directory is written.
        split: split to take of datasets that have some, where the options name none; default test.

    Raises:
        UserError: any mistake in flags, checkpoint or data; then nothing is left in the run directory.
    """
    spec = check_flags(options)
    model, datasets = _opened(options, model, rows, split)
    if not spec.needs_scores:
        resolve(spec, model.config.num_layers, model_hash=model.model_hash)
    with running("analyze", options, models={"model": model}, datasets=datasets, keep=keep) as run:
        captures = Captures(options, model, datasets, run.directory, progress)
        results = {
            dataset.name: _score(options, model, spec, dataset, captures.sweep(dataset), progress)
            for dataset in datasets
        }
        analysis = _combine(options, model, spec, results, run.out)
        _write(analysis)
        run.record |= {
            "forms": captures.forms,
            "chosen": list(analysis.chosen.layers),
            "warnings": {name: result.warnings for name, result in analysis.datasets.items()},
        }
        run.times |= captures.times()
        analysis = dataclasses.replace(analysis, run=run.record)
        if finish is not None:
            finish(analysis)
    return analysis


def _opened(
    options: AnalyzeOptions, model: Any, rows: Any, split: str
) -> tuple[Model | GivenModel, Sequence[Dataset | HiddenStates]]:
    """What is analysed: rows for a model to run on, or states that one has left."""
    named = options.model if model is None else model
    if options.states or isinstance(rows, HiddenStates):
        reading = {"axes": options.axes, "ends": options.ends, "position": options.position, "limit": options.limit}
        given = [rows] if isinstance(rows, HiddenStates) else read_all(options.states, **reading)
        return model_of(given, named, options.mesh), given
    opened = open_model(named, mesh=options.mesh, dtype=options.dtype)
    return opened, opened.read(options, rows, split=split)


def training_scores(
    options: TrainingOptions, out: Path | None, *, model: Any = None, rows: Any = None, progress: Bars | None = None
) -> tuple[dict[str, LayerScores], str, int]:
    """Scores of an analysis of the training prompts; one that is there already is used.

    Args:
        options: options of a training; of its rows the first 300 are analysed, as many as the paper's.
        out: run directory of the training, which the analysis lies in unless ``--analysis`` names another; None
            writes nothing.
        model: model in place of the one that the options name.
        rows: rows in place of those that the options name.
        progress: maker of progress bars.

    Returns:
        Scores by key, the key that selects, and how many layers a selection trims at each end.
    """
    published = names_published(text_of(rows, options) or "")
    where = options.analysis or ("" if out is None else str(out / "analysis"))
    asked = AnalyzeOptions(
        model=options.model,
        data=options.data,
        split=options.split or ("train" if published else ""),
        limit=_TRAINING_PROMPTS,
        shuffle_seed=max(options.shuffle_seed, 0),
        out=where,
        template=options.template,
        edition=options.edition,
        truncate=options.truncate,
        long=options.long,
        mesh=options.mesh,
    )
    found = run_analysis(asked, model=model, rows=rows, progress=progress, keep=bool(where), split="train")
    return found.scores, asked.criterion, asked.trim


def check_flags(options: AnalyzeOptions) -> LayerSpec:
    """Refuses what an option may not be, before anything is read; returns the selection."""
    keys = score_keys(options.measures)
    spec = LayerSpec.parse(options.layers)
    spec.check_key(keys)
    return spec


def score_keys(measures: str = "") -> list[str]:
    """Keys of the scores that an analysis with these measures gives.

    Raises:
        UserError: an unknown measure.
    """
    return [*CURVES, *(f"delta_{name}" for name in parse_measures(measures))]


def _selecting(options: AnalyzeOptions, spec: LayerSpec) -> str:
    """Key of the score that selects: the one that the selection names, else that of ``--bias``."""
    return spec.score_key or options.criterion


def _score(
    config: AnalyzeOptions,
    model: Model | GivenModel,
    spec: LayerSpec,
    dataset: Dataset | HiddenStates,
    swept: Swept,
    progress: Bars | None,
) -> DatasetResult:
    tables, grams = swept
    given = dataset if isinstance(dataset, HiddenStates) else None
    meta = {
        **model.facts,
        "dataset": dataset.name,
        "position": config.position if given is None else given.position,
        "normalize": config.normalize,
        "kernel": config.kernel,
    }
    tokens = meta["position"] == "all"
    # The tokens of a prompt are one draw: errors over them would be too small.
    if isinstance(dataset, Dataset):
        lengths = [example.prompt_length for example in dataset.examples]
        units, ids = np.repeat(np.arange(len(lengths)), lengths) if tokens else None, dataset.sample_ids
    else:
        units, ids = dataset.units, dataset.prompt_ids
    shape: dict[str, Any] = {"window": config.window, "include_self": config.include_self}
    scores, kept = curves(tables, grams, units, **shape, meta=meta)
    if grams is None and config.measures:
        raise UserError(
            f"--measures={config.measures}: taken from whole Grams; add --form=resident, with fewer prompts"
        )
    measures = measured(grams, config.measures, progress)
    scores |= measure_scores(
        measures,
        **shape,
        meta={**meta, "num_samples": tables.num_samples},
    )
    if given is not None:
        scores = given.trusted(scores)
    key = _selecting(config, spec)
    score, left = scores[key], kept.get(key) if len(kept) == len(CURVES) else None
    null = permutation_null(tables)
    cka = {"biased": from_tables(tables), "debiased": from_tables(tables, "debiased"), "null_mean": null.mean}
    return DatasetResult(
        name=dataset.name,
        num_samples=tables.num_samples,
        scores=scores,
        measures=measures,
        cka=cka if tokens else {**cka, "null_stddev": null.stddev, "null_p": null.p},
        chosen=_choose(config, model, spec, scores),
        certainty=_certainty(config, spec, [score], [left]),
        leverage=None if left is None else leverage(score, left),
        participation_ratio=participation_ratio(tables),
        warnings=[] if given is None else [*given.notes, *getattr(model, "notes", ())],
        without_each=left,
        deletions=kept,
        sample_ids=ids,
    )


def _choose(
    config: AnalyzeOptions, model: Model | GivenModel, spec: LayerSpec, scores: dict[str, LayerScores]
) -> LayerSet:
    return resolve(
        spec,
        model.config.num_layers,
        scores=scores,
        criterion=config.criterion,
        trim=config.trim,
        model_hash=model.model_hash,
    )


def _certainty(
    config: AnalyzeOptions, spec: LayerSpec, scores: list[LayerScores], left: list[np.ndarray | None]
) -> Certainty | None:
    known = [values for values in left if values is not None]
    if spec.kind not in ("critical", "key") or len(known) < len(left):
        return None
    return certainty(scores, known, spec.count, trim=config.trim, seed=config.seed)


def _combine(
    config: AnalyzeOptions,
    model: Model | GivenModel,
    spec: LayerSpec,
    results: dict[str, DatasetResult],
    out: Path | None,
) -> Analysis:
    everyone = list(results.values())
    scores = {key: mean_rank([result.scores[key] for result in everyone]) for key in everyone[0].scores}
    own = [result.scores[_selecting(config, spec)] for result in everyone]
    sure = _certainty(config, spec, own, [result.without_each for result in everyone])
    results = {
        name: dataclasses.replace(
            result, warnings=[*result.warnings, *cautions(result, trim=config.trim, dtype=model.dtype)]
        )
        for name, result in results.items()
    }
    chosen = _choose(config, model, spec, scores)
    return Analysis(config, {}, results, scores, chosen, sure, out)


def _write(analysis: Analysis) -> None:
    """Writes scores, CKA and layers: of each dataset, and, where there are several, of their consensus."""
    alone, out = len(analysis.datasets) == 1, analysis.out
    if out is None:
        return
    for name, result in analysis.datasets.items():
        folder = out if alone else out / name
        processes.make_directory(folder)
        write_scores(folder / "scores.json", result.scores)
        meta = {"format": "jaxcrit.cka", "format_version": 1, "dataset": name, "num_samples": result.num_samples}
        write_npz(folder / "cka.npz", {key: values for key, values in result.cka.items() if key != "null_p"}, meta)
        if result.measures:
            write_npz(folder / "measures.npz", result.measures, {**meta, "format": "jaxcrit.measures"})
        result.chosen.save(folder / "layers.json")
        _write_uncertainty(folder, result.chosen, result.certainty, result)
        if result.deletions:
            write_deletions(folder, result.deletions, result.sample_ids)
    if not alone:
        write_scores(out / "scores.json", analysis.scores)
        analysis.chosen.save(out / "layers.json")
        _write_uncertainty(out, analysis.chosen, analysis.certainty)


def _write_uncertainty(
    folder: Path, chosen: LayerSet, sure: Certainty | None, result: DatasetResult | None = None
) -> None:
    content: dict[str, Any] = {"criterion": chosen.criterion, "rule": chosen.rule}
    content["choice"] = None if sure is None else sure.to_json()
    if result is not None and result.leverage is not None:
        most = result.leverage.to_json()
        ids = [None if prompt is None else result.sample_ids[prompt] for prompt in most["prompt"]]
        content["largest_leverage"] = {"sample_id": ids, **most}
    write_json(folder / "uncertainty.json", UNCERTAINTY_FORMAT, content)
