"""The same inputs give the same bytes, whatever the process finds around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.tiny_model import prompts_file, tiny_checkpoint

ROOT = Path(__file__).parents[2]
# Seed of hashes, language, time zone, and cores: XLA and BLAS take a thread for each that they may use.
AROUND = (
    {"PYTHONHASHSEED": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "TZ": "Asia/Kathmandu", "OPENBLAS_NUM_THREADS": "1"},
    {"PYTHONHASHSEED": "2", "LC_ALL": "C.UTF-8", "TZ": "America/St_Johns", "OPENBLAS_NUM_THREADS": "2"},
)
_RUN = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv.pop(1))])
from jaxcrit.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_hash_seed_language_time_zone_directory_and_threads_change_nothing(tmp_path):
    model, rows = tiny_checkpoint(tmp_path / "model"), prompts_file(tmp_path / "rows.jsonl")
    runs = []
    for cores, around in enumerate(AROUND, 1):
        here = tmp_path / f"here {cores}"
        here.mkdir()
        command = [sys.executable, "-c", _RUN, str(ROOT), str(cores), "analyze", f"--model={model}", f"--data={rows}"]
        environment = {**os.environ, **around, "XLA_FLAGS": "", "JAXCRIT_CACHE": str(here / "cache")}
        done = subprocess.run([*command, "--out=out"], cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        runs.append(contents(here / "out"))
    assert runs[0].keys() == runs[1].keys() and "report.html" in runs[0]
    assert [name for name in runs[0] if runs[0][name] != runs[1][name]] == []


def contents(out):
    """Bytes of every file by name; of run.json without what changes from run to run."""
    found = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    record = json.loads(found.pop("run.json"))
    for key in ("time", "times", "digests", "files"):
        record.pop(key, None)
    assert record["config"].pop("out") == "out"
    return {**found, "run.json": json.dumps(record).encode()}
