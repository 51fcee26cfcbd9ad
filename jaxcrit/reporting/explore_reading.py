"""What `jaxcrit explore` reads of runs: scores, and beside them CKA, the chosen layers and how sure the choice is."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from jaxcrit.core.digests import RECORD
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import DAMAGED, Npz, as_path, check_name, read_json, read_npz
from jaxcrit.core.layers import LayerScores, LayerSet, read_scores
from jaxcrit.core.rundir import read_record
from jaxcrit.core.schema import Array, Count
from jaxcrit.core.selections import LayerSpec, default_count, resolve, span
from jaxcrit.reporting.analysis import null_delta, null_delta_stddev
from jaxcrit.reporting.tables import parted
from jaxcrit.selection.confidence import UNCERTAINTY_FORMAT

_CKA = Npz(
    "jaxcrit.cka",
    {
        "biased": Array("f", ("L", "M")),
        "debiased": Array("f", ("L", "M")),
        "null_mean": Array("f", ("L", "M")),
        "null_stddev": Array("f", ("L", "M"), optional=True),
    },
)


class ConfidenceSet(TypedDict):
    """Layers that may be the most critical one."""

    level: float
    layers: list[Count]


class SureChoice(TypedDict):
    """``choice`` of ``uncertainty.json``."""

    num_prompts: Count
    selection_probability: list[float]
    confidence_set: ConfidenceSet


class UncertaintyFile(TypedDict):
    """``uncertainty.json``."""

    criterion: str
    choice: SureChoice | None


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a score is set beside.

    Attributes:
        what: name of it.
        values: ``[L]``.
        stddev: ``[L]`` its standard deviation, or the most that this can be; None where not known.
    """

    what: str
    values: np.ndarray
    stddev: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A folder with ``scores.json``.

    Attributes:
        path: the folder.
        name: name of it, by which it is told from the others.
        model: name of the model.
        dataset: name of the rows.
        command: command that wrote it; empty where no run says so.
        identity: of its run; empty likewise.
        digest: sha256 of ``scores.json``.
        scores: scores by key.
        cka: arrays of ``cka.npz``; empty where there is none.
        chosen: ``layers.json``; None where there is none.
        sure: ``uncertainty.json``; None where there is none.
    """

    path: Path
    name: str
    model: str
    dataset: str
    command: str
    identity: str
    digest: str
    scores: Mapping[str, LayerScores]
    cka: Mapping[str, np.ndarray]
    chosen: LayerSet | None
    sure: Mapping[str, Any] | None

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return next(iter(self.scores.values())).num_layers

    @property
    def num_samples(self) -> int | None:
        """Samples that the first score which says so was measured on."""
        return next((one.meta["num_samples"] for one in self.scores.values() if "num_samples" in one.meta), None)

    @functools.cached_property
    def model_hash(self) -> str:
        """Identity of the model; empty where no score says so."""
        return next((one.meta["model_hash"] for one in self.scores.values() if one.meta.get("model_hash")), "")

    def reference(self, score: LayerScores) -> Reference | None:
        """What a score is set beside: its null, chance, or the unchanged model."""
        kind, meta = score.name.removesuffix("_debiased"), score.meta
        if self.cka and meta.get("bias") == "biased" and kind in ("delta", "step"):
            mean, stddev = self.cka["null_mean"], self.cka.get("null_stddev")
            if kind == "step":
                below = [None if one is None else np.append(np.nan, np.diagonal(one, 1)) for one in (mean, stddev)]
                return Reference("unrelated layers", np.asarray(below[0]), below[1])
            if meta.get("window") and "include_self" in meta:
                most = None if stddev is None else null_delta_stddev(self.cka, meta)
                return Reference("unrelated layers", null_delta(self.cka, meta), most)
        if len(meta.get("chance", ())) == score.num_layers:
            return Reference("chance", np.array(meta["chance"]))
        if "unchanged" in meta:
            return Reference("unchanged model", np.full(score.num_layers, meta["unchanged"]))
        return None


def choice_of(source: Source, score: LayerScores, trim: int) -> tuple[str, str]:
    """Layers by a score, and how sure that is: those of the run where it chose by this score, else critical:K.

    Args:
        source: folder of the score.
        score: one of its scores.
        trim: layers at each end that critical:K never chooses.
    """
    if source.chosen is not None and source.chosen.criterion == score.name:
        return f"{span(source.chosen.layers)} ({source.chosen.rule})", _sureness(source)
    spec = LayerSpec("critical", default_count(score.num_layers))
    if score.valid[trim : score.num_layers - trim].sum() < (spec.count or 0):
        return "-", f"fewer than {spec.count} layers may be chosen"
    return f"{span(resolve(spec, score.num_layers, scores=score, trim=trim).layers)} ({spec})", "not estimated"


def _sureness(source: Source) -> str:
    choice = source.sure and source.sure["choice"]
    if not choice or source.chosen is None:
        return "not estimated"
    least = min((choice["selection_probability"][layer] for layer in source.chosen.layers), default=0.0)
    among, prompts = choice["confidence_set"], choice["num_prompts"]
    often = "in all draws" if least == 1 else f"in at least {math.floor(100 * least)}% of draws"
    which = f"layer {among['layers'][0]}" if len(among["layers"]) == 1 else f"one of {span(among['layers'])}"
    return f"each {often} of {prompts} prompts; the most critical one is {which} at {among['level']:.0%}"


def read_runs(given: Sequence[str]) -> list[Source]:
    """The sources of runs, a run of several datasets having several.

    Args:
        given: run directories, or files ``scores.json``.

    Raises:
        UserError: a run that is absent, incomplete, damaged or of another version, that holds no scores, or that is
            given twice.
    """
    found = [source for text in given for source in _sources(as_path(text))]
    seen: dict[object, Source] = {}
    for one in found:
        for key in (one.path.resolve(), (one.identity, one.digest) if one.identity else one.path.resolve()):
            before = seen.setdefault(key, one)
            if before is not one:
                raise UserError(f"{one.path}: is {before.path} once more; give each run once")
    return _named(found)


def find_runs(folder: Path) -> list[Source]:
    """The sources of every ``scores.json`` in and below a folder.

    Raises:
        UserError: no folder, none in it, or one that is damaged or of another version.
    """
    if not folder.is_dir():
        raise UserError(f"--index={folder}: expected a directory")
    files = sorted(folder.glob("**/scores.json"))
    if not files:
        raise UserError(f"--index={folder}: expected scores.json in it or below, got none")
    return _named([_source(file.parent, *_record_of(file.parent)) for file in files])


def _sources(path: Path) -> Iterator[Source]:
    if not path.exists():
        raise UserError(f"{path}: no such run directory")
    if file := not path.is_dir():
        if path.name != "scores.json":
            raise UserError(f"{path}: expected a run directory, or its scores.json")
        path = path.parent
    record, dataset = _record_of(path)
    names = [] if file or dataset else [check_name(name, f"{path / RECORD}: data") for name in record.get("data", {})]
    several = [name for name in names if len(names) > 1 and (path / name / "scores.json").exists()]
    for name in several:
        yield _source(path / name, record, name)
    if (path / "scores.json").exists():
        yield _source(path, record, dataset)
    elif not several:
        wrote = f", which jaxcrit {record['command']} does not write" if "command" in record else ""
        raise UserError(f"{path}: holds no scores.json{wrote}; give runs of analyze, score, spectrum, ablate, ...")


def _record(folder: Path) -> dict[str, Any]:
    """``run.json`` of a folder; empty where there is none."""
    if not (folder / RECORD).exists():
        return {}
    record = read_record(folder)
    if record.get("status") != "complete":
        raise UserError(f"{folder}: is not complete; give the same jaxcrit {record.get('command')} again")
    return record


def _record_of(folder: Path) -> tuple[dict[str, Any], str]:
    """``run.json`` of the run that a folder is, or is a dataset of; and then the dataset's name."""
    if (folder / RECORD).exists() or not (folder.parent / RECORD).exists():
        return _record(folder), ""
    record = _record(folder.parent)
    return (record, folder.name) if folder.name in record.get("data", {}) else ({}, "")


