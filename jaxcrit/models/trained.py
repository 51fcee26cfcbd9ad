"""Trained parameters in the checkpoints of a run; beside `jaxcrit.training.checkpoints` all that imports orbax."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxcrit.core import console, digests, processes
from jaxcrit.core.errors import UserError, listed
from jaxcrit.core.files import in_bucket
from jaxcrit.core.hashing import sha256_json
from jaxcrit.core.reading import plain_tree
from jaxcrit.core.schema import conform
from jaxcrit.models.partition import Bank

FOLDER = digests.CHECKPOINTS
_LOGGER = logging.getLogger("absl")
_HANDLER = ocp.StandardCheckpointHandler()
# What a system says when a file cannot be written; tensorstore wraps it in a page of its own.
_SYSTEM = re.compile(
    "|".join(
        os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
    )
)


class CheckpointDigests(TypedDict):
    """``digests`` of a checkpoint's meta entry; ``meta`` is that of the rest of it, and of the others."""

    arrays: dict[str, dict[str, str]]
    meta: str


def with_digests(meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved with arrays, by item, and the digests of both; a collective."""
    taken = digests.of_arrays(arrays)
    return {**meta, "digests": {"arrays": taken, "meta": sha256_json([dict(meta), taken])}}


class Manager(ocp.CheckpointManager):
    """Orbax's manager of a run's checkpoints, which reads what it can of a damaged directory."""

    def __init__(self, directory: str, *items: Any, **options: Any):
        if not in_bucket(directory):
            plain_tree(Path(directory), "files of a checkpoint")
        _let_others_end_quietly()
        super().__init__(directory, *items, **options)

    def read(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Reads items of a checkpoint, and ``meta``; all of it must be what was written, by its digests.

        Runs made before weights of attention were matrices stored them by head, ``[n, heads, head_dim, in]``: they are
        read so and take their new shape.

        Args:
            step: number of the checkpoint.
            like: trees of abstract arrays with shardings, by item.

        Raises:
            UserError: an array of another size than expected.
            ValueError: arrays or ``meta`` are not what was written.
        """
        self.wait_until_finished()  # what is being written has no shapes yet
        stored = {item: self.stored(step, item) for item in like}

        def as_stored(item: str, keys: Any, leaf: Any) -> Any:
            name = _named(keys)
            shape = shapes[item].get(name, leaf.shape)
            if shape == leaf.shape:
                return leaf
            if math.prod(shape) != math.prod(leaf.shape):
                raise UserError(
                    f"{self.directory}: the checkpoint of step {step} holds {name} of shape {shape}, expected"
                    f" {leaf.shape}; it is of an older jaxcrit that stored this otherwise: finish the run with that one"
                )
            everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=everywhere)

        shapes = {
            item: {
                _named(keys): tuple(leaf.shape or ())
                for keys, leaf in jax.tree_util.tree_leaves_with_path(stored[item])
            }
            for item in like
        }
        wanted = {
            item: jax.tree_util.tree_map_with_path(functools.partial(as_stored, item), tree)
            for item, tree in like.items()
        }
        arrays = {item: ocp.args.StandardRestore(tree) for item, tree in wanted.items()}
        found = self.restore(step, args=ocp.args.Composite(**arrays, meta=ocp.args.JsonRestore()))
        held = {item: found[item] for item in like}
        shaped = {item: jax.tree.map(_shaped, held[item], tree) for item, tree in like.items()}
        return {**shaped, "meta": self._vouched(step, held, found["meta"])}

    def meta(self, step: int) -> Any:
        """What was saved with the arrays of a checkpoint, as it is there: nothing vouches for it yet."""
        self.wait_until_finished()
        return self.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def stored(self, step: int, item: str) -> Any:
        """What an item of a checkpoint holds: a tree of shapes and dtypes."""
        return _HANDLER.metadata(self.directory / str(step) / item).tree

    def _vouched(self, step: int, held: Mapping[str, Any], meta: Any) -> Any:
        """What was saved with arrays, less the digests, by which it and they are what was written."""
        if not isinstance(meta, dict) or "digests" not in meta:
            console.remark(f"jaxcrit: {self.directory / str(step)}: was written without digests; it is taken as it is")
            return meta
        rest = {key: value for key, value in meta.items() if key != "digests"}
        known = conform(meta["digests"], CheckpointDigests, "meta")
        if known["meta"] != sha256_json([rest, known["arrays"]]):
            raise ValueError("its meta entry is not what was written")
        if wrong := digests.differing_arrays(held, known["arrays"]):
            raise ValueError(f"{listed(wrong, 2)} are not what was written")
        return rest

    def metrics(self, step: int) -> Any:
        """The test loss saved with a checkpoint, or None; a damaged file of it is no reason not to begin."""
        try:
            return conform(super().metrics(step), dict[str, float] | None, "metrics")
        except (ValueError, RecursionError):
            return None


