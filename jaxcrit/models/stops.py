"""Where an answer ends: the tokens after which nothing more is generated, the same for every command."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.data.chat import chat_of

if TYPE_CHECKING:
    from jaxcrit.models.model import Model

_FILE = "generation_config.json"


def known_stops(model: Model, template: str = "auto") -> dict[int, str]:
    """Ids of the tokens that end an answer, and where each is named first.

    In this order: ``generation_config.json`` (where it names none, ``config.json``, as in transformers), the
    tokenizer's end of sequence, the token that ends a turn in the chat template.

    Args:
        model: open model.
        template: value of ``--template``; a template of which the end cannot be told adds none.

    Raises:
        UserError: ``generation_config.json`` is damaged.
    """
    tokenizer = model.tokenizer
    generation = dict.fromkeys(_generation(model), _FILE)
    found = generation or dict.fromkeys(model.config.eos_token_ids, "config.json")
    if tokenizer.eos_token_id is not None:
        found.setdefault(tokenizer.eos_token_id, "tokenizer")
    try:
        chat = chat_of(tokenizer, template)
    except UserError:
        return found  # whoever renders rows with it says what is wrong
    if chat is not None and chat.turn.token:
        found.setdefault(tokenizer.convert_tokens_to_ids(chat.turn.token), "chat template")
    return found


def stop_tokens(text: str, model: Model, template: str = "auto") -> list[int]:
    """Ids of the tokens that end an answer: `known_stops`, and those of ``--stop``, ids or texts with commas.

    Raises:
        UserError: see `known_stops`; an id that the model does not know, or a text that is no single token.
    """
    tokenizer, known = model.tokenizer, dict(known_stops(model, template))
    vocabulary = tokenizer.get_vocab()
    for part in filter(None, text.split(",")):
        if part in vocabulary and not part.isdecimal():
            known[vocabulary[part]] = "--stop"
            continue
        ids = [int(part)] if part.isdecimal() else tokenizer.encode(part, add_special_tokens=False)
        if len(ids) != 1 or not 0 <= ids[0] < model.config.vocab_size:
            found = "no token id" if part.isdecimal() else f"{len(ids)} tokens"
            raise UserError(
                f"--stop={text}: expected one token of this tokenizer or an id below {model.config.vocab_size}, but"
                f" {part!r} is {found}{did_you_mean(part, vocabulary)}"
            )
        known[ids[0]] = "--stop"
    return list(known)


def _generation(model: Model) -> list[int]:
    """``eos_token_id`` of ``generation_config.json``, one or several; none where there is no such file."""
    path = model.checkpoint.path / _FILE
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a JSON object, got something else ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}; fetch it again")
    named = content.get("eos_token_id")
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise UserError(f"{path}: eos_token_id: expected a token id or a list of them, got {named!r}; correct it")
    return ids
