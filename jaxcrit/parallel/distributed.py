"""The start of a run of several processes: before jax looks at its devices, in every command."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence

from jaxcrit.core import processes
from jaxcrit.core.errors import UserError
from jaxcrit.parallel import lifelines

# Seconds after which a process that does not stir counts as gone; kills do not wait for it (`lifelines`). With 8, a
# machine that stood still for a moment ended the run of all.
_SILENCE = 100
MODES = ("auto", "off", "on")


def start(
    mode: str = "auto",
    *,
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    timeout: int = 300,
    about: Mapping[str, str] | None = None,
) -> None:
    """Joins the other processes of the run, if there are any; once in a program, whatever it runs then.

    Args:
        mode: ``on`` joins; ``auto`` does where a coordinator is given or Slurm, Open MPI or Kubernetes started several
            processes (on TPU pods say ``on``: only their metadata server knows); ``off`` never.
        coordinator: ``HOST:PORT`` of process 0; empty to ask the cluster.
        num_processes: how many; 0 to ask the cluster.
        process_id: which this is; -1 to ask the cluster.
        timeout: seconds to wait for the others. Then the process ends with 2 and a line that says what is missing.
        about: what must be the same in all processes, by name: versions, flags.

    Raises:
        UserError: a wrong mode, no cluster found, half of an address, or processes that differ in ``about``.
    """
    if mode not in MODES:
        raise UserError(f"--distributed={mode}: expected {', '.join(MODES)}")
    by_hand = (bool(coordinator), num_processes > 0, process_id >= 0)
    if any(by_hand) and not all(by_hand):
        raise UserError("expected --coordinator, --num_processes and --process_id together, or none of them")
    if mode == "off" or (mode == "auto" and not any(by_hand) and not _launched(os.environ)):
        return
    import jax
    from jax._src.distributed import global_state  # which process this is, before any device is looked at

    with _patience(timeout, coordinator):
        try:
            if not jax.distributed.is_initialized():
                jax.distributed.initialize(
                    coordinator or None,
                    num_processes or None,
                    None if process_id < 0 else process_id,
                    # Where jax runs out of patience it aborts the process with a stack trace; ours ends first.
                    initialization_timeout=timeout + 60,
                    heartbeat_timeout_seconds=_SILENCE,
                )
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--distributed={mode}: no other processes found ({reason}); give --coordinator=HOST:PORT,"
                " --num_processes and --process_id, or --distributed=off"
            ) from None
        processes.set_process(global_state.process_id, global_state.num_processes or 1)
        if differ := differences(processes.gather(dict(about or {}))):
            raise UserError(
                f"processes of one run differ: {'; '.join(differ[:3])}; start the same command on all workers, with the"
                " same versions (tpu_scripts/pod.sh install and run do)"
            )
        _end_together(global_state.coordinator_address or coordinator)
        jax.devices()  # another process may be late here too


@functools.cache  # once, whatever is run in these processes one after the other
def _end_together(coordinator: str) -> None:
    processes.end_with_others()
    if not processes.alone():
        lifelines.hold(coordinator)


def differences(reports: Sequence[Mapping[str, str]]) -> list[str]:
    """What processes that should be alike are not alike in, such as ``jax 0.10.2 in process 0, 0.11.0 in process 1-3``.

    Args:
        reports: values by name, from each process.
    """
    found = []
    for name in dict.fromkeys(name for report in reports for name in report):
        having: dict[str, list[int]] = {}
        for number, report in enumerate(reports):
            having.setdefault(report.get(name, "none"), []).append(number)
        if len(having) > 1:
            who = [f"{value} in process {_ranges(numbers)}" for value, numbers in having.items()]
            found.append(f"{name} {', '.join(who)}")
    return found


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs of them as ``1-3``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


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
