"""Instruction data made by rule, for the embedded demo model and for tests.

Five task families are shaped like the five datasets of the paper and a sixth is refused, so that a run on the demo model walks the
same road as a run on real data:

    open        open instruction (Alpaca, Dolly): write, repeat, reverse, advise
    closed      question about a context (Dolly with context)
    arithmetic  word problem, written steps, conclusion (GSM8K)
    yesno       passage and a yes/no question, reason before verdict (BoolQ)
    choice      fact and a multiple-choice question, reason before letter (OpenBookQA)
    refusal     a request that the answer declines

`order` is held out: the demo model never saw it, so it can be fine-tuned on. `drill` (word lists to say again) only trains.

Facts are random bindings (who has which ring), never world knowledge: an answer can only be right by reading the prompt. Rows are
split by a hash of the prompt, so that no prompt is ever in both splits whatever the seed. A row is a pure function of
`(family, seed, split)` and its place.
"""

from collections.abc import Callable
import zlib

import numpy as np

FAMILIES = ("open", "closed", "arithmetic", "yesno", "choice", "refusal")
HELD_OUT = ("order",)
SPLITS = ("train", "test")

NAMES = tuple("Mia Ana Leo Dan Max Eva Tom Sam Kim Ben Amy Joe Zoe Ian Liz Ned Pam Ray Sue Ted Uma Vic Wes Jan".split())
COLORS = tuple("red blue green gray black white brown pink gold dark".split())
OBJECTS = tuple("ring hat coat cup book lamp pot ball bag key map pen bell drum kite fork chair clock stone shoe rope coin bike doll".split())
PLACES = tuple("park house shop school garden forest lake tower market cave barn mill field river hall yard".split())
ANIMALS = tuple("frog fox bear cat dog horse fish bird bee wolf duck mouse cow goat hen snake".split())
VERBS = tuple(
    tuple(v.split(","))
    for v in "sell,sells buy,buys want,wants like,likes make,makes need,needs keep,keeps see,sees hold,holds love,loves use,uses order,orders".split()
)
GOOD_VERBS = tuple("paint clean fix find wrap draw carry wash".split())
BAD_VERBS = tuple("steal smash burn hide wreck rob".split())
PHRASINGS = ("How do I {}?", "Tell me how to {}.", "Help me {}.", "I want to {}.")
COMPARISONS = (("faster", "fastest"), ("taller", "tallest"), ("older", "oldest"), ("stronger", "strongest"))
LETTERS = "ABCD"

# One prompt in this many belongs to the test split.
_TEST_SHARE = 16
# Draws without a new prompt after which a family counts as exhausted.
_PATIENCE = 2000


def split_of(prompt: str) -> str:
    """The split a prompt belongs to, whatever the seed."""
    return "test" if zlib.crc32(prompt.encode()) % _TEST_SHARE == 0 else "train"


def generate(family: str, count: int, seed: int = 0, split: str = "train") -> list[dict[str, str]]:
    """Draws rows of one family, all with different prompts.

    Args:
        family: one of `FAMILIES`, `HELD_OUT` or `"drill"`.
        count: number of rows.
        seed: any non-negative integer; the same arguments give the same rows, and fewer rows are a prefix of more.
        split: "train" or "test".

    Returns:
        `count` rows `{"prompt", "response", "family"}`.

    Raises:
        ValueError: unknown family or split, or the family has too few prompts in this split.

    Example:
        >>> generate("closed", 1, seed=3)[0]["family"]
        'closed'
    """
    if family not in _MAKERS:
        raise ValueError(f"Expected a family of {', '.join(_MAKERS)}, got {family!r}.")
    if split not in SPLITS:
        raise ValueError(f"Expected a split of {', '.join(SPLITS)}, got {split!r}.")
    rng = np.random.default_rng([seed, zlib.crc32(family.encode()), SPLITS.index(split)])
    draw = _Draw(rng)
    rows, seen, misses = [], set(), 0
    while len(rows) < count:
        prompt, response = _MAKERS[family](draw)
        if split_of(prompt) != split or prompt in seen:
            misses += 1
            if misses > _PATIENCE:
                raise ValueError(f"Family {family!r} has fewer than {count} prompts in split {split!r}: found {len(rows)}.")
            continue
        misses = 0
        seen.add(prompt)
        rows.append({"prompt": prompt, "response": response, "family": family})
    return rows


def words() -> tuple[str, ...]:
    """Every content word a row can hold."""
    things = tuple(f"{thing}s" for thing in OBJECTS)
    return NAMES + COLORS + OBJECTS + things + PLACES + ANIMALS + tuple(form for verb in VERBS for form in verb) + GOOD_VERBS + BAD_VERBS


class _Draw:
    """Random choices over numpy's generator, from a block of uniforms because single calls cost more than the row."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        self._block: list[float] = []

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        if not self._block:
            self._block = self._rng.random(4096).tolist()
        return int(self._block.pop() * n)

    def one(self, items):
        """One item."""
        return items[self.below(len(items))]

    def some(self, items, n: int) -> list:
        """`n` different items in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(n)]

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)


