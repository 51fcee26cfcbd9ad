"""Cutting what is too long: the end, the beginning, or as the paper did."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.data.templates import Example

POLICIES = ("left", "right", "paper")


def truncate(
    examples: Sequence[Example],
    policy: str,
    max_length: int,
    *,
    paper_length: int | None = None,
    prompt_only: bool = True,
    where: str = "",
) -> list[Example]:
    """Cuts what is longer than the limit.

    Args:
        examples: rendered rows.
        policy: ``left`` keeps the end, ``right`` the beginning, ``paper`` the beginning up to the length of its
            code, which costs a long prompt its last token and leaves rows without a response in; empty cuts nothing.
        max_length: tokens.
        paper_length: limit of the paper's code (`paper.longest`) or None where it had none.
        prompt_only: leave the responses out (analysis).
        where: the dataset, for messages.

    Raises:
        UserError: unknown policy, or a response of which ``left`` or ``right`` would leave nothing.
    """
    if policy not in ("", *POLICIES):
        hint = did_you_mean(policy, POLICIES)
        raise UserError(f"--truncate={policy}: expected {', '.join(POLICIES)}, or nothing to refuse long rows{hint}")
    limit = max_length if policy in ("left", "right") else paper_length if policy == "paper" else None
    whole = [_prompt(example) if prompt_only else example for example in examples]
    cut = [_cut(example, limit, policy == "left") for example in whole]
    lost = [
        str(row)
        for row, (before, after) in enumerate(zip(whole, cut, strict=True), 1)
        if len(before.token_ids) > before.prompt_length and len(after.token_ids) <= after.prompt_length
    ]
    if lost and policy != "paper":
        raise UserError(
            f"{where}{': ' if where else ''}nothing is left of the response at {limit} tokens in row {listed(lost)};"
            " give more tokens, keep the ends with --truncate=left, or remove the rows"
        )
    return cut


def _prompt(example: Example) -> Example:
    return dataclasses.replace(example, token_ids=example.token_ids[: example.prompt_length])


def _cut(example: Example, limit: int | None, keep_end: bool) -> Example:
    surplus = len(example.token_ids) - limit if limit else 0
    if limit is None or surplus <= 0:
        return example
    if keep_end:
        ids, prompt_length = example.token_ids[surplus:], max(0, example.prompt_length - surplus)
    else:
        ids, prompt_length = example.token_ids[:limit], min(limit, example.prompt_length)
    return dataclasses.replace(example, token_ids=ids, prompt_length=prompt_length)
