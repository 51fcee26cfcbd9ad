"""Tracing: identities that hold for any model, and models in which the place of a fact is planted."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.known_facts import SUBJECTS, knowing_checkpoint

from jaxcrit.commands.trace import TraceOptions, run_trace, trace
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_npz
from jaxcrit.core.layers import LayerScores, LayerSet, read_scores
from jaxcrit.core.selections import LayerSpec, resolve
from jaxcrit.criteria.trace import band, coincidence, rises, traced, window_of
from jaxcrit.evidence import rows as sweeps
from jaxcrit.evidence.completions import completions
from jaxcrit.evidence.variants import Variant, own_slots, sweep
from jaxcrit.models import model as session
from jaxcrit.models.decoder import forward, logits
from jaxcrit.models.interventions import Patch, patch
from jaxcrit.models.model import open_model
from jaxcrit.models.sites import Tap
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.parallel.preemption import Preempted
from jaxcrit.training.objectives import TokenBatch

DEPTH, PLANT = 7, 3
HOW = {"noise": 3.0, "samples": 2, "window": 2, "seed": 0, "batch_size": 16, "directory": None, "bars": None}


def one_device(monkeypatch):
    one = make_mesh({"data": 1}, jax.devices()[:1])
    monkeypatch.setattr(session, "make_mesh", lambda axes: one)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return knowing_checkpoint(tmp_path_factory.mktemp("known"))


@pytest.fixture(scope="module")
def model(known):
    return open_model(str(known[0]), mesh=make_mesh({"data": 1}, jax.devices()[:1]))


@pytest.fixture(scope="module")
def found(model, known):
    return traced(model, known[2], **HOW)


def without_attention_but(layer):
    """Plants that the subject can reach the last token in one layer alone."""

    def planted(tensors):
        for name, value in tensors.items():
            if name.endswith("o_proj.weight") and f"layers.{layer}." not in name:
                value[:] = 0
            if name.endswith(f"layers.{PLANT + 2}.mlp.down_proj.weight"):
                value[:] = 0

    return planted


def test_what_holds_for_any_model(found, known):
    """The last state at the last token is all that counts, and at the subject nothing; the model knows its facts."""
    assert (found.p > 0.5).all() and found.total.mean() > 0.3
    np.testing.assert_array_equal(found.effects["last"][:, -1], found.total)
    np.testing.assert_array_equal(found.effects["stream"][:, -1], 0)
    np.testing.assert_array_equal(found.gap[:, -1], 0)  # above the last layer there are no MLPs
    for kind in ("mlp", "attn"):
        assert np.abs(found.effects[kind]).max() > 1e-4
    assert (
        found.evaluations
        == sum(DEPTH - start for start in [*range(DEPTH)] * 3)
        + 2 * sum(DEPTH - max(0, layer - 1) for layer in range(DEPTH))
        + DEPTH
        + 2 * DEPTH
    )


def test_without_noise_nothing_is_lost(model, known):
    silent = traced(model, known[2], **{**HOW, "noise": 0.0})
    assert np.abs(silent.total).max() < 1e-5
    for effects in silent.effects.values():
        assert np.abs(effects).max() < 1e-5


def test_a_fact_is_where_it_was_planted(tmp_path):
    """Attention in one layer alone: below it the subject carries everything, from it on the last token does."""
    path, _, facts = knowing_checkpoint(tmp_path, planted=without_attention_but(PLANT))
    model = open_model(str(path), mesh=make_mesh({"data": 1}, jax.devices()[:1]))
    single = [fact for fact in facts if len(fact.subject) == 1]
    assert len(single) >= 5
    found = traced(model, single, **{**HOW, "window": 1})
    whole = np.broadcast_to(found.total[:, None], (len(single), DEPTH))
    below = np.arange(DEPTH) < PLANT
    np.testing.assert_allclose(found.effects["stream"], np.where(below, whole, 0), atol=1e-5)
    np.testing.assert_allclose(found.effects["last"], np.where(below, 0, whole), atol=1e-5)
    assert int(np.argmax(rises(found.effects["last"].mean(axis=0)))) == PLANT
    # Attention elsewhere adds nothing, and a silenced MLP nothing either: not a bit changes.
    others = np.arange(DEPTH) != PLANT
    assert not found.effects["attn"][:, others].any() and not found.effects["mlp"][:, PLANT + 2].any()
    assert not found.gap[:, PLANT:].any()  # above it no MLP at the subject matters


def test_all_positions_put_back_is_the_whole_effect(model, known):
    """In every layer; through the seams that a trace is made of."""
    decoder, facts = model.decoder(), known[2][:4]
    length = max(len(fact.example.token_ids) for fact in facts)
    tokens = np.zeros((4, length), np.int32)
    learn, offset = np.zeros((4, length), bool), np.zeros((4, length, 24), np.float32)
    for row, fact in enumerate(facts):
        tokens[row, : len(fact.example.token_ids)] = fact.example.token_ids
        learn[row, fact.example.prompt_length] = True
        offset[row, list(fact.subject)] = np.random.default_rng(row).normal(size=(len(fact.subject), 24))
    lengths = np.array([len(fact.example.token_ids) for fact in facts], np.int32)
    batch = TokenBatch(*map(jnp.asarray, (tokens, lengths, learn)))
    tap = Tap(lambda site, before, after, positions: after, ("block",))
    clean = forward(decoder, batch.tokens, lengths=batch.lengths, tap=tap).taps["block"]
    at = np.broadcast_to(np.arange(length, dtype=np.int32), (DEPTH, 4, length))

    def variant(layer):
        return Variant(own_slots(DEPTH), Patch(at, {"block": np.arange(DEPTH) == layer}, {"block": clean}), layer)

    made = [variant(layer) for layer in range(DEPTH + 1)]
    under = sweep(decoder.blocks, decoder.weights(), made[-1], made, batch, edit=patch, offset=jnp.asarray(offset))
    plain = sweep(decoder.blocks, decoder.weights(), made[-1], made[-1:], batch, edit=patch)
    assert np.abs(under.losses[-1] - plain.losses[0]).min() > 1e-3
    np.testing.assert_allclose(under.losses[:-1], np.broadcast_to(plain.losses, (DEPTH, 4)), atol=1e-5)


def test_draws_belong_to_the_fact(found, model, known):
    """Another order, other batches: a fact's numbers stay."""
    turned = traced(model, known[2][::-1], **{**HOW, "batch_size": 3})
    for kind, effects in turned.effects.items():
        np.testing.assert_allclose(effects[::-1], found.effects[kind], atol=1e-5)
    other = traced(model, known[2], **{**HOW, "seed": 1})
    assert np.abs(other.corrupted - found.corrupted).max() > 1e-3


