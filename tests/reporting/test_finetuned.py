"""What a training is said to have done."""

from __future__ import annotations

import pytest

from jaxcrit.core.layers import LayerSet
from jaxcrit.reporting.finetuned import finetune_report


def training(losses, *, rows=40, mode="train", auxiliaries=(), **more):
    """Record, metrics and layers of a finished training whose test losses are these, one step apart."""
    best = min(range(len(losses)), key=losses.__getitem__)
    run = {
        "config": {"mode": mode},
        "data": {"eval": {"num_samples": rows}},
        "result": {"best_step": best, "best_loss": losses[best], "steps": len(losses) - 1}
        | dict.fromkeys(("trained_bytes", "optimizer_bytes"), 2**20),
        "time": {"training_seconds": 1.0},
        "trained": {"layers": [2, 3, 4, 9, 11]},
        "auxiliaries": list(auxiliaries),
    }
    metrics = [{"kind": "train", "step": 1, "loss": 1.0}]
    metrics += [
        {"kind": "eval", "step": step, "loss": loss, "loss_per_sample": loss, **more}
        for step, loss in enumerate(losses)
    ]
    return run, metrics, LayerSet((2, 3, 4, 9), "given", "2-4,9", 12)


@pytest.mark.parametrize(
    ("losses", "mode", "told"),
    [
        (
            (2.0, 1.5, 1.25),
            "train",
            "fell from 2.0000 to 1.2500 nats a token on 40 held-out rows, in 2 steps of layers 2-4,9,11",
        ),
        ((2.0, 1.5, 1.75), "train", "lowest, 1.5000, at step 1 and has risen since; the run holds step 2"),
        ((2.0, 2.0, 2.0), "train", "did not fall: from 2.0000 to 2.0000"),
        ((2.0, 1.5, 2.5), "train", "did not fall: from 2.0000 to 2.5000"),
        ((2.0, float("nan")), "train", "did not fall: from 2.0000 to nan"),
        ((2.0, 1.5), "freeze", "in 1 step with layers 2-4,9 of 12 frozen"),
    ],
)
def test_headline(losses, mode, told):
    assert told in " ".join(finetune_report(*training(losses, mode=mode)).headline)


def test_few_rows_are_warned_of():
    assert finetune_report(*training((2.0, 1.0))).warnings == []
    assert "only 3 held-out rows" in finetune_report(*training((2.0, 1.0), rows=3)).warnings[0]
    assert "only 1 held-out row:" in finetune_report(*training((2.0, 1.0), rows=1)).warnings[0]


def test_every_test_and_every_objective_has_its_place():
    found = training((2.0, 1.5, 1.25), auxiliaries=[{"name": "exit at 4"}], aux_0=0.5)
    (section,) = finetune_report(*found).sections
    assert [line.split()[0] for line in section.text().splitlines()] == ["step", "0", "1", "2"]
    assert "aux 0: exit at 4" in section.text() and "aux 0: exit at 4" in section.brief
    assert [figure.name for figure in section.figures] == ["loss.png"]
    assert section.figures[0].png()[:4] == b"\x89PNG"


@pytest.mark.parametrize("cka", [None, [1.0, 0.9]])
def test_drift_has_a_panel_for_states_where_they_were_compared(cka):
    found = training((2.0, 1.5))
    found[1].append({"kind": "drift", "step": 1, "weights": [0.0, 0.1], "cka": cka})
    drift = finetune_report(*found).sections[0].figures[1]
    assert len(drift.canvas().axes) == (1 if cka is None else 2)
    assert ("states" in drift.caption) == (cka is not None)
