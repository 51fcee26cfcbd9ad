"""The whole of ``jaxcrit finetune`` on a tiny random model: the run, resuming, tuned models, and every bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from support.sealing import unfinished
from support.tiny_model import prompts_file, tiny_checkpoint

from jaxcrit.commands.export import export_model
from jaxcrit.commands.finetune import chosen_by_scores, run_finetune, with_knees
from jaxcrit.commands.main import main
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json
from jaxcrit.core.files import read_lines as read_metrics
from jaxcrit.core.groups import AnalyzeOptions, FinetuneOptions
from jaxcrit.core.layers import LayerSet
from jaxcrit.core.selections import LayerSpec, resolve
from jaxcrit.data.dataset import whole
from jaxcrit.data.datasets import NamedRows
from jaxcrit.evaluation.losses import LossSums
from jaxcrit.evidence.weights import layer_tensors
from jaxcrit.models.checkpoint import load, open_checkpoint
from jaxcrit.models.model import changed_layers, open_model
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.reporting.finetuned import finetune_report
from jaxcrit.studies.analysis import run_analysis
from jaxcrit.training.trainer import partition_of, rate_factors


def pairs_file(path, count=24, seed=0):
    rng = np.random.default_rng(seed)
    words = ["cat", "dog", "sky", "one", "two", "blue", "sat", "mat", "and", "is"]
    line = lambda: " ".join(rng.choice(words, rng.integers(1, 5)))  # noqa: E731
    rows = [{"prompt": f"{i} {line()}", "response": line()} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pairs_file(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("JAXCRIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def base(model, data):
    return FinetuneOptions(
        model=str(model), data=str(data), layers="2,4", steps=6, learning_rate=1e-2, eval_every=2, checkpoint_every=2
    )


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A run from beginning to end."""
    return run_finetune(dataclasses.replace(base, out=str(tmp_path_factory.mktemp("finished") / "run")))


@pytest.fixture
def config(base, tmp_path):
    return dataclasses.replace(base, out=str(tmp_path / "run"))


def parameters(run):
    (tuned,) = open_model(str(run)).overlays
    return jax.device_get(tuned.params)


def untimed(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_run(finished):
    run = read_json(finished.out / "run.json", "jaxcrit.run")
    assert run["status"] == "complete" and run["trained"] == {"layers": [2, 4], "outside": []}
    assert LayerSet.load(finished.out / "layers.json").layers == (2, 4)
    rows = read_metrics(finished.out / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 2, 4, 6]
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 7))
    assert train[-1]["loss"] < train[0]["loss"] and {"loss_per_sample", "gradient_norm", "tokens"} <= train[0].keys()
    result = run["result"]
    assert abs(result["optimizer_bytes"] - 2 * result["trained_bytes"]) <= 16


