"""tpu_scripts/pod.sh against a gcloud that writes down what it is asked, and answers from a list."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
POD = SCRIPTS / "pod.sh"
# Appends its arguments to calls.jsonl; takes the next line of answers-VERB, "code text", where there is one.
GCLOUD = """#!/usr/bin/env python3
import json, pathlib, sys
here = pathlib.Path(__file__).parent
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
answers = here / ("answers-" + next(word for word in sys.argv[1:] if word in ("create", "describe", "ssh", "scp",
                                                                              "delete", "rsync")))
lines = answers.read_text().splitlines() if answers.exists() else []
if lines:
    answers.write_text("\\n".join(lines[1:]))
    code, _, text = lines[0].partition(" ")
    print(text)
    sys.exit(int(code))
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Runs pod.sh with a stand-in for gcloud; returns (exit code, output, calls)."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(GCLOUD)
    gcloud.chmod(gcloud.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    for name, value in {"TPU_NAME": "pod", "TPU_ZONE": "here", "TPU_TYPE": "v5litepod-16", "TPU_WAIT": "0"}.items():
        monkeypatch.setenv(name, value)

    def run(*arguments, **answers):
        for verb, lines in answers.items():
            (tmp_path / f"answers-{verb}").write_text("\n".join(lines))
        done = subprocess.run([POD, *arguments], capture_output=True, text=True)
        log = tmp_path / "calls.jsonl"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return done.returncode, done.stdout + done.stderr, calls

    return run


def verbs(calls):
    return [call[3] if call[0] == "compute" else call[1] for call in calls if "describe" not in call]


def test_create_waits_until_it_is_ready(cloud):
    code, _, calls = cloud("--spot", "create", describe=["1 ", "0 CREATING", "0 CREATING", "0 READY"])
    assert code == 0 and verbs(calls) == ["create"]
    created = next(call for call in calls if "create" in call)
    assert created[:5] == ["compute", "tpus", "tpu-vm", "create", "pod"]
    assert {"--accelerator-type=v5litepod-16", "--spot", "--zone=here"} <= set(created)
    assert not any(word.startswith("--service-account") for word in created)


def test_a_queued_resource_that_fails_is_an_error(cloud):
    code, out, calls = cloud("--queued", "create", describe=["1 ", "1 ", "0 CREATING", "0 FAILED", "0 FAILED"])
    assert code == 2 and "is FAILED" in out
    assert calls[2][:5] == ["compute", "tpus", "queued-resources", "create", "pod"]


def test_run_reaches_every_worker_with_its_arguments_whole(cloud, tmp_path):
    code, out, calls = cloud("run", "analyze", "--model=a b", "--out=gs://x/y", ssh=["0 [w0] done"])
    assert code == 0 and "[w0] done" in out
    (call,) = calls
    assert "--worker=all" in call
    command = next(word for word in call if word.startswith("--command=")).removeprefix("--command=")
    # What a worker's shell makes of it, jaxcrit itself replaced by something that shows its arguments.
    venv = tmp_path / "jaxcrit-venv/bin"
    venv.mkdir(parents=True)
    (venv / "jaxcrit").write_text('#!/bin/sh\nfor word; do echo "<$word>"; done\n')
    (venv / "jaxcrit").chmod(0o755)
    seen = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert [line.split("] ")[1] for line in seen.splitlines()] == [
        "<analyze>",
        "<--model=a b>",
        "<--out=gs://x/y>",
        "<--distributed=on>",
    ]
    assert [path.read_text().strip() for path in (tmp_path / "pod-logs").iterdir()] == ["[w0] done"]


def test_survive_makes_the_pod_anew_after_a_preemption(cloud):
    """Ready, then gone while jaxcrit ran; made again, and the second run ends well."""
    code, out, calls = cloud(
        "survive",
        "finetune",
        "--out=gs://x/y",
        describe=["1 ", "0 READY", "0 PREEMPTED", "0 PREEMPTED", "0 READY"],
        ssh=["0 installed", "255 gone", "0 installed", "0 done"],
    )
    assert code == 0 and "try 2 of 20" in out and "done" in out
    assert verbs(calls) == ["create", "scp", "ssh", "ssh", "delete", "create", "scp", "ssh", "ssh"]


def test_survive_asks_anew_for_a_queued_resource_whose_machines_are_gone(cloud):
    """A preempted queued resource stays, suspended, and keeps its name; what it held is no longer described."""
    code, out, calls = cloud(
        "--queued",
        "--spot",
        "--service_account=me@x",
        "survive",
        "finetune",
        "--out",
        "gs://x/y",
        describe=["1 ", "1 ", "0 READY", "1 ", "1 ", "0 SUSPENDED", "1 ", "0 PROVISIONING", "0 READY"],
        ssh=["0 installed", "255 gone", "0 installed", "0 done"],
    )
    assert code == 0 and "try 2 of 20" in out
    assert verbs(calls) == ["create", "scp", "ssh", "ssh", "delete", "create", "scp", "ssh", "ssh"]
    first, deleted, second = (call for call in calls if call[3] in ("create", "delete"))
    assert first == second and {"--spot", "--service-account=me@x"} <= set(first)
    assert deleted[2:6] == ["queued-resources", "delete", "pod", "--force"]
    # The very same command, which goes on from what the first one left in the bucket.
    runs = [call for call in calls if "ssh" in call][1::2]
    assert runs[0] == runs[1] and "--out gs://x/y" in " ".join(runs[0]).replace("\\", "")


def test_survive_goes_on_after_a_preemption_during_the_installation(cloud):
    code, out, calls = cloud(
        "survive",
        "analyze",
        "--out=gs://x/y",
        describe=["1 ", "0 READY", "0 PREEMPTED", "0 PREEMPTED", "0 READY"],
        scp=["255 gone", "0 "],
    )
    assert code == 0 and "try 2 of 20" in out
    assert verbs(calls) == ["create", "scp", "delete", "create", "scp", "ssh", "ssh"]
    installed = next(word for word in calls[-2] if word.startswith("--command="))
    assert "jaxcrit[tpu,gcs]" in installed


def test_a_preemption_before_it_is_ready_is_not_waited_for(cloud):
    code, said, calls = cloud("--spot", "create", describe=["1 ", "0 CREATING", "0 PREEMPTED"])
    assert code == 1 and "pod was PREEMPTED before it was ready" in said and verbs(calls) == ["create"]


def test_survive_makes_the_pod_anew_when_it_was_preempted_before_it_was_ready(cloud):
    states = ["1 ", "0 PREEMPTED", "0 PREEMPTED", "0 PREEMPTED", "0 READY"]
    code, _, calls = cloud("--spot", "survive", "analyze", "--out=gs://x/y", describe=states)
    assert code == 0 and verbs(calls)[:3] == ["create", "delete", "create"]


@pytest.mark.parametrize(("code", "told"), [("2", ""), ("1", "not trying again")])
def test_survive_does_not_repeat_a_mistake(cloud, code, told):
    found, out, calls = cloud(
        "survive",
        "analyze",
        "--out=gs://x/y",
        describe=["1 ", "0 READY", "0 READY"],
        ssh=["0 installed", f"{code} error"],
    )
    assert found == int(code) and told in out
    assert verbs(calls).count("create") == 1


def test_fetch_and_delete(cloud):
    cloud("fetch", "gs://x/y", "here")
    code, _, calls = cloud("--queued", "delete")
    assert code == 0
    assert calls[0] == ["storage", "rsync", "--recursive", "gs://x/y", "here"]
    assert calls[1] == ["compute", "tpus", "queued-resources", "delete", "pod", "--force", "--quiet", "--zone=here"]


def test_dry_run_calls_nothing_and_prints_what_it_would(cloud):
    code, out, calls = cloud("--dry_run", "survive", "analyze", "--model=a b", "--out=gs://x/y")
    assert code == 0 and not calls
    printed = [line for line in out.splitlines() if line.startswith("gcloud")]
    assert [line.split()[3:5] for line in printed] == [
        ["tpu-vm", "create"],
        ["tpu-vm", "scp"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nmae=x", "create"], "unknown flag --nmae"),
        (["make"], "unknown verb make"),
        (["--type=", "create"], "expected --type"),
        (["--zone=", "delete"], "expected --name and --zone"),
        (["run"], "expected the arguments of jaxcrit"),
        (["survive", "analyze", "--out=here"], "expected --out=gs://BUCKET/DIR"),
        (["fetch", "gs://x"], "expected gs://BUCKET/DIR and a directory"),
    ],
)
def test_mistakes(cloud, arguments, message):
    code, out, calls = cloud(*arguments)
    assert code == 2 and message in out and out.count("\n") == 1 and not calls


def test_scripts_are_clean():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install -e '.[lint]'")
    subprocess.run([shellcheck, POD, SCRIPTS / "slurm/jaxcrit.sbatch"], check=True)


def test_slurm_starts_one_process_per_task_and_requeues_a_preempted_job(tmp_path, monkeypatch):
    for name, code in (("srun", 75), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    script = SCRIPTS / "slurm/jaxcrit.sbatch"
    done = subprocess.run(["bash", script, "analyze", "--out=x y"], capture_output=True, text=True)
    assert done.returncode == 75
    assert done.stdout.splitlines() == [
        "srun --kill-on-bad-exit=1 --label jaxcrit analyze --out=x y --distributed=on",
        "scontrol requeue 7",
    ]
    assert subprocess.run(["bash", script], capture_output=True).returncode == 2
