"""From rendered rows to what a step takes: checks, the held-out split, micro-batches by step number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.data.batches import choose_widths
from jaxcrit.data.steps import Steps
from jaxcrit.data.templates import Example
from jaxcrit.training.step import TokenBatch

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


def training_steps(examples: Sequence[Example], rows: int, seed: int, widths: Sequence[int] | None = None) -> Steps:
    """Batches of ``rows`` rows by step number, of the widths given, or at most three."""
    ladder = widths or choose_widths([len(example.token_ids) for example in examples], rows)[-_MOST_WIDTHS:]
    return Steps(examples, rows, seed, ladder)


def micro_batches(steps: Steps, step: int, micro: int) -> TokenBatch:
    """The rows of a step (0-based) as ``[micro, B, T]``.

    Raises:
        UserError: no token in them is to be learnt.
    """
    batch = steps.batch(step)
    learn = batch.loss_mask
    if not learn.any():
        raise UserError(f"step {step + 1}: none of its rows has a response token to learn; remove such rows")
    tokens, lengths, learn = (part.reshape(micro, -1, *part.shape[1:]) for part in (batch.tokens, batch.lengths, learn))
    return TokenBatch(tokens, lengths, learn)
