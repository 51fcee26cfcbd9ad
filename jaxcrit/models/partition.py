"""Which parameters train: a static map from each layer to a slot of a group, and the arrays parted accordingly.

A *bank* is ``{group: {weight-table path: array}}``. Weights of blocks are stacked over the layers of their group.
Trained groups hold float32 masters, the frozen group is in the compute dtype. A gradient is taken of the trained
groups and of nothing else, so a frozen layer costs no gradient and no optimizer state, and what lies below the
lowest trained layer no backward pass. With adapters (`jaxcrit.models.lora`) all blocks are in the frozen group, and
a trained group holds the adapters of its layers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import span
from jaxcrit.core.schema import Count, Positive, Size
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.lora import Lora
from jaxcrit.models.weights import placement, table
from jaxcrit.parallel.mesh import AnyMesh

FROZEN, TRAIN = "frozen", "train"
OUTSIDE = ("embed", "norm", "head")
Arrays = dict[str, Any]
Bank = dict[str, Arrays]


class LoraRecord(TypedDict):
    """Adapters in ``trained`` of ``run.json``."""

    rank: Size
    alpha: Positive
    targets: list[str]


class Selection(TypedDict):
    """The layers that train from a step on, where a training chooses them anew."""

    step: Count
    layers: list[Count]


class TrainedRequired(TypedDict):
    """What trains, as ``run.json`` has it."""

    layers: list[Count]
    outside: list[Literal["embed", "norm", "head"]]


class TrainedRecord(TrainedRequired, total=False):
    """With what may be left out."""

    rates: list[Positive]
    lora: LoraRecord
    gain: str
    selections: list[Selection]


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive layers of one group.

    Attributes:
        group: theirs.
        slot: place of the first in the group's stacks.
        layers: half-open range.
    """

    group: str
    slot: int
    layers: range

    @property
    def slots(self) -> np.ndarray:
        """``[n]`` int32 places of the layers in the group's stacks."""
        return np.arange(self.slot, self.slot + len(self.layers), dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Partition:
    """The group of everything; hashable, so it can be static in a compiled function.

    Attributes:
        config: config of the model.
        groups: by layer, ``frozen``, ``train``, or a further trained group.
        outside: weights outside the blocks that train (in the group ``train``), of `OUTSIDE`.
        rates: by trained group, the factor on the learning rate.
        lora: the adapters that train in the blocks, or None where the blocks themselves do.
    """

    config: ModelConfig
    groups: tuple[str, ...]
    outside: frozenset[str]
    rates: tuple[tuple[str, float], ...]
    lora: Lora | None = None

    @property
    def trained(self) -> tuple[str, ...]:
        """The groups that train."""
        return tuple(name for name, _ in self.rates)

    @property
    def outside_asked(self) -> frozenset[str]:
        """What trains outside the blocks as `partition` takes it: with a tied head's embedding also that head."""
        return self.outside | ({"head"} if self.config.tied and "embed" in self.outside else frozenset())

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers in which something trains."""
        return tuple(layer for layer, group in enumerate(self.groups) if group != FROZEN)

    def members(self, group: str) -> tuple[int, ...]:
        """Layers of a group, ascending: the layer of each slot."""
        return tuple(layer for layer, name in enumerate(self.groups) if name == group)

    def blocks(self, group: str) -> tuple[int, ...]:
        """Layers whose blocks lie in a group, ascending: its members, but with adapters all are in the frozen one."""
        if self.lora is None:
            return self.members(group)
        return tuple(range(self.config.num_layers)) if group == FROZEN else ()

    def runs(self) -> list[Run]:
        """Layers in order, cut where the group changes."""
        filled: dict[str, int] = {}
        runs, layer = [], 0
        for group, same in itertools.groupby(self.groups):
            count = len(list(same))
            slot = layer if self.lora and group == FROZEN else filled.get(group, 0)
            runs.append(Run(group, slot, range(layer, layer + count)))
            filled[group] = filled.get(group, 0) + count
            layer += count
        return runs

    def shapes(self) -> dict[str, dict[str, tuple[tuple[str, ...], tuple[int, ...]]]]:
        """By group and path, logical axes and shape of each array of the bank."""
        found: dict[str, dict[str, tuple[tuple[str, ...], tuple[int, ...]]]] = {}
        for row in table(self.config):
            if not row.stacked:
                found.setdefault(self._outside(row.path), {})[row.path] = (row.axes, row.shape(self.config))
                continue
            for group in (FROZEN, *self.trained):
                if layers := self.blocks(group):
                    shape = (len(layers), *row.shape(self.config)[1:])
                    found.setdefault(group, {})[row.path] = (row.axes, shape)
        for group in self.trained:
            if self.lora and (layers := self.members(group)):
                found.setdefault(group, {}).update(self.lora.shapes(self.config, len(layers)))
        return {group: found.get(group, {}) for group in (FROZEN, *self.trained)}

    def abstract(self, mesh: AnyMesh, dtype: Any) -> Bank:
        """The bank as `jax.ShapeDtypeStruct` with shardings: float32 where trained, else the compute dtype."""
        return {
            group: {
                path: jax.ShapeDtypeStruct(
                    shape,
                    dtype if group == FROZEN else jnp.float32,
                    sharding=NamedSharding(mesh, placement(axes, self.config, mesh, path)),
                )
                for path, (axes, shape) in entries.items()
            }
            for group, entries in self.shapes().items()
        }

    def gather(self, weights: dict[str, jax.Array], mesh: Mesh, dtype: Any, seed: int = 0) -> Bank:
        """Parts loaded weights into a bank; empties ``weights``, so that no more than one weight exists twice.

        Args:
            weights: by weight-table path, stacked ``[L, ...]``, as loaded.
            mesh: they lie on.
            dtype: compute dtype, of the frozen group.
            seed: seed of the adapters.
        """
        bank = self.abstract(mesh, dtype)
        for row in table(self.config):
            whole = weights.pop(row.path)
            for group, entries in bank.items():
                if row.path in entries:
                    like = entries[row.path]
                    slots = np.asarray(self.blocks(group), np.int32)
                    part = whole if like.shape == whole.shape else _take(whole, slots)
                    # A copy even where nothing changes: the step donates the trained arrays.
                    part = jnp.array(part, like.dtype, copy=group != FROZEN)
                    entries[row.path] = jax.device_put(part, like.sharding)
        for group in self.trained:
            if self.lora and (layers := self.members(group)):
                for path, value in self.lora.initial(self.config, layers, seed).items():
                    bank[group][path] = jax.device_put(np.asarray(value), bank[group][path].sharding)
        return bank

    def changed(
        self, weights: Mapping[str, jax.Array], trained: Mapping[str, Arrays]
    ) -> Iterator[tuple[str, np.ndarray | None, jax.Array]]:
        """What training has made of weights: path, layers (None outside the blocks), new values in float32."""
        for group, entries in trained.items():
            layers = np.asarray(self.members(group), np.int32)
            for path, value in entries.items():
                if not path.startswith("blocks."):
                    yield path, None, value
                elif self.lora is None:
                    yield path, layers, value
            if self.lora and len(layers):
                for path, change in self.lora.changes(self.config, entries):
                    yield path, layers, _take(weights[path], layers).astype(jnp.float32) + change

    def merge(
        self, weights: Mapping[str, jax.Array], trained: Mapping[str, Arrays], *, held: Collection[str] = ()
    ) -> dict[str, jax.Array]:
        """Loaded weights ``[L, ...]`` with the trained ones in their places, in the dtype of the former.

        Args:
            weights: arrays by weight-table path.
            trained: trained groups.
            held: paths whose arrays somebody else holds: they stay as they are, and those of all other paths are given
                away for the result.
        """
        merged = dict(weights)
        for path, layers, value in self.changed(merged, trained):
            whole = merged[path]
            put = _put_copy if path in held else _put
            merged[path] = value.astype(whole.dtype) if layers is None else put(whole, layers, value)
        return merged

    def to_json(self) -> dict[str, Any]:
        """What trains, as ``run.json`` has it; `partition_of_json` reads it."""
        rates, layers = dict(self.rates), [layer for layer, group in enumerate(self.groups) if group != FROZEN]
        told: dict[str, Any] = {"layers": layers, "outside": sorted(self.outside)}
        factors = [rates[self.groups[layer]] for layer in layers]
        if set(factors) - {1.0}:
            told["rates"] = factors
        return told if self.lora is None else told | {"lora": dataclasses.asdict(self.lora)}

    def _outside(self, path: str) -> str:
        return TRAIN if path in self.outside else FROZEN


def partition(
    config: ModelConfig,
    layers: Collection[int],
    outside: Collection[str] = (),
    factors: Mapping[int, float] | None = None,
    lora: Lora | None = None,
) -> Partition:
    """Parts a model.

    Args:
        config: config of the model.
        layers: that train.
        outside: what trains outside the blocks: some of ``embed``, ``norm`` (the final one), ``head``.
        factors: by trained layer, a factor on its learning rate (default 1); layers of one factor are one group.
        lora: train such adapters in these layers, not the layers.

    Raises:
        UserError: nothing trains, a layer is outside the model, or a tied head is to train without its embedding.
    """
    factors = factors or {}
    if config.tied and ("head" in outside) != ("embed" in outside):
        raise UserError(
            "the output head of this model is its embedding (tied); train both with --train_embeddings --train_head,"
            " or neither"
        )
    beyond = sorted(set(layers) - set(range(config.num_layers)))
    if beyond:
        raise UserError(f"expected layers 0 to {config.num_layers - 1}, got {span(beyond)}")
    if not layers and not outside:
        raise UserError("nothing is left to train; choose other --layers, or train embeddings, norms or head")
    others = sorted({factors.get(layer, 1.0) for layer in layers} - {1.0})
    names = {1.0: TRAIN} | {factor: f"{TRAIN}_{number}" for number, factor in enumerate(others, 1)}
    chosen = set(layers)
    groups = tuple(names[factors.get(layer, 1.0)] if layer in chosen else FROZEN for layer in range(config.num_layers))
    trains = frozenset(outside) - ({"head"} if config.tied else set())
    rates = tuple((name, factor) for factor, name in names.items() if name in groups or (name == TRAIN and trains))
    return Partition(config, groups, trains, rates, lora)


def partition_of_json(config: ModelConfig, told: Mapping[str, Any]) -> Partition:
    """The partition that `Partition.to_json` told of, a `TrainedRecord`.

    Raises:
        UserError: it is of another model.
    """
    layers, lora = told["layers"], told.get("lora")
    rates = told.get("rates", [1.0] * len(layers))
    if len(rates) != len(layers):
        raise UserError(f"expected as many rates as layers in trained, got {len(rates)} and {len(layers)}")
    factors = dict(zip(layers, rates, strict=True))
    adapters = None if lora is None else Lora(lora["rank"], lora["alpha"], tuple(lora["targets"]))
    outside = set(told["outside"])
    if config.tied and "embed" in outside:  # what is told names arrays, and a tied head is none
        outside.add("head")
    return partition(config, layers, outside, factors, adapters)


def joined(parts: Sequence[Partition]) -> Partition:
    """The partition in which everything trains that trains in one of some, all at one rate, whole."""
    return partition(parts[-1].config, {layer for one in parts for layer in one.layers}, parts[-1].outside_asked)


def carried(values: Mapping[str, Any], source: Partition, into: Mapping[str, Any], target: Partition) -> dict[str, Any]:
    """Arrays of one partition's group ``train``, with those of another's in the places of the layers that both have.

    Args:
        values: by weight-table path, of ``source``.
        source: partition.
        into: by weight-table path, of ``target``; arrays are not changed.
        target: partition.
    """
    ours, theirs = source.members(TRAIN), target.members(TRAIN)
    both = [layer for layer in theirs if layer in ours]
    taken = np.asarray([ours.index(layer) for layer in both], np.int32)
    slots = np.asarray([theirs.index(layer) for layer in both], np.int32)
    found = dict(into)
    for path, value in values.items():
        if not path.startswith("blocks."):
            found[path] = value
        elif both:
            found[path] = _put_copy(into[path], slots, _take(value, taken))
    return found


def split(bank: Bank) -> tuple[Bank, Arrays]:
    """The trained groups, and the frozen one."""
    return {group: entries for group, entries in bank.items() if group != FROZEN}, bank[FROZEN]


def size(arrays: Any) -> int:
    """Bytes of every array of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


@jax.jit
def _take(whole: jax.Array, slots: jax.Array) -> jax.Array:
    return whole[slots]


def _placed(whole: jax.Array, slots: jax.Array, part: jax.Array) -> jax.Array:
    return whole.at[slots].set(part.astype(whole.dtype))


_put = jax.jit(_placed, donate_argnums=0)
_put_copy = jax.jit(_placed)
