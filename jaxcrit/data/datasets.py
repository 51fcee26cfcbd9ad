"""Rows from files: JSONL (or one JSON array) of prompts, conversations or plain text, checked line by line.

A row is kept raw, extra fields included, because its identity is the hash of all of it; the three kinds are

    {"prompt": str, "response"?: str | null}
    {"messages": [{"role", "content"}, ...]}      a last assistant message is the response, the rest is the prompt
    {"text": str}                                 raw text, never templated; all of it is the prompt

and the published fields of the paper's datasets (`jaxcrit.data.published`) where a dataset is named.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.hashing import sample_id
from jaxcrit.data.published import PUBLISHED, Cut, Row, check_text, cut_of, form, type_name
from jaxcrit.data.tokenizer import quiet

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
        rows: raw rows in file order, or shuffled where asked.
        dataset: which of the paper's datasets, or empty for rows of one's own.
    """

    name: str
    source: str
    rows: list[Row]
    dataset: str = ""


def load(
    spec: str = "", limit: int = 0, *, split: str = "", shuffle_seed: int = -1, edition: str = "clean"
) -> list[NamedRows]:
    """Reads every dataset that ``--data`` names.

    Args:
        spec: comma-separated parts, each a path to JSONL, one of the paper's datasets (``dolly:PATH`` from a file
            as published, ``dolly`` from the hub), ``demo:FAMILY``, or ``demo`` (every embedded family, a dataset
            each); empty means ``demo``.
        limit: first rows to take of each dataset, after shuffling; 0 takes all.
        split: split of the paper's datasets, ``test`` by default; ``all`` for a file that holds one split already.
        shuffle_seed: shuffles each dataset; below 0 leaves the order of the file.
        edition: ``paper`` keeps a slip of its splits too (BoolQ's val is its test).

    Raises:
        UserError: a part names nothing, two datasets share a name, a split of rows that have none or without
            rows, a dataset that is neither here nor to be had from the hub, or a file refused by `read_rows`.
    """
    found: dict[str, tuple[str, Path, str]] = {}
    for part in (spec or "demo").split(","):
        for name, source, path, dataset in _sources(part.strip(), spec):
            if name in found:
                raise UserError(
                    f"--data={spec}: expected datasets of different names, got {name!r} from both"
                    f" {found[name][0]} and {source}; rename one file"
                )
            found[name] = (source, path, dataset)
    loaded = []
    for name, (source, path, dataset) in found.items():
        if dataset:
            rows = _read_published(dataset, path if path.name else None, cut_of(dataset, split or "test", edition))
        elif split:
            raise UserError(f"--split={split}: {source} has no splits; they are those of {', '.join(PUBLISHED)}")
        else:
            rows = read_rows(path, 0 if shuffle_seed >= 0 else limit)
        if shuffle_seed >= 0:
            random.Random(shuffle_seed).shuffle(rows)
        loaded.append(NamedRows(name, source, rows[: limit or None], dataset))
    return loaded


def _sources(part: str, spec: str) -> Iterator[tuple[str, str, Path, str]]:
    """Yields (name, source, path, published dataset) of each dataset behind one part of ``--data``."""
    if not part:
        raise UserError(f"--data={spec}: expected a path, demo or demo:FAMILY between commas, got nothing")
    word, colon, rest = part.partition(":")
    if word in PUBLISHED:
        if colon and not rest:
            raise UserError(f"--data={part}: expected a path after the colon, got nothing")
        yield word, part, Path(rest), word
        return
    if word != "demo":
        if hint := did_you_mean(word, [*PUBLISHED, "demo"]) if colon and not Path(part).exists() else "":
            raise UserError(f"--data={part}: no dataset {word!r}{hint}; expected {', '.join(PUBLISHED)} or demo")
        yield Path(part).stem, part, Path(part), ""
        return
    families = {path.stem: path for path in sorted(DEMO_PROMPTS.glob("*.jsonl"))}
    if not families:
        raise UserError(f"--data={part}: expected embedded prompts in {DEMO_PROMPTS}, found none; reinstall")
    if part != "demo" and rest not in families:
        raise UserError(
            f"--data={part}: expected one of the embedded families {', '.join(families)},"
            f" got {rest!r}{did_you_mean(rest, families)}"
        )
    for name in families if part == "demo" else [rest]:
        yield name, f"demo:{name}", families[name], ""


def _read_published(dataset: str, path: Path | None, cut: Cut) -> list[Row]:
    """Rows of a split, every row of its file checked; equal rows are kept, for the published files have some."""
    parsed = list(_parse(path)) if path else [(f"row {n}", row) for n, row in enumerate(_from_hub(dataset, cut), 1)]
    source = str(path or dataset)
    if not parsed:
        raise UserError(f"{source}: expected rows of {dataset}, got an empty file")
    for place, row in parsed:
        where = f"{source}: {place}"
        if form(row) != form(parsed[0][1]):
            raise UserError(
                f"{where}: expected rows of one format, got {form(row)} here and {form(parsed[0][1])} in {parsed[0][0]}"
            )
        PUBLISHED[dataset].read(row, where)
        _identity(row, where)
    rows = [row for _, row in parsed][cut.start : cut.stop]
    if not rows:
        kept = f"rows [{'' if cut.start is None else cut.start}:{'' if cut.stop is None else cut.stop}]"
        raise UserError(
            f"{source}: the split is {kept} of the published file, and none of the {len(parsed)} rows here are in it;"
            " --split=all takes a file that is cut already"
        )
    return rows


