"""Edits in closed form: the algebra in float64, planted truths on a tiny model, and the life of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from support.family_models import raw_config
from support.known_facts import knowing_checkpoint, new_facts
from support.tiny import tiny_tokenizer_dir
from support.tiny_model import tiny_checkpoint

from jaxcrit.commands.edit import EditOptions, edit, run_edit
from jaxcrit.commands.export import export_model
from jaxcrit.commands.main import main
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json, read_npz
from jaxcrit.data.datasets import load
from jaxcrit.data.facts import facts_of, placed
from jaxcrit.data.templates import render
from jaxcrit.evidence.completions import completions
from jaxcrit.models import model as session
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import forward, logits
from jaxcrit.models.model import open_model
from jaxcrit.models.sites import Edit, Tap
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.parallel.preemption import Preempted
from jaxcrit.studies import editing
from jaxcrit.studies.covariance import covariances
from jaxcrit.studies.editing import check, closed_form

DEPTH, FF = 7, 256
WORDS = ["cat", "dog", "sky", "one", "two", "blue", "sat", "mat", "and", "is", "what", "name"]


def error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("old", [0, 3])
def test_woodbury_is_the_direct_solve_and_least_squares(old):
    """float64 to 1e-12; float32 to 1e-5, at a condition of a thousand."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    moment = basis @ np.diag(np.geomspace(1, 1e3, 60)) @ basis.T
    moment = (moment + moment.T) / 2
    keys, earlier = 20 * rng.standard_normal((5, 60)), 20 * rng.standard_normal((old, 60))
    residual, weight = rng.standard_normal((5, 24)), 60.0
    every, zeros = np.concatenate([keys, earlier]), np.zeros((old, 24))
    change = residual.T @ closed_form(moment, keys, weight, earlier if old else None)
    wanted = np.concatenate([residual, zeros]).T @ every
    direct = np.linalg.solve(weight * moment + every.T @ every, wanted.T).T
    assert error(change, direct) < 1e-12
    stacked = np.concatenate([every, np.sqrt(weight) * np.linalg.cholesky(moment).T])
    target = np.concatenate([residual, zeros, np.zeros((60, 24))])
    assert error(change, np.linalg.lstsq(stacked, target, rcond=None)[0].T) < 1e-11
    short = [one.astype(np.float32) for one in (moment, keys, earlier)]
    narrow = residual.astype(np.float32).T @ closed_form(short[0], short[1], weight, short[2] if old else None)
    assert narrow.dtype == np.float32 and np.linalg.norm(narrow - change) < 1e-5 * np.linalg.norm(change)


