"""Fine-tuning of chosen layers: from a checkpoint, rows and a LayerSpec to a run directory that is a model again."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcrit import __version__
from jaxcrit.core.errors import UserError, did_you_mean
from jaxcrit.core.files import read_json
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.layers import LayerSet, LayerSpec, resolve
from jaxcrit.core.rundir import RUN_FORMAT, RunDirectory
from jaxcrit.data.published import PUBLISHED
from jaxcrit.data.templates import Example, template_hash
from jaxcrit.evaluation.losses import LossSums
from jaxcrit.models.checkpoint import DTYPES
from jaxcrit.parallel.mesh import parse_mesh
from jaxcrit.studies.analysis import run_analysis, versions
from jaxcrit.studies.captures import AnalysisConfig
from jaxcrit.studies.rendering import render_sets
from jaxcrit.studies.session import Bars, Session, open_session
from jaxcrit.training.checkpoints import Checkpoints
from jaxcrit.training.data import check_rows, evaluation_batches, hold_out, micro_batches, training_steps
from jaxcrit.training.loop import METRICS, LoopOptions, MetricsLog, Standing, read_metrics, train
from jaxcrit.training.optimizer import make_optimizer, make_schedule
from jaxcrit.training.partition import OUTSIDE, Bank, Partition, partition, size, split
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

MODES = ("only", "freeze")
_ANALYSIS_PROMPTS = 300  # as many as the paper's
# Where the results do not depend on a field, or do so only through hashes that stand beside it.
_FREE = ("model", "data", "split", "limit", "shuffle_seed", "eval_data", "eval_split", "out", "analysis", "mesh",
         "checkpoint_every", "keep", "tensorboard")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """What ``jaxcrit finetune`` is asked; every field is a flag of the same name.

    Attributes:
        model: checkpoint directory, hub id or fine-tuning run; empty for the embedded model.
        data, split, limit, shuffle_seed: rows, as of `AnalysisConfig`; of the paper's datasets the train split.
        eval_data, eval_split: rows to test on; empty for a tenth of the rows, held out.
        out: run directory; empty for one named after the inputs.
        template, edition, truncate, max_length: rendering, as of `DataConfig`.
        layers: LayerSpec.
        mode: ``only`` trains these layers, ``freeze`` trains all others.
        train_embeddings, train_norms, train_head: outside the blocks; None trains them with ``freeze`` alone.
        analysis: run directory of the analysis that ``critical`` needs; empty for one inside ``out``.
        steps: optimizer steps; 0 goes by ``epochs``.
        epochs: passes over the rows; 0 for one, unless steps are given.
        batch_size: rows per micro-batch.
        accumulate: micro-batches per step.
        optimizer, learning_rate, schedule, warmup, weight_decay, clip: see `make_optimizer`, `make_schedule`.
        dtype: of compute and frozen weights; empty for float32 on CPU, else bfloat16.
        remat: recompute blocks in the backward pass.
        mesh: devices by axis.
        eval_every: steps between tests; 0 for a twentieth of the run.
        checkpoint_every: steps between checkpoints; 0 for a tenth of the run.
        keep: newest checkpoints to keep, besides the best.
        patience: tests without improvement before stopping; 0 for never.
        tensorboard: write event files too.
        seed: of the order of rows.
    """

    model: str = ""
    data: str = ""
    split: str = ""
    limit: int = 0
    shuffle_seed: int = -1
    eval_data: str = ""
    eval_split: str = ""
    out: str = ""
    template: str = "auto"
    edition: str = "clean"
    truncate: str = ""
    max_length: int = 0
    layers: str = "critical"
    mode: str = "only"
    train_embeddings: bool | None = None
    train_norms: bool | None = None
    train_head: bool | None = None
    analysis: str = ""
    steps: int = 0
    epochs: int = 0
    batch_size: int = 8
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 2e-5
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 0.0
    dtype: str = ""
    remat: bool = True
    mesh: str = ""
    eval_every: int = 0
    checkpoint_every: int = 0
    keep: int = 2
    patience: int = 0
    tensorboard: bool = False
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Finetuned:
    """A finished run.

    Attributes:
        config: what was asked.
        run: what ``run.json`` holds.
        metrics: rows of ``metrics.jsonl``.
        chosen: the layers named by ``--layers``.
        warnings: what the user should know.
        out: run directory.
    """

    config: FinetuneConfig
    run: dict[str, Any]
    metrics: list[dict[str, Any]]
    chosen: LayerSet
    warnings: list[str]
    out: Path


Say = Callable[[str], None]


def run_finetune(config: FinetuneConfig, *, progress: Bars | None = None, say: Say | None = None) -> Finetuned:
    """Runs ``jaxcrit finetune``; goes on where an earlier, interrupted run of the same configuration stopped.

    Args:
        config: what is asked.
        progress: makes progress bars (tqdm's signature), or None for silence.
        say: told what trains, before training begins.

    Returns:
        The finished run; pictures are the reporting room's.

    Raises:
        UserError: any mistake in flags, checkpoint or data; another run in ``out``; or training that went wrong.
    """
    spec = _check(config)
    session = open_session(config.model, mesh=config.mesh)
    _check_mesh(config, session)
    fixed = None if spec.needs_scores else _resolve(config, spec, session)
    rows, held = _examples(config, session)
    determines = _determines(config, session, fixed, rows, held)
    directory = RunDirectory.open(_out(config, session, determines), determines)
    earlier = read_json(directory.path / "run.json", RUN_FORMAT) if directory.resumed else {}
    if earlier.get("status") == "complete":
        return _finished(config, earlier, directory.path)
    run = {
        "command": "finetune",
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "determines": determines,
        "model": {"path": str(Path(config.model).resolve()) if Path(config.model).exists() and config.model
                  else config.model, "hash": session.model_hash, "family": session.config.family,
                  "num_layers": session.config.num_layers, "width": session.config.width},
        "data": {"train": len(rows), "eval": len(held)},
        "versions": versions(),
    }  # fmt: skip
    directory.begin({**earlier, **run})
    try:
        chosen = fixed or _critical(config, spec, session, directory.path, progress)
        parts = _partition(config, session, chosen)
        job = _Job(config, session, parts, rows, held, directory.path)
    except UserError:
        directory.discard()
        raise
    chosen.save(directory.path / "layers.json")
    trains = [layer for layer, group in enumerate(parts.groups) if group in parts.trained]
    run |= {
        "layers": dataclasses.asdict(chosen) | {"layers": list(chosen.layers)},
        "trained": {"layers": trains, "outside": sorted(parts.outside)},
    }
    directory.begin(run)
    if say is not None:
        say(job.summary(chosen))
    result, warnings = job.run(progress)
    directory.finish({**run, "result": result})
    return Finetuned(config, {**run, "result": result}, read_metrics(directory.path / METRICS), chosen, warnings,
                     directory.path)  # fmt: skip


class _Job:
    """The arrays and compiled functions of one run."""

    def __init__(self, config: FinetuneConfig, session: Session, parts: Partition, rows: list[Example],
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
        bank = self.parts.abstract(self.session.mesh, np.float32)
        counts = {group: sum(leaf.size for leaf in entries.values()) for group, entries in bank.items()}
        trained = sum(count for group, count in counts.items() if group in self.parts.trained)
        share = 100 * trained / sum(counts.values())
        return (
            f"{verb} {chosen}; {', '.join(told)}: {trained:,} of {sum(counts.values()):,} parameters"
            f" ({share:.1f} %) train, for {self.steps} steps of {self.data.batch_size} rows"
        )

    def run(self, progress: Bars | None) -> tuple[dict[str, Any], list[str]]:
        """Trains; returns what ``run.json`` says of it, and warnings."""
        config, mesh, dtype = self.config, self.session.mesh, np.dtype(DTYPES[_compute_dtype(self.config)])
        began = time.perf_counter()
        session = dataclasses.replace(self.session, dtype="float32" if self.session.tuned else "")
        weights = session.decoder(progress).weights()
        params, frozen = split(self.parts.gather(weights, mesh, dtype))
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
        log = MetricsLog(self.out / METRICS, _tensorboard(self.out) if config.tensorboard else None)
        meta = {"config": dataclasses.asdict(config), "groups": list(self.parts.groups), "seed": config.seed,
                "rows_per_step": self.data.batch_size}  # fmt: skip
        with Checkpoints(self.out, keep=config.keep) as checkpoints:
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
                state, standing = train(
                    state, standing, options, step=take, evaluate=evaluate, log=log, checkpoints=checkpoints,
                    rate=lambda number: float(self.schedule(number)), meta=meta, bar=total,
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
            "seconds": round(time.perf_counter() - began, 3),
        }
        return result, warnings


def _check(config: FinetuneConfig) -> LayerSpec:
    if config.mode not in MODES:
        raise UserError(f"--mode={config.mode}: expected only or freeze{did_you_mean(config.mode, MODES)}")
    if config.steps and config.epochs:
        raise UserError(f"--steps={config.steps} --epochs={config.epochs}: give one of them")
    for name, lowest in (("steps", 0), ("epochs", 0), ("batch_size", 1), ("accumulate", 1), ("keep", 1),
                         ("eval_every", 0), ("checkpoint_every", 0), ("patience", 0), ("seed", 0)):  # fmt: skip
        if getattr(config, name) < lowest:
            raise UserError(f"--{name}={getattr(config, name)}: expected {lowest} or more")
    if config.dtype not in ("", "float32", "bfloat16"):
        raise UserError(f"--dtype={config.dtype}: expected float32 or bfloat16")
    make_schedule(config.schedule, config.learning_rate, config.warmup + 1, config.warmup)
    parse_mesh(config.mesh)
    return LayerSpec.parse(config.layers)


def _check_mesh(config: FinetuneConfig, session: Session) -> None:
    parts = session.mesh.shape["data"] * session.mesh.shape["fsdp"]
    if config.batch_size % parts:
        raise UserError(
            f"--batch_size={config.batch_size}: does not divide over the {parts} parts of the mesh (data x fsdp); take"
            f" a multiple of {parts}, or another --mesh"
        )


def _compute_dtype(config: FinetuneConfig) -> str:
    return config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _resolve(config: FinetuneConfig, spec: LayerSpec, session: Session) -> LayerSet:
    chosen = resolve(spec, session.config.num_layers, model_hash=session.model_hash)
    _partition(config, session, chosen)
    return chosen


def _partition(config: FinetuneConfig, session: Session, chosen: LayerSet) -> Partition:
    layers = chosen.layers if config.mode == "only" else chosen.complement()
    if not chosen.layers:
        raise UserError(f"--layers={config.layers}: names no layer")
    if not layers:
        raise UserError(
            f"--layers={config.layers} --mode=freeze: freezes all {chosen.num_layers} layers, and none is left to train"
        )
    asked = dict(zip(OUTSIDE, (config.train_embeddings, config.train_norms, config.train_head), strict=True))
    trains = {path for path, given in asked.items() if given or (given is None and config.mode == "freeze")}
    return partition(session.config, layers, trains)


def _examples(config: FinetuneConfig, session: Session) -> tuple[list[Example], list[Example]]:
    most = min(config.max_length or session.config.max_length, session.config.max_length)

    def rendered(data: str, splits: str, limit: int) -> list[Example]:
        published = any(part.strip().partition(":")[0] in PUBLISHED for part in data.split(","))
        asked = dataclasses.replace(config, data=data, split=splits if published else config.split, limit=limit)
        found: list[Example] = []
        for one in render_sets(asked, session.tokenizer, most, training=True):
            check_rows(one.cut, one.limit if config.truncate == "paper" else most, session.config.vocab_size,
                       one.named.source)  # fmt: skip
            found += one.cut
        return found

    rows = rendered(config.data, config.split or "train", config.limit)
    if config.eval_data:
        return rows, rendered(config.eval_data, config.eval_split or "test", 0)
    return hold_out(rows, config.data or "demo")


def _determines(config: FinetuneConfig, session: Session, fixed: LayerSet | None, rows: list[Example],
                held: list[Example]) -> dict[str, Any]:  # fmt: skip
    asked = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE}
    ids = {name: sha256_json([example.sample_id for example in part]) for name, part in
           (("train", rows), ("eval", held))}  # fmt: skip
    return {
        "command": "finetune",
        "config": {**asked, "dtype": _compute_dtype(config), "layers": list(fixed.layers) if fixed else config.layers},
        "model_hash": session.model_hash,
        "template_hash": template_hash(session.tokenizer, config.template, config.edition),
        "data": ids,
        "jaxcrit": __version__,
    }


def _critical(
    config: FinetuneConfig, spec: LayerSpec, session: Session, out: Path, progress: Bars | None
) -> LayerSet:  # fmt: skip
    """The layers an analysis of the training prompts chooses; an analysis that is there already is used."""
    published = any(part.strip().partition(":")[0] in PUBLISHED for part in config.data.split(","))
    split_of = config.split or ("train" if published else "")
    analysis = AnalysisConfig(
        model=config.model, data=config.data, split=split_of, limit=_ANALYSIS_PROMPTS,
        shuffle_seed=max(config.shuffle_seed, 0), out=config.analysis or str(out / "analysis"),
        template=config.template, edition=config.edition, truncate=config.truncate, mesh=config.mesh,
    )  # fmt: skip
    found = run_analysis(analysis, progress=progress)
    scores = found.scores[analysis.criterion]  # the analysis is the same whatever number of layers is asked for
    return resolve(spec, session.config.num_layers, scores=scores, trim=analysis.trim, model_hash=session.model_hash)


def _out(config: FinetuneConfig, session: Session, determines: Mapping[str, Any]) -> Path:
    if config.out:
        return Path(config.out)
    name = session.checkpoint.path.resolve().name if config.model else "embedded"
    return Path("jaxcrit-runs") / f"finetune-{name}-{sha256_json(dict(determines))[:8]}"


def _finished(config: FinetuneConfig, run: dict[str, Any], out: Path) -> Finetuned:
    note = f"{out}: complete already; choose another --out to train again"
    return Finetuned(config, run, read_metrics(out / METRICS), LayerSet.load(out / "layers.json"), [note], out)


def _tensorboard(out: Path) -> Callable[[dict[str, Any]], None]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: needs tensorboardX; pip install tensorboardX, or read metrics.jsonl") from None
    writer = SummaryWriter(str(out / "tensorboard"))

    def listen(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("kind", "step"):
                writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])
        writer.flush()

    return listen
