"""``jaxcrit prune``: the checkpoint holds the other layers bit for bit, and costs what was measured before."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.tiny_model import tiny_checkpoint

import jaxcrit as jc
from jaxcrit.commands.main import main
from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import LayerScores, write_scores
from jaxcrit.criteria import ablation
from jaxcrit.models.model import open_model
from jaxcrit.parallel.preemption import Preempted

WORDS = "cat dog sky one two blue sat mat and is".split()  # noqa: SIM905
LAYERS = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"{number} {' '.join(rng.choice(WORDS, 3))}", "response": str(rng.choice(WORDS))}
        for number in range(12)
    ]
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def run(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return jc.prune(model, [2, 4], str(data), out=out, controls=3, batch_size=4)


def loss_of(model, data, out=""):
    """Mean loss of the rows, by ablation's intact model."""
    found = jc.ablate(model, str(data), out=out, methods="skip", batch_size=4)
    return found.scores["ablation_skip"].meta["unchanged"]


def test_what_is_left_is_the_source_bit_for_bit(run, model):
    source, found = load_file(model / "model.safetensors"), load_file(run.out / "model/model.safetensors")
    config = json.loads((run.out / "model/config.json").read_text())
    assert config["num_hidden_layers"] == LAYERS - 2 and run.run["kept"] == [0, 1, 3, 5, 6]
    number = {old: new for new, old in enumerate(run.run["kept"])}
    expected = {}
    for name, value in source.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in number:
                continue
            parts[2] = str(number[int(parts[2])])
        expected[".".join(parts)] = value
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and value.tobytes() == expected[name].tobytes(), name
    weights = sum(value.size for value in found.values())
    assert run.run["result"]["parameters"] == weights
    assert run.run["result"]["parameters_before"] == sum(value.size for value in source.values())


def test_the_checkpoint_costs_what_was_measured(run, model, data):
    result = run.run["result"]
    assert result["loss"] == pytest.approx(loss_of(model, data), abs=1e-6)
    assert result["sets"]["asked"]["loss"] == pytest.approx(loss_of(run.out / "model", data), abs=1e-6)
    assert result["sets"]["last"]["layers"] == [4, 5]
    drawn = [one["layers"] for name, one in result["sets"].items() if name.startswith("random")]
    assert len(drawn) == 3 and all(len(one) == 2 and not {0, 6} & set(one) for one in drawn)
    for one in result["sets"].values():
        assert one["low"] < one["change"] < one["high"] and one["change"] == pytest.approx(one["loss"] - result["loss"])


def test_it_is_healed_as_any_model_is(run, data):
    tuned = jc.finetune(run.out / "model", str(data), "all", steps=8, batch_size=8, learning_rate=1e-2)
    assert loss_of(tuned, data) < run.run["result"]["sets"]["asked"]["loss"] - 0.01


def test_read_back_and_gone_on(run, model, data, tmp_path, monkeypatch):
    words = ["prune", f"--model={model}", "--drop=2,4", f"--data={data}", "--controls=3", "--batch_size=4"]
    assert main([*words, f"--out={tmp_path / 'a'}"]) == 0
    whole = (tmp_path / "a/model/model.safetensors").read_bytes()
    assert main([*words, f"--out={tmp_path / 'a'}"]) == 0, "read back"

    calls = iter([lambda: os.kill(os.getpid(), signal.SIGTERM)])

    def swept(*given, original=ablation.sweep, **options):
        if act := next(calls, None):
            act()
        return original(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ablation, "sweep", swept)
        with pytest.raises(Preempted):
            jc.prune(model, "2,4", str(data), out=tmp_path / "b", controls=3, batch_size=4)
    assert main([*words, f"--out={tmp_path / 'b'}"]) == 0
    assert (tmp_path / "b/model/model.safetensors").read_bytes() == whole
    a, b = (json.loads((tmp_path / name / "run.json").read_text())["result"]["sets"] for name in "ab")
    assert a == b


def test_layers_by_a_score(model, data, tmp_path):
    values = np.array([0.1, 0.9, 0.3, 0.2, 0.8, 0.7, 0.1])
    score = LayerScores("influence", values, np.full(LAYERS, True), "low", None, {})
    write_scores(tmp_path / "scores.json", {"influence": score})
    file = str(tmp_path / "scores.json")
    found = jc.prune(model, "influence:2", str(data), out=tmp_path / "out", scores=file, controls=0)
    assert found.run["dropped"]["layers"] == [2, 3] and found.run["dropped"]["criterion"] == "influence"
    assert list(found.run["result"]["sets"]) == ["asked", "last"]
    assert open_model(str(found.out / "model")).config.num_layers == LAYERS - 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected --drop=SPEC, such as --drop=20-23"),
        (["--drop=0,3"], "names layer 0, the first or the last, which a model rarely does without; leave it, or give"),
        (["--drop=5-6"], "names layer 6"),
        (["--drop=all", "--force"], "names all 7 layers; leave one at least"),
        (["--drop=7"], "expected layers 0 to 6, got 7"),
        (["--drop=noncritical:2"], "needs scores; give --scores=FILE"),
        (["--drop=2", "--controls=-1"], "--controls"),
    ],
)
def test_bad_input(words, said, model, data, tmp_path, capsys):
    given = ["prune", f"--model={model}", f"--data={data}", f"--out={tmp_path / 'out'}", *words]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_bucket_is_no_place_for_a_checkpoint(model, data, capsys):
    assert main(["prune", f"--model={model}", f"--data={data}", "--drop=2", "--out=gs://bucket/there"]) == 2
    assert "--out=gs://bucket/there: " in capsys.readouterr().err


def test_force_takes_the_ends(model, data, tmp_path):
    found = jc.prune(model, "0,6", str(data), out=tmp_path / "out", force=True, controls=2)
    assert found.run["kept"] == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="layer 0 and 6"):
        jc.prune(model, "0,6", str(data), out=tmp_path / "other")
