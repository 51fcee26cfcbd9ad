"""What a run's files are: digests taken as they are written, listed in ``run.json``, compared where they are read.

sha256 takes 1.6 GB/s on a core with its instruction (blake2b 1.0, sha512 0.75). Arrays of a checkpoint lie in shards:
each process digests those that it holds, and who reads them on another mesh puts the same pieces together again. Sums
that devices take where the arrays are would spare them the way to the host, but took 0.1 s of compiling a shape.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypedDict, cast

from jaxcrit.core import console
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.hashing import sha256_text
from jaxcrit.core.reading import parse_json, read_text
from jaxcrit.core.schema import Count, conform

RECORD = "run.json"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
LEFT = re.compile(r"\..*\.part")  # what a kill leaves of a file that was being written
PARTIAL = "partial*"  # what is kept for a launch that goes on; it goes when the run is complete
# Of a checkpoint larger files are listed by their size: to read them back would cost as much as to write them, and
# their arrays have digests of their own.
LARGE = 2**24
TRACKERS = ("trackio", "wandb")  # directories that live on: their own processes write there, also later
_ITSELF = re.compile(r'"itself": "([^"]*)"')
# Formats that are given to commands apart from their runs, and so are spoken of where nothing vouches for them.
_GIVEN = ("jaxcrit.scores", "jaxcrit.layers", "jaxcrit.fingerprint", "jaxcrit.activations")
_DEEPEST = 3  # directories of a run above its files: arms/ARM-seed0/arm.json


class FileDigest(TypedDict, total=False):
    """A file in ``run.json``; large files of a checkpoint have no ``sha256``."""

    bytes: Count
    sha256: str


class DigestsRequired(TypedDict):
    """``digests`` of ``run.json``."""

    itself: str
    files: dict[str, FileDigest]


class Digests(DigestsRequired, total=False):
    """With which launch of the command it was that wrote it."""

    launch: str


class Sealed(TypedDict, total=False):
    """What is read here of a ``run.json``."""

    format: Any
    status: Any
    digests: Digests


Written = dict[str, FileDigest | None]  # by path; None of a file that has grown since
_open: list[tuple[str, Written]] = []  # of runs that are being written, by the front of their files' paths
_told: set[str] = set()


@contextlib.contextmanager
def ledger(run: Path) -> Iterator[Written]:
    """While open, notes every file that is written in a directory."""
    written: Written = {}
    _open.append((f"{_key(run)}/", written))
    try:
        yield written
    finally:
        _open[:] = [one for one in _open if one[1] is not written]


def note(path: Path, file: IO[bytes] | None = None) -> None:
    """Notes a file that was written, with its digest where its content is given."""
    key = _key(path)
    if runs := [written for front, written in _open if key.startswith(front)]:
        digest = None if file is None else digest_of(file)
        for written in runs:
            written[key] = digest


def digest_of(file: IO[bytes]) -> FileDigest:
    """Size and sha256 of a file, from its beginning."""
    file.seek(0)
    found = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    return {"bytes": file.seek(0, os.SEEK_END), "sha256": found}


def files_of(run: Path) -> dict[str, int]:
    """Files of a run and their bytes, by name: the one place that says which these are.

    Not ``run.json``, nor what a lock, a kill or a launch leaves to go on from, nor what lies in a run within the run,
    nor what trackers keep.
    """
    found: dict[str, int] = {}
    if "://" in os.fspath(run):
        found = cast(Any, run).files()
    for folder, below, names in os.walk(run) if not found else ():
        below[:] = [name for name in below if not Path(folder, name, RECORD).exists()]
        places = [Path(folder, name) for name in names]
        found |= {one.relative_to(run).as_posix(): one.stat().st_size for one in places if one.is_file()}
    inner = {name.removesuffix(RECORD) for name in found if name.endswith(f"/{RECORD}")}
    inner |= {f"{name}/" for name in TRACKERS}
    return {
        name: size
        for name, size in sorted(found.items())
        if name not in (RECORD, LOCK) and not name.startswith(tuple(inner)) and not _passing(Path(name).name)
    }


def _passing(name: str) -> bool:
    return bool(LEFT.fullmatch(name)) or fnmatch.fnmatch(name, PARTIAL)


def take(run: Path, written: Mapping[str, FileDigest | None]) -> dict[str, FileDigest]:
    """Digests of all files of a run, which are on the disk when this returns.

    Args:
        run: run directory.
        written: what is known of files that were just written; others are read.
    """
    found: dict[str, FileDigest] = {}
    bucket = "://" in os.fspath(run)
    for name, size in files_of(run).items():
        known = written.get(_key(run / name))
        if known is not None and known.get("bytes") == size:
            found[name] = known
        elif CHECKPOINTS in name.split("/") and (bucket or size > LARGE):
            found[name] = {"bytes": size}
        else:
            with (run / name).open("rb") as file:
                found[name] = digest_of(file)
                if not bucket:
                    _sync(file, run / name)
    return found


def _sync(file: IO[bytes], path: Path) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def sealed(text: str) -> str:
    """The text of ``run.json`` with its own digest in the place kept for it."""
    front, blank, rest = text.rpartition('"itself": ""')
    return f'{front}{blank[:-1]}{sha256_text(text)}"{rest}'


def check_seal(path: Path, text: str, content: Mapping[str, Any]) -> None:
    """Compares ``run.json`` with its own digest, if it has one.

    Raises:
        UserError: it is another.
    """
    there = max(_ITSELF.finditer(text), key=lambda one: one.start(), default=None)
    if there is None and "digests" not in content:
        return
    if there is None or sha256_text(text[: there.start(1)] + text[there.end(1) :]) != there[1]:
        raise UserError(f"{path}: is not as its run wrote it, by its own digest: it is damaged, or was changed by hand")


def check(path: Path, file: IO[bytes] | bytes, kind: str = "") -> None:
    """Compares a file that is being read with what the run that it lies in says of it.

    Args:
        path: file.
        file: its content.
        kind: its format, for what is said of one that no run vouches for.

    Raises:
        UserError: it is not what the run wrote.
    """
    path = path.absolute()
    for _, written in _open:
        if _key(path) in written:
            return _compare(path, written[_key(path)], file)
    run = next((one for one in list(path.parents)[:_DEEPEST] if (one / RECORD).is_file()), None)
    record = None if run is None else read_sealed(run / RECORD)
    if run is None or record is None:
        return _tell(f"{path}: lies apart from its run; its structure alone was checked", kind)
    if record.get("status") != "complete":
        return None
    if "digests" not in record:
        return _tell(f"{run}: was written without digests; the structure of its files alone is checked", kind)
    known = record["digests"]["files"].get(path.relative_to(run).as_posix())
    if known is None:
        return _tell(f"{path}: is not among the files of its run; its structure alone was checked", kind)
    return _compare(path, known, file)


def read_sealed(path: Path) -> Sealed | None:
    """A ``run.json``, as far as digests go; None where another program's is called so.

    Raises:
        UserError: it is damaged.
    """
    text = read_text(path, "a run.json")
    content = parse_json(text, path)
    if not isinstance(content, dict) or content.get("format") != "jaxcrit.run":
        return None
    check_seal(path, text, content)
    return cast(Sealed, conform(content, Sealed, str(path)))


def differing(run: Path, known: Mapping[str, FileDigest], *, below: str = "") -> dict[str, str]:
    """Files of a run that are not what ``run.json`` says; those that are gone are left out.

    Args:
        run: run directory.
        known: ``files`` of its ``digests``.
        below: a directory in it, with ``/``, which alone is looked at.

    Returns:
        What differs, by name.
    """
    found = {}
    for name, size in files_of(run).items():
        if name not in known or not name.startswith(below):
            continue
        if size != known[name]["bytes"]:
            found[name] = f"{size:,} bytes, expected {known[name]['bytes']:,}"
        elif "sha256" in known[name]:
            with (run / name).open("rb") as file:
                if digest_of(file) != known[name]:
                    found[name] = "other content"
    return found


def refuse_differing(run: Path, known: Mapping[str, FileDigest], *, below: str = "") -> None:
    """Refuses a run with files that are not what ``run.json`` says; see `differing`."""
    if found := differing(run, known, below=below):
        said = listed([f"{name} ({what})" for name, what in found.items()], 3)
        raise UserError(f"{run}: holds what its run did not write: {said}; {_ADVICE}")


_ADVICE = "it is damaged, or was changed by hand: put it back, or write it again in another directory"


def _compare(path: Path, known: FileDigest | None, file: IO[bytes] | bytes) -> None:
    if known is None or "sha256" not in known:
        return
    found = hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else digest_of(file)["sha256"]
    if found != known["sha256"]:
        raise UserError(f"{path}: is not the file that its run wrote, by its digest in {RECORD}; {_ADVICE}")


def _tell(text: str, kind: str) -> None:
    if kind in _GIVEN and text not in _told:
        _told.add(text)
        console.remark(f"jaxcrit: {text}")


def _key(path: Path) -> str:
    return os.fspath(path.absolute())


Pieces = dict[str, dict[str, str]]  # of an array, by its name: digest of each piece, by the ranges that it spans


def of_arrays(tree: Any) -> Pieces:
    """Digests of the arrays of a tree, by piece; a collective: each process digests the shards that it holds."""
    from jaxcrit.core import processes

    parts = [(name, span, part) for name, leaf in _named(tree) for span, part in _shards(leaf)]
    own: Pieces = {name: {} for name, _ in _named(tree)}
    for (name, span, _), digest in zip(parts, _together(part for *_, part in parts), strict=True):
        own[name][span] = digest
    everyone = processes.gather(own)
    return {name: {span: one for own in everyone for span, one in own[name].items()} for name in own}


def differing_arrays(tree: Any, known: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Names of arrays that are not what their digests say, on whatever mesh they lie now; a collective."""
    from jaxcrit.core import processes

    wrong: list[str] = []
    as_written: list[tuple[str, str, Any]] = []
    for name, leaf in _named(tree):
        pieces, shards = known.get(name, {}), list(_shards(leaf))
        spans = [span for spans in processes.gather([span for span, _ in shards]) for span in spans]
        if sorted(spans) == sorted(pieces):
            as_written += [(name, pieces[span], part) for span, part in shards]
        elif not _put_together(processes.whole(leaf), pieces):
            wrong.append(name)
    found = _together(part for *_, part in as_written)
    wrong += [name for (name, digest, _), one in zip(as_written, found, strict=True) if one != digest]
    return sorted({name for names in processes.gather(wrong) for name in names})


