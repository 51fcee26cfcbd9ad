"""The passes that criteria share: weights streamed from the checkpoint, one forward pass, one backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError
from jaxcrit.criteria.block_influence import influence
from jaxcrit.criteria.lens_kl import divergence
from jaxcrit.data.batches import make_batches, response_mask
from jaxcrit.data.templates import Example
from jaxcrit.evidence.measured import Gradients, Spectra, States, WeightChanges
from jaxcrit.models.decoder import Decoder, forward
from jaxcrit.models.model import Model
from jaxcrit.models.partition import FROZEN, TRAIN, Arrays, Bank, Partition, partition
from jaxcrit.models.sites import Site, Tap
from jaxcrit.models.weights import offsets, sizes, table
from jaxcrit.parallel.mesh import batch_sharding
from jaxcrit.training.step import TokenBatch, batch_loss

Progress = Callable[[int, int], None]


def layer_tensors(session: Model) -> Iterator[dict[str, np.ndarray]]:
    """Every layer's tensors by weight-table path, float32, two dimensions at most as in the file; no model is built.

    Of a fine-tuning run, what it trained stands in place of the checkpoint's.

    Raises:
        UserError: a tensor holds NaN or infinity.
    """
    config, begin = session.config, offsets(session.config)
    rows = [row for row in table(config) if row.stacked]
    for layer in range(config.num_layers):
        tensors = {}
        for row in rows:
            shape = row.hf_shape(config)
            part = slice(begin[row.path], begin[row.path] + shape[0])
            name = row.hf.format(layer)
            tensors[row.path] = session.checkpoint.read(name, part, None).astype(np.float32)
            if not np.isfinite(tensors[row.path]).all():
                raise UserError(f"{session.checkpoint.path}: NaN or infinite values in {name}; weights are damaged")
        for tuned in session.overlays:
            group, lora = tuned.partition.groups[layer], tuned.partition.lora
            if group == FROZEN:
                continue
            slot = tuned.partition.members(group).index(layer)
            mine = {path: value[slot : slot + 1] for path, value in tuned.params[group].items() if _inside(path)}
            for path, value in mine.items() if lora is None else lora.changes(config, mine):
                found = np.asarray(processes.whole(value), np.float32).reshape(tensors[path].shape)
                tensors[path] = found if lora is None else tensors[path] + found
        yield tensors


def _inside(path: str) -> bool:
    """Whether a weight is of the blocks."""
    return path.startswith("blocks.")


def weight_spectra(session: Model, progress: Progress | None = None) -> Spectra:
    """Singular values of every matrix, decomposed in float32; one layer's weights are held at a time."""
    shapes: dict[str, tuple[int, int]] = {}
    values: dict[str, list[np.ndarray]] = {}
    for layer, tensors in enumerate(layer_tensors(session)):
        for path, matrix in tensors.items():
            if matrix.ndim == 2:
                shapes[path] = (matrix.shape[0], matrix.shape[1])
                values.setdefault(path, []).append(np.linalg.svd(matrix, compute_uv=False))
        if progress is not None:
            progress(layer + 1, session.config.num_layers)
    return Spectra(shapes, {path: np.stack(found) for path, found in values.items()})


def weight_changes(base: Model, tuned: Model, progress: Progress | None = None) -> WeightChanges:
    """How far the tuned model's blocks are from the base's; one layer of each is held at a time.

    Raises:
        UserError: the two are of different shapes.
    """
    if sizes(base.config) != sizes(tuned.config):
        differ = [name for name, size in sizes(base.config).items() if size != sizes(tuned.config)[name]]
        raise UserError(
            f"--base and --model: expected models of one shape, but they differ in {', '.join(differ)}"
            f" ({', '.join(f'{sizes(base.config)[n]} and {sizes(tuned.config)[n]}' for n in differ)})"
        )
    norms = []
    for layer, (before, after) in enumerate(zip(layer_tensors(base), layer_tensors(tuned), strict=True)):
        if before.keys() != after.keys():
            raise UserError(f"--base and --model: expected the same tensors, layer {layer} differs in"
                            f" {', '.join(sorted(before.keys() ^ after.keys()))}")  # fmt: skip
        norms.append((_norm(after[path].astype(np.float64) - before[path] for path in before),
                      _norm(value.astype(np.float64) for value in before.values())))  # fmt: skip
        if progress is not None:
            progress(layer + 1, base.config.num_layers)
    apart, of_base = np.array(norms).T
    return WeightChanges(apart, of_base)


def _norm(arrays: Iterator[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.vdot(array, array) for array in arrays)))


def prompt_states(
    session: Model,
    decoder: Decoder,
    examples: Sequence[Example],
    batch_size: int,
    *,
    lens: bool,
    precision: str = "highest",
    progress: Progress | None = None,
) -> States:
    """Runs the prompts forward once.

    Args:
        session: of the model.
        decoder: its weights.
        examples: N rendered rows; their responses are left out.
        batch_size: prompts per pass.
        lens: read every layer with final norm and head too, which costs L heads.
        precision: of matrix products.
        progress: called with (prompts done, prompts in all).
    """
    config, count = session.config, len(examples)
    hidden = np.zeros((config.num_layers + 1, count, config.width), np.float32)
    turned, read, tokens = np.zeros((count, config.num_layers)), np.zeros((count, config.num_layers)), np.zeros(count)
    done = 0
    for batch in make_batches(examples, batch_size, max_length=config.max_length):
        placed = jax.device_put((batch.tokens, batch.lengths), batch_sharding(session.mesh))
        with jax.default_matmul_precision(precision):
            states, summed, kl = processes.whole(_states(decoder, *placed, lens=lens, mesh=session.mesh))
        real = batch.rows < count
        rows = batch.rows[real]
        hidden[:, rows], turned[rows], read[rows] = states[:, real], summed.T[real], kl.T[real]
        tokens[rows] = batch.lengths[real]
        done += len(rows)
        if progress is not None:
            progress(done, count)
    return States(hidden, turned, tokens.astype(int), read if lens else None)


