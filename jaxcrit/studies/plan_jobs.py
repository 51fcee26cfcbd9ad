"""The programs that a plan is about: what they take, as shapes with shardings, and how to compile them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxcrit.capture import forward_step
from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerSpec, resolve
from jaxcrit.models.checkpoint import DTYPES
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.weights import abstract
from jaxcrit.parallel.accounting import shard_bytes
from jaxcrit.parallel.mesh import AnyMesh, batch_sharding
from jaxcrit.training.optimizer import make_optimizer, make_schedule
from jaxcrit.training.partition import FROZEN, OUTSIDE, Partition, partition, split
from jaxcrit.training.step import TokenBatch, abstract_state, make_step, state_shardings


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """What is to run.

    Attributes:
        job: a key of `JOBS`.
        layers, mode, optimizer, dtype, remat: as of `FinetuneConfig`; layers by number or rule, not by score.
        batch_size: rows, over all devices.
        length: tokens of a row.
    """

    job: str = "finetune"
    layers: str = "all"
    mode: str = "only"
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    remat: bool = True
    batch_size: int = 32
    length: int = 1024


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled unit of a job.

    Attributes:
        function: jitted.
        arguments: of it, abstract.
        kinds: what stays in memory, by kind, for the table.
        passes: how often it reads the weights: forward, again for the backward pass, and once more to recompute.
        moved: bytes of a device's memory that it reads and writes at least.
        temporaries: bytes that it needs besides, estimated from shapes.
    """

    function: Any
    arguments: tuple[Any, ...]
    kinds: Mapping[str, Any]
    passes: int
    moved: int
    temporaries: int


def _rows(mesh: AnyMesh) -> int:
    return int(mesh.shape["data"] * mesh.shape["fsdp"])


def _block_bytes(model: ModelConfig, config: JobConfig, mesh: AnyMesh, dtype: Any) -> int:
    """Activations of one block on one device: attention scores in float32, or the MLP's inside, whichever is more."""
    size = np.dtype(dtype).itemsize
    rows, tensor = max(1, config.batch_size // _rows(mesh)), mesh.shape["tensor"]
    scores = 2 * 4 * rows * model.num_heads // tensor * config.length**2
    inside = 3 * size * rows * config.length * model.ff_width // tensor
    weights = (
        sum(leaf.size for path, leaf in abstract(model).weights().items() if path.startswith("blocks."))
        // model.num_layers
    )  # gathered from the other devices to be used
    return max(scores, inside) + 3 * size * rows * config.length * model.width + size * weights // tensor


def _analyze(model: ModelConfig, config: JobConfig, mesh: AnyMesh) -> Program:
    decoder = abstract(model, DTYPES[config.dtype], mesh)
    place = batch_sharding(mesh)
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.length), jnp.int32, sharding=place)
    lengths = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32, sharding=place)

    @jax.jit
    def run(decoder: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        return forward_step(decoder, tokens, lengths, mesh=mesh, position="last", with_embed=False)

    weights = shard_bytes(decoder)
    kinds = {"weights": decoder, "batch": (tokens, lengths)}
    return Program(run, (decoder, tokens, lengths), kinds, 1, weights,
                   _block_bytes(model, config, mesh, DTYPES[config.dtype]))  # fmt: skip


def partition_for(model: ModelConfig, config: JobConfig) -> Partition:
    """What ``--layers`` and ``--mode`` train."""
    spec = LayerSpec.parse(config.layers)
    if spec.needs_scores:
        raise UserError(f"--layers={config.layers}: planning looks at no data; name layers, or first:K, random:K, all")
    chosen = resolve(spec, model.num_layers)
    layers = chosen.layers if config.mode == "only" else chosen.complement()
    everything = config.mode == "freeze" or len(layers) == model.num_layers
    return partition(model, layers, set(OUTSIDE) if everything else ())


def _finetune(model: ModelConfig, config: JobConfig, mesh: AnyMesh) -> Program:
    dtype = DTYPES[config.dtype]
    parts = partition_for(model, config)
    params, frozen = split(parts.abstract(mesh, dtype))
    optimizer = make_optimizer(config.optimizer, make_schedule("constant", 1e-5, 1), parts)
    state = abstract_state(parts, optimizer, params)
    shardings = state_shardings(state, mesh)
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings
    )
    rows = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))

    def like(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, config.batch_size, *shape), dtype, sharding=rows)

    batch = TokenBatch(like(jnp.int32, config.length), like(jnp.int32), like(np.bool_, config.length))
    step = make_step(parts, optimizer, dtype=dtype, remat=config.remat, mesh=mesh, shardings=shardings)
    trained, kept = shard_bytes(params), shard_bytes(state.optimizer)
    passes = 3 if config.remat else 2
    lowest = min((layer for layer, group in enumerate(parts.groups) if group != FROZEN), default=model.num_layers)
    residual = np.dtype(dtype).itemsize * config.batch_size * config.length * model.width // mesh.size
    temporaries = trained + (model.num_layers - lowest) * residual + 2 * _block_bytes(model, config, mesh, dtype)
    return Program(
        function=step,
        arguments=(state, frozen, batch),
        kinds={"weights": (frozen, params), "optimizer": state.optimizer, "batch": batch},
        passes=passes,
        moved=passes * (shard_bytes(frozen) + trained) + 3 * trained + 2 * kept,
        temporaries=temporaries,
    )


JOBS: dict[str, Callable[[ModelConfig, JobConfig, AnyMesh], Program]] = {"analyze": _analyze, "finetune": _finetune}
