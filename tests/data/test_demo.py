"""Generated rows: deterministic, disjoint between splits, and right by a reader that shares no code with the writer."""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path

import pytest
import tokenizers

from jaxcrit.core.errors import UserError
from jaxcrit.data import demo

ASSETS = Path(demo.__file__).parents[1] / "assets"
EVERY = (*demo.FAMILIES, *demo.HELD_OUT, "drill")


@pytest.mark.parametrize("family", EVERY)
def test_same_arguments_same_rows_and_fewer_are_a_prefix(family: str) -> None:
    rows = demo.generate(family, 40, seed=5)
    assert rows == demo.generate(family, 60, seed=5)[:40]
    assert rows != demo.generate(family, 40, seed=6)
    assert {row["family"] for row in rows} == {family}


@pytest.mark.parametrize("family", EVERY)
def test_no_prompt_is_in_both_splits_or_twice(family: str) -> None:
    train, test = (
        [row["prompt"] for row in demo.generate(family, count, seed, split)]
        for count, seed, split in ((2000, 1, "train"), (300, 1, "test"))
    )
    assert len(set(train)) == 2000 and len(set(test)) == 300
    assert not set(train) & set(test)
    assert {demo.split_of(prompt) for prompt in test} == {"test"}


def _open(prompt: str) -> str:
    verb, *rest = re.findall(r"\w+", prompt)
    if verb in ("Repeat", "Reverse"):
        said = rest[2:] if verb == "Repeat" else rest[:1:-1]
        return " ".join(said) + "."
    if found := re.fullmatch(r"Write a note to (\w+) about the (\w+ \w+)\.", prompt):
        return f"Dear {found[1]}, I like the {found[2]}."
    if found := re.fullmatch(r"Write a story about (\w+) and a (\w+ \w+) in the (\w+)\.", prompt):
        return f"{found[1]} went to the {found[3]}. There {found[1]} found a {found[2]}."
    found = re.search(r"(\w+) the (\w+ \w+) of (\w+)[.?]$", prompt)
    assert found and found[1] in demo.GOOD_VERBS
    return f"To {found[1]} the {found[2]}, ask {found[3]}."


def _refusal(prompt: str) -> str:
    found = re.search(r"(\w+) the (\w+ \w+) of \w+[.?]$", prompt)
    assert found and found[1] in demo.BAD_VERBS
    return f"Sorry, I can not help to {found[1]} the {found[2]}."


def _fact(prompt: str) -> str:
    """The one sentence of the passage that begins as the question asks."""
    *passage, question = re.split(r"\. (?!\w+ [A-D][,.])", prompt)
    subject = re.search(r"[Dd]oes (the \w+|\w+)", question)[1]
    (fact,) = (sentence for sentence in passage if sentence.lower().startswith(subject.lower() + " "))
    return fact


def _closed(prompt: str) -> str:
    return _fact(prompt) + "."


def _yesno(prompt: str) -> str:
    denials = {verb[2] for verb in demo.VERBS}
    fact = _fact(prompt)
    return f"{fact}, so {'no' if denials & set(fact.split()) else 'yes'}."


def _choice(prompt: str) -> str:
    fact = prompt.split(". ")[0]
    thing = fact.split()[-1]
    letter = re.search(rf"\b{thing} ([A-D])\b", prompt)[1]
    return f"{fact}. The answer is {thing} {letter}."


def _arithmetic(prompt: str) -> str:
    start, *changes = re.findall(r"(has|gets|gives) (\d+)", prompt)
    totals = [int(start[1])]
    for verb, amount in changes:
        totals.append(totals[-1] + int(amount) * (1 if verb == "gets" else -1))
    assert min(totals) >= 0
    steps = [
        f"{before} {'+' if verb == 'gets' else '-'} {amount} = {after}."
        for before, after, (verb, amount) in zip(totals, totals[1:], changes, strict=False)
    ]
    return " ".join([*steps, f"The answer is {totals[-1]}."])


def _order(prompt: str) -> str:
    pairs = dict(re.findall(r"(\w+) is \w+ than (\w+)", prompt))
    (name,) = pairs.keys() - set(pairs.values())
    chain = [name]
    while chain[-1] in pairs:
        chain.append(pairs[chain[-1]])
    most = re.search(r"the (\w+)\?", prompt)[1]
    return f"{' > '.join(chain)}. The {most} is {name}."


SOLVERS = {"open": _open, "closed": _closed, "arithmetic": _arithmetic, "yesno": _yesno, "choice": _choice}
SOLVERS |= {"refusal": _refusal, "order": _order}


@pytest.mark.parametrize("family", SOLVERS)
def test_answers_are_right(family: str) -> None:
    for row in demo.generate(family, 1000, seed=2):
        assert SOLVERS[family](row["prompt"]) == row["response"], row["prompt"]


def test_drill_says_the_same_pairs_again() -> None:
    for row in demo.generate("drill", 200, seed=2):
        pairs = row["prompt"].rstrip(".").split(", ")
        assert sorted(pairs) == sorted(row["response"].rstrip(".").split(", "))


def test_verdicts_and_letters_are_balanced() -> None:
    verdicts = collections.Counter(row["response"].split()[-1] for row in demo.generate("yesno", 2000))
    letters = collections.Counter(row["response"].split()[-1] for row in demo.generate("choice", 2000))
    assert min(verdicts.values()) > 900
    assert min(letters[f"{letter}."] for letter in "ABC") > 450


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'choice'"):
        demo.generate("choise", 1)
    with pytest.raises(UserError, match="'dev'"):
        demo.generate("open", 1, split="dev")
    with pytest.raises(UserError, match="different prompts, found"):
        demo.generate("refusal", 10**5, split="test")


def test_shipped_prompts_are_the_generators() -> None:
    for family in demo.FAMILIES:
        lines = (ASSETS / "demo_prompts" / f"{family}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == demo.generate(family, 300, seed=0, split="test")


def test_shipped_tokenizer_gives_every_row_back_with_a_token_per_word() -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(ASSETS / "demo_model" / "tokenizer.json"))
    for family in EVERY:
        for row in demo.generate(family, 100, seed=3):
            text = f" {row['prompt']} {row['response']}"
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids) == text
            assert len(ids) == len(re.findall(r"\w+|[^\w\s]+", text)), text
    odd = "Grüße, 漢字 \t\n{x}"
    assert tokenizer.decode(tokenizer.encode(odd, add_special_tokens=False).ids) == odd
