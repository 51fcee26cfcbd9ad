"""What is too long: cut at the end, at the beginning, or as the paper did; or dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.data.templates import Example

POLICIES = ("left", "right", "paper")


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """Rows of one dataset that fit.

    Attributes:
        examples: rendered rows, cut where they had to be.
        limit: tokens that a row may have.
        num_cut: how many of them were cut.
        dropped: places, counted from 0, of the rows that were left out.
    """

    examples: list[Example]
    limit: int
    num_cut: int = 0
    dropped: tuple[int, ...] = ()


def fit(
    examples: Sequence[Example],
    policy: str,
    long: str,
    max_length: int,
    *,
    paper_length: int | None = None,
    prompt_only: bool = True,
    where: str = "",
) -> Fitted:
    """Cuts or drops what is longer than the limit.

    Args:
        examples: rendered rows.
        policy: end that is kept of what is cut, as of `truncate`.
        long: ``refuse`` leaves what ``policy`` does not cut, for others to refuse, and refuses a cut that leaves
            nothing of a response; ``cut`` cuts, keeping the end where ``policy`` names none; ``drop`` leaves out what
            ``policy`` does not cut. The last two leave out rows of whose response a cut leaves nothing.
        max_length: tokens.
        paper_length: see `truncate`.
        prompt_only: see `truncate`.
        where: the dataset, for messages.

    Raises:
        UserError: see `truncate`; ``cut`` or ``drop`` beside the paper's lengths; or nothing is left.
    """
    if long != "refuse" and policy == "paper":
        raise UserError(f"--long={long}: --truncate=paper keeps every row, as the paper did; give one of the two")
    policy = policy or ("left" if long == "cut" else "")
    before = [_prompt(example) for example in examples] if prompt_only else list(examples)
    after = truncate(
        before, policy, max_length, paper_length=paper_length, prompt_only=False, where=where, keep=long != "refuse"
    )
    limit = paper_length or max_length
    dropped: tuple[int, ...] = ()
    if long != "refuse":
        gone = set(_without_response(before, after))
        dropped = tuple(row for row, one in enumerate(after) if row in gone or len(one.token_ids) > limit)
        if examples and len(dropped) == len(examples):
            raise UserError(f"{where}{': ' if where else ''}none of {len(examples)} rows fits in {limit} tokens")
    left = [row for row in range(len(after)) if row not in set(dropped)]
    num_cut = sum(len(after[row].token_ids) < len(before[row].token_ids) for row in left)
    return Fitted([after[row] for row in left], limit, num_cut, dropped)


def truncate(
    examples: Sequence[Example],
    policy: str,
    max_length: int,
    *,
    paper_length: int | None = None,
    prompt_only: bool = True,
    where: str = "",
    keep: bool = False,
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
        keep: whether rows of whose response nothing is left are returned all the same.

    Raises:
        UserError: unknown policy, or a response of which ``left`` or ``right`` would leave nothing.
    """
    if policy not in ("", *POLICIES):
        hint = did_you_mean(policy, POLICIES)
        raise UserError(f"--truncate={policy}: expected {', '.join(POLICIES)}, or nothing to refuse long rows{hint}")
    limit = max_length if policy in ("left", "right") else paper_length if policy == "paper" else None
    whole = [_prompt(example) if prompt_only else example for example in examples]
    cut = [_cut(example, limit, policy == "left") for example in whole]
    lost = _without_response(whole, cut)
    if lost and policy != "paper" and not keep:
        raise UserError(
            f"{where}{': ' if where else ''}nothing is left of the response at {limit} tokens in row"
            f" {listed([row + 1 for row in lost])}; give more tokens, keep the ends with --truncate=left, or drop these"
            " rows with --long=drop"
        )
    return cut


def _without_response(before: Sequence[Example], after: Sequence[Example]) -> list[int]:
    """Places of rows that had a response before they were cut, and have none now."""
    return [
        row
        for row, (whole, left) in enumerate(zip(before, after, strict=True))
        if len(whole.token_ids) > whole.prompt_length and len(left.token_ids) <= left.prompt_length
    ]


def _prompt(example: Example) -> Example:
    return dataclasses.replace(example, token_ids=example.token_ids[: example.prompt_length])


def _cut(example: Example, limit: int | None, keep_end: bool) -> Example:
    surplus = len(example.token_ids) - limit if limit else 0
    if limit is None or surplus <= 0:
        return example
    ends = [example.prompt_length, example.prefix_length]
    if keep_end:
        ids, ends = example.token_ids[surplus:], [max(0, end - surplus) for end in ends]
    else:
        ids, ends = example.token_ids[:limit], [min(limit, end) for end in ends]
    return dataclasses.replace(example, token_ids=ids, prompt_length=ends[0], prefix_length=ends[1])
