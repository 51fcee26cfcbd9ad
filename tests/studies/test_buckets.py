"""Whole commands with ``--out=gs://``: the same files as on a disk, and killed runs go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from support.known_facts import knowing_checkpoint, new_facts
from support.tiny_model import tiny_checkpoint

from jaxcrit.commands.main import main
from jaxcrit.core.files import as_path
from jaxcrit.core.files import read_lines as read_metrics
from jaxcrit.models.model import open_model

BUCKET = "gs://bucket"
TRAIN = ["--layers=2,4", "--steps=6", "--eval_every=2", "--checkpoint_every=1", "--learning_rate=1e-2"]
TIMED = {"run.json", "report.html"}  # say when, how long, and where


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "sky", "one", "two", "blue", "sat", "mat"]
    rows = [
        {"prompt": f"{row} {' '.join(rng.choice(words, 3))}", "response": str(rng.choice(words))} for row in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tuned(model, data, tmp_path_factory):
    """A training run on a disk."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert main(["finetune", f"--model={model}", f"--data={data}", *TRAIN, f"--out={out}"]) == 0
    return out


@pytest.fixture
def run(storage, tmp_path):
    """Runs a command with ``--out`` in the bucket, and on a disk where told to, with the same files."""

    def run(command, *flags, out, twin=False):
        assert main([command, *flags, f"--out={BUCKET}/{out}"]) == 0
        if not twin:
            return
        assert main([command, *flags, f"--out={tmp_path / out}"]) == 0
        local = {str(path.relative_to(tmp_path / out)): path for path in (tmp_path / out).rglob("*") if path.is_file()}
        stored = storage.files(f"bucket/{out}/")
        assert set(stored) == set(local)
        for name in set(local) - TIMED:
            assert stored[name] == local[name].read_bytes(), name

    return run


def untimed(out):
    return [
        {key: value for key, value in row.items() if key != "seconds"} for row in read_metrics(out / "metrics.jsonl")
    ]


def parameters(out):
    (tuned,) = open_model(str(out)).overlays
    return jax.device_get(tuned.params)


def test_commands_write_the_same_files_and_read_them_back(run, storage, model, data, tuned, tmp_path, capsys):
    given = [f"--model={model}", f"--data={data}"]
    run("analyze", *given, "--save_activations", out="analysis", twin=True)
    assert main(["analyze", *given, "--save_activations", f"--out={tmp_path / 'kept'}"]) == 0
    run("analyze", f"--states={tmp_path / 'kept'}", "--save_activations", out="states", twin=True)
    run("generate", *given, "--max_new_tokens=2", out="answers", twin=True)
    assert "answers/generations.jsonl.part" in storage.puts, "what is there so far is kept"
    run("screen", *given, f"--benign={data}", "--classes=family", out="screened", twin=True)
    gains = ["--methods=skip,gain", "--sites=mlp", "--gains=0.5", "--score=generated", "--max_new_tokens=1"]
    run("ablate", *given, *gains, out="ablated", twin=True)
    assert "ablated/partial_answers.jsonl" in storage.puts
    run("finetune", *given, *TRAIN, out="tuned")
    assert untimed(as_path(f"{BUCKET}/tuned")) == untimed(tuned)
    assert storage.files("bucket/tuned/")["layers.json"] == (tuned / "layers.json").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, parameters(f"{BUCKET}/tuned"), parameters(tuned))
    run("substitute", f"--base={model}", f"--tuned={BUCKET}/tuned", f"--data={data}", out="swapped", twin=True)
    pair = [f"--receiver={model}", f"--sender={BUCKET}/tuned", f"--data={data}"]
    run("reuse", *pair, "--max_new_tokens=2", "--random=1", out="reused", twin=True)
    run("analyze", f"--model={BUCKET}/tuned", f"--data={data}", out="analysis-tuned")
    run("compare", f"--a={BUCKET}/analysis", f"--b={BUCKET}/analysis-tuned", out="compared", twin=True)
    run("spectrum", f"--run={BUCKET}/analysis", "--k=2", out="spectrum", twin=True)
    run("correlate", f"--all={BUCKET}/analysis", out="correlated")
    run(
        "correlate",
        f"--scores={BUCKET}/analysis",
        f"--scores={BUCKET}/analysis-tuned/scores.json:step",
        out="pair",
        twin=True,
    )
    run("select", f"--scores={BUCKET}/analysis/scores.json", "--layers=critical:2", out="layers.json")
    run("data", f"--model={model}", f"--data={data}", out="rendered", twin=True)
    knowing, facts, _ = knowing_checkpoint(tmp_path / "known")
    run("trace", f"--model={knowing}", f"--facts={facts}", "--samples=1", out="traced", twin=True)
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in new_facts(facts)))
    how = [
        f"--facts={tmp_path / 'new.jsonl'}",
        f"--covariance_data={data}",
        "--layers=1,3",
        "--steps=2",
        "--contexts=0",
    ]
    run("edit", f"--model={knowing}", *how, out="edited")
    two = [dict(row, subject=f"{row['subject']} one") for row in new_facts(facts)]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in two))
    run("edit", f"--on={BUCKET}/edited", f"--facts={tmp_path / 'two.jsonl'}", *how[1:], out="edited-twice")
    assert len(open_model(f"{BUCKET}/edited-twice").overlays) == 2
    assert main(["export", f"--run={BUCKET}/tuned", f"--out={tmp_path / 'checkpoint'}"]) == 0
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()
    # Models are local, runs excepted.
    capsys.readouterr()
    for arguments in (["export", f"--run={BUCKET}/tuned", f"--out={BUCKET}/x"], ["analyze", f"--model={BUCKET}/x"]):
        assert main(arguments) == 2
        assert "expected a local directory; gcloud storage rsync" in capsys.readouterr().err
    assert main(["finetune", *given, "--layers=2", "--track=tensorboard", f"--out={BUCKET}/x"]) == 2
    assert "--track=tensorboard: keeps local files" in capsys.readouterr().err
    runs = [f"{BUCKET}/{name}" for name in ("analysis", "tuned", "swapped")]
    capsys.readouterr()
    assert main(["verify", *runs]) == 0, capsys.readouterr().out
    objects = storage.buckets["bucket"]
    generation, content = objects["analysis/scores.json"]
    objects["analysis/scores.json"] = generation, content.replace(b"low", b"lov", 1)
    assert main(["verify", runs[0]]) == 1 and "changed: scores.json: other content" in capsys.readouterr().out
    objects["analysis/scores.json"] = generation, content
    del objects["tuned/layers.json"]
    assert main(["verify", runs[1]]) == 1 and "missing: layers.json" in capsys.readouterr().out


