"""Rows from files and from the hub: prompts, conversations or plain text, checked one by one.

A row is kept raw, extra fields included, because its identity is the hash of all of it; the kinds are

    {"prompt": str, "response"?: str | null}      ``completion`` is another name for ``response``
    {"messages": [{"role", "content"}, ...]}      a last assistant message is the response, the rest is the prompt;
                                                  ``prompt`` may repeat the first user message, ``tools`` stand beside
    {"conversations": [{"from", "value"}, ...]}   the same as ShareGPT names it: human is the user, gpt the assistant
    {"prompt": [...], "completion"?: [...]}       the same in two lists
    {"text": str}                                 raw text, never templated; all of it is the prompt

and the published fields of the paper's datasets (`jaxcrit.data.published`) where a dataset is named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jaxcrit.core import console
from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.files import local_path
from jaxcrit.core.hashing import sample_id
from jaxcrit.data import containers, hub
from jaxcrit.data.published import PUBLISHED, Cut, Row, check_text, cut_of, form, role_of, type_name

DEMO_PROMPTS = Path(__file__).parents[1] / "assets" / "demo_prompts"
KINDS = ("prompt", "messages", "text")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
RESPONSES = ("response", "completion")
_EXPECTED = '{"prompt", "response"?}, {"messages": [...]}, {"conversations": [...]} or {"text"}'


@dataclasses.dataclass(frozen=True)
class NamedRows:
    """One dataset.

    Attributes:
        name: the file's stem or the embedded family; no two datasets of one run share it.
        source: the path, the hub's id, or ``demo:FAMILY``.
        rows: raw rows in file order, or shuffled where asked.
        dataset: which of the paper's datasets, or empty for rows of one's own.
    """

    name: str
    source: str
    rows: list[Row]
    dataset: str = ""


def load(
    spec: str = "",
    limit: int = 0,
    *,
    split: str = "",
    preferred: str = "test",
    shuffle_seed: int = -1,
    edition: str = "clean",
    drop: bool = False,
) -> list[NamedRows]:
    """Reads every dataset that ``--data`` names.

    Args:
        spec: comma-separated parts, each the path of a file (`jaxcrit.data.containers`) or of a directory that the
            ``datasets`` library saved, one of the paper's datasets (``dolly:PATH`` from a file as published, ``dolly``
            from the hub), a hub id with or without a configuration (``owner/name:configuration``), ``demo:FAMILY``, or
            ``demo`` (every embedded family, a dataset each); empty means ``demo``.
        limit: first rows to take of each dataset, after shuffling; 0 takes all.
        split: split of datasets that have some; ``all`` of the paper's for a file that holds one split already.
        preferred: split to take where none is asked for and there are several.
        shuffle_seed: shuffles each dataset; below 0 leaves the order of the file.
        edition: ``paper`` keeps a slip of its splits too (BoolQ's val is its test).
        drop: leave out rows that repeat an earlier one, and say how many; else they are refused, but for those of the
            paper's datasets.

    Raises:
        UserError: a part names nothing, two datasets share a name, a split of rows that have none or without
            rows, a dataset that is neither here nor to be had from the hub, or a file refused by `read_rows`.
    """
    found: dict[str, _Source] = {}
    for part in (spec or "demo").split(","):
        for one in _sources(part.strip(), spec, split, preferred, edition, drop):
            # A directory is called by each, on some systems whatever the case of its letters.
            twin = found.setdefault(one.name.casefold(), one)
            if twin is not one:
                raise UserError(
                    f"--data={spec}: expected datasets of different names, got {one.name!r} from both"
                    f" {twin.source} and {one.source}; rename one file"
                )
    loaded = []
    for one in found.values():
        rows = one.read(0 if shuffle_seed >= 0 else limit)
        if shuffle_seed >= 0:
            random.Random(shuffle_seed).shuffle(rows)
        loaded.append(NamedRows(one.name, one.source, rows[: limit or None], one.dataset))
    return loaded


@dataclasses.dataclass(frozen=True)
class _Source:
    """One dataset before it is read; ``read`` takes how many rows are wanted, 0 for all."""

    name: str
    source: str
    read: Callable[[int], list[Row]]
    dataset: str = ""


def _sources(part: str, spec: str, split: str, preferred: str, edition: str, drop: bool) -> Iterator[_Source]:
    """Yields the datasets behind one part of ``--data``."""
    if not part:
        raise UserError(f"--data={spec}: expected a path, demo or demo:FAMILY between commas, got nothing")
    word, colon, rest = part.partition(":")
    path = local_path(part, "data") if "://" not in part else Path(part)
    if word in PUBLISHED:
        if colon and not rest:
            raise UserError(f"--data={part}: expected a path after the colon, got nothing")
        cut = cut_of(word, split or preferred, edition)
        file = local_path(rest, "data") if rest else None

        def published(limit: int) -> list[Row]:
            rows = _read_published(word, file, cut)
            return _checked(_places(rows), part, limit, True, lambda row, where: None) if drop else rows

        yield _Source(word, part, published, word)
        return
    if hub.is_saved(path):
        saved = partial(hub.from_directory, path, split, preferred)
        yield _Source(path.name, part, lambda limit: _checked_set(saved(), part, limit, drop))
        return
    if word != "demo" and not path.exists() and _is_hub_id(word):
        online = partial(hub.from_hub, part, word, rest, split, preferred, "and there is no file of this name")
        yield _Source(word.partition("/")[2], part, lambda limit: _checked_set(online(), part, limit, drop))
        return
    if split:
        raise UserError(
            f"--split={split}: {part} has no splits; they are those of {', '.join(PUBLISHED)}, and of sets of the hub"
        )
    if word != "demo":
        if hint := did_you_mean(word, [*PUBLISHED, "demo"]) if colon and not path.exists() else "":
            raise UserError(f"--data={part}: no dataset {word!r}{hint}; expected {', '.join(PUBLISHED)} or demo")
        yield _Source(_stem(path), part, partial(read_rows, path, drop=drop))
        return
    families = {file.stem: file for file in sorted(DEMO_PROMPTS.glob("*.jsonl"))}
    if not families:
        raise UserError(f"--data={part}: expected embedded prompts in {DEMO_PROMPTS}, found none; reinstall")
    if part != "demo" and rest not in families:
        raise UserError(
            f"--data={part}: expected one of the embedded families {', '.join(families)},"
            f" got {rest!r}{did_you_mean(rest, families)}"
        )
    for name in families if part == "demo" else [rest]:
        yield _Source(name, f"demo:{name}", partial(read_rows, families[name]))


def _stem(path: Path) -> str:
    """Name of a file without what says how it is stored: ``rows`` of ``rows.jsonl.gz``."""
    name = path.name
    while Path(name).suffix.lower() in containers.SUFFIXES and Path(name).stem:
        name = Path(name).stem
    return name


def _is_hub_id(word: str) -> bool:
    """Whether a text that names no file can be the id of a set of the hub; a mistyped path is not one."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", word) or word.lower().endswith(containers.SUFFIXES):
        return False
    return not Path(word).parent.exists()


