"""How far training has moved each layer from the model it began with: its weights, and the states of fixed rows."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxcrit.models.partition import FROZEN, Arrays, Bank, Partition
from jaxcrit.models.sites import Tap
from jaxcrit.parallel.mesh import AnyMesh
from jaxcrit.similarity import DegenerateError, cka
from jaxcrit.training.forward import Edited, layer_states
from jaxcrit.training.objectives import TokenBatch

ROWS = 32  # of the probe


def share(every: int, step_rows: int, rows: int = ROWS) -> float:
    """What measures cost, at most, of the work of the steps, where rows are about as long in both.

    A measure is a forward pass without the head over the probe; a step takes at least one over its own rows.
    """
    return rows / (every * step_rows)


class Drift:
    """Measures each layer against the model that the training began with, of which it keeps what trains, in float32.

    Of weights the relative change ``||now - before|| / ||before||`` over all tensors of the layer; of states debiased
    CKA between before and now, behind the layer at the last prompt token of the probe's rows.
    """

    def __init__(
        self,
        every: int,
        probe: Sequence[tuple[np.ndarray, TokenBatch]],
        count: int,
        parts: Partition,
        *,
        dtype: Any,
        mesh: AnyMesh,
        edit: Edited | None = None,
    ):
        """Takes the probe; `begin` takes what drift is from.

        Args:
            every: steps between measures.
            probe: batches of N rows as `batches_of` gives them: places of the rows, N for one that only fills up.
            count: N.
            parts: what trains.
            dtype: compute dtype.
            mesh: mesh.
            edit: see `hidden_states`.
        """
        self.every, self._probe, self._count = every, probe, count
        everywhere = NamedSharding(mesh, PartitionSpec())
        states = functools.partial(last_prompt_states, parts, dtype=dtype, mesh=mesh, edit=edit)
        self._states = jax.jit(states, out_shardings=everywhere)
        self._norms = jax.jit(functools.partial(squared_norms, parts), out_shardings=everywhere)
        self._weights: Bank | None = None
        self._before: Any = None

    def begin(self, params: Bank, frozen: Arrays) -> None:
        """Keeps the model before the first step; every call but the first does nothing."""
        if self._weights is None:
            self._weights = jax.tree.map(jnp.copy, params)
            self._before = self._probed(params, frozen)

    def measure(self, frozen: Arrays, params: Bank) -> dict[str, Any]:
        """What a row of ``metrics.jsonl`` says: ``weights`` and ``cka``, by layer; None where CKA is not defined."""
        began = time.perf_counter()
        squares = np.asarray(self._norms(self._weights, params, frozen), np.float64)
        weights = np.sqrt(squares[0] / np.maximum(squares[1], np.finfo(np.float32).tiny))
        try:
            alike = cka(self._before, other=self._probed(params, frozen), bias="debiased").diagonal().tolist()
        except DegenerateError:
            alike = None
        return {"weights": weights.tolist(), "cka": alike, "seconds": round(time.perf_counter() - began, 4)}

    def _probed(self, params: Bank, frozen: Arrays) -> np.ndarray:
        """``[L, N, D]`` float32, states of the probe."""
        found: np.ndarray | None = None
        for places, batch in self._probe:
            states, real = np.asarray(self._states(params, frozen, batch)), places < self._count
            if found is None:
                found = np.zeros((states.shape[0], self._count, states.shape[2]), np.float32)
            found[:, places[real]] = states[:, real]
        assert found is not None
        return found


def last_prompt_states(
    parts: Partition, params: Bank, frozen: Arrays, batch: TokenBatch, *, dtype: Any, mesh: AnyMesh, edit: Edited | None
) -> jax.Array:
    """``[L, B, D]`` float32, behind every block at the last token before the response; one pass without the head."""
    at = jnp.maximum(jnp.argmax(batch.learn, axis=1) - 1, 0)
    tap = Tap(lambda site, before, after, positions: after[jnp.arange(len(at)), at].astype(jnp.float32), ("block",))
    how: dict[str, Any] = {"dtype": dtype, "remat": False, "mesh": mesh, "edit": edit, "tap": tap}
    last = parts.config.num_layers - 1
    _, taps = layer_states(parts, {**params, FROZEN: frozen}, batch.tokens, batch.lengths, [last], **how)
    return jnp.concatenate([read["block"] for read in taps])


def squared_norms(parts: Partition, before: Bank, params: Bank, frozen: Arrays) -> jax.Array:
    """``[2, L]`` float32, sums over a layer's tensors: of the change, and of what was there before; 0 where frozen."""
    found = jnp.zeros((2, parts.config.num_layers), jnp.float32)
    for group in parts.trained:
        layers = np.asarray(parts.members(group), np.int32)
        if parts.lora is None:
            old = {path: value for path, value in before[group].items() if path.startswith("blocks.")}
            changes = {path: params[group][path] - value for path, value in old.items()}
        else:
            old = {path: value[layers] for path, value in frozen.items() if path.startswith("blocks.")}
            changes = dict(parts.lora.changes(parts.config, params[group])) if len(layers) else {}
        for row, arrays in enumerate((changes, old)):
            for value in arrays.values():
                squares = jnp.sum(jnp.square(value.astype(jnp.float32)), axis=tuple(range(1, value.ndim)))
                found = found.at[row, layers].add(squares)
    return found
