"""Facts: a prompt with a gap, a subject that fills it, the target that follows; and where the subject's tokens are.

    {"prompt": "The capital of {} is", "subject": "France", "target": "Paris"}
    beside them, as far as wanted: "old" (what is true, where target is not), "relation", "paraphrases" (texts, with {}
    or with the subject in them), "neighbours" ([{"prompt", "target"}, ...], what must stay as it is)

Rows of CounterFact (``requested_rewrite``), of zsRE (``src``, ``alt``) and with the keys of EasyEdit (``target_new``)
are read too. Facts are completed as plain text, without a chat template, a space in front of the target.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.files import local_path
from jaxcrit.core.hashing import sample_id
from jaxcrit.data import containers
from jaxcrit.data.published import type_name
from jaxcrit.data.templates import Example, render

BUNDLED = Path(__file__).parents[1] / "assets" / "facts.json"
GAP = "{}"
_EXPECTED = '{"prompt": "... {} ...", "subject", "target"}'
_FIELDS = ("prompt", "subject", "target", "old", "relation", "paraphrases", "neighbours")


@dataclasses.dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        prompt: text with one ``{}`` where the subject belongs.
        subject: text that fills it.
        target: text that is to follow the prompt.
        old: what is true, where the target is not; else empty.
        relation: name of what the prompt asks for; facts of one relation differ in their subjects.
        paraphrases: texts that ask for the same of the same subject.
        neighbours: texts about other subjects, each with the target that it has now.
    """

    prompt: str
    subject: str
    target: str
    old: str = ""
    relation: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return self.prompt.replace(GAP, self.subject)

    @property
    def truth(self) -> str:
        """What is true."""
        return self.old or self.target

    @property
    def sample_id(self) -> str:
        """Identity: the hash of all of it."""
        return sample_id(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """A fact as tokens.

    Attributes:
        example: the prompt's tokens, then the target's.
        subject: places of the subject's tokens among them, half-open.
    """

    example: Example
    subject: range


def read_facts(source: str = "") -> list[Fact]:
    """Reads facts.

    Args:
        source: a file of any kind that rows come in (`jaxcrit.data.containers`); empty for the bundled ones.

    Raises:
        UserError: the file cannot be read or is empty, a row is of no known layout, its subject is not in its prompt or
            there twice, or two rows ask the same of one subject.
    """
    if not source:
        return list(bundled())
    path = local_path(source, "facts")
    try:
        rows = [(f"{source}: {place}", row) for place, row in containers.values(path)]
    except FileNotFoundError:
        near = did_you_mean(path.name, [file.name for file in path.parent.glob("*")])
        raise UserError(f"--facts: no file {source}{near}; expected rows {_EXPECTED}") from None
    except OSError as error:
        raise UserError(f"--facts={source}: cannot be read ({error.strerror})") from None
    if not rows:
        raise UserError(f"--facts={source}: expected rows {_EXPECTED}, got an empty file")
    return facts_of(rows)


def facts_of(rows: Sequence[tuple[str, Any]]) -> list[Fact]:
    """Checked facts of raw rows, each with where it stands, for messages.

    Raises:
        UserError: see `read_facts`.
    """
    found, places = [], dict[str, tuple[str, str]]()
    for where, row in rows:
        fact = _fact(row, where)
        first, target = places.setdefault(fact.text, (where, fact.target))
        if first != where:
            told = f"repeats {first}" if target == fact.target else f"contradicts {first}, whose target is {target!r}"
            raise UserError(f"{where}: {fact.text!r} with target {fact.target!r} {told}; keep one of the two")
        found.append(fact)
    return found


def bundled() -> Iterator[Fact]:
    """The facts that come with the package, relation by relation."""
    for relation, about in json.loads(BUNDLED.read_text(encoding="utf-8")).items():
        for subject, target in about["facts"].items():
            paraphrases = tuple(text.replace(GAP, subject) for text in about["paraphrases"])
            yield Fact(about["prompt"], subject, target, "", relation, paraphrases)


def placed(facts: Sequence[Fact], tokenizer: Any, *, before: str = "", truth: bool = False) -> list[Placed]:
    """Facts as tokens, with the tokens of their subjects.

    Args:
        facts: facts.
        tokenizer: tokenizer of the model.
        before: text in front of every prompt.
        truth: take what is true for the target, not what is to become so.

    Raises:
        UserError: a target of no tokens, a subject whose last token is not its own, or a tokenizer that does not say
            which characters a token stands for.
    """
    rows = [{"prompt": before + fact.text, "response": f" {fact.truth if truth else fact.target}"} for fact in facts]
    examples = render(rows, tokenizer, "none")
    begins = [len(before) + fact.prompt.index(GAP) for fact in facts]
    spans = [(begin, begin + len(fact.subject)) for begin, fact in zip(begins, facts, strict=True)]
    subjects = subject_tokens([row["prompt"] for row in rows], spans, examples, tokenizer)
    for row, example in zip(rows, examples, strict=True):
        if len(example.token_ids) == example.prompt_length:
            raise UserError(f"{row['prompt']!r}: the target {row['response']!r} has no tokens in this vocabulary")
    named = [dataclasses.replace(one, sample_id=fact.sample_id) for one, fact in zip(examples, facts, strict=True)]
    return [Placed(example, subject) for example, subject in zip(named, subjects, strict=True)]


def subject_tokens(
    texts: Sequence[str], spans: Sequence[tuple[int, int]], examples: Sequence[Example], tokenizer: Any
) -> list[range]:
    """Places of the tokens that hold characters of a span, by the tokenizer's own account of each token's characters.

    Never by the number of tokens of the text in front: tokens merge across that boundary.

    Args:
        texts: texts.
        spans: begin and end of the subject in each, in characters, half-open.
        examples: the texts rendered; what stands in front of a text's own tokens is counted.
        tokenizer: tokenizer that made them.

    Raises:
        UserError: see `placed`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("--facts: this tokenizer does not say which characters a token stands for; save tokenizer.json")
    read = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found = []
    for text, (begin, end), example, offsets in zip(texts, spans, examples, read["offset_mapping"], strict=True):
        inside = [place for place, (start, stop) in enumerate(offsets) if start < end and stop > begin]
        subject = text[begin:end]
        if not inside:
            raise UserError(f"{text!r}: the subject {subject!r} has no tokens in this vocabulary")
        if offsets[inside[-1]][1] > end:
            shared = text[slice(*offsets[inside[-1]])]
            raise UserError(
                f"{text!r}: the last token of the subject {subject!r} is {shared!r}, which goes on behind it; end the"
                " subject where a token ends"
            )
        front = example.prompt_length - len(offsets)
        found.append(range(front + inside[0], front + inside[-1] + 1))
    return found


def _fact(row: Any, where: str) -> Fact:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object {_EXPECTED}, got {type_name(row)}")
    if "requested_rewrite" in row:
        given, filled = _counterfact(row, where), False
    elif "src" in row:
        given, filled = _zsre(row), True
    elif "target_new" in row:
        given, filled = _easyedit(row), GAP not in str(row.get("prompt"))
    else:
        unknown = [name for name in row if name not in _FIELDS]
        if unknown:
            raise UserError(f"{where}: unknown field {unknown[0]!r}{did_you_mean(unknown[0], _FIELDS)}")
        given, filled = row, False
    for name in ("prompt", "subject", "target"):
        if not isinstance(given.get(name), str) or not given[name].strip():
            has = listed([repr(field) for field in row]) or "no fields"
            raise UserError(f"{where}: expected {_EXPECTED} with texts, got no {name} in {has}")
    prompt, subject = given["prompt"].rstrip(), given["subject"].strip()
    if filled:
        if prompt.count(subject) != 1:
            times = prompt.count(subject)
            raise UserError(f"{where}: expected the subject {subject!r} once in {prompt!r}, got it {times} times")
        prompt = prompt.replace(subject, GAP)
    if prompt.count(GAP) != 1:
        times = prompt.count(GAP)
        raise UserError(f"{where}: expected one {GAP} in the prompt {prompt!r}, where the subject belongs, got {times}")
    if subject in prompt.replace(GAP, ""):
        raise UserError(f"{where}: the subject {subject!r} is in the prompt {prompt!r} a second time; say it once")
    paraphrases = tuple(str(text).replace(GAP, subject).rstrip() for text in _several(given.get("paraphrases")))
    return Fact(
        prompt,
        subject,
        given["target"].strip(),
        str(given.get("old") or "").strip(),
        str(given.get("relation") or prompt),
        paraphrases,
        tuple(_neighbour(one, where) for one in _several(given.get("neighbours"))),
    )


def _neighbour(one: Any, where: str) -> tuple[str, str]:
    if not isinstance(one, Mapping) or not all(isinstance(one.get(name), str) for name in ("prompt", "target")):
        raise UserError(f'{where}: expected neighbours [{{"prompt", "target"}}, ...], got {one!r}')
    return one["prompt"].rstrip(), one["target"].strip()


def _counterfact(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    asked = row["requested_rewrite"]
    try:
        new, true = (asked[name]["str"] for name in ("target_new", "target_true"))
    except (KeyError, TypeError):
        raise UserError(f"{where}: expected requested_rewrite with target_new and target_true, each with str") from None
    return {
        **{name: asked.get(name) for name in ("prompt", "subject")},
        "target": new,
        "old": true,
        "relation": asked.get("relation_id"),
        "paraphrases": row.get("paraphrase_prompts"),
        "neighbours": [{"prompt": text, "target": true} for text in _several(row.get("neighborhood_prompts"))],
    }


def _zsre(row: Mapping[str, Any]) -> dict[str, Any]:
    true = next(iter(_several(row.get("answers"))), "")
    return {
        "prompt": row["src"],
        "subject": row.get("subject"),
        "target": row.get("alt") or true,
        "old": true if row.get("alt") else "",
        "paraphrases": [row["rephrase"]] if row.get("rephrase") else [],
        "neighbours": [{"prompt": row["loc"], "target": row.get("loc_ans")}] if row.get("loc") else [],
    }


def _easyedit(row: Mapping[str, Any]) -> dict[str, Any]:
    local = [(row.get("locality_prompt"), row.get("locality_ground_truth"))]
    local += [(one.get("prompt"), one.get("ground_truth")) for one in _inner(row.get("locality"))]
    return {
        **{name: row.get(name) for name in ("prompt", "subject")},
        "target": row["target_new"],
        "old": next(iter(_several(row.get("ground_truth"))), ""),
        "paraphrases": _several(row.get("rephrase_prompt")),
        "neighbours": [
            {"prompt": text, "target": answer}
            for texts, answers in local
            for text, answer in itertools.zip_longest(_several(texts), _several(answers))
        ],
    }


def _several(value: Any) -> list[Any]:
    """One or several of something; nothing of null."""
    return value if isinstance(value, list) else [] if value is None or value == "" else [value]


def _inner(value: Any) -> list[Mapping[str, Any]]:
    """Objects in an object; what is none of these counts as a prompt, which will be refused."""
    held = list(value.values()) if isinstance(value, Mapping) else _several(value)
    return [one if isinstance(one, Mapping) else {"prompt": one} for one in held]
