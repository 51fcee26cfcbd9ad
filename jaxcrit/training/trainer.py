"""What trains: a partition by the options, the optimizer, the compiled step, the loop from the newest checkpoint on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcrit.core import console
from jaxcrit.core.auxiliaries import Balance, Objective
from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import LayerTrainingOptions, TrainingOptions
from jaxcrit.core.layers import LayerSet
from jaxcrit.core.progress import bar
from jaxcrit.core.selections import LayerSpec, resolve, split_specs
from jaxcrit.data.steps import Steps
from jaxcrit.models.checkpoint import DTYPES
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.lora import make_lora
from jaxcrit.models.model import Bars, Model
from jaxcrit.models.partition import OUTSIDE, Arrays, Bank, Partition, joined, partition, split
from jaxcrit.parallel.mesh import AnyMesh
from jaxcrit.parallel.preemption import notice
from jaxcrit.training.checkpoints import Checkpoints, NoCheckpoints, Saved, SavedStanding
from jaxcrit.training.data import micro_batches
from jaxcrit.training.drift import Drift
from jaxcrit.training.forward import Edited
from jaxcrit.training.loop import LoopOptions, MetricsLog, Standing, out_of_patience, train
from jaxcrit.training.optimizer import make_optimizer, make_schedule
from jaxcrit.training.segments import Changed, Reselection, WholeCheckpoints, carried_moments, selections
from jaxcrit.training.step import (
    Losses,
    State,
    Step,
    StepMetrics,
    abstract_state,
    initial_state,
    make_step,
    place,
    state_shardings,
    with_shardings,
)


class Trainer:
    """What trains one partition of a model: optimizer, compiled step, loop. One serves any number of trainings.

    Where layers are chosen anew, ``parts`` is what trains at the time, and in the end all that was trained.
    """

    def __init__(
        self,
        options: TrainingOptions,
        model: Model,
        parts: Partition,
        steps: int,
        edit: Edited | None = None,
        auxiliaries: Sequence[Objective] = (),
        again: Reselection | None = None,
    ):
        self.options, self.model, self.parts, self.steps, self.edit = options, model, parts, steps, edit
        balances = [Balance(options.router_aux)] if options.router_aux else []
        # What has no weight comes last, so that steps, which leave it out, number the others as tests do.
        self.auxiliaries, self.again = sorted((*auxiliaries, *balances), key=lambda one: not one.weight), again
        if options.router_aux and not model.config.experts:
            raise UserError(
                f"--router_aux={options.router_aux:g}: is of a mixture of experts; this {model.config.family} model has"
                " no router"
            )
        self.dtype = np.dtype(DTYPES[compute_dtype(options.dtype)])
        self.schedule = make_schedule(options.schedule, options.learning_rate, steps, options.warmup)
        self.optimizer = make_optimizer(
            options.optimizer, self.schedule, parts, weight_decay=options.weight_decay, clip=options.clip
        )
        self.compiled: dict[Partition, Step] = {}
        self.resumed = 0  # step that the last run went on from

    def run(
        self,
        weights: dict[str, jax.Array],
        data: Steps,
        evaluate: Callable[[Bank, Bank, int], Losses],
        *,
        tests: int,
        saves: int,
        patience: int = 0,
        log: MetricsLog,
        out: Path | None,
        keep: int,
        meta: dict[str, Any],
        bars: Bars | None,
        name: str,
        listen: Callable[[State], contextlib.AbstractContextManager[Any]] = lambda _: contextlib.nullcontext(),
        drift: Drift | None = None,
    ) -> tuple[State, Standing, list[str]]:
        """Trains, from the newest checkpoint where there is one.

        Args:
            weights: weights by weight-table path; what trains is copied, what is frozen may be taken out.
            data: rows by step.
            evaluate: trained parameters, frozen ones and the number of steps taken to test losses.
            tests: tests over the run, where ``--eval_every`` does not say.
            saves: checkpoints over the run, where ``--checkpoint_every`` does not say.
            patience: tests without improvement before it stops; 0 for never.
            log: where metrics go.
            out: directory whose checkpoints the states are; None keeps none.
            keep: newest checkpoints kept, besides the best.
            meta: JSON values that are saved with each state.
            bars: maker of progress bars.
            name: name of the bar.
            listen: makes of the first state what is told every metric.
            drift: measures how far layers have moved; not where they are chosen anew.

        Returns:
            The last state, of all that was trained, and standing; and the checkpoints that were damaged, a line each.

        Raises:
            Preempted: told to leave; the state is saved.
            UserError: see `train`.
        """
        options, mesh, again = self.options, self.model.mesh, self.again
        taken = 0

        def take(state: State, number: int) -> tuple[State, StepMetrics]:
            nonlocal taken
            taken = number + 1
            return step(state, frozen, place(micro_batches(data, number, options.accumulate, mesh), mesh))

        def measure(frozen: Bank, params: Bank) -> Losses:
            return evaluate(params, frozen, taken)

        loop = LoopOptions(
            steps=self.steps,
            eval_every=options.eval_every or max(1, self.steps // tests),
            checkpoint_every=options.checkpoint_every or max(1, self.steps // saves),
            patience=patience,
            uniform=math.log(self.model.config.vocab_size),
            drift_every=0 if drift is None else drift.every,
        )
        kept = NoCheckpoints() if out is None else Checkpoints(out, keep=keep)
        with notice() as leave, kept as checkpoints, contextlib.ExitStack() as open_while:
            found = checkpoints.restore(self._like, Saved)
            chosen, standing, state, before = [self.parts], Standing(), None, None
            if found and found.state is not None:
                kept_standing = found.meta["standing"]
                standing = Standing(**{name: kept_standing[name] for name in SavedStanding.__annotations__})
                chosen, state = self._chosen(found.meta), found.state
                before = None if again is None else Changed(joined(chosen), state.params)
            log.cut(None if state is None else int(state.step))
            self.resumed = 0 if state is None else int(state.step)
            if self.resumed and bars is not None:
                console.note(f"{name}: goes on from step {self.resumed} of {self.steps}")
            told = {"total": self.steps, "desc": name, "unit": " steps", "initial": self.resumed}
            shown = open_while.enter_context(bar(bars, **told))
            old = chosen[-1]
            while True:
                self.parts = parts = chosen[-1]
                end = self.steps if again is None else min(self.steps, len(chosen) * again.every)
                state, frozen = self._begun(weights, parts, state, old, before, drift)
                step = self._step(parts, state)
                if log.listener is None:
                    log.listener = open_while.enter_context(listen(state))
                saved: Any = checkpoints
                if again is not None:
                    again.tell(selections(chosen, again.every))
                    saved = WholeCheckpoints(checkpoints, before, parts, selections(chosen, again.every))
                state, standing = train(
                    state,
                    standing,
                    dataclasses.replace(loop, steps=end),
                    step=take,
                    evaluate=functools.partial(measure, frozen),
                    drift=None if drift is None else functools.partial(drift.measure, frozen),
                    log=log,
                    checkpoints=saved,
                    rate=lambda number: float(self.schedule(number)),
                    meta=meta,
                    leave=leave,
                    bar=shown,
                )
                if again is None:
                    return state, standing, found.skipped if found else []
                before, old = saved.changed(state), parts
                if end == self.steps or out_of_patience(standing, loop):
                    self.parts, state = before.parts, dataclasses.replace(state, params=before.params)
                    return state, standing, found.skipped if found else []
                del frozen
                chosen.append(again.choose(before, end))
                log.write({"kind": "layers", "step": end + 1, "layers": list(chosen[-1].layers)})

    def _chosen(self, meta: Mapping[str, Any]) -> list[Partition]:
        """What trains in each segment up to a checkpoint."""
        if self.again is None or "selections" not in meta:
            return [self.parts]
        outside = self.parts.outside_asked
        return [partition(self.model.config, one["layers"], outside) for one in meta["selections"]]

    def _like(self, meta: Mapping[str, Any]) -> State:
        """Shapes of the state in a checkpoint, with shardings."""
        chosen, mesh = self._chosen(meta), self.model.mesh
        whole = self.parts if self.again is None else joined(chosen)
        params, everything = (split(one.abstract(mesh, self.dtype))[0] for one in (chosen[-1], whole))
        like = abstract_state(chosen[-1], self.optimizer, params)
        return dataclasses.replace(with_shardings(like, state_shardings(like, mesh)), params=everything)

    def _begun(
        self,
        weights: dict[str, jax.Array],
        parts: Partition,
        state: State | None,
        old: Partition,
        before: Changed | None,
        drift: Drift | None = None,
    ) -> tuple[State, Arrays]:
        """The state that a segment begins with, and what is frozen in it.

        Args:
            weights: weights by path; they stay where layers are chosen anew.
            parts: what trains in the segment.
            state: state that there is, of ``old``; None for a fresh one.
            old: what it is a state of.
            before: all that was trained so far, where layers are chosen anew.
            drift: is to know the model before the first step.
        """
        given = weights if self.again is None else dict(weights if before is None else before.merged(weights))
        params, frozen = split(parts.gather(given, self.model.mesh, self.dtype, self.options.seed))
        if drift is not None:
            drift.begin(params, frozen)
        if state is None:
            return initial_state(parts, self.optimizer, params, self.model.mesh), frozen
        if before is None:
            return state, frozen
        params = jax.tree.map(
            lambda value, like: jax.device_put(value, like.sharding), before.within(parts, params), params
        )
        if parts == old:
            return dataclasses.replace(state, params=params), frozen
        fresh = initial_state(parts, self.optimizer, params, self.model.mesh)
        moments = carried_moments(state.optimizer, old, fresh.optimizer, parts)
        return State(params, moments, state.step), frozen

    def _step(self, parts: Partition, state: State) -> Step:
        """The compiled step of a partition; that of a choice that returns is there already."""
        if parts not in self.compiled:
            like = abstract_state(parts, self.optimizer, state.params)
            self.compiled[parts] = make_step(
                parts,
                self.optimizer,
                dtype=self.dtype,
                remat=self.options.remat,
                mesh=self.model.mesh,
                shardings=state_shardings(like, self.model.mesh),
                edit=self.edit,
                # What has no weight is only measured, at tests: the step is that of a training without it.
                auxiliaries=[one for one in self.auxiliaries if one.weight],
            )
        return self.compiled[parts]


def check_mesh(batch_size: int, mesh: AnyMesh) -> None:
    """Checks that a micro-batch divides over the mesh.

    Raises:
        UserError: it does not.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise UserError(
            f"--batch_size={batch_size}: does not divide over the {parts} parts of the mesh (data x fsdp); take"
            f" a multiple of {parts}, or another --mesh"
        )


