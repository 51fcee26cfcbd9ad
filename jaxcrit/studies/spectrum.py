"""Principal components of every layer, and whether CCA between neighbours tells the same story as δ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import as_path, plain, write_json, write_npz
from jaxcrit.core.layers import LayerScores, write_scores
from jaxcrit.core.run import Facts, Run, running
from jaxcrit.criteria.delta import component_scores, layer_scores
from jaxcrit.data.dataset import Dataset
from jaxcrit.data.templates import describe_template
from jaxcrit.evidence.captures import Captures
from jaxcrit.evidence.fingerprint import read_own, read_run
from jaxcrit.models.model import Bars, Model, open_model
from jaxcrit.selection.choice import mean_rank
from jaxcrit.selection.tracking import Tracking, tracking
from jaxcrit.similarity import Spectrum, cca, decompose, gram_tables
from jaxcrit.studies.analysis import check_flags
from jaxcrit.studies.options import SpectrumOptions

SPECTRUM_FORMAT = "jaxcrit.spectrum"
COMPLETE_BYTES = 2 * 2**30  # all scores of all layers, which errors need
# What may be said of a run that exists already; everything else says how to make one.
_OF_A_RUN = ("run", "k", "window", "include_self", "bias", "out")


@dataclasses.dataclass(frozen=True, eq=False)
class SpectrumResult:
    """What one dataset says.

    Attributes:
        name: name of the dataset.
        num_samples: N.
        scores: ``delta``, ``delta_debiased``, ``step``, ``step_debiased``, and ``cca_K`` for every K.
        cca: ``[L, L]`` by K.
        spectrum: its scores ``[L, N, K]`` up to the largest K only.
        tracking: how the CCA curves track δ; None where there is nothing to correlate.
        warnings: what would mislead a reader.
        sample_ids: id of each sample.
    """

    name: str
    num_samples: int
    scores: dict[str, LayerScores]
    cca: dict[int, np.ndarray]
    spectrum: Spectrum
    tracking: Tracking | None
    warnings: list[str]
    sample_ids: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class SpectralAnalysis:
    """A finished run.

    Attributes:
        run: what ``run.json`` holds.
        datasets: by name, in order.
        ks: numbers of components, ascending.
        out: run directory.
    """

    run: dict[str, Any]
    datasets: dict[str, SpectrumResult]
    ks: tuple[int, ...]
    out: Path


def parse_components(text: str) -> tuple[int, ...]:
    """Reads ``--k``: whole numbers from 1, with commas; ascending, each once.

    Raises:
        UserError: anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--k={text}: expected numbers of components from 1 with commas, such as 1,3,10")
    return tuple(sorted({int(part) for part in parts}))


def run_spectrum(
    options: SpectrumOptions,
    *,
    progress: Bars | None = None,
    finish: Callable[[SpectralAnalysis], Any] | None = None,
) -> SpectralAnalysis:
    """Runs ``jaxcrit spectrum``: decomposes, correlates, and writes the run directory's data files.

    Args:
        options: what is asked.
        progress: maker of progress bars (tqdm's signature), or None for silence.
        finish: called with the result before the run counts as complete; it writes the report.

    Raises:
        UserError: any mistake in flags, checkpoint, data or run; then nothing is left in the run directory.
    """
    ks = parse_components(options.k)
    check_flags(options.analysis())
    return (_of_run if options.run else _of_model)(options, ks, progress, finish)


