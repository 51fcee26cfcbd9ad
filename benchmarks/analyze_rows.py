"""The whole command on the embedded model: rows of the table, each run a process of its own.

`first` is the run that compiles, into a cache of its own; the others find what it compiled. At 3,000 prompts: peak
memory and size of the run directory.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rows import OURS, Row, Spent

SAMPLES = 3000
_SUBJECTS = ("bird", "river", "stone", "engine", "garden", "letter", "winter", "window", "market", "doctor")


def prompts(path: Path, count: int) -> Path:
    """Writes rows of a prompt and an answer, all different."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            what, other = _SUBJECTS[row % 10], _SUBJECTS[row // 10 % 10]
            file.write(f'{{"prompt": "Tell of {row} times a {what} and a {other}.", "response": "No."}}\n')
    return path


def run(*words: str, cache: Path) -> tuple[float, float, int]:
    """CPU-seconds, wall seconds and peak bytes of ``jaxcrit WORDS``."""
    surroundings = os.environ | {"JAXCRIT_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).parents[1])}
    began = time.perf_counter()
    started = subprocess.Popen(
        [sys.executable, "-m", "jaxcrit.commands.main", *words],
        env=surroundings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert started.stderr is not None
    said = started.stderr.read()
    _, status, used = os.wait4(started.pid, 0)
    if status:
        raise RuntimeError(f"jaxcrit {' '.join(words)}: {said.decode()}")
    return used.ru_utime + used.ru_stime, time.perf_counter() - began, used.ru_maxrss * 1024


def rows(checkpoint: Path) -> list[Row]:
    """The embedded model on its own prompts, and on 3,000; the checkpoint is not looked at."""
    del checkpoint
    found = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        many = f"--data={prompts(home / 'many.jsonl', SAMPLES)}"
        for name, words, rounds in (("analyze, embedded", (), 3), (f"analyze, {SAMPLES} prompts", (many,), 1)):
            runs = []
            for turn in range(rounds + 1):
                out = home / f"{len(words)}-{turn}"
                runs.append(run("analyze", *words, f"--out={out}", cache=home / "cache"))
            (_, first, _), *warm = runs
            spent = Spent(statistics.median(cpu for cpu, _, _ in warm), min(wall for _, wall, _ in warm), first)
            size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
            facts = {"peak GB": max(peak for _, _, peak in warm) / 1e9, "run directory MB": size / 1e6}
            found.append(Row(name, {OURS: spent}, facts=facts))
    return found
