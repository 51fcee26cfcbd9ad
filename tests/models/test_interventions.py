"""Interventions: what they change, what they leave bit for bit, and that they are data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_models import load_path, raw_config, sequences, write_model

from jaxcrit.data.batches import Batch
from jaxcrit.evidence.capture import capture
from jaxcrit.models.decoder import forward, logits
from jaxcrit.models.generation import compiled_programs, decode, generate, prefill
from jaxcrit.models.interventions import Patch, edit, intervention, patch
from jaxcrit.models.sites import Edit, Tap
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.similarity import principal_components

LENGTHS = np.array([9, 3, 5, 8, 7, 2, 6, 4])
LAYERS, BATCH, WIDTH, NEW = 3, len(LENGTHS), 32, 6
SHAPE = (LAYERS, BATCH, WIDTH)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return load_path(write_model(tmp_path_factory.mktemp("model"), raw_config("llama-gqa")))


@pytest.fixture(scope="module")
def tokens():
    return sequences(96, lengths=tuple(LENGTHS))[0][:, :9]


@pytest.fixture(scope="module")
def hidden(decoder, tokens):
    batch = Batch(tokens, LENGTHS, np.arange(BATCH))
    return np.asarray(capture(decoder, [batch], BATCH, mesh=make_mesh({"data": 1}, jax.devices()[:1])).hidden)


@pytest.fixture(scope="module")
def components(hidden):
    return principal_components(hidden, 3)


@pytest.fixture(scope="module")
def prompts(decoder, tokens):
    return prefill(decoder, tokens, LENGTHS, NEW)


@jax.jit
def first_step(decoder, prompts, edits):
    """States ``[L, B, D]`` of the last prompt token, as the first step of the loop computes them."""
    tokens, lengths, cache = prompts
    last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
    tap = Tap(lambda site, before, after, positions: after[:, 0], ("block",))
    positions = lengths[:, None] - 1
    out = forward(decoder, last, positions=positions, lengths=lengths, cache=cache, edit=edit, edits=edits, tap=tap)
    return out.taps["block"]


def states(decoder, prompts, edits):
    return np.asarray(first_step(decoder, (prompts.tokens, prompts.lengths, prompts.cache), edits))


def removal(components, layer, chosen):
    return intervention(SHAPE, shifts={layer: -components.part(chosen)[layer]}, rank=3)


def test_the_empty_intervention_is_bit_identical_to_none(decoder, prompts, tokens):
    plain = decode(decoder, prompts)
    empty = decode(decoder, prompts, edit=edit, edits=intervention(SHAPE, rank=3))
    assert np.asarray(plain.scores).tobytes() == np.asarray(empty.scores).tobytes()
    assert plain.token_ids == empty.token_ids == generate(decoder, tokens, LENGTHS, NEW).token_ids


def test_removal_at_the_first_step_is_removal_about_the_mean(decoder, prompts, hidden, components):
    """The paper's constant vector, and the projection, against mean + (1 - V'V)(x - mean) in float64."""
    chosen, layer = [0, 2], 1
    basis = components.directions[layer][chosen].astype(np.float64)
    centred = hidden[layer] - hidden[layer].mean(axis=0, dtype=np.float64)
    expected = hidden[layer] - centred @ basis.T @ basis
    project = intervention(SHAPE, projections={layer: (components.mean[layer], basis)}, rank=3)
    for edits in (removal(components, layer, chosen), project):
        found = states(decoder, prompts, edits)[layer]
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(expected - hidden[layer]).max() > 0.1 * np.abs(hidden[layer]).max()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_an_edit_leaves_the_layers_below_bit_identical(decoder, prompts, components, layer):
    plain = states(decoder, prompts, intervention(SHAPE, rank=3))
    edited = states(decoder, prompts, removal(components, layer, [0, 1]))
    assert plain[:layer].tobytes() == edited[:layer].tobytes()
    assert not np.isclose(plain[layer:], edited[layer:]).all(axis=(1, 2)).any()


def test_paper_mode_subtracts_the_same_vector_at_every_step_and_project_the_current_one(decoder, tokens, components):
    """Against a loop that runs the whole sequence again and edits every position from the last prompt token on."""
    layer, chosen = 1, [0, 1]
    basis = components.directions[layer][chosen]
    for edits in (
        removal(components, layer, chosen),
        intervention(SHAPE, projections={layer: (components.mean[layer], basis)}, rank=3),
    ):
        found = generate(decoder, tokens, LENGTHS, NEW, edit=edit, edits=edits)
        assert found.token_ids == recomputed(decoder, tokens, LENGTHS, edits)
        assert found.token_ids != generate(decoder, tokens, LENGTHS, NEW).token_ids


def test_the_first_new_token_has_data_of_its_own(decoder, prompts, tokens, components):
    """All nine pairs of removals, the empty one among them, against a loop over whole sequences; nothing compiles."""
    empty, one, other = intervention(SHAPE, rank=3), *(removal(components, layer, [0, 1]) for layer in (1, 2))
    decode(decoder, prompts, edit=edit, edits=one)
    before, answers = compiled_programs(), []
    for first in (empty, one, other):
        for later in (empty, one, other):
            answers.append(decode(decoder, prompts, edit=edit, edits=later, first=first).token_ids)
            assert answers[-1] == recomputed(decoder, tokens, LENGTHS, later, first)
    assert compiled_programs() == before
    assert len({str(answer) for answer in answers}) > 6


@jax.jit
def whole(decoder, sequence, ends, behind, edits):
    """Logits of a sequence run at once, edited with the first of two data where ``behind`` is 0, then the second."""

    def some(site, before, after, data, positions):
        first, later = (edit.change(site, before, after, one, positions) for one in data)
        return jnp.select([behind == 0, behind > 0], [first, later], after)

    out = forward(decoder, sequence, lengths=ends, edit=Edit(some, edit.sites), edits=edits)
    return logits(decoder, out.hidden)


def recomputed(decoder, tokens, lengths, edits, first=None):
    sequence = np.pad(tokens, ((0, 0), (0, NEW)))
    behind = (np.arange(sequence.shape[1]) - lengths[:, None] + 1)[..., None]
    for step in range(NEW):
        data = (edits if first is None else first, edits)
        scores = np.asarray(whole(decoder, sequence, lengths + step, behind, data))
        for row, end in enumerate(lengths + step):
            sequence[row, end] = scores[row, end - 1].argmax()
    return [sequence[row, start : start + NEW].tolist() for row, start in enumerate(lengths)]


def test_layers_components_and_modes_are_data(decoder, prompts, components):
    decode(decoder, prompts, edit=edit, edits=intervention(SHAPE, rank=3))
    before = compiled_programs()
    for layer in range(LAYERS):
        decode(decoder, prompts, edit=edit, edits=removal(components, layer, [layer]))
        basis = components.directions[layer][:2]
        decode(
            decoder,
            prompts,
            edit=edit,
            edits=intervention(SHAPE, projections={layer: (components.mean[layer], basis)}, rank=3),
        )
    assert compiled_programs() == before


def test_an_edit_also_holds_where_longropes_boundary_is_passed(tmp_path):
    """At the boundary the cache is computed anew: with the edit of the tokens it acted on, and without elsewhere."""
    decoder = load_path(write_model(tmp_path, raw_config("phi3-longrope")))
    tokens, shift = sequences(96, lengths=(13,))[0][:, :13], np.random.default_rng(0).normal(0, 1, WIDTH)
    edits = intervention((LAYERS, 1, WIDTH), shifts={1: shift.astype(np.float32)})
    found = generate(decoder, tokens, np.array([13]), NEW, edit=edit, edits=edits)
    assert found.token_ids == recomputed(decoder, tokens, np.array([13]), edits)
    assert found.token_ids != generate(decoder, tokens, np.array([13]), NEW).token_ids
    lengths, empty = np.array([13]), intervention((LAYERS, 1, WIDTH))
    begun = prefill(decoder, tokens, lengths, NEW)
    for first, later in ((edits, empty), (empty, edits)):
        found = decode(decoder, begun, edit=edit, edits=later, first=first)
        assert found.token_ids == recomputed(decoder, tokens, lengths, later, first)


def test_a_patch_puts_vectors_at_positions(decoder, tokens):
    """Each row at positions of its own: the stream behind a block, or what its halves add; elsewhere bit for bit."""
    rng = np.random.default_rng(5)
    at = np.full((LAYERS, BATCH, 2), -1, np.int32)
    at[:, :, 0] = LENGTHS - 1
    at[:, 0, 1] = 3
    sites = ("attn", "mlp", "block")
    values = {site: rng.normal(size=(LAYERS, BATCH, 2, WIDTH)).astype(np.float32) for site in sites}
    tap = Tap(lambda site, before, after, positions: (before, after), sites)

    @jax.jit
    def taps(active):
        data = Patch(at, active, values)
        return forward(decoder, jnp.asarray(tokens), edit=patch, edits=data, tap=tap).taps

    none = {site: np.zeros(LAYERS, bool) for site in sites}
    plain = forward(decoder, jnp.asarray(tokens), tap=tap).taps
    idle = taps(none)
    jax.tree.map(np.testing.assert_array_equal, idle, jax.jit(lambda: plain)())
    here = (np.arange(9) == at[1, :, :, None]).any(axis=1)
    for site in sites:
        before, after = (np.asarray(part[1]) for part in taps({**none, site: np.arange(LAYERS) == 1})[site])
        put = after if site == "block" else after - before
        found = put[np.arange(BATCH), LENGTHS - 1]
        np.testing.assert_allclose(found, values[site][1, :, 0], rtol=0, atol=0 if site == "block" else 1e-6)
        np.testing.assert_allclose(put[0, 3], values[site][1, 0, 1], rtol=0, atol=0 if site == "block" else 1e-6)
        np.testing.assert_array_equal(after[~here], np.asarray(idle[site][1][1])[~here])
