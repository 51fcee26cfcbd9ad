"""Rows from files: JSONL (or one JSON array) of prompts, conversations or plain text, checked line by line.

A row is kept raw, extra fields included, because its identity is the hash of all of it; the three kinds are

    {"prompt": str, "response"?: str | null}
    {"messages": [{"role", "content"}, ...]}      a last assistant message is the response, the rest is the prompt
    {"text": str}                                 raw text, never templated; all of it is the prompt
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.hashing import sample_id

Row = dict[str, Any]

DEMO_PROMPTS = Path(__file__).parents[1] / "assets" / "demo_prompts"
KINDS = ("prompt", "messages", "text")
ROLES = ("system", "user", "assistant")
_EXPECTED = '{"prompt", "response"?}, {"messages": [...]} or {"text"}'


@dataclasses.dataclass(frozen=True)
class NamedRows:
    """One dataset.

    Attributes:
        name: the file's stem or the embedded family; no two datasets of one run share it.
        source: the path, or ``demo:FAMILY``.
        rows: raw rows in file order.
    """

    name: str
    source: str
    rows: list[Row]


def load(spec: str = "", limit: int = 0) -> list[NamedRows]:
    """Reads every dataset that ``--data`` names.

    Args:
        spec: comma-separated parts, each a path to JSONL, ``demo:FAMILY``, or ``demo`` (every embedded
            family, a dataset each); empty means ``demo``.
        limit: rows to read of each dataset; 0 reads all.

    Raises:
        UserError: a part names nothing, two datasets share a name, or a file is refused by `read_rows`.
    """
    sources: dict[str, tuple[str, Path]] = {}
    for part in (spec or "demo").split(","):
        for name, source, path in _sources(part.strip(), spec):
            if name in sources:
                raise UserError(
                    f"--data={spec}: expected datasets of different names, got {name!r} from both"
                    f" {sources[name][0]} and {source}; rename one file"
                )
            sources[name] = (source, path)
    return [NamedRows(name, source, read_rows(path, limit)) for name, (source, path) in sources.items()]


def _sources(part: str, spec: str) -> Iterator[tuple[str, str, Path]]:
    """Yields (name, source, path) of each dataset behind one part of ``--data``."""
    if not part:
        raise UserError(f"--data={spec}: expected a path, demo or demo:FAMILY between commas, got nothing")
    word, _, family = part.partition(":")
    if word != "demo":
        yield Path(part).stem, part, Path(part)
        return
    families = {path.stem: path for path in sorted(DEMO_PROMPTS.glob("*.jsonl"))}
    if not families:
        raise UserError(f"--data={part}: expected embedded prompts in {DEMO_PROMPTS}, found none; reinstall")
    if part != "demo" and family not in families:
        raise UserError(
            f"--data={part}: expected one of the embedded families {', '.join(families)},"
            f" got {family!r}{did_you_mean(family, families)}"
        )
    for name in families if part == "demo" else [family]:
        yield name, f"demo:{name}", families[name]


def read_rows(path: str | Path, limit: int = 0) -> list[Row]:
    """Reads and checks one file: a JSON object per line (blank lines are skipped), or one JSON array of objects.

    Args:
        path: the file.
        limit: stop after this many rows; 0 reads all.

    Returns:
        Raw rows in file order, at least one, no two equal.

    Raises:
        UserError: the file cannot be read or is empty, a line is not UTF-8 or not a JSON object, the fields
            are of no known kind or of more than one, a prompt is blank, or two rows are equal (each counts
            once in a similarity; a repeated one would bias every layer's score).
    """
    path = Path(path)
    rows: list[Row] = []
    places: dict[str, str] = {}
    for place, row in _parse(path):
        where = f"{path}: {place}"
        _check(row, where)
        try:
            identity = sample_id(row)
        except ValueError:
            raise UserError(f"{where}: expected finite numbers, got NaN or infinity") from None
        if identity in places:
            raise UserError(f"{where}: the same row as {places[identity]}; repeats bias the scores, remove one")
        places[identity] = place
        rows.append(row)
        if len(rows) == limit:
            break
    if not rows:
        raise UserError(f"{path}: expected rows {_EXPECTED}, got an empty file")
    return rows


def _parse(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, value) of each row: ``line 3`` of JSONL, ``row 3`` of an array."""
    try:
        with path.open("rb") as file:
            first = True
            for number, raw in enumerate(file, 1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if first and line.lstrip().startswith(b"["):
                    whole = _json(line + file.read(), f"{path}: the array that begins in line {number}")
                    yield from ((f"row {index}", row) for index, row in enumerate(whole, 1))
                    return
                if line.strip():
                    first = False
                    yield f"line {number}", _json(line, f"{path}: line {number}")
    except FileNotFoundError:
        near = ["demo", *(file.name for file in path.parent.glob("*"))]
        raise UserError(
            f"--data: no file {path}{did_you_mean(path.name, near)}; expected a path to JSONL, demo or demo:FAMILY"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path}: expected a JSONL file, got a directory; name the files in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _json(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        breaks = raw.count(b"\n", 0, error.start)
        line = f" in line {breaks + 1} of it" if breaks else ""
        raise UserError(f"{where}: expected UTF-8, got byte 0x{raw[error.start]:02x}{line}; convert the file") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} of it, " if error.lineno > 1 else ""
        raise UserError(
            f"{where}: expected one JSON object per line, got broken JSON ({line}column {error.colno}: {error.msg})"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        raise UserError(f"{where}: expected a JSON object, got what cannot be read ({error})") from None


def _check(row: Any, where: str) -> None:
    """Refuses what is not a row of exactly one kind with something in it."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object {_EXPECTED}, got {_kind(row)}")
    kinds = [kind for kind in KINDS if kind in row]
    found = listed([repr(field) for field in row]) or "no fields"
    if len(kinds) != 1:
        hints = (did_you_mean(field, KINDS) for field in row)
        hint = "" if kinds else next((hint for hint in hints if hint), "")
        raise UserError(f"{where}: expected exactly one of {_EXPECTED}, found {found}{hint}")
    if kinds != ["prompt"] and "response" in row:
        raise UserError(f"{where}: expected response beside prompt only, found {found}")
    if kinds == ["messages"]:
        _check_messages(row["messages"], where)
    else:
        _check_text(row[kinds[0]], f"{where}: {kinds[0]}")
    if row.get("response") is not None:
        _check_text(row["response"], f"{where}: response", blank=True)


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list):
        raise UserError(f"{where}: expected messages to be a list of {{role, content}}, got {_kind(messages)}")
    for index, message in enumerate(messages, 1):
        here = f"{where}: message {index}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            fields = listed([repr(field) for field in message]) if isinstance(message, dict) else _kind(message)
            raise UserError(f"{here}: expected an object with role and content, got {fields or 'no fields'}")
        role = message["role"]
        if role not in ROLES:
            raise UserError(f"{here}: expected role {', '.join(ROLES)}, got {role!r}{did_you_mean(str(role), ROLES)}")
        _check_text(message["content"], f"{here}: content", blank=role != "user")
    prompt, _ = split_messages(messages)
    if not prompt or prompt[-1]["role"] != "user":
        last = f"one of {prompt[-1]['role']}" if prompt else "none"
        raise UserError(f"{where}: expected a user message before the response, got {last}")


def split_messages(messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], str | None]:
    """Splits a conversation into what the model is given and the response, the assistant's last message, or None."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, None


def _check_text(value: Any, where: str, blank: bool = False) -> None:
    if not isinstance(value, str):
        raise UserError(f"{where}: expected text, got {_kind(value)}")
    if not blank and not value.strip():
        raise UserError(f"{where}: expected text, got {'an empty string' if not value else 'only white space'}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: expected text, got half a surrogate pair at character {error.start + 1}") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