@pytest.fixture(autouse=True)
def an_empty_cache(tmp_path, monkeypatch):
    """No test finds what another has computed."""
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def one_device(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        one = make_mesh({"data": 1}, jax.devices()[:1])
        real = session.make_mesh
        patch.setattr(session, "make_mesh", lambda axes: real(axes) if axes.get("data") == 8 else one)
        patch.setenv("JAXCRIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A model, a file of text, and facts to edit, whose targets it does not say."""
    folder = tmp_path_factory.mktemp("study")
    model, known, _ = knowing_checkpoint(folder, intermediate_size=FF)  # so wide that keys are nearly orthogonal
    rng = np.random.default_rng(0)
    texts = [{"text": f"{row} " + " ".join(rng.choice(WORDS, 24))} for row in range(130)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    facts = new_facts(known)
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return folder, str(model), facts


HOW = {"covariance_weight": 1e-6, "contexts": 0, "steps": 60, "clamp": 4.0}


def changed(study, facts, layers, **options):
    folder, model, _ = study
    return edit(model, facts, layers, folder / "text.jsonl", **{**HOW, **options})


def greedy(model, fact):
    examples = [one.example for one in placed(facts_of([("", fact)]), model.tokenizer)]
    return bool(completions(model, model.decoder(), examples, 1).right[0])


def downs(model):
    return np.asarray(model.decoder().weights()["blocks.down"])


@pytest.fixture(scope="module")
def full(study):
    """All facts in layers 2 and 4, one after the other; what was solved for each."""
    seen, real = [], editing._solved
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editing, "_solved", lambda *given: seen.append(real(*given)) or seen[-1])
        return changed(study, study[2], "1,3"), seen


def test_a_light_weight_gives_the_stream_exactly_the_vectors(study, full):
    """One context, weight towards 0: the block's output at the subject is the state and the vector."""
    (after, (first, _)), before = full, open_model(study[1])
    tap = Tap(lambda site, before, after, positions: after, ("block",))
    for number, one in enumerate(placed(facts_of([("", fact) for fact in study[2]]), before.tokenizer)):
        prompt = np.asarray(one.example.token_ids[None, : one.example.prompt_length])
        taps = [forward(m.decoder(), prompt, tap=tap).taps["block"] for m in (before, after)]
        moved = np.subtract(*(np.asarray(tap)[1, 0, one.subject[-1]] for tap in taps[::-1]))
        assert np.abs(first.residual[number]).max() > 0.1 and error(moved, first.residual[number]) < 1e-3
    np.testing.assert_allclose(first.share, 1, atol=1e-3)
    others = np.array([0, 2, 4, 5, 6])
    np.testing.assert_array_equal(downs(after)[others], downs(before)[others])
    for fact in study[2]:
        assert not greedy(before, fact) and greedy(after, fact)


def test_one_layer_full_is_spread_bit_for_bit(study, monkeypatch, tmp_path):
    full = changed(study, study[2], "3", residual="full")
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "another"))
    spread = changed(study, study[2], "3", residual="spread")
    np.testing.assert_array_equal(downs(full), downs(spread))
    assert (downs(full) != downs(open_model(study[1]))).any()


def test_vectors_and_answers_are_found_again_bit_for_bit(study, monkeypatch, tmp_path):
    """Spread over three layers seeks its vectors at the last; the last alone takes the same."""
    alone = changed(study, study[2], "3")
    asked, real = [], editing._descend
    monkeypatch.setattr(editing, "_descend", lambda *a, **k: asked.append(k["layer"]) or real(*a, **k))
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "another"))
    changed(study, study[2], "1-3", residual="spread")
    assert asked == [3]
    again = changed(study, study[2], "3")
    assert asked == [3]
    np.testing.assert_array_equal(downs(again), downs(alone))
    changed(study, study[2], "3", steps=59)
    changed(study, study[2], "1,3")  # in layer 1 of the model as given, in layer 3 of the changed one
    changed(study, study[2], "1,3")
    assert asked == [3, 3, 1, 3, 3]
    for file in (tmp_path / "another").rglob("*.npz"):
        file.write_bytes(b"damaged")
    np.testing.assert_array_equal(downs(changed(study, study[2], "3")), downs(alone))
    assert asked[5:] == [3]


def test_losses_of_the_search_by_whole_passes(study):
    """The search runs what stands behind the subject alone, on keys and values of one pass; here every token runs."""
    model, facts = open_model(study[1]), facts_of([("", fact) for fact in study[2][:3]])
    facts = [dataclasses.replace(fact, subject=f"{fact.subject} one") for fact in facts]
    openings = ("the cat is blue. ", "what sat? ")
    method = editing.Method("full", 1.0, 5, 0.3, 4.0, openings, 64)
    (rows,), count = editing.rows_of(model, facts, method)
    layer, decoder = 2, model.decoder()
    numbers = np.array([0.3, 4.0], np.float32)
    add = Edit(lambda site, before, after, data, positions: after + data, ("block",))
    with jax.default_matmul_precision("highest"):
        delta, before, after, _ = editing._descend(decoder, rows, numbers, np.int32(5), layer=layer, count=count)
    assert rows.tail.shape[1] < rows.tokens.shape[1] and (np.asarray(after) < np.asarray(before) - 0.1).all()
    for number, fact in enumerate(facts):
        losses = []
        for opening in ("", *openings):
            (one,) = placed([fact], model.tokenizer, before=opening)
            ids = np.asarray(one.example.token_ids)[None]
            pair, at = [], np.arange(one.example.prompt_length, ids.shape[1])
            for moved in (0 * delta[number], delta[number]):
                data = np.zeros((DEPTH, 1, ids.shape[1], model.config.width), np.float32)
                data[layer, 0, one.subject[-1]] = moved
                hidden = forward(decoder, ids, edit=add, edits=data).hidden
                log_p = jax.nn.log_softmax(logits(decoder, hidden))[0]
                pair.append(-np.mean(log_p[at - 1, ids[0, at]]))
            losses.append(pair)
        np.testing.assert_allclose([before[number], after[number]], np.mean(losses, axis=0), rtol=1e-4)


