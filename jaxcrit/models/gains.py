"""Gains of the residual stream around half a block: ``g x + f(norm(x))`` where a block has ``x + f(norm(x))``.

Everything that reads the stream later reads it under an RMSNorm, so a gain g > 0 is as good as dividing by g what this
half and every half behind it add: it folds into weights, up to the epsilon of the norms. What it says is therefore that
all from this half on counts 1/g times as much against all that came before. A gain around a whole block, whose MLP
would read the sum without it, does not fold. (After arXiv 2211.05631, which scales the shortcuts of a ResNet.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.families import FAMILIES
from jaxcrit.models.sites import Edit, Site
from jaxcrit.models.weights import HALVES, Half

HIGHEST = 4.0
_LAST = {"attn": ("o", "o_bias"), "mlp": ("down", "down_bias")}  # what a half adds is linear in these


@dataclasses.dataclass(frozen=True)
class Gain:
    """A gain around one half of one block.

    Attributes:
        layer: 0-based layer.
        half: ``attn`` or ``mlp``.
        value: factor of the stream that goes around it.
    """

    layer: int
    half: Half
    value: float

    def __str__(self) -> str:
        return f"{self.layer}:{self.half}:{self.value:g}"


def parse_gains(text: str, config: ModelConfig) -> tuple[Gain, ...]:
    """Reads ``4:attn:0.5,7:mlp:0.7``, gains that can be folded; empty for none.

    Raises:
        UserError: not of that form, a half named twice, a layer outside the model, a gain that is not above 0 and up to
            4, or a family whose halves read the stream without a norm.
    """
    found: dict[tuple[int, str], Gain] = {}
    for part in text.split(",") if text else []:
        layer, _, rest = part.strip().partition(":")
        half, _, number = rest.partition(":")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not layer.isdecimal() or half not in HALVES or not 0 <= value <= HIGHEST:
            raise UserError(
                f"--gain={text}: expected LAYER:attn|mlp:GAIN such as 4:attn:0.5, up to {HIGHEST:g}, got {part!r}"
            )
        if not value:
            raise UserError(
                f"--gain={text}: at a gain of 0 nothing is left of the prompt, and no weights do the same, so there"
                " would be no model to write; take one above 0"
            )
        if int(layer) >= config.num_layers:
            raise UserError(f"--gain={text}: expected layers 0 to {config.num_layers - 1}, got {layer}")
        if (int(layer), half) in found:
            raise UserError(f"--gain={text}: {layer}:{half} is there twice")
        found[int(layer), half] = Gain(int(layer), half, value)
    if found and (bare := [half for half in HALVES if f"{half}_norm" not in FAMILIES[config.family].norms]):
        raise UserError(
            f"--gain={text}: {' and '.join(bare)} of {config.family} read the stream without a norm, so a gain does not"
            " fold into the weights; ablate --methods=gain measures it"
        )
    return tuple(found.values())


def scaled(before: jax.Array, after: jax.Array, gain: jax.Array, on: jax.Array) -> jax.Array:
    """The stream behind a half around which it has a gain; to the bit as it was where ``on`` is False.

    Written so that a gain of 1 adds 0, which ``gain * before + (after - before)`` need not.
    """
    return jnp.where(on, after + (gain - 1).astype(after.dtype) * before, after)


def _change(
    site: Site, before: jax.Array, after: jax.Array, data: tuple[jax.Array, jax.Array], positions: jax.Array
) -> jax.Array:
    gain, on = (one[HALVES.index(site)] for one in data)
    return scaled(before, after, gain, on)


edit = Edit(_change, HALVES)  # its data are [L, 2] float32, gains of both halves, and [L, 2] bool, where there are any


def gain_data(gains: Sequence[Gain], num_layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Data of `edit`."""
    values, on = np.ones((num_layers, 2), np.float32), np.zeros((num_layers, 2), bool)
    for gain in gains:
        place = gain.layer, HALVES.index(gain.half)
        values[place], on[place] = gain.value, True
    return values, on


def fold(
    config: ModelConfig, weights: Mapping[str, Any], gains: Sequence[Gain], layer: int | None = None
) -> dict[str, Any]:
    """Weights that do without gains what these do with them; arrays given stay as they are.

    A half whose output has a norm of its own takes the factor in the weight of that norm.

    Args:
        config: config of the model.
        weights: arrays by weight-table path, stacked ``[L, ...]``; of the blocks at least.
        gains: gains as of `parse_gains`.
        layer: the layer that the arrays are of where they are not stacked; None where they are.
    """
    folded = dict(weights)
    for half in HALVES:
        factors = np.ones(config.num_layers, np.float32)
        for gain in gains:
            # From the gain's own half on: of its own layer the attention stands before the MLP.
            factors[gain.layer + (HALVES.index(half) < HALVES.index(gain.half)) :] /= np.float32(gain.value)
        if (factors == 1).all():
            continue
        norm = f"{half}_post_norm"
        behind = f"blocks.{norm}" in weights
        offset = (config.norm_offset or 0.0) if behind else 0.0
        for path in (f"blocks.{name}" for name in ((norm,) if behind else _LAST[half])):
            if path in weights:
                folded[path] = _times(weights[path], factors if layer is None else factors[layer], offset)
    return folded


@jax.jit
def _times(array: jax.Array, factors: Any, offset: Any) -> jax.Array:
    each = jnp.expand_dims(factors, tuple(range(jnp.ndim(factors), array.ndim)))
    return ((array.astype(jnp.float32) + offset) * each - offset).astype(array.dtype)