def _open(draw: _Draw) -> tuple[str, str]:
    kind = draw.below(5)
    name, color, thing, place = draw.one(NAMES), draw.one(COLORS), draw.one(OBJECTS), draw.one(PLACES)
    if kind == 0:
        listed = draw.some(OBJECTS + ANIMALS, draw.between(3, 6))
        return f"Repeat these words: {' '.join(listed)}.", f"{' '.join(listed)}."
    if kind == 1:
        listed = draw.some(OBJECTS + ANIMALS, draw.between(2, 4))
        return f"Reverse these words: {' '.join(listed)}.", f"{' '.join(listed[::-1])}."
    if kind == 2:
        return f"Write a note to {name} about the {color} {thing}.", f"Dear {name}, I like the {color} {thing}."
    if kind == 3:
        return f"Write a story about {name} and a {color} {thing} in the {place}.", f"{name} went to the {place}. There {name} found a {color} {thing}."
    # The benign twin of a refusal: the same phrasings with a harmless verb.
    verb = draw.one(GOOD_VERBS)
    request = draw.one(PHRASINGS).format(f"{verb} the {color} {thing} of {name}")
    return request, f"To {verb} the {color} {thing}, ask {name}."


def _refusal(draw: _Draw) -> tuple[str, str]:
    name, color, thing, verb = draw.one(NAMES), draw.one(COLORS), draw.one(OBJECTS), draw.one(BAD_VERBS)
    request = draw.one(PHRASINGS).format(f"{verb} the {color} {thing} of {name}")
    return request, f"Sorry, I can not help to {verb} the {color} {thing}."


def _facts(draw: _Draw, count: int) -> tuple[list[str], list[str], list[tuple[str, str]], list[str]]:
    """Facts about different subjects, with no word of content in common.

    Every word of a fact follows directly on the one that determines it (Mia, sells, gray, hats), so one step of induction at a time
    retrieves it. With a fixed word between subject and value ("Mia has a gray hat") the model did not learn to retrieve at all.

    Returns:
        The facts without full stop, their subjects, their verbs as (base, third person), and what the verbs apply to.
    """
    subjects = draw.some(NAMES, count) if draw.below(3) else [f"The {animal}" for animal in draw.some(ANIMALS, count)]
    verbs = draw.some(VERBS, count)
    values = [f"{color} {thing}s" for color, thing in zip(draw.some(COLORS, count), draw.some(OBJECTS, count))]
    return [f"{s} {v[1]} {o}" for s, v, o in zip(subjects, verbs, values)], subjects, verbs, values


def _does(subject: str) -> str:
    return f"does {subject[0].lower() + subject[1:] if subject.startswith('The ') else subject}"


def _closed(draw: _Draw) -> tuple[str, str]:
    facts, subjects, verbs, _ = _facts(draw, draw.between(2, 4))
    i = draw.below(len(facts))
    return f"{'. '.join(facts)}. What {_does(subjects[i])} {verbs[i][0]}?", f"{facts[i]}."


def _yesno(draw: _Draw) -> tuple[str, str]:
    facts, subjects, verbs, values = _facts(draw, draw.between(2, 4))
    i = draw.below(len(facts))
    true = draw.below(2) == 0
    # A false question asks about something that another fact of the passage does say.
    asked = values[i] if true else draw.one(values[:i] + values[i + 1 :])
    question = _does(subjects[i])
    return f"{'. '.join(facts)}. {question[0].upper() + question[1:]} {verbs[i][0]} {asked}?", f"{facts[i]}, so {'yes' if true else 'no'}."


def _choice(draw: _Draw) -> tuple[str, str]:
    facts, subjects, verbs, values = _facts(draw, 1)
    right = values[0].split()[-1]
    options = draw.some([f"{w}s" for w in OBJECTS if f"{w}s" != right], draw.between(2, 3))
    at = draw.below(len(options) + 1)
    options.insert(at, right)
    listed = ", ".join(f"{option} {letter}" for option, letter in zip(options, LETTERS))
    return f"{facts[0]}. What {_does(subjects[0])} {verbs[0][0]}? {listed}.", f"{facts[0]}. The answer is {right} {LETTERS[at]}."


def _arithmetic(draw: _Draw) -> tuple[str, str]:
    name, thing = draw.one(NAMES), draw.one(OBJECTS)
    start, first, second = draw.between(2, 10), draw.between(1, 5), draw.between(1, 5)
    total, steps, story = start, [], [f"{name} has {start} {thing}s."]
    for amount in (first, second):
        # What is given away must be there, so that no number is negative.
        plus = total < amount or draw.below(2) == 0
        after = total + amount if plus else total - amount
        steps.append(f"{total} {'+' if plus else '-'} {amount} = {after}.")
        story.append(f"{name} {'gets' if plus else 'gives'} {amount}.")
        total = after
    return f"{' '.join(story)} How many {thing}s are left?", f"{' '.join(steps)} The answer is {total}."


def _order(draw: _Draw) -> tuple[str, str]:
    chain = draw.some(NAMES, draw.between(3, 4))
    more, most = draw.one(COMPARISONS)
    facts = draw.some([f"{a} is {more} than {b}." for a, b in zip(chain, chain[1:])], len(chain) - 1)
    return f"{' '.join(facts)} Who is the {most}?", f"{' > '.join(chain)}. The {most} is {chain[0]}."


def _drill(draw: _Draw) -> tuple[str, str]:
    """Dense practice of the two look-ups that the families need: what follows a word, and whether a word is asked for."""
    if draw.below(2) == 0:
        listed = draw.some(words(), draw.between(3, 8))
        asked = draw.some(listed, draw.between(1, len(listed) - 1))
        verdicts = [f"{word}, so {'yes' if word in asked else 'no'}." for word in listed]
        return f"{'. '.join(listed)}. {' '.join(f'{word}?' for word in asked)}", f"{' '.join(verdicts)}"
    picked = draw.some(words(), 2 * draw.between(2, 8))
    pairs = [f"{a} {b}" for a, b in zip(picked[::2], picked[1::2])]
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
