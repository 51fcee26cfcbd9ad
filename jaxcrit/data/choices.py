"""Questions with options: ``{"prompt" | "messages", "choices": [texts], "answer": text or 0-based number}``.

Every option becomes a row of its own, the prompt with the option as its response, so that a model's probability of it
is the loss of that row. Options stand behind the prompt as they are: where no template parts the two, with their space.
"""

from __future__ import annotations

import dataclasses

from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.hashing import sample_id
from jaxcrit.data.datasets import NamedRows
from jaxcrit.data.published import PUBLISHED, Row


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        sample_id: identity of its row.
        options: number of its options.
        gold: place of the right one among them.
    """

    sample_id: str
    options: int
    gold: int


def with_options(named: NamedRows) -> tuple[NamedRows, list[Question]]:
    """The rows of all options, question by question, and the questions.

    Raises:
        UserError: a row without two different options or more, or whose answer is none of them.
    """
    rows: list[Row] = []
    questions = []
    for place, row in enumerate(named.rows, 1):
        where = f"{named.source}: row {place}"
        asked, choices, gold = _published(row, named.dataset, where) if named.dataset else _own(row, where)
        if len(set(choices)) < max(len(choices), 2):
            raise UserError(f"{where}: choices: expected two different texts or more, got {choices!r:.60}")
        questions.append(Question(sample_id(row), len(choices), gold))
        for choice in choices:
            turns = asked.get("messages")
            answer = {"role": "assistant", "content": choice}
            rows.append(asked | ({"response": choice} if turns is None else {"messages": [*turns, answer]}))
    return dataclasses.replace(named, rows=rows, dataset=""), questions


def _own(row: Row, where: str) -> tuple[Row, list[str], int]:
    choices, answer = row.get("choices"), row.get("answer")
    asks = {"prompt", "messages"} & set(row) and "text" not in row
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices) or not asks:
        raise UserError(
            f'{where}: expected {{"prompt", "choices": [texts], "answer"}} for --score=choice, got choices'
            f" {choices!r:.40}; --score=greedy takes rows with one response"
        )
    if answer in choices:
        gold = choices.index(answer)
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        gold = answer
    else:
        hint = did_you_mean(str(answer), choices)
        raise UserError(f"{where}: answer: expected one of the choices, or its number from 0, got {answer!r}{hint}")
    return {key: value for key, value in row.items() if key not in ("choices", "answer", "response")}, choices, gold


def _published(row: Row, dataset: str, where: str) -> tuple[Row, list[str], int]:
    fields = PUBLISHED[dataset].read(row, where)
    if not fields.choices:
        raise UserError(f"{where}: {dataset} has no choices for --score=choice; --score=greedy takes one response")
    labels = [choice.partition(":")[0] for choice in fields.choices]
    return {"prompt": PUBLISHED[dataset].prompt(fields)}, list(fields.choices), labels.index(fields.key)
