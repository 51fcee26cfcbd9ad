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
from jaxcrit.evaluation.perturbations import find_perturbation, perturbed_tokens, relative_change, row_keys
from jaxcrit.models.decoder import Decoder, embed, forward, rms_norm
from jaxcrit.models.lora import make_lora
from jaxcrit.models.partition import FROZEN, partition, split
from jaxcrit.models.sites import Tap
from jaxcrit.parallel.accounting import product_flops
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.training.objectives import batch_losses, check_auxiliaries

ANSWERS, PROMPTS, PAIRS = "logits:answer", "feature:prompt", "feature:prompt+answer"
PLAIN, EXIT = Auxiliary(3, "exit", "", 0.5), Auxiliary(2, "exit", ANSWERS, 2.0)
NEAR, FAR = Auxiliary(1, "feature", PROMPTS, 1.0), Auxiliary(4, "feature", PAIRS, 1.5)
LAST = Auxiliary(6, "exit", "", 1.0)
ALL = (PLAIN, EXIT, NEAR, FAR)
STATES = Adversarial("states", 0.1, 2, 5, 1.0)
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


def states_of(rows, weights=None, offset=None):
    """``[L, B, T, D]``."""
    decoder = Decoder(CONFIG, {path: jnp.asarray(value) for path, value in (weights or random_weights()).items()})
    tap = Tap(lambda site, before, after, positions: after, ("block",))
    how = {"lengths": jnp.asarray(rows.lengths[0]), "tap": tap, "offset": offset}
    return decoder, forward(decoder, rows.tokens[0], **how).taps["block"]


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


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapters"])
def test_nothing_above_a_supervised_layer_trains_through_it(lora):
    for place, one in enumerate(ALL, 1):
        found, _ = gradients(one_hot(place), outside=OUTSIDE if lora is None else (), lora=lora)
        inside = [value for path, value in found.items() if path.startswith("blocks.") and "lora_a" not in path]
        for layer in range(7):  # an adapter's first half has no gradient where the second is 0, as both are at first
            moved = [bool(np.any(value[layer])) for value in inside]
            assert not any(moved) if layer > one.layer else any(moved), (one, layer)
        if lora is None:
            assert not found["norm"].any() and not found["head"].any() and found["embed"].any()


def test_an_exit_at_the_last_layer_is_the_loss_again_but_for_norm_and_head():
    plain, sums = gradients(one_hot(0))
    both, _ = gradients([1.0, 0, 0, 0, 0, 1.0])
    assert jax.tree.leaves(sums[0]) == jax.tree.leaves(sums[-1])
    for path, value in plain.items():
        assert value.any()
        factor = 1 if path in ("norm", "head") else 2
        np.testing.assert_allclose(both[path], factor * value, rtol=0, atol=1e-6)


def test_a_row_that_is_its_own_pair_has_no_feature_loss():
    near, last = Auxiliary(3, "feature", PROMPTS, 1.0), Auxiliary(6, "feature", PAIRS, 1.0)
    same = dataclasses.replace(BATCH, beside={PROMPTS: BATCH, PAIRS: BATCH})
    found, (_, *sums) = gradients([0.0, 1.0, 1.0], (near, last), same)
    assert all(abs(one.loss / one.tokens) < 1e-6 for one in sums)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(found))
    assert largest < 1e-6 < 1e-2 < np.abs(gradients(one_hot(3))[0]["blocks.q"]).max()


AT_TWO = tuple(dataclasses.replace(one, layer=2) for one in ALL)


@functools.cache
def stepped(case):
    """Parameters and metrics of two steps of everything at once, at one layer, to compile less."""
    options, batches = {}, [batch_of(1), batch_of(5)]
    if case == "accumulate, no remat":
        options = {"remat": False}
        batches = [jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[2:]), batch) for batch in batches]
    elif case == "mesh":
        options = {"mesh": make_mesh({"data": 2, "fsdp": 2, "tensor": 2})}
    trainer = Trainer((0, 1, 2), auxiliaries=(*AT_TWO, STATES), optimizer="sgd", rate=0.1, **options)
    found = trainer.run(*batches)
    return trainer.params(), [[one.per_token for one in (step.sums, *step.auxiliaries)] for step in found]


