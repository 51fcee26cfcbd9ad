"""Two models over the same prompts, from what their runs have kept: no forward pass, no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import write_npz
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.layers import LayerScores, write_scores
from jaxcrit.core.run import Facts, running
from jaxcrit.criteria.delta import deletions, jackknife_stderr
from jaxcrit.data.templates import check_same_rendering
from jaxcrit.evidence.fingerprint import Fingerprint, paired, read_fingerprint
from jaxcrit.models.model import Bars
from jaxcrit.selection.confidence import confidence_set
from jaxcrit.similarity import DegenerateError, from_tables, gram_tables, permutation_null
from jaxcrit.studies.options import CompareOptions

_HIGH_NULL = 0.5


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


def run_compare(
    options: CompareOptions, *, progress: Bars | None = None, finish: Callable[[Comparison], Any] | None = None
) -> Comparison:
    """Runs ``jaxcrit compare`` and writes the run directory's data files.

    Args:
        options: what is asked.
        progress: maker of progress bars (tqdm's signature), or None for silence.
        finish: called with the result before the run counts as complete; it writes the report.

    Raises:
        UserError: a fingerprint cannot be read, or the two do not belong together.
    """
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
    bar = None if progress is None else progress(total=3, desc="compare")
    with running("compare", options, models=models, datasets=[data]) as run:
        cka, left = _measure(a, b, bar)
        warnings = _warnings(a, b, cka)
        score, changed = None, None
        if len(a.grams) == len(b.grams):
            score, changed = _score(a, b, cka, left)
        run.record["warnings"] = warnings
        meta = {"format": "jaxcrit.cka", "format_version": 1, "num_samples": len(a.sample_ids), "models": _models(a, b)}
        write_npz(run.path / "cka.npz", cka, meta)
        if score is not None:
            write_scores(run.path / "scores.json", {score.name: score})
        found = Comparison(run.record, cka, score, changed, num_prompts, warnings, run.path)
        if finish is not None:
            finish(found)
    if bar is not None:
        bar.update(1)
        bar.close()
    return found


def _measure(a: Fingerprint, b: Fingerprint, bar: Any) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The tables, and the debiased values with each prompt left out, ``[U, L, L']``."""
    tokens = a.meta["position"] == "all"
    tables = gram_tables(a.grams, b.grams)
    if bar is not None:
        bar.update(1)
    try:
        cka = {"biased": from_tables(tables), "debiased": from_tables(tables, "debiased")}
        null = permutation_null(tables)
        left = deletions(tables, np.concatenate([a.grams, b.grams]) if tokens else None, a.units if tokens else None)
    except DegenerateError as error:
        depth = len(a.grams)
        named = [f"{layer} of {a.path}" if layer < depth else f"{layer - depth} of {b.path}" for layer in error.layers]
        raise UserError(f"layers {listed(named)}: all samples are equally far apart; debiased CKA is 0/0") from None
    if bar is not None:
        bar.update(1)
    cka["null_mean"] = null.mean
    if not tokens:  # the tokens of a prompt cannot be permuted
        cka["null_stddev"] = null.stddev
    if "debiased" in left:
        cka["stderr"] = jackknife_stderr(left["debiased"])
    return cka, left.get("debiased")


def _score(
    a: Fingerprint, b: Fingerprint, cka: dict[str, np.ndarray], left: np.ndarray | None
) -> tuple[LayerScores, tuple[int, ...] | None]:
    values = cka["debiased"].diagonal()
    stderr = cka["stderr"].diagonal() if "stderr" in cka else None
    meta = {"bias": "debiased", "num_samples": len(a.sample_ids), "models": _models(a, b), **_identity(a)}
    score = LayerScores("cross_cka", values, np.full(len(values), True), "low", stderr, meta)
    if left is None:
        return score, None
    return score, confidence_set([score], [np.diagonal(left, axis1=1, axis2=2)], trim=0)


def _identity(side: Fingerprint) -> dict[str, Any]:
    return {key: side.meta[key] for key in ("model_hash", "template_hash", "position", "kernel", "num_layers")}


def _models(a: Fingerprint, b: Fingerprint) -> list[str]:
    return [a.meta["model_hash"], b.meta["model_hash"]]


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
