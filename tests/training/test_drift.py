"""How far layers have moved: against the criteria of whole models and states captured apart; resumed; what it costs."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from support.sealing import unfinished
from support.tiny_model import tiny_checkpoint

import jaxcrit as jc
from jaxcrit.commands.finetune import run_finetune
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.criteria.weight_change import weight_change
from jaxcrit.evidence.weights import weight_changes
from jaxcrit.models.model import open_model
from jaxcrit.similarity import cka
from jaxcrit.training import drift, trainer
from jaxcrit.training.drift import share


def written(path, count, offset=0):
    words = ["cat", "dog", "sky", "one", "two", "blue", "sat", "mat", "and", "is"]
    rows = [{"prompt": f"{n + offset} {words[n % 10]} {words[n % 7]}", "response": words[n % 9]} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift")
    train, held = written(folder / "train.jsonl", 24), written(folder / "held.jsonl", 21, 50)
    return FinetuneOptions(
        model=str(tiny_checkpoint(folder / "model")),
        data=str(train),
        eval_data=str(held),
        layers="2,4",
        steps=5,
        learning_rate=1e-2,
        checkpoint_every=3,
        drift_every=2,
        out=str(folder / "run"),
    )


@pytest.fixture(scope="module")
def run(asked):
    return run_finetune(asked)


def drifts(metrics):
    return {row["step"]: row for row in metrics if row["kind"] == "drift"}


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "layer_rates": "2:0.5", "mesh": "data=4,tensor=2"}])
def test_it_is_that_of_the_criterion_and_of_captured_states(asked, changes, tmp_path):
    asked = dataclasses.replace(asked, out=str(tmp_path / "run"), **changes)
    found = drifts(run_finetune(asked).metrics)
    assert list(found) == [2, 4, 5] and (tmp_path / "run" / "drift.png").stat().st_size > 10_000
    base, tuned = open_model(asked.model), open_model(asked.out)
    expected = weight_change(weight_changes(base, tuned)).values
    np.testing.assert_allclose(found[5]["weights"], expected, rtol=2e-4, atol=1e-7)
    assert np.flatnonzero(found[5]["weights"]).tolist() == [2, 4]
    before, after = (jc.capture(jc.load(one), asked.eval_data).hidden for one in (asked.model, asked.out))
    expected = cka(before, other=after, bias="debiased").diagonal()
    np.testing.assert_allclose(found[5]["cka"], expected, atol=2e-5)
    np.testing.assert_allclose(found[5]["cka"][:2], 1, atol=1e-6)  # below the lowest that trains
    assert max(found[5]["cka"][2:]) < 1 - 1e-4


def test_a_training_that_goes_on_measures_against_the_same_model(asked, run, tmp_path):
    shutil.copytree(run.out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "5")
    unfinished(tmp_path / "run")
    (tmp_path / "run" / "wandb").mkdir()
    (tmp_path / "run" / "wandb" / "latest-run").symlink_to("nowhere")  # as a tracker leaves it
    again = run_finetune(dataclasses.replace(asked, out=str(tmp_path / "run")))
    untimed = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in one.metrics] for one in (again, run)
    ]
    assert untimed[0] == untimed[1]


def test_steps_are_the_same_bits_with_and_without(asked, run, tmp_path):
    plain = run_finetune(dataclasses.replace(asked, out=str(tmp_path / "run"), drift_every=0))
    ours, theirs = (jax.device_get(open_model(str(one.out)).overlays[0].params) for one in (plain, run))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert not drifts(plain.metrics)


def test_few_rows_have_no_alignment_and_layers_chosen_anew_no_drift(asked, tmp_path):
    few = written(tmp_path / "few.jsonl", 3, 50)
    found = drifts(run_finetune(dataclasses.replace(asked, eval_data=str(few), out=str(tmp_path / "run"))).metrics)
    assert found[5]["cka"] is None and found[5]["weights"][2] > 0
    with pytest.raises(jc.UserError, match="leave --drift_every out"):
        run_finetune(dataclasses.replace(asked, layers="stable_rank:1", reselect=2, out=str(tmp_path / "no")))


def test_it_costs_at_most_what_is_said(asked, monkeypatch):
    """Counted by the compiler, a measure's passes over 16 probe rows against a step over 16 rows of like length."""
    seen = {}

    make, begin = trainer.make_step, drift.Drift.begin

    def kept_step(*given, **how):
        step = make(*given, **how)

        def run(state, frozen, batch):
            seen["step"] = step.lower(state, frozen, batch).compile().cost_analysis()["flops"] / batch.tokens.size
            return step(state, frozen, batch)

        return run

    def kept_begin(self, params, frozen):
        passes = [self._states.lower(params, frozen, batch).compile().cost_analysis() for _, batch in self._probe]
        seen["probe"] = sum(one["flops"] for one in passes) / sum(batch.tokens.size for _, batch in self._probe)
        begin(self, params, frozen)

    monkeypatch.setattr(trainer, "make_step", kept_step)
    monkeypatch.setattr(drift.Drift, "begin", kept_begin)
    run_finetune(dataclasses.replace(asked, layers="5", steps=1, out=""), keep=False)
    assert 0 < seen["probe"] < seen["step"]
    assert share(67, 16) < 0.03 < share(66, 16) and share(1, 32) == 1