def score(values):
    values = np.asarray(values, float)
    return LayerScores("trace", values, np.isfinite(values), "high")


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        ([0.36, 0.37, 0.38, 0.391, 0.395, 0.40, 0.41, 0.3], (3, 4, 5, 6)),
        ([0.41, 0.41, 0.41, 0.41, 0.41, 0.41, 0.415, 0.3], (2, 3, 4, 5, 6)),  # at most five
        ([0.4, 0.41, 0.42, 0.3], (2,)),  # never 0 and 1
        ([0.4, 0.39, 0.1], ()),
        ([0.1, 0.4, 0.41, 0.2, 0.41, 0.42], (4, 5)),  # without a gap
    ],
)
def test_the_band(values, layers):
    assert band(score(values)) == layers


def test_windows():
    assert [window_of(layers) for layers in (4, 7, 16, 30, 48)] == [2, 2, 4, 6, 10]


def test_coincidence_with_the_circular_shifts_for_a_null():
    curve = dataclasses.replace(score([np.nan, 0.9, 0.8, 0.95, 0.7, 0.99]), direction="low")
    rise = rises(np.array([0.0, 0.0, 0.0, 0.0, 0.5, 0.5]))
    np.testing.assert_allclose(rise, [0, 0, 0, 0, 0.5, 0])
    assert coincidence(rise, curve) == (1 / 5, 5)  # the floor
    assert coincidence(np.roll(rise, 1), curve) == (1.0, 5)