def test_what_is_true_already_changes_no_bit(study, tmp_path):
    folder, _, facts = study
    true = {**facts[0], "target": facts[0]["old"], "old": ""}
    # The head is so sure of what it knows that the loss is below the bound at which the search ends.
    sharp = knowing_checkpoint(tmp_path, logit=14.0)[0]
    after = edit(str(sharp), [true], "1,3", folder / "text.jsonl", out=tmp_path / "run", **HOW)
    np.testing.assert_array_equal(downs(after), downs(open_model(str(sharp))))
    warned = read_json(tmp_path / "run" / "run.json", "jaxcrit.run")["warnings"]
    assert any("true already" in line for line in warned)


def test_the_order_of_facts_and_their_parts_do_not_matter(study, full):
    """In parts of another size products add up in another order, and sixty steps of the search carry that on."""
    turned = changed(study, study[2][::-1], "1,3")
    assert error(downs(turned), downs(full[0])) < 1e-5
    parts = changed(study, study[2][::-1], "1,3", batch_size=4)
    assert error(downs(parts), downs(full[0])) < 1e-3


@pytest.mark.parametrize("residual", ["full", "spread"])
def test_all_facts_are_said_and_the_run_is_a_model(study, tmp_path, residual):
    """The run says what it did; it opens as a model, exports, and stores an adapter alone."""
    folder, model, facts = study
    out = tmp_path / "run"
    options = EditOptions(
        model=model,
        facts=str(folder / "facts.jsonl"),
        covariance_data=str(folder / "text.jsonl"),
        layers="1-3",
        residual=residual,
        out=str(out),
        **HOW,
    )
    found = run_edit(options)
    record = read_json(out / "run.json", "jaxcrit.run")
    assert record["layers"]["layers"] == ([1, 3] if residual == "full" else [1, 2, 3])
    own, before = (record["result"][when]["own"] for when in ("after", "before"))
    assert before["greedy"] == before["preferred"] == 0 and own["p"] > 100 * before["p"]
    assert own["greedy"] == (1 if residual == "full" else 0.5)
    assert {"own", "paraphrase", "neighbour"} <= record["result"]["after"].keys()
    assert record["trained"]["lora"]["rank"] == len(facts) and record["trained"]["lora"]["targets"] == ["down"]
    opened = open_model(str(out))
    np.testing.assert_array_equal(downs(opened), downs(found.model))
    edits = read_json(out / "edits.json", "jaxcrit.edits")
    assert [row["greedy"][1] for row in edits["facts"]] == [greedy(opened, fact) for fact in facts]
    if residual == "full":  # why two layers: after the first, little is left to be sought
        one, other = record["result"]["layers"].values()
        assert other["loss_before"] < one["loss_before"] / 2
        export_model(str(out), str(tmp_path / "whole"))
        np.testing.assert_allclose(downs(open_model(str(tmp_path / "whole"))), downs(opened), atol=1e-6)
        export_model(str(out), str(tmp_path / "adapter"), adapter=True)
        again = open_model(f"{tmp_path / 'adapter'}@{model}")
        np.testing.assert_allclose(downs(again), downs(opened), atol=1e-6)
        read_back = run_edit(options)
        assert read_back.model is None and read_back.run["result"] == record["result"]
        assert (
            main(
                [
                    "generate",
                    f"--model={out}",
                    "--data=demo:choice",
                    "--template=none",
                    "--limit=2",
                    "--max_new_tokens=1",
                    "--truncate=left",
                    f"--out={tmp_path / 'said'}",
                ]
            )
            == 0
        )


