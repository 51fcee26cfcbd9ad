"""What the decoder offers beyond a plain forward pass: orders as data, packed rows, recomputation, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.family_models import BLOCKS, error, load_path, one_device, raw_config, sequences, states, write_model

from jaxcrit.models.cache import Cache
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Context, abstract, embed, forward, layer_windows, logits, run, run_span
from jaxcrit.models.sites import Edit, Tap
from jaxcrit.models.weights import to_hf
from jaxcrit.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return load_path(write_model(tmp_path_factory.mktemp("model"), raw_config("qwen2-mixed-sliding")))


def test_module_is_a_plain_pytree(decoder):
    """No parameter stands in two places, none is state: jax sees exactly the weights, by value."""
    weights = decoder.weights()
    assert len(jax.tree.leaves(decoder)) == len(weights) == len(nnx.to_flat_state(nnx.state(decoder)))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, decoder)
    np.testing.assert_array_equal(doubled.weights()["blocks.q"], 2 * weights["blocks.q"])
    np.testing.assert_array_equal(decoder.weights()["blocks.q"], weights["blocks.q"])


def test_abstract_has_the_shapes_without_the_memory(decoder):
    shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in abstract(decoder.config).weights().items()}
    assert shapes == {path: (leaf.shape, leaf.dtype) for path, leaf in decoder.weights().items()}


def test_order_of_blocks_is_data(decoder):
    """Any order of the blocks runs in one compiled program, and is what applying them one by one gives."""
    tokens, _ = sequences(96, lengths=(12,))
    tokens = jnp.asarray(tokens[:, :12])
    positions = jnp.arange(12)[None]
    context = Context(positions, *decoder.config.rope.cos_sin(positions, jnp.array([12])))
    config = decoder.config

    @jax.jit
    def ordered(slots, windows):
        return run(decoder.blocks, slots, embed(decoder, tokens), context, windows=windows).hidden

    for order in ([0, 1, 2], [2, 0, 0], [1, 1, 1]):
        windows = layer_windows(config, order)
        x = embed(decoder, tokens)
        for slot, window in zip(order, windows, strict=True):
            block = jax.tree.map(lambda leaf, slot=slot: leaf[slot], decoder.blocks)
            x, _ = block(x, context, window)
        assert error(np.asarray(ordered(jnp.array(order), windows)), np.asarray(x)) < 1e-6
    assert ordered._cache_size() == 1


def test_spans_over_a_cache_are_what_the_whole_is(decoder):
    """Two spans fill one cache as one span does; what entered each layer comes along."""
    config, tokens = decoder.config, jnp.asarray(sequences(96, lengths=(12,))[0][:, :12])
    positions = jnp.arange(12)[None]
    context = Context(positions, *config.rope.cos_sin(positions, jnp.array([12])))
    empty = jnp.zeros((config.num_layers, 1, 14, config.num_kv_heads, config.head_dim))
    entering = Tap(lambda site, before, after, positions: before, ("block",))

    @jax.jit
    def span(x, cache, start, stop):
        slots, windows = jnp.arange(config.num_layers), layer_windows(config)
        return run_span(decoder.blocks, slots, x, context, start, stop, windows=windows, cache=cache, tap=entering)

    x = embed(decoder, tokens)
    whole = span(x, Cache(empty, empty), 0, config.num_layers)
    below = span(x, Cache(empty, empty), 0, 1)
    above = span(below.hidden, below.cache, 1, config.num_layers)
    for one, other in ((above.hidden, whole.hidden), (above.cache.keys, whole.cache.keys)):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(above.taps["block"].at[0].set(x), whole.taps["block"])
    assert not below.cache.keys[1:].any() and not below.taps["block"][1:].any()
    stacked = run(decoder.blocks, None, x, context, windows=layer_windows(config), tap=entering)
    assert error(np.asarray(whole.hidden), np.asarray(stacked.hidden)) < 1e-6
    assert error(np.asarray(whole.taps["block"]), np.asarray(stacked.taps["block"])) < 1e-6


def test_packed_rows_see_only_their_own_segment(decoder):
    tokens, _ = sequences(96, lengths=(9, 15))
    apart, _ = states(decoder, tokens, np.array([9, 15], np.int32))
    packed = np.concatenate([tokens[0, :9], tokens[1, :15]])[None]
    positions = np.concatenate([np.arange(9), np.arange(15)])[None]
    segments = np.repeat([1, 2], [9, 15])[None]
    out = jax.jit(forward)(decoder, packed, positions=positions, segments=segments)
    expected = np.concatenate([apart[-1, 0, :9], apart[-1, 1, :15]])
    assert error(np.asarray(out.hidden[0]), expected) < 1e-5


@pytest.mark.parametrize("case", ["gemma2", "olmo2"])
def test_a_mesh_changes_no_family(case, tmp_path):
    """A norm over all heads sums over devices; caps and norms behind the halves are of what they have summed."""
    path, tokens = write_model(tmp_path, raw_config(case)), sequences(96, lengths=(12, 12, 12, 12))[0]

    one, many = (
        jax.jit(lambda decoder: logits(decoder, forward(decoder, tokens).hidden))(load_path(path, mesh=mesh))
        for mesh in (one_device(), make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    )
    assert error(np.asarray(many), np.asarray(one)) < 1e-5


def test_what_a_family_does_not_use_is_not_computed():
    """Scales of 1 and layers that all rotate alike leave the very program of a model without them."""

    def program(**changes):
        config = ModelConfig.from_hf({**raw_config("llama-gqa"), **changes})

        def run(decoder, tokens):
            return logits(decoder, forward(decoder, tokens).hidden)

        return str(jax.make_jaxpr(run)(abstract(config), jax.ShapeDtypeStruct((2, 8), jnp.int32)))

    plain, granite = program(), {"model_type": "granite", "attention_multiplier": 8**-0.5}
    assert program(**granite) == plain
    assert program(model_type="smollm3", tie_word_embeddings=False, no_rope_layers=[1, 1, 1]) == plain
    assert program(model_type="gemma3_text", sliding_window=4) != plain != program(**granite, logits_scaling=2.0)


def test_recomputing_activations_changes_no_gradient(decoder):
    tokens, lengths = sequences(96, lengths=(12, 7))

    def loss(decoder, remat):
        return jnp.mean(logits(decoder, forward(decoder, tokens, lengths=lengths, remat=remat).hidden) ** 2)

    kept, recomputed = (jax.jit(jax.grad(loss), static_argnums=1)(decoder, remat) for remat in (False, True))
    for ours, theirs in zip(jax.tree.leaves(recomputed), jax.tree.leaves(kept), strict=True):
        assert error(np.asarray(ours), np.asarray(theirs)) < 1e-5


def test_float32_weights_compute_in_bfloat16_on_request(decoder):
    tokens, lengths = sequences(96)
    low = jax.jit(lambda decoder: forward(decoder, tokens, lengths=lengths, dtype=jnp.bfloat16).hidden)(decoder)
    high, _ = states(decoder, tokens, lengths)
    assert low.dtype == jnp.bfloat16
    assert 1e-4 < error(np.asarray(low, np.float32), high[-1]) < 0.1


def test_tensors_of_some_layers(decoder):
    """Asked for some layers, exactly their tensors; asked for all, those outside the blocks too."""
    names = {name for name, _ in to_hf(decoder, range(1, 2))}
    assert not list(to_hf(decoder, range(0)))
    assert names and all(name.startswith("model.layers.1.") for name in names)
    rest = {name for name, _ in to_hf(decoder)} - {name for name, _ in to_hf(decoder, range(0, 3))}
    assert rest == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_windows_of_an_order_follow_the_layers():
    config = ModelConfig.from_hf(raw_config("qwen2-mixed-sliding"))
    windows = layer_windows(config, [2, 0])
    assert windows is not None and windows[0] == 6 and windows[1] > config.max_length
    assert layer_windows(config, [0]) is None
    rotated = ModelConfig.from_hf(raw_config("smollm3-sliding"))  # the first layer has a window and no positions
    np.testing.assert_array_equal(layer_windows(rotated, [1, 0]), [[2**30, 0], [6, 1]])


def test_an_edit_sees_every_site_with_its_steps_data(decoder):
    """Closing one layer's gate by data skips that block; each layer's own data reaches it and no other."""
    tokens, _ = sequences(96, lengths=(12,))
    tokens = jnp.asarray(tokens[:, :12])
    layers = decoder.config.num_layers

    @jax.jit
    def states(gates):
        def gate(site, before, after, open_, positions):
            return jnp.where(open_, after, before)

        return forward(decoder, tokens, edit=Edit(gate, ("attn", "mlp")), edits=gates, tap=BLOCKS).taps["block"]

    plain = jax.jit(lambda: forward(decoder, tokens, tap=BLOCKS).taps["block"])()
    np.testing.assert_array_equal(states(jnp.ones(layers, bool)), plain)
    skipped = states(jnp.arange(layers) != 1)
    np.testing.assert_array_equal(skipped[0], plain[0])
    np.testing.assert_array_equal(skipped[1], plain[0])
    assert not np.allclose(skipped[2], plain[2], atol=1e-3)
