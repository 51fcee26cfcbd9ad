"""``jaxcrit reuse`` and ``generate --sender`` from checkpoint directories to run directories; what they refuse."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.family_models import one_device
from support.tiny import tiny_tokenizer_dir
from support.tiny_model import tiny_checkpoint

import jaxcrit
from jaxcrit.commands.generate import GenerateOptions, run_generate
from jaxcrit.commands.main import main
from jaxcrit.commands.reuse import ReuseOptions, report, run_reuse
from jaxcrit.core.deletions import read_deletions
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json
from jaxcrit.core.groups import PrefixOptions
from jaxcrit.core.layers import LayerSet, read_scores
from jaxcrit.data.dataset import Dataset
from jaxcrit.data.prefix import with_prefixes
from jaxcrit.data.templates import Example
from jaxcrit.evidence import rows as kept
from jaxcrit.models.model import open_model
from jaxcrit.parallel.preemption import Preempted
from jaxcrit.reporting.following import following
from jaxcrit.studies.reuse import choice, front, halves, most_damaging, pairs_with, sent, sets_to_try


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A receiver, a sender that differs from layer 2 on, and rows with contexts."""
    folder = tmp_path_factory.mktemp("inputs")
    receiver, rng = tiny_checkpoint(folder / "receiver"), np.random.default_rng(0)
    shutil.copytree(receiver, folder / "sender")
    weights = load_file(receiver / "model.safetensors")
    for name, value in weights.items():
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= 2:
            weights[name] = value + (0.2 * value.std() * rng.standard_normal(value.shape)).astype(np.float32)
    save_file(weights, folder / "sender" / "model.safetensors")
    words = ["cat", "dog", "sky", "one", "two", "blue", "sat", "mat", "and", "is"]
    rows = []
    for row in range(12):
        context = f"{row} {' '.join(rng.choice(words, rng.integers(2, 6)))}"
        rows.append({"prefix": context, "prompt": f"{context} is", "response": "one two"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def config(inputs, tmp_path):
    return ReuseOptions(
        sender=str(inputs / "sender"),
        receiver=str(inputs / "receiver"),
        data=str(inputs / "rows.jsonl"),
        max_new_tokens=4,
        random=5,
        tolerance=1e-4,
        prefix="context",
        batch_size=8,
        mesh="data=4,fsdp=2",
        out=str(tmp_path / "out"),
    )


def prefixes(model, config):
    """The rows as the study has them."""
    read = open_model(model).read(config, reserve=config.max_new_tokens)
    return with_prefixes(read, config)[0].examples


def test_a_run(config, tmp_path, capsys):
    made = run_reuse(config)
    out, found = tmp_path / "out", made.found
    files = {path.name for path in out.iterdir()}
    assert files >= {"reuse.json", "scores.json", "layers.json", "deletions.npz", "report.html"}
    assert files >= {"kv_reuse.png", "front.png", "groups.png"} and "partial.npz" not in files
    score = read_scores(out / "scores.json")["kv_reuse"]
    assert score.direction == "high" and (score.values[:2] == 0).all() and (score.values[2:] > 0).all()
    assert read_deletions(out, "kv_distance_keys").values.shape == (12, 7)
    assert found["identical"] == 2 and len(found["groups"]) == 28 and found["rows"] == {"choose": 6, "test": 6}
    assert found["front"][7]["best"]["test"]["kl"] == 0 and found["choice"]["choose"]["kl"] <= 1e-4
    assert found["cost"]["groups"] == {"sender": 7, "receiver": 28, "suffix": 7 + 84}
    # What begins at a layer below which nothing differs is as good as what begins at 0.
    by_layers = {tuple(one["layers"]): one for one in found["groups"]}
    for last in range(3, 8):
        kls = {by_layers[tuple(range(first, last))]["test"]["kl"] for first in range(3)}
        assert len(kls) == 1, last
    text = report(made).text()
    assert "of the damage of single layers" in text.lower() and "equal to the bit: 2 of 7" in text
    (use, _) = following("reuse", made.run["config"], str(made.out)).values()
    assert use.startswith("jaxcrit generate --model=") and f"--recompute=@{made.out}/layers.json" in use
    again = run_reuse(config)
    assert again.found == read_json(out / "reuse.json", "jaxcrit.reuse") and report(again).text() == text
    given = [f"--{name}={getattr(config, name)}" for name in ("sender", "receiver", "data", "prefix", "out")]
    assert main(["reuse", *given, "--max_new_tokens=4", "--random=5", "--tolerance=1e-4"]) == 0, (
        "batch size is no part of the question"
    )
    assert "Not safe for this pair as it is" in capsys.readouterr().out
    (out / "reuse.json").write_text((out / "reuse.json").read_text().replace('"stderr"', '"sterr"', 1))
    with pytest.raises(UserError, match=r"reuse\.json: expected .*stderr to be a number, got nothing"):
        run_reuse(config)
    layers = LayerSet.load(out / "layers.json")
    assert layers.model_hash == open_model(config.receiver).model_hash and layers.criterion == "reuse"


def test_the_same_model_is_safe(config, inputs):
    made = run_reuse(dataclasses.replace(config, sender=config.receiver, answers="gold"))
    everything = [one[half]["kl"] for one in made.found["groups"] for half in ("choose", "test")]
    assert not any(everything) and not made.scores["kv_reuse"].values.any() and made.found["identical"] == 7
    assert made.layers.layers == () and made.found["reused"]["test"]["answer"] == 0
    text = report(made).text()
    assert "Safe for this pair" in text and "warning: sender and receiver are the same model" in text
    assert (inputs / "rows.jsonl").exists() and made.scores["kv_distance_values"].values.tolist() == [0] * 7


def test_two_groups(inputs, config, tmp_path):
    """Where layers 2 and 5 alone differ, these two are the best of two; one group must take what lies between."""
    shutil.copytree(inputs / "receiver", tmp_path / "islands")
    weights, rng = load_file(inputs / "receiver" / "model.safetensors"), np.random.default_rng(1)
    for layer in (2, 5):
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        weights[name] = weights[name] + 0.3 * rng.standard_normal(weights[name].shape).astype(np.float32)
    save_file(weights, tmp_path / "islands" / "model.safetensors")
    made = run_reuse(dataclasses.replace(config, sender=str(tmp_path / "islands"), random=0, groups=2))
    found, least = made.found, {}
    for group in found["groups"]:
        least[len(group["layers"])] = min(group["choose"]["kl"], least.get(len(group["layers"]), np.inf))
    assert len(found["groups"]) == 28 and found["front"][2]["best"]["layers"] == [2, 5]
    assert found["front"][2]["best"]["choose"]["kl"] < 0.9 * least[2]
    assert all(line["best"]["choose"]["kl"] <= least.get(line["count"], np.inf) for line in found["front"])
    assert "2,5" in report(made).text(200) and "with controls and pairs" in report(made).text(200)
    firsts = pairs_with((0, 1), 7)
    assert firsts[0] == (0, 1, 3) and len(firsts) == 10 and all(2 not in pair for pair in firsts)
    assert pairs_with(tuple(range(6)), 7) == [] and (1, 2, 4, 5, 6) in pairs_with((4, 5, 6), 7)
    assert not list((tmp_path / "out").glob("partial*"))


def test_prefixes_longer_than_a_window_are_counted(config, tmp_path):
    family = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 6}
    model = str(tiny_checkpoint(tmp_path / "windows", **family))
    made = run_reuse(dataclasses.replace(config, sender=model, receiver=model, random=0))
    longer = sum(row.prefix_length > 6 for row in prefixes(model, config))
    assert made.found["beyond_window"] == longer and 0 < longer < 12 and not made.scores["kv_reuse"].values.any()
    assert f"{longer} prefixes are longer than the window of some layer" in report(made).text(200)


def test_devices_and_batches_find_what_one_device_finds(config):
    one = {name: open_model(getattr(config, name), mesh=one_device()) for name in ("receiver", "sender")}
    alone = run_reuse(dataclasses.replace(config, mesh=""), **one, keep=False)
    found = run_reuse(dataclasses.replace(config, mesh="data=2,fsdp=2,tensor=2", batch_size=4), keep=False)
    for key, score in alone.scores.items():
        np.testing.assert_allclose(found.scores[key].values, score.values, atol=1e-5, err_msg=key)
    for one, other in zip(found.found["groups"], alone.found["groups"], strict=True):
        np.testing.assert_allclose(one["test"]["kl"], other["test"]["kl"], atol=1e-5)


def test_told_to_leave_it_saves_and_goes_on(config, monkeypatch, tmp_path):
    config = dataclasses.replace(config, batch_size=8)
    whole = run_reuse(dataclasses.replace(config, out=str(tmp_path / "whole")))
    sweep = kept.sample_losses

    def told(examples, batch_size, model, directory, take, *rest, **more):
        def some(batch, *others):
            os.kill(os.getpid(), signal.SIGTERM)
            return take(batch, *others)

        return sweep(examples, batch_size, model, directory, some, *rest, **more)

    for passes, part in enumerate(("partial.npz", "partial_most_damaging0.npz")):
        asked = []

        def some(*given, passes=passes, asked=asked, **more):
            asked.append(more["partial"])
            return (told if len(asked) > passes else sweep)(*given, **more)

        with monkeypatch.context() as patch, pytest.raises(Preempted, match="told to leave at batch 1 of"):
            patch.setattr("jaxcrit.evidence.reuse.sample_losses", some)
            run_reuse(config)
        assert asked[-1] == part and (tmp_path / "out" / part).exists()
    assert run_reuse(config).found == whole.found
    assert not list((tmp_path / "out").glob("partial*"))


def test_python(inputs):
    rows = [json.loads(line) for line in (inputs / "rows.jsonl").read_text().splitlines()]
    sender, receiver = (jaxcrit.load(str(inputs / name)) for name in ("sender", "receiver"))
    found = jaxcrit.reuse(sender, receiver, rows, prefix="0.5", max_new_tokens=2, random=0)
    assert found.out is None and found.found["random"] == []
    with pytest.raises(UserError, match=r"^prefix=2: expected context"):
        jaxcrit.reuse(sender, receiver, rows, prefix="2")


def refused(kind, run, config, message, **changes):
    with pytest.raises(UserError) as caught:
        run(dataclasses.replace(config, **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_input(config, inputs, tmp_path):
    def no(message, **changes):
        refused(ReuseOptions, run_reuse, config, message, **changes)
        assert not (tmp_path / "out").exists()

    no("--sender: expected the model that has read the prefixes", sender="")
    no(
        "num_layers 7 in the receiver, 4 in the sender",
        sender=str(tiny_checkpoint(tmp_path / "a", num_hidden_layers=4)),
    )
    no("rope", sender=str(tiny_checkpoint(tmp_path / "b", rope_theta=500.0)))
    other = tiny_checkpoint(tmp_path / "c", tokenizer=False)
    tiny_tokenizer_dir(other)
    words = json.loads((other / "tokenizer.json").read_text())
    words["added_tokens"].append({**words["added_tokens"][-1], "id": 319, "content": "<more>"})
    (other / "tokenizer.json").write_text(json.dumps(words))
    no("expected one tokenizer, got two", sender=str(other))
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"prompt": f"one {row}"}) + "\n" for row in range(5)))
    no("no context in row 1, 2, 3", data=str(plain))
    no("expected 4 rows or more, half to choose by and half to test, got 3", limit=3)
    no("has no response to learn from", data=str(plain), prefix="0.5", answers="gold")
    no("--answers=mine: expected own or gold", answers="mine")
    no("--groups=3: expected 2 or less", groups=3)
    no("--sender=/nowhere: no such directory", sender="/nowhere")
    no("--receiver=/nowhere: no such directory", receiver="/nowhere")
    no("--tolerance=-1.0: expected 0 or more", tolerance=-1.0)


