"""Flips bits in the files of runs, and sees who finds it: ``jaxcrit verify``, and whatever reads that file.

    PYTHONPATH=tests python -m support.flips --tries=240

Prints a line per kind of file: tries, found by verify, found by the reader; exit code 1 where one was missed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import random
import sys
import tempfile
from pathlib import Path

from jaxcrit.commands.main import main
from jaxcrit.core.digests import files_of
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_npz
from jaxcrit.core.layers import LayerSet, read_scores
from jaxcrit.core.rundir import read_record
from jaxcrit.data.datasets import read_rows
from jaxcrit.evidence.states_files import read_states
from jaxcrit.models.model import open_model
from jaxcrit.studies.verification import verify

ROWS = ["--data=demo:arithmetic", "--limit=8"]
COMMANDS = {
    "analyze": ["analyze", *ROWS, "--save_activations"],
    "spectrum": ["spectrum", *ROWS, "--k=1,2"],
    "generate": ["generate", *ROWS, "--max_new_tokens=4"],
    "finetune": ["finetune", *ROWS, "--layers=3", "--steps=1", "--batch_size=8", "--max_length=64", "--template=none"],
}


def called(arguments):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main([*map(str, arguments)])


def make(folder: Path):
    """Runs to damage, and the command of each."""
    commands = {folder / name: [*words, f"--out={folder / name}"] for name, words in COMMANDS.items()}
    for command in commands.values():
        assert called(command) == 0
    return commands


def read(run: Path, name: str, command):
    """Reads a file of a run as what takes it does; the same command again where no other does."""
    file = run / name
    if name == "run.json":
        read_record(run)
    elif file.name == "scores.json":
        read_scores(file)
    elif file.name == "layers.json":
        LayerSet.load(file)
    elif file.suffix == ".npz":
        read_npz(file)
    elif file.suffix == ".safetensors":
        read_states(file)
    elif file.suffix == ".jsonl" and file.name != "metrics.jsonl":
        read_rows(file)
    elif name.startswith("checkpoints/"):
        _ = open_model(run, step=name.split("/")[1]).overlays
    elif code := called(command):
        raise UserError(f"exit {code}")


def looked_at(name):
    """Whether anything reads the file again: pictures, pages and configs for other programs are made anew."""
    return not name.endswith((".html", ".png", ".yml", ".txt", ".md"))


def flip(commands, tries, seed=0):
    """Flips a bit at a time; by kind of file how often, how often verify found it and how often the reader did.

    Of each try the file is drawn first, so that small ones come as often as large ones.
    """
    rng, table = random.Random(seed), collections.defaultdict(lambda: [0, 0, 0])
    files = [(run, name) for run in commands for name in (*files_of(run), "run.json") if looked_at(name)]
    rng.shuffle(files)
    for number in range(tries):
        run, name = files[number % len(files)]
        file = run / name
        whole = file.read_bytes()
        if not whole:
            continue
        damaged, place = bytearray(whole), rng.randrange(len(whole))
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        counts = table["checkpoints" if "checkpoints" in name else Path(name).suffix or name]
        counts[0] += 1
        counts[1] += bool(verify(run, 1e-5).findings)
        try:
            read(run, name, commands[run])
        except UserError:
            counts[2] += 1
        file.write_bytes(whole)
    return dict(table)


def run(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("--tries", type=int, default=240)
    with tempfile.TemporaryDirectory() as scratch:
        table = flip(make(Path(scratch).resolve()), parser.parse_args(arguments).tries)
    for kind, (tries, verified, reader) in sorted(table.items()):
        print(f"{kind}: {tries} bits flipped, {verified} found by verify, {reader} by the reader")
    total = [sum(counts) for counts in zip(*table.values(), strict=True)]
    print(f"bits: {total[0]} flipped, {total[1]} found by verify, {total[2]} by what reads the file")
    return int(len(set(total)) > 1)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
