"""How experiments end as programs."""

import os
import subprocess
import sys
from pathlib import Path

import entry
import pytest

from jaxcrit.core.errors import UserError
from jaxcrit.parallel.preemption import Preempted

EXPERIMENTS = Path(entry.__file__).parent


def raising(error):
    def main():
        raise error

    return main


def by_hand():
    error = Preempted("told to leave at step 3; the same command goes on from there")
    error.by_hand = True
    return error


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (lambda: None, None, ""),
        (lambda: 0, 0, ""),
        (raising(UserError("expected rows")), 2, "thing: error: expected rows\n"),
        (raising(Preempted("told to leave at step 3")), 75, "thing: told to leave at step 3\n"),
        (raising(by_hand()), 130, "thing: told to leave at step 3; the same command goes on from there\n"),
    ],
)
def test_mistakes_and_being_told_to_leave_are_a_line(main, code, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["some/thing.py"])
    monkeypatch.setattr(entry, "keep_pages", lambda: True)  # of this process, which goes on
    with pytest.raises(SystemExit) as left:
        entry.leave(main)
    assert left.value.code == code and capsys.readouterr().err == said
    with pytest.raises(ZeroDivisionError):
        entry.leave(raising(ZeroDivisionError()))


def test_a_mistake_in_an_experiment_is_a_line(tmp_path):
    asked = [sys.executable, str(EXPERIMENTS / "spectral_dynamics.py"), "--data=none.jsonl"]
    env = os.environ | {"PYTHONPATH": str(EXPERIMENTS.parent), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(asked, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr.startswith("spectral_dynamics: error: ") and done.stderr.count("\n") == 1