def compute_dtype(asked: str) -> str:
    """The dtype asked for; by default float32 on CPU, where bfloat16 is slower, and bfloat16 elsewhere."""
    return asked or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def partition_of(options: LayerTrainingOptions, model: ModelConfig, chosen: LayerSet) -> Partition:
    """What trains: the chosen layers or all others, and what is outside the blocks.

    Raises:
        UserError: no layer is named, or none is left to train; see `partition`.
    """
    layers = chosen.layers if options.mode == "only" else chosen.complement()
    if not chosen.layers:
        raise UserError(f"--layers={options.layers}: names no layer")
    if not layers:
        raise UserError(
            f"--layers={options.layers} --mode=freeze: freezes all {chosen.num_layers} layers, and none is left to"
            " train"
        )
    asked = dict(zip(OUTSIDE, (options.train_embeddings, options.train_norms, options.train_head), strict=True))
    whole = options.mode == "freeze" and not options.lora_rank
    trains = {path for path, given in asked.items() if given or (given is None and whole)}
    lora = None
    if options.lora_rank:
        targets = [name.strip() for name in options.lora_targets.split(",") if name.strip()]
        lora = make_lora(model, options.lora_rank, getattr(options, "lora_alpha", 0.0), targets)
    rates = rate_factors(getattr(options, "layer_rates", ""), chosen.num_layers)
    return partition(model, layers, trains, rates, lora)


def rate_factors(text: str, num_layers: int) -> dict[int, float]:
    """Reads ``0-7:0.5,last:2:2``: selections, each with a factor on its layers' learning rate.

    Layers that do not train may be named.

    Args:
        text: selections that need no scores, a colon and the factor behind each; empty for none.
        num_layers: L.

    Returns:
        Factor by layer.

    Raises:
        UserError: not of that form, a layer named twice or outside the model, or a factor that is not above 0.
    """
    factors: dict[int, float] = {}
    for part in split_specs(text, ",") if text else []:
        words, _, factor = part.rpartition(":")
        try:
            value = float(factor)
        except ValueError:
            value = 0.0
        spec = LayerSpec.parse(words, "layer_rates") if words and 0 < value < float("inf") else None
        if spec is None or spec.needs_scores:
            raise UserError(
                f"--layer_rates={text}: expected LAYERS:FACTOR such as 0-7:0.5, above 0, got {part!r}"
                f"{'; layers chosen by a score go in as @layers.json' if spec else ''}"
            )
        for layer in resolve(spec, num_layers, flag="layer_rates").layers:
            if layer in factors:
                raise UserError(f"--layer_rates={text}: expected each layer once, got {layer} twice")
            factors[layer] = value
    return factors
