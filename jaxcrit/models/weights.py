"""The weight table: one row per kind of weight. Shapes, file tensors, shardings, loading and export follow from it.

A row's axes are its shape: their names give the sizes (from the config) and the placement (from the mesh
rules). Grouped axes are one dimension in the file, so a row's layout change is a reshape, or, where several
rows share a tensor (Phi-3's fused projections), a slice of its first dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder
from jaxcrit.parallel.mesh import AnyMesh, spec_for

Groups = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One kind of weight.

    Attributes:
        path: our name; below ``blocks.`` it is stacked over layers.
        hf: name in the checkpoint, ``{}`` standing for the layer.
        groups: logical axes, grouped by dimension of the file's tensor.
    """

    path: str
    hf: str
    groups: Groups

    @property
    def stacked(self) -> bool:
        """Whether there is one of it in every layer."""
        return self.path.startswith("blocks.")

    @property
    def axes(self) -> tuple[str, ...]:
        """Logical axes of our array, with ``layers`` in front where stacked."""
        inside = tuple(axis for group in self.groups for axis in group)
        return ("layers", *inside) if self.stacked else inside

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of our array."""
        return tuple(sizes(config)[axis] for axis in self.axes)

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of this row's part of the file's tensor, for one layer."""
        return tuple(math.prod(sizes(config)[axis] for axis in group) for group in self.groups)


def sizes(config: ModelConfig) -> dict[str, int]:
    """Length of every logical axis."""
    return {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.width,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "ff": config.ff_width,
    }


_EMBED, _FF = ("embed",), ("ff",)
_HEADS, _KV = ("heads", "head_dim"), ("kv_heads", "head_dim")


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """The rows of a model; rows of one file tensor stand in the order they have in it."""
    attention, mlp = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
    fused = config.family == "phi3"
    rows = [
        Weight("embed", "model.embed_tokens.weight", (("vocab",), _EMBED)),
        Weight("blocks.attn_norm", "model.layers.{}.input_layernorm.weight", (_EMBED,)),
        Weight("blocks.mlp_norm", "model.layers.{}.post_attention_layernorm.weight", (_EMBED,)),
        Weight("blocks.o", attention + "o_proj.weight", (_EMBED, _HEADS)),
        Weight("blocks.down", mlp + "down_proj.weight", (_EMBED, _FF)),
    ]
    for name, axes in (("q", _HEADS), ("k", _KV), ("v", _KV)):
        rows.append(Weight(f"blocks.{name}", attention + f"{'qkv' if fused else name}_proj.weight", (axes, _EMBED)))
        if config.qkv_bias:
            rows.append(Weight(f"blocks.{name}_bias", attention + f"{name}_proj.bias", (axes,)))
    for name in ("gate", "up"):
        rows.append(Weight(f"blocks.{name}", mlp + f"{'gate_up' if fused else name}_proj.weight", (_FF, _EMBED)))
        if config.mlp_bias:
            rows.append(Weight(f"blocks.{name}_bias", mlp + f"{name}_proj.bias", (_FF,)))
    if config.mlp_bias:
        rows.append(Weight("blocks.down_bias", mlp + "down_proj.bias", (_EMBED,)))
    if config.out_bias:
        rows.append(Weight("blocks.o_bias", attention + "o_proj.bias", (_EMBED,)))
    if config.qk_norm:
        rows += [Weight(f"blocks.{name}_norm", attention + f"{name}_norm.weight", (("head_dim",),)) for name in "qk"]
    rows.append(Weight("norm", "model.norm.weight", (_EMBED,)))
    if not config.tied:
        rows.append(Weight("head", "lm_head.weight", (("vocab",), _EMBED)))
    return tuple(rows)


def offsets(config: ModelConfig) -> dict[str, int]:
    """By path: at which row of its file tensor's first dimension a weight begins."""
    begin: dict[str, int] = {}
    filled: dict[str, int] = {}
    for row in table(config):
        begin[row.path] = filled.get(row.hf, 0)
        filled[row.hf] = begin[row.path] + row.hf_shape(config)[0]
    return begin


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this model must hold, by name, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for row in table(config):
        part = row.hf_shape(config)
        for layer in range(config.num_layers if row.stacked else 1):
            name = row.hf.format(layer)
            before = shapes.get(name, (0, *part[1:]))
            shapes[name] = (before[0] + part[0], *part[1:])
    return shapes


def abstract(config: ModelConfig, dtype: Any = np.float32, mesh: AnyMesh | None = None) -> Decoder:
    """The decoder with `jax.ShapeDtypeStruct` leaves: shapes without memory, with their shardings on a mesh."""

    def like(row: Weight) -> jax.ShapeDtypeStruct:
        shape = row.shape(config)
        place = None if mesh is None else NamedSharding(mesh, spec_for(row.axes, shape, mesh, row.path))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    return Decoder(config, {row.path: like(row) for row in table(config)})


def to_hf(decoder: Decoder, layers: Sequence[int] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the checkpoint's tensors one by one, on the host, in the decoder's dtype.

    Args:
        decoder: the model.
        layers: which layers' tensors to yield; default all, and those outside the blocks.
    """
    config, weights = decoder.config, decoder.weights()
    parts: dict[str, list[Weight]] = {}
    for row in table(config):
        if row.stacked or layers is None:
            parts.setdefault(row.hf, []).append(row)
    for hf, rows in parts.items():
        stacked = rows[0].stacked
        for layer in (range(config.num_layers) if layers is None else layers) if stacked else range(1):
            pieces = [
                np.asarray(weights[row.path][layer] if stacked else weights[row.path]).reshape(row.hf_shape(config))
                for row in rows
            ]
            yield hf.format(layer), pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
