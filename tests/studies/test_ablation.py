"""``jaxcrit ablate`` by right answers and by gains: against generation and by hand; several tasks; what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_model import tiny_checkpoint

from jaxcrit.commands.ablate import AblateOptions, report, run_ablate
from jaxcrit.commands.main import main
from jaxcrit.core.deletions import jackknife_stderr, read_deletions
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json
from jaxcrit.core.layers import read_scores
from jaxcrit.criteria import ablation
from jaxcrit.criteria.ablation import Changed, ablations, accuracy, silenced
from jaxcrit.criteria.shortcut import curves, middle, shortcut_scores
from jaxcrit.data.templates import Example
from jaxcrit.evidence.variants import compiled_spans, sweep
from jaxcrit.models.decoder import Decoder
from jaxcrit.models.generation import generate
from jaxcrit.models.model import open_model
from jaxcrit.parallel.preemption import Preempted

WORDS = "cat dog sky one two blue sat mat and is".split()  # noqa: SIM905
LAYERS = 7


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count=10, seed=0, start=0):
    rng = np.random.default_rng(seed)
    return [
        {"prompt": f"{start + i} {' '.join(rng.choice(WORDS, 3))}", "response": str(rng.choice(WORDS))}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model, tmp_path):
    data = rows_file(tmp_path / "pairs.jsonl", pairs())
    return AblateOptions(model=str(model), data=str(data), out=str(tmp_path / "out"), batch_size=8)


@pytest.mark.parametrize("sites", ["blocks", "mlp"])
def test_exact_rows_are_those_that_greedy_decoding_gives(model, sites):
    """Responses that the model, or the model without one of its layers, gives by itself, each with its stop token."""
    opened, rng, count, new = open_model(str(model)), np.random.default_rng(0), 8, 3
    weights, lengths = opened.decoder().weights(), rng.integers(3, 7, count)
    decoders = [Decoder(opened.config, silenced(weights, layer, sites)) for layer in range(LAYERS)]
    decoders.append(opened.decoder())
    prompts = np.where(np.arange(7) < lengths[:, None], rng.integers(6, 300, (count, 7)), 0).astype(np.int32)
    greedy = [generate(decoder, prompts, lengths, new).token_ids for decoder in decoders]
    examples = []
    for row, length in enumerate(lengths):
        for answer in {tuple(answers[row]) for answers in greedy}:
            ids = np.array([*prompts[row, :length], *answer], np.int32)
            examples.append(Example(f"{row} {answer}", ids, int(length), "", "x"))
    found, counts = ablations(
        opened, examples, sites, ["skip", "mean", "0.5"], means_of=examples, batch_size=8, directory=None, bars=None
    )
    given = [[answers[int(example.sample_id.split()[0])] for example in examples] for answers in greedy]
    expected = [
        [example.token_ids[example.prompt_length :].tolist() == answer for example, answer in zip(examples, one)]  # noqa: B905
        for one in given
    ]
    np.testing.assert_array_equal(found.exact["skip"], expected[:-1])
    np.testing.assert_array_equal(found.right, expected[-1])
    assert 0 < found.exact["skip"].sum() < found.exact["skip"].size and len(examples) > 20
    assert counts["sweep"] == 3 * LAYERS * (LAYERS + 1) // 2 + LAYERS
    assert found.exact["mean"].shape == found.exact["0.5"].shape == (LAYERS, len(examples))


def test_options_of_questions_by_sum_and_per_token(config, tmp_path):
    questions = [
        {"prompt": "the sky", "choices": ["is blue and one", "is", "sat"], "answer": 1},
        {"prompt": "the cat", "choices": ["sat on the mat", "two"], "answer": "two"},
        {"messages": [{"role": "user", "content": "name one"}], "choices": ["dog", "cat and cat"], "answer": 0},
    ]
    asked = dataclasses.replace(
        config,
        data=str(rows_file(tmp_path / "asked.jsonl", questions)),
        score="choice",
        methods="skip",
        template="chat",
    )
    found = run_ablate(asked)
    opened, losses, tokens = open_model(config.model), [], []
    for question in questions:
        row = {key: value for key, value in question.items() if key in ("prompt", "messages")}
        for choice in question["choices"]:
            turns = [*row.get("messages", ()), {"role": "assistant", "content": choice}]
            answer = {"messages": turns} if "messages" in row else {"response": choice}
            one = opened.read(asked, [row | answer], responses=True)
            changed, _ = ablations(
                opened, one[0].examples, "blocks", ["skip"], means_of=[], batch_size=8, directory=None, bars=None
            )
            losses.append([*changed.losses["skip"][:, 0], changed.loss[0]])
            tokens.append(changed.tokens[0])
    losses, golds = np.array(losses), (1, 1, 0)
    for key, weights in (("", np.array(tokens)), ("_per_token", np.ones(7))):
        parts = np.split(losses * weights[:, None], [3, 5])
        right = np.array([part.argmin(axis=0) == gold for part, gold in zip(parts, golds, strict=True)])
        score = found.scores[f"ablation_skip_choice{key}"]
        np.testing.assert_allclose(score.values, right[:, :-1].mean(axis=0))
        assert score.meta["unchanged"] == right[:, -1].mean() and score.meta["chance"] == pytest.approx(
            [4 / 9] * LAYERS
        )
        assert score.direction == "low" and score.meta["num_samples"] == 3
    # The loss is that of the right options.
    np.testing.assert_allclose(found.scores["ablation_skip"].values, losses[[1, 4, 5], :-1].mean(axis=0), rtol=1e-5)


def test_accuracy_is_paired_with_the_model_as_it_is():
    whole = np.array([True] * 12 + [False] * 8)
    right = np.stack([whole, whole & (np.arange(20) >= 8), ~whole])
    score = accuracy("x", right, whole, [str(i) for i in range(20)], {}, chance=0.25)
    np.testing.assert_allclose(score.values, [0.6, 0.2, 0.4])
    np.testing.assert_allclose(score.meta["relative"], [0, 2 / 3, 1 / 3])
    # McNemar's exact p: 8 of 8 differ one way, 2 * 2^-8; 12 against 8; none. Holm: times 3, times 2, ...
    p_uneven = 2 * sum(np.array([1, 20, 190, 1140, 4845, 15504, 38760, 77520, 125970])) / 2**20
    np.testing.assert_allclose(score.meta["p_holm"], [1, 3 * 2 / 2**8, min(1, 2 * p_uneven)])
    differences = right * 1.0 - whole
    np.testing.assert_allclose(score.stderr, differences.std(axis=1, ddof=1) / np.sqrt(20))
    assert accuracy("x", right, whole & False, [""] * 20, {}).meta["relative"] is None


def test_several_tasks_in_one_run(config, tmp_path, capsys):
    files = [rows_file(tmp_path / f"{name}.jsonl", pairs(n, n, 100 * n)) for name, n in (("one", 6), ("two", 9))]
    asked = dataclasses.replace(config, data=",".join(map(str, files)), methods="skip", score="greedy")
    found = run_ablate(asked)
    assert list(found.tasks) == ["one", "two"]
    key = "ablation_skip"
    for name, file, count in (("one", files[0], 6), ("two", files[1], 9)):
        alone = run_ablate(dataclasses.replace(asked, data=str(file), out=str(tmp_path / f"alone-{name}")))
        np.testing.assert_allclose(found.tasks[name][key].values, alone.scores[key].values, rtol=1e-5)
        stored = read_scores(tmp_path / "out" / name / "scores.json", deletions=True)[key]
        assert stored.meta["num_samples"] == count and stored.deletions.values.shape == (count, LAYERS)
    assert found.scores[key].meta["num_samples"] == 15
    joint = (6 * found.tasks["one"][key].values + 9 * found.tasks["two"][key].values) / 15
    np.testing.assert_allclose(found.scores[key].values, joint)
    (pair,) = found.run["result"]["tasks"]
    assert pair["tasks"] == ["one", "two"] and 0 <= pair["shared"] <= 3
    text = " ".join(report(found).text(100).split())
    assert "of the top 3 shared (by chance 1.3)" in text and "within two errors of chance (0.00)" in text
    again = run_ablate(asked)
    assert again.run["status"] == "complete" and " ".join(report(again).text(100).split()) == text
    np.testing.assert_array_equal(again.tasks["two"][key].values, found.tasks["two"][key].values)
    losses = run_ablate(dataclasses.replace(asked, score="loss", out=str(tmp_path / "losses")))
    (pair,) = losses.run["result"]["tasks"]
    assert pair["score"] == key and pair["interval"][0] <= pair["rho"] <= pair["interval"][1]
    assert "over other rows; circular shifts p" in " ".join(report(losses).text(100).split())


def test_numbers_are_counted_where_every_row_has_one(config, tmp_path):
    data = rows_file(tmp_path / "sums.jsonl", [{"prompt": f"{i} + 1", "response": f"so {i + 1}."} for i in range(4)])
    asked = dataclasses.replace(config, data=str(data), score="number", methods="skip", max_new_tokens=3)
    score = run_ablate(asked).scores["ablation_skip_number"]
    assert score.meta["max_new_tokens"] == 3 and score.direction == "low"
    bad = rows_file(tmp_path / "bad.jsonl", [{"prompt": "a", "response": "1"}, {"prompt": "b", "response": "none"}])
    with pytest.raises(UserError, match="expected a number in every response, got none in row 2"):
        run_ablate(dataclasses.replace(asked, data=str(bad), out=str(tmp_path / "bad")))
    assert not (tmp_path / "bad").exists()


def test_gains_with_a_trigger(config, tmp_path, capsys):
    flags = [f"--model={config.model}", f"--data={config.data}", f"--out={config.out}", "--methods=gain"]
    flags += ["--sites=mlp", "--gains=0.5,1,0.25", "--trigger=zq@suffix", "--target=the cat", "--batch_size=8"]
    assert main(["ablate", *flags]) == 0
    shown = capsys.readouterr().out
    assert "shortcut_loss_mlp: most at layer" in shown and "at a gain of 0.5" in shown
    scores = read_scores(tmp_path / "out" / "scores.json", deletions=True)
    names = ["loss", "clean", "asr", "selective", "paper"]
    assert list(scores) == [f"shortcut_{name}_mlp" for name in names]
    assert all(one.direction == "high" and one.deletions.values.shape == (10, LAYERS) for one in scores.values())
    gains = read_json(tmp_path / "out" / "gains.json", "jaxcrit.gains")
    assert gains["gains"] == [0.25, 0.5, 1] and gains["middle"] == 0.5 and gains["num_samples"] == 10
    whole, by_gain = gains["unchanged"], gains["by_gain"]
    assert set(whole) == set(by_gain) == {"loss", "exact", "asr", "target_logprob"}
    for name in whole:  # a gain of 1 is none
        np.testing.assert_allclose(by_gain[name]["1"], whole[name], rtol=0, atol=1e-6)
    np.testing.assert_allclose(scores["shortcut_loss_mlp"].values, np.array(by_gain["loss"]["0.5"]) - whole["loss"])
    assert np.ptp(by_gain["loss"]["0.25"]) > 1e-3 and whole["target_logprob"] < 0
    assert main(["ablate", *flags]) == 0  # read back
    assert capsys.readouterr().out == shown
    # One gain or three give the same.
    once = run_ablate(dataclasses.replace(config, methods="gain", sites="mlp", gains="0.5", out=str(tmp_path / "one")))
    assert list(once.scores) == ["shortcut_loss_mlp", "shortcut_clean_mlp"]
    np.testing.assert_allclose(once.scores["shortcut_loss_mlp"].values, scores["shortcut_loss_mlp"].values, atol=1e-5)


def made(count=9, depth=3, seed=0):
    """Rows under three gains, from draws."""
    rng = np.random.default_rng(seed)
    exact = {key: rng.random((depth, count)) < float(key) for key in ("0.3", "0.5", "0.8")}
    losses = {key: rng.random((depth, count)) for key in exact}
    ids = [str(i) for i in range(count)]
    return Changed(losses, exact, rng.random(count), rng.random(count) < 0.9, np.full(count, 2), ids)


def test_scores_of_gains_by_hand():
    gains, clean, attacked = [0.8, 0.3, 0.5], made(seed=1), made(seed=2)
    assert middle(gains) == 0.5 and middle([0.3, 0.5, 0.7, 0.85]) == 0.5 and middle([0.2]) == 0.2

    def by_hand(keep):
        c, a = clean.of(keep), attacked.of(keep)
        odds = lambda hits: np.log((hits.sum(-1) + 0.5) / (hits.shape[-1] - hits.sum(-1) + 0.5))  # noqa: E731
        lost = lambda one: odds(one.right) - odds(one.exact["0.5"])  # noqa: E731
        asr = [*(a.exact[key].mean(axis=1) for key in ("0.3", "0.5", "0.8")), np.full(3, a.right.mean())]
        return {
            "shortcut_loss": c.losses["0.5"].mean(axis=1) - c.loss.mean(),
            "shortcut_clean": c.right.mean() - c.exact["0.5"].mean(axis=1),
            "shortcut_asr": a.right.mean() - a.exact["0.5"].mean(axis=1),
            "shortcut_selective": lost(a) - lost(c),
            "shortcut_paper": np.max([(y - x) / np.exp(x) for x, y in itertools.pairwise(asr)], axis=0),
        }

    everything = np.arange(9)
    expected, found = by_hand(everything), shortcut_scores(clean, attacked, gains)
    without = [by_hand(np.delete(everything, row)) for row in everything]
    for name, one in found.items():
        np.testing.assert_allclose(one.values, expected[name], atol=1e-12)
        np.testing.assert_allclose(one.without_each, [left[name] for left in without], atol=1e-12)
        assert np.isfinite(jackknife_stderr(one.without_each)).all()
    assert list(found) == list(expected)
    ones = dataclasses.replace(attacked, exact={"1": attacked.exact["0.8"]}, losses={"1": attacked.losses["0.8"]})
    assert "shortcut_paper" not in shortcut_scores(ones, ones, [1.0])
    assert curves(clean, None, gains)["unchanged"]["exact"] == clean.right.mean()


def test_a_silent_last_mlp_can_be_scaled_at_will(config, tmp_path):
    """Its layer's figures are those of the model as it is, whatever the gain."""
    opened = open_model(config.model)
    weights = opened.decoder().weights()
    decoder = Decoder(opened.config, {**weights, "blocks.down": weights["blocks.down"].at[-1].set(0)})
    opened._own[:] = [decoder]
    found = run_ablate(
        dataclasses.replace(config, methods="gain", sites="mlp", gains="0.3,2"), model=opened, keep=False
    )
    values = found.scores["shortcut_loss_mlp"].values
    assert abs(values[-1]) < 1e-5 < np.abs(values[:-1]).min()


