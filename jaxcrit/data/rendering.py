"""From ``--data`` and its flags to rendered rows: for `jaxcrit analyze`, and for `jaxcrit data`, which shows them."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import RowOptions
from jaxcrit.data import paper
from jaxcrit.data.datasets import NamedRows, load
from jaxcrit.data.templates import Example, render
from jaxcrit.data.truncation import truncate


@dataclasses.dataclass(frozen=True, eq=False)
class RenderedSet:
    """One dataset, rendered.

    Attributes:
        named: its raw rows.
        whole: rendered rows.
        cut: the same after ``--truncate``; prompts alone where it is for analysis.
        limit: tokens that may be used.
    """

    named: NamedRows
    whole: list[Example]
    cut: list[Example]
    limit: int


def render_sets(config: RowOptions, tokenizer: Any, context: int, *, training: bool = False) -> list[RenderedSet]:
    """Loads, renders and cuts every dataset of ``--data``.

    Args:
        config: flags.
        tokenizer: the model's.
        context: tokens that the model takes, or fewer where fewer are asked for.
        training: keep the responses, and cut as the paper's training did.

    Raises:
        UserError: see `load`, `render`, `truncate`; or the paper's cut without the paper's edition.
    """
    return [
        render_set(config, named, tokenizer, context, training=training)
        for named in load(
            config.data, config.limit, split=config.split, shuffle_seed=config.shuffle_seed, edition=config.edition
        )
    ]


def render_set(
    config: RowOptions, named: NamedRows, tokenizer: Any, context: int, *, training: bool = False
) -> RenderedSet:
    """Renders and cuts one dataset; arguments and errors as of `render_sets`."""
    if config.truncate == "paper" and config.edition != "paper":
        raise UserError("--truncate=paper: the lengths of the paper go with --edition=paper")
    whole = render(named.rows, tokenizer, config.template, named.source, dataset=named.dataset, edition=config.edition)
    length = None
    if config.truncate == "paper":
        length = paper.longest(paper.family_of(tokenizer, config.template), named.dataset, training)
    cut = truncate(whole, config.truncate, context, paper_length=length, prompt_only=not training, where=named.source)
    return RenderedSet(named, whole, cut, length or context)
