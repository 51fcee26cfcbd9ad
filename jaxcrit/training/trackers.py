"""Hands the rows of ``metrics.jsonl`` on to trackers of experiments, which keep what they keep in the run directory."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxcrit.core.errors import UserError

Listener = Callable[[dict[str, Any]], None]


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by name: ``train/loss``, and of a list by layer ``drift/cka/3``; layers chosen are none."""
    kind, found = row["kind"], dict[str, float]()
    for name, value in row.items():
        if name in ("kind", "step") or kind == "layers":
            continue
        values = value if isinstance(value, list) else [value]
        labels = [f"{kind}/{name}/{layer}" for layer in range(len(values))] if value is values else [f"{kind}/{name}"]
        found |= {label: one for label, one in zip(labels, values, strict=True) if one is not None}
    return found


@contextlib.contextmanager
def tracked(tracker: str, out: Path, step: int, config: Mapping[str, Any]) -> Iterator[Listener]:
    """Gives what is to be called with every row.

    Args:
        tracker: one of `jaxcrit.core.groups.TRACKERS`.
        out: run directory, local; the tracker's run is named after it.
        step: steps of a run that goes on.
        config: options of the run.

    Raises:
        UserError: the tracker takes no run.
    """
    with contextlib.ExitStack() as open_while:
        try:
            log = open_while.enter_context(_TRACKERS[tracker](out, step, config))
        except Exception as error:  # whatever keeps another library from its server
            first = (str(error).strip() or repr(error)).splitlines()[0]
            advice = "; WANDB_API_KEY or WANDB_MODE=offline may be missing" if tracker == "wandb" else ""
            raise UserError(f"--track={tracker}: takes no run ({first}){advice}; or leave it out") from None

        def listen(row: dict[str, Any]) -> None:
            if found := scalars(row):
                log(found, row["step"])

        yield listen


@contextlib.contextmanager
def _tensorboard(out: Path, step: int, config: Mapping[str, Any]) -> Iterator[Callable[[dict[str, float], int], None]]:
    """Event files; TensorBoard is told to forget those of an earlier start beyond the step."""
    from tensorboardX import SummaryWriter

    purge = step + 1 if step else 0
    with contextlib.closing(SummaryWriter(str(out / "tensorboard"), purge_step=purge)) as writer:

        def log(found: dict[str, float], step: int) -> None:
            for name, value in found.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        yield log


@contextlib.contextmanager
def _trackio(out: Path, step: int, config: Mapping[str, Any]) -> Iterator[Callable[[dict[str, float], int], None]]:
    os.environ.setdefault("TRACKIO_DIR", str(out / "trackio"))
    import trackio

    with contextlib.redirect_stdout(None):
        trackio.init(project="jaxcrit", name=out.name, config=dict(config), resume="allow")
    try:
        yield lambda found, step: trackio.log(found, step=step)
    finally:
        with contextlib.redirect_stdout(None):
            trackio.finish()


@contextlib.contextmanager
def _wandb(out: Path, step: int, config: Mapping[str, Any]) -> Iterator[Callable[[dict[str, float], int], None]]:
    import wandb

    own = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]  # a run that goes on is the same run there
    quiet = wandb.Settings(silent=True, console="off", symlink=False)
    there = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "jaxcrit"),
        name=out.name,
        id=own,
        dir=str(out),
        config=dict(config),
        resume="allow",
        settings=quiet,
    )
    try:  # as a context it would print the traceback of whatever ends the training
        yield lambda found, step: there.log(found, step=step)
    finally:
        there.finish()


_TRACKERS = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}