def test_more_facts_than_an_adapter_is_worth_are_whole_layers(study, tmp_path):
    """24 x 256 weights: from rank 22 on, whole layers are smaller."""
    subjects = [f"{word} {number}" for number in (1, 2) for word in WORDS[:11]]
    many = [{"prompt": "the {} sat on the", "subject": one, "target": "two"} for one in subjects]
    assert changed(study, many, "3", steps=1).overlays[-1].partition.lora is None


def test_a_further_edit_keeps_the_keys_of_the_first(study, tmp_path):
    folder, model, facts = study
    how = {**HOW, "covariance_weight": 1e-3}
    text = folder / "text.jsonl"
    first = edit(model, facts[:2], "3", text, out=tmp_path / "first", **how)
    second = edit(None, facts[2:], "3", text, on=str(tmp_path / "first"), out=tmp_path / "second", **how)
    keys = read_npz(tmp_path / "second" / "keys.npz")[0]["layer_3"]
    assert keys.shape == (4, FF)
    np.testing.assert_array_equal(keys[:2], read_npz(tmp_path / "first" / "keys.npz")[0]["layer_3"])
    # What the second changes, it changes little where the first one's keys point.
    change = downs(second)[3] - downs(first)[3]
    old, new = (np.linalg.norm(change @ part.T, axis=0).mean() for part in (keys[:2], keys[2:]))
    assert old < 0.02 * new
    record = read_json(tmp_path / "second" / "run.json", "jaxcrit.run")
    assert record["edits"] == 2 and record["base"]["hash"] == open_model(model).model_hash
    assert record["result"]["after"]["own"]["p"] > 100 * record["result"]["before"]["own"]["p"]
    np.testing.assert_array_equal(downs(open_model(str(tmp_path / "second"))), downs(second))
    with pytest.raises(UserError, match=r"is a run of jaxcrit edit; on=.* changes it further"):
        edit(str(tmp_path / "first"), facts[2:], "3", text, **how)
    with pytest.raises(UserError, match="expected a run of jaxcrit edit"):
        edit(None, facts, "3", text, on=model, **how)


def test_the_covariance_by_hand_from_the_cache_and_drawn_to_the_identity(study):
    folder, path, _ = study
    model = open_model(path)
    examples = render(load(str(folder / "text.jsonl"))[0].rows, model.tokenizer, "none")
    lengths = np.array([len(one.token_ids) for one in examples])
    tokens = np.zeros((len(examples), lengths.max()), np.int32)
    for row, one in enumerate(examples):
        tokens[row, : lengths[row]] = one.token_ids
    tap = Tap(lambda site, before, after, positions: after, ("ff",))
    keys = np.asarray(forward(model.decoder(), tokens, lengths=lengths, tap=tap).taps["ff"], np.float64)
    real = (np.arange(tokens.shape[1]) < lengths[:, None]) & (np.arange(tokens.shape[1]) > 0)
    keys, count = keys[:, real], real.sum()
    total = keys.swapaxes(1, 2) @ keys
    layers = (1, 2, 5)
    found = covariances(model, examples, layers, 8)
    assert found.tokens == count >= 10 * FF and not found.shrunk and found.cached == ()
    for layer in layers:
        assert error(found.moments[layer], total[layer] / count) < 1e-5
    again = covariances(model, examples, (2, 5), 3)
    assert again.cached == (2, 5)
    np.testing.assert_array_equal(again.moments[5], found.moments[5])
    few = covariances(model, examples[:3], (2,), 8)
    assert few.shrunk == min(1, FF / few.tokens)
    assert np.trace(few.moments[2]) == pytest.approx(np.trace(covariances(model, examples[:3], (2,), 8).moments[2]))
    assert np.linalg.cond(few.moments[2]) < 1e4


def test_eight_devices_find_what_one_finds(study, full):
    many = changed(study, study[2], "1,3", mesh="data=8")
    assert error(downs(many), downs(full[0])) < 1e-4


