"""Capture: the same states whatever the batching, order, padding, devices; and what each position means."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_models import BOUND, MESHES, error, load_path, one_device, raw_config, states, write_model

from jaxcrit.data.batches import Budget, make_batches
from jaxcrit.data.templates import Example
from jaxcrit.evidence.capture import capture, compiled_steps
from jaxcrit.models.decoder import embed
from jaxcrit.parallel.mesh import make_mesh, parse_mesh

LENGTHS = (5, 24, 1, 16, 17, 11)
# A sliding window, and a RoPE that differs between prompts of one batch: whatever can depend on the batch does.
CASE = "phi3-longrope-sliding"


def examples(lengths=LENGTHS):
    tokens = np.random.RandomState(7).randint(0, 96, (len(lengths), max(lengths))).astype(np.int32)
    return [Example(f"id{row}", tokens[row, :length], length, "", None) for row, length in enumerate(lengths)]


@dataclasses.dataclass
class Truth:
    """A model on disk and every prompt's states, each prompt run alone and unpadded."""

    path: str
    hidden: list  # per prompt [L, T, D]
    embed: list  # per prompt [T, D]

    def at(self, position):
        """Hidden states [L, N, D] and embeddings [N, D] of a position, in plain numpy."""
        pick = {
            "last": lambda state: state[..., -1:, :],
            "mean": lambda state: state.mean(axis=-2, keepdims=True),
            "all": lambda state: state,
        }[position]
        return (np.concatenate([pick(state) for state in kind], axis=-2) for kind in (self.hidden, self.embed))


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    path = write_model(tmp_path_factory.mktemp("model"), raw_config(CASE))
    decoder, hidden, inputs = load_path(path), [], []
    for example in examples():
        alone = example.token_ids[None]
        hidden.append(states(decoder, alone, np.array([alone.shape[1]], np.int32))[0][:, 0])
        inputs.append(np.asarray(embed(decoder, alone)[0]))
    return Truth(path, hidden, inputs)


def captured(path, batches, mesh=None, dtype="", **options):
    mesh = mesh or one_device()
    return capture(load_path(path, mesh=mesh, dtype=dtype), batches, len(LENGTHS), mesh=mesh, **options)


@pytest.mark.parametrize("position", ["last", "mean", "all"])
def test_position_and_embedding(position, truth):
    got = captured(truth.path, make_batches(examples(), 4), position=position, with_embed=True)
    hidden, embedding = truth.at(position)
    assert got.hidden.dtype == got.embed.dtype == jnp.float32
    for layer in range(3):
        assert error(np.asarray(got.hidden[layer]), hidden[layer]) <= BOUND
    assert error(np.asarray(got.embed), embedding) <= BOUND
    counts = LENGTHS if position == "all" else np.ones_like(LENGTHS)
    np.testing.assert_array_equal(got.units, np.repeat(np.arange(len(LENGTHS)), counts))
    assert got.num_tokens == sum(LENGTHS) <= got.padded_tokens


BATCHINGS = {
    "one at a time": (1, None),
    "more rows than prompts": (8, None),
    "one shape": (4, [(4, 24)]),
    "a wide shape": (4, [(4, 40)]),
    "many lengths": (2, [(2, 4), (2, 8), (2, 16), (2, 24)]),
    "many sizes": (Budget(4), [(4, 8), (1, 16), (2, 24)]),
    "as many as pay": (Budget(4, shape=0), None),
}


@pytest.mark.parametrize("batching", BATCHINGS)
def test_shapes_and_padding_do_not_matter(batching, truth):
    budget, shapes = BATCHINGS[batching]
    got = captured(truth.path, make_batches(examples(), budget, shapes))
    hidden, _ = truth.at("last")
    assert error(np.asarray(got.hidden), hidden) <= BOUND
    assert got.embed is None


def test_order_of_samples_and_what_padding_holds_do_not_matter(truth):
    order = np.random.RandomState(0).permutation(len(LENGTHS))
    shuffled = make_batches([examples()[row] for row in order], 4)
    for batch in shuffled:
        padding = np.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]
        batch.tokens[padding] = 95
    hidden, _ = truth.at("last")
    assert error(np.asarray(captured(truth.path, shuffled).hidden), hidden[:, order]) <= BOUND


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("position", ["last", "all"])
def test_devices_do_not_matter(mesh, position, truth):
    mesh = make_mesh(parse_mesh(mesh))
    got = captured(truth.path, make_batches(examples(), 8, [(8, 24)]), mesh=mesh, position=position)
    hidden, _ = truth.at(position)
    assert error(np.asarray(got.hidden), hidden) <= BOUND
    assert got.hidden.sharding.is_fully_replicated and got.hidden.sharding.device_set == set(jax.devices())


def test_one_compile_per_shape_and_mesh(truth):
    """Neither the number of prompts, nor a second dataset, nor a rerun compiles again."""
    decoder, mesh = load_path(truth.path), one_device()
    before = compiled_steps()
    for count in (6, 5, 6):
        prompts = examples(LENGTHS[:count])
        got = capture(decoder, make_batches(prompts, 1, [(1, 9), (1, 18), (1, 27)]), count, mesh=mesh)
        assert got.num_buckets == 3 and got.hidden.shape == (3, count, 32)
    assert compiled_steps() - before == 3


def test_bfloat16_states_are_those_of_float32_to_its_precision(truth):
    got = captured(truth.path, make_batches(examples(), 4, [(4, 24)]), dtype="bfloat16")
    hidden, _ = truth.at("last")
    assert got.hidden.dtype == jnp.float32
    difference = error(np.asarray(got.hidden), hidden)
    assert 1e-4 < difference < 0.1


def test_progress_counts_prompts_not_padding(truth):
    seen = []
    captured(truth.path, make_batches(examples(), 4, [(4, 24)]), progress=lambda *step: seen.append(step))
    assert seen == [(4, 6), (6, 6)]