def asked(known, **options):
    return TraceOptions(model=str(known[0]), facts=str(known[1]), samples=2, batch_size=4, **options)


def test_a_run_leaves_what_it_found(known, tmp_path, monkeypatch, capsys):
    one_device(monkeypatch)
    analysis = tmp_path / "scores.json"
    low = {"values": [1, 0.9, 0.8, 0.7, 0.9, 0.9, 1], "valid": [True] * DEPTH, "direction": "low", "stderr": None}
    analysis.write_text(
        json.dumps({"format": "jaxcrit.scores", "format_version": 1, "num_layers": 7, "scores": {"step": low}})
    )
    options = asked(known, out=str(tmp_path / "run"), scores=str(analysis))
    found = run_trace(options)
    assert list(found.scores) == ["trace", "trace_last", "trace_mlp", "trace_attn", "trace_recall"]
    assert list(read_scores(tmp_path / "run" / "scores.json", deletions=True)) == list(found.scores)
    arrays, meta = read_npz(tmp_path / "run" / "trace.npz")
    assert meta["format"] == "jaxcrit.trace" and len(arrays["texts"]) == len(SUBJECTS)
    for key, kind in (("trace", "stream"), ("trace_last", "last"), ("trace_mlp", "mlp"), ("trace_attn", "attn")):
        np.testing.assert_allclose(found.scores[key].values, arrays[kind].mean(axis=0), atol=1e-12)
        errors = arrays[kind].std(axis=0, ddof=1) / np.sqrt(len(SUBJECTS))  # what the jackknife of a mean is
        np.testing.assert_allclose(found.scores[key].stderr, errors, atol=1e-12)
    gap = (arrays["stream"] - arrays["severed"]).mean(axis=0)
    np.testing.assert_allclose(found.scores["trace_recall"].values[1:], gap[:-1] - gap[1:], atol=1e-12)
    assert not found.scores["trace_recall"].valid[0] and found.scores["trace_recall"].valid[1:].all()
    assert found.run["result"]["traced"] == len(SUBJECTS) and 0 < found.run["result"]["beside"]["step"]["p"] <= 1
    for name in ("trace.png", "report.html", "deletions.npz"):
        assert (tmp_path / "run" / name).exists()
    assert not (tmp_path / "run" / "partial.npz").exists()
    with monkeypatch.context() as patched:
        patched.setattr("jaxcrit.criteria.trace.traced", None)  # what is found is found
        again = run_trace(dataclasses.replace(options, scores=""))
    np.testing.assert_array_equal(again.scores["trace"].values, found.scores["trace"].values)
    assert not again.run["result"]["beside"] and again.layers == found.layers
    if found.layers is not None:
        stored = LayerSet.load(tmp_path / "run" / "layers.json")
        assert stored == found.layers and stored.rule == "trace:band"
        chosen = resolve(LayerSpec.parse(f"boundary(@{tmp_path / 'run' / 'layers.json'})"), DEPTH)
        assert set(chosen.layers) == {stored.layers[0], stored.layers[-1]}


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=2,tensor=2"])
def test_eight_devices_find_what_one_finds(known, found, mesh):
    spread = trace(str(known[0]), str(known[1]), samples=2, window=2, mesh=mesh)
    for key, kind in (("trace", "stream"), ("trace_last", "last"), ("trace_mlp", "mlp"), ("trace_attn", "attn")):
        np.testing.assert_allclose(spread.scores[key].values, found.effects[kind].mean(axis=0), atol=1e-5)


