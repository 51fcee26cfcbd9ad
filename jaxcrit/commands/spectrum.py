"""``jaxcrit spectrum``: principal components of every layer, and whether CCA of them tells the same story as δ."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import AnalyzeOptions, CaptureOptions
from jaxcrit.core.layers import LayerScores, span
from jaxcrit.core.options import option
from jaxcrit.reporting.tables import WIDTH, aligned, number, p_value, table

if TYPE_CHECKING:
    from jaxcrit.core.run import Run
    from jaxcrit.data.dataset import Dataset
    from jaxcrit.evidence.captures import Captures
    from jaxcrit.models.model import Bars, Model
    from jaxcrit.reporting.report import Report
    from jaxcrit.selection.tracking import Tracking
    from jaxcrit.similarity import Spectrum

SPECTRUM_FORMAT = "jaxcrit.spectrum"
COMPLETE_BYTES = 2 * 2**30  # all scores of all layers, which errors need
_CAPTURED = ("position", "kernel", "normalize")
# What may be said of a run that exists already; everything else says how to make one.
_OF_A_RUN = ("run", "k", "window", "include_self", "bias", "out")
CAVEATS = (
    "CCA of the first k principal components compares which directions two layers vary in, whatever their size; δ is"
    " of CKA, which weighs them by their variance.",
    "Which component is the k-th is settled only where its variance is apart from the next one's by more than other"
    " samples would change it (North et al. 1982); ~ marks where it is not.",
    "Neighbouring layers are alike, so that layers are fewer independent observations than they are layers: p is the"
    " share of all circular shifts of one curve against the other that correlate as much, never below one over the"
    " number of layers.",
    "Curves that both drift with depth correlate whatever else they measure: read ρ given depth beside ρ.",
    "Standard errors are of the samples (infinitesimal jackknife), not of another kind of prompt or another model.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectrumOptions(CaptureOptions, title="scores"):
    """What ``jaxcrit spectrum`` is asked."""

    run: str = option("", "an earlier analyze run, instead of model and data", word="DIR", group="model and data")
    k: str = option("1,3,10", "numbers of principal components, with commas", word="LIST")

    def analysis(self) -> AnalyzeOptions:
        """The same as far as it is about capturing and δ."""
        names = {field.name for field in dataclasses.fields(AnalyzeOptions)}
        return AnalyzeOptions(**{key: value for key, value in dataclasses.asdict(self).items() if key in names})


OPTIONS = SpectrumOptions


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


def run(options: SpectrumOptions) -> int:
    """Decomposes, writes the report, prints the tables."""
    return shared.show(run_spectrum, report, options)


def parse_components(text: str) -> tuple[int, ...]:
    """Reads ``--k``: whole numbers from 1, with commas; ascending, each once.

    Raises:
        UserError: anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--k={text}: expected numbers of components from 1 with commas, such as 1,3,10")
    return tuple(sorted({int(part) for part in parts}))


def run_spectrum(options: SpectrumOptions, *, progress: Bars | None = None) -> SpectralAnalysis:
    """Decomposes, correlates, and writes the run directory.

    Args:
        options: what is asked.
        progress: maker of progress bars (tqdm's signature), or None for silence.

    Raises:
        UserError: any mistake in flags, checkpoint, data or run; then nothing is left in the run directory.
    """
    from jaxcrit.core.files import as_path
    from jaxcrit.core.run import Facts, running
    from jaxcrit.evidence.captures import Captures
    from jaxcrit.evidence.fingerprint import read_run
    from jaxcrit.models.model import open_model
    from jaxcrit.studies.analysis import check_flags

    ks, asked = parse_components(options.k), options.analysis()
    check_flags(asked)
    resolved = {"k": list(ks)}
    if options.run:
        default = SpectrumOptions()
        fields = [field.name for field in dataclasses.fields(options) if field.name not in _OF_A_RUN]
        if given := [name for name in fields if getattr(options, name) != getattr(default, name)]:
            flags = " --".join(given)
            raise UserError(f"--run={options.run}: has its model, data and Grams already; leave out --{flags}")
        earlier, fingerprints = read_run(options.run)
        of, also = Facts(as_path(options.run).resolve().name, earlier["model"]), {"run": earlier["identity"]}
        data = [Facts(name, facts) for name, facts in earlier["data"].items() if name in fingerprints]
        with running("spectrum", options, models={"model": of}, datasets=data, resolved=resolved, also=also) as run:
            run.record["of_run"] = {"path": options.run, "identity": earlier["identity"]}
            return _finished(options, ks, run, _of_run(earlier, fingerprints), progress)
    model = open_model(options.model, mesh=options.mesh, dtype=options.dtype)
    datasets = model.read(asked)
    _refuse_components(ks, options, model, datasets)
    with running("spectrum", options, models={"model": model}, datasets=datasets, resolved=resolved) as run:
        captures = Captures(asked, model, datasets, run.directory, progress)
        found = _finished(options, ks, run, _of_model(asked, captures, datasets), progress)
        run.times |= captures.times()
    return found


