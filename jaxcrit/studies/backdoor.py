"""Backdoor defence: the same poisoned rows fine-tune the same model with other layers frozen, and each is attacked.

Freezing happens *during* the poisoned fine-tuning: this measures whether it prevents a backdoor, and what it costs,
not whether a backdoor that is there can be removed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit import __version__
from jaxcrit.commands.backdoor import BackdoorOptions
from jaxcrit.core import processes
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import as_path, read_json, remove_tree, write_json, write_text
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.layers import LayerSet
from jaxcrit.core.rundir import RunDirectory
from jaxcrit.data.templates import Example, template_hash
from jaxcrit.evaluation.losses import LossSums
from jaxcrit.models.checkpoint import DTYPES
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.model import Bars, Session, open_session
from jaxcrit.parallel.preemption import notice
from jaxcrit.studies.analysis import versions
from jaxcrit.studies.backdoor_inputs import Arm, Rows, check, prepare
from jaxcrit.studies.backdoor_scoring import Scoring, base_rates, primary_scorer
from jaxcrit.studies.backdoor_statistics import Run, Study, study
from jaxcrit.studies.finetune_inputs import check_mesh, compute_dtype, layer_scores
from jaxcrit.training.checkpoints import FOLDER, Checkpoints
from jaxcrit.training.data import micro_batches, training_steps
from jaxcrit.training.loop import METRICS, LoopOptions, MetricsLog, Standing, read_metrics, train
from jaxcrit.training.optimizer import make_optimizer, make_schedule
from jaxcrit.training.partition import OUTSIDE, Bank, Partition, partition, split
from jaxcrit.training.step import (
    State,
    Step,
    StepMetrics,
    abstract_state,
    initial_state,
    make_step,
    place,
    state_shardings,
)

FORMAT, ARM_FORMAT = "jaxcrit.backdoor", "jaxcrit.backdoor_arm"
Say = Callable[[str], None]
# What results do not depend on, or do so through hashes beside it.
_FREE = ("model", "data", "split", "limit", "shuffle_seed", "eval_data", "eval_split", "out", "analysis", "mesh",
         "checkpoint_every", "arms", "seeds")  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Backdoor:
    """A finished study.

    Attributes:
        config: what was asked.
        study: the figures of its tables.
        runs: what they were computed from.
        content: of ``backdoor.json``, what reports are made of.
        out: run directory.
    """

    config: BackdoorOptions
    study: Study
    runs: list[Run]
    content: dict[str, Any]
    out: Path


def run_backdoor(config: BackdoorOptions, *, progress: Bars | None = None, say: Say | None = None) -> Backdoor:
    """Runs ``jaxcrit backdoor``; arms that an earlier run of the same configuration finished are read, not trained.

    Args:
        config: what is asked.
        progress: makes progress bars (tqdm's signature), or None for silence.
        say: told of every arm before it is trained.

    Raises:
        UserError: any mistake in flags, checkpoint or data; another run in ``out``; or training that went wrong.
    """
    arms, trigger = check(config)
    session = open_session(config.model, mesh=config.mesh)
    check_mesh(config.training(), session)
    for arm in arms:
        if arm.spec is None or not arm.spec.needs_scores:
            _partition(config, session, arm.frozen(session.config.num_layers, None, session.model_hash))
    rows = prepare(config, trigger, session)
    determines = _determines(config, session, rows)
    directory = RunDirectory.open(_out(config, determines), determines)
    record = {
        "command": "backdoor",
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "determines": determines,
        "model": {"path": config.model, "hash": session.model_hash, "num_layers": session.config.num_layers},
        "attention": session.attention(compute_dtype(config.training())),
        "versions": versions(),
    }
    directory.begin(record)
    try:
        scores = None
        if any(arm.spec is not None and arm.spec.needs_scores for arm in arms):
            scores = layer_scores(config.training(), directory.path, progress)
        frozen = [arm.frozen(session.config.num_layers, scores, session.model_hash) for arm in arms]
        for chosen in frozen:
            _partition(config, session, chosen)
    except UserError:
        directory.discard()
        raise
    for seed, manifest in rows.manifests.items():
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in manifest)
        write_text(directory.path / f"poison-{seed}.jsonl", lines)
    lab = _Lab(config, session, rows, directory, progress)
    runs = [Run("init", 0, config.seed, LayerSet((), "manual", "init", session.config.num_layers), [lab.initial()])]
    for arm, chosen in zip(arms, frozen, strict=True):
        for seed in rows.train:
            if say is not None and not lab.done(arm, seed):
                say(f"{arm.folder}, seed {seed}: freezing {chosen if chosen.layers else 'no layer'}")
            runs.append(Run(arm.name, arm.draw, seed, chosen, lab.run(arm, chosen, seed)))
    base = base_rates(rows.prompts, config.response)
    found = study(runs, rows.prompts.near_kinds, base, primary_scorer(config))
    content = {
        "determines": determines,
        "study": found.to_json(),
        "curves": [
            {"arm": run.arm, "draw": run.draw, "seed": run.seed, "frozen": list(run.frozen.layers),
             "points": [[step, success, loss] for (step, success), (_, loss)
                        in zip(run.curve(), run.curve("clean_loss"), strict=True)]}
            for run in runs
        ],
        "warnings": rows.warnings,
    }  # fmt: skip
    write_json(directory.path / "backdoor.json", FORMAT, content)
    directory.finish(record)
    return Backdoor(config, found, runs, content, directory.path)


class _Lab:
    """The arrays and compiled functions that all arms share."""

    def __init__(self, config: BackdoorOptions, session: Session, rows: Rows, directory: RunDirectory,
                 progress: Bars | None):  # fmt: skip
        self.config, self.session, self.rows, self.directory = config, session, rows, directory
        self.progress = progress
        self.dtype = np.dtype(DTYPES[compute_dtype(config.training())])
        self.scoring = Scoring(config, session, rows.prompts)
        self.per_step = config.batch_size * config.accumulate
        self.widths = _widths(rows.train.values(), self.per_step)
        first = self._data(config.seed)
        self.steps = config.steps or (config.epochs or 1) * first.per_epoch
        self.schedule = make_schedule(config.schedule, config.learning_rate, self.steps, config.warmup)
        self.compiled: dict[Partition, tuple[Any, Step]] = {}
        self._weights: dict[str, jax.Array] | None = None

    @property
    def weights(self) -> dict[str, jax.Array]:
        """Of the model before any training; read when first needed."""
        if self._weights is None:
            self._weights = self.session.decoder(self.progress).weights()
        return self._weights

    def initial(self) -> dict[str, Any]:
        """The test of the untouched model, made once."""
        path = self.directory.path / "init.json"
        if not processes.share(path.exists):
            tested = self.scoring(Decoder(self.session.config, self.weights))
            write_json(path, ARM_FORMAT, {"points": [{"step": 0, **tested.record()}]})
        return dict(processes.share(lambda: read_json(path, ARM_FORMAT))["points"][0])

    def done(self, arm: Arm, seed: int) -> bool:
        """Whether an arm with a seed is finished."""
        return bool(processes.share((self._folder(arm, seed) / "arm.json").exists))

    def run(self, arm: Arm, chosen: LayerSet, seed: int) -> list[dict[str, Any]]:
        """Trains an arm with a seed, or reads what was found before: tests by step."""
        folder = self._folder(arm, seed)
        if not self.done(arm, seed):
            processes.make_directory(folder)
            points = self._train(_partition(self.config, self.session, chosen), seed, folder)
            content = {"arm": arm.name, "draw": arm.draw, "seed": seed, "frozen": list(chosen.layers), "points": points}
            write_json(folder / "arm.json", ARM_FORMAT, content)
            remove_tree(folder / FOLDER)
        stored = processes.share(lambda: read_json(folder / "arm.json", ARM_FORMAT))
        if tuple(stored["frozen"]) != chosen.layers:
            raise UserError(f"{folder}: froze layers {stored['frozen']}, not {list(chosen.layers)}; remove it")
        return list(stored["points"])

    def _folder(self, arm: Arm, seed: int) -> Path:
        return self.directory.path / "arms" / f"{arm.folder}-seed{seed}"

    def _data(self, seed: int) -> Any:
        return training_steps(self.rows.train[seed], self.per_step, seed, self.widths)

    def _train(self, parts: Partition, seed: int, folder: Path) -> list[dict[str, Any]]:
        config, mesh = self.config, self.session.mesh
        params, frozen = split(parts.gather(dict(self.weights), mesh, self.dtype))
        optimizer, step = self._compiled(parts, params)
        like = abstract_state(parts, optimizer, params)
        like = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), like,
                            state_shardings(like, mesh))  # fmt: skip
        data, log = self._data(seed), MetricsLog(folder / METRICS)
        at = 0

        def take(state: State, number: int) -> tuple[State, StepMetrics]:
            nonlocal at
            at = number + 1
            return step(state, frozen, place(micro_batches(data, number, config.accumulate), mesh))

        def evaluate(params: Bank) -> LossSums:
            tested = self.scoring(self._decoder(parts, params)) if at else None
            record = self.initial() if tested is None else {"step": at, **tested.record()}
            log.write({"kind": "backdoor", **record})
            return _sums(record, len(self.rows.prompts.gold))

        options = LoopOptions(
            steps=self.steps, eval_every=config.eval_every or max(1, self.steps // 10),
            checkpoint_every=config.checkpoint_every or self.steps, patience=0,
            uniform=math.log(self.session.config.vocab_size),
        )  # fmt: skip
        with notice() as leave, Checkpoints(folder, keep=1) as checkpoints:
            restored = checkpoints.restore(like)
            if restored and restored.state is not None:
                state, standing = restored.state, Standing(**restored.meta["standing"])
                log.cut(int(state.step))
            else:
                state, standing = initial_state(parts, optimizer, params, mesh), Standing()
                log.cut(None)
            del params
            bar = None if self.progress is None else self.progress(
                total=self.steps, desc=folder.name, unit=" steps", initial=int(state.step))  # fmt: skip
            try:
                train(state, standing, options, step=take, evaluate=evaluate, log=log, checkpoints=checkpoints,
                      rate=lambda number: float(self.schedule(number)), meta={}, leave=leave, bar=bar)  # fmt: skip
            finally:
                if bar is not None:
                    bar.close()
        found = processes.share(lambda: read_metrics(folder / METRICS))
        rows = [row for row in found if row["kind"] == "backdoor"]
        return [{key: value for key, value in row.items() if key != "kind"} for row in rows]

    def _compiled(self, parts: Partition, params: Bank) -> tuple[Any, Step]:
        """Optimizer and step of an arm's shape: seeds, and arms of the same layers, share them."""
        if parts not in self.compiled:
            config, mesh = self.config, self.session.mesh
            optimizer = make_optimizer(
                config.optimizer, self.schedule, parts, weight_decay=config.weight_decay, clip=config.clip
            )
            shardings = state_shardings(abstract_state(parts, optimizer, params), mesh)
            step = make_step(
                parts, optimizer, dtype=self.dtype, remat=config.remat, mesh=mesh, shardings=shardings
            )  # fmt: skip
            self.compiled[parts] = optimizer, step
        return self.compiled[parts]

    def _decoder(self, parts: Partition, params: Bank) -> Decoder:
        """The model with its trained weights; merging uses up what it merges into, so those are copies."""
        trained = {path for entries in params.values() for path in entries}
        weights = {path: jnp.copy(value) if path in trained else value for path, value in self.weights.items()}
        return Decoder(self.session.config, parts.merge(weights, params))


def _widths(sets: Any, rows: int) -> Any:
    """Widths of batches for all seeds alike, so that a seed compiles nothing anew."""
    return training_steps([example for examples in sets for example in examples], rows, 0).buckets


def _partition(config: BackdoorOptions, session: Session, frozen: LayerSet) -> Partition:
    return partition(session.config, frozen.complement(), OUTSIDE if config.train_outside else ())


def _sums(record: Mapping[str, Any], samples: int) -> LossSums:
    """The clean losses in the form the loop logs: its best step is that of the lowest one."""
    return LossSums(*(jnp.float32(value) for value in (record["clean_loss"], 1, record["clean_loss_per_sample"], 1)))


def _determines(config: BackdoorOptions, session: Session, rows: Rows) -> dict[str, Any]:
    """Everything that an arm's figures depend on, the arm aside: arms and seeds may be added to a run."""
    asked = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE}

    def ids(examples: list[Example]) -> str:
        return sha256_json([example.sample_id for example in examples])

    return {
        "command": "backdoor",
        "config": {**asked, "dtype": compute_dtype(config.training())},
        "model_hash": session.model_hash,
        "template_hash": template_hash(session.tokenizer, config.template, config.edition),
        "train": ids(rows.train[config.seed]),
        "prompts": {cell: ids(examples) for cell, examples in rows.prompts.cells.items()},
        "jaxcrit": __version__,
    }


def _out(config: BackdoorOptions, determines: Mapping[str, Any]) -> Path:
    name = Path(config.model).resolve().name if config.model else "embedded"
    return (
        as_path(config.out)
        if config.out
        else Path("jaxcrit-runs") / f"backdoor-{name}-{sha256_json(dict(determines))[:8]}"
    )
