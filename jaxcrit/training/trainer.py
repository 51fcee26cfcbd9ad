"""What trains: a partition by the options, the optimizer, the compiled step, the loop from the newest checkpoint on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcrit.core.auxiliaries import Auxiliary
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
from jaxcrit.models.partition import OUTSIDE, Bank, Partition, partition, split
from jaxcrit.parallel.mesh import AnyMesh
from jaxcrit.parallel.preemption import notice
from jaxcrit.training.checkpoints import Checkpoints, NoCheckpoints, Saved, SavedStanding
from jaxcrit.training.data import micro_batches
from jaxcrit.training.forward import Edited
from jaxcrit.training.loop import LoopOptions, MetricsLog, Standing, train
from jaxcrit.training.optimizer import make_optimizer, make_schedule
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
    """What trains one partition of a model: optimizer, compiled step, loop. One serves any number of trainings."""

    def __init__(
        self,
        options: TrainingOptions,
        model: Model,
        parts: Partition,
        steps: int,
        edit: Edited | None = None,
        auxiliaries: Sequence[Auxiliary] = (),
    ):
        self.options, self.model, self.parts, self.steps, self.edit = options, model, parts, steps, edit
        self.auxiliaries = auxiliaries
        self.dtype = np.dtype(DTYPES[compute_dtype(options.dtype)])
        self.schedule = make_schedule(options.schedule, options.learning_rate, steps, options.warmup)
        self.optimizer = make_optimizer(
            options.optimizer, self.schedule, parts, weight_decay=options.weight_decay, clip=options.clip
        )
        self.step: Step | None = None

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

        Returns:
            The last state and standing; and the checkpoints that were damaged, a line each.

        Raises:
            Preempted: told to leave; the state is saved.
            UserError: see `train`.
        """
        options, mesh = self.options, self.model.mesh
        params, frozen = split(self.parts.gather(weights, mesh, self.dtype, options.seed))
        like = abstract_state(self.parts, self.optimizer, params)
        shardings = state_shardings(like, mesh)
        like = with_shardings(like, shardings)
        self.step = step = self.step or make_step(
            self.parts,
            self.optimizer,
            dtype=self.dtype,
            remat=options.remat,
            mesh=mesh,
            shardings=shardings,
            edit=self.edit,
            # What has no weight is only measured, at tests: the step is that of a training without it.
            auxiliaries=[one for one in self.auxiliaries if one.weight],
        )
        taken = 0

        def take(state: State, number: int) -> tuple[State, StepMetrics]:
            nonlocal taken
            taken = number + 1
            return step(state, frozen, place(micro_batches(data, number, options.accumulate, mesh), mesh))

        loop = LoopOptions(
            steps=self.steps,
            eval_every=options.eval_every or max(1, self.steps // tests),
            checkpoint_every=options.checkpoint_every or max(1, self.steps // saves),
            patience=patience,
            uniform=math.log(self.model.config.vocab_size),
        )
        kept = NoCheckpoints() if out is None else Checkpoints(out, keep=keep)
        with notice() as leave, kept as checkpoints:
            found = checkpoints.restore(like, Saved)
            if found and found.state is not None:
                kept_standing = found.meta["standing"]
                state = found.state
                standing = Standing(**{name: kept_standing[name] for name in SavedStanding.__annotations__})
                log.cut(int(state.step))
            else:
                state, standing = initial_state(self.parts, self.optimizer, params, mesh), Standing()
                log.cut(None)
            del params
            told = {"total": self.steps, "desc": name, "unit": " steps", "initial": int(state.step)}
            with bar(bars, **told) as shown, listen(state) as log.listener:
                state, standing = train(
                    state,
                    standing,
                    loop,
                    step=take,
                    evaluate=lambda params: evaluate(params, frozen, taken),
                    log=log,
                    checkpoints=checkpoints,
                    rate=lambda number: float(self.schedule(number)),
                    meta=meta,
                    leave=leave,
                    bar=shown,
                )
        return state, standing, found.skipped if found else []


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
