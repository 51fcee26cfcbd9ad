"""The run directory: made when there is something to write, never shared by two runs, marked when complete.

While a process writes there it holds a lock on ``.lock`` in it, which the system takes back when the process ends,
however it ends; the file left then means nothing. Buckets know no locks: there a launch notices, before it says that
the run is complete or takes back what it wrote, that another one has begun since.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import platform
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from jaxcrit.core import console, digests, processes
from jaxcrit.core.digests import CHECKPOINTS, LEFT, LOCK, PARTIAL, RECORD, TRACKERS, Digests
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import as_path, in_bucket, json_text, read_json, remove_tree, write_text
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.layers import ChosenLayers
from jaxcrit.core.schema import AtLeastZero, Count, Layers, Size

RUN_FORMAT = "jaxcrit.run"
_TRIAL = ".jaxcrit-"  # objects that are written to see whether a bucket takes them
_TREES = (CHECKPOINTS, "tensorboard", *TRACKERS)  # directories whose files other libraries write


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
    digests: Digests


def read_record(folder: Path, kind: Any = RunRecord) -> dict[str, Any]:
    """Reads ``run.json``.

    Args:
        folder: run directory.
        kind: declaration of what it must hold, see `jaxcrit.core.schema`.

    Raises:
        UserError: see `read_json`.
    """
    return read_json(folder / RECORD, RUN_FORMAT, kind)


@dataclasses.dataclass(eq=False)
class RunDirectory:
    """Where one run writes.

    Attributes:
        path: the directory.
        determines: JSON values that determine the results.
        resumed: whether a run of this identity has written here before.
        written: files that this launch has written.
    """

    path: Path
    determines: Mapping[str, Any]
    resumed: bool
    written: digests.Written = dataclasses.field(default_factory=dict)
    _held: contextlib.ExitStack | None = None
    _made: bool = False
    _launch: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def identity(self) -> str:
        """Hash of everything that determines the results."""
        return sha256_json(self.determines)

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
        return cls(path, determines, processes.share(lambda: _resumes(path, determines)))

    def discard(self) -> None:
        """Takes back what a run that failed has written, unless an earlier run had already been here."""
        if self.resumed or not processes.first() or not self._mine():
            return
        for name in _TREES:
            remove_tree(self.path / name)
        record = self.path / RECORD  # goes last: what a kill leaves of this is a run
        for file in (*(as_path(name) for name in self.written if record.absolute() != as_path(name)), record):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        if in_bucket(self.path):
            return
        (self.path / LOCK).unlink(missing_ok=True)
        below = [folder for folder, *_ in os.walk(self.path, topdown=False)]
        for folder in below if self._made else below[:-1]:
            with contextlib.suppress(OSError):  # somebody else's files are in it
                os.rmdir(folder)

    def begin(self, run: Mapping[str, Any]) -> None:
        """Makes the directory, locks it, and writes ``run.json`` with status ``running``.

        Raises:
            UserError: it cannot be made, or another process writes there.
        """
        if self._held is None:
            processes.share(self._take)
            self._held = self._held or contextlib.ExitStack()
        self._write(run, "running", {})

    def release(self) -> None:
        """Lets others write to the directory."""
        if self._held is not None:
            self._held.close()

    def _take(self) -> None:
        with contextlib.ExitStack() as stack:
            try:
                self._made = not self.path.exists()
                self.path.mkdir(parents=True, exist_ok=True)
                if not in_bucket(self.path):
                    _lock(self.path, stack)
            except OSError as error:
                raise UserError(f"--out={self.path}: cannot be made ({error.strerror}); choose another") from None
            if _resumes(self.path, self.determines) != self.resumed:
                raise UserError(
                    f"--out={self.path}: another process has written there meanwhile; give the command again"
                )
            for folder, _, names in os.walk(self.path):
                for name in filter(LEFT.fullmatch, names):
                    Path(folder, name).unlink(missing_ok=True)
            self.written = stack.enter_context(digests.ledger(self.path))
            self._held = stack.pop_all()

    def finish(self, run: Mapping[str, Any]) -> None:
        """Writes ``run.json`` with status ``complete`` and the digests of all files, when these are on the disk.

        Raises:
            UserError: another launch has begun there since, of which a bucket knows nothing.
        """
        if not processes.first():
            return
        if not self._mine():
            raise UserError(
                f"--out={self.path}: another process has begun to write there since; results may be of both: give each"
                " a directory of its own"
            )
        self._write(run, "complete", digests.take(self.path, self.written))
        self.forget()

    def forget(self) -> None:
        """Removes what was kept for a launch that goes on, of a run that is complete."""
        for file in list(self.path.glob(PARTIAL)) if processes.first() else ():
            _unlink(file)

    def _mine(self) -> bool:
        """Whether ``run.json`` is of this launch."""
        try:
            return read_record(self.path).get("digests", {}).get("launch") == self._launch
        except UserError:
            return False

    def _write(self, run: Mapping[str, Any], status: str, files: Mapping[str, Any]) -> None:
        about = {"itself": "", "launch": self._launch, "files": files}
        text = json_text(RUN_FORMAT, {**run, "identity": self.identity, "status": status, "digests": about})
        write_text(self.path / RECORD, digests.sealed(text))


def _lock(path: Path, stack: contextlib.ExitStack) -> None:
    """Holds the lock of a local directory until the stack closes.

    Raises:
        OSError: its file cannot be made.
        UserError: another process holds it.
    """
    file = path / LOCK
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        closing = contextlib.ExitStack()
        closing.callback(os.close, handle)
        with closing:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = os.read(handle, 300).decode("utf-8", "replace").strip() or "another process"
                raise UserError(
                    f"--out={path}: {who} is writing there; wait until it has ended, or choose another directory"
                ) from None
            except OSError as error:
                console.note(
                    f"jaxcrit: {path}: its file system has no locks ({error.strerror}); start no other run there"
                )
            if not file.exists() or os.fstat(handle).st_ino != file.stat().st_ino:
                continue  # whoever held it has ended, and taken the file away
            with contextlib.suppress(OSError):  # the disk is full: then nobody is named
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
            stack.push(closing.pop_all())
            stack.callback(_unlink, file)
            return


def _unlink(file: Path) -> None:
    with contextlib.suppress(OSError):  # what stays means nothing
        file.unlink(missing_ok=True)


def _resumes(path: Path, determines: Mapping[str, Any]) -> bool:
    """Whether a run of this identity has written to ``path``, which must else be free and writable."""
    if in_bucket(path):
        _check_bucket(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"--out={path}: expected a directory, got a file")
    resumed = False
    if path.is_dir() and any(not _leftover(one.name) for one in path.iterdir()):
        if not (path / RECORD).exists():
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


def _leftover(name: str) -> bool:
    """Whether a file is what a run leaves that was killed before it had written anything."""
    return name == LOCK or name.startswith(_TRIAL) or bool(LEFT.fullmatch(name))


def _links(path: Path) -> list[str]:
    """Symbolic links below a local directory, but for those that a tracker makes in its own."""
    found = [] if in_bucket(path) else [Path(at, name) for at, *kinds in os.walk(path) for name in kinds[0] + kinds[1]]
    names = [one.relative_to(path) for one in found if one.is_symlink()]
    return [str(name) for name in names if name.parts[0] not in TRACKERS or len(name.parts) == 1]


def _check_bucket(path: Path) -> None:
    """Writes, reads and removes an object, all of which a run does."""
    trial = path / f"{_TRIAL}{uuid.uuid4().hex}"
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
