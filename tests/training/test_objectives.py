"""Objectives beside the loss: against slow references, what they train, and what they cost."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_training import CONFIG, Trainer, one_device, random_batch, random_weights

from jaxcrit.core.auxiliaries import Adversarial, Auxiliary, parse_supervise
from jaxcrit.core.errors import UserError
from jaxcrit.evaluation.perturbations import (
    find_perturbation,
    perturbed_tokens,
    random_perturbation,
    relative_change,
    row_keys,
)
from jaxcrit.models.decoder import Decoder, embed, forward, rms_norm
from jaxcrit.models.lora import make_lora
from jaxcrit.models.partition import FROZEN, partition, split
from jaxcrit.models.sites import Tap
from jaxcrit.parallel.accounting import product_flops
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.training.forward import layer_states
from jaxcrit.training.objectives import batch_losses, check_auxiliaries
from jaxcrit.training.optimizer import make_optimizer, make_schedule
from jaxcrit.training.step import abstract_state, make_step

ANSWERS, PROMPTS, PAIRS = "logits:answer", "feature:prompt", "feature:prompt+answer"
PLAIN, EXIT = Auxiliary(3, "exit", "", 0.5), Auxiliary(2, "exit", ANSWERS, 2.0)
NEAR, FAR = Auxiliary(1, "feature", PROMPTS, 1.0), Auxiliary(4, "feature", PAIRS, 1.5)
LAST = Auxiliary(6, "exit", "", 1.0)
ALL = (PLAIN, EXIT, NEAR, FAR)
STATES = Adversarial("states", 0.1, 1, 5, 1.0)
OUTSIDE = ("embed", "norm", "head")
LORA = make_lora(CONFIG, 2, 3.0)


def batch_of(seed=1, rows=8):
    """Rows with others beside them; of the last one nothing, as of a row that fills up a batch."""
    main, answers, pairs = (random_batch(rows=rows, length=length, seed=seed + length) for length in (12, 9, 14))
    prompts = dataclasses.replace(pairs, learn=np.zeros_like(pairs.learn))
    numbers = np.arange(rows, dtype=np.int32)[None]
    found = dataclasses.replace(main, beside={ANSWERS: answers, PROMPTS: prompts, PAIRS: pairs}, numbers=numbers)
    for one in (found, *found.beside.values()):
        one.learn[:, -1], one.lengths[:, -1] = False, 1
    return found


BATCH = batch_of()


@functools.cache
def bank_of(layers=tuple(range(7)), outside=OUTSIDE, lora=None):
    parts = partition(CONFIG, layers, outside, lora=lora)
    weights = {path: jnp.asarray(value) for path, value in random_weights().items()}
    return parts, parts.gather(weights, one_device(), jnp.float32, 0)


@functools.cache
def compiled(objectives, layers=tuple(range(7)), outside=OUTSIDE, lora=None):
    """Losses, and the gradient of their means weighed as told; the main one first."""
    parts, _ = bank_of(layers, outside, lora)

    def total(trained, frozen, batch, factors):
        flat, bank = jax.tree.map(lambda leaf: leaf[0], batch), {**trained, FROZEN: frozen}
        found = batch_losses(parts, bank, flat, objectives, dtype=jnp.float32, remat=False)
        return sum(w * one.loss / one.tokens for w, one in zip(factors, found, strict=True)), found

    return jax.jit(jax.grad(total, has_aux=True))


def gradients(factors, objectives=(*ALL, LAST), batch=BATCH, **what):
    found = compiled(objectives, **what)(*split(bank_of(**what)[1]), batch, jnp.asarray(factors, jnp.float32))
    return jax.device_get(found[0])["train"], found[1]


def one_hot(place):
    return [float(place == at) for at in range(6)]


@jax.jit
def all_states(decoder, tokens, lengths, offset):
    """``[L, B, T, D]``."""
    tap = Tap(lambda site, before, after, positions: after, ("block",))
    return forward(decoder, tokens, lengths=lengths, tap=tap, offset=offset).taps["block"]


def states_of(rows, weights=None, offset=0.0):
    decoder = Decoder(CONFIG, {path: jnp.asarray(value) for path, value in (weights or random_weights()).items()})
    offset = jnp.broadcast_to(offset, (*rows.tokens[0].shape, CONFIG.width))
    return decoder, all_states(decoder, jnp.asarray(rows.tokens[0]), jnp.asarray(rows.lengths[0]), offset)


def test_each_loss_token_by_token():
    main, plain, exit, near, far, _ = gradients([1.0] * 6)[1]
    for found, rows, layer in ((main, BATCH, 6), (plain, BATCH, 3), (exit, BATCH.beside[ANSWERS], 2)):
        decoder, states = states_of(rows)
        logits = np.asarray(rms_norm(states[layer], decoder.norm[...], CONFIG), np.float64)
        logits = logits @ np.asarray(decoder.head[...], np.float64).T
        chance = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        places = [(row, at) for row, at in np.argwhere(rows.learn[0]) if at > 0]
        expected = [-chance[row, at - 1, rows.tokens[0, row, at]] for row, at in places]
        np.testing.assert_allclose(found.loss, sum(expected), rtol=1e-4)
        assert found.tokens == len(places)
    ours = np.asarray(states_of(BATCH)[1], np.float64)
    for found, name, layer, source, response in ((near, PROMPTS, 1, 1, False), (far, PAIRS, 4, 6, True)):
        rows, distances = BATCH.beside[name], []
        theirs = np.asarray(states_of(rows)[1], np.float64)
        for row in range(8):
            pooled = []
            for one, states in ((BATCH, ours[layer]), (rows, theirs[source])):
                places = [at for at in range(1, one.lengths[0, row]) if one.learn[0, row, at] == response]
                pooled.append(states[row, places].mean(axis=0) if places else None)
            if pooled[0] is not None and pooled[1] is not None:
                distances.append(1 - pooled[0] @ pooled[1] / np.linalg.norm(pooled[0]) / np.linalg.norm(pooled[1]))
        np.testing.assert_allclose(found.loss, sum(distances), rtol=1e-4)
        assert found.tokens == len(distances) >= 3


def moved(found):
    """Which layers have a gradient; of an adapter's first half there is none where the second is 0, as at first."""
    inside = [value for path, value in found.items() if path.startswith("blocks.") and "lora_a" not in path]
    return [layer for layer in range(7) if any(np.any(value[layer]) for value in inside)]


