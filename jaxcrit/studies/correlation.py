"""Two scores of one model against each other, or everything in a folder; loads no model, and no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit import __version__
from jaxcrit.core.deletions import Deletions, read_deletions
from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.files import as_path, write_json
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.layers import LayerScores, read_scores
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.selection.cautions import correlation_cautions
from jaxcrit.selection.correlation import Correlation, correlate, spearman_matrix
from jaxcrit.studies.options import CorrelateOptions

CORRELATION_FORMAT = "jaxcrit.correlation"
_FIRST_CHOICE = "delta_debiased"


@dataclasses.dataclass(frozen=True, eq=False)
class Correlated:
    """What came out.

    Attributes:
        names: of the M scores, as ``FOLDER:KEY``.
        scores: the M scores.
        spearman: ``[M, M]``, scores of direction ``high`` turned round; NaN where a pair has nothing to compare.
        pair: all about the two; None for a folder.
        warnings: what would mislead a reader.
        run: what ``run.json`` holds.
        out: where it was written, or None.
    """

    names: list[str]
    scores: list[LayerScores]
    spearman: np.ndarray
    pair: Correlation | None
    warnings: list[str]
    run: dict[str, Any]
    out: Path | None


def run_correlation(config: CorrelateOptions) -> Correlated:
    """Runs ``jaxcrit correlate`` and writes ``correlation.json`` and ``run.json`` where asked.

    Raises:
        UserError: not two scores, no such file or key, nothing to compare, or a directory that cannot be written.
    """
    if bool(config.scores) == bool(config.all):
        raise UserError("correlate: expected --scores=FILE[:KEY] twice, or --all=DIR, one of them")
    if config.all:
        names, scores = _everything(as_path(config.all))
        pair, warnings = None, []
    else:
        if len(config.scores) != 2:
            raise UserError(f"correlate: expected --scores=FILE[:KEY] twice, got it {len(config.scores)} times")
        found = [_read(text) for text in config.scores]
        names, scores = _short([(path.parent, score.name) for path, score in found]), [score for _, score in found]
        left = [_deletions(path, score) for path, score in found]
        pair = correlate(*scores, block=config.block or None, without_each=(left[0], left[1]), seed=config.seed)
        warnings = correlation_cautions(pair, names)
    matrix = spearman_matrix(scores)
    run = _record(config, names, scores)
    if not config.out:
        return Correlated(names, scores, matrix, pair, warnings, run, None)
    directory = RunDirectory.open(as_path(config.out), run["determines"])
    directory.begin(run)
    content: dict[str, Any] = {"scores": names, "spearman": plain(matrix.tolist())}
    if pair is not None:
        content |= {"pair": plain(dataclasses.asdict(pair)), "warnings": warnings}
    write_json(directory.path / "correlation.json", CORRELATION_FORMAT, content)
    directory.finish(run)
    return Correlated(names, scores, matrix, pair, warnings, run, directory.path)


def _read(text: str) -> tuple[Path, LayerScores]:
    """``FILE[:KEY]``, the key being `_FIRST_CHOICE` or else the first in the file."""
    path, key = as_path(text), ""
    if not path.exists() and ":" in text:
        name, _, key = text.rpartition(":")
        path = as_path(name)
    path = path / "scores.json" if path.is_dir() else path
    scores = read_scores(path)
    key = key or (_FIRST_CHOICE if _FIRST_CHOICE in scores else next(iter(scores)))
    if key not in scores:
        raise UserError(f"{path}: no score {key!r}{did_you_mean(key, scores)}; it holds {', '.join(scores)}")
    return path, scores[key]


def _deletions(path: Path, score: LayerScores) -> Deletions | None:
    left = read_deletions(path.parent, score.name)
    if left is not None and left.values.shape[1] != score.num_layers:
        raise UserError(
            f"{path.parent}: deletions.npz is of {left.values.shape[1]} layers, scores.json of"
            f" {score.num_layers}; write both again"
        )
    return left


def _everything(folder: Path) -> tuple[list[str], list[LayerScores]]:
    """Every score of every scores.json in and below a folder."""
    if not folder.is_dir():
        raise UserError(f"--all={folder}: expected a directory")
    files = sorted(folder.rglob("scores.json"))
    found = [(path, score) for path in files for score in read_scores(path).values()]
    if len(found) < 2:
        raise UserError(f"--all={folder}: expected at least 2 scores in the scores.json below it, got {len(found)}")
    layers = {score.num_layers: path for path, score in found}
    if len(layers) > 1:
        each = listed([f"{count} layers in {path}" for count, path in sorted(layers.items())])
        raise UserError(f"--all={folder}: expected scores of one model, got {each}")
    return _short([(path.parent, score.name) for path, score in found]), [score for _, score in found]


def _short(places: Sequence[tuple[Path, str]]) -> list[str]:
    """``FOLDER:KEY``, folders named from where they part; the key alone where all are of one folder."""
    folders = [folder.resolve().parts for folder, _ in places]
    common = 0
    while all(len(parts) > common for parts in folders) and len({parts[common] for parts in folders}) == 1:
        common += 1
    named = ["/".join(parts[common:]) for parts in folders]
    return [f"{folder}:{key}" if folder else key for folder, (_, key) in zip(named, places, strict=True)]


def _record(config: CorrelateOptions, names: Sequence[str], scores: Sequence[LayerScores]) -> dict[str, Any]:
    asked = {**dataclasses.asdict(config), "scores": list(config.scores)}
    hashes = {name: sha256_json(score.to_json()) for name, score in zip(names, scores, strict=True)}
    determines = {
        "command": "correlate",
        "scores": hashes,
        "block": config.block,
        "seed": config.seed,
        "jaxcrit": __version__,
    }
    return {"command": "correlate", "config": asked, "determines": determines}


def plain(value: Any) -> Any:
    """NaN as null."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
