"""What several criteria would choose: layers, what comes next, whether errors tell them apart, and agreement."""

from __future__ import annotations

import numpy as np

from jaxcrit.commands.score import choice_table, headline, score_table
from jaxcrit.core.layers import LayerScores
from jaxcrit.selection.decisions import agreed, choices

DEPTH = 14  # of which two are chosen


def score(key, values, direction="low", stderr=None, **meta):
    errors = None if stderr is None else np.full(DEPTH, stderr)
    return LayerScores(key, np.array(values, float), np.ones(DEPTH, bool), direction, errors, meta)


def curve(*lowest):
    """Falling with depth, but for layers that are lowest in the order they are given."""
    values = 10 - 0.1 * np.arange(DEPTH)
    values[list(lowest)] = np.arange(len(lowest))
    return values


SCORES = {
    "a": score("a", curve(5, 6, 7), stderr=0.1),
    "b": score("b", -curve(5, 8, 9), "high", stderr=0.6),
    "c": score("c", curve(0, 1, 5, 3), consensus="mean_rank", of=2),  # the ends are never chosen
    "d": score("d", np.ones(DEPTH)),  # tells nothing
}


def test_each_criterion_chooses_in_its_own_direction_and_says_how_far_the_next_is():
    found = choices(SCORES)
    assert {key: (one.layers, one.next, one.firm) for key, one in found.items()} == {
        "a": ((5, 6), 7, True),
        "b": ((5, 8), 9, False),
        "c": ((3, 5), 11, None),
    }
    assert agreed(found) == {5: 3}


def test_what_is_said_of_them():
    found = choices(SCORES)
    told = headline(found, DEPTH)
    assert told[0] == "Of 3 criteria 3 choose layer 5 (by chance a layer has 0.6)"
    assert (
        "agree on no layer" in headline({"a": found["a"], "x": choices({"x": score("x", curve(8, 9))})["x"]}, DEPTH)[0]
    )
    assert headline({"a": found["a"]}, DEPTH) == ["a would choose layers 5, 6 of 14"]
    rows = [line.split(maxsplit=1) for line in choice_table(found, SCORES).splitlines()]
    assert rows[1] == ["a", "low          5, 6  next: 7, further than two errors"]
    assert rows[2][1].endswith("next: 9, within two errors") and rows[3][1].startswith("mean rank, low")


def test_ranks_are_named_and_errors_stand_beside_values():
    lines = score_table(SCORES).splitlines()
    assert lines[1].split() == ["(low)", "(high)", "(mean", "rank)", "(low)"]
    assert lines[2 + 5].split()[:4] == ["5", "0", "±", "0.1"]
