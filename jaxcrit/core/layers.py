"""LayerScores (what was measured per layer), LayerSpec (which layers a user asks for), LayerSet (which and why)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxcrit.core.deletions import Deletions
from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.files import json_text, read_json, write_json, write_text

Direction = Literal["low", "high"]
SCORES_FORMAT = "jaxcrit.scores"
LAYERS_FORMAT = "jaxcrit.layers"


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


def read_scores(path: str | Path) -> dict[str, LayerScores]:
    """Reads ``scores.json``.

    Raises:
        UserError: absent, of another format, or with columns of unequal length.
    """
    content = read_json(path, SCORES_FORMAT)
    try:
        scores = {name: LayerScores.from_json(name, entry) for name, entry in content["scores"].items()}
        expected = content["num_layers"]
        wrong = [name for name, score in scores.items() if {len(score.values), len(score.valid)} != {expected}]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: scores.json is damaged ({error!r}); write it again with jaxcrit analyze") from None
    if wrong or not scores:
        raise UserError(f"{path}: expected {content['num_layers']} values in every score, got otherwise in {wrong}")
    return scores


@dataclasses.dataclass(frozen=True)
class LayerSet:
    """Sorted layers, and why these.

    Attributes:
        layers: sorted 0-based layer indices.
        criterion: score key it was chosen by, or ``manual``.
        rule: the LayerSpec in canonical words, such as ``critical:5``.
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
        """Reads ``layers.json``.

        Raises:
            UserError: absent, of another format, or with layers outside the model.
        """
        content = read_json(path, LAYERS_FORMAT)
        try:
            layers = _checked(content["layers"], int(content["num_layers"]), str(path))
            return cls(layers, content["criterion"], content["rule"], content["num_layers"], content.get("model_hash"))
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: layers.json is damaged ({error!r}); write it again with jaxcrit select") from None


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What ``--layers`` says; ranges are closed here, as a person writes them.

    ``all | critical[:K] | noncritical[:K] | random:K[:SEED] | first:K | last:K | a-b,c | @layers.json``

    Attributes:
        kind: the word in front, or ``list`` or ``file``.
        count: K, or None for the default of the rule.
        seed: of ``random``.
        layers: of ``list``.
        path: of ``file``.
    """

    kind: str
    count: int | None = None
    seed: int = 0
    layers: tuple[int, ...] = ()
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> LayerSpec:
        """Reads the grammar above.

        Raises:
            UserError: the text is not of the grammar.
        """
        text = text.strip()
        if text.startswith("@"):
            return cls("file", path=text[1:])
        if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
            layers: list[int] = []
            for part in text.split(","):
                start, _, stop = part.partition("-")
                span = range(int(start), int(stop or start) + 1)
                if not span:
                    raise UserError(f"--layers={text}: the range {part} is empty; write the lower layer first")
                layers.extend(span)
            return cls("list", layers=tuple(layers))
        word, *numbers = text.split(":")
        words = ("all", "critical", "noncritical", "random", "first", "last")
        if word not in words:
            raise UserError(
                f"--layers={text}: expected all, critical:K, noncritical:K, random:K[:SEED], first:K, last:K,"
                f" a list such as 3-5,9 or @layers.json{did_you_mean(word, words)}"
            )
        most = {"all": 0, "random": 2}.get(word, 1)
        needed = 1 if word in ("random", "first", "last") else 0
        if not needed <= len(numbers) <= most or not all(n.isdigit() for n in numbers):
            shape = {"all": "all", "random": "random:K[:SEED]"}.get(word, f"{word}:K")
            raise UserError(f"--layers={text}: expected {shape} with whole numbers")
        count = int(numbers[0]) if numbers else None
        if count == 0:
            raise UserError(f"--layers={text}: K must be at least 1")
        return cls(word, count=count, seed=int(numbers[1]) if len(numbers) > 1 else 0)

    def __str__(self) -> str:
        if self.kind == "file":
            return f"@{self.path}"
        if self.kind == "list":
            return ",".join(map(str, self.layers))
        parts = [self.kind] + ([] if self.count is None else [str(self.count)])
        return ":".join(parts + ([str(self.seed)] if self.kind == "random" else []))

    @property
    def needs_scores(self) -> bool:
        """Whether the rule ranks layers by a score."""
        return self.kind in ("critical", "noncritical")


def default_count(num_layers: int) -> int:
    """K where none is given: max(1, round(0.15 L)), five of 32 as in the paper."""
    return max(1, round(0.15 * num_layers))


def resolve(
    spec: LayerSpec,
    num_layers: int,
    *,
    scores: LayerScores | None = None,
    trim: int = 2,
    model_hash: str | None = None,
) -> LayerSet:
    """Turns a LayerSpec into a LayerSet for a model of L layers.

    Args:
        spec: what the user asked for.
        num_layers: L.
        scores: what ``critical`` and ``noncritical`` rank by (direction respected).
        trim: layers at each end that ``critical`` and ``noncritical`` never choose.
        model_hash: kept in the set; a file made for another model is refused.

    Raises:
        UserError: more layers asked for than there are, or layers outside the model.
    """
    criterion = "manual"
    count = default_count(num_layers) if spec.count is None else spec.count
    if spec.kind == "file":
        stored = LayerSet.load(spec.path)
        if stored.num_layers != num_layers:
            raise UserError(f"{spec.path}: made for {stored.num_layers} layers, but this model has {num_layers}")
        if model_hash and stored.model_hash and stored.model_hash != model_hash:
            raise UserError(
                f"{spec.path}: made for model {stored.model_hash[:12]}, this one is {model_hash[:12]};"
                " choose again, or write the layers out (--layers=3,4,5) to use them all the same"
            )
        return stored
    if spec.needs_scores:
        if scores is None:
            raise UserError(f"--layers={spec}: needs scores; run jaxcrit analyze first, or give --scores=FILE")
        if scores.num_layers != num_layers:
            raise UserError(f"--layers={spec}: scores of {scores.num_layers} layers, but the model has {num_layers}")
        ranking = [int(layer) for layer in scores.ranking() if trim <= layer < num_layers - trim]
        pool, criterion = (ranking if spec.kind == "critical" else ranking[::-1]), scores.name
        rule = f"{spec.kind}:{count}"
    else:
        everything = range(num_layers)
        if spec.kind == "random":
            pool = [int(layer) for layer in np.random.default_rng(spec.seed).permutation(num_layers)]
        else:
            pool = {"list": list(spec.layers), "last": list(everything)[::-1]}.get(spec.kind, list(everything))
        count = {"all": num_layers, "list": len(pool)}.get(spec.kind, count)
        rule = str(spec)
    if count > len(pool):
        trimmed = f" after trimming {trim} at each end" if spec.needs_scores else ""
        raise UserError(f"--layers={spec}: expected at most {len(pool)} layers{trimmed}, got {count}")
    return LayerSet(_checked(pool[:count], num_layers, f"--layers={spec}"), criterion, rule, num_layers, model_hash)


def _checked(layers: Iterable[int], num_layers: int, where: str) -> tuple[int, ...]:
    chosen = sorted({int(layer) for layer in layers})
    outside = [layer for layer in chosen if not 0 <= layer < num_layers]
    if outside:
        raise UserError(f"{where}: expected layers 0 to {num_layers - 1}, got {', '.join(map(str, outside))}")
    return tuple(chosen)
