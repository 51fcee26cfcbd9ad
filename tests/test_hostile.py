"""Damaged files given to every reader: a result or one line; and every reader has its row in the table.

The process of `support.fuzz` has bounded memory and time. More inputs: ``python -m support.fuzz --total=100000``.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.damage import damaged
from support.fuzz import fill, outcome
from support.readers import readers

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxcrit"
_INPUTS = 20
_READS = (
    "conform",
    "conform_arrays",
    "read_json",
    "read_npz",
    "read_lines",
    "read_object",
    "read_record",
    "parse_json",
)
_READS += ("read_text", "stored_npy", "safetensors_header", "read_json_object", "plain_size")
# Functions that read a declared format and have no row, with the reason.
NO_ROW = {
    "core/run.py:running": "reads again what RunDirectory.open has read",
    "core/rundir.py:RunDirectory._mine": "likewise",
    "studies/verification.py:_compared": "redoes statistics, which tests/studies/test_verification.py tries",
    "commands/shared.py:tell": "reads what this very command has written",
    "commands/edit.py:_opened": "takes a model; its declaration is that of the row 'run of edit'",
    "commands/trace.py:_kept": "takes a model; its declaration is that of the row 'run of trace'",
}
# Readers whose inputs are made and read in a millisecond: hypothesis finds the smallest damage that shows a fault.
LIGHT = (
    "layers.json",
    "run of edit",
    "keys of edits",
    "losses so far",
    "generation_config.json",
    "rows, jsonl",
    "facts",
)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the process said of all readers."""
    file = tmp_path_factory.mktemp("hostile") / "said.json"
    command = [sys.executable, "-m", "support.fuzz", f"--inputs={_INPUTS}", "--seconds=2", f"--json={file}"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=900
    )
    assert file.exists(), f"{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    return json.loads(file.read_text())


def test_damaged_files_are_read_or_refused_in_a_line(said):
    """No traceback, nothing above 10 s or 2 GiB, no file outside, nothing run and nobody called."""
    assert [line for row in said["rows"].values() for line in row["said"]] == []
    assert said["rows"].keys() == readers().keys() and all(row["inputs"] for row in said["rows"].values())


def test_every_reader_of_a_declaration_is_in_the_table(said):
    """Functions that read by one are found in the source; those of a row run when its valid input is read."""
    assert {place for place in declared() if place not in said["ran"]} == NO_ROW.keys()


def declared():
    """Functions of the package in which something is read by a declaration, each with its file."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for name, function in functions(ast.parse(file.read_text(encoding="utf-8"))):
            calls = (one.func for one in ast.walk(function) if isinstance(one, ast.Call))
            if any(isinstance(called, ast.Name) and called.id in _READS for called in calls):
                yield f"{file.relative_to(PACKAGE)}:{name}"


def functions(tree, front=""):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield front + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{front}{node.name}.")


@functools.cache
def valid(name):
    return readers()[name], readers()[name].files()[0]


@pytest.mark.parametrize("name", LIGHT)
def test_any_damage_is_refused_in_a_line(name, tmp_path_factory):
    reader, files = valid(name)
    folder = tmp_path_factory.mktemp("damaged") / "in"

    @settings(max_examples=30, derandomize=True, database=None)
    @given(st.randoms(use_true_random=False))
    def check(chance):
        fill(folder, damaged(files, chance))
        how, text = outcome(reader.read, folder)
        assert how in ("read", "refused"), text

    check()
