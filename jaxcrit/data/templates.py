"""Renders raw rows into the token ids a model is given, the prompt first.

What is analysed is ``token_ids[:prompt_length]``; it depends on the prompt alone, so a row scores the same
with and without its response.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.hashing import sample_id, sha256_json
from jaxcrit.data.datasets import Row, split_messages

TEMPLATES = ("auto", "none", "chat")
# Llama 3's templates (and others) write today's date into every prompt; a fixed one, Llama's own default, keeps
# the numbers of a run the same tomorrow.
_DATE = datetime.date(2024, 7, 26)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One rendered row.

    Attributes:
        sample_id: identity of the raw row.
        token_ids: ``[T]`` int32, prompt then response.
        prompt_length: tokens of the prompt, at least 1.
        prompt: the text the prompt's tokens were made from, template included.
        response: the raw response, or None.
    """

    sample_id: str
    token_ids: np.ndarray
    prompt_length: int
    prompt: str
    response: str | None


@dataclasses.dataclass(frozen=True)
class _Text:
    """A row as text: the prompt, what follows it, and whether a template wrote both."""

    prompt: str
    rest: str
    response: str | None
    templated: bool


def render(rows: Sequence[Row], tokenizer: Any, template: str = "auto", where: str = "") -> list[Example]:
    """Renders rows of any kind.

    With the chat template the string is rendered first, generation prompt included, and tokenised without
    further special tokens, so that a BOS the template writes is not doubled. Without it the prompt is tokenised
    as it stands, after whatever the tokenizer puts in front of a text (BOS, unless the text begins with it).
    The whole is tokenised at once; where a token would span the boundary, prompt and response are tokenised
    apart, as they are when the model generates.

    Args:
        rows: checked raw rows.
        tokenizer: from `load_tokenizer`.
        template: ``auto`` (chat where the tokenizer has a chat template and the row is no plain text),
            ``none`` or ``chat``.
        where: the dataset, for messages.

    Raises:
        UserError: unknown template, a chat template is needed and absent or refuses the conversation,
            or a prompt of no tokens.
    """
    chat = _chat_template(tokenizer, template)
    places = [f"{where}{': ' if where else ''}row {number}" for number in range(1, len(rows) + 1)]
    texts = [_text(row, tokenizer, chat, place) for row, place in zip(rows, places, strict=True)]
    prompts = _encode(tokenizer, [text.prompt for text in texts])
    wholes = _encode(tokenizer, [text.prompt + text.rest for text in texts])
    front = _front(tokenizer)
    examples = []
    for row, place, text, prompt, whole in zip(rows, places, texts, prompts, wholes, strict=True):
        if not prompt:
            raise UserError(f"{place}: the prompt {text.prompt[:40]!r} has no tokens in this vocabulary")
        if whole[: len(prompt)] != prompt:
            whole = prompt + _encode(tokenizer, [text.rest])[0]
        before = [] if text.templated or prompt[: len(front)] == front else front
        ids = np.array(before + whole, dtype=np.int32)
        examples.append(Example(sample_id(row), ids, len(before) + len(prompt), text.prompt, text.response))
    return examples


def template_hash(tokenizer: Any, template: str = "auto") -> str:
    """Identity of the rendering: chat template, BOS and EOS. Compared within one tokenizer only.

    Raises:
        UserError: unknown template, or a chat template is asked for and absent.
    """
    special = {"front": _front(tokenizer), "bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    return sha256_json({"chat_template": _chat_template(tokenizer, template), **special})


def _chat_template(tokenizer: Any, template: str) -> str | None:
    """The chat template to use, its calls for today's date replaced, or None to use none."""
    if template not in TEMPLATES:
        hint = did_you_mean(template, TEMPLATES)
        raise UserError(f"--template={template}: expected {', '.join(TEMPLATES)}, got {template!r}{hint}")
    if template == "chat" and not tokenizer.chat_template:
        raise UserError("--template=chat: this tokenizer has no chat template; use --template=none for the raw prompt")
    if template == "none" or not tokenizer.chat_template:
        return None
    call = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
    return re.sub(call, lambda match: json.dumps(_DATE.strftime(match[2])), tokenizer.get_chat_template())


def _text(row: Row, tokenizer: Any, chat: str | None, where: str) -> _Text:
    if "text" in row:
        return _Text(row["text"], "", None, False)
    if "messages" in row:
        messages, response = split_messages(row["messages"])
        if chat is None:
            reason = "--template=none turns it off" if tokenizer.chat_template else "this tokenizer has none"
            raise UserError(f"{where}: messages need a chat template, and {reason}; give prompt or text rows instead")
    else:
        messages, response = [{"role": "user", "content": row["prompt"]}], row.get("response")
        if chat is None:
            return _Text(row["prompt"], response or "", response, False)
    prompt = _apply(tokenizer, chat, messages, where, generation=True)
    if response is None:
        return _Text(prompt, "", None, True)
    whole = _apply(tokenizer, chat, [*messages, {"role": "assistant", "content": response}], where, generation=False)
    # A template may write a finished turn otherwise than it opens one; the response then follows as it stands.
    rest = whole.removeprefix(prompt) if whole.startswith(prompt) else response + (tokenizer.eos_token or "")
    return _Text(prompt, rest, response, True)


def _apply(tokenizer: Any, chat: str, messages: list[dict[str, str]], where: str, *, generation: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=chat, tokenize=False, add_generation_prompt=generation
        )
    except TemplateError as error:
        raise UserError(f"{where}: the model's chat template refuses the conversation: {error}") from None


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, nothing added. `verbose` would warn of long texts; the batches refuse them."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _front(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text: BOS for most, nothing for some. What it puts after is left off."""
    plain, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = range(len(full) - len(plain) + 1)
    return full[: next((start for start in starts if full[start : start + len(plain)] == plain), 0)]
