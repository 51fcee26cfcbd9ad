"""Runs a model over batches of prompts and keeps what the tap returns: one compile per bucket and mesh.

The tap picks the sample's token inside the scan, so of a forward pass only [L, B, D] ever leaves the blocks.
`capture` scatters it into a buffer [L, N, D] that stays on the device; `stream` hands it over batch by batch, for
sweeps over more samples than can be stored.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcrit.data.batches import Batch
from jaxcrit.models.decoder import Decoder, forward
from jaxcrit.models.sites import Site, Tap
from jaxcrit.parallel.mesh import AnyMesh, batch_sharding

Position = Literal["last", "mean", "all"]
POSITIONS: tuple[str, ...] = get_args(Position)
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Activations:
    """Hidden states of every layer for every sample.

    Attributes:
        hidden: ``[L, N, D]`` float32 on the device; layer l's is the residual stream after block l.
        embed: ``[N, D]`` float32 embedding output, or None.
        units: ``[N]`` int, which prompt each sample comes from (with ``all``, several from one).
        seconds: wall time of the passes, compiles included.
        num_tokens: real tokens run.
        padded_tokens: tokens run with padding.
        num_buckets: distinct batch shapes.
    """

    hidden: jax.Array
    embed: jax.Array | None
    units: np.ndarray
    seconds: float
    num_tokens: int
    padded_tokens: int
    num_buckets: int


@dataclasses.dataclass(frozen=True, eq=False)
class States:
    """What one batch yields.

    Attributes:
        hidden: ``[L, B, D]`` float32, with ``all`` ``[L, B T, D]``; the embedding's in front where asked for.
        samples: ``[B]`` (``[B T]``) int32, which sample each is; -1 where it only fills the batch up.
    """

    hidden: jax.Array
    samples: np.ndarray


def stream(
    decoder: Decoder,
    batches: Sequence[Batch],
    num_prompts: int,
    *,
    mesh: Mesh,
    position: Position = "last",
    with_embed: bool = False,
    precision: str = "highest",
    progress: Progress | None = None,
) -> Iterator[States]:
    """Runs the model and yields each batch's states; arguments as those of `capture`.

    The next batch is not begun before the caller is done with this one's states, so two are never held.
    """
    lengths = _lengths(batches, num_prompts)
    counts = lengths if position == "all" else np.ones_like(lengths)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    done = 0
    for batch in batches:
        real = batch.rows < num_prompts
        samples: np.ndarray = np.full(batch.rows.shape, -1, np.int32)
        samples[real] = starts[batch.rows[real]]
        if position == "all":
            offsets = np.arange(batch.tokens.shape[1], dtype=np.int32)
            inside = real[:, None] & (offsets < batch.lengths[:, None])
            samples = np.where(inside, samples[:, None] + offsets, -1).reshape(-1)
        placed = jax.device_put((batch.tokens, batch.lengths), batch_sharding(mesh))
        with jax.default_matmul_precision(precision):
            hidden = _step(decoder, *placed, mesh=mesh, position=position, with_embed=with_embed)
        yield States(hidden.reshape(hidden.shape[0], -1, hidden.shape[-1]), samples)
        done += int(real.sum())
        if progress is not None:
            progress(done, num_prompts)


def capture(
    decoder: Decoder,
    batches: Sequence[Batch],
    num_prompts: int,
    *,
    mesh: Mesh,
    position: Position = "last",
    with_embed: bool = False,
    precision: str = "highest",
    progress: Progress | None = None,
) -> Activations:
    """Captures the residual stream after every block at the chosen token of each prompt.

    Args:
        decoder: the model, on the mesh.
        batches: right-padded prompts; every batch of one length has the same shape. Rows of ``num_prompts`` and
            above only fill a batch up.
        num_prompts: how many prompts the batches hold.
        mesh: batches are split over its ``data`` and ``fsdp`` axes.
        position: ``last`` prompt token, ``mean`` over the prompt's tokens, or ``all`` of them as samples.
        with_embed: keep the embedding output too.
        precision: matmul precision; only ``highest`` makes float32 exact on TPU and recent GPUs.
        progress: called with (prompts done, prompts in all).

    Returns:
        Activations, samples in the order of the rows (with ``all``, token by token within each prompt).
    """
    lengths = _lengths(batches, num_prompts)
    counts = lengths if position == "all" else np.ones_like(lengths)
    config = decoder.config
    everywhere = NamedSharding(mesh, PartitionSpec())
    shape = (config.num_layers + with_embed, int(counts.sum()), config.width)
    buffer = jax.device_put(jnp.zeros(shape, jnp.float32), everywhere)
    began = time.perf_counter()
    for states in stream(
        decoder,
        batches,
        num_prompts,
        mesh=mesh,
        position=position,
        with_embed=with_embed,
        precision=precision,
        progress=progress,
    ):
        # What only fills the batch up points past the end, where the scatter drops it.
        rows = np.where(states.samples < 0, shape[1], states.samples)
        buffer = _place(buffer, states.hidden, rows, everywhere)
        buffer.block_until_ready()
    return Activations(
        hidden=buffer[with_embed:],
        embed=buffer[0] if with_embed else None,
        units=np.repeat(np.arange(num_prompts), counts),
        seconds=time.perf_counter() - began,
        num_tokens=int(lengths.sum()),
        padded_tokens=sum(batch.tokens.size for batch in batches),
        num_buckets=len({batch.tokens.shape for batch in batches}),
    )


def compiled_steps() -> int:
    """How many programs the forward pass has compiled to in this process: at most one per bucket and mesh."""
    return _step._cache_size()  # type: ignore[attr-defined]


def _lengths(batches: Sequence[Batch], num_prompts: int) -> np.ndarray:
    """Tokens of each prompt."""
    lengths = np.zeros(num_prompts, np.int64)
    for batch in batches:
        real = batch.rows < num_prompts
        lengths[batch.rows[real]] = batch.lengths[real]
    return lengths


def forward_step(
    decoder: Decoder, tokens: jax.Array, lengths: jax.Array, *, mesh: AnyMesh, position: Position, with_embed: bool
) -> jax.Array:
    """Tapped states of one batch, ``[L, B, D]`` (``[L, B, T, D]`` for ``all``) float32, the embedding's in front."""

    def read(site: Site, before: jax.Array, x: jax.Array, positions: jax.Array) -> jax.Array:
        if position == "last":
            x = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
        x = x.astype(jnp.float32)
        if position == "mean":
            inside = jnp.arange(tokens.shape[1]) < lengths[:, None]
            x = jnp.sum(jnp.where(inside[..., None], x, 0), axis=1) / lengths[:, None]
        return x

    tap = Tap(read, ("embed", "block") if with_embed else ("block",))
    taps = forward(decoder, tokens, lengths=lengths, tap=tap, mesh=mesh).taps
    return jnp.concatenate([taps["embed"][None], taps["block"]]) if with_embed else taps["block"]


_step = jax.jit(forward_step, static_argnames=("mesh", "position", "with_embed"))


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="buffer")
def _place(buffer: jax.Array, states: jax.Array, rows: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Puts states into their rows; apart from `_step`, which would else compile anew for every number of samples."""
    return jax.lax.with_sharding_constraint(buffer.at[:, rows].set(states, mode="drop"), sharding)