def refused_steps(run: Path, known: Iterable[str] = ()) -> dict[int, str]:
    """Reads every checkpoint of a run whole, onto one device, and says why it is not what was written; empty if it is.

    Args:
        run: run directory.
        known: names of checkpoints that are left out, for they are known to be damaged.
    """
    here = SingleDeviceSharding(jax.local_devices()[0])

    def like(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    found = {}
    with _silence(), _reading(run) as manager:
        for step in sorted(set(manager.all_steps()) - {int(name) for name in known if name.isdigit()}):
            try:
                items = ("params", "optimizer")
                trees = {item: jax.tree.map(like, manager.stored(step, item)) for item in items}
                known = manager.read(step, trees)["meta"]
                found[step] = "" if isinstance(known, dict) else "its meta entry is not what was written"
            except Exception as error:  # tensorstore, orbax and json each have their own for a damaged file
                found[step] = reason_of(error)
    return found


def _reading(run: Path) -> Manager:
    # A process that looks for all of them is not to wait for the others.
    who = ocp.options.MultiprocessingOptions(active_processes={jax.process_index()} if processes.alone() else None)
    options = ocp.CheckpointManagerOptions(create=False, read_only=True, multiprocessing_options=who)
    return Manager(str(run.absolute() / FOLDER), options=options)


def trained_parameters(run: Path, like: Callable[[int], Bank], step: str = "last") -> tuple[Bank, int]:
    """Reads the trained parameters of a run, and nothing else.

    Args:
        run: run directory.
        like: function of the step of a checkpoint that gives abstract arrays, with shardings.
        step: which checkpoint: its number; ``last``, the newest that can be read; or ``best``, that of lowest test
            loss among those kept.

    Returns:
        The parameters and their step.

    Raises:
        UserError: there is no such checkpoint, or none that can be read.
    """
    path = run.absolute() / FOLDER
    with _silence(), _reading(run) as manager:
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
                return manager.read(candidate, {"params": like(candidate)})["params"], candidate
            except UserError:
                raise
            except Exception as error:
                reason = reason_of(error)
                if candidate != wanted[-1]:
                    console.note(f"jaxcrit: {path}: the checkpoint of step {candidate} is skipped ({reason})")
    raise UserError(f"{path}: the checkpoint of step {', '.join(map(str, wanted))} cannot be read ({reason})")


def _named(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def _shaped(found: Any, like: Any) -> Any:
    if found.shape == like.shape:
        return found
    return jax.jit(jnp.reshape, static_argnums=1, out_shardings=like.sharding)(found, like.shape)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps orbax from warning, on the terminal, that what is opened to be read is read-only."""
    level = _LOGGER.level
    _LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _LOGGER.setLevel(level)


@functools.cache
def _let_others_end_quietly() -> None:
    """Of a read that fails other arrays still come in, to a loop that has ended, and Python would print that."""
    before = sys.unraisablehook

    def told(about: Any) -> None:
        if not (isinstance(about.exc_value, RuntimeError) and str(about.exc_value) == "Event loop is closed"):
            before(about)

    sys.unraisablehook = told


def reason_of(error: Exception) -> str:
    """Why a checkpoint could not be read or written, in a few words."""
    text = str(error).strip() or type(error).__name__
    said = _SYSTEM.search(text)
    return said[0] if said else text.splitlines()[0][:120]
