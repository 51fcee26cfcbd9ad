"""Instruction data made by rule, for the embedded demo model and for tests.

Five task families are shaped like the five datasets of the paper and a sixth is refused, so that a run on the demo
model walks the same road as a run on real data:

    open        open instruction: write, repeat, reverse, advise (Alpaca, Dolly)
    closed      question about a context (Dolly with context)
    arithmetic  word problem, written steps, conclusion (GSM8K)
    yesno       passage and a yes/no question, reason before verdict (BoolQ)
    choice      fact and a multiple-choice question, reason before letter (OpenBookQA)
    refusal     a request that the answer declines

``order`` is held out: the demo model never saw it, so it can be fine-tuned on. ``drill`` (pairs of a word list, to be
said again in another order) is for training from nothing.

Facts are random bindings (who likes which rings), never world knowledge: an answer can only be right by reading the
prompt. Rows are split by a hash of the prompt, so no prompt is ever in both splits, whatever the seeds.
"""

# ruff: noqa: SIM905 (word lists read better as text)
from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from jaxcrit.core.errors import UserError, did_you_mean, listed

FAMILIES = ("open", "closed", "arithmetic", "yesno", "choice", "refusal")
HELD_OUT = ("order",)
SPLITS = ("train", "test")

NAMES = tuple("Mia Ana Leo Dan Max Eva Tom Sam Kim Ben Amy Joe Zoe Ian Liz Ned Pam Ray Sue Ted Uma Vic Wes Jan".split())
COLORS = tuple("red blue green gray black white brown pink gold dark".split())
OBJECTS = tuple(
    "ring hat coat cup book lamp pot ball bag key map pen bell drum kite fork chair clock stone shoe rope coin bike"
    " doll".split()
)
PLACES = tuple("park house shop school garden forest lake tower market cave barn mill field river hall yard".split())
ANIMALS = tuple("frog fox bear cat dog horse fish bird bee wolf duck mouse cow goat hen snake".split())
# Base form, third person, and the third person of a verb that denies it.
VERBS = tuple(
    tuple(verb.split(","))
    for verb in (
        "like,likes,hates want,wants,refuses keep,keeps,loses make,makes,breaks buy,buys,returns"
        " love,loves,fears use,uses,avoids see,sees,misses hold,holds,drops find,finds,forgets"
    ).split()
)
GOOD_VERBS = tuple("paint clean fix find wrap draw carry wash".split())
BAD_VERBS = tuple("steal smash burn hide wreck rob".split())
PHRASINGS = ("How do I {}?", "Tell me how to {}.", "Help me {}.", "I want to {}.")
COMPARISONS = (("faster", "fastest"), ("taller", "tallest"), ("older", "oldest"), ("stronger", "strongest"))
LETTERS = "ABCD"

_TEST_SHARE = 16  # one prompt in this many belongs to the test split
_PATIENCE = 2000  # draws without a new prompt after which a family counts as exhausted

Item = TypeVar("Item")


def split_of(prompt: str) -> str:
    """The split a prompt belongs to, whatever the seed."""
    return "test" if zlib.crc32(prompt.encode()) % _TEST_SHARE == 0 else "train"


def generate(family: str, count: int, seed: int = 0, split: str = "train") -> list[dict[str, str]]:
    """Draws rows of one family, all with different prompts.

    Args:
        family: one of `FAMILIES` or `HELD_OUT`, or ``drill``.
        count: number of rows.
        seed: non-negative; the same arguments give the same rows, and fewer rows are a prefix of more.
        split: ``train`` or ``test``.

    Returns:
        Rows ``{"prompt", "response", "family"}``.

    Raises:
        UserError: unknown family or split, or fewer than ``count`` prompts in this split.

    Example:
        >>> generate("refusal", 1)[0]["family"]
        'refusal'
    """
    if family not in _MAKERS:
        raise UserError(f"expected a family of {listed(list(_MAKERS))}, got {family!r}{did_you_mean(family, _MAKERS)}")
    if split not in SPLITS:
        raise UserError(f"expected split {listed(SPLITS)}, got {split!r}")
    draw = _Draw(np.random.default_rng([seed, zlib.crc32(family.encode()), SPLITS.index(split)]))
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    misses = 0
    while len(rows) < count:
        prompt, response = _MAKERS[family](draw)
        if split_of(prompt) == split and prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "response": response, "family": family})
            misses = 0
        else:
            misses += 1
        if misses > _PATIENCE:
            raise UserError(
                f"family {family!r}, split {split!r}: expected {count} different prompts, found {len(rows)}"
            )
    return rows


def words() -> tuple[str, ...]:
    """Every content word that a row can hold."""
    things = tuple(f"{thing}s" for thing in OBJECTS)
    verbs = tuple(form for verb in VERBS for form in verb)
    return NAMES + COLORS + OBJECTS + things + PLACES + ANIMALS + verbs + GOOD_VERBS + BAD_VERBS


