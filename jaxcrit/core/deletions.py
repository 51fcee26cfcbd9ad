"""What each score would be without each sample, kept beside ``scores.json`` for intervals of what follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import DAMAGED, Npz, read_npz, write_npz
from jaxcrit.core.schema import Array

DELETIONS_FORMAT = "jaxcrit.deletions"
_FILE = "deletions.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class Deletions:
    """One score with each sample left out in turn.

    Attributes:
        values: ``[N, L]`` float64; NaN where invalid.
        sample_ids: ``[N]`` identity of each sample, by which two scores know the samples they share.
    """

    values: np.ndarray
    sample_ids: Sequence[str]


def write_deletions(folder: Path, values: Mapping[str, np.ndarray], sample_ids: Sequence[str]) -> None:
    """Writes ``deletions.npz``: by score key ``[N, L]``, and the samples that were left out."""
    meta = {"format": DELETIONS_FORMAT, "format_version": 1}
    write_npz(folder / _FILE, {**values, "sample_ids": np.array(sample_ids)}, meta)


def read_deletions(folder: Path, key: str, **sizes: int) -> Deletions | None:
    """Reads one score's deletions from a folder; None where it has none.

    Args:
        folder: folder of the scores.
        key: key of the score.
        **sizes: ``L`` where it is known.

    Raises:
        UserError: the file is there, but is no such file, or of other layers.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    holds = {"sample_ids": Array("U", ("N",)), key: Array("f", ("N", "L"), optional=True)}
    arrays, _ = read_npz(path, Npz(DELETIONS_FORMAT, holds), **sizes)
    if (count := len(arrays["sample_ids"])) < 2:
        raise UserError(f"{path}: expected 2 samples or more, got {count}; {DAMAGED}")
    if key in arrays and np.isinf(arrays[key]).any():
        raise UserError(f"{path}: expected finite numbers of {key}, or NaN where it has none, got infinity; {DAMAGED}")
    return Deletions(arrays[key], arrays["sample_ids"].tolist()) if key in arrays else None


def jackknife_stderr(left: np.ndarray) -> np.ndarray:
    """Jackknife: ``sqrt((U-1)/U sum_m (left_m - mean)^2)`` of ``[U, L]``, one value per sample or prompt left out.

    About 1.5 times too wide for nearly unrelated layers of many dimensions, right otherwise.
    """
    return np.sqrt((len(left) - 1) * left.var(axis=0))
