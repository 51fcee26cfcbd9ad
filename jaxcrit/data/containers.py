"""Values from files of any kind that rows come in, told apart by what they hold; CSV alone goes by its name."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from jaxcrit.core import digests
from jaxcrit.core.errors import UserError, first_line
from jaxcrit.core.reading import LARGEST_TEXT, MOST_UNPACKED, each_once, plain_size, too_deep

Placed = Iterator[tuple[str, Any]]
_COMPRESSED: dict[bytes, tuple[str, Callable[[Any], Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bzip2", bz2.open),
    b"\xfd7zXZ\0": ("xz", lzma.open),
}
_REFUSED = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "compressed with zstandard",
    b"7z\xbc\xaf": "a 7z archive",
}
_WIDE = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_LARGEST = 2**30  # bytes of CSV, of an array of JSON, or of a packed table
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".bz2", ".xz")


def values(path: Path) -> Placed:
    """Yields (place, value) of each row: ``line 3`` of JSONL, ``row 3`` of an array or a table.

    Args:
        path: a JSON object per line (blank lines are skipped), one JSON array, CSV or TSV with a header (by their
            suffix), parquet or arrow; any of them in gzip, bzip2 or xz; text in UTF-8, or in UTF-16 with its mark.

    Raises:
        OSError: the file cannot be read.
        UserError: it is none of these, damaged, or not what the run that it lies in wrote.
    """
    plain_size(path, "rows in a file")
    with path.open("rb") as file:
        digests.check(path, file)  # answers of a run are rows, too
        file.seek(0)
        head = file.read(8)
        for magic, what in _REFUSED.items():
            if head.startswith(magic):
                raise UserError(f"{path}: is {what}; unpack it, and name the file in it")
        for magic, (what, opener) in _COMPRESSED.items():
            if head.startswith(magic):
                file.seek(0)
                try:
                    with opener(file) as inside:
                        yield from _plain(io.BufferedReader(_Unpacked(inside, file, path)), path, path.stem)
                except (EOFError, lzma.LZMAError, zlib.error, OSError, ValueError) as error:
                    if isinstance(error, UserError):
                        raise
                    raise UserError(f"{path}: is a {what} file, and cannot be unpacked ({error})") from None
                return
        file.seek(0)
        yield from _plain(file, path, path.name)


class _Unpacked(io.RawIOBase):
    """What a packed file holds, up to so many times what was read of it."""

    def __init__(self, inside: Any, packed: IO[bytes], path: Path):
        self.inside, self.packed, self.path, self.count = inside, packed, path, 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As of any raw stream.

        Raises:
            UserError: it unpacks to what no text does.
        """
        found = self.inside.read(len(buffer))
        buffer[: len(found)] = found
        self.count += len(found)
        if self.count > max(2**24, MOST_UNPACKED * self.packed.tell()):
            raise UserError(
                f"{self.path}: expected rows, got what unpacks to more than {MOST_UNPACKED} times its size; unpack it"
            )
        return len(found)


def _whole(file: IO[bytes], path: Path, before: bytes = b"") -> bytes:
    """The rest of a file.

    Raises:
        UserError: it has more than is read at once.
    """
    more = UserError(f"{path}: expected at most {_LARGEST // 2**30} GiB, unless a row a line (JSONL) or a table")
    if _is_plain(file) and plain_size(path, "rows in a file") > _LARGEST:
        raise more  # before a GiB of it is read
    parts, size = [before], len(before)
    while part := file.read(2**20):
        parts.append(part)
        if (size := size + len(part)) > _LARGEST:
            raise more
    return b"".join(parts)


def _is_plain(file: Any) -> bool:
    """Whether its bytes are those of a file of this machine: not unpacked, not from a bucket."""
    return isinstance(getattr(file, "raw", None), io.FileIO)


def _plain(file: Any, path: Path, name: str) -> Placed:
    head = file.peek(8)[:8]
    if head.startswith(b"PAR1"):
        yield from _table(file, path, "parquet")
    elif head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        yield from _table(file, path, "arrow")
    elif name.lower().endswith((".csv", ".tsv")):
        yield from _csv(_text(file, head, path), path, "\t" if name.lower().endswith("tsv") else ",")
    elif mark := next((mark for mark in _WIDE if head.startswith(mark)), b""):
        yield from _json_rows(
            io.BytesIO(_decoded(_whole(file, path), _WIDE[mark], path).encode("utf-8", "surrogatepass")), path
        )
    else:
        yield from _json_rows(file, path)


