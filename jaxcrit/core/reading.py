"""Files that somebody else may have written or damaged: bytes, JSON and arrays of numpy, each read in one place.

Sizes are checked against the bytes that are there before memory is taken; nothing is unpickled; what waits for a writer
or never ends (a FIFO, a device) is no file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxcrit.core.errors import UserError, listed

# Bytes of JSON that are parsed at once, into 45 times as many at worst (empty objects); the largest index has 10 MB.
LARGEST_TEXT = 2**25
LARGEST_PARSED = 2**28  # bytes of a vocabulary, which its library parses; the largest have 35 MB
MOST_UNPACKED = 200  # times its size that a packed file may have; text has 3 to 100, and what is to fill a memory 1,000
DEEPEST = 64  # objects and lists inside one another


def read_text(path: Path, expected: str, largest: int = LARGEST_TEXT) -> str:
    """A file as UTF-8.

    Args:
        path: file.
        expected: what it should be, for messages.
        largest: bytes it may have.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is no plain file, too large, cannot be read, or is no UTF-8.
    """
    try:
        if (size := plain_size(path, expected)) > largest:
            raise UserError(f"{path}: expected {expected}, got {size:,} bytes; at most {largest:,} are")
        return path.read_bytes().decode("utf-8")
    except (FileNotFoundError, UserError):
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); expected {expected}") from None
    except ValueError as error:
        raise UserError(f"{path}: expected {expected}, got something else ({error})") from None


def plain_size(path: Path, expected: str) -> int:
    """Bytes of a file; 0 for one in a bucket.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is a pipe or a device, which may never end, or cannot be read.
    """
    if "://" in os.fspath(path):
        return 0
    try:
        about = path.stat()
    except FileNotFoundError:
        raise
    except OSError as error:  # a link to itself, a directory that may not be looked into
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); expected {expected}") from None
    if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
        raise UserError(f"{path}: expected {expected}, got a device or pipe")
    return about.st_size


def plain_tree(folder: Path, expected: str, text: tuple[str, ...] = ()) -> None:
    """Refuses a directory that another library is to read, if it would wait there or read without end.

    Args:
        folder: directory.
        expected: what it should be, for messages.
        text: endings of names of files that are read at once, of `LARGEST_PARSED` bytes at most.

    Raises:
        UserError: a pipe, a device or a link to itself lies in it, or a text that is too large.
    """
    for at, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a link to nothing, which is nobody's file
                size = plain_size(Path(at, name), expected)
                if name.endswith(text) and size > LARGEST_PARSED:
                    raise UserError(f"{Path(at, name)}: expected {expected}, got {size:,} bytes")


def parse_json(text: str, where: str | Path, expected: str = "JSON") -> Any:
    """JSON as its standard has it: no NaN, each key of an object once, not nested without end.

    Args:
        text: text to parse.
        where: file, for messages.
        expected: what it should be, for messages.

    Raises:
        UserError: it is something else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return each_once(pairs, where)

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no number of JSON")

    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected {expected}, got something else ({error})") from None
    if too_deep(found):
        raise UserError(f"{where}: expected {expected}, got lists and objects nested deeper than {DEEPEST}")
    return found


def each_once(pairs: list[tuple[str, Any]], where: str | Path) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        UserError: a key stands in it twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted(name for name in found if names.count(name) > 1)
        raise UserError(f"{where}: {listed(twice, 4)} named twice; which one holds cannot be known")
    return found


def too_deep(value: Any) -> bool:
    """Whether lists and objects lie in one another deeper than any file here has them."""
    level = [value]
    for _ in range(DEEPEST):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [one for part in inner for one in part if isinstance(one, dict | list)]
        if not level:
            return False
    return True


class Stored:
    """An array in a file: its shape is known, its content is read when it is asked for.

    Attributes:
        shape: sizes.
        dtype: type of an element; that of safetensors is not told.
        read: reads it, or gives what reads slices of it.
    """

    def __init__(self, shape: Sequence[int], read: Callable[[], Any], dtype: np.dtype | None = None):
        self.shape, self.read = tuple(shape), read
        self.dtype = np.dtype(np.void) if dtype is None else dtype


def stored_npy(file: IO[bytes], size: int) -> Stored:
    """An array as numpy writes one, its header checked against the bytes there are.

    Args:
        file: file at its beginning, which can be gone back to.
        size: bytes it has.

    Raises:
        UserError: another version, Python objects, or another number of bytes than the header asks for.
    """
    file.seek(0)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise UserError(f"expected version 1 or 2 of npy, got {version}; save it again with numpy")
        shape, _, dtype = read(file)
    except (UserError, OSError):
        raise
    except Exception as error:  # the header is an expression of Python, and its parser has errors of many kinds
        raise ValueError(f"no header of an array: {error}") from None
    if dtype.hasobject:
        raise UserError("holds Python objects, which are pickles and not read; save arrays of floats")
    if min(shape, default=0) < 0 or not dtype.itemsize or dtype.names:
        raise UserError(f"expected plain numbers or texts, got {dtype} of shape {shape}")
    fitting(shape, dtype.itemsize)
    there = size - file.tell()
    if math.prod(shape) * dtype.itemsize != there:
        raise UserError(f"expected {math.prod(shape) * dtype.itemsize} bytes of shape {shape}, got {there}")

    def whole() -> np.ndarray:
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)

    return Stored(shape, whole, dtype)


def fitting(shape: Sequence[int], size: int = 4, advice: str = "for hidden states keep one token per prompt") -> None:
    """Refuses an array that memory does not hold once, of elements of so many bytes."""
    needed, there = float(size) * math.prod(shape), float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if needed > there:
        raise UserError(
            f"an array of shape {tuple(shape)} takes {needed / 2**30:.1f} GiB, this machine has {there / 2**30:.1f};"
            f" {advice}"
        )


def safetensors_header(path: Path) -> str:
    """The JSON in front of a safetensors file, before anything maps the whole of it.

    Raises:
        OSError: there is no such file.
        UserError: it is no plain file.
        ValueError: it is none of safetensors, or ends before its header does.
    """
    size = plain_size(path, "safetensors")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LARGEST_TEXT, size - 8):
            raise ValueError(f"no header, or one of {length:,} bytes in a file of {size:,}")
        return file.read(length).decode("utf-8")


def members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Arrays in an npz, by name.

    Raises:
        UserError: there is something else in it, or a name stands twice.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name == member.filename:
            raise UserError(
                f"expected an npz of arrays, got a zip file with {name!r}; what torch.save writes is a"
                " pickle and not read: write safetensors or numpy.savez"
            )
        if name in found:
            raise UserError(f"expected each array once, got {name!r} twice")
        if member.flag_bits & 1:
            raise UserError(f"{name!r} is encrypted; save it without a password")
        if member.file_size > MOST_UNPACKED * max(member.compress_size, 1024):
            raise UserError(f"{name!r} unpacks to more than {MOST_UNPACKED} times its size; save it unpacked")
        found[name] = member
    return found
