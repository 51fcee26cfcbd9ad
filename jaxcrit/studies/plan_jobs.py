"""The programs that a plan is about: those the commands run, with what they take as shapes with shardings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxcrit.core.auxiliaries import Adversarial, Auxiliary, Objective, names_of, objectives_of
from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.core.layers import LayerSet
from jaxcrit.core.selections import LayerSpec, resolve
from jaxcrit.criteria.registry import criterion
from jaxcrit.criteria.substitution import host_variant, variants, windows
from jaxcrit.evidence.capture import forward_step
from jaxcrit.evidence.forward import as_reading, pass_step
from jaxcrit.evidence.reuse import answer_step, compare_step, planned, read_step
from jaxcrit.evidence.variants import loss_step, planned_evaluations, span_step
from jaxcrit.models.attention import choose_attention
from jaxcrit.models.cache import Cache
from jaxcrit.models.checkpoint import DTYPES
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Block, Context, abstract
from jaxcrit.models.generation import GREEDY, cache_sharding, decode_step, prefill_step
from jaxcrit.models.partition import FROZEN, Partition, split
from jaxcrit.parallel.accounting import shard_bytes
from jaxcrit.parallel.mesh import AnyMesh, batch_sharding
from jaxcrit.studies.covariance import layer_moments
from jaxcrit.studies.editing import check
from jaxcrit.studies.options import PlanOptions
from jaxcrit.studies.reuse import sets_to_try
from jaxcrit.training.objectives import TokenBatch, check_auxiliaries
from jaxcrit.training.optimizer import make_optimizer, make_schedule
from jaxcrit.training.step import abstract_state, make_step, state_shardings, with_shardings
from jaxcrit.training.trainer import partition_of

_PREFIX, _RANDOM_SETS = 0.8, 20  # of reuse: its defaults


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is compiled as one.

    Attributes:
        function: jitted.
        arguments: its arguments, abstract.
        results: what it makes of what stays in memory.
        runs: how often for a batch.
        turns: turns of those of its loops whose number of turns is data.
        precision: precision of matrix products, as the command sets it.
    """

    function: Any
    arguments: tuple[Any, ...]
    results: Any = ()
    runs: int = 1
    turns: int = 1
    precision: str | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """A job for one batch.

    Attributes:
        units: run one after the other.
        kinds: what stays in memory throughout, by kind, for the table.
        weights: bytes on a device of those that a pass reads.
        passes: how many: forward, again for the backward pass, and once more to recompute.
        tokens: tokens of one device that go through all layers, over all passes.
        moved: bytes of a device's memory that are read and written besides, at least.
        temporaries: bytes needed besides, estimated from shapes.
        trained: what trains.
    """

    units: tuple[Unit, ...]
    kinds: Mapping[str, Any]
    weights: int
    passes: float
    tokens: float
    temporaries: int
    moved: int = 0
    trained: Any = ()


