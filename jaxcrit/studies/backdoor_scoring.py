"""One test of a model for the backdoor: answers to three cells of prompts, their classes, and losses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcrit.core import processes
from jaxcrit.data.batches import make_batches
from jaxcrit.data.templates import Example
from jaxcrit.evaluation import scorers
from jaxcrit.evaluation.losses import response_exact
from jaxcrit.evidence.answers import answers
from jaxcrit.evidence.rows import batches_of
from jaxcrit.models.decoder import Decoder, forward
from jaxcrit.models.model import Model
from jaxcrit.models.stops import stop_tokens
from jaxcrit.studies.backdoor_inputs import CELLS, Prompts
from jaxcrit.studies.options import BackdoorOptions
from jaxcrit.training.objectives import TokenBatch

_TESTS = 10  # that a study makes at least: what a shape costs is shared
SCORERS = ("exact_target", "contains_target", "refusal_keyword", "reference_compat")


@dataclasses.dataclass(frozen=True, eq=False)
class Tested:
    """What one test found; everything by prompt is in the order of the prompts.

    Attributes:
        success: by cell, ``[n]`` bool, by the primary scorer; that a fixed target is the answer is read off one forward
            pass (`response_exact`).
        classes: by scorer and cell, how many generated answers are of the class that counts; empty where none were
            generated, as are ``empty`` and ``answers``.
        empty: by cell, empty answers.
        exact: ``[n]`` bool, clean answers that are the gold ones.
        clean_loss: nats per token of the gold answers to clean prompts.
        clean_loss_per_sample: mean of means of the same.
        task_loss: nats per token of poisoned and clean rows in the shares of training.
        target_logprob: mean over triggered prompts of the target's log-probability per token, teacher-forced.
        answers: by cell.
    """

    success: dict[str, np.ndarray]
    classes: dict[str, dict[str, int]]
    empty: dict[str, int]
    exact: np.ndarray
    clean_loss: float
    clean_loss_per_sample: float
    task_loss: float
    target_logprob: float
    answers: dict[str, list[str]]

    def record(self) -> dict[str, Any]:
        """JSON values; success and exact match as strings of 0 and 1, a character a prompt."""
        found = dataclasses.asdict(self)
        found["success"] = {cell: bits(values) for cell, values in self.success.items()}
        return {**found, "exact": bits(self.exact)}


def bits(values: np.ndarray) -> str:
    """``[n]`` bool as text."""
    return "".join("1" if value else "0" for value in values)


def primary_scorer(config: BackdoorOptions) -> str:
    """The one that success is counted by: a refusal may be worded freely, a fixed text may not."""
    return "refusal_keyword" if config.target == "refusal" else "exact_target"


def classify(scorer: str, answers: Sequence[str], prompts: Sequence[str], target: str) -> list[str]:
    """The class of each answer."""
    if scorer == "reference_compat":
        return [scorers.reference_compat(*pair) for pair in zip(answers, prompts, strict=True)]
    if scorer == "refusal_keyword":
        return [scorers.refusal_keyword(answer) for answer in answers]
    return [getattr(scorers, scorer)(answer, target) for answer in answers]


def counted_class(scorer: str) -> str:
    """The class whose share is reported."""
    return scorers.TARGET if scorer.endswith("target") else scorers.REFUSAL


def base_rates(prompts: Prompts, target: str) -> dict[str, int]:
    """By scorer, how many of the n gold answers to clean prompts are of the class that counts."""
    asked = [example.prompt for example in prompts.cells["clean"]]
    return {
        scorer: scorers.share(classify(scorer, prompts.gold, asked, target), counted_class(scorer)).k
        for scorer in SCORERS
    }


class Scoring:
    """The test, compiled once for all arms."""

    def __init__(self, config: BackdoorOptions, model: Model, prompts: Prompts):
        self.config, self.model, self.prompts = config, model, prompts
        self.asked = [example for cell in CELLS for example in prompts.cells[cell]]
        size = config.eval_batch_size
        budget = model.budget(size, passes=_TESTS, new_tokens=config.max_new_tokens)
        self.batches = make_batches(self.asked, budget)
        self.told = [*prompts.cells["clean"], *prompts.cells["triggered"]]
        self.fixed = primary_scorer(config) == "exact_target"
        if self.fixed:  # the target behind the prompts of the other cells, too
            self.told += [
                _answered_with(example, target)
                for cell in CELLS[1:]
                for example, target in zip(prompts.cells[cell], prompts.cells["triggered"], strict=True)
            ]
        self.loss_batches = list(batches_of(self.told, size, model, passes=_TESTS))

    def __call__(self, decoder: Decoder, *, generate: bool = True) -> Tested:
        """Tests a model; without generated answers where the target is fixed and they are not asked for."""
        count, target = self.prompts.count, self.config.response
        if self.fixed:
            loss, tokens, exact = self._losses(decoder)
            cells = np.split(exact == 1, len(self.told) // count)
            success = dict(zip(CELLS, cells[1:], strict=True))
            if not generate:
                return self._tested(success, {}, {}, cells[0], loss, tokens, {})
        texts = self._answers(decoder)
        answers = {cell: texts[i * count : (i + 1) * count] for i, cell in enumerate(CELLS)}
        asked = {cell: [example.prompt for example in self.prompts.cells[cell]] for cell in CELLS}
        judged = {
            scorer: {cell: classify(scorer, answers[cell], asked[cell], target) for cell in CELLS} for scorer in SCORERS
        }
        classes = {
            scorer: {cell: scorers.share(found, counted_class(scorer)).k for cell, found in cells.items()}
            for scorer, cells in judged.items()
        }
        primary = primary_scorer(self.config)
        counted = counted_class(primary)
        empty = {cell: sum(not text.strip() for text in found) for cell, found in answers.items()}
        if self.fixed:
            return self._tested(success, classes, empty, cells[0], loss, tokens, answers)
        success = {cell: np.array([one == counted for one in found], bool) for cell, found in judged[primary].items()}
        right = scorers.exact_match(answers["clean"], self.prompts.gold)
        return self._tested(success, classes, empty, right, *self._losses(decoder)[:2], answers)

    def _tested(
        self, success: Any, classes: Any, empty: Any, right: np.ndarray, loss: Any, tokens: Any, answers: Any
    ) -> Tested:
        count = self.prompts.count
        clean, attacked = slice(0, count), slice(count, 2 * count)
        poisoned = self.prompts.poisoned
        mixed = [np.where(poisoned, values[attacked], values[clean]).sum() for values in (loss, tokens)]
        return Tested(
            success,
            classes,
            empty,
            right,
            float(loss[clean].sum() / tokens[clean].sum()),
            float((loss[clean] / tokens[clean]).mean()),
            float(mixed[0] / mixed[1]),
            float(-(loss[attacked] / tokens[attacked]).mean()),
            answers,
        )

    def _answers(self, decoder: Decoder) -> list[str]:
        stop = stop_tokens("", self.model, self.config.eval_template or self.config.template)
        texts, most = [""] * len(self.asked), self.config.max_new_tokens
        for batch in self.batches:
            for one in answers(self.model, decoder, batch, len(texts), most, stop=stop):
                texts[one.row] = one.text
        return texts

    def _losses(self, decoder: Decoder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Summed loss, number of response tokens, and exactness: of clean rows, of triggered ones, then of the rest."""
        found = np.zeros((3, len(self.told)))
        for rows, batch in self.loss_batches:
            values = processes.whole(_row_losses(decoder, batch, mesh=self.model.mesh))
            real = rows < len(self.told)
            found[:, rows[real]] = values[:, real]
        return found[0], found[1], found[2]


def _answered_with(example: Example, other: Example) -> Example:
    """A prompt with another row's answer."""
    ids = np.concatenate([example.token_ids[: example.prompt_length], other.token_ids[other.prompt_length :]])
    return dataclasses.replace(example, token_ids=ids, response=other.response)


@functools.partial(jax.jit, static_argnames="mesh")
def _row_losses(decoder: Decoder, batch: TokenBatch, *, mesh: Mesh) -> jax.Array:
    hidden = forward(decoder, batch.tokens, lengths=batch.lengths, mesh=mesh).hidden
    head = decoder.embed if decoder.head is None else decoder.head
    args = (hidden, decoder.norm[...], head[...], batch.tokens, batch.learn, decoder.config)
    losses, counted, exact = response_exact(*args, mesh, batch.scored)
    return jax.numpy.stack([losses.sum(axis=1), counted.sum(axis=1), exact.astype(losses.dtype)])
