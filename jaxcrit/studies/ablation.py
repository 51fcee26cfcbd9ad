"""``jaxcrit ablate``: what a model loses without each layer, in loss and in right answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcrit.commands.ablate import AblateOptions
from jaxcrit.core.deletions import write_deletions
from jaxcrit.core.layers import LayerScores, write_scores
from jaxcrit.core.run import running
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.criteria.ablation import ablate, intact, silenced, update_sums, variants
from jaxcrit.data.batches import make_batches
from jaxcrit.data.templates import Example, describe_template
from jaxcrit.evaluation.scorers import exact_match
from jaxcrit.evidence.rows import batches_of, forget_partial, read_back, read_rows, sample_losses
from jaxcrit.evidence.sample_scores import SampleLosses
from jaxcrit.evidence.variants import Batch, planned_evaluations, sweep
from jaxcrit.models.decoder import Block, Decoder
from jaxcrit.models.generation import generate
from jaxcrit.models.model import Bars, Model, open_model
from jaxcrit.studies.generation import stop_tokens

_ELSEWHERE = ("model", "data", "split", "limit", "shuffle_seed", "out", "batch_size", "mesh")


@dataclasses.dataclass(frozen=True, eq=False)
class Ablation:
    """A finished run.

    Attributes:
        config: what was asked.
        run: what ``run.json`` holds; ``result`` has the counts.
        scores: by method the mean of per-sample means, the same ``_per_token``, and ``_accuracy`` where generated.
        out: run directory.
    """

    config: AblateOptions
    run: dict[str, Any]
    scores: dict[str, LayerScores]
    out: Path


def run_ablation(
    options: AblateOptions, *, progress: Bars | None = None, finish: Callable[[Ablation], Any] | None = None
) -> Ablation:
    """Runs ``jaxcrit ablate``; goes on where an earlier, interrupted run of the same configuration stopped.

    Args:
        options: what is asked.
        progress: maker of progress bars (tqdm's signature), or None for silence.
        finish: called with the result before the run counts as complete; it writes the report.

    Raises:
        UserError: any mistake in flags, checkpoint or data; then nothing is left in the run directory.
    """
    model = open_model(options.model, mesh=options.mesh, dtype=options.dtype)
    datasets = read_rows(options, model)
    template = describe_template(model.tokenizer, options)
    resolved = {"dtype": model.dtype}
    with running(
        "ablate", options, models={"model": model}, datasets=datasets, template=template, resolved=resolved
    ) as run:
        if run.complete:
            return Ablation(options, dict(run.earlier), read_back(run.path), run.path)
        examples = [example for dataset in datasets for example in dataset.examples]
        job = _Job(options, model, examples, run.directory, progress)
        samples = job.losses(options.chosen_methods)
        if options.generate:
            samples["skip_accuracy"] = job.accuracies()
        scores, left = _scores(options, model, samples)
        write_scores(run.path / "scores.json", scores)
        write_deletions(run.path, left, [example.sample_id for example in examples])
        run.record["result"] = {"block_evaluations": job.counts}
        found = Ablation(options, run.record, scores, run.path)
        if finish is not None:
            finish(found)
    forget_partial(found.out)
    return found


def _scores(
    options: AblateOptions, model: Model, samples: Mapping[str, SampleLosses]
) -> tuple[dict[str, LayerScores], dict[str, np.ndarray]]:
    """Scores by key, and the same with each row left out, ``[N, L]``."""
    depth = model.config.num_layers
    meta = {"model_type": model.config.family, "model_hash": model.model_hash, "sites": options.sites}
    scores: dict[str, LayerScores] = {}
    left: dict[str, np.ndarray] = {}
    for name, one in samples.items():
        key = options.score(name)
        if name == "skip_accuracy":
            scores[key] = one.score(key, depth, {**meta, "max_new_tokens": options.max_new_tokens}, "low")
        else:
            scores |= one.scores(key, depth, {**meta, "method": name})
            left[f"{key}_per_token"] = one.without_each(depth, per_token=True)
        left[key] = one.without_each(depth)
    return scores, left


class _Job:
    """The model and the rows of one run."""

    def __init__(self, config: AblateOptions, session: Model, examples: Sequence[Example],
                 directory: RunDirectory | None, progress: Bars | None):  # fmt: skip
        self.config, self.session, self.examples = config, session, examples
        self.directory, self.progress = directory, progress
        self.depth = session.config.num_layers
        self.weights = session.decoder(progress).weights()
        self.counts: dict[str, Any] = {}

    def losses(self, methods: Sequence[str]) -> dict[str, SampleLosses]:
        """By method, losses of each sample without each layer."""
        blocks = Block(self.session.config, {path.removeprefix("blocks."): value for path, value in
                                             self.weights.items() if path.startswith("blocks.")})  # fmt: skip
        width, extra = self.session.config.width, 0
        made = []
        for method in methods:
            shift = jnp.zeros((self.depth, width))
            if method == "mean":
                shift, extra = self._mean_updates(blocks), self.depth
            made += variants(self.depth, shift)
        whole = intact(self.depth, width)
        made.append(whole)

        def take(batch: Batch, step: Callable[[int], None] | None) -> tuple[np.ndarray, np.ndarray]:
            found = sweep(blocks, self.weights, whole, made, batch, edit=ablate(self.config.sites), progress=step)
            return found.losses, found.tokens

        planned = planned_evaluations(made, self.depth)
        losses, tokens, batches = sample_losses(
            self.examples, self.config.batch_size, self.session, self.directory, take, len(made), planned, self.progress
        )
        self.counts = {
            "sweep": planned,
            "forward_passes": planned / self.depth,
            "a_pass_each": len(made) * self.depth,
            "means": extra,
            "batches": batches,
        }
        layers = np.arange(self.depth)
        return {
            method: SampleLosses(layers, losses[place * self.depth :][: self.depth], losses[-1], tokens)
            for place, method in enumerate(methods)
        }

    def _mean_updates(self, blocks: Block) -> Any:
        """``[L, D]`` what each layer's site adds to the stream, mean over all real tokens of all rows."""
        total, count = np.zeros((self.depth, self.session.config.width)), 0
        for _, placed in batches_of(self.examples, self.config.batch_size, self.session):
            sums, tokens, _ = update_sums(blocks, self.weights, placed, self.config.sites)
            total, count = total + sums, count + tokens
        return jnp.asarray(total / count, jnp.float32)

    def accuracies(self) -> SampleLosses:
        """Whether each answer is the row's response word for word, with each layer skipped and with none."""
        split = self.session.mesh.shape["data"] * self.session.mesh.shape["fsdp"]
        batches = make_batches(self.examples, -(-self.config.batch_size // split) * split)
        right = np.zeros((self.depth + 1, len(self.examples)))
        bar = None if self.progress is None else self.progress(
            total=right.size, desc="answers", unit=" answers")  # fmt: skip
        for layer in range(self.depth + 1):
            weights = self.weights if layer == self.depth else silenced(self.weights, layer, self.config.sites)
            decoder = Decoder(self.session.config, weights)
            for batch in batches:
                rows = batch.rows[batch.rows < len(self.examples)]
                right[layer, rows] = self._right(decoder, batch.tokens, batch.lengths, batch.rows)
                if bar is not None:
                    bar.update(len(rows))
        if bar is not None:
            bar.close()
        return SampleLosses(np.arange(self.depth), right[:-1], right[-1], np.ones(len(self.examples), np.int64))

    def _right(self, decoder: Decoder, tokens: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
        fills = rows == len(self.examples)
        found = generate(
            decoder, tokens, lengths, self.config.max_new_tokens, stop=stop_tokens("", self.session),
            samples=np.where(fills, -1, rows), mesh=self.session.mesh,
        )  # fmt: skip
        texts = [self.session.tokenizer.decode(ids, skip_special_tokens=True) for ids in found.token_ids]
        kept = [(text, self.examples[row].response or "") for text, row in zip(texts, rows, strict=True)
                if row < len(self.examples)]  # fmt: skip
        return exact_match([text for text, _ in kept], [gold for _, gold in kept])
