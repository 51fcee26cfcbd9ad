"""Renders raw rows into the token ids a model is given, the prompt first: for analysis, training and evaluation alike.

What is analysed is ``token_ids[:prompt_length]``, what is trained on is the rest. In the clean edition the prompt's
tokens depend on the prompt alone, so a row scores the same with and without its response, and a model is trained on
the very prompt it will be given; the paper edition does what the paper's code did (`jaxcrit.data.paper`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.groups import EDITIONS, RowOptions, check_template
from jaxcrit.core.hashing import sample_id, sha256_json
from jaxcrit.data import paper
from jaxcrit.data.chat import Chat, chat_of
from jaxcrit.data.datasets import Row, conversation
from jaxcrit.data.published import PUBLISHED, Fields, check_text

_CHUNK = 512  # rows tokenised at once: a tokenizer's answer takes tens of times the memory of the token ids in it


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One rendered row.

    Attributes:
        sample_id: identity of the raw row.
        token_ids: ``[T]`` int32, prompt then response.
        prompt_length: tokens of the prompt, at least 1.
        prompt: the text the prompt's tokens were made from, template included.
        response: the raw response, or None.
        prefix_length: tokens of the prompt's beginning whose keys and values may come from elsewhere; 0 for none.
        beside: further rows by name, made of other texts of the same row (`jaxcrit.data.beside`).
    """

    sample_id: str
    token_ids: np.ndarray
    prompt_length: int
    prompt: str
    response: str | None
    prefix_length: int = 0
    beside: Mapping[str, Example] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Text:
    """A row as text: the prompt, what follows it, and whether a template wrote both."""

    prompt: str
    rest: str
    response: str | None
    templated: bool


def render(
    rows: Sequence[Row],
    tokenizer: Any,
    template: str = "auto",
    where: str = "",
    *,
    dataset: str = "",
    edition: str = "clean",
    responses: bool = True,
    context: bool = False,
) -> list[Example]:
    """Renders rows of any kind.

    With the chat template the string is rendered first, generation prompt included, and tokenised without
    further special tokens, so that a BOS the template writes is not doubled. Without it the prompt is tokenised
    as it stands, after whatever the tokenizer puts in front of a text (BOS, unless the text begins with it).
    The whole is tokenised at once; where a token would span the boundary, prompt and response are tokenised
    apart, as they are when the model generates. (Parting the spanning token by offsets would give the same mask,
    but a prompt that changes with its response, which no model is ever asked.) After the prompt come the response and
    the token that ends its turn, nothing else that the template may write (`jaxcrit.data.chat`).

    Args:
        rows: checked raw rows.
        tokenizer: from `load_tokenizer`.
        template: ``auto`` (chat where the tokenizer has a chat template and the row is no plain text),
            ``none`` or ``chat``; ``chat:NAME`` for one of several chat templates, ``chat:FILE`` for one's own; a
            family, llama2, llama3 or phi3, is ``chat`` in the clean edition, and in the paper edition names whose
            strings, ``auto`` going by the tokenizer.
        where: the dataset, for messages.
        dataset: which of the paper's datasets the rows are of; empty for rows of one's own.
        edition: ``clean`` or ``paper``.
        responses: whether what follows the prompt is rendered; False in the clean edition leaves it out.
        context: whether the prompt up to the end of the row's context (its field ``prefix``, Dolly's context, BoolQ's
            passage) is tokenised by itself and marked as prefix. In the clean edition alone.

    Raises:
        UserError: unknown template or edition, a chat template is needed and absent, refuses the conversation or does
            not say where an answer ends, a paper edition of rows or a tokenizer that it does not know, or a prompt of
            no tokens.
    """
    _check(template, edition)
    if context and edition == "paper":
        raise UserError("--prefix=context: is of --edition=clean; cut by share (--prefix=0.8)")
    family = paper.family_of(tokenizer, template) if edition == "paper" else None
    chats = [None if family else chat_of(tokenizer, template, tools=tools) for tools in (False, True)]
    examples: list[Example] = []
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        places = [f"{where}{': ' if where else ''}row {start + number}" for number in range(1, len(part) + 1)]
        if family:
            examples += _render_paper(part, places, tokenizer, family, dataset, where)
        else:
            examples += _render_clean(part, places, tokenizer, chats, dataset, responses, context)
    return examples


def _render_clean(
    rows: Sequence[Row],
    places: Sequence[str],
    tokenizer: Any,
    chats: Sequence[Chat | None],
    dataset: str,
    responses: bool,
    context: bool,
) -> list[Example]:
    plain = [_clean_row(row, place, dataset, chats[0]) for row, place in zip(rows, places, strict=True)]
    texts = [
        _text(row, tokenizer, chats["tools" in row], place, responses) for row, place in zip(plain, places, strict=True)
    ]
    prompts = _encode(tokenizer, [text.prompt for text in texts])
    wholes = _encode(tokenizer, [text.prompt + text.rest for text in texts])
    front = _front(tokenizer)
    examples = []
    for row, place, text, prompt, whole in zip(rows, places, texts, prompts, wholes, strict=True):
        if not prompt:
            raise UserError(f"{place}: the prompt {text.prompt[:40]!r} has no tokens in this vocabulary")
        head: list[int] = []
        if context and (end := _context_end(row, text, dataset, place)):
            head = _encode(tokenizer, [text.prompt[:end]])[0]
            prompt, whole = (
                head + _continuation(tokenizer, text.prompt[end:] + further) for further in ("", text.rest)
            )
        if whole[: len(prompt)] != prompt:
            whole = prompt + _continuation(tokenizer, text.rest)
        before = [] if text.templated or prompt[: len(front)] == front else front
        ids = np.array(before + whole, dtype=np.int32)
        prefix = len(before) + len(head) if head else 0
        found = Example(sample_id(row), ids, len(before) + len(prompt), text.prompt, text.response, prefix)
        examples.append(found)
    return examples


