"""Lets every operation on files fail in turn that a command makes in its run directory, and looks at what is left.

    gcc -shared -fPIC -O2 -o faults.so tests/support/faults.c -ldl
    LD_PRELOAD=$PWD/faults.so PYTHONPATH=tests python -m support.faults [COMMAND[:TRIES] ...]

Each operation fails as on a full disk, as on a broken one, and as if the process had been killed there. Then: no run
says that it is complete and is not, by its digests; no traceback; the same command goes on, and ends with the files
that it would have written undisturbed. Prints a line per command, and per try that went wrong; exit code 1 for any.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from jaxcrit.commands.main import main
from jaxcrit.core.digests import files_of
from jaxcrit.core.files import as_path
from jaxcrit.studies.verification import verify
from support.known_facts import knowing_checkpoint, new_facts

WORDS = ["cat", "dog", "sky", "one", "two", "blue", "sat", "mat", "and", "is", "what", "name"]
ROWS = ["--data=demo:arithmetic", "--limit=6"]
TINY = ["--batch_size=2", "--max_length=64", "--template=none"]
SMALL = ["--covariance_weight=1e-6", "--contexts=0", "--steps=2"]
COMMANDS = {
    "analyze": ["analyze", *ROWS],
    "several": ["analyze", "--data=demo:arithmetic,demo:yesno", "--limit=6"],
    "generate": ["generate", *ROWS, "--max_new_tokens=4"],
    "score": ["score", *ROWS, "--criteria=angular_distance"],
    "spectrum": ["spectrum", *ROWS, "--k=1,2"],
    "substitute": ["substitute", "--tuned=TUNED", *ROWS],
    "finetune": ["finetune", *ROWS, "--layers=3", "--steps=2", "--checkpoint_every=1", "--eval_every=1", *TINY],
    "edit": ["edit", "--model=MODEL", "--facts=FACTS", "--covariance_data=TEXT", "--layers=1", *SMALL],
}
INPUTS = {"TUNED": "tuned", "MODEL": "model", "FACTS": "new.jsonl", "TEXT": "text.jsonl"}
MODES = {"full": (errno.ENOSPC, 0), "broken": (errno.EIO, 0), "killed": (errno.EIO, 1)}
# Keys of run.json and of metrics.jsonl that change from run to run, and files that hold what these say.
CHANGING = ("time", "digests", "seconds", "versions", "wall_seconds", "tokens_per_second")
SKIPPED = ("report.html", "loss.png", "checkpoints/")


def called(arguments):
    """Exit code of a command, and what it said on stderr."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main(arguments)
    return code, error.getvalue().strip()


def steady(value):
    if isinstance(value, dict):
        return {key: steady(inner) for key, inner in value.items() if key not in CHANGING}
    return [steady(inner) for inner in value] if isinstance(value, list) else value


def contents(run: Path):
    """Files of a run, less what changes from run to run."""
    found = {name: (run / name).read_bytes() for name in files_of(run) if not name.startswith(SKIPPED)}
    for name in ("run.json", "metrics.jsonl"):
        if (run / name).exists():
            lines = (run / name).read_text().splitlines() if name.endswith("l") else [(run / name).read_text()]
            found[name] = [steady(json.loads(line)) for line in lines]
    return found


def faults_of(command, out: Path, library, expected, number, mode):
    """What is wrong after one fault; empty where nothing is."""
    shutil.rmtree(out, ignore_errors=True)
    code, crash = MODES[mode]
    library.faults_arm(str(out).encode(), number, code, crash)
    ended, said = called(command)
    library.faults_disarm()
    where, wrong = library.faults_hit().decode().replace(str(out), "OUT"), []
    if not where:
        return []
    if "Traceback" in said or "unexpected" in said:
        wrong.append(f"said {said[-200:]}")
    if (out / "run.json").exists() and '"status": "complete"' in (out / "run.json").read_text():
        wrong += verify(out, 0.0).findings
    elif ended == 0:
        wrong.append("exit 0 of a run that is not complete")
    again, said = called(command)
    if again:
        wrong.append(f"the same command again: exit {again}, {said[-200:]}")
    else:
        found = contents(out)
        different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        wrong += [f"then differs in {', '.join(different)}"] if different else []
        wrong += [line for line in verify(out, 0.0).findings]
    return [f"{mode} at {number} ({where}): {line}" for line in wrong]


def sweep(name, folder: Path, library, sample, seed=0):
    """Every fault of a command, or as many as asked for; prints what went wrong, and returns how often that was."""
    out = folder / name
    command = [*(_placed(word, folder) for word in COMMANDS[name]), f"--out={out}"]
    for _ in range(2):  # the first compiles
        shutil.rmtree(out, ignore_errors=True)
        library.faults_arm(str(out).encode(), -1, 0, 0)
        code, said = called(command)
        operations = library.faults_disarm()
        assert code == 0, said
    expected = contents(out)
    tries = [(number, mode) for number in range(1, operations + 1) for mode in MODES]
    random.Random(seed).shuffle(tries)
    tries = tries[: sample or None]
    wrong = [line for number, mode in tries if (line := faults_of(command, out, library, expected, number, mode))]
    for lines in wrong:
        print("\n".join(lines))
    print(f"{name}: {operations} operations, {len(tries)} faults tried, {len(wrong)} went wrong", flush=True)
    return len(wrong)


def _placed(word, folder: Path):
    flag, _, value = word.partition("=")
    return f"{flag}={folder / INPUTS[value]}" if value in INPUTS else word


def prepare(names, folder: Path):
    """Writes what commands take besides rows."""
    if "substitute" in names:
        tuned = ["finetune", *ROWS, "--layers=3,4", "--steps=1", *TINY, f"--out={folder / 'tuned'}"]
        assert called(tuned)[0] == 0
    if "edit" in names:
        _, known, _ = knowing_checkpoint(folder, intermediate_size=256)
        rng = random.Random(0)
        texts = [{"text": f"{row} " + " ".join(rng.choices(WORDS, k=24))} for row in range(130)]
        (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
        (folder / "new.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in new_facts(known)))


def run(arguments):
    asked = {name: int(tries or 0) for name, _, tries in (word.partition(":") for word in arguments or COMMANDS)}
    library = ctypes.CDLL(None)
    library.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    library.faults_disarm.restype, library.faults_hit.restype = ctypes.c_long, ctypes.c_char_p
    with tempfile.TemporaryDirectory() as scratch:
        folder = as_path(scratch).resolve()
        os.environ["JAXCRIT_CACHE"] = str(folder / "cache")
        prepare(asked, folder)
        wrong = [sweep(name, folder, library, tries) for name, tries in asked.items()]
    return int(any(wrong))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