def _from_hub(dataset: str, cut: Cut) -> list[Row]:
    """Rows of one file of a published set, through the `datasets` library."""
    advice = f"point at a file with --data={dataset}:PATH"
    if not PUBLISHED[dataset].hub:
        raise UserError(f"--data={dataset}: not on the hub; {advice}")
    name = PUBLISHED[dataset].hub[0]
    try:
        with quiet():  # the hub's client counts its retries aloud
            import datasets

            return datasets.load_dataset(*PUBLISHED[dataset].hub, split=cut.file).to_list()
    # No network, no such package, a proxy that refuses: these errors share no base class.
    except Exception as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"--data={dataset}: {name} cannot be had from the hub ({type(error).__name__}: {first}); {advice}"
        ) from None


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
    rows = _checked(_parse(path), str(path), limit)
    if not rows:
        raise UserError(f"{path}: expected rows {_EXPECTED}, got an empty file")
    return rows


def check_rows_in_memory(rows: Iterable[Row], where: str) -> list[Row]:
    """Checks rows that come from no file, as `read_rows` checks those that do.

    Args:
        rows: raw rows.
        where: name for messages.

    Raises:
        UserError: what `read_rows` raises.
    """
    return _checked(((f"row {place}", row) for place, row in enumerate(rows, 1)), where, 0)


def _checked(parsed: Iterable[tuple[str, Row]], source: str, limit: int) -> list[Row]:
    rows: list[Row] = []
    places: dict[str, str] = {}
    for place, row in parsed:
        where = f"{source}: {place}"
        _check(row, where)
        identity = _identity(row, where)
        if identity in places:
            raise UserError(f"{where}: the same row as {places[identity]}; repeats bias the scores, remove one")
        places[identity] = place
        rows.append(row)
        if len(rows) == limit:
            break
    return rows


def _identity(row: Row, where: str) -> str:
    try:
        return sample_id(row)
    except ValueError:
        raise UserError(f"{where}: expected finite numbers, got NaN or infinity") from None


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
        near = ["demo", *PUBLISHED, *(file.name for file in path.parent.glob("*"))]
        raise UserError(
            f"--data: no file {path}{did_you_mean(path.name, near)}; expected a path to JSONL,"
            f" {', '.join(PUBLISHED)}, demo or demo:FAMILY"
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
            f"{where}: expected one JSON object per line, or one array, got broken JSON"
            f" ({line}column {error.colno}: {error.msg})"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        raise UserError(f"{where}: expected a JSON object, got what cannot be read ({error})") from None


def _check(row: Any, where: str) -> None:
    """Refuses what is not a row of exactly one kind with something in it."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object {_EXPECTED}, got {type_name(row)}")
    kinds = [kind for kind in KINDS if kind in row]
    found = listed([repr(field) for field in row]) or "no fields"
    if len(kinds) != 1:
        hints = (did_you_mean(field, KINDS) for field in row)
        hint = "" if kinds else _published_hint(row) or next((hint for hint in hints if hint), "")
        raise UserError(f"{where}: expected exactly one of {_EXPECTED}, found {found}{hint}")
    if kinds != ["prompt"] and "response" in row:
        raise UserError(f"{where}: expected response beside prompt only, found {found}")
    if kinds == ["messages"]:
        _check_messages(row["messages"], where)
    else:
        check_text(row[kinds[0]], f"{where}: {kinds[0]}", blank=False)
    if row.get("response") is not None:
        check_text(row["response"], f"{where}: response")


def _published_hint(row: Row) -> str:
    """Says so where the fields are those of one of the paper's datasets."""
    for dataset, published in PUBLISHED.items():
        try:
            published.read(row, "")
        except UserError:
            continue
        return f"; these are the fields of {dataset}: --data={dataset}:PATH"
    return ""


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list):
        raise UserError(f"{where}: expected messages to be a list of {{role, content}}, got {type_name(messages)}")
    for index, message in enumerate(messages, 1):
        here = f"{where}: message {index}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            fields = listed([repr(field) for field in message]) if isinstance(message, dict) else type_name(message)
            raise UserError(f"{here}: expected an object with role and content, got {fields or 'no fields'}")
        role = message["role"]
        if role not in ROLES:
            raise UserError(f"{here}: expected role {', '.join(ROLES)}, got {role!r}{did_you_mean(str(role), ROLES)}")
        check_text(message["content"], f"{here}: content", blank=role != "user")
    prompt, _ = split_messages(messages)
    if not prompt or prompt[-1]["role"] != "user":
        last = f"one of {prompt[-1]['role']}" if prompt else "none"
        raise UserError(f"{where}: expected a user message before the response, got {last}")


def split_messages(messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], str | None]:
    """Splits a conversation into what the model is given and the response, the assistant's last message, or None."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, None
