"""Fine-tuning of chosen layers: from a checkpoint, rows and a LayerSpec to a run directory that is a model again."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcrit.core import processes
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.core.layers import LayerSet
from jaxcrit.core.run import running
from jaxcrit.data.templates import Example, describe_template
from jaxcrit.evaluation.losses import LossSums
from jaxcrit.models.checkpoint import DTYPES
from jaxcrit.models.model import Bars, Model, open_model
from jaxcrit.models.partition import Bank, Partition, size, split
from jaxcrit.parallel.preemption import notice
from jaxcrit.studies.finetune_inputs import (
    check,
    check_mesh,
    compute_dtype,
    critical_layers,
    partition_of,
    read_examples,
    resolve_fixed,
)
from jaxcrit.training.checkpoints import Checkpoints
from jaxcrit.training.data import evaluation_batches, micro_batches, training_steps
from jaxcrit.training.loop import METRICS, LoopOptions, MetricsLog, Standing, read_metrics, train
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
class Finetuned:
    """A finished run.

    Attributes:
        config: what was asked.
        run: content of ``run.json``.
        times: seconds that it took.
        metrics: rows of ``metrics.jsonl``.
        chosen: the layers named by ``--layers``.
        warnings: what the user should know.
        out: run directory.
    """

    config: FinetuneOptions
    run: dict[str, Any]
    times: dict[str, Any]
    metrics: list[dict[str, Any]]
    chosen: LayerSet
    warnings: list[str]
    out: Path


Say = Callable[[str], None]


def run_finetune(
    options: FinetuneOptions,
    *,
    progress: Bars | None = None,
    say: Say | None = None,
    finish: Callable[[Finetuned], Any] | None = None,
) -> Finetuned:
    """Runs ``jaxcrit finetune``; goes on where an earlier, interrupted run of the same configuration stopped.

    Args:
        options: what is asked.
        progress: maker of progress bars (tqdm's signature), or None for silence.
        say: told what trains, before training begins.
        finish: called with the result before the run counts as complete; it draws the test loss.

    Raises:
        UserError: any mistake in flags, checkpoint or data; another run in ``out``; or training that went wrong.
    """
    spec = check(options)
    model = open_model(options.model, mesh=options.mesh)
    check_mesh(options, model)
    fixed = None if spec.needs_scores else resolve_fixed(options, spec, model)
    datasets = read_examples(options, model)
    rows, held = (dataset.examples for dataset in datasets)
    resolved = {"dtype": compute_dtype(options)} | ({"layers": list(fixed.layers)} if fixed else {})
    template = describe_template(model.tokenizer, options)
    with running(
        "finetune", options, models={"model": model}, datasets=datasets, template=template, resolved=resolved
    ) as run:
        if run.complete:
            return _finished(options, dict(run.earlier), run.path)
        run.record["attention"] = model.attention(compute_dtype(options))
        chosen = fixed or critical_layers(options, spec, model, run.path, progress)
        parts = partition_of(options, model.config, chosen)
        job = _Job(options, model, parts, rows, held, run.path)
        run.precious = True
        chosen.save(run.path / "layers.json")
        layers = dataclasses.asdict(chosen) | {"layers": list(chosen.layers)}
        run.record |= {"layers": layers, "trained": parts.to_json()}
        run.save()
        if say is not None:
            say(job.summary(chosen))
        began = time.perf_counter()
        run.record["result"], warnings = job.run(progress)
        run.times["training_seconds"] = round(time.perf_counter() - began, 3)
        found = Finetuned(options, run.record, run.times, _metrics(run.path), chosen, warnings, run.path)
        if finish is not None:
            finish(found)
    return found


class _Job:
    """The arrays and compiled functions of one run."""

    def __init__(self, config: FinetuneOptions, session: Model, parts: Partition, rows: list[Example],
                 held: list[Example], out: Path):  # fmt: skip
        self.config, self.session, self.parts, self.out = config, session, parts, out
        per_step = config.batch_size * config.accumulate
        self.data = training_steps(rows, per_step, config.seed)
        self.steps = config.steps or (config.epochs or 1) * self.data.per_epoch
        self.tests = evaluation_batches(held, config.batch_size)
        self.schedule = make_schedule(config.schedule, config.learning_rate, self.steps, config.warmup)
        self.optimizer = make_optimizer(
            config.optimizer, self.schedule, parts, weight_decay=config.weight_decay, clip=config.clip
        )

    def summary(self, chosen: LayerSet) -> str:
        """What trains and what does not, in words."""
        verb = {"only": "training", "freeze": "freezing"}[self.config.mode]
        names = {"embed": "embeddings", "norm": "final norm", "head": "head"}
        tied = self.session.config.tied
        told = [
            f"{name}{' and tied head' if tied and path == 'embed' else ''}"
            f" {'trained' if path in self.parts.outside else 'frozen'}"
            for path, name in names.items()
            if not (tied and path == "head")
        ]
        lora = self.parts.lora
        adapters = "" if lora is None else (
            f"; adapters of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}")  # fmt: skip
        bank = self.parts.abstract(self.session.mesh, np.float32)
        counts = {group: sum(leaf.size for leaf in entries.values()) for group, entries in bank.items()}
        trained = sum(count for group, count in counts.items() if group in self.parts.trained)
        share = 100 * trained / sum(counts.values())
        return (
            f"{verb} {chosen}{adapters}; {', '.join(told)}: {trained:,} of {sum(counts.values()):,} parameters"
            f" ({share:.1f} %) train, for {self.steps} steps of {self.data.batch_size} rows"
        )

    def run(self, progress: Bars | None) -> tuple[dict[str, Any], list[str]]:
        """Trains; returns what ``run.json`` says of it, and warnings."""
        config, mesh, dtype = self.config, self.session.mesh, np.dtype(DTYPES[compute_dtype(self.config)])
        weights = self.session.trainable(progress)
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
            uniform=math.log(self.session.config.vocab_size),
        )
        log = MetricsLog(self.out / METRICS)
        meta = {"config": dataclasses.asdict(config), "groups": list(self.parts.groups), "seed": config.seed,
                "rows_per_step": self.data.batch_size}  # fmt: skip
        with notice() as leave, Checkpoints(self.out, keep=config.keep) as checkpoints:
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
            total = None if progress is None else progress(
                total=self.steps, desc="training", unit=" steps", initial=int(state.step))  # fmt: skip
            try:
                shown = config.tensorboard and processes.first()
                events = _events(self.out / "tensorboard", state) if shown else contextlib.nullcontext()
                with events as log.listener:
                    state, standing = train(
                        state, standing, options, step=take, evaluate=evaluate, log=log, checkpoints=checkpoints,
                        rate=lambda number: float(self.schedule(number)), meta=meta, leave=leave, bar=total,
                    )  # fmt: skip
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
        return result, warnings


def _finished(config: FinetuneOptions, run: dict[str, Any], out: Path) -> Finetuned:
    note = f"{out}: complete already; choose another --out to train again"
    chosen = LayerSet(**{**run["layers"], "layers": tuple(run["layers"]["layers"])})
    return Finetuned(config, run, run["time"], _metrics(out), chosen, [note], out)


def _metrics(out: Path) -> list[dict[str, Any]]:
    return list(processes.share(lambda: read_metrics(out / METRICS)))


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
