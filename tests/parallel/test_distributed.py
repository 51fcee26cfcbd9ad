"""Two processes of four CPU devices each, on this machine: the same results as one process."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import read_scores
from jaxcrit.parallel import distributed
from jaxcrit.studies.session import open_session
from jaxcrit.training.loop import read_metrics

ROWS = Path(__file__).parents[2] / "jaxcrit/assets/demo_prompts/choice.jsonl"


def start(arguments, process, port, count=2):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "error",
    }  # fmt: skip
    command = [sys.executable, "-m", "jaxcrit.cli.main", *arguments]
    machines = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={process}"]
    return subprocess.Popen(
        command + machines, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def together(*arguments):
    """Two processes with the same arguments; their outputs."""
    port = free_port()
    processes = [start(arguments, process, port) for process in (0, 1)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [(said(out), err) for out, err in outputs]


def said(out):
    """Without what Gloo, which carries the collectives of CPUs, says from several threads at once of whom it met."""
    theirs = re.compile(r"Gloo|peer ranks|^[\s\d:]*$")
    return "\n".join(line for line in out.splitlines() if not theirs.search(line))


def alone(*arguments):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-m", "jaxcrit.cli.main", *arguments], env=environment, check=True,
                   capture_output=True, timeout=300)  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_analyze(tmp_path):
    asked = ["analyze", f"--data={ROWS}", "--limit=16"]
    (out, _), (silent, _) = together(*asked, f"--out={tmp_path / 'two'}")
    assert "Critical layers" in out and silent == ""
    alone(*asked, f"--out={tmp_path / 'one'}")
    ours, theirs = (read_scores(tmp_path / name / "scores.json") for name in ("two", "one"))
    for key, score in theirs.items():
        np.testing.assert_allclose(ours[key].values, score.values, atol=1e-5)
    # A second run takes the Grams from the first one's fingerprint, in both processes.
    (again, _), _ = together(*asked, f"--out={tmp_path / 'two'}")
    assert again == out


def test_finetune_goes_on_after_one_process_was_killed(tmp_path):
    asked = ["finetune", f"--data={ROWS}", "--layers=3-4", "--steps=20", "--batch_size=8", "--learning_rate=1e-4",
             "--optimizer=sgd", "--checkpoint_every=4"]  # fmt: skip
    out = tmp_path / "two"
    port = free_port()
    processes = [start([*asked, f"--out={out}"], process, port) for process in (0, 1)]
    wait_for_step(out, 6, processes)
    for process in reversed(processes):  # a launcher ends the others when one is gone
        process.kill()
        process.communicate()
    reached = max(row["step"] for row in read_metrics(out / "metrics.jsonl"))
    assert 6 <= reached < 20
    together(*asked, f"--out={out}")
    alone(*asked, f"--out={tmp_path / 'one'}")
    tuned = [open_session(str(tmp_path / name)).tuned[0].params["train"] for name in ("two", "one")]
    for path, value in tuned[1].items():
        np.testing.assert_allclose(tuned[0][path], value, atol=1e-6, err_msg=path)
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "train"]
    assert steps == list(range(1, 21))


def test_a_notice_to_one_process_lets_both_save_and_leave(tmp_path):
    asked = ["finetune", f"--data={ROWS}", "--layers=3-4", "--steps=500", "--batch_size=8", "--checkpoint_every=500",
             "--eval_every=500", f"--out={tmp_path}"]  # fmt: skip
    port = free_port()
    processes = [start(asked, process, port) for process in (0, 1)]
    wait_for_step(tmp_path, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    assert "told to leave at step" in outputs[0][1]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def wait_for_step(out, step, processes):
    deadline = time.monotonic() + 240
    while not any(row["step"] >= step for row in read_metrics(out / "metrics.jsonl")):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)


def test_a_worker_that_never_comes(tmp_path):
    process = start(["analyze", f"--out={tmp_path / 'out'}", "--distributed_timeout=2"], 0, free_port())
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "waited 2 s for the other processes" in err and "on all workers" in err
    assert not (tmp_path / "out").exists()


def test_mistakes():
    with pytest.raises(UserError, match="together, or none"):
        distributed.start(coordinator="localhost:1")
    with pytest.raises(UserError, match="expected auto, off, on"):
        distributed.start("maybe")
    distributed.start("off")
    distributed.start("auto")
