"""What a step costs, by XLA's memory analysis and by counted products: nothing runs, so nothing here is about time.

The model is that of STACK's prototypes: 32 layers, width 320, vocabulary 4,096, batch 8 x 128, float32.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrit.core.auxiliaries import Adversarial
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import abstract, forward
from jaxcrit.models.partition import partition, size, split
from jaxcrit.models.sites import Tap
from jaxcrit.models.weights import table
from jaxcrit.parallel.accounting import product_flops
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.training.objectives import TokenBatch, batch_loss, batch_losses
from jaxcrit.training.optimizer import make_optimizer, make_schedule
from jaxcrit.training.step import abstract_state, make_step

LAYERS, WIDTH, FF, VOCAB, HEADS, BATCH, LENGTH = 32, 320, 864, 4096, 5, 8, 128
CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 2048,
    }
)
MIDDLE, SCATTERED = range(20, 25), (3, 9, 15, 21, 27)
BLOCK_WEIGHTS = 4 * WIDTH**2 + 3 * WIDTH * FF
TOKENS = BATCH * LENGTH
# One block forward: two operations per weight and token, and for each query the scores and the mix of all keys.
FORWARD = 2 * TOKENS * BLOCK_WEIGHTS + 4 * TOKENS * LENGTH * WIDTH
HEAD = 2 * TOKENS * WIDTH * VOCAB


def shapes(layers, outside=(), config=CONFIG):
    parts = partition(config, layers, outside)
    mesh = make_mesh(None, jax.devices()[:1])
    params, frozen = split(parts.abstract(mesh, jnp.float32))
    row = functools.partial(jax.ShapeDtypeStruct)
    batch = TokenBatch(row((BATCH, LENGTH), np.int32), row((BATCH,), np.int32), row((BATCH, LENGTH), np.bool_))
    return parts, params, frozen, batch


def gradient(parts, form=None, remat=True):
    def loss(params, frozen, batch):
        return batch_loss(parts, {**params, "frozen": frozen}, batch, dtype=jnp.float32, remat=remat, form=form).loss

    return jax.grad(loss)


def temporaries(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes / 2**20


def whole_step(layers, config=CONFIG, tokens=(1, BATCH, LENGTH)):
    parts, params, frozen, _ = shapes(layers, config=config)
    optimizer = make_optimizer("adamw", make_schedule("constant", 1e-3, 10), parts, clip=1.0)
    state = abstract_state(parts, optimizer, params)
    row = functools.partial(jax.ShapeDtypeStruct)
    micro = TokenBatch(row(tokens, np.int32), row(tokens[:2], np.int32), row(tokens, np.bool_))
    return make_step(parts, optimizer, dtype=jnp.float32), state, frozen, micro


def test_gradients_of_the_middle_five():
    parts, params, frozen, batch = shapes(MIDDLE)
    assert temporaries(gradient(parts), params, frozen, batch) <= 80


def test_the_whole_adamw_step_and_its_state():
    step, state, frozen, batch = whole_step(MIDDLE)
    memory = step.lower(state, frozen, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes / 2**20 <= 100
    trained = 4 * 5 * (BLOCK_WEIGHTS + 2 * WIDTH)
    assert size(state.params) == trained
    assert size(state.optimizer) - 2 * trained <= 16  # two moments, and counters
    assert memory.alias_size_in_bytes >= 3 * trained  # donated: updated in place
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1024  # nothing of the frozen layers comes out


@pytest.mark.parametrize(("form", "most"), [("runs", 320), ("gaps", 110)])
def test_a_scattered_set_in_both_forms(form, most):
    parts, params, frozen, batch = shapes(SCATTERED)
    assert temporaries(gradient(parts, form), params, frozen, batch) <= most


def test_states_of_all_layers_take_no_gradient_of_the_weights_each():
    parts, params, frozen, batch = shapes(range(LAYERS))
    batch = dataclasses.replace(batch, numbers=jax.ShapeDtypeStruct((BATCH,), np.int32))
    objective = Adversarial("states", 0.05, 3, 0, 1.0)

    def loss(params, frozen, batch):
        found = batch_losses(parts, {**params, "frozen": frozen}, batch, [objective], dtype=jnp.float32)
        return found[0].loss + found[1].loss

    weights = 4 * LAYERS * BLOCK_WEIGHTS / 2**20
    assert temporaries(jax.grad(loss), params, frozen, batch) <= 4 * weights  # a scan for each layer: 15 times


@pytest.mark.parametrize("trained", [MIDDLE, SCATTERED, range(27, 32), range(5), range(32)], ids=str)
def test_no_backward_below_the_lowest_trained_layer(trained):
    parts, params, frozen, batch = shapes(trained)
    products = 2 * TOKENS * BLOCK_WEIGHTS
    # Hand count: forward; from the head down to the lowest trained block the gradient of the activations; in trained
    # blocks that of the weights.
    to_lowest = HEAD + (LAYERS - min(trained)) * (products + 8 * TOKENS * LENGTH * WIDTH)
    expected = LAYERS * FORWARD + HEAD + to_lowest + len(trained) * products
    assert product_flops(gradient(parts, "runs", remat=False), params, frozen, batch) == expected


def moved(compiled, config):
    """Instructions of a compiled program that transpose or copy an array of as many elements as a layer's matrix."""
    layers = {np.prod(row.hf_shape(config)) for row in table(config) if row.stacked and len(row.groups) == 2}
    found = re.findall(r"= \w+\[([\d,]+)\]\S* (?:transpose|copy)\(", compiled.as_text())
    assert found  # activations are moved
    return [shape for shape in found if np.prod([int(size) for size in shape.split(",")]) in layers]


def test_no_weight_is_transposed_or_copied_in_the_blocks():
    """Sizes of activations, T = 251 tokens of 2 rows, are no weight's."""
    config = ModelConfig.from_hf({**CONFIG.to_hf(), "num_attention_heads": 10, "num_key_value_heads": 5})
    row = functools.partial(jax.ShapeDtypeStruct)

    def capture(decoder, tokens):
        return forward(decoder, tokens, tap=Tap(lambda site, before, after, positions: after[:, -1], ("block",))).taps

    assert not moved(jax.jit(capture).lower(abstract(config), row((2, 251), np.int32)).compile(), config)
    step, state, frozen, batch = whole_step(MIDDLE, config, (1, 2, 251))
    assert not moved(step.lower(state, frozen, batch).compile(), config)