class _Draw:
    """Random choices from blocks of uniforms: a numpy call for each would cost more than the rest of a row."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        self._block: list[float] = []

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        if not self._block:
            self._block = self._rng.random(4096).tolist()
        return int(self._block.pop() * n)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def one(self, items: Sequence[Item]) -> Item:
        """One item."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[Item], n: int) -> list[Item]:
        """``n`` different items in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(n)]


def _open(draw: _Draw) -> tuple[str, str]:
    kind = draw.below(5)
    name, color, thing, place = draw.one(NAMES), draw.one(COLORS), draw.one(OBJECTS), draw.one(PLACES)
    if kind == 0:
        said = draw.some(OBJECTS + ANIMALS, draw.between(3, 6))
        return f"Repeat these words: {' '.join(said)}.", f"{' '.join(said)}."
    if kind == 1:
        said = draw.some(OBJECTS + ANIMALS, draw.between(2, 4))
        return f"Reverse these words: {' '.join(said)}.", f"{' '.join(said[::-1])}."
    if kind == 2:
        return f"Write a note to {name} about the {color} {thing}.", f"Dear {name}, I like the {color} {thing}."
    if kind == 3:
        story = f"{name} went to the {place}. There {name} found a {color} {thing}."
        return f"Write a story about {name} and a {color} {thing} in the {place}.", story
    # The benign twin of a refusal: the same phrasings with a harmless verb.
    verb = draw.one(GOOD_VERBS)
    request = draw.one(PHRASINGS).format(f"{verb} the {color} {thing} of {name}")
    return request, f"To {verb} the {color} {thing}, ask {name}."


def _refusal(draw: _Draw) -> tuple[str, str]:
    name, color, thing, verb = draw.one(NAMES), draw.one(COLORS), draw.one(OBJECTS), draw.one(BAD_VERBS)
    request = draw.one(PHRASINGS).format(f"{verb} the {color} {thing} of {name}")
    return request, f"Sorry, I can not help to {verb} the {color} {thing}."


class _Facts:
    """Facts about different subjects, with no word of content in common.

    Every word of a fact follows directly on the one that determines it (Mia, likes, gray, hats), so that one step of
    induction after the other retrieves it.

    Attributes:
        text: the facts, without full stops.
        subjects: whom each is about, as it begins the fact.
        does: the same in a question, ``does the fox``.
        verbs: base form of each verb; where a fact denies, of the verb it denies.
        values: what each verb applies to.
        affirmed: whether each affirms.
    """

    def __init__(self, draw: _Draw, count: int, denials: bool = False):
        named = draw.below(3) > 0
        subjects = draw.some(NAMES if named else ANIMALS, count)
        verbs = draw.some(VERBS, count)
        colors, things = draw.some(COLORS, count), draw.some(OBJECTS, count)
        self.does = [f"does {s}" if named else f"does the {s}" for s in subjects]
        self.subjects = [s if named else f"The {s}" for s in subjects]
        self.verbs = [verb[0] for verb in verbs]
        self.values = [f"{color} {thing}s" for color, thing in zip(colors, things, strict=True)]
        self.affirmed = [not denials or draw.below(2) == 0 for _ in range(count)]
        forms = [verb[1] if yes else verb[2] for verb, yes in zip(verbs, self.affirmed, strict=True)]
        self.text = [" ".join(parts) for parts in zip(self.subjects, forms, self.values, strict=True)]


def _closed(draw: _Draw) -> tuple[str, str]:
    facts = _Facts(draw, draw.between(2, 4))
    i = draw.below(len(facts.text))
    return f"{'. '.join(facts.text)}. What {facts.does[i]} {facts.verbs[i]}?", f"{facts.text[i]}."


def _yesno(draw: _Draw) -> tuple[str, str]:
    facts = _Facts(draw, draw.between(2, 4), denials=True)
    i = draw.below(len(facts.text))
    question = f"D{facts.does[i][1:]} {facts.verbs[i]} {facts.values[i]}?"
    return f"{'. '.join(facts.text)}. {question}", f"{facts.text[i]}, so {'yes' if facts.affirmed[i] else 'no'}."


def _choice(draw: _Draw) -> tuple[str, str]:
    facts = _Facts(draw, 1)
    right = facts.values[0].split()[-1]
    options = draw.some([f"{thing}s" for thing in OBJECTS if f"{thing}s" != right], draw.between(2, 3))
    at = draw.below(len(options) + 1)
    options.insert(at, right)
    choices = ", ".join(f"{option} {letter}" for option, letter in zip(options, LETTERS, strict=False))
    prompt = f"{facts.text[0]}. What {facts.does[0]} {facts.verbs[0]}? {choices}."
    return prompt, f"{facts.text[0]}. The answer is {right} {LETTERS[at]}."


def _arithmetic(draw: _Draw) -> tuple[str, str]:
    name, thing = draw.one(NAMES), draw.one(OBJECTS)
    start, first, second = draw.between(2, 10), draw.between(1, 5), draw.between(1, 5)
    total, steps, story = start, [], [f"{name} has {start} {thing}s."]
    for amount in (first, second):
        # What is given away must be there, so that no number is negative.
        gets = total < amount or draw.below(2) == 0
        after = total + amount if gets else total - amount
        steps.append(f"{total} {'+' if gets else '-'} {amount} = {after}.")
        story.append(f"{name} {'gets' if gets else 'gives'} {amount}.")
        total = after
    return f"{' '.join(story)} How many {thing}s are left?", f"{' '.join(steps)} The answer is {total}."


def _order(draw: _Draw) -> tuple[str, str]:
    chain = draw.some(NAMES, draw.between(3, 4))
    more, most = draw.one(COMPARISONS)
    facts = draw.some([f"{a} is {more} than {b}." for a, b in itertools.pairwise(chain)], len(chain) - 1)
    return f"{' '.join(facts)} Who is the {most}?", f"{' > '.join(chain)}. The {most} is {chain[0]}."


def _drill(draw: _Draw) -> tuple[str, str]:
    picked = draw.some(words(), 2 * draw.between(2, 8))
    pairs = [f"{a} {b}" for a, b in zip(picked[::2], picked[1::2], strict=True)]
    return f"{', '.join(pairs)}.", f"{', '.join(draw.some(pairs, len(pairs)))}."


_MAKERS: dict[str, Callable[[_Draw], tuple[str, str]]] = {
    "open": _open,
    "closed": _closed,
    "arithmetic": _arithmetic,
    "yesno": _yesno,
    "choice": _choice,
    "refusal": _refusal,
    "order": _order,
    "drill": _drill,
}
