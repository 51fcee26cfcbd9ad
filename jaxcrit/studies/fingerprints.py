"""Grams of an earlier run, from its fingerprint; no model is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json, read_npz
from jaxcrit.core.rundir import RUN_FORMAT
from jaxcrit.similarity.grams import unpack_upper

FINGERPRINT_FORMAT = "jaxcrit.fingerprint"


@dataclasses.dataclass(frozen=True, eq=False)
class Fingerprint:
    """Of one dataset of a run.

    Attributes:
        name: of the dataset.
        packed: ``[L, N(N+1)/2]`` upper triangles of the centred Grams.
        sample_ids: ``[N]``.
        meta: position, kernel, hashes.
    """

    name: str
    packed: np.ndarray
    sample_ids: np.ndarray
    meta: Mapping[str, Any]

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.sample_ids)

    def grams(self) -> np.ndarray:
        """``[L, N, N]`` float32."""
        return unpack_upper(self.packed)


def read_run(path: str | Path) -> tuple[dict[str, Any], list[Fingerprint]]:
    """Reads ``run.json`` and the fingerprint of every dataset of a run of ``analyze`` or ``spectrum``.

    Raises:
        UserError: no such run, one that is not complete or has no Grams, or a fingerprint that is not the run's.
    """
    path = Path(path).expanduser()
    run = read_json(path / "run.json", RUN_FORMAT)
    if run.get("command") not in ("analyze", "spectrum") or "data" not in run:
        raise UserError(f"{path}: is a run of jaxcrit {run.get('command')}; expected one of jaxcrit analyze")
    if run.get("status") != "complete":
        raise UserError(f"{path}: is not complete; give the same jaxcrit {run['command']} again, and it goes on")
    names = list(run["data"])
    return run, [_read(path if len(names) == 1 else path / name, name, run) for name in names]


def _read(folder: Path, name: str, run: Mapping[str, Any]) -> Fingerprint:
    file = folder / "fingerprint.npz"
    if not file.exists():
        raise UserError(
            f"{folder}: has no fingerprint.npz, which runs of up to 4,096 samples keep; give --model and --data instead"
        )
    arrays, meta = read_npz(file)
    if meta.get("format") != FINGERPRINT_FORMAT or meta.get("format_version") != 1:
        raise UserError(f"{file}: expected {FINGERPRINT_FORMAT} version 1, got {meta.get('format')!r} version"
                        f" {meta.get('format_version')!r}")  # fmt: skip
    if meta.get("identity") != run.get("identity"):
        raise UserError(f"{file}: is not of the run beside it; write both again with jaxcrit {run['command']}")
    try:
        packed, ids = arrays["gram"], arrays["sample_ids"]
    except KeyError as error:
        raise UserError(f"{file}: has no {error}; write it again with jaxcrit {run['command']}") from None
    expected = run["model"]["num_layers"], len(ids) * (len(ids) + 1) // 2
    if packed.shape != expected:
        raise UserError(f"{file}: expected Grams of shape {expected}, got {packed.shape}; write it again")
    return Fingerprint(name, packed, ids, meta)