def _read_published(dataset: str, path: Path | None, cut: Cut) -> list[Row]:
    """Rows of a split, every row of its file checked; equal rows are kept, for the published files have some."""
    parsed = list(_parse(path) if path else _places(_from_hub(dataset, cut)))
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
    """Rows of one file of a published set."""
    advice = f"point at a file with --data={dataset}:PATH"
    if not PUBLISHED[dataset].hub:
        raise UserError(f"--data={dataset}: not on the hub; {advice}")
    name, *configuration = PUBLISHED[dataset].hub
    return hub.from_hub(dataset, name, "".join(configuration), cut.file, "", advice)


def read_rows(path: str | Path, limit: int = 0, *, drop: bool = False) -> list[Row]:
    """Reads and checks one file.

    Args:
        path: JSONL, one JSON array, CSV, parquet or arrow, packed or not (`jaxcrit.data.containers`).
        limit: stop after this many rows; 0 reads all.
        drop: see `load`.

    Returns:
        Raw rows in file order, at least one, no two equal.

    Raises:
        UserError: the file cannot be read or is empty, a line is not UTF-8 or not a JSON object, the fields
            are of no known kind or of more than one, a prompt is blank, or two rows are equal (each counts
            once in a similarity; a repeated one would bias every layer's score).
    """
    path = Path(path)
    with contextlib.closing(_parse(path)) as parsed:  # and the file with it, whatever a row turns out to be
        return _checked_set(parsed, str(path), limit, drop)


def _checked_set(rows: Iterable[Any], source: str, limit: int, drop: bool) -> list[Row]:
    """Rows of a file or a set: at least one."""
    found = _checked(rows if isinstance(rows, Iterator) else _places(rows), source, limit, drop)
    if not found:
        raise UserError(f"{source}: expected rows {_EXPECTED}, got an empty file")
    return found