@functools.partial(jax.jit, static_argnames=("lens", "mesh"))
def _states(
    decoder: Decoder, tokens: jax.Array, lengths: jax.Array, *, lens: bool, mesh: Mesh
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Last states ``[L+1, B, D]``, `influence` summed over the tokens and KL of the lens ``[L, B]`` each."""
    inside = jnp.arange(tokens.shape[1]) < lengths[:, None]

    def last(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0].astype(jnp.float32)

    def read(site: Site, before: jax.Array, after: jax.Array, positions: jax.Array) -> Any:
        if site == "embed":
            return last(after)
        return last(after), jnp.sum(jnp.where(inside, influence(before, after), 0), axis=1)

    taps = forward(decoder, tokens, lengths=lengths, tap=Tap(read, ("embed", "block")), mesh=mesh).taps
    states, turned = taps["block"]
    kl = divergence(decoder, states) if lens else jnp.zeros_like(turned)
    return jnp.concatenate([taps["embed"][None], states]), turned, kl


def response_gradients(
    session: Model,
    decoder: Decoder,
    examples: Sequence[Example],
    batch_size: int,
    *,
    per_sample: bool,
    precision: str = "highest",
    progress: Progress | None = None,
) -> Gradients:
    """Runs the rows forward and backward once.

    Per sample, rows go one by one through a compiled step per width: as many operations, less parallel. Two gradients
    of all blocks are held, float32.

    Args:
        session: of the model.
        decoder: its weights.
        examples: N rendered rows with responses.
        batch_size: rows per pass.
        per_sample: keep each row's squared norm.
        precision: of matrix products.
        progress: called with (rows done, rows in all).
    """
    config, count = session.config, len(examples)
    parts = partition(config, range(config.num_layers))
    weights = decoder.weights()
    blocks = {path: value for path, value in weights.items() if _inside(path)}
    rest = {path: value for path, value in weights.items() if path not in blocks}
    total: Arrays = {path: jnp.zeros(value.shape, jnp.float32, device=value.sharding) for path, value in blocks.items()}
    samples, tokens, done = np.zeros((count, config.num_layers)), 0, 0
    for batch in make_batches(examples, batch_size, prompt_only=False, max_length=config.max_length):
        rows = TokenBatch(batch.tokens, batch.lengths, response_mask(batch, examples))
        tokens += int(rows.learn[:, 1:].sum())
        with jax.default_matmul_precision(precision):
            grouped = _grouped(rows, per_sample, session)
            total, squares = _gradients(parts, {TRAIN: blocks, FROZEN: rest}, total, grouped)
        real = batch.rows < count
        if per_sample:
            samples[batch.rows[real]] = processes.whole(squares)[real]
        done += int(real.sum())
        if progress is not None:
            progress(done, count)
    held = sum(int(np.prod(value.shape[1:])) for value in blocks.values())
    return Gradients(
        np.sqrt(np.asarray(processes.whole(_squares(total)), np.float64)) / tokens,
        np.sqrt(np.asarray(processes.whole(_squares(blocks)), np.float64)),
        np.full(config.num_layers, held),
        samples if per_sample else None,
    )


def _grouped(rows: TokenBatch, per_sample: bool, session: Model) -> TokenBatch:
    """``[groups, rows of a group, T]``; rows of a group are split over the mesh."""
    size = 1 if per_sample else len(rows.tokens)
    cut = jax.tree.map(lambda part: part.reshape(-1, size, *part.shape[1:]), rows)
    if per_sample:
        return cut
    spec = jax.sharding.PartitionSpec(None, *batch_sharding(session.mesh).spec)
    return jax.device_put(cut, jax.sharding.NamedSharding(session.mesh, spec))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _gradients(parts: Partition, bank: Bank, total: Arrays, batch: TokenBatch) -> tuple[Arrays, jax.Array]:
    """Adds the gradient of the batch's summed loss to ``total``; and the squared norms ``[groups, L]``."""

    def loss(blocks: Arrays, rows: TokenBatch) -> jax.Array:
        given = {TRAIN: blocks, FROZEN: bank[FROZEN]}
        return batch_loss(parts, given, rows, dtype=bank[FROZEN]["embed"].dtype).loss

    def add(total: Arrays, rows: TokenBatch) -> tuple[Arrays, jax.Array]:
        gradient = jax.grad(loss)(bank[TRAIN], rows)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradient), _squares(gradient)

    return jax.lax.scan(add, total, batch)


@jax.jit
def _squares(blocks: Arrays) -> jax.Array:
    """``[L]`` float32, squares summed over the weights of each layer."""
    each = [jnp.sum(jnp.square(value.astype(jnp.float32)), axis=range(1, value.ndim)) for value in blocks.values()]
    return jnp.sum(jnp.stack(each), axis=0)
