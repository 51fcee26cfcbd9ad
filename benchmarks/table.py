"""The whole table of speeds: every benchmark that has rows, each in a process of its own.

    python benchmarks/table.py [--only=cka,load] [--checkpoint=DIR]

CPU-seconds (user and system) and wall seconds of jaxcrit and of its peers, who take turns; the ratio of each peer to
jaxcrit; and the limit, what the work's products take at the rate of the better of XLA and torch on this machine, and
how far above it jaxcrit is. Needs the parity extra. Writes benchmarks/results/table-PROCESSOR.json with hardware and
versions; rows that are there of the same model and versions, and are not measured anew, stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import rows
from environment import RESULTS, describe, write_result

# Word of --only -> module with `rows(checkpoint)`.
PARTS = {
    "generate": "generation_speed",
    "step": "step_rows",
    "cka": "cka_rows",
    "load": "load_rows",
    "analyze": "analyze_rows",
    "capture": "capture_rows",
    "substitution": "substitution_rows",
}
_MARK = "rows: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts of the table, with commas")
    parser.add_argument("--checkpoint", type=Path, help="model to measure; default random weights of a real shape")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        found = importlib.import_module(PARTS[given.part]).rows(given.checkpoint)
        print(_MARK + json.dumps([dataclasses.asdict(row) for row in found]))
        return
    if unknown := set(given.only.split(",")) - set(PARTS):
        parser.error(f"--only={','.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = given.checkpoint or rows.write_checkpoint(Path(directory))
        table, failed = [], []
        print(rows.HEAD)
        for part in given.only.split(","):
            command = [sys.executable, __file__, f"--part={part}", f"--checkpoint={checkpoint}"]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
            if done.returncode or not lines:
                failed.append(part)
                print(f"{part}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
                continue
            for row in json.loads(lines[0].removeprefix(_MARK)):
                row["spent"] = {name: rows.Spent(**one) for name, one in row["spent"].items()}
                table.append(rows.Row(**row))
                print("\n".join(table[-1].lines()), flush=True)
    name = given.checkpoint.name if given.checkpoint else "random weights"
    print(f"written: {write_result(file := _file(), _with_earlier(file, name, table))}")
    sys.exit(bool(failed))


def _file() -> str:
    """Name of the results of this processor."""
    return "table-" + "-".join(re.findall(r"[a-z0-9]+", describe()["cpu"].lower()))


def _with_earlier(file: str, model: str, table: list[rows.Row]) -> dict[str, Any]:
    """The rows of this call among those that an earlier one has left, where what they depend on is the same."""
    found = {row.work: dataclasses.asdict(row) for row in table}
    path = RESULTS / f"{file}.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["model"] == model and before["environment"]["versions"] == describe()["versions"]:
            found = {row["work"]: row for row in before["rows"]} | found
    return {"model": model, "rows": list(found.values())}


if __name__ == "__main__":
    main()