def _places(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    return ((f"row {place}", row) for place, row in enumerate(rows, 1))


def check_rows_in_memory(rows: Iterable[Row], where: str, drop: bool = False) -> list[Row]:
    """Checks rows that come from no file, as `read_rows` checks those that do.

    Args:
        rows: raw rows.
        where: name for messages.
        drop: see `load`.

    Raises:
        UserError: what `read_rows` raises.
    """
    return _checked(_places(rows), where, 0, drop)


def _checked(
    parsed: Iterable[tuple[str, Row]],
    source: str,
    limit: int,
    drop: bool,
    check: Callable[[Any, str], None] | None = None,
) -> list[Row]:
    check, rows, repeats = check or _check, [], Repeats(source, drop)
    for place, row in parsed:
        where = f"{source}: {place}"
        check(row, where)
        if repeats.new(_identity(row, where), place):
            rows.append(row)
            if len(rows) == limit:
                break
    repeats.settle()
    return rows


class Repeats:
    """Rows that repeat an earlier one: each counts once in a similarity, and twice would bias every layer's score."""

    def __init__(self, source: str, drop: bool):
        self.source, self.drop = source, drop
        self.places: dict[str, str] = {}
        self.found: list[str] = []

    def new(self, identity: str, place: str) -> bool:
        """Whether no row before had this identity."""
        first = self.places.setdefault(identity, place)
        if first != place:
            self.found.append(f"{place} is the same row as {first}")
        return first == place

    def settle(self) -> None:
        """Says how many there were.

        Raises:
            UserError: there were some, and they are not to be dropped; it names them.
        """
        if self.found and self.drop:
            console.note(f"{self.source}: {len(self.found)} rows that repeat an earlier one are left out")
        elif self.found:
            raise UserError(
                f"{self.source}: {listed(self.found, 5)}; repeats bias the scores: remove them, or leave them out with"
                " --duplicates=drop"
            )


def _identity(row: Row, where: str) -> str:
    try:
        return sample_id(row)
    except ValueError:
        raise UserError(f"{where}: expected finite numbers, got NaN or infinity") from None


def _parse(path: Path) -> Generator[tuple[str, Any], None, None]:
    """Yields (place, value) of each row of a file."""
    try:
        yield from containers.values(path)
    except FileNotFoundError:
        near = ["demo", *PUBLISHED, *(file.name for file in path.parent.glob("*"))]
        raise UserError(
            f"--data: no file {path}{did_you_mean(path.name, near)}; expected a path to JSONL, CSV, parquet or arrow,"
            f" {', '.join(PUBLISHED)}, demo or demo:FAMILY"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path}: expected a JSONL file, got a directory; name the files in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _check(row: Any, where: str) -> None:
    """Refuses what is not a row of exactly one kind with something in it."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object {_EXPECTED}, got {type_name(row)}")
    kinds = [kind for kind in KINDS if kind in row]
    if not kinds and "conversations" in row:  # beside another kind it is a field like any other
        kinds = ["conversations"]
    found = listed([repr(field) for field in row]) or "no fields"
    twice = kinds == ["prompt", "messages"]
    if len(kinds) != 1 and not twice:
        hints = (did_you_mean(field, KINDS) for field in row)
        hint = "" if kinds else _published_hint(row) or next((hint for hint in hints if hint), "")
        raise UserError(f"{where}: expected exactly one of {_EXPECTED}, found {found}{hint}")
    answers = [name for name in RESPONSES if name in row]
    if answers and (kinds != ["prompt"] or len(answers) > 1):
        raise UserError(f"{where}: expected response or completion beside prompt only, and one of them, found {found}")
    if row.get("tools") is not None and not isinstance(_tools(row), list):
        raise UserError(f"{where}: tools: expected a list of descriptions, got {type_name(row['tools'])}")
    if _has_turns(row):
        _check_messages(_turns(row, where), where)
    else:
        check_text(row[kinds[0]], f"{where}: {kinds[0]}", blank=False)
        if answers and row[answers[0]] is not None:
            check_text(row[answers[0]], f"{where}: {answers[0]}")
    if twice and row["prompt"] != next(text_of(one) for one in row["messages"] if one["role"] == "user"):
        raise UserError(f"{where}: prompt is not the first user message of messages; keep one of the two fields")


def _has_turns(row: Row) -> bool:
    """Whether a row is a list of messages, by whatever name, and no text."""
    return "messages" in row or isinstance(row.get("prompt"), list) or not {"prompt", "text"} & set(row)


def _turns(row: Row, where: str) -> Any:
    """The messages of a row that has some, as ``{role, content}``.

    Raises:
        UserError: a completion or a turn of a conversation of another form.
    """
    if "messages" in row:
        return row["messages"]
    if "prompt" in row:
        return [*row["prompt"], *_completion(row, where)]
    turns = row["conversations"]
    return [_turn(one, f"{where}: turn {at}") for at, one in enumerate(turns, 1)] if isinstance(turns, list) else turns


def _turn(turn: Any, where: str) -> Any:
    """A turn as a message; one that has a role already stays as it is."""
    if not isinstance(turn, dict) or "role" in turn:
        return turn
    if not isinstance(turn.get("from"), str) or "value" not in turn:
        fields = listed([repr(field) for field in turn]) or "no fields"
        raise UserError(f"{where}: expected an object with from, a text, and value, got {fields}")
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {"role": role_of(turn), "content": turn["value"], **rest}


def _published_hint(row: Row) -> str:
    """Says so where the fields are those of one of the paper's datasets."""
    for dataset, published in PUBLISHED.items():
        try:
            published.read(row, "")
        except UserError:
            continue
        return f"; these are the fields of {dataset}: --data={dataset}:PATH"
    return ""


def _completion(row: Row, where: str) -> list[Any]:
    """The answer to a prompt that is a list of messages: a list of one, or a text."""
    answer: Any = next((row[name] for name in RESPONSES if row.get(name) is not None), [])
    answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    roles = [one.get("role") if isinstance(one, dict) else None for one in answer] if isinstance(answer, list) else [0]
    if roles not in ([], ["assistant"]):
        raise UserError(f"{where}: completion: expected one message of role assistant, or a text")
    return list(answer)


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list):
        raise UserError(f"{where}: expected messages to be a list of {{role, content}}, got {type_name(messages)}")
    for index, message in enumerate(messages, 1):
        here = f"{where}: message {index}"
        needed = {"role"} if isinstance(message, dict) and message.get("tool_calls") else {"role", "content"}
        if not isinstance(message, dict) or not needed <= message.keys():
            fields = listed([repr(field) for field in message]) if isinstance(message, dict) else type_name(message)
            raise UserError(f"{here}: expected an object with role and content, got {fields or 'no fields'}")
        role = message["role"]
        if role not in ROLES:
            raise UserError(f"{here}: expected role {', '.join(ROLES)}, got {role!r}{did_you_mean(str(role), ROLES)}")
        if message.get("content") is not None or "content" in needed:
            content = text_of(message)
            if isinstance(content, list):
                parts = listed(
                    [str(part.get("type")) if isinstance(part, dict) else type_name(part) for part in content]
                )
                raise UserError(f"{here}: content: expected text, or parts of text, got a list of {parts or 'nothing'}")
            check_text(content, f"{here}: content", blank=role != "user")
    prompt = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    asks = any(message["role"] == "user" for message in prompt)
    if not asks or prompt[-1]["role"] in ("assistant", "system", "developer"):
        last = f"one of {prompt[-1]['role']}" if prompt else "none"
        raise UserError(f"{where}: expected a user message before the response, got {last}")


