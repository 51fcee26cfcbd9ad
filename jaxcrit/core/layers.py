"""LayerScores (what was measured per layer) and LayerSet (which layers, and why); how both are kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from jaxcrit.core.deletions import Deletions, read_deletions
from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.files import inside, json_text, read_json, write_json, write_text
from jaxcrit.core.schema import Count, Layers, Size

Direction = Literal["low", "high"]
SCORES_FORMAT = "jaxcrit.scores"
LAYERS_FORMAT = "jaxcrit.layers"
_COLUMNS = ("values", "valid", "stderr")


class TrainedFacts(TypedDict):
    """What a score's meta tells of a training, where not every layer was trained."""

    layers: list[Count]
    criteria: list[str]


class ScoreMeta(TypedDict, total=False):
    """What others read of a score's meta."""

    window: Size | None
    num_samples: Count
    model_hash: str | None
    model_type: str | None
    dataset: str
    bias: str
    include_self: bool
    trained: TrainedFacts
    unchanged: float
    chance: list[float]
    p_holm: list[float]
    gain: float
    measure: str
    consensus: str
    of: Count


class ScoreEntry(TypedDict):
    """An entry of ``scores.json``."""

    values: list[float | None]
    valid: list[bool]
    direction: Direction


class FullScoreEntry(ScoreEntry, total=False):
    """With what may be left out."""

    stderr: list[float | None] | None
    meta: ScoreMeta


class ScoresFile(TypedDict):
    """``scores.json``."""

    num_layers: Layers
    scores: dict[str, FullScoreEntry]


class ChosenLayers(TypedDict):
    """``layers.json``, and ``layers`` of ``run.json``."""

    layers: list[Count]
    criterion: str
    rule: str
    num_layers: Layers
    model_hash: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class LayerScores:
    """One criterion's value for each layer.

    Attributes:
        name: score key, such as ``delta_debiased``.
        values: ``[L]`` float64; NaN where invalid.
        valid: ``[L]`` bool; layers at the edges are invalid, never invented.
        direction: whether ``low`` or ``high`` values are more critical.
        stderr: ``[L]`` float64 standard error, NaN where invalid, or None where not estimated.
        meta: what was measured on what (window, kernel, sample count, ...), JSON values only.
        deletions: the score with each sample left out, for intervals of what follows; None where not known. It is kept
            in ``deletions.npz``, not in ``scores.json``.
    """

    name: str
    values: np.ndarray
    valid: np.ndarray
    direction: Direction
    stderr: np.ndarray | None = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    deletions: Deletions | None = None

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return len(self.values)

    def ranking(self) -> np.ndarray:
        """Valid layers ``[V]``, most critical first; ties go to the lower index."""
        layers = np.flatnonzero(self.valid)
        signed = self.values[layers] if self.direction == "low" else -self.values[layers]
        return layers[np.argsort(signed, kind="stable")]

    def to_json(self) -> dict[str, Any]:
        """The entry of ``scores.json``; null where invalid."""

        def column(values: np.ndarray) -> list[float | None]:
            return [float(v) if ok and math.isfinite(v) else None for v, ok in zip(values, self.valid, strict=True)]

        return {
            "values": column(self.values),
            "valid": [bool(v) for v in self.valid],
            "direction": self.direction,
            "stderr": None if self.stderr is None else column(self.stderr),
            "meta": dict(self.meta),
        }

    @classmethod
    def from_json(cls, name: str, entry: Mapping[str, Any]) -> LayerScores:
        """Reads one entry of ``scores.json``."""

        def column(values: list[float | None]) -> np.ndarray:
            return np.array([math.nan if v is None else v for v in values], dtype=np.float64)

        stderr = entry.get("stderr")
        return cls(
            name=name,
            values=column(entry["values"]),
            valid=np.array(entry["valid"], dtype=bool),
            direction=entry["direction"],
            stderr=None if stderr is None else column(stderr),
            meta=entry.get("meta", {}),
        )