def test_nothing_above_a_supervised_layer_trains_through_it():
    for place, one in enumerate(ALL, 1):
        found, _ = gradients(one_hot(place))
        assert moved(found) == list(range(one.layer + 1)), one
        assert not found["norm"].any() and not found["head"].any() and found["embed"].any()
    assert moved(gradients([0.0, 1.0], (EXIT,), outside=(), lora=LORA)[0]) == [0, 1, 2]


def test_an_exit_at_the_last_layer_is_the_loss_again_but_for_norm_and_head():
    plain, sums = gradients(one_hot(0))
    both, _ = gradients([1.0, 0, 0, 0, 0, 1.0])
    assert jax.tree.leaves(sums[0]) == jax.tree.leaves(sums[-1])
    for path, value in plain.items():
        assert value.any()
        factor = 1 if path in ("norm", "head") else 2
        np.testing.assert_allclose(both[path], factor * value, rtol=0, atol=1e-6)


def test_a_row_that_is_its_own_pair_has_no_feature_loss():
    near, far = Auxiliary(6, "feature", PROMPTS, 1.0), Auxiliary(6, "feature", PAIRS, 1.0)
    same = dataclasses.replace(BATCH, beside={PROMPTS: BATCH, PAIRS: BATCH})
    found, (_, *sums) = gradients([0.0, 1.0, 1.0], (near, far), same, outside=())
    assert all(abs(one.loss / one.tokens) < 1e-6 for one in sums)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(found))
    assert largest < 1e-5 < 1e-2 < np.abs(gradients(one_hot(3))[0]["blocks.q"]).max()


# At one layer, to compile less.
TOGETHER = (*(dataclasses.replace(one, layer=1) for one in (PLAIN, EXIT, FAR)), STATES)


def together():
    return gradients([1.0, *(one.weight for one in TOGETHER)], TOGETHER, layers=(0, 1), outside=())


@pytest.mark.parametrize("case", ["accumulate, no remat", "mesh"])
def test_a_step_takes_the_gradient_of_the_weighted_sum_of_the_means(case):
    batch, options = BATCH, {"mesh": make_mesh({"data": 2, "fsdp": 2, "tensor": 2})}
    if case != "mesh":
        options = {"remat": False}
        batch = jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[2:]), BATCH)
    trainer = Trainer((0, 1), auxiliaries=TOGETHER, optimizer="sgd", rate=1.0, **options)
    before = trainer.params()["train"]
    (step,) = trainer.run(batch)
    expected, sums = together()
    for found, one in zip((step.sums, *step.auxiliaries), sums, strict=True):
        np.testing.assert_allclose(jax.tree.leaves(found), jax.tree.leaves(one), rtol=1e-4)
    for path, value in trainer.params()["train"].items():
        np.testing.assert_allclose(before[path] - value, expected[path], rtol=0, atol=3e-5)


def test_what_a_perturbation_does_layer_by_layer():
    """Found and measured on the decoder itself."""
    *_, sums = together()[1]
    decoder, clean = states_of(BATCH)
    lengths = jnp.asarray(BATCH.lengths[0])
    tokens, x = perturbed_tokens(lengths, 12), embed(decoder, BATCH.tokens[0])

    def change(delta):
        states = all_states(decoder, jnp.asarray(BATCH.tokens[0]), lengths, delta)
        return sum(relative_change(clean[layer], states[layer], tokens) for layer in (0, 1))

    keys = row_keys(STATES.seed, jnp.arange(8))
    find = functools.partial(find_perturbation, change, x, tokens, keys, size=STATES.size, steps=STATES.steps)
    delta, value = jax.jit(find)()
    np.testing.assert_allclose(sums.loss, value.sum(), rtol=1e-4)
    assert sums.tokens == 7 and value.sum() > change(random_perturbation(x, tokens, keys, STATES.size)).sum()
    # Of a stream scaled throughout it is the same: embeddings that grow with the rest do not escape it.
    grown = ("embed", "blocks.o", "blocks.down")
    scaled = {path: 8 * value if path in grown else value for path, value in random_weights().items()}
    larger, moved = (states_of(BATCH, scaled, offset)[1][1] for offset in (0.0, 8 * delta))
    once = relative_change(clean[1], states_of(BATCH, offset=delta)[1][1], tokens)
    np.testing.assert_allclose(relative_change(larger, moved, tokens), once, rtol=1e-3)


