"""What a step minimises: the response loss of a batch, and the objectives beside it.

An early exit reads a layer's state through final norm and head as if it were the last one. Norm and head are not
trained by it: a head that is tied to the embedding would be pulled by every exit. A feature objective compares pooled
states of two rows, of which the paired one gives no gradient. Both stop at their layer, so nothing above is trained by
them, and rows of their own cost (layer + 1) / L of a pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcrit.core.auxiliaries import Adversarial, Auxiliary, Balance, Objective
from jaxcrit.core.errors import UserError
from jaxcrit.evaluation.losses import LossSums, response_loss, response_losses, sums_of
from jaxcrit.evaluation.perturbations import find_perturbation, perturbed_tokens, relative_change, row_keys
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import look_up
from jaxcrit.models.mixture import balance, used
from jaxcrit.models.partition import Bank, Partition
from jaxcrit.models.sites import Tap
from jaxcrit.parallel.mesh import AnyMesh
from jaxcrit.training.forward import Edited, Form, hidden_states, layer_states, outside


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Rows to learn from; arrays may have further axes in front (micro-batches).

    Attributes:
        tokens: ``[B, T]`` int32, right padded.
        lengths: ``[B]`` int32 true lengths.
        learn: ``[B, T]`` bool, tokens whose prediction counts.
        scored: positions that the head runs on, see `at_responses`; None for all. Compiled in.
        beside: rows beside these by name, as many, of widths of their own.
        numbers: ``[B]`` int32, what each row's random draws follow from; None where nothing is drawn.
    """

    tokens: Any
    lengths: Any
    learn: Any
    scored: int | None = dataclasses.field(default=None, metadata={"static": True})
    beside: dict[str, TokenBatch] = dataclasses.field(default_factory=dict)
    numbers: Any = None


def batch_loss(
    partition: Partition,
    bank: Bank,
    batch: TokenBatch,
    *,
    dtype: Any,
    remat: bool = True,
    form: Form | None = None,
    mesh: AnyMesh | None = None,
    edit: Edited | None = None,
) -> LossSums:
    """Losses of one batch under a bank; arguments as of `hidden_states`."""
    how: dict[str, Any] = {"dtype": dtype, "remat": remat, "form": form, "mesh": mesh, "edit": edit}
    return batch_losses(partition, bank, batch, (), **how)[0]


def batch_losses(
    partition: Partition,
    bank: Bank,
    batch: TokenBatch,
    auxiliaries: Sequence[Objective],
    *,
    form: Form | None = None,
    **how: Any,
) -> tuple[LossSums, ...]:
    """Losses of one batch, and of each auxiliary objective.

    Args:
        partition: partition of the bank.
        bank: all groups.
        batch: rows, with those beside that the objectives look at.
        auxiliaries: objectives; of features `LossSums` counts pairs where it counts tokens.
        form: see `hidden_states`. A pass whose layers are read on the way is of ``runs``.
        **how: see `hidden_states`.
    """
    config = partition.config
    last = config.num_layers - 1
    read: dict[str, set[int]] = {"": {last}}
    for one in auxiliaries:
        if not isinstance(one, Auxiliary):
            read[""] |= set(partition.layers) if isinstance(one, Adversarial) and one.on == "states" else set()
            continue
        paired = one.kind == "feature"
        read.setdefault("" if paired else one.rows, set()).add(one.layer)
        if paired:
            read.setdefault(one.rows, set()).add(one.source(config.num_layers))
    still = jax.lax.stop_gradient
    states: dict[str, dict[int, jax.Array]] = {}
    routed = _router_tap(config, batch) if any(isinstance(one, Balance) for one in auxiliaries) else None
    taps: list[dict[str, Any]] = []
    for name, layers in read.items():
        rows = batch.beside[name] if name else batch
        own = still(bank) if name.startswith("feature") else bank
        if name:
            states[name], _ = layer_states(partition, own, rows.tokens, rows.lengths, layers, **how)
        elif layers == {last} and routed is None:
            hidden = hidden_states(partition, own, rows.tokens, rows.lengths, form=form, **how)
            states[name] = {last: hidden}
        else:
            states[name], taps = layer_states(partition, own, rows.tokens, rows.lengths, layers, tap=routed, **how)
    norm, head = outside(bank, "norm"), outside(bank, "embed" if config.tied else "head")

    def exit_loss(rows: TokenBatch, hidden: jax.Array, norm: jax.Array, head: jax.Array) -> LossSums:
        given = (hidden, norm, head, rows.tokens, rows.learn)
        return response_loss(*given, config, how.get("mesh"), rows.scored)

    found = [exit_loss(batch, states[""][last], norm, head)]
    for one in auxiliaries:
        if isinstance(one, Balance):
            found.append(_balance_loss(batch, taps))
        elif isinstance(one, Adversarial):
            found.append(_adversarial_loss(one, partition, bank, batch, states[""], form=form, **how))
        elif one.kind == "exit":
            rows = batch.beside[one.rows] if one.rows else batch
            found.append(exit_loss(rows, states[one.rows][one.layer], still(norm), still(head)))
        else:
            other = states[one.rows][one.source(config.num_layers)]
            found.append(_feature_loss(one, batch, states[""][one.layer], other))
    return tuple(found)


