"""The Python API as a notebook uses it: one read, nothing written, the base as it was, errors that name arguments."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys

import numpy as np
import pytest
from support.tiny_model import tiny_checkpoint

import jaxcrit as jc
from jaxcrit import api
from jaxcrit.models import model as models

WORDS = ("cat", "dog", "sky", "one", "two", "blue", "sat", "mat", "and", "is")


def rows(count=24, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"prompt": f"{i} {' '.join(rng.choice(WORDS, 4))}", "response": " ".join(rng.choice(WORDS, 3))}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=7)


def test_importing_jaxcrit_imports_nothing_slow_and_lists_its_names():
    code = (
        "import sys, jaxcrit; assert {'load', 'score', 'open_run'} <= set(dir(jaxcrit));"
        " slow = {'jax', 'numpy', 'flax', 'transformers', 'matplotlib', 'absl'} & set(sys.modules);"
        " assert not slow, slow;"
        " jaxcrit.score; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(api.__all__) | {"UserError"} == set(jc.__all__)
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        _ = jc.scores


def test_examples_in_docstrings():
    failed, tried = doctest.testmod(api)
    assert tried >= 8 and failed == 0


def test_the_flow_reads_once_writes_nothing_and_leaves_the_base_alone(checkpoint, tmp_path, monkeypatch):
    loads = []
    real = models.load
    monkeypatch.setattr(models, "load", lambda *given, **named: loads.append(1) or real(*given, **named))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    model = jc.load(checkpoint)
    before = {path: np.asarray(value).copy() for path, value in model.decoder().weights().items()}
    (tmp_path / "cache").mkdir(exist_ok=True)
    kept = sorted(tmp_path.rglob("*"))

    prompts = [row["prompt"] for row in rows()]
    states = jc.capture(model, prompts)
    scores = jc.score(states)
    layers = jc.select(scores, "critical:2", trim=1)
    assert len(layers.layers) == 2 and layers.model_hash == model.model_hash
    assert jc.plot(scores, layers).axes and jc.plot(states).axes and jc.plot(scores["step"]).axes
    answers = jc.generate(model, prompts[:3], max_new_tokens=4).texts

    quick = {"steps": 3, "learning_rate": 1e-2, "batch_size": 8}
    tuned = jc.finetune(model, rows(), layers, **quick)
    everything = jc.finetune(model, rows(), "all", **quick)
    assert len({model.model_hash, tuned.model_hash, everything.model_hash}) == 3
    after = tuned.decoder().weights()
    for path, value in before.items():
        same = (np.asarray(after[path]) == value).reshape(len(value), -1).all(axis=1)
        changed = np.flatnonzero(~same).tolist()
        assert changed == [] if not path.startswith("blocks.") else set(changed) <= set(layers.layers), path
    found = jc.substitute(model, everything, rows(12, seed=1))
    agreed = jc.correlate(scores["delta_debiased"], found)
    assert agreed.interval is not None and agreed.num_layers == 3
    assert "ablation_skip" in jc.ablate(model, rows(8), methods="skip").scores
    assert set(jc.score(model, rows(8), criteria="lens_kl,stable_rank")) == {"lens_kl", "stable_rank"}
    assert jc.compare(states, jc.capture(tuned, prompts)).shape == (7, 7)
    assert "masked" in jc.inspect(model, rows(2))
    assert jc.inspect(model).startswith(f"model:\n  {model.describe()['path']} (")

    assert len(loads) == 1, "the checkpoint is read once"
    assert sorted(tmp_path.rglob("*")) == kept, "nothing is written"
    for path, value in model.decoder().weights().items():
        np.testing.assert_array_equal(np.asarray(value), before[path])
    assert jc.generate(model, prompts[:3], max_new_tokens=4).texts == answers


def test_nothing_is_written_where_nothing_may_be(checkpoint, tmp_path):
    if os.geteuid() == 0:
        work = "/proc/self"  # root may write to what others may not
    else:
        work = str(tmp_path / "sealed")
        os.mkdir(work, 0o500)
    code = (
        "import sys, numpy as np, jaxcrit as jc; model = jc.load(sys.argv[1]);"
        " rows = [{'prompt': f'{i} cat {i * i}', 'response': 'dog'} for i in range(12)];"
        " layers = jc.select(jc.score(jc.capture(model, [row['prompt'] for row in rows])), 'critical:1');"
        " jc.finetune(model, rows, layers, steps=1, batch_size=8); jc.generate(model, rows[:2], max_new_tokens=2)"
    )
    environment = {**os.environ, "JAXCRIT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)], cwd=work, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_substituted_model_is_a_model(checkpoint, tmp_path):
    model = jc.load(checkpoint)
    tuned = jc.finetune(model, rows(), "all", steps=2, learning_rate=1e-2, batch_size=8)
    mixed = tuned.with_layers_of(model, [1, 3])
    assert mixed.model_hash not in (model.model_hash, tuned.model_hash)
    base, own, after = (one.decoder().weights() for one in (model, tuned, mixed))
    for path, value in after.items():
        expected = np.asarray(own[path]).copy()
        if path.startswith("blocks."):
            expected[[1, 3]] = np.asarray(base[path])[[1, 3]]
        np.testing.assert_array_equal(np.asarray(value), expected)
    written = jc.export(mixed, tmp_path / "mixed")
    again = jc.load(written).decoder().weights()
    for path, value in after.items():
        np.testing.assert_array_equal(np.asarray(again[path]), np.asarray(value))
    shallow = jc.load(tiny_checkpoint(tmp_path / "shallow", num_hidden_layers=4))
    with pytest.raises(jc.UserError, match="num_layers 7 in the base, 4 in the tuned model"):
        tuned.with_layers_of(shallow, [1])


def test_a_run_with_a_directory_reads_back(checkpoint, tmp_path):
    model = jc.load(checkpoint)
    found = jc.ablate(model, rows(8), methods="skip", out=tmp_path / "ablated")
    run = jc.open_run(tmp_path / "ablated")
    assert run.record["status"] == "complete" and run.record["data"]["rows"]["source"] == "memory"
    np.testing.assert_array_equal(run.scores["ablation_skip"].values, found.scores["ablation_skip"].values)
    assert run.scores["ablation_skip"].deletions.values.shape == (8, 7)
    assert list(run.figures) == ["ablation_skip.png"] and "ablation_skip" in run.tables["."]
    assert "deletions.npz" in run.arrays and run.layers is None
    tuned = jc.finetune(model, rows(), [2, 4], out=tmp_path / "tuned", steps=2, batch_size=8)
    opened = jc.open_run(tmp_path / "tuned")
    assert opened.layers.layers == (2, 4) and opened.model().model_hash == tuned.model_hash
    with pytest.raises(jc.UserError, match="no such file"):
        jc.open_run(tmp_path / "absent")


@pytest.mark.parametrize(
    ("array", "axes", "message"),
    [
        (np.zeros((3, 5, 2)) + np.arange(5)[:, None], "lnn", r"axes='lnn': expected l \(layers\), n \(samples\)"),
        (np.ones((3, 5)), "lnd", "three dimensions, layers, samples and width; got shape"),
        (np.random.default_rng(0).standard_normal((3, 1, 2)), "lnd", "at least 4 samples, got 1"),
        (np.ones((3, 5, 2)), "lnd", "layer 0: all 5 samples are the same"),
        (np.full((3, 5, 2), np.nan), "lnd", "layer 0: NaN or infinite values"),
        (np.ones((3, 5, 2), int), "lnd", "array of floats, got int64"),
    ],
)
def test_states_that_are_none(array, axes, message):
    with pytest.raises(jc.UserError, match=message):
        jc.states(array, axes=axes)


def test_axes_are_taken_at_their_word():
    array = np.random.default_rng(0).standard_normal((20, 6, 8))
    turned = jc.states(array, axes="nld")
    straight = jc.states(array.transpose(1, 0, 2), axes="lnd")
    np.testing.assert_array_equal(turned.hidden, straight.hidden)
    for key, one in jc.score(turned).items():
        np.testing.assert_array_equal(one.values, jc.score(straight)[key].values)
    np.testing.assert_allclose(jc.cka(turned), jc.cka(straight.hidden, bias="debiased"))


def test_states_score_as_the_command_does(checkpoint, tmp_path):
    from jaxcrit.core.groups import AnalyzeOptions
    from jaxcrit.studies.analysis import run_analysis

    model = jc.load(checkpoint)
    asked = AnalyzeOptions(model=str(checkpoint), out=str(tmp_path / "run"))
    analysis = run_analysis(asked, rows=rows())
    scores = jc.score(jc.capture(model, rows()))
    for key, one in scores.items():
        np.testing.assert_allclose(one.values, analysis.scores[key].values, atol=1e-6)
        np.testing.assert_allclose(one.stderr, analysis.scores[key].stderr, atol=1e-6)
    assert jc.select(scores, "critical:2").layers == tuple(sorted(analysis.scores["delta_debiased"].ranking()[:2]))


def test_mistakes_name_arguments(checkpoint):
    model = jc.load(checkpoint)
    for call, message in (
        (
            lambda: jc.finetune(model, rows(), "critcal:2"),
            r"^layers=critcal:2: expected all, .*did you mean 'critical'",
        ),
        (lambda: jc.finetune(model, rows(), [1], stepps=3), "unknown option 'stepps'.*did you mean 'steps'"),
        (lambda: jc.finetune(model, rows(), [1], steps="3"), "^steps='3': expected a whole number, got str"),
        (lambda: jc.capture(model, ["one"] * 5), "the same row as"),
        (lambda: jc.capture(model, {"a": ["one", "two"], "b": ["three"]}), "rows of one dataset, got 2"),
        (lambda: jc.capture(model, [3.5]), "row 1: expected a dict such as"),
        (lambda: jc.capture(model, []), "expected rows, prompts or token ids, got none"),
        (lambda: jc.capture(model, [[1, 10**9]]), "they do not belong together"),
        (lambda: jc.generate(model, ["one"], temperature="hot"), "^temperature='hot': expected a number"),
        (lambda: jc.select(jc.score(jc.capture(model, rows())), "critical", criterion="dleta"), "did you mean 'delta'"),
        (lambda: jc.correlate(3, 4), "expected scores of the layers, got int"),
    ):
        with pytest.raises(jc.UserError, match=message) as raised:
            call()
        assert "--" not in str(raised.value) and "\n" not in str(raised.value)


def test_token_ids_are_prompts_as_they_stand(checkpoint):
    model = jc.load(checkpoint)
    prompts = [row["prompt"] for row in rows()]
    ids = [model.tokenizer(text)["input_ids"] for text in prompts]
    plain = jc.capture(model, prompts, template="none").hidden
    np.testing.assert_allclose(jc.capture(model, ids).hidden, plain, atol=1e-6)
