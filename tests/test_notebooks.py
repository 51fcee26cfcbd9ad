"""Notebooks run from top to bottom on the embedded model, and say what they said when they were written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
SHORT = ("activations", "first_look")  # the others take minutes: with JAXCRIT_EXPLORE=1
COLAB = NOTEBOOKS / "first_look_colab.ipynb"  # begins with a line that is no Python


def cells(file):
    return [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("file", sorted({*NOTEBOOKS.glob("*.ipynb")} - {COLAB}), ids=lambda file: file.stem)
def test_a_notebook_runs(file, tmp_path):
    if file.stem not in SHORT and not os.environ.get("JAXCRIT_EXPLORE"):
        pytest.skip("takes minutes; run it with JAXCRIT_EXPLORE=1")
    program = "\n".join("".join(cell["source"]) for cell in cells(file))
    environment = {**os.environ, "XLA_FLAGS": "", "JAXCRIT_CACHE": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(NOTEBOOKS.parents[1]), *sys.path])
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "empty", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "empty").iterdir()) == [], "a notebook writes nothing unless asked"
    found = next(line for line in done.stdout.splitlines() if re.search(r"^\W*(\w+: )?(layers|said) \d", line))
    told = "".join(text for cell in cells(file) for output in cell["outputs"] for text in output.get("text", []))
    assert found in told, "the outputs in the notebook are those of this program"


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_a_notebook_keeps_nothing_of_the_machine_it_was_run_on(file):
    outputs = [output for cell in cells(file) for output in cell["outputs"]]
    assert all(output.get("name") != "stderr" for output in outputs)
    assert "site-packages" not in json.dumps(outputs)


def test_the_one_for_colab_is_the_first_look_but_for_what_installs():
    ours, theirs = (
        json.loads(file.read_text(encoding="utf-8"))["cells"] for file in (NOTEBOOKS / "first_look.ipynb", COLAB)
    )
    title, install, *rest = theirs
    assert "".join(install["source"]).startswith("%pip install") and len(rest) + 1 == len(ours)
    for one, other in zip(ours, [title, *rest], strict=True):
        assert (one["cell_type"], one["source"]) == (other["cell_type"], other["source"])


def test_readme_shows_what_runs():
    """The lines of Python in README, on the embedded model."""
    readme = (NOTEBOOKS.parents[1] / "README.md").read_text(encoding="utf-8")
    program = readme.partition("```python\n")[2].partition("```")[0]
    assert 5 <= program.count("\n") <= 14
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(program, "README.md", "exec"), {})
    assert "layers " in said.getvalue()
