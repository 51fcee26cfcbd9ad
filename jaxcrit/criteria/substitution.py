"""substitution: test loss of a tuned model with some layers taken from the model it was tuned from.

High where the tuning of those layers mattered. The paper takes windows of five layers, centred on each layer in turn,
whole blocks, and leaves embeddings, final norm and head tuned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import Sites
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.data.templates import Example
from jaxcrit.evidence.criterion import Criterion
from jaxcrit.evidence.rows import sample_losses
from jaxcrit.evidence.sample_scores import SampleLosses
from jaxcrit.evidence.variants import Variant, evaluation_counts, own_slots, planned_evaluations, sweep
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Block
from jaxcrit.models.model import Bars, Model
from jaxcrit.models.weights import HALVES
from jaxcrit.training.objectives import TokenBatch

Layers = tuple[int, ...]


def join(config: ModelConfig, base: dict[str, jax.Array], tuned: dict[str, jax.Array]) -> Block:
    """Both models' blocks in one stack ``[2L, ...]``: the base in slots 0 to L-1, the tuned model from L on.

    Args:
        config: config of both.
        base: arrays by weight-table path; those of blocks are taken out, so that no more than one exists twice.
        tuned: the same.
    """
    names = [path for path in tuned if path.startswith("blocks.")]
    return Block(config, {path.removeprefix("blocks."): _join(base.pop(path), tuned.pop(path)) for path in names})


def _join(base: jax.Array, tuned: jax.Array) -> jax.Array:
    return jax.jit(lambda *parts: jnp.concatenate(parts), out_shardings=tuned.sharding)(base, tuned)


def host_variant(num_layers: int, *, base: bool) -> Variant:
    """One of the two models as it is: the base or the tuned one."""
    return Variant(own_slots(num_layers) + np.int32(0 if base else num_layers), start=num_layers)


def variants(
    sets: Sequence[Layers], num_layers: int, *, sites: Sites = "blocks", reverse: bool = False
) -> list[Variant]:
    """The tuned model with each set of layers taken from the base.

    Args:
        sets: layers to take; an empty one takes none.
        num_layers: L.
        sites: what of a layer is taken: the whole block, or its attention or MLP alone, each with its norm.
        reverse: the base with layers of the tuned model instead.
    """
    host, guest = (host_variant(num_layers, base=base).slots for base in (reverse, not reverse))
    made = []
    for layers in sets:
        slots = host.copy()
        for column, half in enumerate(HALVES):
            if sites in ("blocks", half):
                slots[list(layers), column] = guest[list(layers), column]
        made.append(Variant(slots, start=min(layers, default=num_layers)))
    return made


def windows(num_layers: int, window: int) -> dict[int, Layers]:
    """By centre, the layers of every window that lies within the model.

    Raises:
        UserError: the window is even or wider than the model.
    """
    if window % 2 == 0 or not 1 <= window <= num_layers:
        raise UserError(
            f"--window={window}: expected an odd number from 1 to the {num_layers} layers of the model, the layers to"
            " take together"
        )
    half = window // 2
    return {centre: tuple(range(centre - half, centre + half + 1)) for centre in range(half, num_layers - half)}


def random_sets(num_layers: int, size: int, draws: int, seed: int) -> list[Layers]:
    """Sets of ``size`` layers drawn without replacement, each independent of the others."""
    rng = np.random.default_rng([seed, size])
    return [tuple(sorted(rng.permutation(num_layers)[:size].tolist())) for _ in range(draws)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sets of layers to substitute.

    Attributes:
        centres: layer in the middle of each window; empty where sets were asked for.
        sets: sets of layers, one after the other.
        random: random sets to compare with.
    """

    centres: tuple[int, ...]
    sets: tuple[Layers, ...]
    random: tuple[Layers, ...]


def make_plan(num_layers: int, window: int, sets: Sequence[Layers], draws: int, seed: int) -> Plan:
    """Windows around every layer, or the sets given; and as many random sets of each size as are wanted.

    Raises:
        UserError: see `windows`.
    """
    centres: tuple[int, ...] = ()
    if not sets:
        found = windows(num_layers, window)
        centres, sets = tuple(found), tuple(found.values())
    sizes = sorted({len(layers) for layers in sets})
    random = [one for size in sizes for one in random_sets(num_layers, size, draws, seed)]
    return Plan(centres, tuple(sets), tuple(random))


def substitution_losses(
    base: Model,
    tuned: Model,
    plan: Plan,
    examples: Sequence[Example],
    *,
    sites: Sites,
    reverse: bool,
    batch_size: int,
    directory: RunDirectory | None,
    bars: Bars | None,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Mean loss of every row under every substitution.

    Args:
        base: model that layers are taken from; with ``reverse`` they are put into it.
        tuned: model that was tuned from it, in the same dtype.
        plan: sets of layers.
        examples: N rendered rows with responses.
        sites: halves of a block that are taken.
        reverse: whether layers of the tuned model go into the base.
        batch_size: rows per forward pass.
        directory: directory of the run, where what is done survives an interruption; None keeps nothing.
        bars: maker of progress bars.

    Returns:
        ``[V, N]`` losses in nats, of the sets, the random sets, the host and the guest, in this order; ``[N]``
        response tokens; counts of block evaluations.
    """
    depth = tuned.config.num_layers
    arrays = {"base": base.weights(bars), "tuned": tuned.weights(bars)}
    blocks = join(tuned.config, arrays["base"], arrays["tuned"])
    host, guest = ("base", "tuned") if reverse else ("tuned", "base")
    as_it_is = {name: host_variant(depth, base=name == "base") for name in arrays}
    chosen, random = (variants(sets, depth, sites=sites, reverse=reverse) for sets in (plan.sets, plan.random))
    chosen.append(as_it_is[host])
    sweeps = [(chosen, host), (random, host), ([as_it_is[guest]], guest)]
    sweeps = [(made, model) for made, model in sweeps if made]
    planned = sum(planned_evaluations(made, depth) for made, _ in sweeps)

    def take(batch: TokenBatch, _: np.ndarray, step: Callable[[int], None] | None) -> tuple[np.ndarray, np.ndarray]:
        found = [sweep(blocks, arrays[model], as_it_is[model], made, batch, progress=step) for made, model in sweeps]
        rows = [one.losses for one in found]
        # The host comes with the chosen sets; it belongs behind the random ones.
        return np.concatenate([rows[0][:-1], *rows[1:-1], rows[0][-1:], rows[-1]]), found[0].tokens

    losses, tokens, batches = sample_losses(
        examples, batch_size, tuned, directory, take, len(plan.sets) + len(plan.random) + 2, planned, bars
    )
    others = {"random": planned_evaluations(random, depth) if random else 0, "unsubstituted": depth}
    return losses, tokens, evaluation_counts(chosen, depth, batches, others)


CRITERIA = {
    "substitution": Criterion(
        needs="variants",
        direction="high",
        score=SampleLosses.scores,
        command="substitute",
        formula="loss of the tuned model with a window of layers from its base",
        source="the paper",
        responds="loss that tuning a window of layers took away",
        blind="what other layers make up for",
    )
}