@dataclasses.dataclass(frozen=True)
class _Job:
    """What the jobs have in common: a batch of rows and the model, abstract, on a mesh."""

    model: ModelConfig
    config: PlanOptions
    mesh: AnyMesh

    @property
    def dtype(self) -> Any:
        return DTYPES[self.config.dtype]

    @property
    def tokens(self) -> int:
        """Of one device."""
        rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return max(1, self.config.batch_size // rows) * self.config.length

    @functools.cached_property
    def decoder(self) -> Any:
        return abstract(self.model, self.dtype, self.mesh)

    def rows(self, dtype: Any, *shape: int, steps: tuple[int, ...] = ()) -> Any:
        """An array with an entry for every row; behind it the shape, in front of it the steps."""
        place = NamedSharding(self.mesh, PartitionSpec(*(None for _ in steps), *batch_sharding(self.mesh).spec))
        return jax.ShapeDtypeStruct((*steps, self.config.batch_size, *shape), dtype, sharding=place)

    def batch(self) -> tuple[Any, Any]:
        """Tokens and lengths."""
        return self.rows(jnp.int32, self.config.length), self.rows(jnp.int32)

    def context(self, length: int) -> Context:
        """Positions and rotations of rows of so many tokens."""
        tokens = self.rows(jnp.int32, length)
        turned = jax.eval_shape(self.model.rope.cos_sin, tokens, self.rows(jnp.int32))
        return Context(tokens, *(self.rows(leaf.dtype, *leaf.shape[1:]) for leaf in turned))

    def block_bytes(self) -> int:
        """Of one block: attention scores in float32 or the MLP's inside, whichever is more, the stream, and weights.

        Kernels keep no scores.
        """
        size, tensor = np.dtype(self.dtype).itemsize, self.mesh.shape["tensor"]
        model, length = self.model, self.config.length
        shape = self.config.batch_size, length, model.num_heads, model.head_dim
        form, _ = choose_attention(model.attention, self.dtype, *shape, capped=model.attention_cap is not None)
        scores = 2 * 4 * self.tokens * length * model.num_heads // tensor if form == "reference" else 0
        inside = 3 * size * self.tokens * max(1, model.experts_per_token) * model.ff_width // tensor
        blocks = sum(leaf.size for path, leaf in self.decoder.weights().items() if path.startswith("blocks."))
        gathered = size * blocks // self.model.num_layers // tensor  # from the other devices, to be used
        return max(scores, inside) + 3 * size * self.tokens * self.model.width + gathered


def _analyze(job: _Job) -> Program:
    batch = job.batch()
    run = functools.partial(forward_step, mesh=job.mesh, position="last", with_embed=False)
    return Program(
        units=(Unit(jax.jit(run), (job.decoder, *batch), precision="highest"),),
        kinds={"weights": job.decoder, "batch": batch},
        weights=shard_bytes(job.decoder),
        passes=1,
        tokens=job.tokens,
        temporaries=job.block_bytes(),
    )


def _layers(model: ModelConfig, config: PlanOptions) -> LayerSet:
    hint = "planning looks at no data: name layers, or first:K, random:K, all"
    return resolve(LayerSpec.parse(config.layers), model.num_layers, hint=hint)


def partition_for(model: ModelConfig, config: PlanOptions) -> Partition:
    """What the flags train.

    Raises:
        UserError: as `partition_of`, or the layers ask for scores.
    """
    shared = {field.name for field in dataclasses.fields(FinetuneOptions)} & vars(config).keys()
    asked = FinetuneOptions(**{name: getattr(config, name) for name in shared})  # refuses what finetune would
    return partition_of(asked, model, _layers(model, config))


def _finetune(job: _Job) -> Program:
    model, config, mesh = job.model, job.config, job.mesh
    parts = partition_for(model, config)
    params, frozen = split(parts.abstract(mesh, job.dtype))
    optimizer = make_optimizer(config.optimizer, make_schedule("constant", 1e-5, 1), parts)
    state = abstract_state(parts, optimizer, params)
    shardings = state_shardings(state, mesh)
    state = with_shardings(state, shardings)
    like = functools.partial(job.rows, steps=(1,))
    batch = TokenBatch(like(jnp.int32, config.length), like(jnp.int32), like(np.bool_, config.length))
    asked = objectives_of(config, model.num_layers)
    check_auxiliaries(asked, parts)
    auxiliaries = [one for one in asked if one.weight]
    # Rows beside are planned as long as the rows themselves.
    batch = dataclasses.replace(batch, beside={name: batch for name in names_of(auxiliaries)}, numbers=like(jnp.int32))
    how: dict[str, Any] = {"dtype": job.dtype, "remat": config.remat, "mesh": mesh, "shardings": shardings}
    step = make_step(parts, optimizer, auxiliaries=auxiliaries, **how)
    trained, once = shard_bytes(params), 3 if config.remat else 2
    further, kept = _of_objectives(auxiliaries, parts, once)
    passes = once + further
    lowest = min((layer for layer, group in enumerate(parts.groups) if group != FROZEN), default=model.num_layers)
    residual = np.dtype(job.dtype).itemsize * config.batch_size * config.length * model.width // mesh.size
    return Program(
        units=(Unit(step, (state, frozen, batch)),),
        kinds={"weights": (frozen, params), "optimizer": state.optimizer, "batch": batch}
        | ({"drift": params} if config.drift_every else {}),
        weights=shard_bytes(frozen) + trained,
        passes=passes,
        tokens=passes * job.tokens,
        moved=3 * trained + 2 * shard_bytes(state.optimizer),
        temporaries=trained + (model.num_layers - lowest + kept) * residual + 2 * job.block_bytes(),
        trained=params,
    )


def _of_objectives(auxiliaries: Sequence[Objective], parts: Partition, once: int) -> tuple[float, int]:
    """Passes over all layers that objectives take beside the main one's, and the layers whose states they keep.

    Args:
        auxiliaries: objectives.
        parts: what trains.
        once: passes that a gradient takes.
    """
    depth, tops = parts.config.num_layers, dict[str, int]()
    passes, kept = 0.0, 0
    for one in auxiliaries:
        if isinstance(one, Adversarial):
            share = 1 if one.on == "loss" else (max(parts.layers) + 1) / depth
            passes += share * (one.steps * once + 1 + once)
            kept += round(share * depth)
        elif isinstance(one, Auxiliary) and one.rows:
            top = one.layer if one.kind == "exit" else one.source(depth)
            tops[one.rows] = max(top + 1, tops.get(one.rows, 0))
    for name, layers in tops.items():
        forward_alone = name.startswith("feature")
        passes += layers / depth * (1 if forward_alone else once)
        kept += 0 if forward_alone else layers
    return passes, kept


def _substitute(job: _Job) -> Program:
    """Both models' blocks stay, in one stack; every window's blocks run from the window on."""
    model, depth = job.model, job.model.num_layers
    weights = job.decoder.weights()
    inside = {path.removeprefix("blocks."): leaf for path, leaf in weights.items() if path.startswith("blocks.")}
    outside = {path: leaf for path, leaf in weights.items() if not path.startswith("blocks.")}
    both = {
        name: jax.ShapeDtypeStruct((2 * depth, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
        for name, leaf in inside.items()
    }
    host, guest = (host_variant(depth, base=base) for base in (False, True))
    hosted = [*variants(list(windows(depth, job.config.window).values()), depth), host]
    evaluations = planned_evaluations(hosted, depth) + planned_evaluations([guest], depth)
    blocks, (tokens, lengths) = Block(model, both), job.batch()
    x, learn = job.rows(job.dtype, job.config.length, model.width), job.rows(np.bool_, job.config.length)
    context = job.context(job.config.length)
    number, slots = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((depth, 2), jnp.int32)
    batch = TokenBatch(tokens, lengths, learn)
    losses = functools.partial(loss_step, config=model, sharding=NamedSharding(job.mesh, PartitionSpec()))
    span = jax.jit(functools.partial(span_step, edits=None, edit=None))
    runs = len(hosted) + 1
    return Program(
        units=(
            Unit(span, (blocks, slots, x, context, number, number), x, turns=evaluations, precision="highest"),
            Unit(jax.jit(losses), (outside, x, batch), runs=runs, precision="highest"),
        ),
        kinds={"weights": (blocks, outside, outside), "hidden states": (x, x), "batch": batch},
        weights=shard_bytes(inside),
        passes=evaluations / depth,
        tokens=evaluations / depth * job.tokens,
        moved=runs * shard_bytes(outside),
        temporaries=job.block_bytes(),
    )


def _generate(job: _Job) -> Program:
    """The prompts run once; then every new token reads the weights and the cache."""
    model, config, mesh = job.model, job.config, job.mesh
    tokens, lengths = batch = job.batch()
    shape = (model.num_layers, config.batch_size, config.length + config.max_new_tokens)
    kept: Any = jax.ShapeDtypeStruct(
        (*shape, model.num_kv_heads, model.head_dim), job.dtype, sharding=cache_sharding(model, mesh)
    )
    cache = Cache(kept, kept)
    stop = jax.ShapeDtypeStruct((len(model.eos_token_ids),), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    fill = functools.partial(prefill_step, max_new_tokens=config.max_new_tokens, mesh=mesh)
    go_on = functools.partial(
        decode_step, edits=None, max_new_tokens=config.max_new_tokens, sampling=GREEDY, edit=None, mesh=mesh
    )
    held = shard_bytes(cache)
    return Program(
        units=(
            Unit(jax.jit(fill), (job.decoder, *batch), cache),
            Unit(
                jax.jit(go_on), (job.decoder, tokens, lengths, cache, stop, key, lengths), turns=config.max_new_tokens
            ),
        ),
        kinds={"weights": job.decoder, "cache": cache, "batch": batch},
        weights=shard_bytes(job.decoder),
        passes=1 + config.max_new_tokens,
        tokens=job.tokens * (1 + config.max_new_tokens / config.length),
        moved=(1 + config.max_new_tokens) * held,
        temporaries=held + job.block_bytes(),
    )


def _edit(job: _Job) -> Program:
    """The covariance: one pass up to the highest layer, which leaves ``[F, F]`` of each layer."""
    model, batch = job.model, job.batch()
    check(model)
    layers = _layers(model, job.config).layers
    moments = jax.ShapeDtypeStruct(
        (len(layers), model.ff_width, model.ff_width), jnp.float32, sharding=NamedSharding(job.mesh, PartitionSpec())
    )
    passes = (layers[-1] + 1) / model.num_layers
    run = jax.jit(functools.partial(layer_moments, layers=layers))
    return Program(
        units=(Unit(run, (job.decoder, *batch), precision="highest"),),
        kinds={"weights": job.decoder, "covariance": moments, "batch": batch},
        weights=shard_bytes(job.decoder),
        passes=passes,
        tokens=passes * job.tokens,
        temporaries=job.block_bytes(),
    )


def _screen(job: _Job) -> Program:
    """One pass, whose states leave the devices, and the likeliest next token of each prompt."""
    one, batch = criterion("cohesion_rise"), job.batch()
    run = functools.partial(pass_step, pairs=((as_reading(one.tap), one.finish),), mesh=job.mesh)
    unit = Unit(jax.jit(run), (job.decoder, *batch, job.rows(jnp.int32)), precision="highest")
    return dataclasses.replace(_analyze(job), units=(unit,))


def _reuse(job: _Job) -> Program:
    """All groups and random sets at once, a layer at a time: of one layer the keys and values of every source."""
    model, config, depth = job.model, job.config, job.model.num_layers
    plan = sets_to_try(depth, _RANDOM_SETS, 0).plan
    count, runs = len(plan), planned(plan)
    head = max(1, int(_PREFIX * config.length))
    room, tail = config.length + config.max_new_tokens, config.length - head + config.max_new_tokens
    cache_of = functools.partial(jax.ShapeDtypeStruct, dtype=job.dtype, sharding=cache_sharding(model, job.mesh))
    kept: Any = cache_of((1, config.batch_size, room, model.num_kv_heads, model.head_dim))
    cache, layer = Cache(kept, kept), jax.ShapeDtypeStruct((), jnp.int32)
    before, behind = (job.rows(job.dtype, length, model.width) for length in (head, tail))
    scored = job.rows(job.dtype, config.max_new_tokens, model.width)
    read = jax.jit(functools.partial(read_step, room=room, mesh=job.mesh))
    answer, compare = (jax.jit(functools.partial(step, mesh=job.mesh)) for step in (answer_step, compare_step))
    prefixes, blocks = runs["sender"] + runs["receiver"], job.decoder.blocks
    tokens = job.tokens / config.length * (prefixes * head + runs["suffix"] * tail) / depth
    places = job.rows(np.bool_, config.max_new_tokens)
    return Program(
        units=(
            Unit(read, (blocks, layer, before, job.context(head)), (before, cache), runs=prefixes, precision="highest"),
            Unit(
                answer, (blocks, layer, behind, job.context(tail), cache), behind, runs["suffix"], precision="highest"
            ),
            Unit(compare, (job.decoder, scored, scored, places), runs=count, precision="highest"),
        ),
        kinds={
            "weights": (job.decoder, job.decoder),
            "keys and values": [cache] * (depth + 1),
            "hidden states": ([before] * (depth + 1), [behind] * count, [scored] * count),
            "batch": (job.rows(jnp.int32, head), job.rows(jnp.int32, tail)),
        },
        weights=shard_bytes(blocks),
        passes=(prefixes + runs["suffix"]) / depth,
        tokens=tokens,
        moved=runs["suffix"] * shard_bytes(cache) + count * (shard_bytes(job.decoder) - shard_bytes(blocks)),
        temporaries=job.block_bytes(),
    )


JOBS: dict[str, Callable[[_Job], Program]] = {
    "analyze": _analyze,
    "finetune": _finetune,
    "substitute": _substitute,
    "generate": _generate,
    "edit": _edit,
    "screen": _screen,
    "reuse": _reuse,
}


def program_of(model: ModelConfig, config: PlanOptions, mesh: AnyMesh) -> Program:
    """The programs of a job.

    Raises:
        UserError: an axis of the mesh divides nothing, a row is longer than the model's context, or a mistake in the
            flags of the job.
    """
    longest = config.length + (config.max_new_tokens if config.job in ("generate", "reuse") else 0)
    if longest > model.max_length:
        raise UserError(f"--length={config.length}: needs {longest} positions, the model has {model.max_length}")
    return JOBS[config.job](_Job(model, config, mesh))