def test_a_run_under_a_gain_is_a_model_without_one(base, finished, model, data, tmp_path):
    """What is written does without the gain what was trained with it: the loss that training saw at its end."""
    config = dataclasses.replace(base, gain="3:attn:0.5", out=str(tmp_path / "run"))
    found = run_finetune(config)
    assert found.run["trained"] == {"layers": [2, 4], "outside": [], "gain": "3:attn:0.5"}
    tuned, plain = open_model(str(tmp_path / "run")), open_model(str(model))
    again = run_finetune(dataclasses.replace(base, model=str(tmp_path / "run"), steps=1, out=str(tmp_path / "again")))
    ends = [row for row in found.metrics if row["kind"] == "eval"][-1], again.metrics[0]
    np.testing.assert_allclose(*(row["loss"] for row in ends), rtol=1e-5)
    before, trained, folded = (jax.device_get(one) for one in (plain.weights(), found.model.overlays[0].params, {}))
    for one in (tuned, found.model):
        folded = jax.device_get(one.decoder().weights())
        np.testing.assert_array_equal(folded["blocks.q"][[2, 4]], trained["train"]["blocks.q"])
        np.testing.assert_array_equal(folded["blocks.down"][:3], [*before["blocks.down"][:2], folded["blocks.down"][2]])
        np.testing.assert_allclose(folded["blocks.o"][[3, 5, 6]], 2 * before["blocks.o"][[3, 5, 6]], rtol=1e-6)
        np.testing.assert_allclose(folded["blocks.down"][4], 2 * trained["train"]["blocks.down"][1], rtol=1e-6)
    # The layers in which it differs from its base are those of the gain too; scores of weights see what is folded.
    assert changed_layers(plain, tuned) == (2, 3, 4, 5, 6) and tuned.trained["layers"] == [2, 4]
    for layer, tensors in enumerate(layer_tensors(tuned)):
        np.testing.assert_allclose(tensors["blocks.down"], folded["blocks.down"][layer], rtol=1e-6)
    assert tuned.model_hash == found.model.model_hash != open_model(str(finished.out)).model_hash
    export_model(str(tmp_path / "run"), str(tmp_path / "whole"))
    exported = load(open_checkpoint(tmp_path / "whole")).weights()
    np.testing.assert_array_equal(exported["blocks.o"], folded["blocks.o"])
    export_model(str(tmp_path / "run"), str(tmp_path / "delta"), delta_only=True)
    with safe_open(tmp_path / "delta" / "delta.safetensors", "np") as file:
        layers = {int(name.split(".")[2]) for name in file.keys()}  # noqa: SIM118
        assert layers == {2, 3, 4, 5, 6} and file.metadata()["layers"] == "2,3,4,5,6"
    with pytest.raises(UserError, match="gains folded into layers"):
        adapters = dataclasses.replace(config, lora_rank=2, steps=1, out=str(tmp_path / "adapters"))
        run_finetune(adapters)
        export_model(str(tmp_path / "adapters"), str(tmp_path / "peft"), adapter=True)


def test_the_run_is_a_model_that_differs_in_the_trained_layers_alone(finished, model):
    session = open_model(str(finished.out))
    before = load(open_checkpoint(Path(model))).weights()
    after = session.decoder().weights()
    for path, value in before.items():
        same = np.asarray(value) == np.asarray(after[path])
        if path.startswith("blocks."):
            assert same.reshape(7, -1).all(axis=1).tolist() == [layer not in (2, 4) for layer in range(7)], path
        else:
            assert same.all(), path
    assert session.model_hash != open_model(str(model)).model_hash


def test_a_tuned_model_can_be_analysed_and_tuned_again(finished, data, tmp_path, base):
    prompts = prompts_file(tmp_path / "prompts.jsonl")
    analysis = run_analysis(
        AnalyzeOptions(model=str(finished.out), data=str(prompts), out=str(tmp_path / "a"), layers="critical:2")
    )
    assert analysis.chosen.model_hash == open_model(str(finished.out)).model_hash
    twice = dataclasses.replace(base, model=str(finished.out), steps=2, layers="1", out=str(tmp_path / "twice"))
    second = run_finetune(twice)
    assert second.metrics[0]["loss"] == pytest.approx(finished.metrics[-1]["loss"], abs=1e-5)
    session = open_model(str(second.out))
    assert [tuned.partition.members("train") for tuned in session.overlays] == [(2, 4), (1,)]


def test_freeze_trains_the_rest_and_what_is_outside(base, tmp_path):
    run = run_finetune(dataclasses.replace(base, mode="freeze", steps=1, out=str(tmp_path / "run"))).run
    assert run["trained"] == {"layers": [0, 1, 3, 5, 6], "outside": ["embed", "norm"]}  # the head is tied
    (tuned,) = open_model(str(tmp_path / "run")).overlays
    assert tuned.partition.outside == {"embed", "norm"}


def test_critical_layers_are_found_first_and_the_analysis_is_used_again(config, tmp_path):
    asked = dataclasses.replace(config, layers="critical:2", steps=1, analysis=str(tmp_path / "analysis"))
    said = []
    first = run_finetune(asked, say=said.append)
    assert first.chosen.rule == "critical:2" and first.chosen.criterion == "delta_debiased"
    assert "training layers" in said[0] and "embeddings and tied head frozen, final norm frozen" in said[0]
    second = run_finetune(dataclasses.replace(asked, out=str(tmp_path / "second"), seed=1))
    assert second.chosen == first.chosen
    third = run_finetune(dataclasses.replace(asked, out=str(tmp_path / "third"), layers="boundary(delta:2)"))
    assert third.chosen.rule == "boundary(delta:2)" and third.chosen.criterion == "delta"
    taken = read_json(tmp_path / "analysis" / "run.json", "jaxcrit.run")["time"]["capture"]
    assert all(one == {"reused": True} for one in taken.values())


