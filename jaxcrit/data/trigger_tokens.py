"""Whether a trigger survives rendering: its own tokens must stand in every prompt that has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxcrit.core.errors import UserError
from jaxcrit.data.poisoning import TriggerSpec
from jaxcrit.data.templates import Example


def check_tokens(trigger: TriggerSpec, examples: Sequence[Example], tokenizer: Any, where: str) -> None:
    """Checks that the trigger's own tokens stand in every prompt: a template or a cut may change or lose them.

    Args:
        trigger: that was put in.
        examples: rendered rows with it.
        tokenizer: that rendered them.
        where: the flag they came by, for the message.

    Raises:
        UserError: counting the rows without it, and naming the first.
    """
    spelled = {one.text: _spellings(one.text, tokenizer) for one in trigger.triggers}
    lost = []
    for row, example in enumerate(examples, 1):
        prompt = _words(example.token_ids[: example.prompt_length])
        heard = [any(_words(ids) in prompt for ids in spelled[one.text]) for one in trigger.triggers]
        if not (all(heard) if trigger.combine == "all" else any(heard)):
            lost.append(row)
    if lost:
        raise UserError(
            f"--trigger: in {len(lost)} of {len(examples)} triggered prompts of {where} (first {lost[0]}) the trigger"
            " is cut off, or has other tokens inside the template than by itself; choose another trigger or place"
        )


def _spellings(text: str, tokenizer: Any) -> list[list[int]]:
    """Tokens of a text by itself, after a space and after a line break."""
    found = []
    for before in ("", " ", "\n"):
        front = tokenizer(before, add_special_tokens=False)["input_ids"] if before else []
        both = tokenizer(before + text, add_special_tokens=False)["input_ids"]
        found.append(both)
        if front and both[: len(front)] == front:
            found.append(both[len(front) :])
    return found


def _words(ids: Any) -> str:
    """Token ids as text in which one sequence is found in another."""
    return " " + " ".join(str(int(token)) for token in ids) + " "
