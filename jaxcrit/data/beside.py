"""Rows rendered beside each row: other texts of the same row, which a training looks at too.

Their names are those of `jaxcrit.core.auxiliaries`: ``logits:FIELD`` is the row's prompt answered by the text in a
field, ``feature:FIELD`` the text in a field as a prompt, ``feature:FIELD+FIELD`` two of them as prompt and response.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.groups import RowOptions
from jaxcrit.data.datasets import NamedRows, Row, conversation
from jaxcrit.data.truncation import Fitted, fit


def texts_beside(named: NamedRows, name: str) -> NamedRows:
    """The rows of that name, one for each row of a dataset.

    Raises:
        UserError: rows of a published dataset, or a row without text in a field.
    """
    kind, _, fields = name.partition(":")
    if named.dataset:
        raise UserError(
            f"--supervise with {name}: is of rows of one's own, with prompt and response; {named.source} has the"
            f" fields of {named.dataset}"
        )
    found = []
    for place, row in enumerate(named.rows, 1):
        texts = [_text(row, field, f"{named.source}: row {place}") for field in fields.split("+")]
        found.append(
            _answered(row, *texts) if kind == "logits" else dict(zip(("prompt", "response"), texts, strict=False))
        )
    return dataclasses.replace(named, rows=found)


def fit_beside(fitted: Fitted, names: Sequence[str], options: RowOptions, room: int, where: str) -> Fitted:
    """Cuts the rows beside as the rows themselves; a row goes with any that is left out.

    Raises:
        UserError: see `fit`; a row has none of that name beside it, or one that is still too long.
    """
    examples, places = list(fitted.examples), range(len(fitted.examples) + len(fitted.dropped))
    left = [place for place in places if place not in fitted.dropped]
    for name in names:
        lack = [row for row, example in enumerate(examples, 1) if name not in example.beside]
        if lack:
            raise UserError(f"{where}: row {listed(lack)} has no {name!r} beside it; give Example.beside of each row")
        end = "" if options.truncate == "paper" else options.truncate
        found = fit(
            [example.beside[name] for example in examples],
            end,
            options.long,
            room,
            prompt_only=False,
            where=f"{where}: {name}",
        )
        long = [row for row, example in enumerate(found.examples, 1) if len(example.token_ids) > room]
        if long:
            raise UserError(
                f"{where}: expected rows of at most {room} tokens, {name} of row {listed(long)} is longer; drop such"
                " rows with --long=drop, or keep the beginning with --truncate=right (the end with left)"
            )
        stay = [row for row in range(len(examples)) if row not in found.dropped]
        examples, left = [examples[row] for row in stay], [left[row] for row in stay]
        examples = [
            dataclasses.replace(example, beside={**example.beside, name: other})
            for example, other in zip(examples, found.examples, strict=True)
        ]
    return dataclasses.replace(fitted, examples=examples, dropped=tuple(sorted({*places} - {*left})))


def _answered(row: Row, text: str) -> Row:
    """A row with another response."""
    if isinstance(row.get("prompt"), str) and "messages" not in row:
        return {"prompt": row["prompt"], "response": text}
    asked = conversation(row)
    messages = [*asked.messages, {"role": "assistant", "content": text}]
    return {"messages": messages} if asked.tools is None else {"messages": messages, "tools": asked.tools}


def _text(row: Row, field: str, where: str) -> str:
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"{where} has no text in {field!r}, which --supervise pairs it with; name a field that every row has, such"
            f" as {listed([name for name, value in row.items() if isinstance(value, str)][:4]) or 'one of its own'}"
        )
    return text