Grams = tuple[str, dict[str, Any], Any, np.ndarray]  # dataset, how it was captured, [L, N, N], id of each sample


def _of_run(earlier: dict[str, Any], fingerprints: dict[str, Path]) -> Iterator[Grams]:
    from jaxcrit.evidence.fingerprint import read_own

    for name, file in fingerprints.items():
        one = read_own(file, earlier)
        yield name, {key: one.meta.get(key) for key in _CAPTURED}, one.grams, np.array(one.sample_ids)


def _of_model(asked: AnalyzeOptions, captures: Captures, datasets: Sequence[Dataset]) -> Iterator[Grams]:
    captured = {key: getattr(asked, key) for key in _CAPTURED}
    for dataset in datasets:
        ids = np.array(dataset.sample_ids)
        if asked.position == "all":
            ids = np.repeat(ids, [example.prompt_length for example in dataset.examples])
        yield dataset.name, captured, captures.grams(dataset), ids


def _refuse_components(ks: Sequence[int], options: SpectrumOptions, model: Model, datasets: Sequence[Dataset]) -> None:
    """Before the model runs: no layer has more components than its width, or than samples less one."""
    if options.kernel == "linear" and ks[-1] > model.config.width:
        raise UserError(f"--k={options.k}: expected at most {model.config.width}, the width of the model")
    for dataset in datasets:
        if options.position != "all" and ks[-1] > len(dataset.examples) - 1:
            raise UserError(
                f"--k={options.k}: {dataset.name} has {len(dataset.examples)} samples, so at most"
                f" {len(dataset.examples) - 1} components; give more prompts, or ask for fewer"
            )


def _finished(
    options: SpectrumOptions, ks: tuple[int, ...], run: Run, taken: Iterator[Grams], progress: Bars | None
) -> SpectralAnalysis:
    """Decomposes what the run takes, and writes everything."""
    from jaxcrit.core.layers import write_scores
    from jaxcrit.selection.choice import mean_rank

    model, results = run.record["model"], {}
    for name, captured, grams, ids in taken:
        meta = {"model_type": model["family"], "model_hash": model["hash"], "dataset": name, **captured}
        meta |= {key: model[key] for key in ("dequantised_from", "trained") if key in model}
        results[name] = _decomposed(options, ks, meta, grams, ids, progress)
    for name, result in results.items():
        _write(run.folder(name, len(results) == 1), result)
    if len(results) > 1:
        keys = next(iter(results.values())).scores
        together = {key: mean_rank([result.scores[key] for result in results.values()]) for key in keys}
        write_scores(run.path / "scores.json", together)
    run.record["warnings"] = {name: result.warnings for name, result in results.items()}
    found = SpectralAnalysis(run.record, results, ks, run.path)
    report(found).write(found.out, found.run)
    return found


def _decomposed(
    options: SpectrumOptions,
    ks: tuple[int, ...],
    meta: dict[str, Any],
    grams: Any,
    sample_ids: np.ndarray,
    progress: Bars | None,
) -> SpectrumResult:
    from jaxcrit.core.progress import bar
    from jaxcrit.criteria.delta import component_scores, layer_scores
    from jaxcrit.selection.cautions import training_caution
    from jaxcrit.selection.tracking import tracking
    from jaxcrit.similarity import cca, decompose, gram_tables

    num_layers, num_samples = grams.shape[:2]
    scores = layer_scores(gram_tables(grams), window=options.window, include_self=options.include_self, meta=meta)
    warnings = training_caution(meta)
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
    with bar(progress, total=num_layers, desc=f"{meta['dataset']}: spectra", unit=" layers") as shown:
        spectrum = decompose(grams, None if errors else ks[-1], progress=shown.update)
    facts = {**meta, "num_samples": num_samples}
    curves = component_scores(spectrum, ks, window=options.window, errors=errors, meta=facts)
    found = None
    try:
        found = tracking(scores[options.criterion], list(curves.values()))
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
    where = f"layers {span(layers)}" if len(layers) < len(gaps) else "every layer"
    return (
        f"component {k} may change places with the next in {where} (smallest gap {gaps[least]:.4f} in layer {least},"
        f" sampling error {spectrum.sampling_gap:.4f}); CCA of {k} is low there for that reason alone"
    )


def _write(folder: Path, result: SpectrumResult) -> None:
    from jaxcrit.core.files import plain, write_json, write_npz
    from jaxcrit.core.layers import write_scores

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


