"""Progress bars: one that is closed whatever happens, and one that nobody sees."""

from __future__ import annotations

import io
import re
import sys
import types

import pytest

from jaxcrit.core import progress
from jaxcrit.core.progress import Lines, bar, bars, moved


def maker(made):
    def bars(**settings):
        shown = types.SimpleNamespace(n=settings.get("initial", 0), total=settings["total"], closed=False)
        shown.update = lambda done=1: setattr(shown, "n", shown.n + done)
        shown.close = lambda: setattr(shown, "closed", True)
        made.append(shown)
        return shown

    return bars


def test_a_bar_moves_to_what_is_done_and_is_closed_after_a_mistake():
    made = []
    with pytest.raises(KeyboardInterrupt), bar(maker(made), total=1, desc="rows", initial=2) as shown:
        move = moved(shown)
        move(5, 9, "the path of a weight")
        assert (shown.n, shown.total, shown.closed) == (5, 9, False)
        raise KeyboardInterrupt
    assert made[0].closed


def test_without_a_maker_nothing_is_shown(capsys):
    with bar(None, total=3, desc="rows") as shown:
        shown.update(2)
        moved(shown)(3, 3)
        shown.set_postfix_str("loss 1.0", refresh=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("surroundings", [{"TERM": "dumb"}, {}], ids=["a dumb terminal", "no terminal"])
def test_where_there_is_no_terminal_a_log_is_written(monkeypatch, capsys, surroundings):
    """A line in half a minute, or for a twentieth of a long run, with what is done, what is beside it, and times."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(surroundings), raising=False)
    monkeypatch.delenv("TERM", raising=False)
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with bars(total=20, desc="training\x1b", unit=" steps", initial=10) as shown:
        assert isinstance(shown, Lines)
        for _ in range(10):
            now[0] += 20 if now[0] else 25  # the first step is compiled
            shown.set_postfix_str("loss 1.5000, 800 tokens/s", refresh=False)
            shown.update(1)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "training\\x1b: step 12 of 20 (60 %), loss 1.5000, 800 tokens/s, 0:00:45 gone, 0:02:40 left"
    assert [line.split(" (")[0].split()[2] for line in told] == ["12", "14", "16", "18"]
    with bars(total=None, desc="rows") as shown:
        move = moved(shown)
        for done in range(0, 30_000, 100):  # 10 s each: 50 minutes, of which a twentieth is 150 s
            now[0] += 10
            move(done, 30_000)
    told = capsys.readouterr().err.splitlines()
    assert 15 <= len(told) <= 20
    assert told[0] == "rows: 1,500 of 30,000 samples (5 %), 0:02:40 gone, 0:47:30 left"


def test_what_is_quickly_done_says_nothing(capsys):
    with bars(total=3, desc="rows") as shown:
        shown.update(1)
        shown.update(2)
    assert capsys.readouterr() == ("", "")


def test_a_bar_fits_80_columns(monkeypatch):
    told = io.StringIO()
    told.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", told)
    monkeypatch.setenv("TERM", "xterm")
    with bars(total=2000, desc="training", unit=" steps", ncols=80, file=told, mininterval=0) as shown:
        shown.update(100)
        shown.set_postfix_str("loss 12.3456, 123,456 tokens/s")
        line = told.getvalue().split("\r")[-1]
    assert len(line) <= 80 and re.search(r"\|.{8}\|", line) and line.endswith("123,456 tokens/s]")
