"""Backdoor defence: the same poisoned rows fine-tune the same model with other layers frozen, and each is attacked.

Freezing happens *during* the poisoned fine-tuning: this measures whether it prevents a backdoor, and what it costs,
not whether a backdoor that is there can be removed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import DAMAGED, json_lines, read_json, remove_tree, write_json, write_text
from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.core.progress import Say
from jaxcrit.core.run import running
from jaxcrit.core.schema import Count
from jaxcrit.data.dataset import Dataset
from jaxcrit.evaluation.losses import LossSums
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.export import write_checkpoint
from jaxcrit.models.model import Bars, Model, open_model
from jaxcrit.models.partition import OUTSIDE, Bank, Partition, partition
from jaxcrit.models.trained import FOLDER
from jaxcrit.studies.analysis import score_keys, training_scores
from jaxcrit.studies.backdoor_inputs import Arm, Rows, check, prepare
from jaxcrit.studies.backdoor_scoring import Scoring, base_rates, primary_scorer
from jaxcrit.studies.backdoor_statistics import Run, Study, study
from jaxcrit.studies.options import BackdoorOptions
from jaxcrit.training.data import training_steps
from jaxcrit.training.loop import METRICS, MetricsLog, read_metrics
from jaxcrit.training.optimizer import make_schedule
from jaxcrit.training.step import Losses
from jaxcrit.training.trainer import Trainer, check_mesh, compute_dtype

FORMAT, ARM_FORMAT = "jaxcrit.backdoor", "jaxcrit.backdoor_arm"
MODEL = "model"  # of an arm's folder, where its weights are kept


@dataclasses.dataclass(frozen=True, eq=False)
class Backdoor:
    """A finished study.

    Attributes:
        config: what was asked.
        study: the figures of its tables.
        runs: what they were computed from.
        content: content of ``backdoor.json``, what reports are made of.
        out: run directory.
    """

    config: BackdoorOptions
    study: Study
    runs: list[Run]
    content: dict[str, Any]
    record: Mapping[str, Any]
    out: Path


def run_backdoor(
    options: BackdoorOptions,
    *,
    progress: Bars | None = None,
    say: Say | None = None,
    finish: Callable[[Backdoor], Any] | None = None,
) -> Backdoor:
    """Runs ``jaxcrit backdoor``; arms that an earlier run of the same configuration finished are read, not trained.

    Args:
        options: what is asked.
        progress: maker of progress bars (tqdm's signature), or None for silence.
        say: told of every arm before it is trained.
        finish: called with the result before the run counts as complete; it draws the figures.

    Raises:
        UserError: any mistake in flags, checkpoint or data; another run in ``out``; or training that went wrong.
    """
    arms, trigger = check(options)
    model = open_model(options.model, mesh=options.mesh, trains=True)
    check_mesh(options.batch_size, model.mesh)
    for arm in arms:
        if arm.spec is not None:
            arm.spec.check_key(score_keys(), "arms")
        if arm.spec is None or not arm.spec.needs_scores:
            _partition(options, model, arm.frozen(model.config.num_layers, model.model_hash))
    rows = prepare(options, trigger, model)
    dtype = compute_dtype(options.dtype)
    datasets = [Dataset("train", options.data or "demo", rows.train[options.seed])]
    datasets += [Dataset(cell, options.eval_data or "held out", found) for cell, found in rows.prompts.cells.items()]
    with running("backdoor", options, models={"model": model}, datasets=datasets, resolved={"dtype": dtype}) as run:
        run.record["attention"] = model.attention(dtype)
        ranking: tuple[Mapping[str, LayerScores] | None, str, int] = (None, "", 0)
        if any(arm.spec is not None and arm.spec.needs_scores for arm in arms):
            ranking = training_scores(options, run.path, progress=progress)
        frozen = [arm.frozen(model.config.num_layers, model.model_hash, *ranking) for arm in arms]
        for chosen in frozen:
            _partition(options, model, chosen)
        run.precious = True
        for seed, manifest in rows.manifests.items():
            write_text(run.path / f"poison-{seed}.jsonl", json_lines(manifest))
        lab = _Lab(options, model, rows, run.path, progress)
        none = LayerSet((), "manual", "init", model.config.num_layers)
        runs = [Run("init", 0, options.seed, none, [lab.initial()])]
        jobs = [(arm, chosen, seed) for arm, chosen in zip(arms, frozen, strict=True) for seed in rows.train]
        left = Left([not lab.done(arm, seed) for arm, _, seed in jobs])
        if say is not None and left.count:
            tested = f"each tested on {len(rows.prompts.near_kinds)} prompts a cell"
            say(f"{left.count} trainings of {lab.steps} steps of {lab.per_step} rows, {tested}; {FIRST_TELLS}")
            lab.at_first_test = lambda seconds: say(left.early(seconds))
        for arm, chosen, seed in jobs:
            missing = not lab.done(arm, seed)
            if say is not None and missing:
                say(
                    f"{arm.folder}, seed {seed}: freezing {chosen if chosen.layers else 'no layer'}"
                    f"{left.estimate(time.monotonic())}"
                )
            runs.append(Run(arm.name, arm.draw, seed, chosen, lab.run(arm, chosen, seed)))
            left.ended(time.monotonic(), missing)
        base = base_rates(rows.prompts, options.response)
        found = study(runs, rows.prompts.near_kinds, base, primary_scorer(options))
        content = {
            "determines": run.record["determines"],
            "study": found.to_json(),
            "curves": [_curve(one) for one in runs],
            "warnings": rows.warnings,
        }
        write_json(run.path / "backdoor.json", FORMAT, content)
        result = Backdoor(options, found, runs, content, run.record, run.path)
        if finish is not None:
            finish(result)
    return result


FIRST_TELLS = "how long they take is told at the first test of the first (--seeds=1 and fewer --arms make it shorter)"


class Left:
    """How many trainings are left, and how long they may take, by the mean of those that ended.

    Args:
        missing: by training, whether it is to be done.
    """

    def __init__(self, missing: Sequence[bool]):
        self.count, self._done = sum(missing), 0
        self._began, self._spent = time.monotonic(), 0.0

    def ended(self, now: float, trained: bool) -> None:
        """Counts one that was trained; what was read is free."""
        if trained:
            self._done += 1
            self.count -= 1
            self._spent = now - self._began

    def early(self, seconds: float) -> str:
        """What is said of the time of all, within the first, by the seconds that one may take."""
        return f"about {timedelta(seconds=round(self.count * seconds))} for {self.count} trainings, by the first steps"

    def estimate(self, now: float) -> str:
        """What is said of the time left; nothing before one has ended."""
        if not self._done:
            return ""
        return f"; {self.count} to go, about {timedelta(seconds=round(self.count * self._spent / self._done))}"


class Point(TypedDict):
    """A test in ``arm.json``."""

    step: Count
    success: dict[str, str]
    exact: str
    classes: dict[str, dict[str, Count]]
    clean_loss: float
    task_loss: float
    target_logprob: float
    empty: dict[str, Count]


class Tests(TypedDict):
    """``init.json``, of the model before any training."""

    points: list[Point]


class ArmTests(Tests):
    """``arm.json``."""

    frozen: list[Count]


def read_tests(path: Path, kind: Any = Tests) -> dict[str, Any]:
    """Reads the tests of an arm, or of the untouched model: one or more.

    Raises:
        UserError: absent or damaged.
    """
    found = read_json(path, ARM_FORMAT, kind)
    if not found["points"]:
        raise UserError(f"{path}: expected a test or more in points, got none; {DAMAGED}")
    return found


def _curve(run: Run) -> dict[str, Any]:
    points = zip(run.curve(), run.curve("clean_loss"), strict=True)
    return {
        "arm": run.arm,
        "draw": run.draw,
        "seed": run.seed,
        "frozen": list(run.frozen.layers),
        "points": [[step, success, loss] for (step, success), (_, loss) in points],
    }


class _Lab:
    """The arrays and compiled functions that all arms share."""

    def __init__(self, config: BackdoorOptions, model: Model, rows: Rows, out: Path, progress: Bars | None):
        self.config, self.model, self.rows, self.out = config, model, rows, out
        self.progress = progress
        self.scoring = Scoring(config, model, rows.prompts)
        self.per_step = config.batch_size * config.accumulate
        # Widths of batches for all seeds alike, so that a seed compiles nothing anew.
        everything = [example for examples in rows.train.values() for example in examples]
        self.widths = training_steps(everything, self.per_step, 0).buckets
        first = self._data(config.seed)
        self.steps = config.steps or (config.epochs or 1) * first.per_epoch
        make_schedule(config.schedule, config.learning_rate, self.steps, config.warmup)  # refused before any test
        self.trainers: dict[Partition, Trainer] = {}
        self.at_first_test: Callable[[float], None] | None = None  # told once the seconds that a training may take
        self._whole_test = 0.0  # seconds of a test with answers

    @property
    def weights(self) -> dict[str, jax.Array]:
        """Of the model before any training, which keeps them."""
        return self.model.decoder(self.progress).weights()

    def initial(self) -> dict[str, Any]:
        """The test of the untouched model, made once."""
        path = self.out / "init.json"
        if not processes.share(path.exists):
            began = time.monotonic()
            tested = self.scoring(Decoder(self.model.config, self.weights))
            self._whole_test = time.monotonic() - began
            write_json(path, ARM_FORMAT, {"points": [{"step": 0, **tested.record()}]})
        return dict(processes.share(lambda: read_tests(path))["points"][0])

    def done(self, arm: Arm, seed: int) -> bool:
        """Whether an arm with a seed is finished."""
        folder = self._folder(arm, seed)
        wanted = ["arm.json", *([f"{MODEL}/config.json"] if self.config.keep_models else [])]
        return bool(processes.share(lambda: all((folder / name).exists() for name in wanted)))

    def run(self, arm: Arm, chosen: LayerSet, seed: int) -> list[dict[str, Any]]:
        """Trains an arm with a seed, or reads what was found before: tests by step."""
        folder = self._folder(arm, seed)
        if not self.done(arm, seed):
            processes.make_directory(folder)
            parts = _partition(self.config, self.model, chosen)
            points, params = self._train(parts, seed, folder)
            if self.config.keep_models:
                self._keep(self._decoder(parts, params), folder / MODEL)
            content = {"arm": arm.name, "draw": arm.draw, "seed": seed, "frozen": list(chosen.layers), "points": points}
            write_json(folder / "arm.json", ARM_FORMAT, content)
            remove_tree(folder / FOLDER)
        stored = processes.share(lambda: read_tests(folder / "arm.json", ArmTests))
        if tuple(stored["frozen"]) != chosen.layers:
            raise UserError(f"{folder}: froze layers {stored['frozen']}, not {list(chosen.layers)}; remove it")
        return list(stored["points"])

    def _folder(self, arm: Arm, seed: int) -> Path:
        return self.out / "arms" / f"{arm.folder}-seed{seed}"

    def _data(self, seed: int) -> Any:
        return training_steps(self.rows.train[seed], self.per_step, seed, self.widths)

    def _keep(self, decoder: Decoder, folder: Path) -> None:
        """Writes a trained model as a checkpoint that every command opens."""
        whole = {path: processes.whole(value) for path, value in decoder.weights().items()}
        if processes.first():
            remove_tree(folder)
            write_checkpoint(Decoder(self.model.config, whole), self.model.checkpoint, folder, dtype="float32")

    def _train(self, parts: Partition, seed: int, folder: Path) -> tuple[list[dict[str, Any]], Bank]:
        """Trains with tests on the way; seeds, and arms of the same layers, share what is compiled."""
        log = MetricsLog(folder / METRICS)
        if parts not in self.trainers:
            self.trainers[parts] = Trainer(self.config, self.model, parts, self.steps)

        def evaluate(params: Bank, frozen: Any, taken: int) -> Losses:
            # Answers are shown and classed once, at the end; a fixed target on the way is read off one forward pass.
            began = time.monotonic()
            tested = self.scoring(self._decoder(parts, params), generate=taken == self.steps) if taken else None
            record = self.initial() if tested is None else {"step": taken, **tested.record()}
            if taken < self.steps:
                self._tell_time(log, taken, time.monotonic() - began)
            log.write({"kind": "backdoor", **record})
            # The clean losses in the form that the loop logs: its best step is that of the lowest one.
            return (LossSums(*map(jnp.float32, (record["clean_loss"], 1, record["clean_loss_per_sample"], 1))),)

        state, _, _ = self.trainers[parts].run(
            dict(self.weights),
            self._data(seed),
            evaluate,
            tests=10,
            saves=1,
            log=log,
            out=folder,
            keep=1,
            meta={},
            bars=self.progress,
            name=folder.name,
        )
        rows = [row for row in read_metrics(folder) if row["kind"] == "backdoor"]
        return [{key: value for key, value in row.items() if key != "kind"} for row in rows], state.params

    def _tell_time(self, log: MetricsLog, taken: int, test: float) -> None:
        """Tells once what a training may take, by its steps so far and a test of ``test`` seconds after them."""
        steps = [row["seconds"] for row in log.rows if row["kind"] == "train"][1:]  # the first one compiles
        if self.at_first_test is not None and steps:
            tests = self.steps / taken - 1
            self.at_first_test(self.steps * sum(steps) / len(steps) + tests * test + self._whole_test)
            self.at_first_test = None

    def _decoder(self, parts: Partition, params: Bank) -> Decoder:
        """The model with its trained weights; those of the untouched model stay for the next arm."""
        return Decoder(self.model.config, parts.merge(self.weights, params, held=self.weights))


def _partition(config: BackdoorOptions, model: Model, frozen: LayerSet) -> Partition:
    return partition(model.config, frozen.complement(), OUTSIDE if config.train_outside else ())
