"""Whether a model says what facts are to say: by their own prompts, by paraphrases; and what it says of neighbours."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxcrit.data.facts import Fact
from jaxcrit.data.templates import Example, render
from jaxcrit.evidence.completions import completions
from jaxcrit.evidence.rows import batches_of
from jaxcrit.evidence.variants import loss_step
from jaxcrit.models.decoder import Decoder, forward
from jaxcrit.models.model import Bars, Model

# What is asked of a fact: which prompts, and of which targets.
OWN, PARAPHRASE, NEIGHBOUR = "own", "paraphrase", "neighbour"


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A prompt with two answers.

    Attributes:
        kind: ``own``, ``paraphrase`` or ``neighbour``.
        fact: which fact it belongs to.
        prompt: text.
        wanted: answer that is to be given: the new target, or of a neighbour the one it has.
        other: answer that is not: what was true before, or of a neighbour the fact's new target; empty for none.
    """

    kind: str
    fact: int
    prompt: str
    wanted: str
    other: str


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What a model makes of questions.

    Attributes:
        p: ``[Q]`` probability of the wanted answer.
        other: ``[Q]`` that of the other; NaN where there is none.
        right: ``[Q]`` bool, whether greedy decoding gives the wanted answer.
    """

    p: np.ndarray
    other: np.ndarray
    right: np.ndarray


def questions(facts: Sequence[Fact]) -> list[Question]:
    """Everything that facts are asked by; a neighbour that several facts share is asked for each of them."""
    found = []
    for number, fact in enumerate(facts):
        found.append(Question(OWN, number, fact.text, fact.target, fact.old))
        found += [Question(PARAPHRASE, number, text, fact.target, fact.old) for text in fact.paraphrases]
        found += [Question(NEIGHBOUR, number, text, target, fact.target) for text, target in fact.neighbours]
    return found


def answered(
    model: Model, decoder: Decoder, asked: Sequence[Question], batch_size: int, bars: Bars | None = None
) -> Answers:
    """Asks a model; equal prompts with equal answers are run once.

    Args:
        model: tokenizer, mesh and context.
        decoder: weights that answer.
        asked: Q questions.
        batch_size: rows per pass.
        bars: maker of progress bars.
    """
    pairs = [(one.prompt, one.wanted) for one in asked] + [(one.prompt, one.other) for one in asked if one.other]
    place = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    rows = [{"prompt": prompt, "response": f" {answer}"} for prompt, answer in place]
    found = completions(model, decoder, render(rows, model.tokenizer, "none"), batch_size, bars)
    wanted = [place[one.prompt, one.wanted] for one in asked]
    other = [np.exp(found.log_p[place[one.prompt, one.other]]) if one.other else np.nan for one in asked]
    return Answers(np.exp(found.log_p[wanted]), np.array(other), found.right[wanted])


def summary(asked: Sequence[Question], answers: Answers) -> dict[str, Any]:
    """Shares and means by kind, as JSON values.

    ``greedy`` is the share of questions whose wanted answer greedy decoding gives; ``preferred`` that of those whose
    wanted answer is more probable than the other, of ``compared`` questions that have one; ``p`` the mean probability.
    """
    told: dict[str, Any] = {}
    for kind in (OWN, PARAPHRASE, NEIGHBOUR):
        mine = np.array([one.kind == kind for one in asked])
        compared = mine & np.isfinite(answers.other)
        if not mine.any():
            continue
        told[kind] = {
            "questions": int(mine.sum()),
            "greedy": float(answers.right[mine].mean()),
            "p": float(answers.p[mine].mean()),
            "compared": int(compared.sum()),
            "preferred": float((answers.p > answers.other)[compared].mean()) if compared.any() else None,
        }
    return told


def text_loss(model: Model, decoder: Decoder, examples: Sequence[Example], batch_size: int) -> float:
    """Mean loss of all tokens of texts but each one's first, in nats.

    Args:
        model: mesh.
        decoder: weights.
        examples: texts as prompts.
        batch_size: rows per pass.
    """
    texts = [
        dataclasses.replace(one, token_ids=one.token_ids[: one.prompt_length], prompt_length=1) for one in examples
    ]
    total = count = 0.0
    everywhere = NamedSharding(model.mesh, PartitionSpec())
    for _, batch in batches_of(texts, batch_size, model):
        with jax.default_matmul_precision("highest"):
            hidden = _hidden(decoder, batch.tokens, batch.lengths, mesh=model.mesh)
            sums, tokens_of, _ = loss_step(decoder.weights(), hidden, batch, model.config, everywhere)
        total, count = total + float(np.sum(sums)), count + float(np.sum(tokens_of))
    return total / count


@functools.partial(jax.jit, static_argnames="mesh")
def _hidden(decoder: Decoder, tokens: jax.Array, lengths: jax.Array, *, mesh: Any) -> jax.Array:
    return forward(decoder, tokens, lengths=lengths, mesh=mesh).hidden
