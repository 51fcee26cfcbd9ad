"""Frequencies, and which of longrope's two sets a sequence gets."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.family_models import load_path, raw_config, sequences, states, write_model

from jaxcrit.models.config import ModelConfig
from jaxcrit.models.rope import rotate


def rope_of(**parameters):
    return ModelConfig.from_hf({**raw_config("llama-gqa"), "rope_parameters": parameters}).rope


def test_default_frequencies():
    np.testing.assert_allclose(
        rope_of(rope_type="default", rope_theta=100.0).frequencies, 100.0 ** -np.array([0, 0.25, 0.5, 0.75]), rtol=1e-6
    )


def test_linear_divides_every_frequency():
    plain, scaled = rope_of(rope_type="default"), rope_of(rope_type="linear", factor=4.0)
    np.testing.assert_array_equal(np.array(plain.frequencies) / 4, scaled.frequencies)


def test_llama3_keeps_fast_rotations_and_slows_slow_ones():
    parameters = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    plain = np.array(rope_of(rope_type="default").frequencies)
    ratio = plain / rope_of(rope_type="llama3", factor=8.0, **parameters).frequencies
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelength > 16], 8, rtol=1e-6)
    assert np.all((ratio >= 1 - 1e-6) & (ratio <= 8 + 1e-6))


def test_yarn_scales_cosine_and_sine():
    rope = rope_of(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    assert rope.scale == pytest.approx(0.1 * np.log(4) + 1)
    cos, sin = rope.cos_sin(jnp.array([[0, 3]]), jnp.array([2]))
    np.testing.assert_allclose(np.hypot(cos, sin), rope.scale, rtol=1e-6)


def test_rotation_is_relative_and_leaves_the_rest():
    """Queries and keys meet by their distance alone; dimensions beyond the rotary part pass through."""
    parameters = {"rope_type": "default", "partial_rotary_factor": 0.5}  # whole heads elsewhere, whatever a file says
    rope = ModelConfig.from_hf({**raw_config("phi3-mha"), "rope_parameters": parameters}).rope
    assert rope.rotary_dim == 4
    q, k = np.random.RandomState(0).standard_normal((2, 1, 1, 1, 8)).astype(np.float32)

    def meet(first, second):
        rotated = [
            rotate(jnp.asarray(x), *rope.cos_sin(jnp.array([[at]]), jnp.array([9])))
            for x, at in ((q, first), (k, second))
        ]
        np.testing.assert_array_equal(rotated[0][..., 4:], q[..., 4:])
        return float(jnp.vdot(rotated[0][..., :4], rotated[1][..., :4]))

    assert meet(5, 3) == pytest.approx(meet(7, 5), abs=1e-5)
    assert abs(meet(5, 3) - meet(5, 4)) > 1e-3


def test_a_layer_without_positions_is_not_turned_by_a_bit():
    rope = rope_of(rope_type="yarn", factor=4.0).still()
    q = np.random.default_rng(0).normal(size=(1, 5, 2, 10)).astype(np.float32)
    np.testing.assert_array_equal(rotate(jnp.asarray(q), *rope.cos_sin(jnp.arange(5)[None], jnp.array([5]))), q)


def test_longrope_follows_each_samples_own_length(tmp_path):
    """Neither the padded length nor a longer neighbour in the batch moves a sequence to the long factors."""
    decoder = load_path(write_model(tmp_path, raw_config("phi3-longrope")))
    tokens, _ = sequences(96, lengths=(24, 24, 24))
    lengths = np.array([24, 16, 17], np.int32)
    hidden, _ = states(decoder, tokens, lengths)
    for row, length in enumerate(lengths):
        alone, _ = states(decoder, tokens[row : row + 1, :length], lengths[row : row + 1])
        # Another shape, another order of the sums: 2 of 1,536 numbers of size 3 differ by 1.1e-5 on jax 0.12.
        np.testing.assert_allclose(hidden[:, row, :length], alone[:, 0], rtol=0, atol=2e-5)
    short, _ = states(decoder, tokens[1:2], np.array([16], np.int32))
    long, _ = states(decoder, tokens[1:2], np.array([17], np.int32))
    assert np.abs(short - long)[:, 0, 1:].max() > 1e-2
