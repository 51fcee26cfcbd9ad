"""Whether a run directory is what it claims: its files by their digests, its statistics by those redone from Grams."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.core import digests
from jaxcrit.core.digests import CHECKPOINTS, RECORD
from jaxcrit.core.errors import UserError, first_line
from jaxcrit.core.files import read_npz
from jaxcrit.core.layers import LayerScores, LayerSet, read_scores
from jaxcrit.core.rundir import read_record
from jaxcrit.core.selections import LayerSpec, resolve
from jaxcrit.criteria.delta import component_scores, curves, measure_scores
from jaxcrit.evidence.fingerprint import Fingerprint, read_own, read_run
from jaxcrit.evidence.measures import measured
from jaxcrit.selection.choice import mean_rank
from jaxcrit.similarity import cca, decompose, from_tables, gram_tables, permutation_null


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was found of a run.

    Attributes:
        findings: a line for everything that is not as the run claims.
        files: files whose content has the digest that ``run.json`` has for them.
        steps: checkpoints whose arrays have the digests that were written with them.
        redone: statistics that came out as they are in the files, by name of the file.
    """

    findings: list[str]
    files: int
    steps: int
    redone: list[str]


def verify(run: Path, tolerance: float) -> Verification:
    """Compares a run with its digests, and with what its fingerprints give.

    Args:
        run: run directory.
        tolerance: largest difference of a statistic that is one of rounding.

    Raises:
        UserError: there is no run.
    """
    if not run.exists():
        raise UserError(f"{run}: expected a run directory, and there is nothing")
    if not (run / RECORD).is_file():
        raise UserError(f"{run}: expected a run directory, got one without {RECORD}")
    try:
        record = read_record(run)
    except UserError as error:
        return Verification([f"changed: {error}"], 0, 0, [])
    findings, files, known = [], 0, record.get("digests", {}).get("files", {})
    differ: dict[str, str] = {}
    if record.get("status") != "complete":
        findings.append(f"incomplete: {RECORD} says {record.get('status')}; the same command goes on from there")
    elif "digests" not in record:
        findings.append("unverified: written without digests; the structure of its files alone can be checked")
    else:
        differ, there = digests.differing(run, known), digests.files_of(run)
        findings += [f"missing: {name}" for name in known if name not in there]
        findings += [f"extra: {name}: is not among the files of the run" for name in there if name not in known]
        findings += [f"changed: {name}: {what}" for name, what in differ.items()]
        files = sum(name in there and name not in differ and "sha256" in one for name, one in known.items())
    wrong, steps = _checkpoints(run, {name.split("/")[1] for name in differ if name.startswith(f"{CHECKPOINTS}/")})
    redone: list[str] = []
    if record.get("status") == "complete" and not any(one.startswith("changed") for one in findings):
        differing, redone = _statistics(run, record, tolerance)
        wrong += differing
    return Verification([*findings, *wrong], files, steps, redone)


def _checkpoints(run: Path, damaged: set[str]) -> tuple[list[str], int]:
    """Of every checkpoint, arrays that are not what was written; and how many are as they were."""
    from jaxcrit.models.trained import refused_steps  # orbax takes 25 MB

    if not (run / CHECKPOINTS).is_dir():
        return [], 0
    found = refused_steps(run, damaged)
    wrong = [f"changed: {CHECKPOINTS}/{step}: {reason}" for step, reason in found.items() if reason]
    return wrong, len(found) - len(wrong)


def _statistics(run: Path, record: Mapping[str, Any], tolerance: float) -> tuple[list[str], list[str]]:
    """What differs, a line each; and the files in which all that was redone is as it is there."""
    if record.get("command") not in ("analyze", "spectrum"):
        return [], []
    kept = [name for name in digests.files_of(run) if name.endswith("fingerprint.npz")]
    if not kept:
        return [], []
    wrong: list[str] = []
    fine: list[str] = []
    scores: dict[str, dict[str, LayerScores]] = {}
    try:
        _, fingerprints = read_run(run)
        for name, file in fingerprints.items():
            scores[name], matrices = _redone(read_own(file, record), name, record)
            for place, differing in _compared(file.parent, scores[name], matrices, record, tolerance):
                where = place.relative_to(run).as_posix()
                wrong += [f"differs: {where}: {one}" for one in differing]
                fine += [] if differing else [where]
        if len(scores) > 1:
            together = {key: mean_rank([one[key] for one in scores.values()]) for key in next(iter(scores.values()))}
            for place, differing in _compared(run, together, {}, record, tolerance):
                wrong += [f"differs: {place.name}: {one}" for one in differing]
                fine += [] if differing else [place.name]
    except Exception as error:  # a run.json may fit its own digest and say anything: that is what is looked for
        wrong.append(f"differs: cannot be redone: {first_line(error)}")
    return wrong, fine


