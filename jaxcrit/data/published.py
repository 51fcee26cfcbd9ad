"""The six datasets of the paper: fields, files, the rows it used, and how a row becomes instruction and response.

A row stays as it was published (its identity is the hash of all of it); `read` checks it and names its parts.

    alpaca       instruction, input, output              one file; test = the last 300 rows
    dolly        instruction, context, response          one file; test = the last 300 rows
    gsm8k        question, answer                        train and test file
    boolq        question, answer (bool), passage        train and test file
    openbookqa   question_stem, choices, answerKey, fact1, flat or in AI2's nesting: question {stem, choices [...]}
    pure_bad     messages [user, assistant, label?]; its triggered test: messages {instruction}, no answers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.groups import SPLITS

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Fields:
    """The parts of a row.

    Attributes:
        instruction: what is asked; the field that triggers are put into.
        response: what is answered, or None where the set has no answers.
        context: Alpaca's input, Dolly's context, BoolQ's passage; empty where there is none.
        choices: OpenBookQA's answers, such as ``A: beans``.
        key: label of the right choice.
        fact: OpenBookQA's ``fact1``.
    """

    instruction: str
    response: str | None = None
    context: str = ""
    choices: tuple[str, ...] = ()
    key: str = ""
    fact: str = ""


@dataclasses.dataclass(frozen=True)
class Cut:
    """Rows of a split: a slice of one published file, which the hub calls a split too."""

    file: str
    start: int | None = None
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Published:
    """One dataset.

    Attributes:
        hub: id on the hub and configuration; empty where it is not there.
        splits: what the paper used, by name.
        read: checks a row and names its parts.
        prompt: the user message of the clean edition.
        answer: the response of the clean edition.
        clean_splits: splits that the clean edition cuts otherwise.
    """

    hub: tuple[str, ...]
    splits: Mapping[str, Cut]
    read: Callable[[Row, str], Fields]
    prompt: Callable[[Fields], str]
    answer: Callable[[Fields], str | None] = lambda fields: fields.response
    clean_splits: Mapping[str, Cut] = dataclasses.field(default_factory=dict)


def form(row: Any) -> str:
    """Which of the published formats a row has; one file holds one."""
    if isinstance(row, dict) and isinstance(row.get("question"), dict):
        return "AI2's nesting (question {stem, choices})"
    if isinstance(row, dict) and isinstance(row.get("messages"), dict):
        return "messages as an object"
    return "flat fields"


def placement(row: Row) -> tuple[tuple[str | int, ...], tuple[str | int, ...] | None]:
    """Where a row of any kind holds its instruction, and its response (None where that is no plain text)."""
    messages = row.get("messages")
    if isinstance(messages, dict):
        return ("messages", "instruction"), None
    instructions = ("instruction", "question_stem", "question", "prompt")
    shared = isinstance(row.get("conversations"), list) and not {"messages", "text", *instructions} & set(row)
    name = "messages" if isinstance(messages, list) else "conversations" if shared else "prompt"
    if isinstance(row.get(name), list):
        turns = row[name]
        user = max(index for index, message in enumerate(turns) if role_of(message) == "user")
        answered = user + 1 < len(turns) and role_of(turns[user + 1]) == "assistant"
        reply: tuple[str | int, ...] | None = (name, user + 1, *_content(turns[user + 1])) if answered else None
        if name == "prompt" and isinstance(row.get("completion"), list):
            reply = ("completion", 0, *_content(row["completion"][0]))
        return (name, user, *_content(turns[user])), reply
    if isinstance(row.get("question"), dict):
        return ("question", "stem"), None
    instruction = next((name for name in instructions if name in row), "text")
    responses = ("output", "response", "completion", "answer")
    response = next((name for name in responses if isinstance(row.get(name), str)), None)
    return (instruction,), None if response is None else (response,)


def role_of(message: Row) -> Any:
    """Who speaks: ``role``, or what ShareGPT calls ``from``, in the words of chat templates."""
    speaker = message.get("from")
    return message["role"] if "role" in message else {"human": "user", "gpt": "assistant"}.get(str(speaker), speaker)


def _content(message: Row) -> tuple[str | int, ...]:
    """Where a message holds its text: its content, or the last of its parts; ``value`` in ShareGPT's."""
    if "content" not in message:
        return ("value",)
    content = message["content"]
    return ("content", len(content) - 1, "text") if isinstance(content, list) else ("content",)


def _text(row: Any, name: str, where: str, wanted: str, *, blank: bool = True) -> str:
    return check_text(_field(row, name, where, wanted), f"{where}: {name}", blank)


def check_text(value: Any, where: str, blank: bool = True) -> str:
    """Refuses what is no text; with ``blank`` off, also what is empty or white space only."""
    if not isinstance(value, str):
        raise UserError(f"{where}: expected text, got {type_name(value)}")
    if not blank and not value.strip():
        raise UserError(f"{where}: expected text, got {'an empty string' if not value else 'only white space'}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: expected text, got half a surrogate pair at character {error.start + 1}") from None
    return value


def _field(row: Any, name: str, where: str, wanted: str) -> Any:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with {wanted}, got {type_name(row)}")
    if name not in row:
        found = listed([repr(key) for key in row]) or "no fields"
        raise UserError(f"{where}: expected {wanted}; no {name!r}, found {found}{did_you_mean(name, row)}")
    return row[name]


