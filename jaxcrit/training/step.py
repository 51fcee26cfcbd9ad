"""One optimizer step, and one evaluation of a batch, as compiled functions of the trained and the frozen arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcrit.core.auxiliaries import Objective
from jaxcrit.evaluation.losses import LossSums, rounded_scored
from jaxcrit.models.partition import FROZEN, Arrays, Bank, Partition
from jaxcrit.parallel.mesh import AnyMesh, batch_sharding
from jaxcrit.training.forward import Edited, Form
from jaxcrit.training.objectives import TokenBatch, batch_losses, totals_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What changes in training, and so what a checkpoint holds.

    Attributes:
        params: trained groups of the bank, float32.
        optimizer: state of the transformation.
        step: optimizer steps taken, int32 scalar.
    """

    params: Bank
    optimizer: Any
    step: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What a step reports; float32 scalars, of the parameters before the update.

    Attributes:
        sums: losses of the batch.
        gradient_norm: over all trained parameters, before clipping.
        auxiliaries: those of each auxiliary objective.
    """

    sums: LossSums
    gradient_norm: jax.Array
    auxiliaries: tuple[LossSums, ...] = ()


Losses = tuple[LossSums, ...]  # the main one, then each auxiliary objective's
Step = Callable[[State, Arrays, TokenBatch], tuple[State, StepMetrics]]
Evaluate = Callable[[Bank, Arrays, TokenBatch], Losses]


def initial_state(partition: Partition, optimizer: optax.GradientTransformation, params: Bank, mesh: Mesh) -> State:
    """The state before the first step, the optimizer's arrays placed as their parameters are."""
    shardings = state_shardings(abstract_state(partition, optimizer, params), mesh)
    state = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(params)
    return State(params, state, jax.device_put(jnp.zeros((), jnp.int32), shardings.step))


def abstract_state(partition: Partition, optimizer: optax.GradientTransformation, params: Bank) -> State:
    """Shapes of the state, those of the parameters with their shardings."""
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
    return State(like, jax.eval_shape(optimizer.init, like), jax.ShapeDtypeStruct((), jnp.int32))


def state_shardings(state: State, mesh: AnyMesh) -> State:
    """Placement of each array of a state: a moment lies where its parameter does, anything else everywhere."""
    placed = {f"{group}:{path}": leaf for group, entries in state.params.items() for path, leaf in entries.items()}

    def of(keys: tuple[Any, ...], leaf: Any) -> Any:
        parameter = placed.get(":".join(str(getattr(key, "key", "")) for key in keys[-2:]))
        if parameter is not None and parameter.shape == leaf.shape:
            return parameter.sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, state)


def with_shardings(state: State, shardings: State) -> State:
    """Shapes of a state, each with its placement."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings
    )


def make_step(
    partition: Partition,
    optimizer: optax.GradientTransformation,
    *,
    dtype: Any,
    remat: bool = True,
    form: Form | None = None,
    mesh: AnyMesh | None = None,
    shardings: State | None = None,
    edit: Edited | None = None,
    auxiliaries: Sequence[Objective] = (),
) -> Step:
    """Compiles (when first called) the step ``(state, frozen, batch [A, B, T]) -> (state, metrics)``.

    The loss is the mean over all response tokens of the A micro-batches, so accumulation changes nothing but
    memory; each auxiliary objective adds its weight times the mean over its own tokens. The state is donated: its
    arrays are updated in place.

    Args:
        partition: what trains.
        optimizer: optimizer from `make_optimizer`.
        dtype: compute dtype.
        remat: see `hidden_states`.
        form: see `hidden_states`.
        mesh: see `hidden_states`.
        shardings: shardings of the state, to keep them from step to step.
        edit: see `hidden_states`.
        auxiliaries: objectives beside the response loss; see `batch_losses`.
    """
    weights = [one.weight for one in auxiliaries]

    def step(state: State, frozen: Arrays, batch: TokenBatch) -> tuple[State, StepMetrics]:
        totals = totals_of(batch, auxiliaries)

        def loss(params: Bank, micro: TokenBatch) -> tuple[jax.Array, Losses]:
            bank = {**params, FROZEN: frozen}
            how: dict[str, Any] = {"dtype": dtype, "remat": remat, "form": form, "mesh": mesh, "edit": edit}
            sums = batch_losses(partition, bank, micro, auxiliaries, **how)
            main, *others = (one.loss / total for one, total in zip(sums, totals, strict=True))
            return sum((factor * other for factor, other in zip(weights, others, strict=True)), main), sums

        gradient = jax.grad(loss, has_aux=True)

        def add(so_far: tuple[Bank, Losses], micro: TokenBatch) -> tuple[tuple[Bank, Losses], None]:
            return jax.tree.map(jnp.add, so_far, gradient(state.params, micro)), None

        first, rest = (jax.tree.map(lambda leaf, part=part: leaf[part], batch) for part in (0, slice(1, None)))
        found = gradient(state.params, first)
        if batch.tokens.shape[0] > 1:
            found, _ = jax.lax.scan(add, found, rest)
        gradients, sums = found
        updates, inner = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, inner, state.step + 1), StepMetrics(sums[0], optax.tree.norm(gradients), sums[1:])

    out = None if shardings is None else (shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def make_evaluation(
    partition: Partition,
    *,
    dtype: Any,
    mesh: AnyMesh | None = None,
    edit: Edited | None = None,
    auxiliaries: Sequence[Objective] = (),
) -> Evaluate:
    """Compiles (when first called) the losses of one batch ``(params, frozen, batch [B, T]) -> Losses``.

    The main one has a program of its own, so that it is bit for bit the same whatever is measured beside it.
    """

    def losses(params: Bank, frozen: Arrays, batch: TokenBatch, auxiliaries: Sequence[Objective] = ()) -> Losses:
        bank = {**params, FROZEN: frozen}
        return batch_losses(partition, bank, batch, auxiliaries, dtype=dtype, remat=False, mesh=mesh, edit=edit)

    main = jax.jit(losses)
    further = jax.jit(lambda params, frozen, batch: losses(params, frozen, batch, auxiliaries)[1:])

    def evaluate(params: Bank, frozen: Arrays, batch: TokenBatch) -> Losses:
        found: Losses = main(params, frozen, batch)
        return (*found, *further(params, frozen, batch)) if auxiliaries else found

    return evaluate


@functools.lru_cache
def _shardings(mesh: Mesh, micro: bool) -> NamedSharding:
    rows = batch_sharding(mesh)
    return NamedSharding(mesh, PartitionSpec(None, *rows.spec)) if micro else rows


def place(batch: TokenBatch, mesh: Mesh) -> TokenBatch:
    """Puts a host's batch on the mesh, rows split over ``data`` and ``fsdp``.

    Where a batch does not say on how many positions the head is to run, it is `rounded_scored`.
    """

    def said(rows: TokenBatch) -> TokenBatch:
        scored = rounded_scored(rows.learn, mesh) if rows.scored is None else rows.scored
        return dataclasses.replace(rows, scored=scored, beside={name: said(one) for name, one in rows.beside.items()})

    batch = said(batch)
    return jax.device_put(batch, _shardings(mesh, batch.tokens.ndim == 3))
