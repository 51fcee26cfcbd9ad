"""Objectives beside the loss: against slow references, what they train, and what they cost."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_models import MESHES
from support.tiny_training import CONFIG, Trainer, one_device, random_batch, random_weights

from jaxcrit.core.auxiliaries import Auxiliary, parse_supervise
from jaxcrit.core.errors import UserError
from jaxcrit.models.decoder import Decoder, forward, rms_norm
from jaxcrit.models.lora import make_lora
from jaxcrit.models.partition import FROZEN, partition, split
from jaxcrit.models.sites import Tap
from jaxcrit.parallel.accounting import product_flops
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.training.objectives import batch_losses, check_auxiliaries

ANSWERS, PROMPTS, PAIRS = "logits:answer", "feature:prompt", "feature:prompt+answer"
PLAIN, EXIT = Auxiliary(3, "exit", "", 0.5), Auxiliary(2, "exit", ANSWERS, 2.0)
NEAR, FAR = Auxiliary(1, "feature", PROMPTS, 1.0), Auxiliary(4, "feature", PAIRS, 1.5)
ALL = (PLAIN, EXIT, NEAR, FAR)
OUTSIDE = ("embed", "norm", "head")


def batch_of(seed=1, rows=8):
    """Rows with others beside them; of the last one nothing, as of a row that fills up a batch."""
    main, answers, pairs = (random_batch(rows=rows, length=length, seed=seed + length) for length in (12, 9, 14))
    prompts = dataclasses.replace(pairs, learn=np.zeros_like(pairs.learn))
    found = dataclasses.replace(main, beside={ANSWERS: answers, PROMPTS: prompts, PAIRS: pairs})
    for one in (found, *found.beside.values()):
        one.learn[:, -1], one.lengths[:, -1] = False, 1
    return found


BATCH = batch_of()


@functools.cache
def bank_of(layers=tuple(range(7)), outside=OUTSIDE, lora=None):
    parts = partition(CONFIG, layers, outside, lora=lora)
    weights = {path: jnp.asarray(value) for path, value in random_weights().items()}
    return parts, parts.gather(weights, one_device(), jnp.float32, 0)


def losses(parts, bank, auxiliaries, batch=BATCH):
    flat = jax.tree.map(lambda leaf: leaf[0], batch)
    return batch_losses(parts, bank, flat, auxiliaries, dtype=jnp.float32, remat=False)


def gradients(auxiliaries, layers=tuple(range(7)), outside=OUTSIDE, lora=None):
    """Of the sum of the auxiliary losses, without weights."""
    parts, bank = bank_of(layers, outside, lora)
    trained, frozen = split(bank)

    def loss(trained):
        found = losses(parts, {**trained, FROZEN: frozen}, auxiliaries)
        return sum(one.loss / one.tokens for one in (found[1:] or found))

    return jax.device_get(jax.jit(jax.grad(loss))(trained))["train"]


def states_of(rows):
    """``[L, B, T, D]``."""
    decoder = Decoder(CONFIG, {path: jnp.asarray(value) for path, value in random_weights().items()})
    tap = Tap(lambda site, before, after, positions: after, ("block",))
    found = forward(decoder, rows.tokens[0], lengths=jnp.asarray(rows.lengths[0]), tap=tap).taps["block"]
    return decoder, np.asarray(found, np.float64)


def test_each_loss_token_by_token():
    parts, bank = bank_of()
    main, plain, exit, near, far = losses(parts, bank, ALL)
    for found, rows, layer in ((main, BATCH, 6), (plain, BATCH, 3), (exit, BATCH.beside[ANSWERS], 2)):
        decoder, states = states_of(rows)
        logits = np.asarray(rms_norm(jnp.asarray(states[layer]), decoder.norm[...], CONFIG), np.float64)
        logits = logits @ np.asarray(decoder.head[...], np.float64).T
        chance = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        places = [(row, at) for row, at in np.argwhere(rows.learn[0]) if at > 0]
        expected = [-chance[row, at - 1, rows.tokens[0, row, at]] for row, at in places]
        np.testing.assert_allclose(found.loss, sum(expected), rtol=1e-4)
        assert found.tokens == len(places)
    ours = states_of(BATCH)[1]
    for found, name, layer, source, response in ((near, PROMPTS, 1, 1, False), (far, PAIRS, 4, 6, True)):
        rows, distances = BATCH.beside[name], []
        theirs = states_of(rows)[1]
        for row in range(8):
            pooled = []
            for one, states in ((BATCH, ours[layer]), (rows, theirs[source])):
                places = [at for at in range(1, one.lengths[0, row]) if one.learn[0, row, at] == response]
                pooled.append(states[row, places].mean(axis=0) if places else None)
            if pooled[0] is not None and pooled[1] is not None:
                distances.append(1 - pooled[0] @ pooled[1] / np.linalg.norm(pooled[0]) / np.linalg.norm(pooled[1]))
        np.testing.assert_allclose(found.loss, sum(distances), rtol=1e-4)
        assert found.tokens == len(distances) >= 3


@pytest.mark.parametrize("lora", [None, make_lora(CONFIG, 2, 3.0)], ids=["whole", "adapters"])
@pytest.mark.parametrize("one", ALL, ids=str)
def test_nothing_above_a_supervised_layer_trains_through_it(one, lora):
    found = gradients((one,), outside=OUTSIDE if lora is None else (), lora=lora)
    inside = [value for path, value in found.items() if path.startswith("blocks.") and "lora_a" not in path]
    for layer in range(7):  # an adapter's first half has no gradient where the second is 0, as both are at first
        moved = [bool(np.any(value[layer])) for value in inside]
        assert not any(moved) if layer > one.layer else any(moved), layer
    if lora is None:
        assert not found["norm"].any() and not found["head"].any() and found["embed"].any()


def test_an_exit_at_the_last_layer_is_the_loss_again_but_for_norm_and_head():
    last = Auxiliary(6, "exit", "", 1.0)
    main, again = losses(*bank_of(), (last,))
    assert main == again
    plain, through = gradients(()), gradients((last,))
    for path, value in plain.items():
        if path in ("norm", "head"):
            assert value.any() and not through[path].any()
        else:
            np.testing.assert_allclose(through[path], value, rtol=0, atol=1e-6)
    once, twice = (Trainer(range(7), OUTSIDE, optimizer="sgd", auxiliaries=aux) for aux in ((), (last,)))
    before = once.params()
    once.run(BATCH)
    twice.run(BATCH)
    moved, doubled = (jax.tree.map(np.subtract, one.params(), before)["train"] for one in (once, twice))
    for path, value in moved.items():
        factor = 1 if path in ("norm", "head") else 2
        np.testing.assert_allclose(doubled[path], factor * value, rtol=0, atol=1e-6)


def test_a_row_that_is_its_own_pair_has_no_feature_loss():
    same = dataclasses.replace(BATCH, beside={PROMPTS: BATCH, PAIRS: BATCH})
    near, last = Auxiliary(3, "feature", PROMPTS, 1.0), Auxiliary(6, "feature", PAIRS, 1.0)
    parts, bank = bank_of()
    trained, frozen = split(bank)

    def loss(trained):
        found = losses(parts, {**trained, FROZEN: frozen}, (near, last), same)
        return sum(one.loss for one in found[1:])

    value, found = jax.jit(jax.value_and_grad(loss))(trained)
    assert abs(value) < 1e-5  # eight rows, 1e-6 each
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(found))
    assert largest < 1e-5 < 1e-2 < np.abs(gradients((NEAR,))["blocks.q"]).max()


@functools.cache
def stepped(case):
    """Parameters and metrics of two steps of everything at once."""
    options, lora, batches = {}, None, [batch_of(1), batch_of(5)]
    if case == "accumulate":
        batches = [jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[2:]), batch) for batch in batches]
    elif case == "no remat":
        options = {"remat": False}
    elif case in MESHES:
        options = {"mesh": make_mesh(MESHES[case])}
    elif case == "adapters":
        lora = make_lora(CONFIG, 2, 3.0)
    trainer = Trainer((0, 1, 2, 5), lora=lora, auxiliaries=ALL, optimizer="sgd", **options)
    found = trainer.run(*batches)
    return trainer.params(), [[one.per_token for one in (step.sums, *step.auxiliaries)] for step in found]


@pytest.mark.parametrize("case", ["accumulate", "no remat", *MESHES])
def test_accumulation_remat_and_mesh_change_nothing(case):
    (params, sums), (expected, of_whole) = stepped(case), stepped("whole")
    np.testing.assert_allclose(sums, of_whole, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), params, expected)


def test_adapters_are_supervised_too():
    (params, sums), (_, of_whole) = stepped("adapters"), stepped("whole")
    np.testing.assert_allclose(sums[0], of_whole[0], rtol=1e-5)  # which do nothing before the first step
    moved = [np.abs(value[:3]).max() for path, value in params["train"].items() if path.endswith("lora_b")]
    assert min(moved) > 1e-6


def test_a_step_minimises_the_weighted_sum_of_the_means():
    trainer = Trainer((0, 1, 2), optimizer="sgd", rate=1.0, auxiliaries=ALL)
    before = trainer.params()
    trainer.run(BATCH)
    parts, bank = bank_of((0, 1, 2), ())
    trained, frozen = split(bank)

    def loss(trained):
        found = losses(parts, {**trained, FROZEN: frozen}, ALL)
        return sum(w * one.loss / one.tokens for w, one in zip([1, *(one.weight for one in ALL)], found, strict=True))

    expected = jax.jit(jax.grad(loss))(trained)["train"]
    for path, value in jax.tree.map(np.subtract, before, trainer.params())["train"].items():
        np.testing.assert_allclose(value, expected[path], rtol=0, atol=2e-5)


def test_an_exit_costs_its_share_of_a_pass_over_its_rows():
    """(layer + 1) / L of the blocks' products forward and backward, and the head on its rows."""

    def flops(auxiliaries, layers=tuple(range(7))):
        trainer = Trainer(layers, auxiliaries=auxiliaries)
        batch = dataclasses.replace(BATCH, beside={ANSWERS: BATCH})
        return product_flops(trainer.step, trainer.state, trainer.frozen, batch)

    without = flops(())
    added = [flops((Auxiliary(layer, "exit", ANSWERS, 1.0),)) - without for layer in range(7)]
    one = added[1] - added[0]
    assert np.diff(added).tolist() == [one] * 6
    assert added[6] == without  # all layers and the head: a pass
    head = added[0] - one
    assert added == [(layer + 1) / 7 * (without - head) + head for layer in range(7)]
    # On the training rows the states are there already: what is added is the head's alone.
    assert flops((Auxiliary(3, "exit", "", 1.0),)) - without == head


