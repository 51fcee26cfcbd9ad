"""Paths in a bucket, ``gs://BUCKET/DIR``, with as much of `pathlib.Path` as runs need.

Objects go through gcsfs, which is also what the checkpoint library writes its small files with; its paths, not its
methods, are used, for these raise whatever the layers below have. Here every failure is an `OSError` with ``strerror``.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
from etils.epath.gpath import PosixGPath

# For the checkpoint library too: tensorstore writes objects that gcsfs does not know of, so it must not remember lists;
# and what goes wrong is told once, by whoever it stops.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
for _name in ("gcsfs", "google.auth"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


class BucketPath(PosixGPath):
    """``gs://BUCKET/DIR``. Directories need not be made; a file is written as a whole, so never half there."""

    def exists(self) -> bool:
        """Whether there is such an object, or any below."""
        with _told(self):
            return bool(_storage().exists(str(self)))

    def is_dir(self) -> bool:
        """Whether there are objects below."""
        with _told(self):
            return bool(_storage().isdir(str(self)))

    def is_file(self) -> bool:
        """Whether there is such an object."""
        with _told(self):
            return bool(_storage().isfile(str(self)))

    def iterdir(self) -> Iterator[BucketPath]:
        """What is in the directory; the empty object that some tools leave for it is not."""
        with _told(self):
            found = [self._new(f"gs://{name}") for name in _storage().ls(str(self), detail=False)]
        return iter([path for path in found if path != self])

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """Objects below that match, ``**`` for any depth."""
        with _told(self):
            return iter([self._new(f"gs://{name}") for name in _storage().glob(f"{self}/{pattern}")])

    def files(self) -> dict[str, int]:
        """Objects below, at any depth, and their bytes, by what follows this path."""
        with _told(self):
            found = _storage().find(str(self), detail=True)
        return {str(self._new(f"gs://{name}").relative_to(self)): int(about["size"]) for name, about in found.items()}

    def read_bytes(self) -> bytes:
        """The object."""
        with _told(self):
            return bytes(_storage().cat_file(str(self)))

    def read_text(self, encoding: str | None = None) -> str:
        """The object as UTF-8."""
        return self.read_bytes().decode(encoding or "utf-8")

    def open(self, mode: str = "r", **_: Any) -> IO[Any]:
        """The object, to be read."""
        if mode not in ("r", "rb"):
            raise ValueError(f"{self}: objects are written as a whole; open(mode={mode!r})")
        content = io.BytesIO(self.read_bytes())
        return content if mode == "rb" else io.TextIOWrapper(content, encoding="utf-8")

    def write_bytes(self, content: bytes) -> None:
        """Puts an object there."""
        with _told(self):
            _storage().pipe_file(str(self), content)

    def upload(self, file: Path) -> None:
        """Puts a local file there, however large."""
        with _told(self):
            _storage().put_file(str(file), str(self))

    def look_at_bucket(self) -> None:
        """Reads what the bucket says of itself, which takes another permission than what is in it."""
        with _told(self):
            _storage().call("GET", "b/{}", self.parts[2])

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a directory is there when something is in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes an object."""
        try:
            with _told(self):
                _storage().rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = False) -> None:
        """Removes every object below."""
        try:
            with _told(self):
                _storage().rm(str(self), recursive=True)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def resolve(self, strict: bool = False) -> BucketPath:
        """Itself."""
        return self

    absolute = expanduser = resolve


@functools.cache
def _storage() -> Any:
    return fsspec.filesystem("gcs")


@contextlib.contextmanager
def _told(path: BucketPath) -> Iterator[None]:
    """Makes whatever gcsfs, aiohttp or google.auth raise an `OSError` that names the path and says why in a line."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no such object or bucket", str(path)) from None
    except Exception as error:
        text = str(error).strip()
        refused = text.startswith("Forbidden")  # and then the address, and in a line of its own the reason
        reason = (text.splitlines() or [type(error).__name__])[-1 if refused else 0]
        raise OSError(errno.EACCES if refused else errno.EIO, reason, str(path)) from None