def without_nulls(value: Any) -> Any:
    """A value of a table, in which a field that a row does not have is null: such fields left out, dates as text."""
    if isinstance(value, Mapping):
        return {str(name): without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _table(file: IO[bytes], path: Path, kind: str) -> Placed:
    import pyarrow
    import pyarrow.parquet

    plain = _is_plain(file)
    try:
        if kind == "parquet":
            whole = file if plain else io.BytesIO(_whole(file, path))
            batches: Any = pyarrow.parquet.ParquetFile(whole).iter_batches()
        else:  # parts of bytes that are there are taken; for a file's, memory comes first, whatever it says
            held = pyarrow.memory_map(str(path)) if plain else pyarrow.BufferReader(_whole(file, path))
            batches = _arrow(pyarrow.ipc, held)
        place = 0
        for batch in batches:
            batch.validate(full=True)  # offsets that lie would be followed out of memory that is ours
            for row in batch.to_pylist():
                place += 1
                yield f"row {place}", without_nulls(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        raise UserError(f"{path}: is a {kind} file, and cannot be read ({first_line(error)})") from None


def _arrow(ipc: Any, file: IO[bytes]) -> Iterator[Any]:
    """Batches of either form: files, and the streams that the datasets library keeps."""
    if file.read(6) == b"ARROW1":
        opened = ipc.open_file(file)
        yield from (opened.get_batch(number) for number in range(opened.num_record_batches))
    else:
        file.seek(0)
        yield from ipc.open_stream(file)


def _csv(text: str, path: Path, delimiter: str) -> Placed:
    """Rows of CSV; an empty cell is a field that the row does not have."""
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for place, row in enumerate(table, 1):
            if None in row or None in row.values():
                raise UserError(
                    f"{path}: row {place}: expected {len(table.fieldnames or ())} cells, as the CSV header has; quote"
                    " cells that hold the delimiter"
                )
            yield f"row {place}", {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        raise UserError(f"{path}: is CSV by its name, and cannot be read ({error})") from None


def _text(file: Any, head: bytes, path: Path) -> str:
    wide = next((encoding for mark, encoding in _WIDE.items() if head.startswith(mark)), "utf-8-sig")
    return _decoded(_whole(file, path), wide, path)


def _decoded(raw: bytes, encoding: str, path: Path) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise UserError(f"{path}: expected {name}, got byte 0x{raw[error.start]:02x}; convert the file") from None


def _json_rows(file: IO[bytes], path: Path) -> Placed:
    first = True
    for number, raw in enumerate(iter(lambda: file.readline(LARGEST_TEXT), b""), 1):
        line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if first and line.lstrip().startswith(b"["):
            whole = _json(_whole(file, path, line), f"{path}: the array that begins in line {number}")
            yield from ((f"row {index}", row) for index, row in enumerate(whole, 1))
            return
        if len(raw) == LARGEST_TEXT:
            raise UserError(f"{path}: line {number}: expected a row, got more than {LARGEST_TEXT // 2**20} MiB")
        if line.strip():
            first = False
            yield f"line {number}", _json(line, f"{path}: line {number}")


def _json(raw: bytes, where: str) -> Any:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=lambda pairs: each_once(pairs, where))
        if too_deep(value):
            raise RecursionError("too deeply nested")
        return value
    except UnicodeDecodeError as error:
        breaks = raw.count(b"\n", 0, error.start)
        line = f" in line {breaks + 1} of it" if breaks else ""
        raise UserError(f"{where}: expected UTF-8, got byte 0x{raw[error.start]:02x}{line}; convert the file") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} of it, " if error.lineno > 1 else ""
        raise UserError(
            f"{where}: expected one JSON object per line, or one array, got broken JSON"
            f" ({line}column {error.colno}: {error.msg}); files of other kinds: parquet, arrow, .csv, .tsv"
        ) from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        raise UserError(f"{where}: expected a JSON object, got what cannot be read ({error})") from None
