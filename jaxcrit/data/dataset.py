"""Rows, rendered: from whatever a user has to `Dataset` objects in one step."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcrit.core import console
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import check_name
from jaxcrit.core.groups import RowOptions, SourceOptions
from jaxcrit.core.hashing import sample_id, sha256_json
from jaxcrit.data import paper
from jaxcrit.data.batches import refuse_long
from jaxcrit.data.beside import fit_beside, texts_beside
from jaxcrit.data.containers import without_nulls
from jaxcrit.data.datasets import NamedRows, Repeats, check_rows_in_memory, load
from jaxcrit.data.templates import Example, render
from jaxcrit.data.truncation import Fitted, fit

MEMORY = "memory"  # source of rows that come from no file


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One dataset, rendered.

    Attributes:
        name: name within a run; no two datasets share one.
        source: path, ``demo:FAMILY``, or ``memory``.
        examples: rendered rows in the order of the source.
        num_cut: how many of them were cut for being too long.
        num_dropped: how many rows were left out for being too long.
    """

    name: str
    source: str
    examples: list[Example]
    num_cut: int = 0
    num_dropped: int = 0

    @property
    def sample_ids(self) -> list[str]:
        """Identity of each row."""
        return [example.sample_id for example in self.examples]

    def describe(self) -> dict[str, Any]:
        """JSON values for ``run.json``; ``hash`` identifies the rows and their order."""
        return {
            "source": self.source,
            "num_samples": len(self.examples),
            "num_cut": self.num_cut,
            "num_dropped": self.num_dropped,
            "longest_prompt": max(example.prompt_length for example in self.examples),
            "hash": sha256_json(self.sample_ids),
        }


