"""Atomic files in jaxcrit's public formats: versioned JSON, npz with a ``meta`` entry, plain text."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError

FORMAT_VERSION = 1
# Of formats that have changed: the version written; earlier ones are read.
VERSIONS = {"jaxcrit.run": 2}
_REWRITE = 10.0  # seconds; a bucket refuses more than about one change of an object a second


def as_path(text: str | Path) -> Path:
    """A local path, ``~`` expanded, or a `BucketPath` for ``gs://BUCKET/DIR``, which serves as one.

    Raises:
        UserError: ``SCHEME://`` of another kind, or gcsfs is not installed.
    """
    text = os.fspath(text)
    scheme, found, rest = text.partition("://")
    if not found:
        return Path(text).expanduser()
    if scheme != "gs" or not rest.strip("/"):
        raise UserError(f"{text}: expected a local path or gs://BUCKET/DIR")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: needs gcsfs: pip install 'jaxcrit[gcs]'")
    from jaxcrit.core.buckets import BucketPath

    return cast(Path, BucketPath(text))


def local_path(text: str | Path, flag: str) -> Path:
    """A local path, ``~`` expanded.

    Raises:
        UserError: it is one in a bucket.
    """
    if "://" in os.fspath(text):
        raise UserError(
            f"--{flag}={text}: expected a local directory; gcloud storage rsync --recursive copies between the two"
        )
    return Path(text).expanduser()


def cache_directory() -> Path:
    """Where jaxcrit keeps what can be made again: ``$JAXCRIT_CACHE``, else the user's cache directory."""
    named = os.environ.get("JAXCRIT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "jaxcrit"


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
    as a whole or not at all, the file is put together here and then brought there.
    """
    if in_bucket(path) or not processes.first():
        with tempfile.TemporaryDirectory() as scratch:
            temporary = Path(scratch) / path.name
            yield temporary
            if processes.first():
                cast(Any, path).upload(temporary)
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; a result should be as readable as any file the user writes.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a ``.jsonl`` that grows; a last line cut short by a kill is left out, and no file has no rows."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class GrowingText:
    """A text file that grows by lines; of several processes only the first writes.

    In a bucket an object only changes as a whole: there it is written when that was long ago, and by `flush`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._text, self._written, self._when = "", "", -math.inf

    def start(self, text: str) -> None:
        """Makes the file hold this text."""
        write_text(self.path, text)
        self._text = self._written = text

    def append(self, text: str) -> None:
        """Adds to it; whole lines."""
        if not processes.first():
            return
        if not in_bucket(self.path):
            with self.path.open("a", encoding="utf-8") as file:
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


def read_json(path: str | Path, kind: str) -> dict[str, Any]:
    """Reads a JSON file written by `write_json`.

    Raises:
        UserError: the file is absent, not JSON, of another format, or of a later version.
    """
    path = as_path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a {kind} file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: expected JSON of format {kind}, got something else ({error})") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != kind:
        raise UserError(f"{path}: expected format {kind}, got {found!r}")
    newest, version = VERSIONS.get(kind, FORMAT_VERSION), content.get("format_version")
    if version not in range(1, newest + 1) or isinstance(version, bool):
        raise UserError(
            f"{path}: expected format_version {newest}, got {version!r}; upgrade jaxcrit or write the file again"
        )
    return content


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Writes arrays and a JSON ``meta`` entry as npz, atomically; same input, same bytes.

    `numpy.savez` stamps nothing but uses the zip default date, so equal arrays give equal files.
    """
    entries = {**arrays, "meta": np.array(json.dumps(meta, sort_keys=True, allow_nan=False))}
    buffer = io.BytesIO()
    np.savez(buffer, **entries)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


def read_npz(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads what `write_npz` wrote: the arrays, and the meta entry.

    Raises:
        UserError: the file is absent, not an npz, or has no meta entry.
    """
    path = as_path(path)
    try:
        # Opened here, for numpy leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected an npz written by jaxcrit") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected an npz written by jaxcrit, got something else ({error})") from None
    if "meta" not in arrays:
        raise UserError(f"{path}: expected an npz with a meta entry; got {sorted(arrays)}")
    return arrays, json.loads(str(arrays.pop("meta")))
