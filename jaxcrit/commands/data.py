"""``jaxcrit data``: what a model will see of a dataset."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcrit.commands import shared
from jaxcrit.core import console
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import as_path, write_text
from jaxcrit.core.groups import WHERE, LengthOptions, ModelOptions, OutOptions, RowOptions
from jaxcrit.core.options import option
from jaxcrit.reporting.tables import table

if TYPE_CHECKING:
    from jaxcrit.data.dataset import Dataset
    from jaxcrit.data.inspection import Lengths, Shown

SHOWN = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(ModelOptions, RowOptions, OutOptions, LengthOptions):
    """What ``jaxcrit data`` is asked."""

    out: str = option("", "directory for examples.jsonl, one line per row (default: none)", word="DIR", free=WHERE)


OPTIONS = DataOptions


def run(options: DataOptions) -> int:
    """Renders, shows, and writes where asked."""
    report = run_data(options)
    console.tell(data_text(report.shown, report.lengths, report.limit, report.template_hash))
    if report.written:
        console.tell(f"examples: {report.written}")
    shared.tell_next("data", options, None)
    return 0


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


def inspected(options: DataOptions, model: Any = None, rows: Any = None, shown: int = SHOWN) -> str:
    """The text of the command for rows and a model in memory, or those that the options name."""
    report = run_data(options, model=model, rows=rows, shown=shown)
    return data_text(report.shown, report.lengths, report.limit, report.template_hash)


def run_data(options: DataOptions, *, model: Any = None, rows: Any = None, shown: int = SHOWN) -> DataReport:
    """Renders every row as it would be trained on; writes ``examples.jsonl`` where asked.

    Args:
        options: what is asked.
        model: model in place of the one that the options name.
        rows: rows in place of those that the options name.
        shown: rows to show, from as many datasets as there are.

    Raises:
        UserError: any mistake in flags, checkpoint or data; then nothing is written.
    """
    from jaxcrit.data.dataset import Dataset, cut, named_rows, whole
    from jaxcrit.data.inspection import measure, show
    from jaxcrit.data.templates import template_hash
    from jaxcrit.data.tokenizer import load_tokenizer
    from jaxcrit.models.adapters import place_of
    from jaxcrit.models.checkpoint import open_checkpoint
    from jaxcrit.models.model import EMBEDDED_MODEL, Model

    if isinstance(model, Model):
        context, tokenizer = model.config.max_length, model.tokenizer
    else:
        name = options.model if model is None else str(model)
        place = place_of(name or str(EMBEDDED_MODEL))
        context, tokenizer = open_checkpoint(place.checkpoint).config.max_length, load_tokenizer(place.tokenizer)
    room = min(options.max_length or context, context)
    lengths, limits, sets = {}, {}, []
    for named in named_rows(rows, options):
        if isinstance(named, Dataset):
            raise UserError(f"{named.name}: token ids are given as they stand; there is nothing to render")
        everything = whole(named, tokenizer, options)
        fitted = cut(everything, named, tokenizer, options, room, responses=True)
        limits[named.name] = fitted.limit
        lengths[named.name] = measure(everything, fitted)
        sets.append(Dataset(named.name, named.source, fitted.examples))
    places = [(place, one) for place in range(shown) for one in sets if place < len(one.examples)]
    return DataReport(
        [show(one.examples[place], tokenizer, one.name, place + 1) for place, one in places[:shown]],
        lengths,
        limits,
        template_hash(tokenizer, options.template, options.edition),
        _write(as_path(options.out), sets, tokenizer) if options.out else None,
    )


def _write(folder: Path, sets: list[Dataset], tokenizer: Any) -> Path:
    from jaxcrit.data.inspection import texts

    lines = []
    for one in sets:
        for example in one.examples:
            line = {
                "dataset": one.name,
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


MASKED, LOSS = "· ", "+ "


def example_text(shown: Shown) -> str:
    """One rendered row, a mark before every line: ``·`` without loss, ``+`` with loss."""
    loss = shown.num_tokens - shown.prompt_length
    lines = [f"{shown.dataset}, row {shown.row}: {shown.prompt_length} tokens masked (·), {loss} with loss (+)"]
    for mark, text in ((MASKED, shown.prompt), (LOSS, shown.target)):
        lines += [mark + line for line in text.split("\n")] if text else []
    return "\n".join(lines)


def length_table(lengths: Mapping[str, Lengths], limit: Mapping[str, int]) -> str:
    """One row per dataset: tokens of prompts and responses (least, median, most), and what does not fit."""
    header = ["rows", "prompt", "response", "limit", "too long", "truncated", "dropped", "no response", "dataset"]
    rows = [
        [
            str(one.num_rows),
            " ".join(map(str, one.prompt)),
            " ".join(map(str, one.response)),
            str(limit[name]),
            f"{one.too_long:.1%}",
            f"{one.truncated:.1%}",
            str(one.num_dropped),
            f"{one.without_response:.1%}",
            name,
        ]
        for name, one in lengths.items()
    ]
    return table(header, rows)


def data_text(
    shown: Sequence[Shown], lengths: Mapping[str, Lengths], limit: Mapping[str, int], template_hash: str
) -> str:
    """The whole answer of the command."""
    title = "tokens per row (least, median, most):"
    return "\n\n".join(
        [*map(example_text, shown), f"{title}\n{length_table(lengths, limit)}", f"template hash: {template_hash}"]
    )
