"""Keys and values of another model: what is planted is found to the bit, and what it costs is what the formulas say."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from support.family_models import load_path, one_device, raw_config, write_model
from support.reuse import ALL, HEADS, planted, receiver, rows
from support.tiny_training import CONFIG, RAW

from jaxcrit.evidence import reuse
from jaxcrit.evidence.reuse import DISTANCES, compiled_layers, measure, one_reused, planned, sources, walk
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder, forward
from jaxcrit.models.generation import prefill
from jaxcrit.models.mixed import mixed_prefill, runs_of
from jaxcrit.studies.reuse import identical, sets_to_try

L = CONFIG.num_layers
SETS = sets_to_try(L, 5, 0)
GROUPS = [one for one in SETS.recomputed if one]


def studied(sender):
    """KL of every variant ``[V, B]``, by layer and by set; leading layers that are equal to the bit."""
    measures, distances = measure(receiver(), sender, rows()[0], SETS.plan, one_device())
    kl = measures[0]
    alone, of_sets = kl[1 : 1 + L].max(axis=1), dict(zip(SETS.recomputed, kl[1 + L :].max(axis=1), strict=True))
    assert (kl[0] == 0).all(), "the receiver over its own cache"
    return alone, of_sets, identical(distances[-1])


def test_the_same_model_costs_nothing():
    alone, of_sets, same = studied(receiver())
    assert (alone == 0).all() and not any(of_sets.values()) and same == L


@pytest.mark.parametrize(("names", "same"), [(ALL, 3), (("o", "gate", "up", "down"), 4)])
def test_what_was_changed_from_a_layer_on(names, same):
    """D is 0 below the change; groups up to the last layer are free where they begin at or below it."""
    layers = range(3, L) if names == ALL else [3]
    alone, of_sets, found = studied(planted(names, layers))
    assert found == same
    assert (alone[:same] == 0).all() and (alone[same:] > 0).all()
    free = {a for a in range(L) if of_sets[tuple(range(a, L))] == 0}
    assert free == set(range(4 if names == ALL else 5)) - ({4} if names != ALL else set())
    assert of_sets[()] > 0 and of_sets[tuple(range(L))] == 0


def test_an_mlp_on_top_changes_no_cache():
    sender = planted(("gate", "up", "down"), [L - 1])
    alone, of_sets, same = studied(sender)
    assert (alone == 0).all() and not any(of_sets.values()) and same == L
    _, whole = rows()
    both = [forward(model, jnp.asarray(whole[0][None])).hidden for model in (receiver(), sender)]
    assert jnp.abs(both[0] - both[1]).max() > 1e-3, "though the two models differ"


def test_values_of_the_last_layer_alone():
    alone, of_sets, same = studied(planted(("v",), [L - 1]))
    assert alone[-1] > 0 and (alone[:-1] == 0).all() and same == L - 1
    for layers, damage in of_sets.items():
        assert (damage == 0) == (L - 1 in layers), layers


def test_other_embeddings():
    """Only a group that begins at layer 0 begins at the receiver's own; nothing else is equal any more."""
    own = receiver().weights()
    embed = own["embed"] + 0.1 * np.random.default_rng(2).standard_normal(own["embed"].shape).astype(np.float32)
    head = own.get("head", own["embed"])
    alone, of_sets, same = studied(Decoder(CONFIG, {**own, "embed": embed, "head": head}))
    assert same == 0 and (alone > 0).all()
    assert {layers for layers, damage in of_sets.items() if damage == 0} == {tuple(range(L))}
    assert of_sets[tuple(range(L - 1))] < of_sets[tuple(range(1, L))], "one layer of the sender's, or its stream"


def test_a_window_shorter_than_the_prefix_keeps_what_is_planted_exact():
    config = ModelConfig.from_hf({**RAW, "model_type": "mistral", "sliding_window": 4})
    assert set(config.windows) == {4} and min(HEADS) > 4
    one, mine = one_device(), receiver(config)
    same, _ = measure(mine, mine, rows()[0], SETS.plan, one)
    assert (same[0] == 0).all()
    found, distances = measure(mine, planted(ALL, range(3, L), config), rows()[0], SETS.plan, one)
    kl = dict(zip(SETS.recomputed, found[0, 1 + L :].max(axis=1), strict=True))
    assert identical(distances[-1]) == 3
    assert {a for a in range(L) if kl[tuple(range(a, L))] == 0} == set(range(4)) and kl[()] > 0


def test_distances_of_the_caches():
    sender = planted(("k",), [2])
    _, distances = measure(receiver(), sender, rows()[0], SETS.plan, one_device())
    named = dict(zip(DISTANCES, distances, strict=True))
    assert (named["keys_apart"][:2] == 0).all() and (named["keys_apart"][2:] > 0).all()
    assert (named["values_apart"][:3] == 0).all() and (named["values_apart"][3:] > 0).all()
    mine = prefill(receiver(), np.asarray(rows()[0].prefix), np.array(HEADS), 0).cache.values
    expected = [[np.square(mine[layer, row, :head]).sum() for row, head in enumerate(HEADS)] for layer in range(L)]
    np.testing.assert_allclose(named["values"], expected, rtol=1e-5)