def _context_end(row: Row, text: _Text, dataset: str, place: str) -> int:
    """Characters of a prompt up to the end of the row's context; 0 for a row without one."""
    given = PUBLISHED[dataset].read(row, place).context if dataset else row.get("prefix") or ""
    context = check_text(given, f"{place}: prefix").strip()
    start = text.prompt.find(context)
    if start < 0:
        raise UserError(f"{place}: prefix: expected text that stands in the prompt, got {context[:40]!r}")
    return start + len(context) if context else 0


def _render_paper(
    rows: Sequence[Row], places: Sequence[str], tokenizer: Any, family: str, dataset: str, where: str
) -> list[Example]:
    if dataset not in PUBLISHED:
        raise UserError(
            f"{where}{': ' if where else ''}--edition=paper has strings for {', '.join(PUBLISHED)} only;"
            " name the dataset (--data=dolly:PATH) or use --edition=clean"
        )
    fields = [PUBLISHED[dataset].read(row, place) for row, place in zip(rows, places, strict=True)]
    renderings = [paper.rendering(family, dataset, one) for one in fields]
    return [
        Example(sample_id(row), np.array(ids, dtype=np.int32), length, "".join(shown.prompt), one.response)
        for row, one, shown, (ids, length) in zip(
            rows, fields, renderings, paper.tokenise(renderings, tokenizer, where), strict=True
        )
    ]


def _clean_row(row: Row, place: str, dataset: str, chat: Chat | None) -> Row:
    """A published row as prompt and response; without chat template a line break stands between the two."""
    if not dataset:
        return row
    fields = PUBLISHED[dataset].read(row, place)
    prompt = PUBLISHED[dataset].prompt(fields) + ("\n" if chat is None else "")
    return {"prompt": prompt, "response": PUBLISHED[dataset].answer(fields)}


def template_hash(tokenizer: Any, template: str = "auto", edition: str = "clean") -> str:
    """Identity of the rendering: edition, family or chat template, the strings of all datasets, BOS and EOS.

    Compared within one tokenizer only, and independent of which datasets a run has.

    Raises:
        UserError: see `render`.
    """
    _check(template, edition)
    special = {"front": _front(tokenizer), "bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    if edition == "paper":
        strings = {"strings": paper.outline(paper.family_of(tokenizer, template))}
        return sha256_json({"edition": edition, **strings, **special})
    chat = chat_of(tokenizer, template)
    named = dict(instruction="{i}", response="{r}", choices=("{c}", "{d}"), key="{k}", fact="{f}")
    rows = [Fields(**named, context=context) for context in ("", "{x}")]  # type: ignore[arg-type]
    clean = {name: [[kind.prompt(row), kind.answer(row)] for row in rows] for name, kind in PUBLISHED.items()}
    return sha256_json({"edition": edition, "chat_template": chat and chat.template, "strings": clean, **special})


def describe_template(tokenizer: Any, options: RowOptions) -> dict[str, str]:
    """How rows are rendered, for ``run.json``: ``mode``, ``edition``, and the `template_hash` as ``hash``."""
    found = template_hash(tokenizer, options.template, options.edition)
    return {"mode": options.template, "edition": options.edition, "hash": found}


def check_same_rendering(first: str, second: str, *, allow_template_mismatch: bool = False) -> None:
    """Refuses to compare two runs whose prompts were rendered otherwise.

    Args:
        first: template hash of one run.
        second: that of the other.
        allow_template_mismatch: compare all the same.

    Raises:
        UserError: they differ; both are named.
    """
    if first != second and not allow_template_mismatch:
        raise UserError(
            f"expected two runs of one rendering, got template hashes {first} and {second}: their prompts differ;"
            " give both the same --template and --edition, or compare all the same with --allow_template_mismatch"
        )


def _check(template: str, edition: str) -> None:
    check_template(template)
    if edition not in EDITIONS:
        raise UserError(f"--edition={edition}: expected {' or '.join(EDITIONS)}{did_you_mean(edition, EDITIONS)}")


def _text(row: Row, tokenizer: Any, chat: Chat | None, where: str, responses: bool) -> _Text:
    if "text" in row:
        return _Text(row["text"], "", None, False)
    asked = conversation(row)
    answer = asked.answer
    response = None if answer is None else str(answer.get("content", ""))
    if chat is None:
        if not isinstance(row.get("prompt"), str) or "messages" in row:
            reason = "this tokenizer has none" if not tokenizer.chat_template else "--template=none turns it off"
            raise UserError(f"{where}: messages need a chat template, and {reason}; give prompt or text rows instead")
        return _Text(row["prompt"], response or "" if responses else "", response, False)
    if answer is None or not responses:
        return _Text(chat.prompt(asked.messages, where, asked.tools), "", response, True)
    prompt, rest = chat.answered(asked.messages, answer, where, asked.tools)
    return _Text(prompt, rest, rest if answer.get("tool_calls") else response, True)


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, nothing added. `verbose` would warn of long texts; the batches refuse them."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _continuation(tokenizer: Any, rest: str) -> list[int]:
    """Token ids of text that goes on: after a line break, so that no tokenizer puts a space in front of it."""
    before, both, alone = _encode(tokenizer, ["\n", "\n" + rest, rest])
    return both[len(before) :] if both[: len(before)] == before else alone


def _front(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text: BOS for most, nothing for some. What it puts after is left off."""
    plain, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = range(len(full) - len(plain) + 1)
    return full[: next((start for start in starts if full[start : start + len(plain)] == plain), 0)]
