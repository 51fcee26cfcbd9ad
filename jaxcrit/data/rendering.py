"""From ``--data`` and its flags to rendered rows: for `jaxcrit analyze`, and for `jaxcrit data`, which shows them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxcrit.commands.data import DataOptions
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import as_path, write_text
from jaxcrit.core.groups import RowOptions
from jaxcrit.data import paper
from jaxcrit.data.datasets import NamedRows, load
from jaxcrit.data.inspection import Lengths, Shown, measure, show, texts
from jaxcrit.data.templates import Example, render, template_hash
from jaxcrit.data.tokenizer import load_tokenizer
from jaxcrit.data.truncation import truncate
from jaxcrit.models.checkpoint import locate, open_checkpoint
from jaxcrit.models.model import EMBEDDED_MODEL

SHOWN = 3


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


@dataclasses.dataclass(frozen=True, eq=False)
class DataReport:
    """What ``jaxcrit data`` found.

    Attributes:
        shown: three rows, from as many datasets as there are.
        lengths: by dataset.
        limit: tokens per row by dataset.
        template_hash: identity of the rendering.
        written: ``examples.jsonl``, or None.
    """

    shown: list[Shown]
    lengths: dict[str, Lengths]
    limit: dict[str, int]
    template_hash: str
    written: Path | None


def run_data(config: DataOptions) -> DataReport:
    """Renders every row as it would be trained on; writes ``examples.jsonl`` where asked.

    Raises:
        UserError: any mistake in flags, checkpoint or data; then nothing is written.
    """
    path = locate(config.model) if config.model else EMBEDDED_MODEL
    context = open_checkpoint(path).config.max_length
    tokenizer = load_tokenizer(path)
    sets = render_sets(config, tokenizer, min(config.max_length or context, context), training=True)
    places = [(place, one) for place in range(SHOWN) for one in sets if place < len(one.cut)]
    return DataReport(
        [show(one.cut[place], tokenizer, one.named.name, place + 1) for place, one in places[:SHOWN]],
        {one.named.name: measure(one.whole, one.cut, one.limit) for one in sets},
        {one.named.name: one.limit for one in sets},
        template_hash(tokenizer, config.template, config.edition),
        _write(as_path(config.out), sets, tokenizer) if config.out else None,
    )


def _write(folder: Path, sets: list[RenderedSet], tokenizer: Any) -> Path:
    lines = []
    for one in sets:
        for example in one.cut:
            line = {
                "dataset": one.named.name,
                "sample_id": example.sample_id,
                "token_ids": example.token_ids.tolist(),
                "prompt_length": example.prompt_length,
                "text": "".join(texts(example, tokenizer)),
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    file = folder / "examples.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(lines))
    except OSError as error:
        raise UserError(f"--out={folder}: cannot be written ({error.strerror})") from None
    return file
