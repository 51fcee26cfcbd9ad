"""substitution: test loss of a tuned model with some layers taken from the model it was tuned from.

High where the tuning of those layers mattered. The paper takes windows of five layers, centred on each layer in turn,
whole blocks, and leaves embeddings, final norm and head tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.evidence.variants import Variant
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Block
from jaxcrit.models.weights import HALVES

Sites = Literal["blocks", "attn", "mlp"]
SITES: tuple[str, ...] = get_args(Sites)
Layers = tuple[int, ...]


def join(config: ModelConfig, base: dict[str, jax.Array], tuned: dict[str, jax.Array]) -> Block:
    """Both models' blocks in one stack ``[2L, ...]``: the base in slots 0 to L-1, the tuned model from L on.

    Args:
        config: of both.
        base: arrays by weight-table path; those of blocks are taken out, so that no more than one exists twice.
        tuned: the same.
    """
    names = [path for path in tuned if path.startswith("blocks.")]
    return Block(config, {path.removeprefix("blocks."): _join(base.pop(path), tuned.pop(path)) for path in names})


def _join(base: jax.Array, tuned: jax.Array) -> jax.Array:
    return jax.jit(lambda *parts: jnp.concatenate(parts), out_shardings=tuned.sharding)(base, tuned)


def host_variant(num_layers: int, *, base: bool) -> Variant:
    """One of the two models as it is: the base or the tuned one."""
    layers = np.arange(num_layers, dtype=np.int32) + (0 if base else num_layers)
    return Variant(np.stack([layers, layers], axis=1), start=num_layers)


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