KILLED = """
import os, signal, sys
from jaxcrit.commands.main import main
from jaxcrit.training import trainer
at, real = int(sys.argv[1]), trainer.micro_batches
def micro_batches(steps, number, *given):
    if number == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(steps, number, *given)
trainer.micro_batches = micro_batches
main(sys.argv[2:])
"""


def test_a_killed_run_goes_on_elsewhere(storage, model, data, tuned):
    flags = ["finetune", f"--model={model}", f"--data={data}", *TRAIN]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "4", *flags, f"--out={BUCKET}/run"],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    begun = as_path(f"{BUCKET}/run")
    saved = {path.name for path in (begun / "checkpoints").iterdir()}
    assert saved & {"2", "3", "4"} and not (begun / "checkpoints/6").exists()
    assert main([*flags, f"--out={BUCKET}/run"]) == 0
    assert untimed(begun) == untimed(tuned)
    jax.tree.map(np.testing.assert_array_equal, parameters(begun), parameters(tuned))


def test_refusals_are_one_line(storage, model, data, capsys, monkeypatch):
    given = [f"--model={model}", f"--data={data}"]

    def said(code, *arguments):
        assert main([*arguments]) == code
        *before, line = capsys.readouterr().err.splitlines()
        assert all(one.startswith(("training layers", "  ")) for one in before)
        return line

    assert "--out=gs://sealed/run: cannot be written" in said(2, "analyze", *given, "--out=gs://sealed/run")
    assert "--out=gs://absent/run: cannot be written" in said(2, "analyze", *given, "--out=gs://absent/run")
    assert "gs://bucket/absent/run.json: no such file" in said(2, "spectrum", f"--run={BUCKET}/absent")
    # Refused half-way: by the analysis in its own words, by training with what is kept.
    from jaxcrit.studies import analysis

    real = analysis.write_scores

    def sealed(*arguments):
        storage.refused["bucket"] = {"POST", "PUT"}
        return real(*arguments)

    monkeypatch.setattr(analysis, "write_scores", sealed)
    line = said(1, "analyze", *given, f"--out={BUCKET}/run")
    assert line == f"jaxcrit: error: {BUCKET}/run/scores.json: robot does not have storage.objects.create access"
    line = said(2, "finetune", *given, *TRAIN, "--out=gs://hidden/run")
    assert "no checkpoints can be kept there" in line and "storage.buckets.get" in line