def _put_together(whole: Any, pieces: Mapping[str, str]) -> bool:
    """Whether an array that was written in other pieces is what their digests say."""
    try:
        parts = {span: whole[_ranges(span)] for span in pieces}
    except (ValueError, IndexError):
        return False
    covered = sum(part.size for part in parts.values()) == whole.size
    return covered and all(_digest(part) == pieces[span] for span, part in parts.items())


def _together(parts: Iterable[Any]) -> list[str]:
    """Digests of pieces, on all cores: hashing holds no lock of Python's."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_digest, parts))


def _named(tree: Any) -> list[tuple[str, Any]]:
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(keys, simple=True, separator="."), leaf) for keys, leaf in leaves]


def _shards(leaf: Any) -> Iterator[tuple[str, Any]]:
    """Of an array the pieces that this process is the one to digest."""
    if not hasattr(leaf, "addressable_shards"):  # of numpy
        yield ",".join(f"0:{length}" for length in leaf.shape), leaf
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            spans = [part.indices(length)[:2] for part, length in zip(shard.index, leaf.shape, strict=True)]
            yield ",".join(f"{low}:{high}" for low, high in spans), shard.data


def _ranges(span: str) -> tuple[slice, ...]:
    return tuple(slice(*map(int, part.split(":"))) for part in span.split(",") if part)


def _digest(part: Any) -> str:
    import numpy as np

    return hashlib.sha256(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data).hexdigest()[:32]