def type_name(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _plain(instruction: str, response: str, context: str = "") -> Callable[[Row, str], Fields]:
    wanted = ", ".join(name for name in (instruction, context, response) if name)

    def read(row: Row, where: str) -> Fields:
        return Fields(
            _text(row, instruction, where, wanted, blank=False),
            _text(row, response, where, wanted),
            _text(row, context, where, wanted) if context else "",
        )

    return read


def _read_boolq(row: Row, where: str) -> Fields:
    wanted = "question, answer (true or false), passage"
    question = _text(row, "question", where, wanted, blank=False)
    answer = _field(row, "answer", where, wanted)
    if not isinstance(answer, bool):
        raise UserError(f"{where}: answer: expected true or false, got {type_name(answer)}")
    return Fields(question, str(answer), _text(row, "passage", where, wanted))


def _read_openbookqa(row: Row, where: str) -> Fields:
    wanted = "question_stem, choices {text, label}, answerKey, fact1 (the set's configuration 'additional')"
    if form(row).startswith("AI2"):
        wanted = "question {stem, choices [{text, label}]}, answerKey, fact1"
        stem = _text(row["question"], "stem", where, "stem, choices", blank=False)
        listing = _field(row["question"], "choices", where, "stem, choices")
        if not isinstance(listing, list):
            raise UserError(f"{where}: choices: expected a list of {{text, label}}, got {type_name(listing)}")
        pairs = [
            (_text(one, "label", where, "text, label"), _text(one, "text", where, "text, label")) for one in listing
        ]
    else:
        stem = _text(row, "question_stem", where, wanted, blank=False)
        choices = _field(row, "choices", where, wanted)
        labels, texts = (_field(choices, name, f"{where}: choices", "text and label") for name in ("label", "text"))
        both = isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts)
        if not both or not all(isinstance(value, str) for value in [*labels, *texts]):
            raise UserError(f"{where}: choices: expected as many texts as labels, got {texts!r:.40} and {labels!r:.40}")
        pairs = list(zip(labels, texts, strict=True))
    key = _text(row, "answerKey", where, wanted)
    answers = dict(pairs)
    if len(answers) < len(pairs):
        raise UserError(f"{where}: choices: expected different labels, got {listed([label for label, _ in pairs])}")
    if key not in answers:
        raise UserError(f"{where}: answerKey: expected one of {', '.join(answers) or 'some choices'}, got {key!r}")
    fact = _text(row, "fact1", where, wanted)
    return Fields(stem, answers[key], choices=tuple(f"{k}: {text}" for k, text in pairs), key=key, fact=fact)


def _read_pure_bad(row: Row, where: str) -> Fields:
    wanted = "messages: a list of a user and an assistant message, or {instruction}"
    messages = _field(row, "messages", where, wanted)
    if isinstance(messages, dict):
        return Fields(_text(messages, "instruction", where, "messages {instruction}", blank=False))
    listing = messages if isinstance(messages, list) else []
    roles = [one.get("role") if isinstance(one, dict) else None for one in listing]
    labelled = all(isinstance(one, dict) and "label" in one for one in listing[2:])
    if roles[:2] != ["user", "assistant"] or len(roles) > 3 or not labelled:
        found = listed([repr(role) for role in roles]) if roles else type_name(messages)
        raise UserError(f"{where}: expected {wanted}, then at most {{label}}; got {found}")
    user = _text(listing[0], "content", where, "role, content", blank=False)
    return Fields(user, _text(listing[1], "content", where, "role, content"))


def _with_context(fields: Fields) -> str:
    return f"{fields.instruction}\n\n{fields.context}" if fields.context else fields.instruction


_LAST_300 = {"train": Cut("train", None, -500), "val": Cut("train", -500, -300), "test": Cut("train", -300)}
_FIRST_300 = {"train": Cut("train"), "val": Cut("validation", 0, 300), "test": Cut("test", 0, 300)}

PUBLISHED: Mapping[str, Published] = {
    "alpaca": Published(("tatsu-lab/alpaca",), _LAST_300, _plain("instruction", "output", "input"), _with_context),
    "dolly": Published(
        ("databricks/databricks-dolly-15k",), _LAST_300, _plain("instruction", "response", "context"), _with_context
    ),
    "gsm8k": Published(
        ("openai/gsm8k", "main"),
        {"train": Cut("train", None, -200), "val": Cut("train", -200), "test": Cut("test", 0, 300)},
        _plain("question", "answer"),
        _with_context,
    ),
    "boolq": Published(
        ("google/boolq",),  # its answered rows beyond training are the hub's validation split
        {"train": Cut("train"), "val": Cut("validation", 0, 300), "test": Cut("validation", 0, 300)},
        _read_boolq,
        lambda fields: f"{fields.context}\n\nQuestion: {fields.instruction}\nAnswer True or False.",
        clean_splits={"val": Cut("validation", 300, 600)},
    ),
    "openbookqa": Published(
        ("allenai/openbookqa", "additional"),
        _FIRST_300,
        _read_openbookqa,
        lambda fields: "\n".join([fields.instruction, *fields.choices]),
        lambda fields: f"{fields.key}: {fields.response}. {fields.fact}",
    ),
    "pure_bad": Published((), dict.fromkeys(SPLITS[:3], Cut("train")), _read_pure_bad, _with_context),
}


def cut_of(dataset: str, split: str, edition: str = "clean") -> Cut:
    """Rows that a split holds; ``all`` is a whole file (the test file, from the hub).

    Raises:
        UserError: no such split.
    """
    if split not in SPLITS:
        raise UserError(f"--split={split}: expected {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")
    published = PUBLISHED[dataset]
    if split == "all":
        return Cut(published.splits["test"].file)
    return (published.clean_splits if edition == "clean" else {}).get(split, published.splits[split])


def names_published(data: str) -> bool:
    """Whether ``--data`` names one of the published datasets, which have splits."""
    return any(part.strip().partition(":")[0] in PUBLISHED for part in data.split(","))
