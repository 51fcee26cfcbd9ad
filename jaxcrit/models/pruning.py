"""A model without some of its layers: weights, and a config that says of the others what it said of them before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import checked
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.families import FAMILIES
from jaxcrit.models.rope import Rope
from jaxcrit.models.weights import table

# Lists with an entry for every layer; what they say goes with the layer.
_LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")


def kept_layers(num_layers: int, drop: Sequence[int]) -> tuple[int, ...]:
    """The layers that are not left out, ascending.

    Raises:
        UserError: none is left.
    """
    kept = tuple(layer for layer in range(num_layers) if layer not in set(drop))
    if not kept:
        raise UserError(f"--drop: names all {num_layers} layers; leave one at least")
    return kept


def pruned_config(config: ModelConfig, kept: Sequence[int]) -> ModelConfig:
    """The config of the kept layers under their new numbers.

    Where the family's rule tells a layer's window or rotation by its number, the pruned model's file has lists.

    Args:
        config: the whole model's.
        kept: layers, ascending.

    Raises:
        UserError: layers outside the model.
    """
    kept = checked(kept, config.num_layers, "layers to keep")
    raw = config.to_hf()
    raw["num_hidden_layers"] = len(kept)
    for key in _LISTS:
        if isinstance(raw.get(key), list):
            raw[key] = [raw[key][layer] for layer in kept]
    windows = [config.windows[layer] for layer in kept]
    if len(set(config.windows)) > 1:
        raw["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if "no_rope_layers" in FAMILIES[config.family].defaults:
        raw["no_rope_layers"] = [int(_rope(config, layer).kind != "none") for layer in kept]
    pruned = ModelConfig.from_hf(raw, "config.json of the pruned model")
    ropes = [_rope(pruned, number) for number in range(len(kept))]
    # Every family reads its lists before its rule, so that this holds of all of them.
    assert windows == list(pruned.windows) and ropes == [_rope(config, layer) for layer in kept]
    return dataclasses.replace(pruned, attention=config.attention, fused_experts=config.fused_experts)


def _rope(config: ModelConfig, layer: int) -> Rope:
    ropes = (config.rope, *config.rope.others)
    return dataclasses.replace(ropes[config.rotations[layer]], others=())


def pruned(config: ModelConfig, weights: Mapping[str, Any], drop: Sequence[int]) -> Decoder:
    """The decoder without some layers.

    Args:
        config: the whole model's.
        weights: by path of the weight table; arrays stacked over layers, on the host or on devices.
        drop: layers to leave out.

    Raises:
        UserError: none is left, or see `pruned_config`.
    """
    kept = kept_layers(config.num_layers, drop)
    rows, layers = table(config), np.asarray(kept)
    left = {row.path: weights[row.path][layers] if row.stacked else weights[row.path] for row in rows}
    return Decoder(pruned_config(config, kept), left)


def names_before(config: ModelConfig, kept: Sequence[int]) -> dict[str, str]:
    """By the name of a tensor of the pruned model, its name in the whole one."""
    names: dict[str, str] = {}
    for row in table(config):
        for number, layer in enumerate(kept if row.stacked else range(1)):
            names |= dict(zip(row.names(config, number), row.names(config, layer), strict=True))
    return names
