"""The run directory: made when there is something to write, never shared by two runs, marked when complete."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import as_path, in_bucket, read_json, remove_tree, write_json
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.layers import ChosenLayers
from jaxcrit.core.schema import AtLeastZero, Count, Layers, Size

RUN_FORMAT = "jaxcrit.run"


class NamedModel(TypedDict, total=False):
    """A model in ``run.json``."""

    path: str
    hash: str | None
    family: str | None
    num_layers: Layers
    width: Size


class SizedModel(TypedDict):
    """What reports take from a model in ``run.json``."""

    num_layers: Layers


class CountedRows(TypedDict):
    """What reports take from a dataset in ``run.json``."""

    num_samples: Count


class SweepCost(TypedDict):
    """``block_evaluations`` of a sweep, in ``run.json``."""

    sweep: Count
    forward_passes: AtLeastZero
    a_pass_each: Count


class RunRecord(TypedDict, total=False):
    """``run.json``, of any command."""

    command: str
    status: Literal["running", "complete"]
    identity: str
    config: dict[str, Any]
    determines: dict[str, Any]
    model: NamedModel
    data: dict[str, dict[str, Any]]
    layers: ChosenLayers
    result: dict[str, Any]
    time: dict[str, Any]


def read_record(folder: Path, kind: Any = RunRecord) -> dict[str, Any]:
    """Reads ``run.json``.

    Args:
        folder: run directory.
        kind: declaration of what it must hold, see `jaxcrit.core.schema`.

    Raises:
        UserError: see `read_json`.
    """
    return read_json(folder / "run.json", RUN_FORMAT, kind)


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Where one run writes.

    Attributes:
        path: the directory.
        identity: hash of everything that determines the results.
        resumed: whether a run of this identity has written here before.
    """

    path: Path
    identity: str
    resumed: bool

    @classmethod
    def open(cls, path: Path, determines: Mapping[str, Any]) -> RunDirectory:
        """Checks that a run may write to ``path``; makes nothing yet.

        Args:
            path: directory that is absent, empty, or of a run with the same identity.
            determines: JSON values: command, configuration, model, data and template hashes.

        Raises:
            UserError: it holds another run or other files, or cannot be written.
        """
        path = as_path(path)
        return cls(path, sha256_json(determines), processes.share(lambda: _resumes(path, determines)))

    def discard(self) -> None:
        """Takes back what a run that failed has written, unless an earlier run had already been here."""
        if not self.resumed and processes.first():
            remove_tree(self.path)

    def begin(self, run: Mapping[str, Any]) -> None:
        """Makes the directory and writes ``run.json`` with status ``running``."""
        processes.share(self._make)
        write_json(self.path / "run.json", RUN_FORMAT, {**run, "identity": self.identity, "status": "running"})

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out={self.path}: cannot be made ({error.strerror}); choose another") from None

    def finish(self, run: Mapping[str, Any]) -> None:
        """Writes ``run.json`` with status ``complete``."""
        write_json(self.path / "run.json", RUN_FORMAT, {**run, "identity": self.identity, "status": "complete"})


def _resumes(path: Path, determines: Mapping[str, Any]) -> bool:
    """Whether a run of this identity has written to ``path``, which must else be free and writable."""
    if in_bucket(path):
        _check_bucket(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"--out={path}: expected a directory, got a file")
    resumed = False
    if path.is_dir() and any(path.iterdir()):
        if not (path / "run.json").exists():
            raise UserError(f"--out={path}: holds files that are no jaxcrit run; choose an empty or new directory")
        earlier = read_record(path)
        if earlier.get("identity") != sha256_json(determines):
            differs = _difference(earlier.get("determines", {}), determines)
            raise UserError(f"--out={path}: holds another run ({differs}); choose another directory, or remove it")
        resumed = True
    if links := _links(path):
        raise UserError(f"--out={path}: holds links ({listed(links, 3)}), through which it would write elsewhere")
    if in_bucket(path):
        return resumed
    parent = path if path.is_dir() else next(p for p in path.absolute().parents if p.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise UserError(f"--out={path}: cannot be written ({error.strerror}); choose another directory") from None
    return resumed


def _links(path: Path) -> list[str]:
    """Symbolic links below a local directory."""
    found = [] if in_bucket(path) else [Path(at, name) for at, *kinds in os.walk(path) for name in kinds[0] + kinds[1]]
    return [str(one.relative_to(path)) for one in found if one.is_symlink()]


def _check_bucket(path: Path) -> None:
    """Writes, reads and removes an object, all of which a run does."""
    trial = path / f".jaxcrit-{uuid.uuid4().hex}"
    try:
        trial.write_bytes(b"")
        trial.read_bytes()
        trial.unlink()
    except OSError as error:
        raise UserError(
            f"--out={path}: cannot be written ({error.strerror}); choose another, or have its owner allow it"
        ) from None


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    """Names the first things that differ, such as ``window 3 there, 5 now``."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if old != new:
                found.append(_difference(old, new))
        elif old != new:
            found.append(f"{key} {_short(old)} there, {_short(new)} now")
    return "; ".join(found[:3]) or "of another version of jaxcrit"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
