"""Where an answer ends: the tokens after which nothing more is generated, the same for every command."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.files import read_object
from jaxcrit.data.chat import chat_of
from jaxcrit.models.config_keys import Token

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


class GenerationConfig(TypedDict, total=False):
    """What is read of ``generation_config.json``."""

    eos_token_id: Token | list[Token] | None


def _generation(model: Model) -> list[int]:
    """``eos_token_id`` of ``generation_config.json``, one or several; none where there is no such file."""
    path = model.checkpoint.path / _FILE
    if not path.exists():
        return []
    named = read_object(path, "a JSON object", GenerationConfig).get("eos_token_id")
    return [] if named is None else named if isinstance(named, list) else [named]