def test_longrope_on_two_sides(tmp_path):
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    changes = {"rope_scaling": scaling, "original_max_position_embeddings": 16}
    boundary = open_model(str(tiny_checkpoint(tmp_path / "model", **changes))).config.rope.boundary

    def row(prefix, prompt):
        return Example("", np.zeros(prompt, np.int32), prompt, "", None, prefix)

    def read(*rows, reserve=4):
        given = Dataset("rows", "FILE", list(rows))
        return with_prefixes([given], PrefixOptions(prefix="context"), boundary=boundary, reserve=reserve)

    assert boundary == 16 and read(row(4, 12), row(17, 30)) and read(row(4, 13), reserve=0)
    with pytest.raises(UserError, match=r"^FILE: row 2, 3: the prefix lies on one side of the 16 tokens"):
        read(row(4, 12), row(4, 13), row(16, 17))
    with pytest.raises(UserError, match=r"^FILE: row 1: the prefix lies on one side of the 16 tokens"):
        read(row(4, 17), reserve=0)


@pytest.fixture
def asked(inputs, tmp_path):
    return GenerateOptions(
        model=str(inputs / "receiver"),
        sender=str(inputs / "sender"),
        recompute="all",
        prefix="context",
        data=str(inputs / "rows.jsonl"),
        max_new_tokens=4,
        batch_size=8,
        out=str(tmp_path / "answers"),
    )