def _source(folder: Path, record: Mapping[str, Any], dataset: str) -> Source:
    file = folder / "scores.json"
    scores = read_scores(file)
    first = next(iter(scores.values()))
    names = list(record.get("data", {}))
    if not dataset:
        dataset = (
            names[0] if len(names) == 1 else f"all {len(names)}" if names else first.meta.get("dataset", "unknown")
        )
    chosen = LayerSet.load(folder / "layers.json") if (folder / "layers.json").exists() else None
    if chosen is not None and chosen.num_layers != first.num_layers:
        raise UserError(
            f"{folder / 'layers.json'}: expected layers of {first.num_layers}, as {file.name} beside it has, got of"
            f" {chosen.num_layers}; {DAMAGED}"
        )
    return Source(
        path=folder,
        name="",
        model=_model_name(record.get("model", {}), first.meta),
        dataset=dataset,
        command=record.get("command", ""),
        identity=record.get("identity", ""),
        digest=hashlib.sha256(file.read_bytes()).hexdigest(),
        scores=scores,
        cka=_read_cka(folder / "cka.npz", first.num_layers),
        chosen=chosen,
        sure=_read_sure(folder / "uncertainty.json", first.num_layers),
    )


def _model_name(model: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    path = Path(model.get("path") or "")
    name = path.parent.name if path.suffix == ".npz" else path.name
    return name or meta.get("model_type") or (meta.get("model_hash") or "unknown")[:12]


def _read_cka(path: Path, num_layers: int) -> dict[str, np.ndarray]:
    return read_npz(path, _CKA, L=num_layers)[0] if path.exists() else {}


def _read_sure(path: Path, num_layers: int) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found = read_json(path, UNCERTAINTY_FORMAT, UncertaintyFile)
    choice = found["choice"]
    if choice and len(choice["selection_probability"]) != num_layers:
        raise UserError(
            f"{path}: expected selection_probability of {num_layers} layers, got"
            f" {len(choice['selection_probability'])}; {DAMAGED}"
        )
    return found


def _named(found: Sequence[Source]) -> list[Source]:
    """Sources with names that tell them apart, and one name for each model."""
    labels = parted([one.path for one in found])
    by_hash: dict[str, str] = {}
    for one in found:
        taken = {name for digest, name in by_hash.items() if digest != one.model_hash}
        name = f"{one.model} {one.model_hash[:6]}" if one.model in taken else one.model
        by_hash.setdefault(one.model_hash or one.model, name)
    return [
        dataclasses.replace(one, name=label or one.path.resolve().name, model=by_hash[one.model_hash or one.model])
        for one, label in zip(found, labels, strict=True)
    ]


def depths(sources: Sequence[Source]) -> str:
    """What must be said of runs of different depth; empty where all are of one."""
    each = sorted({one.num_layers for one in sources})
    if len(each) < 2:
        return ""
    return (
        f"Models of {listed(each)} layers stand side by side: layer n of one is not layer n of another (compare shares"
        " of depth), and agreement is shown within one depth."
    )