def test_told_to_leave_it_saves_and_goes_on(known, tmp_path, monkeypatch):
    one_device(monkeypatch)
    whole = run_trace(asked(known, out=str(tmp_path / "whole")))
    sampled = sweeps.sample_losses

    def told(examples, batch_size, model, directory, take, *rest):
        def some(batch, rows, step):
            os.kill(os.getpid(), signal.SIGTERM)
            return take(batch, rows, step)

        return sampled(examples, batch_size, model, directory, some, *rest)

    options = asked(known, out=str(tmp_path / "run"))
    with monkeypatch.context() as patched, pytest.raises(Preempted, match="told to leave at batch 1 of"):
        patched.setattr("jaxcrit.criteria.trace.sample_losses", told)
        run_trace(options)
    assert (tmp_path / "run" / "partial.npz").exists()
    found = run_trace(options)
    assert (tmp_path / "run" / "scores.json").read_bytes() == (tmp_path / "whole" / "scores.json").read_bytes()
    assert found.scores.keys() == whole.scores.keys()


def test_python_takes_facts_in_memory(known, monkeypatch):
    one_device(monkeypatch)
    rows = [json.loads(line) for line in known[1].read_text().splitlines()]
    some = trace(str(known[0]), rows, samples=1, limit=5)
    assert some.run["result"]["traced"] == 5 and some.run["result"]["facts"] == len(rows) and some.out is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"facts": "bundled"},
            "of 296 facts, and 5 are needed; it does not know 'The",
        ),
        ({"noise": 0.0}, "noise=0.0: expected a number above 0"),
        ({"samples": 0}, "samples=0: expected 1 or more"),
        ({"scores": "absent.json"}, "absent.json"),
    ],
)
def test_mistakes_in_a_line(known, options, message, monkeypatch):
    one_device(monkeypatch)
    facts = "" if options.get("facts") == "bundled" else str(known[1])
    given = {name: value for name, value in options.items() if name != "facts"}
    with pytest.raises(UserError) as raised:
        trace(str(known[0]), facts, **given)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_scores_of_another_model(known, tmp_path, monkeypatch):
    one_device(monkeypatch)
    path = tmp_path / "scores.json"
    for depth, key, message in (
        (3, "step", "step is of another model (3 layers"),
        (7, "other", "expected some of delta"),
    ):
        entry = {"values": [1.0] * depth, "valid": [True] * depth, "direction": "low", "stderr": None}
        content = {"format": "jaxcrit.scores", "format_version": 1, "num_layers": depth, "scores": {key: entry}}
        path.write_text(json.dumps(content))
        with pytest.raises(UserError) as raised:
            trace(str(known[0]), str(known[1]), scores=path)
        assert message in str(raised.value)


def test_completions_against_logits_by_hand(model, known):
    """Targets of one token and of several, in batches that are filled up."""
    examples = [fact.example for fact in known[2]]
    longer = [
        dataclasses.replace(one, prompt_length=one.prompt_length - 2) if row % 2 else one
        for row, one in enumerate(examples)
    ]
    found, decoder = completions(model, model.decoder(), longer, 3), model.decoder()
    for row, one in enumerate(longer):
        scores = np.asarray(logits(decoder, forward(decoder, jnp.asarray(one.token_ids[None])).hidden)[0], np.float64)
        log_p = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        places = np.arange(one.prompt_length, len(one.token_ids))
        expected = log_p[places - 1, one.token_ids[places]]
        np.testing.assert_allclose(found.log_p[row], expected.sum(), atol=1e-4)
        np.testing.assert_allclose(found.first_p[row], np.exp(expected[0]), atol=1e-5)
        assert found.said[row] == scores[places[0] - 1].argmax()
        assert found.right[row] == (scores[places - 1].argmax(axis=-1) == one.token_ids[places]).all()
    assert found.right[::2].all()