def test_answers_over_a_mixed_cache(asked, config, inputs, tmp_path):
    """All recomputed is the receiver itself; a set of layers changes the answers that the study says it changes."""
    rows = [json.loads(line) for line in (inputs / "rows.jsonl").read_text().splitlines()]
    whole = run_generate(asked)
    assert whole.run["sender"]["hash"] and whole.run["determines"]["config"]["recompute"] == list(range(7))
    alone = jaxcrit.generate(str(inputs / "receiver"), rows, max_new_tokens=4)
    assert sum(one == other for one, other in zip(whole.texts, alone.texts, strict=True)) >= 10, "but for the cut"
    made = run_reuse(config)
    own = [row["token_ids"] for row in whole.rows["rows"]]
    for spec in (f"@{tmp_path / 'out' / 'layers.json'}", "0-1"):
        mixed = run_generate(dataclasses.replace(asked, recompute=spec, out=str(tmp_path / spec[-3:])))
        layers = mixed.run["determines"]["config"]["recompute"]
        told = made.found["reused"] if layers == [0, 1] else made.found["choice"]
        told = told if layers != [0, 1] else {tuple(one["layers"]): one for one in made.found["groups"]}[0, 1]
        # The study asks whether the receiver's own tokens stay the likeliest; the token that ends is none of them.
        changed = [other["token_ids"][: len(one)] != one for one, other in zip(own, mixed.rows["rows"], strict=True)]
        choose, test = halves(12)
        for half, part in ((choose, "choose"), (test, "test")):
            some = [row for row in half if own[row]]
            if len(some) == len(half):
                np.testing.assert_allclose(np.mean([changed[row] for row in some]), told[part]["answer"])