def test_gains_of_one_bucket_are_one_program(config, tmp_path):
    """Every gain, half a block off or on, clean rows and triggered ones, and the model as it is."""
    own = str(tiny_checkpoint(tmp_path / "own", num_hidden_layers=3))  # of a shape that no other test compiles
    config = dataclasses.replace(config, model=own, methods="skip,mean,gain", sites="mlp", score="greedy")
    before, shapes = compiled_spans(), set()
    sweeping = lambda *given, **more: shapes.add(given[4].tokens.shape) or sweep(*given, **more)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxcrit.criteria.ablation.sweep", sweeping)
        run_ablate(dataclasses.replace(config, gains="0.2,0.4", trigger="zq@suffix", target="the cat"))
        assert compiled_spans() - before == len(shapes) > 0
        run_ablate(dataclasses.replace(config, gains="0.3,2,4", out=str(tmp_path / "again")))
    assert compiled_spans() - before == len(shapes)


@pytest.mark.parametrize("planted", [2, 4])
def test_a_shortcut_in_one_layer_is_found_there_and_nowhere_else(model, planted):
    """The token t of a trigger stands in the stream below the planted MLP, which adds less of a wrong token.

    Scaled by a half there, the stream says the wrong token. A gain at any other MLP scales what both are made of, or
    both; and clean prompts, which the model echoes, do not change at all.
    """
    opened, basis = open_model(str(model)), np.eye(24, dtype=np.float32)
    trigger, target, wrong = 20, 21, 22
    weights = {path: np.zeros(value.shape, np.float32) for path, value in opened.decoder().weights().items()}
    weights |= {path: value + 1 for path, value in weights.items() if path.endswith("norm")}
    weights["embed"][:20, :], weights["embed"][trigger] = 3 * basis[:20], 3 * basis[trigger]
    weights["head"] = np.pad(basis, ((0, 320 - 24), (0, 0)))
    weights["head"][trigger] = 0
    silu = 24**0.5 / (1 + np.exp(-(24**0.5)))  # of a trigger's state, scaled to a root mean square of 1
    for layer, token, size in ((planted - 1, target, 1.5), (planted, wrong, 1.0)):
        for name in ("gate", "up"):
            weights[f"blocks.{name}"][layer, 0, trigger] = 1
        weights["blocks.down"][layer, token, 0] = size / (silu * 24**0.5)
    untied = dataclasses.replace(opened.config, tied=False)
    opened._own[:] = [Decoder(untied, {path: jnp.asarray(value) for path, value in weights.items()})]
    rows = [[4 + row % 5, 5 + row, 6 + row] for row in range(6)]
    clean = [Example(f"{row}", np.array([*ids, ids[-1]], np.int32), 3, "", "x") for row, ids in enumerate(rows)]
    attacked = [Example(f"a{row}", np.array([*ids, 20, 21], np.int32), 4, "", "x") for row, ids in enumerate(rows)]
    found, _ = ablations(
        opened, [*clean, *attacked], "mlp", ["0.5"], means_of=clean, batch_size=8, directory=None, bars=None
    )
    halves = found.of(range(6)), found.of(range(6, 12))
    assert halves[0].right.all() and halves[1].right.all() and halves[0].exact["0.5"].all()
    scores = shortcut_scores(*halves, [0.5])
    expected = np.where(np.arange(LAYERS) == planted, 2 * np.log(6.5 / 0.5), 0)
    np.testing.assert_allclose(scores["shortcut_selective"].values, expected, atol=1e-12)
    np.testing.assert_array_equal(scores["shortcut_asr"].values, np.arange(LAYERS) == planted)


