"""Progress bars: one that is closed whatever happens, and one that nobody sees."""

from __future__ import annotations

import types

import pytest

from jaxcrit.core.progress import bar, moved


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