def joined(name: str, source: str, parts: Sequence[Dataset]) -> Dataset:
    """The rows of several datasets as one."""
    return Dataset(
        name,
        source,
        [example for one in parts for example in one.examples],
        sum(one.num_cut for one in parts),
        sum(one.num_dropped for one in parts),
    )


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a model and its tokenizer set.

    Attributes:
        context: tokens of a row at most.
        vocab_size: tokens that the model knows.
        where: path of the model, for messages.
    """

    context: int
    vocab_size: int
    where: str = ""


def read_datasets(
    rows: Any,
    tokenizer: Any,
    options: RowOptions,
    limits: Limits,
    *,
    responses: bool = False,
    split: str = "",
    reserve: int = 0,
    beside: Sequence[str] = (),
) -> list[Dataset]:
    """Reads, renders, cuts and checks rows.

    Args:
        rows: None for the rows that the options name; else text as ``--data`` has it, a path, a dataset of the
            ``datasets`` library, dicts as in a JSONL file, strings (each a prompt, rendered by the template), token
            ids (each a prompt as it stands), or a mapping of names to any of these.
        tokenizer: tokenizer of the model.
        options: which rows, and how they are rendered.
        limits: context and vocabulary of the model.
        responses: whether rows are trained or tested on, and must have responses; else their prompts alone are kept.
        split: split of published datasets where the options name none.
        reserve: tokens of the context that are left free for an answer.
        beside: names of rows to render beside each row (`jaxcrit.data.beside`).

    Returns:
        One dataset or more.

    Raises:
        UserError: rows that cannot be read, rendered or cut, that are too long, or have no response; two datasets of
            one name; or a tokenizer that does not belong to the model.
    """
    asked = getattr(options, "max_length", 0) if responses else 0
    room = min(asked or limits.context, limits.context) - reserve
    if room < 1:
        raise UserError(
            f"--max_new_tokens={reserve}: leaves no room for a prompt in the model's context of {limits.context} tokens"
        )
    found = []
    for named in named_rows(rows, options, split):
        if isinstance(named, Dataset):
            # Rendered already; what may happen to rows that are too long is asked for by one word alone.
            end = options.truncate if options.long != "refuse" else ""
            fitted = fit(named.examples, end, options.long, room, prompt_only=not responses, where=named.source)
        else:
            fitted = rendered(named, tokenizer, options, room, responses=responses, beside=beside)
        fitted = fit_beside(fitted, beside, options, room, named.source) if beside else fitted
        tell(named.name, fitted)
        counts = fitted.num_cut, len(fitted.dropped)
        if isinstance(named, Dataset):
            counts = named.num_cut + counts[0], named.num_dropped + counts[1]
        dataset, longest = Dataset(named.name, named.source, fitted.examples, *counts), fitted.limit
        if responses:
            check_rows(dataset.examples, longest, limits.vocab_size, dataset.source)
            for name in beside:
                others = [example.beside[name] for example in dataset.examples]
                _check_vocabulary(others, limits.vocab_size, f"{dataset.source}: {name}")
        else:
            where = dataset.source
            if reserve:
                where = f"{where}: {reserve} new tokens take part of the context"
            refuse_long([example.prompt_length for example in dataset.examples], room, where)
            _check_vocabulary(dataset.examples, limits.vocab_size, limits.where or dataset.source)
        found.append(dataset)
    for one, other in itertools.combinations(found, 2):
        if shared := len(set(one.sample_ids) & set(other.sample_ids)):
            console.note(f"{one.name} and {other.name} have {shared} rows in common, which count in both")
    return found


def tell(name: str, fitted: Fitted) -> None:
    """Says how many rows were cut and left out, where there are such."""
    if fitted.num_cut or fitted.dropped:
        console.note(
            f"{name}: {len(fitted.examples) + len(fitted.dropped)} rows, {fitted.num_cut} cut and"
            f" {len(fitted.dropped)} left out for being longer than {fitted.limit} tokens"
        )


def rendered(
    named: NamedRows, tokenizer: Any, options: RowOptions, room: int, *, responses: bool, beside: Sequence[str] = ()
) -> Fitted:
    """Renders and cuts the rows of one dataset.

    Args:
        named: raw rows.
        tokenizer: tokenizer of the model.
        options: how they are rendered and cut.
        room: tokens that a row may have.
        responses: whether responses are kept, and rows cut as the paper's training did.
        beside: see `read_datasets`; these are not cut.

    Returns:
        Rendered rows, and how many tokens they may have: ``room``, or the paper's length.

    Raises:
        UserError: see `render`, `fit`; or the paper's cut without the paper's edition.
    """
    examples = whole(named, tokenizer, options, responses=responses)
    has = bool(tokenizer.chat_template) and options.template == "auto"
    if responses and options.edition == "clean" and options.template in ("auto", "none") and not has:
        _say_what_joins(examples, named)
    if beside and options.edition == "paper":
        raise UserError("--supervise with a row's fields: is of --edition=clean")
    others = {name: whole(texts_beside(named, name), tokenizer, options) for name in beside}
    for place, example in enumerate(examples):
        examples[place] = dataclasses.replace(example, beside={name: rows[place] for name, rows in others.items()})
    return cut(examples, named, tokenizer, options, room, responses=responses)


def _say_what_joins(examples: Sequence[Example], named: NamedRows) -> None:
    """Remarks that responses follow their prompts with nothing between, where no template puts anything there."""
    joined = [one for one in examples if one.prompt[-1:].strip() and (one.response or "")[:1].strip()]
    if joined:
        first = joined[0]
        shown = f"{first.prompt[-20:]}|{(first.response or '')[:20]}"
        console.remark(
            f"{named.name}: no chat template, so that {len(joined)} responses follow their prompts with nothing between"
            f" ({shown!r}, | being where): end prompts in a line break, or give --template"
        )


def whole(named: NamedRows, tokenizer: Any, options: RowOptions, *, responses: bool = True) -> list[Example]:
    """The rows of one dataset, rendered and not cut; arguments and errors as of `rendered`."""
    if options.truncate == "paper" and options.edition != "paper":
        raise UserError("--truncate=paper: the lengths of the paper go with --edition=paper")
    return render(
        named.rows,
        tokenizer,
        options.template,
        named.source,
        dataset=named.dataset,
        edition=options.edition,
        responses=responses,
        context=getattr(options, "prefix", "") == "context",
    )


def cut(
    examples: list[Example], named: NamedRows, tokenizer: Any, options: RowOptions, room: int, *, responses: bool
) -> Fitted:
    """Rendered rows cut as the options say; arguments and errors as of `rendered`."""
    length = None
    if options.truncate == "paper":
        length = paper.longest(paper.family_of(tokenizer, options.template), named.dataset, responses)
    return fit(
        examples,
        options.truncate,
        options.long,
        room,
        paper_length=length,
        prompt_only=not responses,
        where=named.source,
    )


def check_rows(examples: Sequence[Example], max_length: int, vocab_size: int, where: str) -> None:
    """Checks that every row has a response, fits, and is of the model's vocabulary.

    Args:
        examples: rendered rows.
        max_length: tokens of a row at most.
        vocab_size: tokens that the model knows.
        where: dataset, for messages.

    Raises:
        UserError: naming the rows.
    """
    silent = [
        row
        for row, example in enumerate(examples, 1)
        if len(example.token_ids) <= example.prompt_length or not (example.response or "").strip()
    ]
    if silent:
        raise UserError(
            f"{where}: row {listed(silent)} has no response to learn from; give rows with prompt and response"
        )
    long = [row for row, example in enumerate(examples, 1) if len(example.token_ids) > max_length]
    if long:
        raise UserError(
            f"{where}: expected rows of at most {max_length} tokens, row {listed(long)} is longer; drop such"
            " rows with --long=drop, or keep the beginning with --truncate=right (the end with left)"
        )
    _check_vocabulary(examples, vocab_size, where)


def _check_vocabulary(examples: Sequence[Example], vocab_size: int, where: str) -> None:
    largest = max(int(example.token_ids.max()) for example in examples)
    if largest >= vocab_size:
        raise UserError(
            f"{where}: the tokenizer gives token {largest}, the model knows {vocab_size}; they do not belong together"
        )


def named_rows(rows: Any, options: RowOptions, split: str = "") -> list[NamedRows | Dataset]:
    """Raw rows by dataset; token ids need no rendering and are datasets at once.

    Args:
        rows: see `read_datasets`.
        options: which rows, where ``rows`` is None.
        split: split of published datasets where the options name none.

    Raises:
        UserError: rows that cannot be read.
    """
    if (spec := text_of(rows, options)) is not None:
        loaded = load(
            spec,
            options.limit,
            split=options.split,
            preferred=split or "test",
            shuffle_seed=options.shuffle_seed,
            edition=options.edition,
            drop=options.duplicates == "drop",
        )
        return list(loaded)
    if isinstance(rows, Dataset):
        return [rows]
    if isinstance(rows, Mapping):
        if not rows:
            raise UserError("rows: expected one dataset or more by name, got none")
        return [_in_memory(check_name(name, "rows"), one, options) for name, one in rows.items()]
    if isinstance(rows, list | tuple) and rows and all(isinstance(row, Dataset | NamedRows) for row in rows):
        names = [row.name for row in rows]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise UserError(f"rows: expected datasets of different names, got two called {twice[0]!r}; rename one")
        return list(rows)
    return [_in_memory("rows", rows, options)]


def text_of(rows: Any, options: SourceOptions) -> str | None:
    """The text, as ``--data`` has it, that names the rows; None for rows in memory."""
    if rows is None:
        return options.data
    return str(rows) if isinstance(rows, str | Path) else None


def _in_memory(name: str, rows: Any, options: RowOptions) -> NamedRows | Dataset:
    if isinstance(rows, Dataset):
        return dataclasses.replace(rows, name=name)
    if isinstance(rows, str | bytes) or not hasattr(rows, "__iter__"):
        raise UserError(f"{name}: expected rows, prompts or token ids, got {type(rows).__name__}")
    if iter(rows) is rows:
        raise UserError(f"{name}: expected rows that can be read again, got {type(rows).__name__}; give a list of them")
    shuffled = options.shuffle_seed >= 0
    # Rows that are streamed may have no end.
    given = list(itertools.islice(rows, None if shuffled else options.limit or None))
    if shuffled:
        random.Random(options.shuffle_seed).shuffle(given)
        given = given[: options.limit or None]
    if hasattr(rows, "column_names"):  # a table, which has None where a row has no such field
        given = [without_nulls(dict(row)) for row in given]
    if not given:
        raise UserError(f"{name}: expected rows, prompts or token ids, got none")
    drop = options.duplicates == "drop"
    if all(_are_tokens(row) for row in given):
        return Dataset(name, MEMORY, _of_tokens(given, name, drop))
    whole = [{"prompt": row} if isinstance(row, str) else row for row in given]
    for place, row in enumerate(whole, 1):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{name}, row {place}: expected a dict such as {{'prompt': ..., 'response': ...}}, a text, or token"
                f" ids, got {type(row).__name__}"
            )
    return NamedRows(name, MEMORY, check_rows_in_memory([dict(row) for row in whole], name, drop))


def _are_tokens(row: Any) -> bool:
    if isinstance(row, np.ndarray):
        return row.ndim == 1 and np.issubdtype(row.dtype, np.integer) and len(row) > 0
    if not isinstance(row, list | tuple) or not row:
        return False
    return all(isinstance(token, int | np.integer) and not isinstance(token, bool) for token in row)


def _of_tokens(rows: Sequence[Any], name: str, drop: bool) -> list[Example]:
    """Token ids as prompts; no two alike, as of rows from files."""
    found, repeats = [], Repeats(name, drop)
    for place, row in enumerate(rows, 1):
        ids = [int(token) for token in row]
        if min(ids) < 0:
            raise UserError(f"{name}, row {place}: expected token ids of 0 or more, got {min(ids)}")
        identity = sample_id({"token_ids": ids})
        if repeats.new(identity, f"row {place}"):
            found.append(Example(identity, np.array(ids, np.int32), len(ids), "", None))
    repeats.settle()
    return found