def report(analysis: SpectralAnalysis) -> Report:
    """Every dataset's layers, and which number of components tracks δ; of several the terminal shows the latter."""
    from jaxcrit.reporting import plots
    from jaxcrit.reporting.report import Figure, Report, Section

    reference = "delta" if analysis.run["config"]["bias"] == "biased" else "delta_debiased"
    sections, warnings, several = [], [], len(analysis.datasets) > 1
    for name, dataset in analysis.datasets.items():
        title = f"{name}: {dataset.num_samples} samples"
        curves = {f"top {k}": dataset.scores[f"cca_{k}"] for k in analysis.ks}
        subtitle = f"{name}, {dataset.num_samples} samples"
        draw = functools.partial(plots.component_curves, dataset.scores[reference], curves, title=subtitle)
        caption = "δ, and below mean CCA of the first k principal components of a layer and of its neighbours."
        figure = Figure(f"{name}/spectrum.png" if several else "spectrum.png", draw, caption, (6.2, 5.4))
        found = "" if dataset.tracking is None else _tracking_table(dataset.tracking)
        page = "\n\n".join(filter(None, [_layer_table(dataset, analysis.ks, reference), found]))
        sections.append(Section(title, "", page, [figure], brief=f"{name}:\n{found}" if several else page))
        warnings += [f"{name}: {line}" if several else line for line in dataset.warnings]
    told = [f"{name + ': ' if several else ''}{_sentence(one)}" for name, one in analysis.datasets.items()]
    return Report(told, warnings, sections, CAVEATS)


def _sentence(dataset: SpectrumResult) -> str:
    """Which number of components tracks δ best, of those whose last one is told apart from the next."""
    found, spectrum = dataset.tracking, dataset.spectrum
    if found is None:
        return "Nothing to correlate: see the warning."

    def doubtful(name: str) -> int:
        """Layers where the last of so many components may change places with the next."""
        return int((spectrum.gaps[:, int(name.removeprefix("cca_")) - 1] < spectrum.sampling_gap).sum())

    depth, positive = len(spectrum.gaps), {name: one for name, one in found.correlations.items() if one.rho > 0}
    if not positive:
        return "CCA of none of these numbers of components rises and falls with δ."
    firm = [name for name in positive if doubtful(name) <= depth / 2]
    best = found.correlations[found.best]
    beside = f"(circular-shift p = {found.p_best:.3f} for the best of {len(found.correlations)})"
    tail = f"Spearman's ρ = {best.rho:+.2f} over {best.num_layers} layers {beside}; given depth {_signed(best.partial)}"
    first = f"CCA of the first {_components(found.best)} tracks δ best: {tail}."
    if found.best in firm:
        return first
    last = found.best.removeprefix("cca_")
    first = (
        first[:-1]
        + f". But component {last} is not told apart from the next in {doubtful(found.best)} of {depth} layers"
    )
    if not firm:
        return f"{first}, nor is the last of any other number in most: more prompts would tell; use none of these."
    other = max(firm, key=lambda name: positive[name].rho)
    return f"{first}: use the first {_components(other)} (ρ = {positive[other].rho:+.2f}), which is told apart."


def _components(name: str) -> str:
    k = int(name.removeprefix("cca_"))
    return f"{k} components" if k > 1 else "component"


def _tracking_table(found: Tracking) -> str:
    """One row per number of components: how its curve goes along with δ."""
    rows = []
    for name, one in found.correlations.items():
        cells = [name.removeprefix("cca_"), _signed(one.rho), p_value(one.p_shift), _signed(one.partial)]
        cells += [p_value(one.p_partial), _signed(one.depth[1]), "◀ best" if name == found.best else ""]
        rows.append(cells)
    header = ["k", f"ρ with {_shown(found.reference)}", "p (shifts)", "ρ given depth", "p (shifts)", "ρ with depth", ""]
    return table(header, rows)


def _layer_table(dataset: SpectrumResult, ks: Sequence[int], reference: str) -> str:
    """One row per layer: δ, CCA with its neighbours by number of components, and how many directions carry it.

    Errors are left out, then the largest numbers of components, until the table fits.
    """
    for errors, count in [(True, len(ks)), *((False, count) for count in range(len(ks), 0, -1))]:
        lines = _layer_lines(dataset, ks[:count], reference, errors)
        if max(map(len, lines)) <= WIDTH:
            break
    if count < len(ks):
        lines.append(f"(k = {', '.join(map(str, ks[count:]))} are in scores.json)")
    return "\n".join(lines)


def _layer_lines(dataset: SpectrumResult, ks: Sequence[int], reference: str, errors: bool) -> list[str]:
    spectrum, delta = dataset.spectrum, dataset.scores[reference]
    explained = spectrum.explained_variance[:, : ks[-1]].sum(axis=1)
    header = ["layer", _shown(reference), *(f"CCA top {k}" for k in ks), f"var {ks[-1]}", "PR", "eff. rank", ""]
    rows = []
    for layer in range(delta.num_layers):
        cells = [str(layer), number(delta.values[layer])]
        for k in ks:
            curve = dataset.scores[f"cca_{k}"]
            cell = number(curve.values[layer])
            if errors and curve.stderr is not None and curve.valid[layer]:
                cell += f" ±{number(curve.stderr[layer])}"
            cells.append(cell + ("~" if spectrum.gaps[layer, k - 1] < spectrum.sampling_gap else " "))
        facts = number(spectrum.participation_ratio[layer], 1), number(spectrum.effective_rank[layer], 1)
        rows.append([*cells, number(explained[layer], 2), *facts, ""])
    return aligned(header, rows)


def _shown(key: str) -> str:
    return {"delta": "δ biased", "delta_debiased": "δ debiased"}[key]


def _signed(value: float) -> str:
    return f"{value:+.2f}" if math.isfinite(value) else "-"