@pytest.mark.parametrize("case", ["accumulate, no remat", "mesh"])
def test_accumulation_remat_and_mesh_change_nothing(case):
    (params, sums), (expected, of_whole) = stepped(case), stepped("whole")
    np.testing.assert_allclose(sums, of_whole, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), params, expected)


def test_a_step_minimises_the_weighted_sum_of_the_means():
    trainer = Trainer(range(7), OUTSIDE, optimizer="sgd", rate=1.0, auxiliaries=(*ALL, LAST), remat=False)
    before = trainer.params()["train"]
    trainer.run(BATCH)
    expected, _ = gradients([1.0, *(one.weight for one in (*ALL, LAST))])
    for path, value in trainer.params()["train"].items():
        np.testing.assert_allclose(before[path] - value, expected[path], rtol=0, atol=2e-5)


def test_what_a_perturbation_does_layer_by_layer():
    """Found and measured on the decoder itself; nothing above the highest layer that trains has a gradient."""
    layers = (1, 3)
    found, (_, sums) = gradients([0.0, 1.0], (STATES,), layers=layers, outside=("norm",))
    decoder, clean = states_of(BATCH)
    lengths = jnp.asarray(BATCH.lengths[0])
    tokens, x = perturbed_tokens(lengths, 12), embed(decoder, BATCH.tokens[0])

    @jax.jit
    def moved(delta):
        states = states_of(BATCH, offset=delta)[1]
        return sum(relative_change(clean[layer], states[layer], tokens) for layer in layers)

    keys = row_keys(STATES.seed, jnp.arange(8))
    delta, value = jax.jit(lambda: find_perturbation(moved, x, tokens, keys, size=STATES.size, steps=STATES.steps))()
    np.testing.assert_allclose(sums.loss, value.sum(), rtol=1e-4)
    assert sums.tokens == 7 and sums.loss > moved(find_perturbation(moved, x, tokens, keys, size=0.1, steps=0)[0]).sum()
    assert not found["norm"].any() and all(value.any() for path, value in found.items() if path != "norm")
    # Of a stream scaled throughout it is the same: embeddings that grow with the rest do not escape it.
    scaled = {path: 8 * value if path in ("embed", "blocks.o", "blocks.down") else value for path, value in
              random_weights().items()}  # fmt: skip
    larger = [relative_change(*(states_of(BATCH, scaled, offset)[1][3] for offset in (None, 8 * delta)), tokens)]
    once = relative_change(clean[3], states_of(BATCH, offset=delta)[1][3], tokens)
    np.testing.assert_allclose(larger[0], once, rtol=1e-3)


def flops(objectives, layers=tuple(range(7)), remat=True):
    trainer = Trainer(layers, auxiliaries=objectives, remat=remat)
    batch = dataclasses.replace(BATCH, beside={ANSWERS: BATCH})
    return product_flops(trainer.step, trainer.state, trainer.frozen, batch)


def test_an_exit_costs_its_share_of_a_pass_over_its_rows():
    """(layer + 1) / L of the blocks' products forward and backward, and the head on its rows."""
    without = flops(())
    added = [flops((Auxiliary(layer, "exit", ANSWERS, 1.0),)) - without for layer in range(7)]
    one = added[1] - added[0]
    assert np.diff(added).tolist() == [one] * 6
    head = added[0] - one
    trained_head = added[6] - without  # the same pass, but for the gradient that final norm and head do not take
    assert trained_head == 0
    assert added == [(layer + 1) * one + head for layer in range(7)]
    # On the training rows the states are there already: what is added is the head's alone.
    assert flops((Auxiliary(3, "exit", "", 1.0),)) - without == head


def test_an_adversarial_step_costs_so_many_prefixes():
    without, prefix = flops(()), {}
    for layers in ((0, 1), (0, 1, 2, 3)):
        costs = [flops((dataclasses.replace(STATES, steps=steps),), layers) - flops((), layers) for steps in (1, 2, 5)]
        prefix[layers] = costs[1] - costs[0]
        assert costs[2] - costs[0] == 4 * prefix[layers]
    assert prefix[0, 1, 2, 3] == 2 * prefix[0, 1] < without


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