def test_bad_input_of_generate(asked, config, inputs, tmp_path):
    def no(message, **changes):
        refused(GenerateOptions, run_generate, asked, message, **changes)
        assert not (tmp_path / "answers").exists()

    no("expected the layers to recompute too: --recompute=@DIR/layers.json", recompute="")
    no("--recompute=all: is of --sender; give it too", sender="")
    no("--prefix=context: is of --sender", sender="", recompute="")
    no("--recompute=critical:2: needs scores; give the layers.json of jaxcrit reuse", recompute="critical:2")
    no("expected layers 0 to 6, got 7", recompute="7")
    shallow = str(tiny_checkpoint(tmp_path / "a", num_hidden_layers=4))
    no("num_layers 7 in the model, 4 in the sender", sender=shallow)
    no("--sender=/nowhere: no such directory", sender="/nowhere")
    LayerSet((1,), "reuse", "group:1", 7, "another").save(tmp_path / "layers.json")
    no("made for model another", recompute=f"@{tmp_path / 'layers.json'}")


def test_front_and_choice():
    sets = [(), (0,), (1,), (0, 1)]
    damage = np.array([[4.0, 9.0, 4.0, 9.0], [1.0, 0.0, 1.0, 0.0], [2.0, 0.0, 2.0, 0.0], [1.5, 0.0, 1.5, 0.0]])
    choose, test = halves(4)
    assert choose.tolist() == [0, 2] and test.tolist() == [1, 3]
    assert front(sets, damage, choose) == [0, 1, 1], "a larger set that does worse is not on the front"
    assert choice([0, 1, 1], damage.max(axis=1), 3.0) == 1
    assert choice([0, 1, 1], damage.max(axis=1), 10.0) == 0
    assert choice([0, 1, 1], damage.max(axis=1), 0.5) == 2, "all layers always do"
    assert most_damaging(np.array([1.0, 3.0, 2.0])) == [(1,), (1, 2)]
    tried = sets_to_try(5, 4, 0)
    assert [len(one) for one in tried.recomputed[tried.groups :]] == [1, 2, 3, 4] and tried.groups == 16


def test_what_is_handed_over(inputs):
    config = open_model(str(inputs / "receiver")).config  # width 24, two heads of 6
    assert sent(config, (), 4) == 7 * 2 * 12 * 4
    assert sent(config, (0, 1), 4) == 5 * 2 * 12 * 4, "what begins at 0 needs no stream"
    assert sent(config, (1, 2, 4), 4) == (4 * 2 * 12 + 2 * 24) * 4