def text_of(message: Row) -> Any:
    """The content of a message; that of parts of text put together. What is no text comes back as it is."""
    content = message.get("content")
    parts = content if isinstance(content, list) and content else [None]
    texts = [one["text"] if isinstance(one, dict) and set(one) >= {"text"} else one for one in parts]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else content


def _tools(row: Row) -> Any:
    """Descriptions of tools; sets with many kinds of them keep them as JSON text."""
    tools = row.get("tools")
    try:
        return json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError):
        return tools


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A checked row as messages.

    Attributes:
        messages: what the model is given.
        answer: message of the assistant, or None.
        tools: descriptions of tools, or None.
    """

    messages: list[Row]
    answer: Row | None
    tools: list[Any] | None = None


def conversation(row: Row) -> Conversation:
    """A checked row as messages, contents put together from their parts and fields that are null left out."""
    if _has_turns(row):
        messages = _turns(row, "")
    else:
        answer = next((row[name] for name in RESPONSES if row.get(name) is not None), None)
        messages = [{"role": "user", "content": row["prompt"]}]
        messages += [] if answer is None else [{"role": "assistant", "content": answer}]
    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    given = [{**message, "content": text_of(message)} if "content" in message else message for message in given]
    answered = given[-1]["role"] == "assistant"
    return Conversation(given[:-1] if answered else given, given[-1] if answered else None, _tools(row))