def flops(objectives, layers=tuple(range(7))):
    parts = partition(CONFIG, layers)
    params, frozen = split(parts.abstract(one_device(), jnp.float32))
    optimizer = make_optimizer("sgd", make_schedule("constant", 1.0, 1), parts)
    step = make_step(parts, optimizer, dtype=jnp.float32, auxiliaries=objectives)
    batch = dataclasses.replace(BATCH, beside={ANSWERS: BATCH})
    return product_flops(step, abstract_state(parts, optimizer, params), frozen, batch)


def test_an_exit_costs_its_share_of_a_pass_over_its_rows():
    """(layer + 1) / L of the blocks' products forward and backward, and the head on its rows."""
    without = flops(())
    added = {layer: flops((Auxiliary(layer, "exit", ANSWERS, 1.0),)) - without for layer in (0, 1, 4, 6)}
    block = added[1] - added[0]
    head = added[0] - block
    assert added == {layer: (layer + 1) * block + head for layer in added}
    assert added[6] == without and head < block
    # On the training rows the states are there already: what is added is the head's alone.
    assert flops((PLAIN,)) - without == head


@pytest.mark.parametrize("layers", [tuple(range(7)), (1, 2, 3), (0, 2, 5)], ids=str)
@pytest.mark.parametrize("site", ["attn", "block"])
def test_states_of_layers_read_together_are_those_of_each_alone(layers, site):
    parts, bank = bank_of(layers)
    rows = jax.tree.map(lambda leaf: leaf[0], BATCH)
    tap = Tap(lambda site, before, after, positions: after[:, -1], (site,))

    def read(these, tap=None):
        return layer_states(parts, bank, rows.tokens, rows.lengths, these, dtype=jnp.float32, remat=False, tap=tap)

    alone = {layer: read([layer])[0][layer] for layer in range(-1, 7)}
    _, whole = read([6], tap)
    for chosen in (range(-1, 7), (0, 3, 4, 6)):
        together, taps = read(chosen, tap)
        assert sorted(together) == sorted(chosen) and all(set(one) == {site} for one in taps)
        for layer, state in together.items():
            np.testing.assert_allclose(state, alone[layer], rtol=1e-5, atol=1e-6)
        found, expected = (np.concatenate([one[site] for one in read]) for read in (taps, whole))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_adversarial_step_costs_so_many_prefixes():
    """Each step of the search as much, by the layers up to the highest that trains."""
    search = []
    for layers in ((0, 1), (0, 1, 2, 3)):
        costs = [flops((dataclasses.replace(STATES, steps=steps),), layers) for steps in (1, 2, 5)]
        search.append(costs[1] - costs[0])
        assert costs[2] - costs[0] == 4 * search[-1]
    assert search[1] == 2 * search[0] < flops(())


def test_what_is_refused():
    for text, message in {
        "7": "expected layers 0 to 6, got 7",
        "first": "expected LAYER, LAYER:logits:FIELD",
        "2:logits": "got '2:logits'",
        "2:logits:": "got '2:logits:'",
        "2:logits:a+b": "got '2:logits:a.b'",
        "2:feature:a+b+c": "got '2:feature:a.b.c'",
        "2:features:a": "got '2:features:a'",
        "2:feature:a+": "got '2:feature:a.'",
        "-1": "got '-1'",
        "2,": "got ''",
        "2,3,2": "each objective once, got 2 twice",
    }.items():
        with pytest.raises(UserError, match=f"--supervise=.*{message}"):
            parse_supervise(text, 1.0, 7)
    asked = parse_supervise("3, 2:logits:answer,1:feature:prompt,4:feature:prompt+answer", 1.0, 7)
    assert [dataclasses.replace(one, weight=1.0) for one in ALL] == list(asked)
    check_auxiliaries((*asked, STATES), partition(CONFIG, (1, 6)))
    check_auxiliaries(asked, partition(CONFIG, (6,), ("embed",)))
    for layers, outside, told in (((2, 6), (), "the lowest that trains is 2"), ((), ("norm",), "no layer trains")):
        with pytest.raises(UserError, match=rf"--supervise=\d.*: nothing at or below layer \d trains \({told}"):
            check_auxiliaries(asked, partition(CONFIG, layers, outside))
    for layers, outside, told in (
        ((1,), ("embed",), "train_embeddings=false"),
        ((), ("norm",), "choose some --layers"),
    ):
        with pytest.raises(UserError, match=f"--adversarial: .*{told}"):
            check_auxiliaries((STATES,), partition(CONFIG, layers, outside))