def totals_of(batch: TokenBatch, auxiliaries: Sequence[Objective]) -> list[jax.Array]:
    """What the sum of each loss is to be divided by, the main one's first; float32, over all axes of the batch."""
    found = [jnp.sum(batch.learn[..., 1:], dtype=jnp.float32)]
    for one in auxiliaries:
        if isinstance(one, Balance):
            found.append(jnp.float32(len(batch.tokens) if batch.tokens.ndim > 2 else 1))
        elif isinstance(one, Adversarial):
            rows_or_tokens = batch.lengths > 1 if one.on == "states" else batch.learn[..., 1:]
            found.append(jnp.sum(rows_or_tokens, dtype=jnp.float32))
        elif one.kind == "exit":
            rows = batch.beside[one.rows] if one.rows else batch
            found.append(jnp.sum(rows.learn[..., 1:], dtype=jnp.float32))
        else:
            found.append(jnp.sum(_pairs(one, batch), dtype=jnp.float32))
    return [jnp.maximum(count, 1) for count in found]


def check_auxiliaries(auxiliaries: Sequence[Objective], partition: Partition) -> None:
    """Checks that each objective has something to train.

    Raises:
        UserError: everything that trains lies above one's layer; or the embeddings, which perturbations are added to
            and measured by, train beside an adversarial objective, or no layer does.
    """
    lowest = -1 if "embed" in partition.outside else min(partition.layers, default=partition.config.num_layers)
    for one in auxiliaries:
        if isinstance(one, Adversarial):
            if "embed" in partition.outside:
                raise UserError(
                    "--adversarial: perturbations are measured by the embeddings, which must not grow to make them"
                    " harmless; give --train_embeddings=false"
                )
            if not partition.layers:
                raise UserError("--adversarial: is of the layers that train, and none does; choose some --layers")
        elif isinstance(one, Auxiliary) and one.layer < lowest:
            trained = f"the lowest that trains is {lowest}" if partition.layers else "no layer trains"
            raise UserError(
                f"--supervise={one}: nothing at or below layer {one.layer} trains ({trained}); supervise a higher layer"
                " or train lower --layers"
            )


def _pooled(one: Auxiliary, rows: TokenBatch) -> jax.Array:
    """``[..., T]`` bool: tokens whose states stand for a row, of the response or of the prompt.

    Not the first of a row: its state is an attention sink, hundreds of times longer than others, and a mean with it
    would be that of the sink alone.
    """
    at = jnp.arange(rows.tokens.shape[-1])
    return (at > 0) & (at < rows.lengths[..., None]) & (rows.learn == one.pools_response)


