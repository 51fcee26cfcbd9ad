"""Reads fingerprints of earlier runs, and brings two of them onto the same samples."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from jaxcrit.core.digests import RECORD
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import DAMAGED, Npz, as_path, check_name, read_npz
from jaxcrit.core.rundir import read_record
from jaxcrit.core.schema import Array, Layers, conform
from jaxcrit.similarity import DegenerateError, PackedGrams, pack_upper

FINGERPRINT_FORMAT = "jaxcrit.fingerprint"


class FingerprintMeta(TypedDict):
    """The meta entry of ``fingerprint.npz``."""

    model_hash: str | None
    template_hash: str
    position: Literal["last", "mean", "all"]
    kernel: str
    num_layers: Layers
    identity: str


class GramModel(TypedDict):
    """The model of a run of ``analyze`` or ``spectrum``."""

    family: str | None
    hash: str | None
    num_layers: Layers


class GramRun(TypedDict):
    """``run.json`` of such a run."""

    identity: str
    model: GramModel
    data: dict[str, dict[str, Any]]


HOLDS = Npz(
    FINGERPRINT_FORMAT,
    {"sample_ids": Array("U", ("N",)), "units": Array("iu", ("N",)), "gram": Array("f", ("L", "P"))},
    FingerprintMeta,
)


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
    arrays, meta = read_grams(path)
    ids, units = arrays["sample_ids"].tolist(), arrays["units"]
    grams = PackedGrams(arrays["gram"].astype(np.float32, copy=False))
    _refuse_degenerate(path, grams, ids, meta["position"] == "all")
    return Fingerprint(path, grams, ids, units, meta, hashlib.sha256(path.read_bytes()).hexdigest())


def read_grams(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the arrays and the meta entry of ``fingerprint.npz``; ``gram`` is packed, ``[L, N (N+1)/2]``.

    Raises:
        UserError: absent, cut short, of another format or version, or its parts do not fit together.
    """
    arrays, meta = read_npz(path, HOLDS)
    count = len(arrays["sample_ids"])
    if arrays["gram"].shape != (meta["num_layers"], count * (count + 1) // 2):
        raise UserError(
            f"{path}: expected Grams of {meta['num_layers']} layers and {count} samples, got {arrays['gram'].shape};"
            f" {DAMAGED}"
        )
    return arrays, meta


def read_run(given: str | Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """Reads ``run.json`` of a run of ``analyze`` or ``spectrum``; and where the fingerprint of each dataset lies.

    The directory of one of several datasets stands for that dataset alone.

    Raises:
        UserError: no such run, one that is not complete, or one without Grams.
    """
    path, alone = as_path(given), ""
    if path.is_dir() and not (path / RECORD).exists() and (path.parent / RECORD).exists():
        path, alone = path.parent, path.name
    run = read_record(path)
    if run.get("command") not in ("analyze", "spectrum") or "data" not in run:
        raise UserError(f"{path}: is a run of jaxcrit {run.get('command')}; expected one of jaxcrit analyze")
    if run.get("status") != "complete":
        raise UserError(f"{path}: is not complete; give the same jaxcrit {run['command']} again, and it goes on")
    conform(run, GramRun, f"{path / 'run.json'}", DAMAGED)
    names = [check_name(name, f"{path / 'run.json'}: data", alone=len(run["data"]) == 1) for name in run["data"]]
    found = {name: _locate(path if len(names) == 1 else path / name) for name in names if alone in ("", name)}
    if not found:
        raise UserError(f"{given}: expected a dataset of the run in {path}: {', '.join(names)}")
    return run, found


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
        with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 nothing is near
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