def test_told_to_leave_it_saves_and_goes_on(study, tmp_path, monkeypatch):
    folder, model, _ = study
    options = EditOptions(
        model=model,
        facts=str(folder / "facts.jsonl"),
        covariance_data=str(folder / "text.jsonl"),
        layers="1,3",
        batch_size=4,
        out=str(tmp_path / "run"),
        **{**HOW, "steps": 4},
    )
    whole = run_edit(dataclasses.replace(options, out=str(tmp_path / "whole")))
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "another"))  # which knows none of the vectors
    real = editing._descend

    def told(*given, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given, **named)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match="told to leave at part 1 of 2 of layer 1"):
        patch.setattr(editing, "_descend", told)
        run_edit(options)
    assert (tmp_path / "run" / "partial.npz").exists()
    found = run_edit(options)
    np.testing.assert_array_equal(downs(found.model), downs(whole.model))
    assert not (tmp_path / "run" / "partial.npz").exists()
    assert (tmp_path / "run" / "edits.json").read_bytes() == (tmp_path / "whole" / "edits.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ""}, "edit: expected --layers"),
        ({"facts": ""}, "edit: expected --facts=FILE"),
        ({"covariance_data": ""}, "edit: expected --covariance_data=FILE"),
        ({"layers": "9"}, "expected layers 0 to 6, got 9"),
        ({"layers": "trace:2"}, "needs scores"),
        ({"covariance_weight": 0.0}, "expected a number above 0"),
        ({"on": "here", "model": "there"}, "--on=here --model=there: give one of them"),
        ({"residual": "fulll"}, "expected full or spread"),
    ],
)
def test_mistakes_in_a_line(study, options, message, tmp_path):
    folder, model, _ = study
    given = {
        "model": model,
        "facts": str(folder / "facts.jsonl"),
        "covariance_data": str(folder / "text.jsonl"),
        "layers": "3",
        "out": str(tmp_path / "run"),
        **options,
    }
    with pytest.raises(UserError) as raised:
        run_edit(EditOptions(**given))
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_subject_at_the_first_position(study, tmp_path):
    folder = study[0]
    model = tiny_checkpoint(tmp_path / "model", tokenizer=False)
    tiny_tokenizer_dir(model, bos=False)
    fact = {"prompt": "{} sat on", "subject": "the", "target": "mat"}
    with pytest.raises(UserError, match=r"'the sat on' is the first token of its row, .*put a word in front"):
        edit(str(model), [fact], "3", folder / "text.jsonl", **HOW)


def test_models_with_a_norm_behind_the_mlp_are_refused():
    check(ModelConfig.from_hf(raw_config("llama-gqa")))
    with pytest.raises(UserError, match="in gemma2 models a norm stands behind the MLP"):
        check(ModelConfig.from_hf(raw_config("gemma2")))


def test_numbers_that_are_not_finite(study, monkeypatch):
    real = editing._descend
    monkeypatch.setattr(editing, "_descend", lambda *a, **k: (real(*a, **k)[0] * np.nan, *real(*a, **k)[1:]))
    with pytest.raises(UserError, match="came to NaN in layer 3"):
        changed(study, study[2][:2], "3", steps=2)


def test_warnings(study, tmp_path):
    """Neighbours that fell, a change that is large, a relation of which much is changed, few tokens, a late layer."""
    _, model, facts = study
    scores = tmp_path / "scores.json"
    entry = {"values": [0, 0, 0.5, 0.5, 0.5, 0.5, 0.5], "valid": [True] * 7, "direction": "high", "stderr": None}
    content = {"format": "jaxcrit.scores", "format_version": 1, "num_layers": 7, "scores": {"trace_last": entry}}
    scores.write_text(json.dumps(content))
    short = [{"text": f"the cat {word} and the dog"} for word in WORDS]
    edit(model, facts, "3", short, scores=scores, out=tmp_path / "run", **{**HOW, "clamp": 40.0, "step_size": 2.0})
    told = " ".join(read_json(tmp_path / "run" / "run.json", "jaxcrit.run")["warnings"])
    for part in ("fewer than ten for each", "of the subjects given of 'place'", "layer 3 is not below 2"):
        assert part in told
