"""The main job: from a checkpoint and prompts to layer scores, critical layers, and how sure they are."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcrit import __version__
from jaxcrit.capture import POSITIONS
from jaxcrit.core.deletions import write_deletions
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import write_npz
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.layers import LayerScores, LayerSet, LayerSpec, resolve, write_scores
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.criticality.cautions import cautions
from jaxcrit.criticality.measures import measure_scores
from jaxcrit.criticality.score import layer_scores, values_without_each
from jaxcrit.criticality.selection import mean_rank, selection_probability
from jaxcrit.data.batches import refuse_long
from jaxcrit.data.templates import template_hash
from jaxcrit.similarity.cka import from_tables
from jaxcrit.similarity.grams import KERNELS, gram_tables
from jaxcrit.similarity.inference import null_mean, participation_ratio
from jaxcrit.similarity.measures import parse_measures
from jaxcrit.studies.captures import AnalysisConfig, Captures, Dataset
from jaxcrit.studies.measures import measured
from jaxcrit.studies.rendering import Rendering, render_sets
from jaxcrit.studies.session import Bars, Session, open_session

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "safetensors")


@dataclasses.dataclass(frozen=True, eq=False)
class DatasetResult:
    """What one dataset says.

    Attributes:
        name: of the dataset.
        num_samples: N.
        scores: by score key.
        measures: by name, ``[L, L]``; what ``--measures`` asked for.
        cka: ``biased``, ``debiased`` and ``null`` (what unrelated layers would score by the biased one), ``[L, L]``.
        chosen: layers this dataset alone would choose.
        selection_probability: ``[L]``, in how many bootstrap draws a layer is chosen; None for fixed layers.
        participation_ratio: ``[L]``, how many directions carry a layer.
        warnings: what would mislead a reader.
        without_each: ``[N, L]`` the selecting score with each sample left out; None where not estimated.
    """

    name: str
    num_samples: int
    scores: dict[str, LayerScores]
    measures: dict[str, np.ndarray]
    cka: dict[str, np.ndarray]
    chosen: LayerSet
    selection_probability: np.ndarray | None
    participation_ratio: np.ndarray
    warnings: list[str]
    without_each: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """A finished run.

    Attributes:
        config: what was asked.
        run: what ``run.json`` holds.
        datasets: by name, in the order given.
        scores: by score key: the dataset's own, or mean ranks over several.
        chosen: the layers.
        selection_probability: ``[L]`` of the choice over all datasets, or None.
        out: run directory.
    """

    config: AnalysisConfig
    run: dict[str, Any]
    datasets: dict[str, DatasetResult]
    scores: dict[str, LayerScores]
    chosen: LayerSet
    selection_probability: np.ndarray | None
    out: Path

    @property
    def consensus(self) -> LayerScores | None:
        """Mean ranks over several datasets by the score that selects; None for one dataset."""
        return self.scores[self.config.criterion] if len(self.datasets) > 1 else None


def run_analysis(config: AnalysisConfig, *, progress: Bars | None = None) -> Analysis:
    """Runs ``jaxcrit analyze``: captures, scores, selects, and writes the run directory's data files.

    Args:
        config: what is asked.
        progress: makes progress bars (tqdm's signature), or None for silence.

    Returns:
        The finished analysis; pictures and pages are the reporting room's.

    Raises:
        UserError: any mistake in flags, checkpoint or data; then nothing is left in the run directory.
    """
    spec = check_flags(config)
    session = open_session(config.model, mesh=config.mesh, dtype=config.dtype)
    if not spec.needs_scores:
        resolve(spec, session.config.num_layers, model_hash=session.model_hash)
    datasets = read_datasets(config, session)
    determines = determines_of(config, session, datasets)
    directory = RunDirectory.open(out_of(config, session, determines), determines)
    run = run_record(config, session, datasets, determines)
    directory.begin(run)
    try:
        captures = Captures(config, session, datasets, directory, progress)
        results = {
            dataset.name: _score(config, session, spec, dataset, captures.grams(dataset), progress)
            for dataset in datasets
        }
        analysis = _combine(config, session, spec, results, directory.path)
        _write(analysis, datasets)
    except UserError:
        directory.discard()
        raise
    run |= {"chosen": list(analysis.chosen.layers), "warnings": {n: r.warnings for n, r in results.items()}}
    directory.finish({**run, "time": captures.times()})
    return dataclasses.replace(analysis, run={**analysis.run, **run, "time": captures.times()})


def check_flags(config: AnalysisConfig) -> LayerSpec:
    """Refuses values that no flag may have, before anything is read; returns the selection."""
    if config.position not in POSITIONS:
        raise UserError(f"--position={config.position}: expected {listed(POSITIONS)}")
    if config.kernel not in KERNELS:
        raise UserError(f"--kernel={config.kernel}: expected {listed(KERNELS)}")
    if config.window < 3 or config.window % 2 == 0:
        raise UserError(f"--window={config.window}: expected an odd number, 3 or more (a layer and its neighbours)")
    if config.bias not in ("biased", "debiased"):
        raise UserError(f"--bias={config.bias}: expected biased or debiased")
    if config.normalize not in ("", "row"):
        raise UserError(f"--normalize={config.normalize}: expected row, or nothing")
    parse_measures(config.measures)
    if config.batch_size < 1:
        raise UserError(f"--batch_size={config.batch_size}: expected at least 1")
    if config.embed and not config.save_activations:
        raise UserError("--embed adds the embedding output to what --save_activations keeps; give both")
    return LayerSpec.parse(config.layers)


def read_datasets(config: Rendering, session: Session, *, reserve: int = 0) -> list[Dataset]:
    """Reads and renders the prompts of ``--data``; ``reserve`` tokens of the model's context are left free.

    Raises:
        UserError: see `render_sets`; prompts that are too long; or a tokenizer that knows more than the model.
    """
    datasets = []
    room = session.config.max_length - reserve
    if room < 1:
        raise UserError(
            f"--max_new_tokens={reserve}: leaves no room for a prompt in the model's context of"
            f" {session.config.max_length} tokens"
        )
    for rendered in render_sets(config, session.tokenizer, room):
        named, examples = rendered.named, rendered.cut
        where = named.source if not reserve else f"{named.source}: {reserve} new tokens take part of the context"
        refuse_long([example.prompt_length for example in examples], room, where)
        largest = max(int(example.token_ids.max()) for example in examples)
        if largest >= session.config.vocab_size:
            raise UserError(
                f"{session.checkpoint.path}: the tokenizer gives token {largest}, the model knows"
                f" {session.config.vocab_size}; they do not belong together"
            )
        datasets.append(Dataset(named.name, named.source, examples))
    return datasets


def determines_of(config: AnalysisConfig, session: Session, datasets: Sequence[Dataset]) -> dict[str, Any]:
    """Everything that the results depend on; two runs that agree in it may share a directory."""
    asked = dataclasses.asdict(config)
    # The identity of the rows is in the hashes, not in how they were come by.
    for name in ("model", "data", "split", "out", "batch_size", "mesh", "limit", "shuffle_seed"):
        del asked[name]
    return {
        "command": "analyze",
        "config": {**asked, "dtype": session.dtype},
        "model_hash": session.model_hash,
        "template_hash": template_hash(session.tokenizer, config.template, config.edition),
        "data": {dataset.name: sha256_json(dataset.sample_ids) for dataset in datasets},
        "jaxcrit": __version__,
    }


def run_record(
    config: AnalysisConfig, session: Session, datasets: Sequence[Dataset], determines: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``run.json`` says before the results."""
    device = jax.devices()[0]
    return {
        "command": determines["command"],
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "determines": dict(determines),
        "model": {
            "path": str(config.model or "embedded"),
            "hash": session.model_hash,
            "family": session.config.family,
            "num_layers": session.config.num_layers,
            "width": session.config.width,
            "dtype": session.dtype,
        },
        "template": {"mode": config.template, "edition": config.edition, "hash": determines["template_hash"]},
        "data": {
            dataset.name: {
                "source": dataset.source,
                "num_prompts": len(dataset.examples),
                "longest_prompt": max(example.prompt_length for example in dataset.examples),
                "hash": determines["data"][dataset.name],
            }
            for dataset in datasets
        },
        "versions": versions(),
        "devices": {"kind": device.device_kind, "platform": device.platform, "mesh": dict(session.mesh.shape)},
    }


def versions() -> dict[str, str]:
    """What a run was computed with, for ``run.json``."""
    packages = {name: metadata.version(name) for name in _PACKAGES}
    return {"jaxcrit": __version__, "python": platform.python_version(), **packages}


def out_of(config: AnalysisConfig, session: Session, determines: Mapping[str, Any]) -> Path:
    """``--out``, or a directory here named after the command, the model and what determines the results."""
    if config.out:
        return Path(config.out)
    name = session.checkpoint.path.resolve().name if config.model else "embedded"
    return Path("jaxcrit-runs") / f"{determines['command']}-{name}-{sha256_json(dict(determines))[:8]}"


def _score(
    config: AnalysisConfig,
    session: Session,
    spec: LayerSpec,
    dataset: Dataset,
    grams: np.ndarray | jax.Array,
    progress: Bars | None,
) -> DatasetResult:
    tables = gram_tables(grams)
    meta = {
        "model_type": session.config.family,
        "model_hash": session.model_hash,
        "dataset": dataset.name,
        "position": config.position,
        "normalize": config.normalize,
        "kernel": config.kernel,
    }
    scores = layer_scores(tables, window=config.window, include_self=config.include_self, meta=meta)
    left = None
    if config.position == "all":  # a prompt's tokens are not independent samples: errors over them would be too small
        scores = {key: dataclasses.replace(score, stderr=None) for key, score in scores.items()}
    elif tables.num_samples > 4:  # deleting one must leave the 4 that the debiased estimator needs
        left = values_without_each(tables, config.criterion, config.window, config.include_self)
    measures = measured(grams, config.measures, progress)
    scores |= measure_scores(measures, window=config.window, include_self=config.include_self,
                             meta={**meta, "num_samples": tables.num_samples})  # fmt: skip
    cka = {"biased": from_tables(tables), "debiased": from_tables(tables, "debiased"), "null": null_mean(tables)}
    return DatasetResult(
        name=dataset.name,
        num_samples=tables.num_samples,
        scores=scores,
        measures=measures,
        cka=cka,
        chosen=_choose(config, session, spec, scores[config.criterion]),
        selection_probability=_probability(config, spec, [scores[config.criterion]], [left]),
        participation_ratio=participation_ratio(tables),
        warnings=[],
        without_each=left,
    )


def _choose(config: AnalysisConfig, session: Session, spec: LayerSpec, scores: LayerScores) -> LayerSet:
    layers = session.config.num_layers
    return resolve(spec, layers, scores=scores, trim=config.trim, model_hash=session.model_hash)


def _probability(
    config: AnalysisConfig, spec: LayerSpec, scores: list[LayerScores], left: list[np.ndarray | None]
) -> np.ndarray | None:
    known = [values for values in left if values is not None]
    if spec.kind != "critical" or len(known) < len(left):
        return None
    return selection_probability(scores, known, spec.count, trim=config.trim, seed=config.seed)


def _combine(
    config: AnalysisConfig, session: Session, spec: LayerSpec, results: dict[str, DatasetResult], out: Path
) -> Analysis:
    everyone = list(results.values())
    scores = {key: mean_rank([result.scores[key] for result in everyone]) for key in everyone[0].scores}
    own = [result.scores[config.criterion] for result in everyone]
    probability = _probability(config, spec, own, [result.without_each for result in everyone])
    results = {
        name: dataclasses.replace(result, warnings=cautions(result.scores, result.cka["null"], result.chosen,
                                  result.selection_probability, trim=config.trim, dtype=session.dtype))
        for name, result in results.items()
    }  # fmt: skip
    chosen = _choose(config, session, spec, scores[config.criterion])
    return Analysis(config, {}, results, scores, chosen, probability, out)


def _write(analysis: Analysis, datasets: Sequence[Dataset]) -> None:
    """Writes scores, CKA and layers: of each dataset, and, where there are several, of their consensus."""
    alone = len(analysis.datasets) == 1
    ids = {dataset.name: dataset.sample_ids for dataset in datasets}
    for name, result in analysis.datasets.items():
        folder = analysis.out if alone else analysis.out / name
        folder.mkdir(parents=True, exist_ok=True)
        write_scores(folder / "scores.json", result.scores)
        meta = {"format": "jaxcrit.cka", "format_version": 1, "dataset": name, "num_samples": result.num_samples}
        write_npz(folder / "cka.npz", {"biased": result.cka["biased"], "debiased": result.cka["debiased"]}, meta)
        if result.measures:
            write_npz(folder / "measures.npz", result.measures, {**meta, "format": "jaxcrit.measures"})
        result.chosen.save(folder / "layers.json")
        if result.without_each is not None:
            write_deletions(folder, {analysis.config.criterion: result.without_each}, ids[name])
    if not alone:
        write_scores(analysis.out / "scores.json", analysis.scores)
        analysis.chosen.save(analysis.out / "layers.json")
