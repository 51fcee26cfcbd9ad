"""The grammar of selections, here and nowhere else: what a user asks for, and which layers of a model these are."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping

import numpy as np

from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.layers import LayerScores, LayerSet, checked, span
from jaxcrit.core.schema import MOST_LAYERS

WORDS = ("all", "critical", "noncritical", "random", "first", "last", "boundary")
_DIGITS = len(str(MOST_LAYERS - 1))
_SLIP = 0.85  # of difflib: one letter off, in words of this length


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """A selection of layers as a user writes it; ranges are closed here, as a person writes them.

    ``all | critical[:K] | noncritical[:K] | random:K[:SEED] | first:K | last:K | KEY[:K] | boundary(SPEC) | a-b,c |
    @layers.json``

    ``KEY:K`` takes the K most critical layers by the score of that key, ``boundary(SPEC)`` the lowest and the highest
    layer of another selection. A score whose key is a word of the grammar cannot be named, nor one that is a letter
    away from such a word: it is taken for a slip.

    Attributes:
        kind: the word in front, or ``key``, ``list`` or ``file``.
        count: K, or None for the default of the rule.
        seed: seed of ``random``.
        layers: layers of ``list``.
        path: path of ``file``.
        key: score of ``key``.
        inner: selection that ``boundary`` is taken of.
    """

    kind: str
    count: int | None = None
    seed: int = 0
    layers: tuple[int, ...] = ()
    path: str = ""
    key: str = ""
    inner: LayerSpec | None = None

    @classmethod
    def parse(cls, text: str, flag: str = "layers") -> LayerSpec:
        """Reads the grammar above.

        Args:
            text: a selection.
            flag: option that it was given by, for messages.

        Raises:
            UserError: the text is not of the grammar.
        """
        text = text.strip()
        where = f"--{flag}={text}"
        if text.startswith("@"):
            return cls("file", path=text[1:])
        if text.startswith("boundary(") and text.endswith(")"):
            if re.match(r"(boundary\(){9}", text):
                raise UserError(f"{where[:80]}: expected one selection inside boundary(...), got many")
            return cls("boundary", inner=cls.parse(text[len("boundary(") : -1], flag))
        if re.fullmatch(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*", text):
            layers: list[int] = []
            for part in text.split(","):
                start, _, stop = part.partition("-")
                if max(len(start), len(stop)) > _DIGITS:
                    raise UserError(f"{where[:80]}: expected layers below {MOST_LAYERS:,}, which no model has more of")
                span = range(int(start), int(stop or start) + 1)
                if not span:
                    raise UserError(f"{where}: the range {part} is empty; write the lower layer first")
                layers.extend(span)
            return cls("list", layers=tuple(layers))
        word, *numbers = text.split(":")
        slip = difflib.get_close_matches(word, WORDS, n=1, cutoff=_SLIP)
        key = word not in WORDS and not slip and re.fullmatch(r"[A-Za-z_][\w.]*", word) is not None
        if not key and (word not in WORDS or word == "boundary"):
            hint = did_you_mean(word, WORDS) if word != "boundary" else ", such as boundary(critical:5)"
            raise UserError(
                f"{where}: expected all, critical:K, noncritical:K, random:K[:SEED], first:K, last:K, KEY:K with the"
                f" key of a score, boundary(...) of one of these, a list such as 3-5,9 or @layers.json{hint}"
            )
        most = {"all": 0, "random": 2}.get(word, 1)
        needed = 1 if word in ("random", "first", "last") else 0
        if not needed <= len(numbers) <= most or not all(re.fullmatch("[0-9]{1,15}", number) for number in numbers):
            shape = {"all": "all", "random": "random:K[:SEED]"}.get(word, f"{word}:K")
            raise UserError(f"{where[:80]}: expected {shape} with whole numbers")
        count = int(numbers[0]) if numbers else None
        if count == 0:
            raise UserError(f"{where}: K must be at least 1")
        if key:
            return cls("key", count=count, key=word)
        return cls(word, count=count, seed=int(numbers[1]) if len(numbers) > 1 else 0)

    def __str__(self) -> str:
        if self.kind == "file":
            return f"@{self.path}"
        if self.kind == "list":
            return ",".join(map(str, self.layers))
        if self.kind == "boundary":
            return f"boundary({self.inner})"
        parts = [self.key or self.kind] + ([] if self.count is None else [str(self.count)])
        return ":".join(parts + ([str(self.seed)] if self.kind == "random" else []))

    @property
    def needs_scores(self) -> bool:
        """Whether the rule ranks layers by a score."""
        return self.inner.needs_scores if self.inner else self.kind in ("critical", "noncritical", "key")

    @property
    def score_key(self) -> str:
        """Key of the score that the rule names; empty where it names none."""
        return self.inner.score_key if self.inner else self.key

    def check_key(self, keys: Iterable[str], flag: str = "layers") -> None:
        """Checks that the score which the rule names is among those that there are, or will be.

        Args:
            keys: keys of the scores.
            flag: option that the selection was given by, for messages.

        Raises:
            UserError: it is not; the message lists the keys.
        """
        key, known = self.score_key, list(keys)
        if key and key not in known:
            nearest = did_you_mean(key, [*known, *WORDS])
            raise UserError(f"--{flag}={self}: no score {key!r}{nearest}; there are {', '.join(known) or 'none'}")


def split_specs(text: str, separator: str) -> list[str]:
    """The selections of a list, stripped; a separator within parentheses belongs to its selection.

    Args:
        text: selections, such as ``critical:3;boundary(3-5,9)``.
        separator: one character.
    """
    parts, depth = [""], 0
    for character in text:
        depth = max(0, depth + (character == "(") - (character == ")"))
        if character == separator and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def default_count(num_layers: int) -> int:
    """K where none is given: max(1, round(0.15 L)), five of 32 as in the paper."""
    return max(1, round(0.15 * num_layers))


def resolve(
    spec: LayerSpec,
    num_layers: int,
    *,
    scores: LayerScores | Mapping[str, LayerScores] | None = None,
    criterion: str = "delta_debiased",
    trim: int = 2,
    model_hash: str | None = None,
    flag: str = "layers",
    hint: str = "run jaxcrit analyze first, or give --scores=FILE",
) -> LayerSet:
    """Turns a LayerSpec into a LayerSet for a model of L layers.

    Args:
        spec: what the user asked for.
        num_layers: L.
        scores: what ``critical``, ``noncritical`` and ``KEY`` rank by (direction respected): scores by key, or one.
        criterion: key of the score that ``critical`` and ``noncritical`` rank by; one score given alone is that one.
        trim: layers at each end that a rule which ranks never chooses.
        model_hash: kept in the set; a file made for another model is refused.
        flag: option that the selection was given by, for messages.
        hint: what to do where there are no scores.

    Raises:
        UserError: more layers asked for than there are, layers outside the model, or a score that is absent.
    """
    where = f"--{flag}={span(spec.layers) if spec.kind == 'list' else spec}"
    if spec.inner:
        whole = resolve(
            spec.inner,
            num_layers,
            scores=scores,
            criterion=criterion,
            trim=trim,
            model_hash=model_hash,
            flag=flag,
            hint=hint,
        )
        ends = tuple(sorted({*whole.layers[:1], *whole.layers[-1:]}))
        return dataclasses.replace(whole, layers=ends, rule=f"boundary({whole.rule})")
    chosen_by = "manual"
    count = default_count(num_layers) if spec.count is None else spec.count
    if spec.kind == "file":
        stored = LayerSet.load(spec.path)
        if stored.num_layers != num_layers:
            raise UserError(f"{spec.path}: made for {stored.num_layers} layers, but this model has {num_layers}")
        if model_hash and stored.model_hash and stored.model_hash != model_hash:
            raise UserError(
                f"{spec.path}: made for model {stored.model_hash[:12]}, this one is {model_hash[:12]};"
                f" choose again, or write the layers out (--{flag}=3,4,5) to use them all the same"
            )
        return stored
    if spec.needs_scores:
        if scores is None:
            raise UserError(f"{where}: needs scores; {hint}")
        score = _score(spec, scores, criterion, flag)
        if score.num_layers != num_layers:
            raise UserError(f"{where}: scores of {score.num_layers} layers, but the model has {num_layers}")
        ranking = [int(layer) for layer in score.ranking() if trim <= layer < num_layers - trim]
        pool, chosen_by = (ranking[::-1] if spec.kind == "noncritical" else ranking), score.name
        rule = str(dataclasses.replace(spec, count=count))
    else:
        everything = range(num_layers)
        if spec.kind == "random":
            pool = [int(layer) for layer in np.random.default_rng(spec.seed).permutation(num_layers)]
        else:
            pool = {"list": list(spec.layers), "last": list(everything)[::-1]}.get(spec.kind, list(everything))
        count = {"all": num_layers, "list": len(pool)}.get(spec.kind, count)
        rule = str(spec)
    if count > len(pool):
        trimmed = f" after trimming {trim} at each end" if spec.needs_scores else ""
        raise UserError(f"{where}: expected at most {len(pool)} layers{trimmed}, got {count}")
    return LayerSet(checked(pool[:count], num_layers, where), chosen_by, rule, num_layers, model_hash)


def _score(spec: LayerSpec, scores: LayerScores | Mapping[str, LayerScores], criterion: str, flag: str) -> LayerScores:
    """The score that a rule ranks by."""
    known = {scores.name: scores} if isinstance(scores, LayerScores) else scores
    spec.check_key(known, flag)
    key = spec.key or (scores.name if isinstance(scores, LayerScores) else criterion)
    if key not in known:
        raise UserError(
            f"--{flag}={spec}: ranks by {key}, and there is no such score; name one of {', '.join(known)}, as KEY:K"
        )
    return known[key]
