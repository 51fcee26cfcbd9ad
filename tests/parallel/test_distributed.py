"""Two processes of four CPU devices each, on this machine: the same results as one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.known_facts import knowing_checkpoint, new_facts
from support.mixtures import answering_mixture, rows_to_answer, write_rows

import jaxcrit
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json, read_npz
from jaxcrit.core.files import read_lines as read_metrics
from jaxcrit.core.layers import read_scores
from jaxcrit.models.model import EMBEDDED_MODEL, open_model
from jaxcrit.parallel import distributed

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "jaxcrit/assets/demo_prompts/choice.jsonl"
_PATIENCE = 600  # seconds; of a busy machine
COMMANDS = (str(Path(__file__).parents[1] / "support" / "commands.py"),)


def start(arguments, process, port, count=2, folder=None, program=("-m", "jaxcrit.commands.main"), environment=None):
    """One process of ``count``, in a folder of its own where one is given."""
    surroundings = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONWARNINGS": "error",
        "PYTHONPATH": str(ROOT),
    }
    machines = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={process}"]
    return subprocess.Popen(
        [sys.executable, *program, *arguments, *machines],
        env=surroundings | (environment or {}),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def together(*arguments, folders=(None, None), program=("-m", "jaxcrit.commands.main")):
    """Two processes with the same arguments; their outputs."""
    port = free_port()
    processes = [
        start(arguments, process, port, folder=folder, program=program) for process, folder in enumerate(folders)
    ]
    outputs = [process.communicate(timeout=_PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [(said(out), err) for out, err in outputs]


def said(out):
    """Without what Gloo, which carries the collectives of CPUs, says from several threads at once of whom it met."""
    theirs = re.compile(r"Gloo|peer ranks|^[\s\d:]*$")
    return "\n".join(line for line in out.splitlines() if not theirs.search(line))


def alone(*arguments, folder=None, program=("-m", "jaxcrit.commands.main")):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run(
        [sys.executable, *program, *arguments],
        env=environment,
        check=True,
        capture_output=True,
        cwd=folder,
        timeout=_PATIENCE,
    )


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


def test_finetune_bears_a_process_that_stands_still_and_goes_on_after_one_was_killed(tmp_path):
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]  # with answers that the model does not know
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row | {"response": row["response"][::-1]}) + "\n" for row in rows)
    )
    asked = [
        "finetune",
        f"--data={tmp_path / 'rows.jsonl'}",
        "--layers=3-4",
        "--steps=20",
        "--batch_size=8",
        "--learning_rate=1e-3",
        "--optimizer=sgd",
        "--checkpoint_every=4",
        "--drift_every=4",
    ]
    out = tmp_path / "two"
    port = free_port()
    processes = [start([*asked, f"--out={out}"], process, port) for process in (0, 1)]
    wait_for_step(out, 2, processes)
    processes[1].send_signal(signal.SIGSTOP)  # as a machine that is paused
    time.sleep(12)
    processes[1].send_signal(signal.SIGCONT)
    wait_for_step(out, 6, processes)
    processes[1].kill()
    began = time.monotonic()
    _, said_of_it = processes[0].communicate(timeout=60)
    assert time.monotonic() - began < 10 and processes[0].returncode == 137
    assert "process 1 was killed, and this one ends with it" in said_of_it and "Traceback" not in said_of_it
    processes[1].communicate()
    reached = max(row["step"] for row in read_metrics(out / "metrics.jsonl"))
    assert 6 <= reached < 20
    together(*asked, f"--out={out}")
    alone(*asked, f"--out={tmp_path / 'one'}")
    tuned = [open_model(str(tmp_path / name)).overlays[0].params["train"] for name in ("two", "one")]
    base = open_model("").decoder().weights()
    for path, value in tuned[1].items():
        np.testing.assert_allclose(tuned[0][path], value, atol=1e-6, err_msg=path)
        assert np.abs(value - base[path][3:5]).max() > 1e-4, path
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "train"]
    assert steps == list(range(1, 21))
    moved = [
        [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if row["kind"] == "drift"]
        for name in ("two", "one")
    ]
    assert [row["step"] for row in moved[0]] == [4, 8, 12, 16, 20]
    for ours, theirs in zip(*moved, strict=True):
        np.testing.assert_allclose(ours["weights"], theirs["weights"], rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(ours["cka"], theirs["cka"], atol=1e-5)


def test_a_notice_to_one_process_lets_both_save_and_leave(tmp_path):
    asked = [
        "finetune",
        f"--data={ROWS}",
        "--layers=3-4",
        "--steps=500",
        "--batch_size=8",
        "--checkpoint_every=500",
        "--eval_every=500",
        f"--out={tmp_path}",
    ]
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


def other_commands(tuned, states, known, mixture):
    """Every command that is not tested above; those that run a model in front, with a mesh across the processes."""
    rows = f"--data={ROWS}"
    return [
        ["substitute", f"--tuned={tuned}", rows, "--limit=12", "--window=13", "--out=substitute"],
        ["generate", rows, "--limit=12", "--max_new_tokens=4", "--out=generate"],
        ["generate", rows, "--limit=8", "--max_new_tokens=2", "--out=split", "--mesh=fsdp=8"],
        ["score", rows, "--limit=12", f"--model={tuned}", "--out=score"],
        [
            "score",
            rows,
            "--limit=8",
            "--criteria=weight_change,gradient_norm",
            f"--model={tuned}",
            f"--base={EMBEDDED_MODEL}",
            "--out=score_split",
            "--mesh=fsdp=8",
        ],
        ["ablate", rows, "--limit=8", "--methods=mean,gain", "--sites=mlp", "--score=greedy", "--out=ablate"],
        ["prune", rows, "--limit=8", "--drop=5,6", "--controls=1", "--out=prune"],
        ["reuse", rows, f"--sender={tuned}", "--limit=8", "--max_new_tokens=2", "--random=1", "--out=reuse"],
        [
            "generate",
            rows,
            f"--sender={tuned}",
            "--recompute=first:4",
            "--limit=8",
            "--max_new_tokens=2",
            "--out=mixed",
        ],
        [
            "remix",
            f"--model={mixture / 'model'}",
            *(f"--{name}={mixture / name}.jsonl" for name in ("data", "reference")),
            "--layers=5,6",
            "--method=mean,kernel,mode,descent",
            "--at=all",
            "--neighbours=1",
            "--steps=2",
            "--controls=few",
            "--out=remix",
        ],
        ["screen", rows, "--limit=12", f"--benign={ROWS}", "--classes=family", "--out=screen"],
        ["intervene", rows, "--limit=12", "--max_new_tokens=3", "--out=intervene"],
        ["trace", f"--model={known[0]}", f"--facts={known[1]}", "--samples=2", "--out=trace"],
        ["spectrum", rows, "--limit=16", "--out=spectrum"],
        ["analyze", rows, "--limit=16", "--form=features", "--out=features"],
        ["analyze", rows, "--limit=16", "--form=tiled", "--out=tiled"],
        ["analyze", f"--states={states}", "--limit=14", "--out=states"],
        ["data", rows, "--out=data"],
        ["select", "--scores=spectrum/scores.json", "--layers=critical:2", "--out=selected.json"],
        ["compare", "spectrum", "spectrum", "--out=compare"],
        ["correlate", "--scores=spectrum/scores.json", "--scores=score/scores.json", "--out=correlate"],
        ["export", f"--run={tuned}", "--out=export"],
    ]


def interrupted(folder):
    """Leaves of the substitution and the generation in a folder what an interruption would."""
    for run in (folder / "substitute", folder / "generate"):
        content = json.loads((run / "run.json").read_text()) | {"status": "running"}
        del content["digests"]  # which stand there at the end
        (run / "run.json").write_text(json.dumps(content))
    identity = read_json(folder / "substitute/run.json", "jaxcrit.run")["identity"]
    with np.load(folder / "substitute/substitution.npz") as found:
        losses = np.concatenate([found["losses"], found["host"][None], found["guest"][None]])
        losses[:, 8:] = np.nan
        np.savez(
            folder / "substitute/partial.npz",
            losses=losses,
            tokens=found["tokens"],
            meta=json.dumps({"format": "jaxcrit.partial", "format_version": 1, "identity": identity}),
        )
    answers = folder / "generate/generations.jsonl"
    kept = answers.read_text().splitlines(keepends=True)[:7]
    answers.unlink()
    (folder / "generate/generations.jsonl.part").write_text("".join(kept))


def test_every_other_command(tmp_path):
    """One start of two processes, the second without any disk in common with the first."""
    tuned, one, folders = tmp_path / "tuned", tmp_path / "one", (tmp_path / "first", tmp_path / "second")
    for folder in (one, *folders):
        folder.mkdir()
    train = [
        "finetune",
        f"--data={ROWS}",
        "--layers=3-4",
        "--steps=2",
        "--batch_size=8",
        "--learning_rate=1e-3",
        f"--out={tuned}",
    ]
    capture = ["analyze", f"--data={ROWS}", "--limit=16", "--save_activations", f"--out={tmp_path / 'states'}"]
    known = knowing_checkpoint(tmp_path / "known")
    mixture = tmp_path / "mixture"
    answering_mixture(mixture / "model")
    write_rows(mixture / "data.jsonl", rows_to_answer(8, wrong=3, seed=2))
    write_rows(mixture / "reference.jsonl", rows_to_answer(12, seed=1))
    commands = other_commands(tuned, tmp_path / "states", known, mixture)
    alone(json.dumps([train, capture, *commands]), folder=one, program=COMMANDS)
    for name in ("substitute", "generate"):
        shutil.copytree(one / name, folders[0] / name)
    interrupted(folders[0])
    # The last two find their runs complete.
    (_, told), (silent, _) = together(json.dumps([*commands, *commands[:2]]), folders=folders, program=COMMANDS)
    assert silent == "" and "warning" not in told.lower()
    assert list(folders[1].iterdir()) == []
    scored = sorted(path.relative_to(one) for path in one.rglob("scores.json"))
    assert len(scored) == 12
    for path in scored:
        ours, theirs = read_scores(folders[0] / path), read_scores(one / path)
        assert ours.keys() == theirs.keys()
        for key, score in theirs.items():
            np.testing.assert_allclose(ours[key].values, score.values, atol=1e-5, err_msg=f"{path} {key}")
    ours, theirs = (read_json(folder / "remix/remix.json", "jaxcrit.remix")["variants"] for folder in (folders[0], one))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["name"] == other["name"] and mine["exact"] == other["exact"] == 0.625
        np.testing.assert_allclose(mine["loss"], other["loss"], atol=1e-5)
    for path in (
        "generate/generations.jsonl",
        "split/generations.jsonl",
        "mixed/generations.jsonl",
        "reuse/layers.json",
        "data/examples.jsonl",
        "selected.json",
        "export/model.safetensors",
        "correlate/correlation.json",
        "intervene/intervention.json",
    ):
        assert (folders[0] / path).read_bytes() == (one / path).read_bytes(), path


def test_edit(tmp_path):
    """Two processes write one checkpoint, so the directory is common to them."""
    model, facts = knowing_checkpoint(tmp_path / "known")[:2]
    facts.with_name("new.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in new_facts(facts)))
    command = [
        "edit",
        f"--model={model}",
        f"--facts={facts.with_name('new.jsonl')}",
        f"--covariance_data={ROWS}",
        "--layers=1,3",
        "--steps=4",
        "--contexts=1",
    ]
    alone(*command, f"--out={tmp_path / 'one'}")
    together(*command, f"--out={tmp_path / 'two'}")
    ours, theirs = (read_npz(tmp_path / name / "keys.npz")[0] for name in ("two", "one"))
    for name, keys in theirs.items():
        np.testing.assert_allclose(ours[name], keys, atol=1e-4 * np.abs(keys).max())
    ours, theirs = (open_model(tmp_path / name).decoder().weights()["blocks.down"] for name in ("two", "one"))
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_a_worker_that_never_comes(tmp_path):
    process = start(["analyze", f"--out={tmp_path / 'out'}", "--distributed_timeout=2"], 0, free_port())
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "waited 2 s for the other processes" in err and "on all workers" in err
    assert not (tmp_path / "out").exists()


OTHER_VERSION = (
    "-c",
    "import jaxcrit; jaxcrit.__version__ = '9.9'; import sys; from jaxcrit.commands import main;"
    " sys.exit(main.main(sys.argv[1:]))",
)


def test_processes_that_are_not_alike():
    port = free_port()
    first = start(["data", "--limit=3"], 0, port)
    second = start(["data", "--limit=4"], 1, port, program=OTHER_VERSION)
    (_, told), (_, silent) = (process.communicate(timeout=120) for process in (first, second))
    assert (first.returncode, second.returncode, silent) == (2, 2, "")
    assert (
        f"jaxcrit {jaxcrit.__version__} in process 0, 9.9 in process 1; --limit 3 in process 0, 4 in process 1" in told
    )
    assert len(told.strip().splitlines()) == 1


def test_who_differs():
    reports = [{"jax": "1", "python": "3"}, {"jax": "2", "python": "3"}, {"jax": "1"}, {"jax": "1"}]
    assert distributed.differences(reports) == [
        "jax 1 in process 0, 2-3, 2 in process 1",
        "python 3 in process 0-1, none in process 2-3",
    ]
    assert distributed.differences(reports[:1]) == distributed.differences([]) == []


def test_what_one_process_lacks_is_said_by_it(tmp_path):
    folders, port = (tmp_path / "first", tmp_path / "second"), free_port()
    for folder in folders:
        folder.mkdir()
    shutil.copy(ROWS, folders[0] / "rows.jsonl")
    asked = ["generate", "--data=rows.jsonl", "--out=run"]
    processes = [start(asked, process, port, folder=folder) for process, folder in enumerate(folders)]
    _, told = processes[1].communicate(timeout=120)
    began = time.monotonic()
    _, other = processes[0].communicate(timeout=60)
    assert time.monotonic() - began < 10, "the other ends too"
    assert [process.returncode for process in processes] == [2, 2]
    assert other == "jaxcrit: process 1 has failed, and this one ends with it\n"
    assert re.fullmatch(r"jaxcrit: error: process 1: --data: no file rows.jsonl; .*\n", told)


def test_two_processes_need_little_more_than_half_the_memory_of_one_to_load_a_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from load_memory import SPLIT_TARGET, rises, write_checkpoint

    size = write_checkpoint(tmp_path, layers=4, vocab_size=8000, hidden_size=1024, intermediate_size=4096)
    (one,), two = rises(tmp_path, 1), rises(tmp_path, 2)
    assert one >= size and max(two) <= SPLIT_TARGET * one, (size, one, two)


def test_mistakes():
    with pytest.raises(UserError, match="together, or none"):
        distributed.start(coordinator="localhost:1")
    with pytest.raises(UserError, match="expected auto, off, on"):
        distributed.start("maybe")
    distributed.start("off")
    distributed.start("auto")


def test_the_watch_for_others_is_over_before_python_ends():
    """Met inside jax's client by the end of Python, a thread aborts the process: exit code 134 in place of 0."""
    program = """if True:
        import sys
        import jax
        from jaxcrit.core import processes

        jax.distributed.initialize(sys.argv[1], 1, 0)
        client = processes._client()

        class Slow:
            def key_value_dir_get(self, key):
                try:
                    client.blocking_key_value_get("jaxcrit/never", 300)
                except Exception:
                    return []

        processes._client = Slow
        processes._LOOK = 0.0
        processes.end_with_others()
    """
    ended = subprocess.run(
        [sys.executable, "-c", program, f"localhost:{free_port()}"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