def test_rows_do_not_depend_on_batch_padding_or_order():
    sender, one = planted(ALL, range(3, L)), one_device()
    together, _ = measure(receiver(), sender, rows()[0], SETS.plan, one)
    turned, _ = measure(receiver(), sender, rows(order=(2, 0))[0], SETS.plan, one)
    padded, _ = measure(receiver(), sender, rows(room=(28, 12))[0], SETS.plan, one)
    np.testing.assert_allclose(turned, together[:, :, [2, 0]], atol=2e-6)
    np.testing.assert_allclose(padded, together, atol=2e-6)
    assert together[0, 1:].max() > 1e-2


@pytest.mark.parametrize("case", ["qwen2-mixed-sliding", "gemma3"])
def test_over_its_own_cache_it_answers_as_without_one(case, tmp_path):
    """Windows and several rotations included: a prefix and what follows give what the whole row gives."""
    model, (given, whole) = load_path(write_model(tmp_path, raw_config(case))), rows(vocab=96)
    depth = model.config.num_layers
    plan = np.stack([np.zeros(depth, int), sources(depth, [])])
    found, _ = walk(model, model, given, plan, one_device())
    np.testing.assert_array_equal(*found)
    for slot, row in enumerate(whole):
        expected = forward(model, jnp.asarray(row[None]), lengths=jnp.array([len(row)])).hidden[0, HEADS[slot] :]
        np.testing.assert_allclose(found[0][slot, : len(expected)], expected, atol=2e-4)


def test_what_it_costs(monkeypatch):
    """(L+1)/2 prefills serve all L(L+1)/2 groups; of the suffix each group costs L/3 layers on average, shared."""
    groups = np.stack([np.zeros(L, int), *(sources(L, one) for one in SETS.recomputed[: SETS.groups])])
    assert len(groups) == 2 + L * (L + 1) // 2
    assert planned(groups) == {
        "sender": L,
        "receiver": L * (L + 1) // 2,
        "suffix": L + L * (L + 1) * (L + 2) // 6,
    }
    alone = np.stack([np.zeros(L, int), *(one_reused(L, layer) for layer in range(L))])
    assert planned(alone) == {"sender": L, "receiver": L, "suffix": L + L * (L + 1) // 2}
    counted = {"read_step": 0, "answer_step": 0}

    def counting(name):
        real = getattr(reuse, name)

        def call(*arguments):
            counted[name] += 1
            return real(*arguments)

        monkeypatch.setattr(reuse, name, call)

    for name in counted:
        counting(name)
    steps = []
    given, one, sender = rows()[0], one_device(), planted(ALL, [4])
    for plan in (groups, SETS.plan):
        counted.update(read_step=0, answer_step=0)
        steps.clear()
        walk(receiver(), sender, given, plan, one, steps.append)
        expected = planned(plan)
        assert counted == {
            "read_step": expected["sender"] + expected["receiver"],
            "answer_step": expected["suffix"],
        }
        assert sum(steps) == sum(expected.values())


def test_one_program_on_prefixes_and_one_on_suffixes_a_bucket():
    before = compiled_layers()
    for room in ((24, 10), (24, 10), (32, 10)):
        measure(receiver(), planted(ALL, [2]), rows(room=room)[0], SETS.plan, one_device())
    assert compiled_layers() - before == 4


def test_runs_of_layers():
    assert runs_of([]) == [] and runs_of([5, 1, 2]) == [(1, 3), (5, 6)]
    assert sources(6, [1, 2, 5]).tolist() == [-1, 1, 1, -1, -1, 5]


@pytest.mark.parametrize("layers", [(), (0, 1, 2), (2, 3), (1, 2, 5), tuple(range(L))])
def test_a_mixed_cache_is_that_of_the_study(layers):
    """Prompts over a mixed cache: the last token's stream is that of the variant; all recomputed is the receiver's."""
    given, whole = rows()
    tokens = np.zeros((3, max(map(len, whole))), np.int32)
    for slot, row in enumerate(whole):
        tokens[slot, : len(row)] = row
    lengths, sender = np.array([len(row) for row in whole]), planted(ALL, range(2, L))
    asked = (tokens, lengths, np.array(HEADS), layers, 4, one_device())
    mixed = mixed_prefill(receiver(), sender, *asked)
    plan = np.stack([np.zeros(L, int), sources(L, layers)])
    found, _ = walk(receiver(), sender, given, plan, one_device())
    at = jnp.asarray(lengths - 1)[:, None]
    last = jnp.take_along_axis(jnp.asarray(tokens), at, axis=1)
    out = forward(receiver(), last, positions=at, lengths=jnp.asarray(lengths), cache=mixed.cache)
    for slot, row in enumerate(whole):
        expected = found[1][slot, len(row) - HEADS[slot] - 1]
        np.testing.assert_allclose(out.hidden[slot, 0], expected, atol=2e-5)
    if len(layers) == L:
        own = mixed_prefill(receiver(), receiver(), *asked[:3], (), *asked[4:])
        for one, other in ((mixed.cache.keys, own.cache.keys), (mixed.cache.values, own.cache.values)):
            for slot, length in enumerate(lengths):
                np.testing.assert_array_equal(one[:, slot, :length], other[:, slot, :length])
