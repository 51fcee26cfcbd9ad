"""Reads fingerprints of earlier runs, and brings two of them onto the same samples."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import FORMAT_VERSION, as_path, read_json, read_npz
from jaxcrit.core.rundir import RUN_FORMAT
from jaxcrit.similarity import DegenerateError, PackedGrams, pack_upper

FINGERPRINT_FORMAT = "jaxcrit.fingerprint"
_META = ("model_hash", "template_hash", "position", "kernel", "num_layers")
# Squared distances of equal rows come out of a float32 Gram as rounding, some 1e-7 of the squared lengths.
_EQUAL = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Fingerprint:
    """What is kept of a model's activations on some samples.

    Attributes:
        path: path of the file.
        grams: centred Grams of all layers, packed.
        sample_ids: ``[N]`` of the prompt each sample comes from.
        units: ``[N]`` int, which prompt that is.
        meta: ``model_hash``, ``template_hash``, ``position``, ``kernel`` and more.
        digest: sha256 of the file.
    """

    path: Path
    grams: PackedGrams
    sample_ids: list[str]
    units: np.ndarray
    meta: Mapping[str, Any]
    digest: str


def read_fingerprint(given: str) -> Fingerprint:
    """Reads ``fingerprint.npz``, given itself or by the run directory that holds it.

    Raises:
        UserError: absent, cut short, of another format or version, or its parts do not fit together.
        DegenerateError: fewer than 4 samples, repeated ones, NaN or infinity, a constant layer.
    """
    path = _locate(as_path(given))
    arrays, meta = read_npz(path)
    if meta.get("format") != FINGERPRINT_FORMAT:
        raise UserError(f"{path}: expected a {FINGERPRINT_FORMAT}, got {meta.get('format')!r}")
    if meta.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {meta.get('format_version')!r};"
            " upgrade jaxcrit or run jaxcrit analyze again"
        )
    missing = [name for name in ("gram", "sample_ids", "units") if name not in arrays]
    missing += [name for name in _META if name not in meta]
    if missing:
        raise UserError(f"{path}: has no {listed(missing)}; run jaxcrit analyze again")
    packed, count = arrays["gram"], len(arrays["sample_ids"])
    if packed.shape != (meta["num_layers"], count * (count + 1) // 2) or len(arrays["units"]) != count:
        raise UserError(
            f"{path}: expected Grams of {meta['num_layers']} layers and {count} samples, got {packed.shape}; the file"
            " is damaged, run jaxcrit analyze again"
        )
    ids = [str(one) for one in arrays["sample_ids"]]
    grams = PackedGrams(packed)
    _refuse_degenerate(path, grams, ids, meta["position"] == "all")
    return Fingerprint(path, grams, ids, arrays["units"], meta, hashlib.sha256(path.read_bytes()).hexdigest())


def read_run(given: str | Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """Reads ``run.json`` of a run of ``analyze`` or ``spectrum``; and where the fingerprint of each dataset lies.

    Raises:
        UserError: no such run, one that is not complete, or one without Grams.
    """
    path = as_path(given)
    run = read_json(path / "run.json", RUN_FORMAT)
    if run.get("command") not in ("analyze", "spectrum") or "data" not in run:
        raise UserError(f"{path}: is a run of jaxcrit {run.get('command')}; expected one of jaxcrit analyze")
    if run.get("status") != "complete":
        raise UserError(f"{path}: is not complete; give the same jaxcrit {run['command']} again, and it goes on")
    names = list(run["data"])
    return run, {name: _locate(path if len(names) == 1 else path / name) for name in names}


def read_own(file: Path, run: Mapping[str, Any]) -> Fingerprint:
    """Reads a fingerprint that `read_run` found; it must be of that run. Errors are those of `read_fingerprint`."""
    fingerprint = read_fingerprint(str(file))
    if fingerprint.meta.get("identity") != run["identity"]:
        raise UserError(f"{file}: is not of the run beside it; write both again with jaxcrit {run['command']}")
    return fingerprint


def paired(a: Fingerprint, b: Fingerprint, *, common: bool = False) -> tuple[Fingerprint, Fingerprint]:
    """The same samples of both, in the order of the first.

    Args:
        a: one.
        b: the other.
        common: leave out samples that only one has.

    Raises:
        UserError: their samples differ, or they were captured at another position or with another kernel.
    """
    for name in ("position", "kernel", "normalize"):
        ours, theirs = a.meta.get(name, ""), b.meta.get(name, "")
        if ours != theirs:
            raise UserError(
                f"expected two fingerprints of one {name}, got {ours or 'none'} in {a.path} and {theirs or 'none'} in"
                f" {b.path}; analyze both with the same --{name}"
            )
    if a.sample_ids == b.sample_ids:
        return a, b
    if a.meta["position"] == "all":
        raise UserError(
            f"{a.path} and {b.path}: tokens can be compared only where both runs have the same prompts in the same"
            " order, cut into the same number of tokens; use --position=last or mean for both"
        )
    left, right = ({one: place for place, one in enumerate(side.sample_ids)} for side in (a, b))
    shared = [one for one in a.sample_ids if one in right]
    if len(shared) < max(len(left), len(right)) and not common:
        raise UserError(
            f"expected the same samples in both, got {len(left)} in {a.path} and {len(right)} in {b.path},"
            f" {len(shared)} in common; analyze both on the same --data"
            + (", or compare what they have in common with --common" if len(shared) >= 4 else "")
        )
    if len(shared) < 4:
        raise UserError(f"{a.path} and {b.path}: expected at least 4 samples in common, got {len(shared)}")
    return _only(a, [left[one] for one in shared]), _only(b, [right[one] for one in shared])


def _locate(path: Path) -> Path:
    if not path.is_dir():
        return path
    if (path / "fingerprint.npz").exists():
        return path / "fingerprint.npz"
    several = sorted(file.parent.name for file in path.glob("*/fingerprint.npz"))
    if several:
        raise UserError(f"{path}: a run of several datasets; give one of them, such as {path / several[0]}")
    raise UserError(
        f"{path}: no fingerprint.npz there; jaxcrit analyze keeps one of at most 10 MB, and with --fingerprint one of"
        " up to 4,096 samples: run it with that, into another --out"
    )


def _refuse_degenerate(path: Path, grams: PackedGrams, ids: list[str], tokens: bool) -> None:
    if len(ids) < 4:
        raise DegenerateError(f"{path}: expected at least 4 samples, got {len(ids)}; give more prompts")
    lengths = grams.diagonals
    broken = [layer for layer, gram in enumerate(chain(*grams.parts)) if not np.isfinite(gram).all()]
    if broken:
        raise DegenerateError(f"{path}: layers {listed(broken)} have NaN or infinity; analyze again", broken)
    constant = np.flatnonzero(lengths.sum(axis=1) <= 0).tolist()
    if constant:
        raise DegenerateError(
            f"{path}: layers {listed(constant)} are constant: all samples are the same there", constant
        )
    if tokens:
        return
    twice = [one for one, times in Counter(ids).items() if times > 1]
    if twice:
        raise DegenerateError(f"{path}: {len(twice)} samples are there more than once (first: {twice[0][:12]})")
    near = np.tri(len(ids), k=-1, dtype=bool)
    for gram, length in zip(grams, lengths, strict=True):
        sums = length[:, None] + length
        near &= sums - 2 * gram <= _EQUAL * sums
    if near.any():
        later, first = (int(place) for place in np.argwhere(near)[0])
        raise DegenerateError(
            f"{path}: samples {first} and {later}, counted from 0, are the same in every layer; remove duplicates and"
            " analyze again",
            samples=(first, later),
        )


def _only(fingerprint: Fingerprint, places: list[int]) -> Fingerprint:
    """Some of the samples, in this order; what is left is centred again."""
    kept = []
    for gram in fingerprint.grams:
        part = gram[np.ix_(places, places)].astype(np.float64)
        means = part.mean(axis=0)
        kept.append(pack_upper((part - means - means[:, None] + means.mean())[None]))
    ids = [fingerprint.sample_ids[place] for place in places]
    return dataclasses.replace(
        fingerprint, grams=PackedGrams(np.concatenate(kept)), sample_ids=ids, units=np.arange(len(places))
    )
