"""The rows and the table of the screening experiment, of made-up figures."""

from __future__ import annotations

import argparse

import screen_backdoor


def test_rows_are_parted_by_prompt():
    given = argparse.Namespace(train_rows=12, benign_rows=5, held_rows=4)
    train, benign, held = screen_backdoor.prompts(given)
    sizes = [len(train), len(benign), len(held)]
    assert sizes == [72, 30, 24] and len({row["prompt"] for row in [*train, *benign, *held]}) == sum(sizes)


def test_the_table_has_every_seed_with_its_interval():
    def seed(value):
        one = {"value": value, "interval": [value - 0.1, value + 0.05]}
        auroc = {"layers": [one, one], **dict.fromkeys(screen_backdoor.DETECTORS, one)}
        share = {"flagged": 3, "of": 100}
        part = {"truth": {"auroc": auroc, "false_positives": share, "true_positives": share}, "held_out": share}
        counts = {"k": 90, "n": 100}
        return {"clean": part, "decoys": part, "target": part, "attack_success": counts, "clean_exact": counts}

    text = screen_backdoor.table([seed(0.7), seed(0.9)])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    wide = "layer 1 " + " ".join(["0.800 [0.00, 1.00]"] * 3)
    assert wide in lines, "two seeds leave Student's interval wide"
    assert "clean mahalanobis 0.700 [0.60, 0.75] 0.900 [0.80, 0.95]" in lines
    assert "attack_success: 90/100, 90/100" in lines
    assert max(map(len, text.splitlines())) <= 100
