"""Checkpoints of what changes: trained parameters, optimizer, position.

The frozen rest is not in them; the run's ``run.json`` says which model it is, by path and hash.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import in_bucket
from jaxcrit.core.schema import Count, conform
from jaxcrit.models.partition import Selection
from jaxcrit.models.trained import FOLDER, Manager, reason_of, with_digests
from jaxcrit.training.step import State

_LOGGER = logging.getLogger("absl")


class SavedStanding(TypedDict):
    """What the loop remembers, as saved with a state; see `jaxcrit.training.loop.Standing`."""

    best_loss: float | None
    best_step: Count
    worse: Count
    first_loss: float | None
    high: Count


class SavedAlways(TypedDict):
    """What is saved with every state of a run."""

    step: Count
    standing: SavedStanding


class Saved(SavedAlways, total=False):
    """With what is saved where layers are chosen anew."""

    selections: list[Selection]


@dataclasses.dataclass(frozen=True, eq=False)
class Restored:
    """What was found.

    Attributes:
        state: state in the newest checkpoint that could be read; None where none could.
        meta: what was saved with it.
        skipped: newer ones that could not be read, each with the reason.
    """

    state: State | None
    meta: dict[str, Any]
    skipped: list[str]


class Checkpoints:
    """The checkpoints of one run: written in the background, each whole or not at all.

    Kept are the newest ones and the one of lowest test loss.
    """

    def __init__(self, run: Path, *, keep: int = 2):
        self.path = run.absolute() / FOLDER
        best = BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            best_fn=_loss,  # without one the losses are not on disk, and a run that goes on has forgotten its best
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        names = ("params", "optimizer", "meta")
        if in_bucket(run):
            _look_at_bucket(run)
        self._manager = Manager(str(self.path), options=options, item_names=names)

    def __enter__(self) -> Checkpoints:
        # A write that fails is reported by `save` and `wait`, in a line; orbax and its threads would print it too.
        self._hooks = threading.excepthook, sys.unraisablehook
        threading.excepthook = lambda _: None
        sys.unraisablehook = lambda _: None
        self._level = _LOGGER.level
        _LOGGER.setLevel(logging.CRITICAL)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._manager.close()
        except Exception as error:
            if kind is None:
                raise self._unwritable(error) from None
        finally:
            if kind is not None:
                gc.collect()  # coroutines that a failed write left behind complain when they go: let them go now
            threading.excepthook, sys.unraisablehook = self._hooks
            _LOGGER.setLevel(self._level)

    @property
    def last(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: State, meta: Mapping[str, Any], loss: float | None = None) -> None:
        """Begins to write a checkpoint; returns when the arrays may change again.

        Args:
            state: arrays on any mesh.
            meta: JSON values.
            loss: test loss at this step, where it was measured.

        Raises:
            UserError: this or the one before cannot be written; those before it are untouched.
        """
        step = int(state.step)
        meta = with_digests({**meta, "step": step}, {"params": state.params, "optimizer": state.optimizer})
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(state.optimizer),
            meta=ocp.args.JsonSave(meta),
        )
        try:
            self._manager.save(step, args=items, metrics=None if loss is None else {"loss": loss})
        except Exception as error:
            raise self._unwritable(error) from None

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritable(error) from None

    def restore(
        self, like: State | Callable[[Mapping[str, Any]], State], meta: Any = dict[str, Any]
    ) -> Restored | None:
        """Reads the newest checkpoint that can be read onto the shardings of ``like``; removes newer, broken ones.

        Args:
            like: abstract state, with shardings; or a function of what was saved with it that gives that.
            meta: declaration (`jaxcrit.core.schema`) of what was saved with it.

        Returns:
            What was found, or None where there is nothing.

        Raises:
            UserError: see `Manager.read`.
        """
        skipped: list[str] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                asked = like if isinstance(like, State) else like(conform(self._manager.meta(step), meta, "meta"))
                found = self._manager.read(step, {"params": asked.params, "optimizer": asked.optimizer})
                fits = _fits(found["meta"], meta)
            except UserError:
                raise
            except Exception as error:  # tensorstore, orbax and json each have their own for a file cut short
                skipped.append(f"checkpoint of step {step} is damaged and was skipped ({reason_of(error)})")
                continue
            if not fits:
                skipped.append(f"checkpoint of step {step} is damaged and was skipped (its meta entry)")
                continue
            for broken in [other for other in self._manager.all_steps() if other > step]:
                self._manager.delete(broken)
            state = State(found["params"], found["optimizer"], jax.device_put(jnp.int32(step), asked.step.sharding))
            return Restored(state, found["meta"], skipped)
        for broken in list(self._manager.all_steps()):
            self._manager.delete(broken)
        return None if not skipped else Restored(None, {}, skipped)

    def _unwritable(self, error: Exception) -> UserError:
        whole = self._manager.all_steps()
        kept = f"the last one, of step {max(whole)}, is whole" if whole else "there is none yet"
        return UserError(
            f"{self.path}: a checkpoint cannot be written ({reason_of(error)}); {kept}: make room and run the same"
            " command again"
        )


class NoCheckpoints:
    """The checkpoints of a training that keeps nothing: a Python caller that gave no directory."""

    path: Path | None = None
    last: int | None = None

    def __enter__(self) -> NoCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def save(self, state: State, meta: Mapping[str, Any], loss: float | None = None) -> None:
        """Keeps nothing."""

    def wait(self) -> None:
        """Returns at once."""

    def restore(self, like: Any, meta: Any = None) -> None:
        """There is nothing to go on from."""


def _fits(meta: Any, kind: Any) -> bool:
    """Whether what was saved with a state is as declared."""
    try:
        conform(meta, kind, "meta")
    except UserError:
        return False
    return True


def _look_at_bucket(run: Path) -> None:
    """Does at once what orbax does when it removes the first checkpoint, and what takes a permission of its own."""
    try:
        cast(Any, run).look_at_bucket()
    except OSError as error:
        raise UserError(
            f"{run}: no checkpoints can be kept there ({error.strerror}); have the owner of the bucket"
            " allow storage.buckets.get"
        ) from None


def _loss(metrics: Mapping[str, float]) -> float:
    return metrics["loss"]
