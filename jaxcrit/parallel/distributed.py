"""The start of a run of several processes: before jax looks at its devices, in every command."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping

import jax

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError

MODES = ("auto", "off", "on")


def start(
    mode: str = "auto", *, coordinator: str = "", num_processes: int = 0, process_id: int = -1, timeout: int = 300
) -> None:
    """Joins the other processes of the run, if there are any.

    Args:
        mode: ``on`` joins; ``auto`` does where a coordinator is given or Slurm, Open MPI or Kubernetes started several
            processes (on TPU pods say ``on``: only their metadata server knows); ``off`` never.
        coordinator: ``HOST:PORT`` of process 0; empty to ask the cluster.
        num_processes: how many; 0 to ask the cluster.
        process_id: which this is; -1 to ask the cluster.
        timeout: seconds to wait for the others. Then the process ends with 2 and a line that says what is missing.

    Raises:
        UserError: a wrong mode, no cluster found, or half of an address.
    """
    if mode not in MODES:
        raise UserError(f"--distributed={mode}: expected {', '.join(MODES)}")
    by_hand = (bool(coordinator), num_processes > 0, process_id >= 0)
    if any(by_hand) and not all(by_hand):
        raise UserError("expected --coordinator, --num_processes and --process_id together, or none of them")
    if mode == "off" or (mode == "auto" and not any(by_hand) and not _launched(os.environ)):
        return
    with _patience(timeout, coordinator):
        try:
            jax.distributed.initialize(
                coordinator or None,
                num_processes or None,
                None if process_id < 0 else process_id,
                # Where jax runs out of patience it aborts the process with a stack trace; ours ends first.
                initialization_timeout=timeout + 60,
            )
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--distributed={mode}: no other processes found ({reason}); give --coordinator=HOST:PORT,"
                " --num_processes and --process_id, or --distributed=off"
            ) from None
        processes.set_process(jax.process_index(), jax.process_count())


def _launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that jax knows says it started several processes."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_COUNT")
    return any(environment.get(name, "1") not in ("", "0", "1") for name in counts)


@contextlib.contextmanager
def _patience(seconds: int, coordinator: str) -> Iterator[None]:
    """Ends the process with a line of advice if the block takes longer."""

    def give_up() -> None:
        where = f" at {coordinator}" if coordinator else ""
        print(
            f"jaxcrit: error: waited {seconds} s for the other processes of this run{where}; start the same command on"
            " all workers at once (tpu_scripts/pod.sh run does), and see that they reach each other",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
