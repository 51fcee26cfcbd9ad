"""From rendered rows to what a step takes: checks, the held-out split, micro-batches by step number."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.data.batches import choose_widths
from jaxcrit.data.steps import Steps, TrainBatch
from jaxcrit.data.templates import Example
from jaxcrit.parallel.mesh import AnyMesh, row_parts
from jaxcrit.training.objectives import TokenBatch

_HELD_OUT_SEED, _HELD_OUT_MOST = 0, 200
# Random rows nearly always have a long one among them: a few widths catch what there is to save, at a compile each.
_MOST_WIDTHS = 3


def hold_out(examples: Sequence[Example], where: str) -> tuple[list[Example], list[Example]]:
    """Parts rows into training and test: a tenth, at most 200, always the same ones; equal rows go together.

    Raises:
        UserError: fewer than two different rows.
    """
    identities = sorted({example.sample_id for example in examples})
    if len(identities) < 2:
        raise UserError(f"{where}: expected two different rows or more, to hold one out; or give --eval_data")
    count = min(max(1, len(identities) // 10), _HELD_OUT_MOST)
    held = {identities[i] for i in np.random.default_rng(_HELD_OUT_SEED).permutation(len(identities))[:count]}
    train = [example for example in examples if example.sample_id not in held]
    return train, [example for example in examples if example.sample_id in held]


def training_steps(
    examples: Sequence[Example], rows: int, seed: int, widths: Sequence[int] | None = None, beside: Sequence[str] = ()
) -> Steps:
    """Batches of ``rows`` rows by step number, of the widths given, or at most three; with those of rows beside."""
    ladder = widths or choose_widths([len(example.token_ids) for example in examples], rows)[-_MOST_WIDTHS:]
    return Steps(examples, rows, seed, ladder, beside)


def micro_batches(steps: Steps, step: int, micro: int, mesh: AnyMesh | None = None) -> TokenBatch:
    """The rows of a step (0-based) as ``[micro, B, T]``, with those beside them.

    Raises:
        UserError: no token in them is to be learnt.
    """
    batch = steps.batch(step)
    if not batch.loss_mask.any():
        raise UserError(f"step {step + 1}: none of its rows has a response token to learn; remove such rows")
    beside = {name: token_batch(other.batch(step), micro, other, mesh) for name, other in steps.beside.items()}
    numbers = (step * steps.batch_size + np.arange(len(batch.tokens), dtype=np.int32)).reshape(micro, -1)
    return dataclasses.replace(token_batch(batch, micro), beside=beside, numbers=numbers)


def token_batch(
    batch: TrainBatch, micro: int = 0, fixed: Steps | None = None, mesh: AnyMesh | None = None
) -> TokenBatch:
    """Rows as a step takes them.

    Args:
        batch: rows.
        micro: micro-batches to cut them into; 0 for none, ``[B, T]``.
        fixed: batches that these rows are of, to run the head on as many positions in each of them: a batch beside
            another would be compiled for each number.
        mesh: that the rows are split over.
    """
    scored = None
    if fixed is not None:
        rows = len(batch.tokens) // max(micro, 1) // (1 if mesh is None else row_parts(mesh))
        scored = min(rows * batch.tokens.shape[1], max(1, rows * fixed.longest_response))
    tokens, lengths, learn = batch.tokens, batch.lengths, batch.loss_mask
    if micro:
        tokens, lengths, learn = (part.reshape(micro, -1, *part.shape[1:]) for part in (tokens, lengths, learn))
    return TokenBatch(tokens, lengths, learn, scored)