def _of_run(
    options: SpectrumOptions,
    ks: tuple[int, ...],
    progress: Bars | None,
    finish: Callable[[SpectralAnalysis], Any] | None,
) -> SpectralAnalysis:
    default = SpectrumOptions()
    fields = [field.name for field in dataclasses.fields(options) if field.name not in _OF_A_RUN]
    if given := [name for name in fields if getattr(options, name) != getattr(default, name)]:
        raise UserError(f"--run={options.run}: has its model, data and Grams already; leave out --{' --'.join(given)}")
    earlier, fingerprints = read_run(options.run)
    model = Facts(as_path(options.run).resolve().name, earlier["model"])
    datasets = [Facts(name, facts) for name, facts in earlier["data"].items()]
    also = {"run": earlier["identity"]}
    with running(
        "spectrum", options, models={"model": model}, datasets=datasets, resolved={"k": list(ks)}, also=also
    ) as run:
        run.record["of_run"] = {"path": options.run, "identity": earlier["identity"]}
        results = {}
        for name, file in fingerprints.items():
            one = read_own(file, earlier)
            meta = _meta(run.record, name, {key: one.meta.get(key) for key in ("position", "kernel", "normalize")})
            results[name] = _decomposed(options, ks, meta, one.grams, np.array(one.sample_ids), progress)
        return _finish(run, results, ks, finish)


def _of_model(
    options: SpectrumOptions,
    ks: tuple[int, ...],
    progress: Bars | None,
    finish: Callable[[SpectralAnalysis], Any] | None,
) -> SpectralAnalysis:
    asked = options.analysis()
    model = open_model(options.model, mesh=options.mesh, dtype=options.dtype)
    datasets = model.read(asked)
    _refuse_components(ks, options, model, datasets)
    resolved = {"k": list(ks), "dtype": model.dtype}
    template = describe_template(model.tokenizer, options)
    with running(
        "spectrum", options, models={"model": model}, datasets=datasets, template=template, resolved=resolved
    ) as run:
        captures = Captures(asked, model, datasets, run.directory, progress)
        results = {}
        for dataset in datasets:
            captured = {key: getattr(asked, key) for key in ("position", "kernel", "normalize")}
            meta = _meta(run.record, dataset.name, captured)
            ids = np.array(dataset.sample_ids)
            if options.position == "all":
                ids = np.repeat(ids, [example.prompt_length for example in dataset.examples])
            results[dataset.name] = _decomposed(options, ks, meta, captures.grams(dataset), ids, progress)
        run.times |= captures.times()
        return _finish(run, results, ks, finish)


def _meta(run: Mapping[str, Any], name: str, captured: Mapping[str, Any]) -> dict[str, Any]:
    model = run["model"]
    stored = {key: model[key] for key in ("dequantised_from",) if key in model}
    return {"model_type": model["family"], "model_hash": model["hash"], **stored, "dataset": name, **captured}


def _refuse_components(ks: Sequence[int], config: SpectrumOptions, model: Model, datasets: Sequence[Dataset]) -> None:
    """Before the model runs: no layer has more components than its width, or than samples less one."""
    if config.kernel == "linear" and ks[-1] > model.config.width:
        raise UserError(f"--k={config.k}: expected at most {model.config.width}, the width of the model")
    for dataset in datasets:
        if config.position != "all" and ks[-1] > len(dataset.examples) - 1:
            raise UserError(
                f"--k={config.k}: {dataset.name} has {len(dataset.examples)} samples, so at most"
                f" {len(dataset.examples) - 1} components; give more prompts, or ask for fewer"
            )


