"""Atomic files in jaxcrit's public formats: versioned JSON, npz with a ``meta`` entry, plain text."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import shutil
import tempfile
import time
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxcrit.core import digests, processes
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.reading import LARGEST_TEXT, Stored, members, parse_json, plain_size, read_text, stored_npy
from jaxcrit.core.schema import Array, conform, conform_arrays, short

FORMAT_VERSION = 1
# Of formats that have changed: the version written; earlier ones are read.
VERSIONS = {"jaxcrit.run": 2}
DAMAGED = "the file is damaged, or another program's: write it again"
# Directories and files that runs write; no dataset among several may be called so.
_OWN_NAMES = ("configs", "checkpoints", "analysis", "arms", "tensorboard", "trackio", "wandb")
_OWN_ENDINGS = (".json", ".jsonl", ".npz", ".png", ".html", ".safetensors", ".part", ".md", ".txt", ".yml", ".yaml")
_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes
_REWRITE = 10.0  # seconds; a bucket refuses more than about one change of an object a second
_RUST = re.compile(r"os error (\d+)")


def as_path(text: str | Path) -> Path:
    """A local path, ``~`` expanded, or a `BucketPath` for ``gs://BUCKET/DIR``, which serves as one.

    Raises:
        UserError: ``SCHEME://`` of another kind, or gcsfs is not installed.
    """
    text = os.fspath(text)
    scheme, found, rest = text.partition("://")
    if not found:
        return _expanded(text)
    if scheme != "gs" or not rest.strip("/"):
        raise UserError(f"{text}: expected a local path or gs://BUCKET/DIR")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: needs gcsfs: pip install 'jaxcrit[gcs]'")
    from jaxcrit.core.buckets import BucketPath

    return cast(Path, BucketPath(text))


def inside(text: str | Path, name: str) -> Path:
    """A path: the file it names, or the one of a name in the run directory it names."""
    path = as_path(text)
    return path / name if path.is_dir() else path


def local_path(text: str | Path, flag: str = "", *, named: str = "") -> Path:
    """A local path, ``~`` expanded.

    Args:
        text: path.
        flag: option that it was given by, for messages.
        named: what named it, where that is no option.

    Raises:
        UserError: it is one in a bucket.
    """
    if "://" in os.fspath(text):
        named = named or f"--{flag}={text}"
        raise UserError(f"{named}: expected a local directory; gcloud storage rsync --recursive copies between the two")
    return _expanded(os.fspath(text))


def _expanded(text: str) -> Path:
    """A path that the system can be asked about.

    Raises:
        UserError: a NUL, letters that no file name has, a part that is too long, or ``~`` of a user that there is not.
    """
    try:
        encoded = text.encode("utf-8")
        if b"\0" in encoded or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME or len(encoded) > _LONGEST_PATH:
            raise UserError(f"{short(text)}: expected a path, got a NUL or a name of more than {_LONGEST_NAME} bytes")
        return Path(text).expanduser()
    except UnicodeEncodeError:
        raise UserError(f"{text!a}: expected a path in UTF-8; rename the file") from None
    except RuntimeError:
        raise UserError(f"{text}: expected a path, got the home of a user that there is not") from None


def check_name(name: Any, where: str, *, alone: bool = True) -> str:
    """A name of a dataset, by which a directory can be called.

    Args:
        name: name, of whatever it was read from.
        where: what it was read from, for messages.
        alone: whether no directory is called by it; where there are several datasets, its directory stands among files.

    Raises:
        UserError: it is none, or that of something that runs write.
    """
    said = name if isinstance(name, str) else ""
    control = any(unicodedata.category(letter) in ("Cc", "Cs") for letter in said)
    if not said or said[0] == "." or set(said) & set("/\\") or control or len(said.encode("utf-8", "replace")) > 200:
        raise UserError(
            f"{where}: expected names of datasets that can name a directory, got {short(name)}; rename the file"
        )
    if not alone and (said.lower() in _OWN_NAMES or said.lower().endswith(_OWN_ENDINGS)):
        raise UserError(f"{where}: expected names of datasets, got {said}, as results are called; rename the file")
    return said


def cache_directory() -> Path:
    """Where jaxcrit keeps what can be made again: ``$JAXCRIT_CACHE``, else the user's cache directory."""
    named = os.environ.get("JAXCRIT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "jaxcrit"


def sweep(files: Iterable[Path], largest: int) -> None:
    """Removes files of a cache, used longest ago first, down to half of so many bytes once there are more."""
    entries = []
    for file in files:
        with contextlib.suppress(OSError):  # another process sweeps too
            about = file.stat()
            entries.append((max(about.st_atime, about.st_mtime), about.st_size, file))
    total = sum(size for _, size, _ in entries)
    if total <= largest:
        return
    for _, size, file in sorted(entries):
        with contextlib.suppress(OSError):
            file.unlink()
        total -= size
        if total <= largest // 2:
            return


def in_bucket(path: str | Path) -> bool:
    """Whether this is a path in a bucket, given as text or made by `as_path`."""
    return "://" in os.fspath(path)


def remove_tree(path: Path) -> None:
    """Removes a directory and what is in it, as far as that goes; of several processes only the first does."""
    if not processes.first():
        return
    if not in_bucket(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        cast(Any, path).rmtree()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that replaces it when the block ends without error.

    Of several processes only the first writes; the others' files are thrown away. In a bucket, where an object is there
    as a whole or not at all, the file is put together here and then brought there. Elsewhere the content is on the disk
    before the name is, and the name when the block has ended.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    if in_bucket(path) or not processes.first():
        with tempfile.TemporaryDirectory() as scratch:
            temporary = Path(scratch) / path.name
            yield temporary
            if processes.first():
                with temporary.open("rb") as file:
                    digests.note(path, file)
                cast(Any, path).upload(temporary)
        return
    with _naming(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            # mkstemp makes files private; a result should be as readable as any file the user writes.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
                digests.note(path, file)
            temporary.replace(path)
            sync_directory(path.parent)
        finally:
            with contextlib.suppress(OSError):  # what is left is swept when a run begins there
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Makes whatever fails inside for want of room or right an `OSError` that names the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from None
    except Exception as error:
        if (said := _RUST.search(str(error))) is None:  # of safetensors, which has one kind of error for all
            raise
        raise OSError(int(said[1]), os.strerror(int(said[1])), os.fspath(path)) from None


def sync_directory(path: Path) -> None:
    """Returns when the names of the files in a directory are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_bytes(path, text.encode("utf-8"))


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One object a line, as a ``.jsonl`` holds them."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_lines(path: Path, kind: Any = dict[str, Any]) -> list[dict[str, Any]]:
    """Objects of a ``.jsonl`` that grows; a last line cut short by a kill is left out, and no file has no rows.

    Args:
        path: file.
        kind: declaration of a row, see `jaxcrit.core.schema`.

    Raises:
        UserError: a line that is none; the message names it.
    """
    if not path.exists():
        return []
    plain_size(path, "a file of lines")
    rows: list[dict[str, Any]] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LARGEST_TEXT), b""), 1):
                where = f"{path}: line {number}"
                if line.endswith(b"\n"):
                    rows.append(_line(line[:-1], kind, where))
                elif len(line) == LARGEST_TEXT:
                    raise UserError(f"{where}: expected at most {LARGEST_TEXT // 2**20} MiB; {DAMAGED}")
                else:
                    with contextlib.suppress(UserError):
                        rows.append(_line(line, kind, where))
            digests.check(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); expected a file of lines") from None
    return rows


def _line(line: bytes, kind: Any, where: str) -> dict[str, Any]:
    try:
        found = conform(parse_json(line.decode("utf-8"), where, "a JSON object"), kind, where, DAMAGED)
        if b"\\ud" in line.lower():  # half a surrogate pair can be escaped, and could not be written again
            json_lines([found]).encode("utf-8")
        return found
    except UnicodeError as error:
        raise UserError(f"{where}: expected UTF-8, got something else ({error}); {DAMAGED}") from None


class GrowingText:
    """A text file that grows by lines; of several processes only the first writes.

    In a bucket an object only changes as a whole: there it is written when that was long ago, and by `flush`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._text, self._written, self._when = "", "", -math.inf

    def start(self, text: str) -> None:
        """Makes the file hold this text; none is made to hold nothing."""
        if text or self.path.exists():
            write_text(self.path, text)
        self._text = self._written = text

    def append(self, text: str) -> None:
        """Adds to it; whole lines."""
        if not processes.first():
            return
        digests.note(self.path)
        if not in_bucket(self.path):
            if not self.path.exists():  # no disk is so full that it leaves an empty file
                write_text(self.path, text)
                return
            with _naming(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(text)
            return
        self._text += text
        if time.monotonic() - self._when > _REWRITE:
            self.flush()

    def flush(self) -> None:
        """Returns when all of it is in the file."""
        if self._text != self._written:
            write_text(self.path, self._text)
            self._written, self._when = self._text, time.monotonic()


def json_text(kind: str, content: Mapping[str, Any]) -> str:
    """``{"format": kind, "format_version": N, **content}`` as indented JSON; NaN is refused."""
    body = {"format": kind, "format_version": VERSIONS.get(kind, FORMAT_VERSION), **content}
    return json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Writes `json_text` atomically."""
    write_text(path, json_text(kind, content))


def plain(value: Any) -> Any:
    """The same JSON value with NaN and infinities as null, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_object(path: Path, expected: str, kind: Any = dict[str, Any]) -> dict[str, Any]:
    """A JSON object, of any program.

    Args:
        path: file.
        expected: what it should be, for messages.
        kind: declaration of what it holds, see `jaxcrit.core.schema`.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is something else.
    """
    return conform(parse_json(read_text(path, expected), path, expected), kind, str(path))


def read_json(path: str | Path, kind: str, content: Any = Any) -> dict[str, Any]:
    """Reads a JSON file written by `write_json`.

    Args:
        path: file.
        kind: its format.
        content: declaration of what it holds, see `jaxcrit.core.schema`.

    Raises:
        UserError: the file is absent, not JSON, of another format, of a later version, or does not hold what it should.
    """
    path, expected = as_path(path), f"JSON of format {kind}"
    try:
        text = read_text(path, expected)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a {kind} file") from None
    found = parse_json(text, path, expected)
    _check_format(found, kind, str(path))
    conform(found, content, str(path), DAMAGED)
    if path.name == digests.RECORD:
        digests.check_seal(path, text, found)
    else:
        digests.check(path, text.encode("utf-8"), kind)
    return dict(found)


def _check_format(content: Any, kind: str, where: str) -> None:
    front = f"{where}: " if where else ""
    found = content.get("format") if isinstance(content, dict) else None
    if found != kind:
        raise UserError(f"{front}expected format {kind}, got {short(found)}")
    newest, version = VERSIONS.get(kind, FORMAT_VERSION), content.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= newest:
        raise UserError(
            f"{front}expected format_version {newest}, got {short(version)}; upgrade jaxcrit or write the file again"
        )


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Writes arrays and a JSON ``meta`` entry as npz, atomically; same input, same bytes.

    `numpy.savez` stamps nothing but uses the zip default date, so equal arrays give equal files.
    """
    entries = {**arrays, "meta": np.array(json.dumps(meta, sort_keys=True, allow_nan=False))}
    buffer = io.BytesIO()
    np.savez(buffer, **entries)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


@dataclasses.dataclass(frozen=True)
class Npz:
    """What an npz of jaxcrit's holds.

    Attributes:
        format: its format.
        arrays: arrays by name.
        meta: declaration of its meta entry, see `jaxcrit.core.schema`.
        others: what every further array must be; None where there are none to read.
    """

    format: str
    arrays: Mapping[str, Array]
    meta: Any = Any
    others: Array | None = None


def read_npz(path: str | Path, kind: Npz | None = None, **sizes: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads what `write_npz` wrote: the arrays, and the meta entry; headers are checked before arrays are read.

    Args:
        path: file.
        kind: what it must hold; None for whatever it holds.
        **sizes: sizes by their names in ``kind`` that are known already.

    Raises:
        UserError: the file is absent, not an npz, has no meta entry, or does not hold what it should.
    """
    path = as_path(path)
    try:
        plain_size(path, "an npz written by jaxcrit")
        with path.open("rb") as file, zipfile.ZipFile(file) as archive, contextlib.ExitStack() as opened:
            held = _headers(archive, file.seek(0, os.SEEK_END), opened)
            meta = parse_json(str(held.pop("meta").read()), "meta")
            if kind is None:
                conform(meta, dict[str, Any], "meta", DAMAGED)
                arrays = {name: array.read() for name, array in held.items()}
                digests.check(path, file)
                return arrays, meta
            _check_format(meta, kind.format, "")
            conform(meta, kind.meta, "meta", DAMAGED)
            rest = dict.fromkeys(held.keys() - kind.arrays.keys(), kind.others) if kind.others else {}
            declared = {**kind.arrays, **{name: one for name, one in rest.items() if one is not None}}
            conform_arrays(held, declared, "", DAMAGED, sizes)
            arrays = {name: held[name].read() for name in held if name in declared}
            digests.check(path, file, kind.format)
            return arrays, meta
    except UserError as error:
        raise (error if str(error).startswith(str(path)) else UserError(f"{path}: {error}")) from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected an npz written by jaxcrit") from None
    except Exception as error:  # zip files can be damaged in ways for which their reader has a dozen errors
        raise UserError(f"{path}: expected an npz written by jaxcrit, got something else ({error})") from None


def _headers(archive: zipfile.ZipFile, size: int, opened: contextlib.ExitStack) -> dict[str, Stored]:
    """Arrays of an npz, meta among them; they can be read until ``opened`` closes."""
    found = {}
    for name, member in members(archive).items():
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
            raise UserError(f"expected {name} uncompressed, as jaxcrit writes it; {DAMAGED}")
        found[name] = stored_npy(opened.enter_context(archive.open(member)), member.file_size)
    if "meta" not in found:
        raise UserError(f"expected an npz with a meta entry; got {listed(sorted(found))}")
    if found["meta"].shape or found["meta"].dtype.kind != "U":
        raise UserError(f"expected a meta entry of text, got {found['meta'].dtype} {list(found['meta'].shape)}")
    return found
