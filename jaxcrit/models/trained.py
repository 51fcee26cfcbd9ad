"""Trained parameters in the checkpoints of a run; beside `jaxcrit.training.checkpoints` all that imports orbax."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError
from jaxcrit.core.schema import conform
from jaxcrit.models.partition import Bank

FOLDER = "checkpoints"
_LOGGER = logging.getLogger("absl")
# What a system says when a file cannot be written; tensorstore wraps it in a page of its own.
_SYSTEM = re.compile(
    "|".join(
        os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
    )
)


class Manager(ocp.CheckpointManager):
    """Orbax's manager, which reads what it can of a damaged directory."""

    def metrics(self, step: int) -> Any:
        """The test loss saved with a checkpoint, or None; a damaged file of it is no reason not to begin."""
        try:
            return conform(super().metrics(step), dict[str, float] | None, "metrics")
        except (ValueError, RecursionError):
            return None


def trained_parameters(run: Path, like: Bank, step: str = "last") -> tuple[Bank, int]:
    """Reads the trained parameters of a run, and nothing else.

    Args:
        run: run directory.
        like: abstract arrays, with shardings.
        step: which checkpoint: its number; ``last``, the newest that can be read; or ``best``, that of lowest test
            loss among those kept.

    Returns:
        The parameters and their step.

    Raises:
        UserError: there is no such checkpoint, or none that can be read.
    """
    path = run.absolute() / FOLDER
    # A process that looks for all of them is not to wait for the others.
    who = ocp.options.MultiprocessingOptions(active_processes={jax.process_index()} if processes.alone() else None)
    with (
        _silence(),
        Manager(
            str(path), options=ocp.CheckpointManagerOptions(create=False, read_only=True, multiprocessing_options=who)
        ) as manager,
    ):
        losses = {number: (manager.metrics(number) or {}).get("loss") for number in manager.all_steps()}
        if not losses:
            raise UserError(f"{run}: holds no checkpoint yet; let jaxcrit finetune run on")
        tested = {number: loss for number, loss in losses.items() if loss is not None}
        there = ", ".join(
            f"{number} (test loss {loss:.4f})" if loss is not None else str(number)
            for number, loss in sorted(losses.items())
        )
        if step == "best" and tested:
            wanted = [min(tested, key=lambda number: (tested[number], number))]
        elif step == "last":
            wanted = sorted(losses, reverse=True)
        elif step in map(str, losses):
            wanted = [int(step)]
        else:
            raise UserError(f"{run}: no checkpoint of step {step}; expected last, best or one of those kept: {there}")
        reason = ""
        for candidate in wanted:
            try:
                found = manager.restore(candidate, args=ocp.args.Composite(params=ocp.args.StandardRestore(like)))
                return found["params"], candidate
            except Exception as error:
                reason = reason_of(error)
    raise UserError(f"{path}: the checkpoint of step {', '.join(map(str, wanted))} cannot be read ({reason})")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps orbax from warning, on the terminal, that what is opened to be read is read-only."""
    level = _LOGGER.level
    _LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _LOGGER.setLevel(level)


def reason_of(error: Exception) -> str:
    """Why a checkpoint could not be read or written, in a few words."""
    text = str(error).strip() or type(error).__name__
    said = _SYSTEM.search(text)
    return said[0] if said else text.splitlines()[0][:120]