def _decomposed(
    config: SpectrumOptions,
    ks: tuple[int, ...],
    meta: dict[str, Any],
    grams: np.ndarray | jax.Array,
    sample_ids: np.ndarray,
    progress: Bars | None,
) -> SpectrumResult:
    tables = gram_tables(grams)
    num_layers, num_samples = grams.shape[:2]
    scores = layer_scores(tables, window=config.window, include_self=config.include_self, meta=meta)
    warnings = []
    independent = meta["position"] != "all"  # the tokens of a prompt are not: errors over them would be too small
    if not independent:
        scores = {key: dataclasses.replace(score, stderr=None) for key, score in scores.items()}
    needed = num_layers * num_samples**2 * 8
    errors = independent and needed <= COMPLETE_BYTES
    if independent and not errors:
        warnings.append(
            f"standard errors of CCA are not estimated: {num_samples} samples need {needed / 2**30:.1f} GiB for them,"
            f" at most {COMPLETE_BYTES / 2**30:.0f} are taken"
        )
    if progress is None:
        spectrum = decompose(grams, None if errors else ks[-1])
    else:
        with progress(total=num_layers, desc=f"{meta['dataset']}: spectra", unit=" layers") as bar:
            spectrum = decompose(grams, None if errors else ks[-1], progress=bar.update)
    facts = {**meta, "num_samples": num_samples}
    curves = component_scores(spectrum, ks, window=config.window, errors=errors, meta=facts)
    found = None
    try:
        found = tracking(scores[config.analysis().criterion], list(curves.values()))
    except UserError as error:
        warnings.append(f"which CCA tracks δ cannot be said: {error}")
    return SpectrumResult(
        name=meta["dataset"],
        num_samples=num_samples,
        scores={**scores, **curves},
        cca={k: cca(spectrum, k) for k in ks},
        spectrum=dataclasses.replace(spectrum, scores=spectrum.scores[:, :, : ks[-1]]),
        tracking=found,
        warnings=warnings + [line for k in ks if (line := _unidentified(spectrum, k))],
        sample_ids=sample_ids,
    )


def _unidentified(spectrum: Spectrum, k: int) -> str:
    """A warning where other samples might have other first k components; empty where not."""
    if k >= spectrum.gaps.shape[1]:
        return ""
    gaps = spectrum.gaps[:, k - 1]
    layers = np.flatnonzero(gaps < spectrum.sampling_gap).tolist()
    if not layers:
        return ""
    least = int(gaps.argmin())
    where = f"layers {', '.join(map(str, layers))}" if len(layers) < len(gaps) else "every layer"
    return (
        f"component {k} may change places with the next in {where} (smallest gap {gaps[least]:.4f} in layer {least},"
        f" sampling error {spectrum.sampling_gap:.4f}); CCA of {k} is low there for that reason alone"
    )


def _finish(
    run: Run,
    results: dict[str, SpectrumResult],
    ks: tuple[int, ...],
    finish: Callable[[SpectralAnalysis], Any] | None,
) -> SpectralAnalysis:
    for name, result in results.items():
        _write(run.folder(name, len(results) == 1), result)
    if len(results) > 1:
        keys = next(iter(results.values())).scores
        together = {key: mean_rank([result.scores[key] for result in results.values()]) for key in keys}
        write_scores(run.path / "scores.json", together)
    run.record["warnings"] = {name: result.warnings for name, result in results.items()}
    found = SpectralAnalysis(run.record, results, ks, run.path)
    if finish is not None:
        finish(found)
    return found


def _write(folder: Path, result: SpectrumResult) -> None:
    write_scores(folder / "scores.json", result.scores)
    spectrum = result.spectrum
    arrays = {
        "scores": spectrum.scores.astype(np.float32),
        "singular_values": spectrum.singular_values,
        "sample_ids": result.sample_ids,
        **{f"cca_{k}": matrix for k, matrix in result.cca.items()},
    }
    meta = {"format": SPECTRUM_FORMAT, "format_version": 1, "dataset": result.name}
    write_npz(folder / "spectrum.npz", arrays, meta)
    content: dict[str, Any] = {
        "num_samples": result.num_samples,
        "participation_ratio": spectrum.participation_ratio.tolist(),
        "effective_rank": spectrum.effective_rank.tolist(),
        "rank": spectrum.rank.tolist(),
        "sampling_gap": spectrum.sampling_gap,
        "gaps": {str(k): spectrum.gaps[:, k - 1].tolist() for k in result.cca},
        "explained_variance": {str(k): spectrum.explained_variance[:, :k].sum(axis=1).tolist() for k in result.cca},
        "tracking": None if result.tracking is None else plain(dataclasses.asdict(result.tracking)),
        "warnings": result.warnings,
    }
    write_json(folder / "spectrum.json", SPECTRUM_FORMAT, content)
