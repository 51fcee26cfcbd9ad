"""A renamed language token by token, and its trap; tables of the experiments on training that looks inside."""

from __future__ import annotations

import argparse

import adversarial_layers
import deep_supervision
import numpy as np
import perturbation_gains
import pytest
from renamed_language import answered, english, extended, language

from jaxcrit.core.auxiliaries import parse_supervise
from jaxcrit.core.groups import RowOptions
from jaxcrit.models.model import open_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """With new rows of the embedding at a tenth of the old ones' scale, and at theirs."""
    out = tmp_path_factory.mktemp("language")
    return [open_model(extended(out / f"{scale:g}", scale)) for scale in (0.1, 1.0)]


def test_every_token_is_renamed_and_nothing_else(models):
    rows = language(models[0].tokenizer, 3, 0, "test")
    new, old = (
        models[0].read(RowOptions(), some, responses=True)[0].examples
        for some in ([dict(row) for row in rows], english(rows))
    )
    count = models[0].config.vocab_size // 2
    special = set(models[0].tokenizer.all_special_ids)
    for one, other in zip(new, old, strict=True):
        assert one.prompt_length == other.prompt_length
        expected = [token if token in special else token + count for token in other.token_ids.tolist()]
        assert one.token_ids.tolist() == expected


def test_long_new_rows_wreck_the_known_language_before_any_step(models):
    rows = english(language(models[0].tokenizer, 1, 0, "test"))
    short, long = (answered(model, rows) for model in models)
    assert short["loss"] < 0.01 and short["exact"] == 1
    assert long["loss"] > 2 and long["exact"] == 0


def test_tables_of_supervision():
    given = argparse.Namespace(every=20, steps=60, longer=3, layers="2,8", exchanged="13,4")
    for way in deep_supervision.WAYS:
        parse_supervise(deep_supervision.supervised(way, given), 1.0, 16)

    def cell(way, seed):
        last = 180 if way == "plain" else 60
        by_step = {
            str(step): {name: {"loss": 5 - step / 60 + seed / 10, "exact": step / 180} for name in ("new", "known")}
            for step in range(20, last + 1, 20)
        }
        # The rows beside are as long again: logits see in 20 steps what plain training sees in 40.
        tokens = 100.0 if way == "plain" else 200.0
        return {"by_step": by_step, "auxiliaries": [] if way == "plain" else [1.0, 2.0], "tokens": tokens}

    cells = {(way, seed): cell(way, seed) for way in deep_supervision.WAYS for seed in range(3)}
    lines = deep_supervision.text(cells, given).splitlines()
    early = next(line for line in lines if deep_supervision.EQUAL in line and "less" not in line)
    # Student's over three seeds: 0.1 x 4.30 / sqrt(3).
    assert early.split()[:5] == ["40", "3", "4.43", "±", "0.25"]
    assert any("-0.33 ± 0.00" in line and f"{deep_supervision.EQUAL}, less plain at 20" in line for line in lines)
    assert any(line.split() == ["200", "1.00,", "2.00", "logits"] for line in lines)
    assert "nan" not in deep_supervision.text({("plain", 0): cell("plain", 0)}, given)


def test_table_of_adversarial_layers():
    names = ("clean", "found", "found_half", "noise", "noise_half")
    given = argparse.Namespace(eps=0.05)
    arms = {"gain:3/states": 0.0, "gain:3/loss": 0.5}
    arms |= {"random:3:0/states": 1.0, "random:3:1/states": 3.0, "all/loss": 0.0}
    found = {
        (arm, seed): {"layers": [1, 2], "seconds": 10, **dict.fromkeys(names, more + seed)}
        for arm, more in arms.items()
        for seed in range(2)
    }
    losses, less = adversarial_layers.text(found, dict.fromkeys(names, 9.0), given).split("\n\n")
    lines = losses.splitlines()
    assert lines[1].split()[:5] == ["9.000"] * 5
    rows = {line.split()[0]: line for line in lines[2:]}
    assert rows["4"].rstrip().endswith("random:3 / states 1 2") and "all / loss" in lines[-1]
    assert rows["4"].split()[1:4] == ["2.500", "±", "6.353"], "two draws of a seed are one mean: n is 2, not 4"
    told = [[*line.split(maxsplit=4)[:4], line.split("  ")[-1]] for line in less.splitlines()[1:]]
    assert told == [
        ["2", "-2.000", "±", "0.000", "gain:3 / states, less random:3 / states"],
        ["2", "-0.500", "±", "0.000", "gain:3 / states, less gain:3 / loss"],
    ], "of what is there alone"


def test_how_alike_curves_are():
    up = np.arange(30.0)
    assert perturbation_gains.likeness([(up, up), (up, -up)]) == ["0.00", "0.00", "2.5", "2"]
