"""``jaxcrit compare``: CKA between two models over the same prompts, from what their runs kept: no forward pass."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcrit.commands import shared
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.groups import BY_HASH, WHERE
from jaxcrit.core.layers import LayerScores
from jaxcrit.core.options import Options, option
from jaxcrit.reporting.tables import table

if TYPE_CHECKING:
    from jaxcrit.evidence.fingerprint import Fingerprint
    from jaxcrit.models.model import Bars
    from jaxcrit.reporting.report import Report

_HIGH_NULL = 0.5
# A layer that no step of training has touched has a CKA of 1 with itself, but for rounding.
_SAME = 1 - 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions(Options, title="what", positional=("a", "b")):
    """What ``jaxcrit compare`` is asked."""

    a: str = option("", "fingerprint.npz, or the run directory with it: the base, say", word="RUN", free=BY_HASH)
    b: str = option("", "the other: the tuned model, say", word="RUN", free=BY_HASH)
    out: str = option("", "run directory to write (default: a new one here)", word="DIR", free=WHERE)
    common: bool = option(False, "leave out samples that only one of them has", group="pairing")
    allow_template_mismatch: bool = option(False, "compare prompts that were rendered otherwise", group="pairing")


OPTIONS = CompareOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """A finished comparison of models with L and L' layers.

    Attributes:
        run: what ``run.json`` holds.
        cka: ``biased``, ``debiased``, ``null_mean``, and where they are known ``null_stddev`` (not for tokens) and
            ``stderr`` of the debiased values, each ``[L, L']``.
        score: ``cross_cka``, of each layer with the same layer of the other model; None where L and L' differ.
        changed_most: the layers that may have the lowest of it, at 95 %; None where not estimated.
        num_prompts: compared.
        warnings: what would mislead a reader.
        out: run directory.
    """

    run: dict[str, Any]
    cka: dict[str, np.ndarray]
    score: LayerScores | None
    changed_most: tuple[int, ...] | None
    num_prompts: int
    warnings: list[str]
    out: Path

    @property
    def partners(self) -> np.ndarray:
        """``[L]`` the layer of b beside each layer of a: the same one, or the most alike where depths differ."""
        debiased = self.cka["debiased"]
        return np.arange(len(debiased)) if self.score is not None else debiased.argmax(axis=1)


def run(options: CompareOptions) -> int:
    """Compares, writes the report, prints the table."""
    return shared.show(run_compare, report, options)


def run_compare(options: CompareOptions, *, progress: Bars | None = None) -> Comparison:
    """Compares, and writes the run directory.

    Args:
        options: what is asked.
        progress: maker of progress bars (tqdm's signature), or None for silence.

    Raises:
        UserError: a fingerprint cannot be read, or the two do not belong together.
    """
    from jaxcrit.core.files import write_npz
    from jaxcrit.core.hashing import sha256_json
    from jaxcrit.core.layers import write_scores
    from jaxcrit.core.progress import bar
    from jaxcrit.core.run import Facts, running
    from jaxcrit.data.templates import check_same_rendering
    from jaxcrit.evidence.fingerprint import paired, read_fingerprint

    if not options.a or not options.b:
        raise UserError("compare: expected two fingerprints: jaxcrit compare RUN_A RUN_B (or --a=RUN_A --b=RUN_B)")
    read = read_fingerprint(options.a), read_fingerprint(options.b)
    first, second = (side.meta["template_hash"] for side in read)
    check_same_rendering(first, second, allow_template_mismatch=options.allow_template_mismatch)
    a, b = paired(*read, common=options.common)
    models = {
        role: Facts("", {"path": str(one.path), "hash": one.digest, **_identity(one)})
        for role, one in (("model", a), ("other", b))
    }
    num_prompts = len(np.unique(a.units))
    data = Facts("prompts", {"num_samples": num_prompts, "hash": sha256_json(a.sample_ids)})
    with (
        bar(progress, total=3, desc="compare") as shown,
        running("compare", options, models=models, datasets=[data]) as run,
    ):
        cka, left = _measure(a, b, shown)
        meta = {"num_samples": len(a.sample_ids), "models": [side.meta["model_hash"] for side in (a, b)]}
        score, changed = _score(a, cka, left, meta) if len(a.grams) == len(b.grams) else (None, None)
        run.record["warnings"] = _warnings(a, b, cka)
        write_npz(run.path / "cka.npz", cka, {"format": "jaxcrit.cka", "format_version": 1, **meta})
        if score is not None:
            write_scores(run.path / "scores.json", {score.name: score})
        found = Comparison(run.record, cka, score, changed, num_prompts, run.record["warnings"], run.path)
        report(found).write(found.out, found.run)
        shown.update(1)
    return found


def _measure(a: Fingerprint, b: Fingerprint, bar: Any) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The tables, and the debiased values with each prompt left out, ``[U, L, L']``."""
    from jaxcrit.criteria.delta import deletions, jackknife_stderr
    from jaxcrit.similarity import DegenerateError, PackedGrams, from_tables, gram_tables, permutation_null

    tokens = a.meta["position"] == "all"
    tables = gram_tables(a.grams, b.grams)
    bar.update(1)
    try:
        cka = {"biased": from_tables(tables), "debiased": from_tables(tables, "debiased")}
        null = permutation_null(tables)
        left = deletions(
            tables, PackedGrams(*a.grams.parts, *b.grams.parts) if tokens else None, a.units if tokens else None
        )
    except DegenerateError as error:
        depth = len(a.grams)
        named = [f"{layer} of {a.path}" if layer < depth else f"{layer - depth} of {b.path}" for layer in error.layers]
        raise UserError(f"layers {listed(named)}: all samples are equally far apart; debiased CKA is 0/0") from None
    bar.update(1)
    cka["null_mean"] = null.mean
    if not tokens:  # the tokens of a prompt cannot be permuted
        cka["null_stddev"] = null.stddev
    if "debiased" in left:
        cka["stderr"] = jackknife_stderr(left["debiased"])
    return cka, left.get("debiased")


def _score(
    a: Fingerprint, cka: dict[str, np.ndarray], left: np.ndarray | None, meta: dict[str, Any]
) -> tuple[LayerScores, tuple[int, ...] | None]:
    from jaxcrit.selection.confidence import confidence_set

    values = cka["debiased"].diagonal()
    stderr = cka["stderr"].diagonal() if "stderr" in cka else None
    facts = {"bias": "debiased", **meta, **_identity(a)}
    score = LayerScores("cross_cka", values, np.full(len(values), True), "low", stderr, facts)
    return score, None if left is None else confidence_set([score], [np.diagonal(left, axis1=1, axis2=2)], trim=0)


def _identity(side: Fingerprint) -> dict[str, Any]:
    return {key: side.meta[key] for key in ("model_hash", "template_hash", "position", "kernel", "num_layers")}


def _warnings(a: Fingerprint, b: Fingerprint, cka: dict[str, np.ndarray]) -> list[str]:
    found = []
    if a.meta["model_hash"] and a.meta["model_hash"] == b.meta["model_hash"]:
        found.append("both fingerprints are of the same model")
    if a.meta["template_hash"] != b.meta["template_hash"]:
        found.append("the prompts were rendered otherwise for the two: part of the difference may be the template's")
    highest = float(cka["null_mean"].max())
    if highest > _HIGH_NULL:
        found.append(
            f"biased CKA is inflated: unrelated layers would score up to {highest:.2f} at {len(a.sample_ids)} samples;"
            " read the debiased values"
        )
    return found


def _table(found: Comparison) -> str:
    """One row per layer of a."""
    cka, beside = found.cka, found.partners
    # A tuned model may differ from its base in the fifth digit only.
    digits = 6 if cka["debiased"][np.arange(len(beside)), beside].min() > 0.99 else 4
    rows = []
    for layer, other in enumerate(beside):
        values = {key: float(matrix[layer, other]) for key, matrix in cka.items()}
        error = f" ± {values['stderr']:.{digits}f}" if "stderr" in values else ""
        away = values["biased"] - values["null_mean"]
        best = int(cka["debiased"][layer].argmax())
        cells = [str(layer), str(other), f"{values['debiased']:.{digits}f}{error}", f"{values['biased']:.{digits}f}"]
        score = f"{away / values['null_stddev']:.1f}" if "null_stddev" in values else ""
        alike = f"{best} ({cka['debiased'][layer, best]:.4f})" if best != other else str(best)
        rows.append([*cells, f"{values['null_mean']:.4f}", score, alike])
    return table(["a", "b", "CKA debiased ± s.e.", "biased", "null", "z", "most alike in b"], rows)


def _sentences(found: Comparison) -> list[str]:
    """Which layers differ most, and how sure, a sentence each."""
    score, prompts = found.score, found.num_prompts
    if score is None:
        depth, other = found.cka["debiased"].shape
        return [f"Models of {depth} and {other} layers on {prompts} prompts; each layer beside the most alike."]
    lowest = int(score.values.argmin())
    if score.values[lowest] > _SAME:
        return [f"No layer differs: all {score.num_layers} have CKA 1 with themselves on {prompts} prompts."]
    same = int((score.values > _SAME).sum())
    error = "" if score.stderr is None else f" ± {score.stderr[lowest]:.2g}"
    first = f"Changed most: layer {lowest} of {score.num_layers} (1 - CKA {1 - score.values[lowest]:.3g}{error})"
    first += f"; {same} layers are unchanged" if same else ""
    sure = found.changed_most
    if sure is None:
        return [first]
    among = f"the layer changed most is one of {', '.join(map(str, sure))}" if len(sure) > 1 else "it is this layer"
    return [first, f"How sure: with {prompts} prompts {among} at 95% confidence."]


def report(found: Comparison) -> Report:
    """CKA of each layer with its partner, and of every layer with every other."""
    from jaxcrit.reporting import plots
    from jaxcrit.reporting.analysis import CAVEATS, heatmap
    from jaxcrit.reporting.report import Figure, Report, Section, on_axes

    places = np.arange(len(found.partners)), found.partners
    values = {key: matrix[places] for key, matrix in found.cka.items()}
    curve = on_axes(plots.cross_curve, values, title=f"{found.num_prompts} prompts")
    partner = "the most alike layer" if found.score is None else "the same layer"
    figures = [
        Figure("cross_cka.png", curve, f"CKA of each layer of a with {partner} of b; low where they differ."),
        heatmap(found.cka, "CKA of every layer of a with every layer of b.", labels=("layer of a", "layer of b")),
    ]
    section = Section("Layer by layer", "", _table(found), figures)
    return Report(_sentences(found), found.warnings, [section], CAVEATS[:3])
