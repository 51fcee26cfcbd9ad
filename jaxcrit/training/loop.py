"""The training loop: steps, evaluations, early stopping, metrics, checkpoints, and when to give up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import GrowingText, read_lines
from jaxcrit.core.schema import Count
from jaxcrit.evaluation.losses import LossSums
from jaxcrit.models.partition import Bank
from jaxcrit.parallel.preemption import Leave, Preempted
from jaxcrit.training.step import Losses, State, StepMetrics

METRICS = "metrics.jsonl"
# Steps in a row whose loss is above both a uniform guess and twice the first, or that have no gradient: it diverged.
_DIVERGED = 10


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """When to do what.

    Attributes:
        steps: number of steps of the run.
        eval_every: steps between evaluations; the first is before the first step, the last after the last.
        checkpoint_every: steps between checkpoints; there is one at the end in any case.
        patience: evaluations in a row without a better test loss after which to stop; 0 never stops.
        uniform: loss of a uniform guess, ln V.
        drift_every: steps between measures of drift, of which one is after the last step; 0 for never.
    """

    steps: int
    eval_every: int
    checkpoint_every: int
    patience: int
    uniform: float
    drift_every: int = 0


@dataclasses.dataclass(frozen=True)
class Standing:
    """What the loop remembers from step to step, besides the state.

    Attributes:
        best_loss, best_step: lowest test loss so far (token-weighted), and where.
        worse: evaluations since then.
        first_loss: training loss of the first step.
        high: steps in a row with a loss that looks diverged.
    """

    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0
    first_loss: float | None = None
    high: int = 0


class MetricsRow(TypedDict):
    """What every row of ``metrics.jsonl`` has."""

    kind: str
    step: Count


class LossRow(MetricsRow, total=False):
    """What it has of a step or a test."""

    loss: float
    loss_per_sample: float
    seconds: float


class MetricsLog:
    """``metrics.jsonl``, one object a line, and whoever else wants to hear of it.

    Attributes:
        rows: rows written by this launch, and those before it that still count.
    """

    def __init__(self, path: Path | None, listener: Callable[[dict[str, Any]], None] | None = None):
        self.path, self.listener = path, listener
        self.rows: list[dict[str, Any]] = []
        self._text = None if path is None else GrowingText(path)

    def cut(self, step: int | None) -> None:
        """Forgets what was logged after a step (all of it for None): the run goes on from there."""
        if not processes.first() or self.path is None or self._text is None:
            return
        self.rows = [] if step is None else [row for row in read_lines(self.path, LossRow) if row["step"] <= step]
        self._text.start("".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row.

        Raises:
            UserError: the file cannot be written.
        """
        if not processes.first():
            return
        self.rows.append(row)
        if self._text is not None:
            with self._told():
                self._text.append(json.dumps(row) + "\n")
        if self.listener is not None:
            self.listener(row)

    def flush(self) -> None:
        """Returns when every row is in the file, which in a bucket may lag behind. Errors are those of `write`."""
        if self._text is not None:
            with self._told():
                self._text.flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); checkpoints are untouched: make room and run the"
                " same command again"
            ) from None


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``, in every process."""
    return list(processes.share(lambda: read_lines(out / METRICS, LossRow)))


def train(
    state: State,
    standing: Standing,
    options: LoopOptions,
    *,
    step: Callable[[State, int], tuple[State, StepMetrics]],
    evaluate: Callable[[Bank], Losses],
    rate: Callable[[int], float],
    log: MetricsLog,
    checkpoints: Any,
    meta: dict[str, Any],
    leave: Leave = lambda number: False,
    bar: Any = None,
    drift: Callable[[Bank], Mapping[str, Any]] | None = None,
) -> tuple[State, Standing]:
    """Trains from a state to the end.

    Args:
        state: fresh, or restored.
        standing: likewise.
        options: when to do what.
        step: state and 0-based step number to the next state; the state given is used up.
        evaluate: test losses of parameters; the first is that which counts.
        rate: learning rate by 0-based step number, for the log.
        log: where metrics go.
        checkpoints: where states go.
        meta: saved with each of them.
        leave: whether to save and go, asked after every step.
        bar: progress bar over steps (tqdm).
        drift: what a row says of how far parameters have moved.

    Returns:
        The last state and standing.

    Raises:
        Preempted: told to leave; the state is saved.
        UserError: the loss or the gradient is no longer finite, or the run has diverged; or nothing can be written.
    """
    number = int(state.step)
    if number == 0:
        standing, _ = _evaluated(evaluate, state, standing, log)
    stopped = out_of_patience(standing, options)
    while number < options.steps and not stopped:
        began = time.perf_counter()
        state, found = step(state, number)
        metrics = jax.device_get(found)
        number += 1
        seconds = time.perf_counter() - began
        loss, norm, tokens = float(metrics.sums.per_token), float(metrics.gradient_norm), int(metrics.sums.tokens)
        standing = _healthy(standing, number, loss, norm, options, checkpoints, log)
        row = {"kind": "train", "step": number, "loss": loss, "loss_per_sample": float(metrics.sums.per_sample)}
        log.write(
            {
                **row,
                "tokens": tokens,
                **_of_auxiliaries(metrics.auxiliaries),
                "gradient_norm": norm,
                "learning_rate": rate(number - 1),
                "seconds": round(seconds, 4),
            }
        )
        if bar is not None:
            bar.set_postfix_str(f"loss {loss:.4f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update(1)
        tested, last = None, number == options.steps
        if last or number % options.eval_every == 0:
            standing, tested = _evaluated(evaluate, state, standing, log)
            stopped = out_of_patience(standing, options)
        if drift is not None and (last or stopped or number % options.drift_every == 0):
            log.write({"kind": "drift", "step": number, **drift(state.params)})
        leaving = leave(number) and not (last or stopped)
        if last or stopped or leaving or number % options.checkpoint_every == 0:
            log.flush()  # a run that goes on from there needs the rows before it
            checkpoints.save(state, {**meta, "standing": dataclasses.asdict(standing)}, tested)
        if leaving:
            checkpoints.wait()
            raise Preempted(f"told to leave at step {number}, which is saved; the same command goes on from there")
    checkpoints.wait()
    return state, standing


def _evaluated(
    evaluate: Callable[[Bank], Losses], state: State, standing: Standing, log: MetricsLog
) -> tuple[Standing, float]:
    began, step = time.perf_counter(), int(state.step)
    sums, *auxiliaries = jax.device_get(evaluate(state.params))
    loss = float(sums.per_token)
    seconds = round(time.perf_counter() - began, 4)
    log.write(
        {
            "kind": "eval",
            "step": step,
            "loss": loss,
            "loss_per_sample": float(sums.per_sample),
            "tokens": int(sums.tokens),
            **_of_auxiliaries(auxiliaries),
            "seconds": seconds,
        }
    )
    if standing.best_loss is None or loss < standing.best_loss:
        return dataclasses.replace(standing, best_loss=loss, best_step=step, worse=0), loss
    return dataclasses.replace(standing, worse=standing.worse + 1), loss


def _of_auxiliaries(found: Sequence[LossSums]) -> dict[str, float | int | None]:
    """What a row says of each auxiliary objective: its mean loss, None where nothing was counted, and the count."""
    told: dict[str, float | int | None] = {}
    for number, sums in enumerate(found):
        told[f"aux_{number}"] = float(sums.per_token) if sums.tokens else None
        told[f"aux_{number}_tokens"] = int(sums.tokens)
    return told


def out_of_patience(standing: Standing, options: LoopOptions) -> bool:
    """Whether tests have gone on too long without a better one."""
    return bool(options.patience) and standing.worse >= options.patience


def _healthy(
    standing: Standing,
    number: int,
    loss: float,
    norm: float,
    options: LoopOptions,
    checkpoints: Any,
    log: MetricsLog,
) -> Standing:
    problem = ""
    if not math.isfinite(loss):
        problem = f"the loss is {loss}"
    elif not math.isfinite(norm):
        problem = f"the gradient's norm is {norm}"
    first = loss if standing.first_loss is None else standing.first_loss
    # A step far too long may also end where every block's gate is shut: no gradient, and no better than a guess.
    dead = norm == 0 and loss > 0.99 * options.uniform
    high = standing.high + 1 if dead or loss > max(options.uniform, 2 * first) else 0
    if not problem and high >= _DIVERGED:
        state = "no gradient is left" if dead else "the run diverges"
        problem = f"{high} steps without learning, loss {loss:.2f} where a guess has {options.uniform:.2f}: {state}"
    if problem:
        log.flush()
        checkpoints.wait()
        last = checkpoints.last
        kept = "there is no checkpoint yet"
        if last and checkpoints.path is not None:
            kept = f"the last good checkpoint is {checkpoints.path / str(last)}"
        raise UserError(
            f"step {number}: {problem}; {kept}. Start anew in another --out with a lower --learning_rate, a --warmup"
            " or a --clip"
        )
    return dataclasses.replace(standing, first_loss=first, high=high)
