"""Compiled programs outlive the process, where nobody else may write, in bounds."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxcrit.core import programs, remembered
from jaxcrit.core.files import sweep
from jaxcrit.core.schema import Array

RUN = "from jaxcrit.commands.main import main; import sys; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def launch(tmp_path):
    """Runs a small analysis in a process of its own, with a cache directory of its own."""

    def run(name: str, *more: str) -> tuple[dict, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_COMP", "JAX_PERS"))}
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                RUN,
                "analyze",
                "--data=demo:arithmetic",
                "--limit=8",
                f"--out={tmp_path / name}",
                *more,
            ],
            env={**kept, "JAXCRIT_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / name / "scores.json").read_text()), done.stderr

    return run


def programs_in(cache):
    return {file: file.stat().st_mtime_ns for file in (cache / "programs").glob("*/*") if "atime" not in file.name}


def test_a_second_process_compiles_nothing(launch, tmp_path):
    first, _ = launch("first")
    made = programs_in(tmp_path / "cache")
    assert len(made) > 10  # programs that compile within jax's minimum of a second are kept too
    second, _ = launch("second")
    assert programs_in(tmp_path / "cache") == made and second == first
    for place in ((tmp_path / "cache/programs"), *(tmp_path / "cache/programs").iterdir()):
        assert place.stat().st_mode & 0o777 == 0o700  # programs are code
    for file in made:  # what a kill cut short is compiled again, in silence
        file.write_bytes(file.read_bytes()[:100])
    again, said = launch("again")
    assert again == first and "ersistent" not in said


def test_none_keeps_nothing(launch, tmp_path):
    launch("run", "--compilation_cache_dir=none")
    assert not (tmp_path / "cache/programs").exists()


def test_what_is_used_least_goes(tmp_path):
    (tmp_path / "cpu").mkdir()
    for age, name in enumerate("abcde"):
        (tmp_path / "cpu" / name).write_bytes(bytes(150))
        os.utime(tmp_path / "cpu" / name, (10_000 - age, 10_000 - age))
    sweep(tmp_path.glob("*/*"), 1000)
    assert len(list(tmp_path.glob("*/*"))) == 5
    sweep(tmp_path.glob("*/*"), 700)
    assert sorted(file.name for file in tmp_path.glob("*/*")) == ["a", "b"]


def test_arrays_that_are_remembered_stay_in_bounds(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path))
    monkeypatch.setattr(remembered, "LARGEST", 2_500)  # a file takes about 900
    holds = {"a": Array("f", (100,))}
    for number in range(6):
        made = np.full(100, number, np.float32)
        kept = remembered.remembered("kind", {"n": number}, holds, lambda made=made: {"a": made})
        assert (kept["a"] == number).all()
        assert sum(file.stat().st_size for file in (tmp_path / "kind").iterdir()) <= 2_500
    assert remembered.recalled("kind", {"n": 5}, holds) is not None
    assert remembered.recalled("kind", {"n": 0}, holds) is None


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "file"))
    assert programs._own() == ""