def _redone(
    own: Fingerprint, name: str, record: Mapping[str, Any]
) -> tuple[dict[str, LayerScores], dict[str, np.ndarray]]:
    """Scores by key and matrices by name, from Grams of a dataset."""
    config = record["config"]
    shape: dict[str, Any] = {"window": config["window"], "include_self": config["include_self"]}
    band = record.get("forms", {}).get(name, {}).get("band")
    tokens = own.meta["position"] == "all"
    tables = gram_tables(own.grams, band=band)
    scores, _ = curves(tables, own.grams, own.units if tokens else None, **shape, meta={})
    null = permutation_null(tables)
    matrices = {"biased": from_tables(tables), "debiased": from_tables(tables, "debiased"), "null_mean": null.mean}
    if not tokens:
        matrices["null_stddev"] = null.stddev
    if record["command"] == "spectrum":
        ks = tuple(map(int, record["determines"]["config"]["k"]))
        spectrum = decompose(own.grams, ks[-1])
        scores |= component_scores(spectrum, ks, window=config["window"], errors=False, meta={})
        matrices = {f"cca_{k}": cca(spectrum, k) for k in ks}
    else:
        measures = measured(own.grams, config["measures"], None)
        scores |= measure_scores(measures, **shape, meta={})
        matrices |= measures
    return scores, matrices


def _compared(
    folder: Path,
    scores: Mapping[str, LayerScores],
    matrices: Mapping[str, np.ndarray],
    record: Mapping[str, Any],
    tolerance: float,
) -> Iterator[tuple[Path, list[str]]]:
    """Files of a folder that statistics stand in, and what differs in each."""
    yield folder / "scores.json", _scores(folder, scores, tolerance)
    for name in ("cka.npz", "measures.npz", "spectrum.npz") if matrices else ():
        if (folder / name).is_file():
            arrays = read_npz(folder / name)[0]
            shared = [key for key in matrices if key in arrays]
            yield folder / name, [one for key in shared for one in _differ(key, arrays[key], matrices[key], tolerance)]
    if (folder / "layers.json").is_file():
        yield folder / "layers.json", _layers(LayerSet.load(folder / "layers.json"), scores, record)


def _scores(folder: Path, redone: Mapping[str, LayerScores], tolerance: float) -> list[str]:
    there, found = read_scores(folder / "scores.json"), []
    for key, score in redone.items():
        if key not in there:
            found.append(f"has no {key}")
            continue
        # Given states may leave out layers behind a final norm, which the Grams do not tell.
        found += _differ(key, there[key].values, np.where(there[key].valid, score.values, np.nan), tolerance)
        errors = there[key].stderr
        if errors is not None and score.stderr is not None:
            found += _differ(f"{key} (error)", errors, np.where(there[key].valid, score.stderr, np.nan), tolerance)
    return found


def _differ(name: str, there: np.ndarray, redone: np.ndarray, tolerance: float) -> list[str]:
    """A line about the largest difference, where it is more than rounding."""
    if there.shape != redone.shape:
        return [f"{name} has shape {list(there.shape)}, its Grams give {list(redone.shape)}"]
    apart = np.where(np.isnan(there) & np.isnan(redone), 0, np.abs(there - redone))
    apart = np.where(np.isnan(apart), np.inf, apart)
    place = np.unravel_index(int(apart.argmax()), apart.shape)
    if apart[place] <= tolerance:
        return []
    where, more = ", ".join(map(str, place)), int((apart > tolerance).sum()) - 1
    rest = f"; so do {more} more" if more else ""
    return [f"{name} at {where} is {there[place]:.6g}, its Grams give {redone[place]:.6g}{rest}"]


def _layers(chosen: LayerSet, scores: Mapping[str, LayerScores], record: Mapping[str, Any]) -> list[str]:
    spec = LayerSpec.parse(record["config"]["layers"])
    if not spec.needs_scores:
        return []
    again = resolve(
        spec,
        chosen.num_layers,
        scores=scores,
        criterion=chosen.criterion,
        trim=record["config"]["trim"],
        model_hash=chosen.model_hash,
    )
    return [] if again.layers == chosen.layers else [f"{list(chosen.layers)}, its Grams give {list(again.layers)}"]
