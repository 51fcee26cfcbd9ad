"""A training from options to trained parameters: data, optimizer, compiled step, loop, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import FinetuneOptions, LayerTrainingOptions
from jaxcrit.core.layers import LayerSet
from jaxcrit.core.selections import LayerSpec, resolve, split_specs
from jaxcrit.data.templates import Example
from jaxcrit.evaluation.losses import LossSums
from jaxcrit.models.checkpoint import DTYPES
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.lora import make_lora
from jaxcrit.models.model import Bars, Model
from jaxcrit.models.partition import OUTSIDE, Bank, Partition, partition, size, split
from jaxcrit.parallel.mesh import AnyMesh
from jaxcrit.parallel.preemption import notice
from jaxcrit.training.checkpoints import Checkpoints, NoCheckpoints
from jaxcrit.training.data import evaluation_batches, micro_batches, training_steps
from jaxcrit.training.loop import METRICS, LoopOptions, MetricsLog, Standing, train
from jaxcrit.training.optimizer import make_optimizer, make_schedule
from jaxcrit.training.step import (
    State,
    StepMetrics,
    TokenBatch,
    abstract_state,
    initial_state,
    make_evaluation,
    make_step,
    place,
    state_shardings,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What a training ends with.

    Attributes:
        params: trained groups, float32.
        result: steps, best step and loss, bytes; JSON values.
        metrics: rows of ``metrics.jsonl``, in process 0.
        warnings: what the user should know.
    """

    params: Bank
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    warnings: list[str]


class Trainer:
    """The arrays and compiled functions of one training."""

    def __init__(
        self,
        options: FinetuneOptions,
        model: Model,
        parts: Partition,
        rows: Sequence[Example],
        held: Sequence[Example],
        out: Path | None,
    ):
        self.options, self.model, self.parts, self.out = options, model, parts, out
        per_step = options.batch_size * options.accumulate
        self.data = training_steps(rows, per_step, options.seed)
        self.steps = options.steps or (options.epochs or 1) * self.data.per_epoch
        self.tests = evaluation_batches(held, options.batch_size)
        self.schedule = make_schedule(options.schedule, options.learning_rate, self.steps, options.warmup)
        self.optimizer = make_optimizer(
            options.optimizer, self.schedule, parts, weight_decay=options.weight_decay, clip=options.clip
        )

    def summary(self, chosen: LayerSet) -> str:
        """What trains and what does not, in words."""
        verb = {"only": "training", "freeze": "freezing"}[self.options.mode]
        names = {"embed": "embeddings", "norm": "final norm", "head": "head"}
        tied = self.model.config.tied
        told = [
            f"{name}{' and tied head' if tied and path == 'embed' else ''}"
            f" {'trained' if path in self.parts.outside else 'frozen'}"
            for path, name in names.items()
            if not (tied and path == "head")
        ]
        lora = self.parts.lora
        adapters = ""
        if lora is not None:
            adapters = f"; adapters of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}"
        bank = self.parts.abstract(self.model.mesh, np.float32)
        counts = {group: sum(leaf.size for leaf in entries.values()) for group, entries in bank.items()}
        trained = sum(count for group, count in counts.items() if group in self.parts.trained)
        share = 100 * trained / sum(counts.values())
        return (
            f"{verb} {chosen}{adapters}; {', '.join(told)}: {trained:,} of {sum(counts.values()):,} parameters"
            f" ({share:.1f} %) train, for {self.steps} steps of {self.data.batch_size} rows"
        )

    def run(self, bars: Bars | None) -> Trained:
        """Trains, from the newest checkpoint where there is one.

        Raises:
            Preempted: told to leave; the state is saved.
            UserError: see `train`.
        """
        config, mesh, dtype = self.options, self.model.mesh, np.dtype(DTYPES[compute_dtype(self.options.dtype)])
        weights = self.model.trainable(bars)
        params, frozen = split(self.parts.gather(weights, mesh, dtype, config.seed))
        like = abstract_state(self.parts, self.optimizer, params)
        shardings = state_shardings(like, mesh)
        like = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), like, shardings
        )
        step = make_step(self.parts, self.optimizer, dtype=dtype, remat=config.remat, mesh=mesh, shardings=shardings)
        losses = make_evaluation(self.parts, dtype=dtype, mesh=mesh)
        tests = [place(batch, mesh) for batch in self.tests]

        def take(state: State, number: int) -> tuple[State, StepMetrics]:
            batch: TokenBatch = micro_batches(self.data, number, config.accumulate)
            return step(state, frozen, place(batch, mesh))

        def evaluate(params: Bank) -> LossSums:
            sums = [losses(params, frozen, batch) for batch in tests]
            return sum(sums[1:], sums[0])

        options = LoopOptions(
            steps=self.steps,
            eval_every=config.eval_every or max(1, self.steps // 20),
            checkpoint_every=config.checkpoint_every or max(1, self.steps // 10),
            patience=config.patience,
            uniform=math.log(self.model.config.vocab_size),
        )
        log = MetricsLog(None if self.out is None else self.out / METRICS)
        meta = {
            "config": dataclasses.asdict(config),
            "groups": list(self.parts.groups),
            "seed": config.seed,
            "rows_per_step": self.data.batch_size,
        }
        kept = NoCheckpoints() if self.out is None else Checkpoints(self.out, keep=config.keep)
        with notice() as leave, kept as checkpoints:
            found = checkpoints.restore(like)
            warnings = found.skipped if found else []
            if found and found.state is not None:
                del params
                state, standing = found.state, Standing(**found.meta["standing"])
                log.cut(int(state.step))
            else:
                state, standing = initial_state(self.parts, self.optimizer, params, mesh), Standing()
                del params
                log.cut(None)
            total = None
            if bars is not None:
                total = bars(total=self.steps, desc="training", unit=" steps", initial=int(state.step))
            try:
                events: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
                if config.tensorboard and self.out is not None and processes.first():
                    events = _events(self.out / "tensorboard", state)
                with events as log.listener:
                    state, standing = train(
                        state,
                        standing,
                        options,
                        step=take,
                        evaluate=evaluate,
                        log=log,
                        checkpoints=checkpoints,
                        rate=lambda number: float(self.schedule(number)),
                        meta=meta,
                        leave=leave,
                        bar=total,
                    )
            finally:
                if total is not None:
                    total.close()
        last = int(state.step)
        result = {
            "steps": last,
            "best_step": standing.best_step,
            "best_loss": standing.best_loss,
            "model_step": last,
            "trained_bytes": size(state.params),
            "optimizer_bytes": size(state.optimizer),
        }
        return Trained(state.params, result, log.rows, warnings)


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


@contextlib.contextmanager
def _events(folder: Path, state: State) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Writes metrics as event files; TensorBoard is told to forget those of an earlier start beyond this state."""
    from tensorboardX import SummaryWriter

    step = int(state.step)
    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)

    def listen(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("kind", "step"):
                writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])
        writer.flush()

    try:
        yield listen
    finally:
        writer.close()
