"""A training whose layers are chosen anew on the way: segments, each with a static partition.

A mask over all layers would be data, but would take gradients and moments of every layer. A partition that is static
keeps what freezing saves and costs one compile for each distinct choice. At a boundary the trained values go into the
model, the new layers are taken out of it, and moments stay with the layers that stay.

A checkpoint holds all layers that were trained so far, for those that left are no longer the model's own, and the
moments of those that train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcrit.models.partition import TRAIN, Bank, Partition, Selection, carried, joined
from jaxcrit.training.checkpoints import Checkpoints, NoCheckpoints
from jaxcrit.training.step import State


@dataclasses.dataclass(frozen=True, eq=False)
class Reselection:
    """How layers are chosen anew.

    Attributes:
        every: steps between choices.
        choose: function of all that was trained so far and the number of steps taken that gives what trains from there
            on; it must depend on nothing else, for a training that goes on asks again.
        tell: told the choices so far, whenever there is one more.
    """

    every: int
    choose: Callable[[Changed, int], Partition]
    tell: Callable[[list[Selection]], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Changed:
    """All that was trained so far.

    Attributes:
        parts: partition in which all of it trains.
        params: values, float32.
    """

    parts: Partition
    params: Bank

    def further(self, parts: Partition, params: Bank) -> Changed:
        """This with what has been trained since."""
        whole = joined([self.parts, parts])
        if whole == parts:
            return Changed(parts, params)
        like = {path: (len(whole.layers), *value.shape[1:]) for path, value in params[TRAIN].items()}
        into = {
            path: jnp.zeros(like[path] if path.startswith("blocks.") else value.shape, value.dtype)
            for path, value in params[TRAIN].items()
        }
        into = carried(self.params[TRAIN], self.parts, into, whole)
        return Changed(whole, {TRAIN: carried(params[TRAIN], parts, into, whole)})

    def merged(self, weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Weights with it, in arrays of their own where they differ."""
        return self.parts.merge(weights, self.params, held=set(weights))

    def within(self, parts: Partition, params: Bank) -> Bank:
        """Parameters of a partition, with the values of this where it has some."""
        return {TRAIN: carried(self.params[TRAIN], self.parts, params[TRAIN], parts)}


@dataclasses.dataclass(frozen=True, eq=False)
class WholeCheckpoints:
    """Checkpoints of a segment, which hold what was trained before it too.

    Attributes:
        inner: where they go.
        before: what was trained before the segment; None in the first.
        parts: what trains in it.
        chosen: the choices so far.
    """

    inner: Checkpoints | NoCheckpoints
    before: Changed | None
    parts: Partition
    chosen: list[Selection]

    @property
    def path(self) -> Any:
        """As of `Checkpoints`."""
        return self.inner.path

    @property
    def last(self) -> int | None:
        """As of `Checkpoints`."""
        return self.inner.last

    def changed(self, state: State) -> Changed:
        """All that was trained up to a state of the segment."""
        now = Changed(self.parts, state.params)
        return now if self.before is None else self.before.further(self.parts, state.params)

    def save(self, state: State, meta: Mapping[str, Any], loss: float | None = None) -> None:
        """As of `Checkpoints`."""
        whole = dataclasses.replace(state, params=self.changed(state).params)
        self.inner.save(whole, {**meta, "selections": self.chosen}, loss)

    def wait(self) -> None:
        """As of `Checkpoints`."""
        self.inner.wait()


def selections(chosen: Sequence[Partition], every: int) -> list[Selection]:
    """Choices as files have them: the layers that train after so many steps."""
    return [{"step": number * every, "layers": list(one.layers)} for number, one in enumerate(chosen)]


def carried_moments(before: Any, old: Partition, fresh: Any, new: Partition) -> Any:
    """The optimizer's state for a partition, with counts, and the moments of layers that stay, from another's.

    Args:
        before: state for ``old``.
        old: partition.
        fresh: state for ``new`` before its first step; moments of layers that enter are these.
        new: partition.
    """

    def carry(keys: tuple[Any, ...], now: jax.Array, then: jax.Array) -> jax.Array:
        path = str(getattr(keys[-1], "key", ""))
        stacked = path.startswith("blocks.") and now.shape[:1] == (len(new.layers),)
        if not stacked or then.shape[:1] != (len(old.layers),):
            return then
        return jax.device_put(carried({path: then}, old, {path: now}, new)[path], now.sharding)

    return jax.tree_util.tree_map_with_path(carry, fresh, before)