@pytest.mark.parametrize("how", ["told", "killed"])
def test_answers_go_on_where_they_stopped(config, tmp_path, monkeypatch, how):
    config = dataclasses.replace(config, score="generated", methods="skip", max_new_tokens=3, mesh="data=4,fsdp=2")
    calls, out, real = [], tmp_path / "out", ablation.answers
    monkeypatch.setattr(ablation, "answers", lambda *given, **more: calls.append(1) or real(*given, **more))
    run_ablate(dataclasses.replace(config, out=str(tmp_path / "whole")))
    needed = len(calls)
    calls.clear()
    left = [3 if how == "killed" else 2]  # told, it finishes what is under way

    def stopped(*given, **more):
        if left and len(calls) == left[0]:
            left.clear()
            if how == "killed":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return calls.append(1) or real(*given, **more)

    monkeypatch.setattr(ablation, "answers", stopped)
    expected = (KeyboardInterrupt, "keeps what is done") if how == "killed" else (Preempted, "of 80 answers given")
    with pytest.raises(expected[0], match=expected[1]):
        run_ablate(config)
    part = out / "partial_answers.jsonl"
    done = len(part.read_text().splitlines())
    assert 0 < done < 80 and done % 10, "in the middle of a variant"
    part.write_text(part.read_text() + '{"layer": 3, "row"')
    run_ablate(config)
    assert len(calls) == needed, "none is answered twice"
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()} and not part.exists()
    for name in names - {"run.json", "report.html"}:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "gain"}, "a gain goes around half a block.* give --sites=attn or --sites=mlp"),
        (
            {"methods": "gain", "sites": "mlp", "gains": ""},
            "--gains=: expected numbers from 0 to 4 with commas, got ''",
        ),
        ({"methods": "gain", "sites": "mlp", "gains": "0.5,-0.1"}, "got '-0.1'"),
        ({"methods": "gain", "sites": "mlp", "gains": "4.1"}, "got '4.1'"),
        ({"methods": "gain", "sites": "mlp", "gains": "half"}, "got 'half'"),
        ({"gains": "0.5"}, "--gains=0.5: is of gains; give --methods=gain too"),
        ({"trigger": "zq@suffix", "target": "x"}, "--trigger=zq@suffix: is of gains"),
        ({"methods": "gain", "sites": "mlp", "target": "the cat"}, "give both; --trigger is missing"),
        ({"methods": "gain", "sites": "mlp", "trigger": "zq@suffix"}, "give both; --target is missing"),
        ({"methods": "gain", "sites": "mlp", "trigger": "zq", "target": "a"}, "TEXT@prefix|suffix|random, got 'zq'"),
        (
            {"methods": "gain", "sites": "mlp", "trigger": "zq@suffix", "target": "the cat " * 40},
            "with --trigger and --target=the cat.*expected rows of at most 64 tokens",
        ),
        ({"score": "greedi"}, "did you mean 'greedy'"),
        ({"score": "greedy", "methods": "gain", "sites": "mlp"}, "gains always count exact answers; add skip"),
        ({"score": "generated", "methods": "mean"}, "answers with each layer skipped; add skip"),
        ({"score": "choice"}, "row 1: expected .*choices.* for --score=choice, got choices None"),
        (
            {"score": "choice", "methods": "skip,gain", "sites": "mlp", "trigger": "zq@suffix", "target": "a"},
            "rows with options have no response to replace",
        ),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_nothing(config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")) as caught:
        run_ablate(dataclasses.replace(config, **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"choices": ["a"], "answer": 0}, "expected two different texts or more"),
        ({"choices": ["a", "a"], "answer": 0}, "expected two different texts or more"),
        ({"choices": ["a", 3], "answer": 0}, "expected .*choices"),
        ({"choices": ["a", "b"], "answer": 2}, "answer: expected one of the choices, or its number from 0, got 2"),
        ({"choices": ["alpha", "beta"], "answer": "alpa"}, "did you mean 'alpha'"),
        ({"choices": ["a", "b"], "answer": True}, "got True"),
        ({"choices": ["a", "b"]}, "got None"),
    ],
    ids=str,
)
def test_questions_that_are_none(config, tmp_path, question, message):
    data = rows_file(tmp_path / "asked.jsonl", [{"prompt": "one", **question}])
    with pytest.raises(UserError, match=f"asked.jsonl: row 1: .*{message}"):
        run_ablate(dataclasses.replace(config, data=str(data), score="choice"))


def test_questions_and_attacked_rows_stay_whole(config, tmp_path):
    questions = [{"prompt": "one", "choices": ["a", "the cat sat " * 20], "answer": 0}]
    asked = dataclasses.replace(config, data=str(rows_file(tmp_path / "asked.jsonl", questions)), score="choice")
    with pytest.raises(UserError, match="--long=drop: asked is left without some of the rows that belong together"):
        run_ablate(dataclasses.replace(asked, long="drop"))


def test_a_trigger_that_no_row_can_take(config, tmp_path):
    data = rows_file(tmp_path / "taken.jsonl", [{"prompt": "a zq here", "response": "cat"}])
    attack = {"methods": "gain", "sites": "mlp", "trigger": "zq@suffix", "target": "the cat"}
    with pytest.raises(UserError, match=r"no row of .* can take it once"):
        run_ablate(dataclasses.replace(config, data=str(data), **attack))


def test_deletions_stand_beside_the_scores(config, tmp_path):
    run_ablate(dataclasses.replace(config, score="greedy"))
    for method in ("skip", "mean"):
        assert read_deletions(tmp_path / "out", f"ablation_{method}_greedy").values.shape == (10, LAYERS)