def write_scores(path: Path, scores: Mapping[str, LayerScores]) -> None:
    """Writes ``scores.json``: every criterion of one run."""
    num_layers = next(iter(scores.values())).num_layers
    entries = {name: score.to_json() for name, score in scores.items()}
    write_json(path, SCORES_FORMAT, {"num_layers": num_layers, "scores": entries})


def read_scores(path: str | Path, *, deletions: bool = False) -> dict[str, LayerScores]:
    """Reads ``scores.json``.

    Args:
        path: the file, or its run directory.
        deletions: whether scores carry what ``deletions.npz`` beside it has of them.

    Raises:
        UserError: absent, of another format, with columns of unequal length, or with deletions of other layers.
    """
    path = inside(path, "scores.json")
    content = read_json(path, SCORES_FORMAT, ScoresFile)
    expected, entries = content["num_layers"], content["scores"]
    wrong = [
        name
        for name, one in entries.items()
        if {len(column) for key in _COLUMNS if (column := one.get(key)) is not None} != {expected}
    ]
    if wrong or not entries:
        raise UserError(f"{path}: expected {expected} values in every score, got otherwise in {wrong}")
    scores = {name: LayerScores.from_json(name, entry) for name, entry in entries.items()}
    folder = path.parent
    for name, score in scores.items() if deletions else ():
        scores[name] = dataclasses.replace(score, deletions=read_deletions(folder, name, L=expected))
    return scores


def score_of(scores: Mapping[str, LayerScores], key: str, path: str | Path) -> LayerScores:
    """The score of a key among those of a file.

    Raises:
        UserError: the file holds none of it.
    """
    if key not in scores:
        raise UserError(f"{path}: no score {key!r}{did_you_mean(key, scores)}; it holds {', '.join(scores)}")
    return scores[key]


@dataclasses.dataclass(frozen=True)
class LayerSet:
    """Sorted layers, and why these.

    Attributes:
        layers: sorted 0-based layer indices.
        criterion: score key it was chosen by, or ``manual``.
        rule: the selection (`jaxcrit.core.selections`) in canonical words, such as ``critical:5``.
        num_layers: L of the model.
        model_hash: identity of the model, or None where unknown.
    """

    layers: tuple[int, ...]
    criterion: str
    rule: str
    num_layers: int
    model_hash: str | None = None

    def __str__(self) -> str:
        return f"layers {', '.join(map(str, self.layers))} of {self.num_layers} ({self.rule} by {self.criterion})"

    def complement(self) -> tuple[int, ...]:
        """The layers not in the set."""
        return tuple(sorted(set(range(self.num_layers)) - set(self.layers)))

    def to_json(self) -> str:
        """The text of ``layers.json``."""
        return json_text(LAYERS_FORMAT, dataclasses.asdict(self))

    def save(self, path: Path) -> None:
        """Writes ``layers.json``."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> LayerSet:
        """Reads ``layers.json``, given or in the run directory that is given.

        Raises:
            UserError: absent, of another format, or with layers outside the model.
        """
        path = inside(path, "layers.json")
        return cls.from_json(read_json(path, LAYERS_FORMAT, ChosenLayers), str(path))

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> LayerSet:
        """What `ChosenLayers` says.

        Args:
            content: content of ``layers.json``, or ``layers`` of ``run.json``.
            where: file, for messages.

        Raises:
            UserError: layers outside the model.
        """
        fields = {field.name: content[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**fields, "layers": checked(content["layers"], content["num_layers"], where)})


def span(layers: Iterable[int]) -> str:
    """Sorted layers in the words of the grammar, such as ``3-5,9``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def checked(layers: Iterable[int], num_layers: int, where: str) -> tuple[int, ...]:
    """Layers, sorted, each once.

    Args:
        layers: 0-based indices.
        num_layers: L.
        where: what they come from, for messages.

    Raises:
        UserError: layers outside the model.
    """
    chosen = sorted({int(layer) for layer in layers})
    outside = [layer for layer in chosen if not 0 <= layer < num_layers]
    if outside:
        raise UserError(f"{where}: expected layers 0 to {num_layers - 1}, got {span(outside)}")
    return tuple(chosen)
