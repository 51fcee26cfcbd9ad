"""Adapters: what they start from, what they cost, and that they are the merged model, in every form and on a mesh."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_training import CONFIG, Trainer, one_device, random_batch, random_weights

from jaxcrit.core.errors import UserError
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder, forward
from jaxcrit.models.lora import linears, make_lora
from jaxcrit.models.partition import partition, partition_of_json, size, split
from jaxcrit.parallel.accounting import product_flops
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.training.forward import hidden_states
from jaxcrit.training.objectives import TokenBatch, batch_loss

LORA = make_lora(CONFIG, 3, 5.0)
BATCHES = [random_batch(seed=seed) for seed in range(3)]


def loaded():
    return {path: jnp.asarray(value) for path, value in random_weights().items()}


def hidden(parts, bank, form=None):
    def states(bank):
        return hidden_states(parts, bank, BATCHES[0].tokens[0], BATCHES[0].lengths[0], dtype=jnp.float32, form=form)

    return np.asarray(jax.jit(states)(bank))


@functools.cache
def plain_losses():
    return curve(Trainer((1, 3, 4), lora=LORA, form="runs"))


def curve(trainer):
    return [float(metrics.sums.per_token) for metrics in trainer.run(*BATCHES, BATCHES[0])]


@pytest.mark.parametrize("form", ["runs", "gaps"])
def test_the_first_step_starts_from_the_model_itself_bit_for_bit(form):
    plain, adapted = partition(CONFIG, (1, 3, 4)), partition(CONFIG, (1, 3, 4), lora=LORA)
    banks = [parts.gather(loaded(), one_device(), jnp.float32) for parts in (plain, adapted)]
    np.testing.assert_array_equal(*(hidden(p, b, form) for p, b in zip((plain, adapted), banks, strict=True)))
    merged = adapted.merge(loaded(), split(banks[1])[0])
    for path, value in random_weights().items():
        np.testing.assert_array_equal(merged[path], value)


def test_a_begins_uniform_as_in_peft_and_follows_from_seed_and_layer():
    rows, made = linears(CONFIG), LORA.initial(CONFIG, (1, 4), seed=7)
    for row in rows:
        a, b = (np.asarray(made[row.path + end]) for end in ("_lora_a", "_lora_b"))
        inside = row.hf_shape(CONFIG)[1]
        assert not b.any() and a.shape[:2] == (2, 3) and a[0].size == 3 * inside
        assert 0.8 < np.abs(a).max() * np.sqrt(inside) <= 1 and abs(a.mean()) * np.sqrt(inside) < 0.25
    first = functools.reduce(jax.random.fold_in, (0, 1), jax.random.key(7))  # of the first linear layer, in layer 1
    by_head = jax.random.uniform(first, (3, CONFIG.num_heads, CONFIG.head_dim), minval=-0.25, maxval=0.25)
    np.testing.assert_array_equal(made["blocks.o_lora_a"][0], by_head.reshape(3, -1))  # as runs before matrices drew
    alone, other = LORA.initial(CONFIG, (4,), seed=7), LORA.initial(CONFIG, (4,), seed=8)
    np.testing.assert_array_equal(alone["blocks.q_lora_a"][0], made["blocks.q_lora_a"][1])
    assert (np.asarray(alone["blocks.q_lora_a"]) != np.asarray(other["blocks.q_lora_a"])).all()
    assert (np.asarray(made["blocks.gate_lora_a"]) != np.asarray(made["blocks.up_lora_a"])).all()


@pytest.mark.parametrize("case", ["gaps", "mesh", "two rates, some targets"])
def test_trained_adapters_are_the_merged_model_and_nothing_else_moves(case):
    options, lora = {"form": case}, LORA
    if case == "mesh":
        options = {"mesh": make_mesh({"data": 2, "fsdp": 2, "tensor": 2})}
    elif case != "gaps":
        options, lora = {"factors": {3: 0.1}}, make_lora(CONFIG, 3, 5.0, ("q", "down"))
    trainer = Trainer((1, 3, 4), lora=lora, **options)
    frozen = jax.tree.map(np.array, jax.device_get(trainer.frozen))
    losses = curve(trainer)
    assert losses[-1] < losses[0]
    if lora is LORA:
        np.testing.assert_allclose(losses, plain_losses(), rtol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(trainer.frozen))
    merged = trainer.partition.merge(loaded(), jax.device_get(trainer.state.params))
    moved = {path for path, value in random_weights().items() if (np.asarray(merged[path]) != value).any()}
    assert moved == {f"blocks.{name}" for name in lora.targets}
    for path in moved:
        layers = (np.asarray(merged[path]) != random_weights()[path]).reshape(7, -1).any(axis=1)
        assert layers.tolist() == [layer in (1, 3, 4) for layer in range(7)]
    a, b = (trainer.params()["train"][f"blocks.down_lora_{end}"][0].astype(np.float64) for end in "ab")
    expected = random_weights()["blocks.down"][1] + 5 / 3 * b @ a
    np.testing.assert_allclose(merged["blocks.down"][1], expected, rtol=1e-5, atol=1e-6)
    batch = BATCHES[0]
    run = jax.jit(lambda decoder: forward(decoder, batch.tokens[0], lengths=batch.lengths[0]).hidden)
    whole = np.asarray(run(Decoder(CONFIG, jax.device_get(merged))))
    bank = {**jax.device_get(trainer.state.params), "frozen": jax.device_get(trainer.frozen)}
    found = hidden(trainer.partition, bank)
    assert np.abs(found - whole).max() <= 1e-5 * np.abs(whole).max()
    assert partition_of_json(CONFIG, trainer.partition.to_json()) == trainer.partition


def test_gradients_and_state_are_of_the_adapters_alone():
    trainer = Trainer((1, 4), lora=LORA)
    expected = 2 * 4 * 3 * sum(sum(row.hf_shape(CONFIG)) for row in linears(CONFIG))  # 2 layers, float32, rank 3
    assert size(trainer.state.params) == expected
    assert 0 <= size(trainer.state.optimizer) - 2 * expected <= 16
    assert all(path.endswith(("_lora_a", "_lora_b")) for path in trainer.state.params["train"])


def test_cost_by_hand_and_no_product_of_the_two_factors():
    layers, width, ff, vocab, heads, batch, length, rank = 8, 320, 864, 512, 5, 8, 128, 8
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": ff,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 2048,
        }
    )
    parts = partition(config, (4, 5, 6), lora=make_lora(config, rank))
    params, frozen = split(parts.abstract(one_device(), jnp.float32))
    tokens = batch * length
    like = jax.ShapeDtypeStruct
    rows = TokenBatch(like((batch, length), np.int32), like((batch,), np.int32), like((batch, length), np.bool_))

    def gradient(remat):
        def loss(params, frozen, rows):
            return batch_loss(parts, {**params, "frozen": frozen}, rows, dtype=jnp.float32, remat=remat).loss

        return jax.grad(loss)

    weights, attention = 2 * tokens * (4 * width**2 + 3 * width * ff), 4 * tokens * length * width
    head = 2 * tokens * width * vocab
    adapters = 2 * tokens * rank * (4 * 2 * width + 3 * (width + ff))  # of one layer, forward
    # Forward; the gradient of the activations from the head to the lowest adapter; A and B, forward and twice back.
    expected = layers * (weights + attention) + head + (head + 4 * (weights + 2 * attention)) + 3 * 3 * adapters
    assert product_flops(gradient(False), params, frozen, rows) == expected
    memory = jax.jit(gradient(True)).lower(params, frozen, rows).compile().memory_analysis()
    assert memory.output_size_in_bytes <= 3 * 4 * rank * (4 * 2 * width + 3 * (width + ff)) + 1024


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((0,), "lora_rank=0: expected 1 to 8"),
        ((9,), "lora_rank=9: expected 1 to 8, the smallest side"),
        ((-1,), "lora_rank=-1"),
        ((2, -1.0), "lora_alpha=-1.0"),
        ((2, float("nan")), "lora_alpha=nan"),
        ((2, 4.0, ("qq",)), "lora_targets=qq: expected .*did you mean 'q'"),
    ],
)
def test_mistakes(asked, message):
    with pytest.raises(UserError, match=message):
        make_lora(CONFIG, *asked)
    assert make_lora(CONFIG, 12, targets=("q", "o")).alpha == 24  # k and v, the narrow ones, are not among them