# Kills itself in the middle of a step, as the power would.
KILLED = """
import dataclasses, json, os, signal, sys
from jaxcrit.commands.finetune import FinetuneOptions, run_finetune
from jaxcrit.training import trainer
at, real = int(sys.argv[2]), trainer.micro_batches
def micro_batches(steps, number, *given):
    if number == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(steps, number, *given)
trainer.micro_batches = micro_batches
run_finetune(FinetuneOptions(**json.loads(sys.argv[1])))
"""


def test_killed_three_times_and_resumed_ends_in_the_same_bits(config, finished, tmp_path):
    seed = int(os.environ.get("JAXCRIT_TEST_SEED", time.time_ns() % 10**6))
    steps = sorted(np.random.default_rng(seed).choice(np.arange(1, 6), 3, replace=False).tolist())
    print(f"killed at steps {steps}; again with JAXCRIT_TEST_SEED={seed}")
    last = 0
    for at in steps:  # before the first checkpoint, between others, or while one is being written
        arguments = [sys.executable, "-c", KILLED, json.dumps(dataclasses.asdict(config)), str(at)]
        done = subprocess.run(arguments, env=os.environ, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert rows[-1]["step"] == at > last
        last = at
    resumed = run_finetune(config)
    assert untimed(resumed.metrics) == untimed(finished.metrics)
    jax.tree.map(np.testing.assert_array_equal, parameters(config.out), parameters(finished.out))
    step, here = resumed.run["time"]["resumed"], resumed.run["time"]["training_seconds"]
    earlier = sum(row["seconds"] for row in resumed.metrics if row["step"] <= step)
    told = (
        f"6 steps in {earlier + here:.1f} s, of which this launch, from step {step} on, ran {6 - step} in {here:.1f} s"
    )
    assert step and told in " ".join(finetune_report(resumed.run, resumed.metrics, resumed.chosen).text().split())


def test_what_has_no_weight_is_measured_and_changes_no_bit(config, finished):
    """Neither a supervised layer nor a perturbation: the rows of tests tell of them, those of steps do not."""
    asked = dataclasses.replace(config, supervise="5", supervise_weight=0, adversarial=0.1, adversarial_weight=0)
    found = run_finetune(asked)
    jax.tree.map(np.testing.assert_array_equal, parameters(config.out), parameters(finished.out))
    plain = [{key: value for key, value in row.items() if not key.startswith("aux")} for row in untimed(found.metrics)]
    assert plain == untimed(finished.metrics)
    for row in found.metrics:
        assert ("aux_0" in row) == ("aux_1" in row) == (row["kind"] == "eval")
    names = [one["name"] for one in found.run["auxiliaries"]]
    assert names == ["5", "states at 0.1"] and found.run["auxiliaries"][0]["layer"] == 5


def test_rows_beside_rows_come_from_their_fields(base, data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    texts = [{"known": f"{row['prompt']} and", "said": f"is {row['response']}"} for row in rows]
    rows = [row | text for row, text in zip(rows, texts, strict=True)]
    file = rows_file(tmp_path / "rows.jsonl", rows)
    asked = "3:logits:said,2:feature:known,4:feature:known+said"
    config = dataclasses.replace(base, data=str(file), supervise=asked, steps=2, out=str(tmp_path / "run"))
    found = run_finetune(config)
    assert [one["name"] for one in found.run["auxiliaries"]] == asked.split(",")
    for row in found.metrics:
        rows_of = 8 if row["kind"] == "train" else 2
        assert row["aux_1_tokens"] == row["aux_2_tokens"] == rows_of and 0 < row["aux_1"] < 2
        assert row["aux_0"] > 0 and row["aux_0_tokens"] >= rows_of
    opened, read = open_model(base.model), {}
    fields = (("prompt", "response"), ("prompt", "said"), ("known", ""), ("known", "said"))
    for number, (prompt, response) in enumerate(fields):
        given = [{"prompt": row[prompt]} | ({"response": row[response]} if response else {}) for row in rows]
        read[number] = whole(NamedRows("rows", "rows", given), opened.tokenizer, config)
    names = ["logits:said", "feature:known", "feature:known+said"]
    (dataset,) = opened.read(config, None, responses=True, beside=names)
    for row, example in enumerate(dataset.examples):
        for number, one in enumerate((example, *(example.beside[name] for name in names))):
            assert one.token_ids.tolist() == read[number][row].token_ids.tolist()
            assert one.prompt_length == read[number][row].prompt_length
    with pytest.raises(UserError, match=r"row 2 has no text in 'said'.*such as prompt, response, known"):
        short = [texts[0] | rows[0], {**rows[1], "known": "one", "said": " "}]
        run_finetune(dataclasses.replace(config, data=str(rows_file(tmp_path / "short.jsonl", short)), out="x"))
    with pytest.raises(UserError, match="expected rows of at most 24 tokens, logits:said of row 1 is longer"):
        long = [texts[0] | rows[0] | {"said": "one " * 20}, texts[1] | rows[1]]
        long_file = rows_file(tmp_path / "long.jsonl", long)
        run_finetune(dataclasses.replace(config, data=str(long_file), max_length=24, out=str(tmp_path / "x")))


def test_knees_are_layers_that_may_be_refused(base, model, monkeypatch):
    """By the score of that name, whose meta names them."""
    found = types.SimpleNamespace(meta={"knees": {"first": 3, "second": None}})
    told = types.SimpleNamespace(datasets={"rows": {"lens_entropy": found}})
    monkeypatch.setattr("jaxcrit.commands.finetune.scored", lambda *_: told)
    asked = dataclasses.replace(base, supervise="lens:first:logits:lens:first,2,lens:first")
    opened = open_model(str(model))
    assert with_knees(asked, opened, None, None).supervise == "3:logits:lens:first,2,3"
    with pytest.raises(UserError, match="the second knee of lens_entropy is not named"):
        with_knees(dataclasses.replace(base, supervise="lens:second"), opened, None, None)
    told.datasets["more"] = told.datasets["rows"]
    with pytest.raises(UserError, match="knees are of one dataset, got rows, more"):
        with_knees(asked, opened, None, None)


SCRIPT = """
import dataclasses
from jaxcrit.commands import finetune
from jaxcrit.core.layers import LayerSet
def chosen(options, spec, model, out, **more):
    step = model.overlays[-1].step if model.overlays else 0
    return LayerSet({0: (2, 4), 3: (3, 4)}[step], "rgn", "rgn:2", 7)
finetune.chosen_by_scores = chosen
"""


def test_killed_around_a_choice_of_layers_and_resumed_ends_in_the_same_bits(config, model, tmp_path, monkeypatch):
    """Layer 4 stays, with its moments; 2 leaves and keeps what it learnt; in checkpoints is all that was trained."""
    monkeypatch.setattr("jaxcrit.commands.finetune.chosen_by_scores", None)
    exec(SCRIPT, {})
    asked = dataclasses.replace(config, layers="rgn:2", reselect=3)
    whole = run_finetune(dataclasses.replace(asked, out=str(tmp_path / "whole")))
    for at in (3, 5):  # before the first checkpoint after the choice, and behind it
        arguments = [sys.executable, "-c", SCRIPT + KILLED, json.dumps(dataclasses.asdict(asked)), str(at)]
        done = subprocess.run(arguments, env=os.environ, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] in (at, at + 1)
    resumed = run_finetune(asked)
    assert untimed(resumed.metrics) == untimed(whole.metrics)
    jax.tree.map(np.testing.assert_array_equal, parameters(config.out), parameters(tmp_path / "whole"))
    selections = [{"step": 0, "layers": [2, 4]}, {"step": 3, "layers": [3, 4]}]
    assert resumed.run["trained"] == {"layers": [2, 3, 4], "outside": [], "selections": selections}
    assert [row for row in whole.metrics if row["kind"] == "layers"] == [
        {"kind": "layers", "step": 4, "layers": [3, 4]}
    ]
    plain = jax.device_get(open_model(str(model)).decoder().weights())["blocks.q"]
    opened = [open_model(str(tmp_path / "run"), step=step) for step in ("", "4")]
    ended, before = (jax.device_get(one.decoder().weights())["blocks.q"] for one in opened)
    moved = lambda one, other: [layer for layer in range(7) if (one[layer] != other[layer]).any()]  # noqa: E731
    assert moved(plain, ended) == moved(plain, before) == [2, 3, 4] and moved(before, ended) == [3, 4]


def test_eight_devices_choose_anew_as_one_does(base, tmp_path):
    """After two steps both choose the same layers, and train them to the same weights."""
    selections, tuned = [], []
    for count in (1, 8):
        asked = dataclasses.replace(base, layers="rgn:2", reselect=2, steps=4, out=str(tmp_path / str(count)))
        devices = make_mesh({"data": count}, jax.devices()[:count])
        found = run_finetune(asked, model=open_model(base.model, mesh=devices))
        assert found.run["devices"]["mesh"]["data"] == count
        selections.append(found.run["trained"]["selections"])
        tuned.append(parameters(asked.out))
    assert selections[0] == selections[1] and len(selections[0]) == 2
    jax.tree.map(lambda one, eight: np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5), *tuned)


def test_layers_are_chosen_anew_by_the_model_as_it_is(base, tmp_path):
    asked = dataclasses.replace(
        base,
        layers="stable_rank:1",
        reselect=1,
        steps=2,
        checkpoint_every=1,
        learning_rate=0.3,
        out=str(tmp_path / "run"),
    )
    found = run_finetune(asked)
    first, second = found.run["trained"]["selections"]
    spec = LayerSpec.parse("stable_rank:1")
    for model, chosen in ((base.model, first), (open_model(asked.out, step="1"), second)):
        layers = chosen_by_scores(asked, spec, open_model(model), None, rows=None, progress=None).layers
        assert list(layers) == chosen["layers"]


def interrupted(out, copy):
    """A finished run as it was before its last step was saved."""
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "checkpoints" / "6")
    unfinished(copy)
    return copy


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """The same run with adapters."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    said = []
    asked = dataclasses.replace(base, out=str(out), lora_rank=2, layer_rates="0-3:0.5,6:3")
    return run_finetune(asked, say=said.append), said[0]


def test_a_run_with_adapters_is_a_model_and_goes_on_bit_for_bit(adapted, finished, model, tmp_path):
    run, said = adapted
    assert "adapters of rank 2, alpha 4, on o, down, q, k, v, gate, up; embeddings" in said
    assert read_json(run.out / "run.json", "jaxcrit.run")["trained"] == {
        "layers": [2, 4],
        "outside": [],
        "rates": [0.5, 1.0],
        "lora": {"rank": 2, "alpha": 4.0, "targets": ["o", "down", "q", "k", "v", "gate", "up"]},
    }
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"] == finished.metrics[0]["loss"]
    before, after = load(open_checkpoint(Path(model))).weights(), open_model(str(run.out)).decoder().weights()
    for path, value in before.items():
        same = (np.asarray(value) == np.asarray(after[path])).reshape(len(value), -1).all(axis=1)
        linear = path.startswith("blocks.") and "norm" not in path
        assert np.flatnonzero(~same).tolist() == ([2, 4] if linear else []), path
    again = run_finetune(
        dataclasses.replace(FinetuneOptions(**run.run["config"]), out=str(interrupted(run.out, tmp_path / "run")))
    )
    assert untimed(again.metrics) == untimed(run.metrics)
    jax.tree.map(np.testing.assert_array_equal, parameters(again.out), parameters(run.out))


def test_rates_name_layers_as_every_selection_does(tmp_path):
    LayerSet((2, 4), "step", "step:2", 7).save(tmp_path / "layers.json")
    halves = {0: 0.5, 6: 0.5}
    assert rate_factors("boundary(0-2,6):0.5", 7) == rate_factors("0:0.5, 6:5e-1", 7) == halves
    assert rate_factors(f"@{tmp_path}/layers.json:2,last:1:0.5", 7) == {2: 2.0, 4: 2.0, 6: 0.5}
    assert rate_factors("", 7) == {}


def test_freeze_puts_adapters_in_all_other_layers_and_leaves_what_is_outside_frozen(base, model):
    session = open_model(str(model))
    chosen = resolve(LayerSpec.parse("0-4"), 7)
    for norms, outside in ((None, set()), (True, {"norm"})):
        asked = dataclasses.replace(base, lora_rank=1, mode="freeze", train_norms=norms)
        parts = partition_of(asked, session.config, chosen)
        assert parts.members("train") == (5, 6) and parts.outside == outside and parts.lora.alpha == 2


def test_export_of_a_chosen_checkpoint(finished, adapted, model, tmp_path):
    tests = {row["step"]: row["loss"] for row in finished.metrics if row["kind"] == "eval"}
    found = {
        step: export_model(str(finished.out), str(tmp_path / f"run{step}"), step=step).step
        for step in ("", "last", "4", "best")
    }
    assert found == {"": 6, "last": 6, "4": 4, "best": min((2, 4, 6), key=tests.get)}
    for step in ("4", "6"):
        weights = load(open_checkpoint(tmp_path / f"run{step if step == '4' else ''}")).weights()
        expected = open_model(str(finished.out), step=step).decoder().weights()
        jax.tree.map(np.testing.assert_array_equal, weights, expected)
    for step in ("3", "later"):
        with pytest.raises(UserError, match=rf"no checkpoint of step {step}; .*: .*4 \(test loss {tests[4]:.4f}\), 6 "):
            export_model(str(finished.out), str(tmp_path / "no"), step=step)
    run = str(adapted[0].out)
    cases = [
        (str(model), {"step": "4"}, "--step: .* is no finetune run"),
        (str(model), {"adapter": True}, "--adapter"),
        (str(finished.out), {"adapter": True}, "trained the layers themselves"),
        (run, {"adapter": True, "delta_only": True}, "give one of them"),
    ]
    for source, options, message in cases:
        with pytest.raises(UserError, match=message):
            export_model(source, str(tmp_path / "no"), **options)
    assert not (tmp_path / "no").exists()


def test_event_files_say_what_the_metrics_say(config, tmp_path):
    events = pytest.importorskip("tensorboardX.proto.event_pb2", reason="pip install -e '.[tensorboard]'")
    run = run_finetune(dataclasses.replace(config, track="tensorboard", steps=2, eval_every=1))
    found = {}
    for file in (run.out / "tensorboard").iterdir():
        content = file.read_bytes()
        while content:  # length, checksum, event, checksum
            size = int.from_bytes(content[:8], "little")
            event = events.Event.FromString(content[12 : 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            content = content[16 + size :]
    expected = {
        (f"{row['kind']}/{name}", row["step"]): value
        for row in run.metrics
        for name, value in row.items()
        if name not in ("kind", "step")
    }
    assert found.keys() == expected.keys() and {step for _, step in found} == {0, 1, 2}
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=1e-6)


def test_a_finished_run_is_not_run_again(finished, base):
    again = run_finetune(dataclasses.replace(base, out=str(finished.out)))
    assert "complete already" in again.warnings[0] and again.run["result"] == finished.run["result"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(config, finished, tmp_path):
    shutil.copytree(finished.out, tmp_path / "run")
    unfinished(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "6" / "params" / "_METADATA").write_text("{")
    resumed = run_finetune(config)
    assert "checkpoint of step 6 is damaged and was skipped" in resumed.warnings[0]
    assert untimed(resumed.metrics) == untimed(finished.metrics)
    jax.tree.map(np.testing.assert_array_equal, parameters(config.out), parameters(finished.out))


def test_early_stopping(config):
    stopped = run_finetune(
        dataclasses.replace(config, learning_rate=2.0, optimizer="sgd", steps=20, eval_every=1, patience=2)
    )
    result = stopped.run["result"]
    assert result["steps"] < 20 and result["steps"] == result["best_step"] + 2


def test_the_command(model, data, tmp_path, capsys):
    out = tmp_path / "run"
    flags = [f"--model={model}", f"--data={data}", "--layers=3", "--steps=2", f"--out={out}", "--train_norms"]
    assert main(["finetune", *flags]) == 0
    shown = capsys.readouterr()
    assert "final norm trained" in shown.err and "mean of means (paper)" in shown.out
    told = " ".join(shown.out.split())
    assert re.search(r"Test loss (fell|did not fall:) from [\d.]+ to [\d.]+ nats a token on \d+ held-out rows", told)
    page = (out / "report.html").read_text()
    assert f"report: {out / 'report.html'}" in shown.out and page.count("data:image/png") >= 2
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert read_json(out / "run.json", "jaxcrit.run")["trained"]["outside"] == ["norm"]
    assert max(map(len, shown.out.replace(str(out), "OUT").splitlines())) <= 100


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mistakes():
    pair = {"prompt": "one", "response": "two"}
    yield {"layers": "7"}, "layers 0 to 6"
    yield {"layers": "critical:4"}, "at most 3 layers"
    yield {"layers": ""}, "--layers="
    yield {"layers": "all", "mode": "freeze"}, "freezes all 7 layers"
    yield {"mode": "frees"}, "did you mean 'freeze'"
    yield {"layers": "@{tmp}/layers.json"}, "made for model"
    yield {"data": [{"prompt": "one"}, pair]}, "row 1 has no response"
    yield {"data": [{"prompt": "one", "response": ""}, pair]}, "row 1 has no response"
    yield {"data": [pair]}, "two different rows"
    yield {"data": [pair, {"prompt": "one " * 80, "response": "two"}]}, "at most 64 tokens, row 2"
    yield {"data": [pair, {"prompt": "one " * 80, "response": "two"}], "truncate": "right"}, "nothing is left"
    yield {"learning_rate": 0.0}, "learning_rate=0.0: expected a number above 0"
    yield {"learning_rate": -1.0}, "learning_rate=-1.0"
    yield {"batch_size": 6}, "does not divide over the 8 parts of the mesh"
    yield {"steps": 2, "epochs": 2}, "give one of them"
    yield {"steps": 2, "warmup": 2}, "fewer steps than the run has"
    yield {"optimizer": "adam"}, "did you mean"
    yield {"train_head": True}, "tied"
    yield {"lora_rank": 13}, "lora_rank=13: expected 1 to 12, the smallest side"
    yield {"lora_rank": -1}, "lora_rank=-1: expected 0 or more"
    yield {"lora_alpha": 4.0}, "lora_alpha=4.0: is of adapters"
    yield {"lora_rank": 2, "lora_targets": "gat"}, "did you mean 'gate'"
    yield {"layer_rates": "0-3"}, "expected LAYERS:FACTOR"
    yield {"layer_rates": "0-3:0"}, "expected LAYERS:FACTOR .*, got '0-3:0'"
    yield {"layer_rates": "critical:2"}, "expected LAYERS:FACTOR"
    yield {"layer_rates": "0-3:1,2:2"}, "each layer once, got 2 twice"
    yield {"layer_rates": "7:2"}, "layer_rates=7: expected layers 0 to 6"
    yield {"layer_rates": "step:2:0.5"}, "expected LAYERS:FACTOR .* go in as @layers.json"
    yield {"layer_rates": "first:4"}, "layer_rates=first: expected first:K"
    yield {"supervise": "7"}, "--supervise=7: expected layers 0 to 6, got 7"
    yield {"supervise": "1"}, "nothing at or below layer 1 trains .the lowest that trains is 2"
    yield {"supervise": "3", "supervise_weight": -0.5}, "--supervise_weight=-0.5: expected 0 or more"
    yield {"supervise_weight": 0.5}, "--supervise_weight=0.5: is of --supervise"
    yield {"supervise": "3:logits:english"}, "row 1 has no text in 'english'.*such as prompt, response"
    yield {"supervise": "3:logits:english", "edition": "paper"}, "--edition"
    yield {"adversarial": -0.1}, "--adversarial=-0.1: expected 0 or more"
    yield {"adversarial_on": "loss"}, "--adversarial_on=loss: is of --adversarial"
    yield {"adversarial": 0.1, "adversarial_steps": 0}, "--adversarial_steps=0: expected 1 or more"
    yield {"adversarial": 0.1, "mode": "freeze"}, "must not grow .*--train_embeddings=false"
    yield {"reselect": 2}, "--reselect=2: chooses anew by a score, and --layers=2,4 needs none"
    yield {"reselect": 2, "layers": "critical:2", "lora_rank": 2}, "leave --lora_rank out"
    yield {"layers": "weight_change:2"}, "no score 'weight_change'"
    yield {"gain": "7:mlp:0.5"}, "--gain=7:mlp:0.5: expected layers 0 to 6"
    yield {"gain": "2:mlp:0"}, "nothing is left of the prompt"
    yield {"layers": "fishe:2"}, "no score 'fishe'.*did you mean 'fisher'.*; there are delta, delta_debiased, step"


@pytest.mark.parametrize(("changes", "message"), list(mistakes()), ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_and_leaves_nothing(config, changes, message, tmp_path):
    LayerSet((1,), "manual", "1", 7, "0" * 64).save(tmp_path / "layers.json")
    if isinstance(changes.get("data"), list):
        changes = {**changes, "data": rows_file(tmp_path / "rows.jsonl", changes["data"])}
    if "layers" in changes:
        changes = {**changes, "layers": changes["layers"].format(tmp=tmp_path)}
    with pytest.raises(UserError, match=message) as caught:
        run_finetune(dataclasses.replace(config, **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"learning_rate": 1e-3}, "learning_rate 0.01 there, 0.001 now"), ({"layers": "3"}, "layers"), ({}, "train ")],
    ids=["rate", "layers", "data"],
)
def test_resume_with_another_configuration_or_other_data_says_what_differs(base, finished, tmp_path, changes, message):
    changes = changes or {"data": str(pairs_file(tmp_path / "other.jsonl", seed=5))}
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")}
    with pytest.raises(UserError, match=f"holds another run .*{message}"):
        run_finetune(dataclasses.replace(base, out=str(finished.out), **changes))
    assert before == {path: path.stat().st_mtime_ns for path in finished.out.rglob("*")}


GUESS = LossSums(*(jax.numpy.float32(value) for value in (5.77, 1, 5.77, 1)))


@pytest.mark.parametrize(
    ("wrong", "since", "message"),
    [
        ({"gradient_norm": jax.numpy.float32("nan")}, 2, r"step 3: the gradient's norm is nan; .* is .*/2\."),
        (
            {"gradient_norm": jax.numpy.float32(0), "sums": GUESS},
            0,
            r"step 10: 10 steps without learning, loss 5.77 where a guess has 5.77: no gradient is left; .* is .*/8\.",
        ),
    ],
    ids=["nan", "dead"],
)
def test_what_is_not_healthy_stops_and_names_the_last_good_checkpoint(config, monkeypatch, wrong, since, message):
    from jaxcrit.training import trainer

    real = trainer.make_step

    def breaks(*arguments, **options):
        step = real(*arguments, **options)

        def broken(state, frozen, batch):
            number = int(state.step)
            state, metrics = step(state, frozen, batch)
            return state, dataclasses.replace(metrics, **wrong) if number >= since else metrics

        return broken

    monkeypatch.setattr(trainer, "make_step", breaks)
    with pytest.raises(UserError, match=message):
        run_finetune(dataclasses.replace(config, steps=12))


def test_divergence_stops(config):
    with pytest.raises(UserError, match=r"the run diverges|no gradient is left|loss is nan|norm is (nan|inf)"):
        # With the head: logits of a trained block alone stay within the norm in front of them.
        run_finetune(
            dataclasses.replace(
                config,
                optimizer="sgd",
                learning_rate=1e4,
                steps=40,
                eval_every=40,
                train_embeddings=True,
                train_head=True,
            )
        )