def _pairs(one: Auxiliary, batch: TokenBatch) -> jax.Array:
    """``[..., B]`` bool: rows with tokens to pool on both sides; none of those that fill up a batch."""
    return _pooled(one, batch).any(axis=-1) & _pooled(one, batch.beside[one.rows]).any(axis=-1)


def _feature_loss(one: Auxiliary, batch: TokenBatch, hidden: jax.Array, other: jax.Array) -> LossSums:
    """Sums of one minus the cosine of the mean states of a row and its pair."""

    def mean(rows: TokenBatch, states: jax.Array) -> jax.Array:
        # The sum points where the mean does.
        return jnp.sum(jnp.where(_pooled(one, rows)[..., None], states.astype(jnp.float32), 0), axis=1)

    ours, theirs = mean(batch, hidden), mean(batch.beside[one.rows], other)
    there = _pairs(one, batch)
    size = jnp.linalg.norm(jnp.where(there[:, None], ours, 1), axis=-1)
    along = jnp.sum(ours * theirs, axis=-1) / size / jnp.where(there, jnp.linalg.norm(theirs, axis=-1), 1)
    total, count = jnp.sum(jnp.where(there, 1 - along, 0)), jnp.sum(there, dtype=jnp.float32)
    return LossSums(total, count, total, count)


def _router_tap(config: ModelConfig, batch: TokenBatch) -> Tap:
    """What reads how a mixture's tokens are routed."""
    inside = jnp.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    return Tap(functools.partial(used, inside=inside, config=config), ("router",))


def _balance_loss(batch: TokenBatch, taps: list[dict[str, Any]]) -> LossSums:
    """The balance loss of a batch (`jaxcrit.models.mixture.balance`), counted once."""
    counts, shares = (jnp.concatenate(parts) for parts in zip(*(one["router"] for one in taps), strict=True))
    loss, one = balance(counts, shares, jnp.sum(batch.lengths)), jnp.float32(1)
    return LossSums(loss, one, loss, one)


def _adversarial_loss(
    one: Adversarial,
    partition: Partition,
    bank: Bank,
    batch: TokenBatch,
    clean: dict[int, jax.Array],
    *,
    form: Form | None,
    **how: Any,
) -> LossSums:
    """Sums of what the worst small change of the embeddings does to the layers that train, or to the loss.

    The change is found with all parameters held; only its effect is differentiated by them.
    """
    config, layers = partition.config, partition.layers
    given = batch.tokens, batch.lengths
    tokens = perturbed_tokens(batch.lengths, batch.tokens.shape[1])
    embeddings = look_up(outside(bank, "embed"), batch.tokens, config, how["dtype"])

    def changes(bank: Bank, states: dict[int, jax.Array], delta: jax.Array) -> jax.Array:
        moved, _ = layer_states(partition, bank, *given, layers, offset=delta, **how)
        return sum((relative_change(states[layer], moved[layer], tokens) for layer in layers), jnp.zeros(()))

    def response(bank: Bank, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = hidden_states(partition, bank, *given, form=form, offset=delta, **how)
        head = outside(bank, "embed" if config.tied else "head")
        rows = batch.tokens, batch.learn
        return response_losses(hidden, outside(bank, "norm"), head, *rows, config, how.get("mesh"), batch.scored)

    still, fixed = jax.lax.stop_gradient((bank, clean))

    def harm(delta: jax.Array) -> jax.Array:
        return changes(still, fixed, delta) if one.on == "states" else response(still, delta)[0].sum(axis=1)

    keys = row_keys(one.seed, batch.numbers)
    delta, _ = find_perturbation(harm, embeddings, tokens, keys, size=one.size, steps=one.steps)
    if one.on == "loss":
        return sums_of(*response(bank, delta))
    total = changes(bank, clean, delta).sum()
    count = jnp.sum(batch.lengths > 1, dtype=jnp.float32)
    return LossSums(total, count, total, count)
