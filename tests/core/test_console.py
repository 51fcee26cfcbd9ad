"""Terminals without Greek: letters are spelled out, and nothing ends in a traceback."""

import io
import os
import subprocess
import sys

import pytest

from jaxcrit.core import console


def test_letters_by_name_and_signs_by_what_stands_for_them():
    assert console.spelled("δ ± ρ² of ℓ … λ Σ") == "delta +- rho^2 of l ... lambda Sigma"
    assert console.spelled("é, 漢 and \udcff") == "e, ? and ?"
    assert console.spelled("plain\ttext") == "plain\ttext"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("cp1252", "delta ± é"), ("ascii", "delta +- e"), ("utf-8", "δ ± é"), ("cp1253", "δ ± e")]
)
def test_only_what_the_encoding_lacks_is_spelled(monkeypatch, encoding, shown):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # no stream to set up
    console.spell_what_cannot_be_shown()
    print("δ ± é", end="", flush=True)
    assert raw.getvalue().decode(encoding) == shown


@pytest.mark.parametrize(
    "surroundings",
    [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}],
    ids=["code page", "C locale"],
)
def test_the_command_ends_well(surroundings):
    program = "import sys; from jaxcrit.commands.main import main; sys.exit(main(['analyze', '--help']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=os.environ | surroundings)
    assert done.returncode == 0 and b"layers that delta averages over" in done.stdout, done.stderr


def test_what_a_terminal_would_obey_is_written_out(capsys):
    """Titles, colours, a line drawn over another, writing turned round; joiners and letters of any script stay."""
    assert console.visible("a\x1b]0;owned\x07b\rc\x9bd") == r"a\x1b]0;owned\x07b\rc\x9bd"
    assert console.visible("gnp.\u202exe\u2066\u200f") == r"gnp.\u202exe\u2066\u200f"
    assert console.visible("a\tb\né 漢 \u200d\u200c") == "a\tb\né 漢 \u200d\u200c"
    console.tell("\x1b[2J")
    console.note("\x1b[2J")
    assert capsys.readouterr() == ("\\x1b[2J\n", "\\x1b[2J\n")


def test_a_dumb_terminal_gets_no_codes_and_a_narrow_one_narrow_lines(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, columns in (("dumb", "80"), ("xterm", "80"), ("xterm", "300")):
        monkeypatch.setenv("TERM", name)
        monkeypatch.setenv("COLUMNS", columns)
        assert (console.obeys(terminal), console.width()) == (name != "dumb", min(int(columns), 100))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not console.obeys(sys.stdout) and console.width() == 100
