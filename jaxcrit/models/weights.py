"""The weight table: one row per kind of weight. Shapes, file tensors, shardings, loading and export follow from it.

A row's axes give its shape (sizes from the config) and its placement (rules of the mesh). An array has the dimensions
of the file's tensor, ``[out, in]``: heads and what is in them are one, so that a product reads a weight as it lies.
Several rows that share a tensor (Phi-3's fused projections) are slices of the dimension ``out``. A mixture's experts
are one array of a layer, ``[experts, out, in]``, of a tensor for each or of one for all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from jax.sharding import PartitionSpec

from jaxcrit.models.config import ModelConfig
from jaxcrit.models.families import FAMILIES
from jaxcrit.parallel.mesh import AnyMesh, spec_for

if TYPE_CHECKING:  # the decoder reads this table
    from jaxcrit.models.decoder import Decoder

Groups = tuple[tuple[str, ...], ...]
Half = Literal["attn", "mlp"]
HALVES: tuple[Half, ...] = get_args(Half)  # in the order in which a block runs them


@dataclasses.dataclass(frozen=True)
class Weight:
    """One kind of weight.

    Attributes:
        path: our name; below ``blocks.`` it is stacked over layers.
        hf: name in the checkpoint, ``{}`` standing for the layer, and a second one for the expert.
        groups: logical axes, grouped by dimension of our array of a layer.
        half: the half of a block it belongs to, each half with its norm; None outside the blocks.
    """

    path: str
    hf: str
    groups: Groups
    half: Half | None = None

    @property
    def stacked(self) -> bool:
        """Whether there is one of it in every layer."""
        return self.path.startswith("blocks.")

    @property
    def axes(self) -> tuple[str, ...]:
        """The axis by which each dimension of our array may be split, with ``layers`` in front where stacked."""
        outermost = tuple(group[0] for group in self.groups)
        return ("layers", *outermost) if self.stacked else outermost

    @property
    def of_experts(self) -> bool:
        """Whether every expert has one of it."""
        return len(self.groups) == 3

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of our array."""
        return (config.num_layers, *self.layer_shape(config)) if self.stacked else self.layer_shape(config)

    def layer_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of our array of one layer."""
        return tuple(math.prod(sizes(config)[axis] for axis in group) for group in self.groups)

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of this row's part of the file's tensor: of a matrix, of an expert's matrix, of a vector."""
        return self.layer_shape(config)[-2:]

    def places(self, config: ModelConfig, layer: int | None) -> list[tuple[str, int | None]]:
        """Where the files hold a layer: its tensor, or each expert's tensor and the place in it (None: all of it)."""
        if not self.of_experts:
            return [(self.hf.format(layer), None)]
        named = [self.hf.format(layer, expert) for expert in range(config.experts)]
        return [(name, expert if config.fused_experts else None) for expert, name in enumerate(named)]

    def names(self, config: ModelConfig, layer: int | None) -> list[str]:
        """The files' tensors that hold a layer."""
        return list(dict.fromkeys(name for name, _ in self.places(config, layer)))


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
        "experts": config.experts,
    }


def placement(axes: Sequence[str], config: ModelConfig, mesh: AnyMesh, name: str) -> PartitionSpec:
    """Places an array by its `Weight.axes`: a dimension made of heads is split between heads, never inside of one.

    Raises:
        UserError: see `spec_for`.
    """
    length = sizes(config)
    return spec_for(axes, [length.get(axis, 1) for axis in axes], mesh, name)


_MLP = ("gate", "up", "down")
_EMBED, _FF = ("embed",), ("ff",)
_HEADS, _KV = ("heads", "head_dim"), ("kv_heads", "head_dim")


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """The rows of a model; rows of one file tensor stand in the order they have in it."""
    attention, mlp = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
    family = FAMILIES[config.family]
    each: Groups = (("experts",),) if config.experts else ()
    if not config.experts:
        names = {name: f"{mlp}{family.tensor(name)}_proj.weight" for name in _MLP}
    elif config.fused_experts:
        names = {name: f"{mlp}experts.{'down' if name == 'down' else 'gate_up'}_proj" for name in _MLP}
    else:
        mlp = f"model.layers.{{}}.{family.mixture}."
        names = {name: f"{mlp}experts.{{}}.{family.expert[name]}.weight" for name in _MLP}
    rows = [
        Weight("embed", "model.embed_tokens.weight", (("vocab",), _EMBED)),
        *(
            Weight(f"blocks.{name}", f"model.layers.{{}}.{hf}.weight", (_EMBED,), "attn" if name[0] == "a" else "mlp")
            for name, hf in family.norms.items()
        ),
        Weight("blocks.o", attention + "o_proj.weight", (_EMBED, _HEADS), "attn"),
        Weight("blocks.down", names["down"], (*each, _EMBED, _FF), "mlp"),
    ]
    if config.experts:
        rows.append(Weight("blocks.router", mlp + "gate.weight", (*each, _EMBED), "mlp"))
    for name, axes in (("q", _HEADS), ("k", _KV), ("v", _KV)):
        hf = attention + f"{family.tensor(name)}_proj.weight"
        rows.append(Weight(f"blocks.{name}", hf, (axes, _EMBED), "attn"))
        if config.qkv_bias:
            rows.append(Weight(f"blocks.{name}_bias", attention + f"{name}_proj.bias", (axes,), "attn"))
    for name in ("gate", "up"):
        rows.append(Weight(f"blocks.{name}", names[name], (*each, _FF, _EMBED), "mlp"))
        if config.mlp_bias:
            rows.append(Weight(f"blocks.{name}_bias", mlp + f"{name}_proj.bias", (_FF,), "mlp"))
    if config.mlp_bias:
        rows.append(Weight("blocks.down_bias", mlp + "down_proj.bias", (_EMBED,), "mlp"))
    if config.out_bias:
        rows.append(Weight("blocks.o_bias", attention + "o_proj.bias", (_EMBED,), "attn"))
    if config.qk_norm:
        for name, axes in (("q_norm", _HEADS), ("k_norm", _KV)):
            mine = axes if config.qk_norm == "all" else ("head_dim",)
            rows.append(Weight(f"blocks.{name}", attention + f"{name}.weight", (mine,), "attn"))
    rows.append(Weight("norm", "model.norm.weight", (_EMBED,)))
    if not config.tied:
        rows.append(Weight("head", "lm_head.weight", (("vocab",), _EMBED)))
    return tuple(rows)


def halves(config: ModelConfig) -> dict[str, Half]:
    """The half of a block that each of its weights belongs to, by the weight's name inside the block."""
    return {row.path.removeprefix("blocks."): row.half for row in table(config) if row.half is not None}


def offsets(config: ModelConfig) -> dict[str, int]:
    """By path: at which row of its file tensor, or of an expert's matrix in it, a weight begins."""
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
        first, *rest = row.hf_shape(config)
        together = (config.experts,) if row.of_experts and config.fused_experts else ()
        for layer in range(config.num_layers if row.stacked else 1):
            for name in row.names(config, layer):
                before = shapes[name][len(together)] if name in shapes else 0
                shapes[name] = (*together, before + first, *rest)
    return shapes


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
    for rows in parts.values():
        stacked = rows[0].stacked
        for layer in (range(config.num_layers) if layers is None else layers) if stacked else range(1):
            pieces = [np.asarray(weights[row.path][layer] if stacked else weights[row.path]) for row in rows]
            whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=max(pieces[0].ndim - 2, 0))
            apart = rows[0].of_experts and not config.fused_experts
            yield from zip(rows[0].names(config, layer), whole if apart else [whole], strict=True)