def test_what_is_refused():
    for text, message in {
        "7": "expected layers 0 to 6, got 7",
        "first": "expected LAYER, LAYER:logits:FIELD",
        "2:logits": "got '2:logits'",
        "2:logits:": "got '2:logits:'",
        "2:logits:a+b": "got '2:logits:a",
        "2:feature:a+b+c": "got '2:feature",
        "2:features:a": "got '2:features:a'",
        "2:feature:a+": "got '2:feature:a",
        "-1": "got '-1'",
        "2,": "got ''",
        "2,3,2": "each objective once, got 2 twice",
    }.items():
        with pytest.raises(UserError, match=f"--supervise=.*{message}".replace("+", r"\+")):
            parse_supervise(text, 1.0, 7)
    asked = parse_supervise("3, 2:logits:answer,1:feature:prompt,4:feature:prompt+answer", 1.0, 7)
    assert [dataclasses.replace(one, weight=1.0) for one in ALL] == list(asked)
    check_auxiliaries(asked, partition(CONFIG, (1, 6)))
    check_auxiliaries(asked, partition(CONFIG, (6,), ("embed",)))
    for layers, outside, told in (((2, 6), (), "the lowest that trains is 2"), ((), ("norm",), "no layer trains")):
        with pytest.raises(UserError, match=rf"--supervise=\d.*: nothing at or below layer \d trains \({told}"):
            check_auxiliaries(asked, partition(CONFIG, layers, outside))
