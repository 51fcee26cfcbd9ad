"""Edits and taps at the named sites, against blocks that are run by hand; a site that nobody reads costs nothing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_models import error, load_path, raw_config, sequences, write_model

from jaxcrit.core.errors import UserError
from jaxcrit.models.cache import Cache
from jaxcrit.models.decoder import Context, embed, forward, layer_windows, run
from jaxcrit.models.sites import SITES, Edit, Tap
from jaxcrit.models.weights import halves, table

LENGTH, LAYERS, WIDTH = 12, 3, 32
STREAM = tuple(site for site in SITES if site not in ("ff", "router"))  # the places of the residual stream
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return load_path(write_model(tmp_path_factory.mktemp("model"), raw_config("qwen2-mixed-sliding")))


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(sequences(96, lengths=(LENGTH, LENGTH))[0][:, :LENGTH])


@pytest.fixture(scope="module")
def data():
    """By layer, a position and what is added there."""
    shift = np.random.default_rng(0).normal(size=(LAYERS, WIDTH)).astype(np.float32)
    return jnp.array([9, 3, 8]), jnp.asarray(shift)


def change(site, before, after, data, positions):
    """At one position, doubles what the site added and adds a vector; at the embedding, with the first layer's data."""
    place, shift = (part[0] for part in data) if site == "embed" else data
    return jnp.where((positions == place)[..., None], after + (after - before) + shift, after)


def read(site, before, after, positions):
    return {"before": before, "after": after, "site": len(site), "positions": positions}


def keep(site, before, after, positions):
    return after


def halves_of(block, x, context, window):
    """The stream behind attention, and behind the MLP."""
    middle = x + block.attention(block.norm(x, "attn_norm"), context, window, None)[0]
    return middle, middle + block.mlp(block.norm(middle, "mlp_norm"))


def by_hand(decoder, tokens, changed, data):
    """Runs block by block, changed at one site or none; by site, the streams before and after it."""
    config = decoder.config
    context = Context(POSITIONS, *config.rope.cos_sin(POSITIONS, jnp.full(2, LENGTH)))
    seen = {site: [] for site in STREAM}

    def visit(site, before, after, layer):
        place, shift = data[0][layer], data[1][layer]
        if site == changed:
            after = after.at[:, place].add(after[:, place] - before[:, place] + shift)
        seen[site].append((before, after))
        return after

    x = embed(decoder, tokens)
    x = visit("embed", x, x, 0)
    for layer, window in enumerate(layer_windows(config)):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], decoder.blocks)
        middle = visit("attn", x, halves_of(block, x, context, window)[0], layer)
        after = visit("mlp", middle, middle + block.mlp(block.norm(middle, "mlp_norm")), layer)
        x = visit("block", x, after, layer)
    return x, {site: np.array(streams) for site, streams in seen.items()}


@pytest.mark.parametrize("site", STREAM)
def test_an_edit_at_a_site_and_a_position_is_that_of_a_loop_over_blocks(decoder, tokens, data, site):
    edit, plain = Edit(change, (site,)), by_hand(decoder, tokens, None, data)[0]
    found = jax.jit(lambda data: forward(decoder, tokens, edit=edit, edits=data).hidden)(data)
    expected, _ = by_hand(decoder, tokens, site, data)
    assert error(np.asarray(found), np.asarray(expected)) < 1e-6
    np.testing.assert_array_equal(found[:, :3], jax.jit(forward)(decoder, tokens).hidden[:, :3])  # before all of them
    assert error(np.asarray(plain), np.asarray(expected)) > 0.01


@pytest.mark.parametrize("changed", [None, "attn", "block"])
def test_a_tap_at_every_site_reads_the_streams_of_a_loop_over_blocks(decoder, tokens, data, changed):
    """With an edit, what the edit left."""
    edit = None if changed is None else Edit(change, (changed,))
    taps = jax.jit(lambda data: forward(decoder, tokens, edit=edit, edits=data, tap=Tap(read, STREAM)).taps)(data)
    _, expected = by_hand(decoder, tokens, changed, data)
    assert set(taps) == set(STREAM)
    for site, found in taps.items():
        layers = () if site == "embed" else (LAYERS,)
        streams = expected[site][0] if site == "embed" else expected[site].swapaxes(0, 1)
        for one, value in zip(("before", "after"), streams, strict=True):
            assert error(np.asarray(found[one]), value) < 1e-6, (site, one)
        np.testing.assert_array_equal(found["site"], np.full(layers, len(site)))
        np.testing.assert_array_equal(found["positions"], np.broadcast_to(POSITIONS, (*layers, *POSITIONS.shape)))


def test_what_down_reads_is_read_and_changed(decoder, tokens):
    """What the MLP adds is ``down`` of what the tap reads there, and follows what an edit leaves there."""
    tap = Tap(lambda site, before, after, positions: after if site == "ff" else after - before, ("ff", "mlp"))
    halve = Edit(lambda site, before, after, data, positions: after * data, ("ff",))
    taps = jax.jit(lambda data: forward(decoder, tokens, edit=halve, edits=data, tap=tap).taps)
    for factors in (jnp.ones(LAYERS), jnp.array([1.0, 0.5, 0.0])):
        found = taps(factors)
        expected = jnp.einsum("lbtf,ldf->lbtd", found["ff"], decoder.blocks.down[...], precision="highest")
        assert found["ff"].shape[-1] == decoder.config.ff_width
        assert error(np.asarray(found["mlp"]), np.asarray(expected)) < 1e-5
    assert not np.asarray(found["mlp"][2]).any() and np.asarray(found["mlp"][1]).any()


def test_an_offset_is_added_to_the_embeddings(decoder, tokens):
    offset = jnp.asarray(np.random.default_rng(2).normal(size=(2, LENGTH, WIDTH)), jnp.float32)
    found = forward(decoder, tokens, offset=offset, tap=Tap(keep, ("embed",)))
    np.testing.assert_array_equal(found.taps["embed"], embed(decoder, tokens) + offset)
    context = Context(POSITIONS, *decoder.config.rope.cos_sin(POSITIONS, jnp.full(2, LENGTH)))
    x = embed(decoder, tokens) + offset
    expected = run(decoder.blocks, jnp.arange(LAYERS), x, context, windows=layer_windows(decoder.config)).hidden
    assert error(np.asarray(found.hidden), np.asarray(expected)) < 1e-6


def test_a_tap_gives_the_sites_it_names_alone(decoder, tokens):
    taps = jax.jit(lambda sites: forward(decoder, tokens, tap=Tap(keep, sites)).taps, static_argnums=0)
    assert {site: value.shape for site, value in taps(("embed", "mlp")).items()} == {
        "embed": (2, LENGTH, WIDTH),
        "mlp": (LAYERS, 2, LENGTH, WIDTH),
    }
    assert taps(()) == forward(decoder, tokens).taps == {}


@pytest.mark.parametrize("site", STREAM)
def test_positions_are_absolute_behind_a_cache(decoder, tokens, data, site):
    """The last tokens behind a cache of the first are edited at the same positions as in one pass over all."""
    edit, first = Edit(change, (site,)), 7
    shape = (LAYERS, 2, LENGTH, decoder.config.num_kv_heads, decoder.config.head_dim)
    empty = Cache(jnp.zeros(shape), jnp.zeros(shape))
    whole = forward(decoder, tokens, edit=edit, edits=data).hidden
    begun = forward(decoder, tokens[:, :first], cache=empty, edit=edit, edits=data)
    rest = forward(decoder, tokens[:, first:], positions=POSITIONS[:, first:], cache=begun.cache, edit=edit, edits=data)
    assert error(np.asarray(rest.hidden), np.asarray(whole[:, first:])) < 1e-5
    assert error(np.asarray(begun.hidden), np.asarray(whole[:, :first])) < 1e-5
    plain = forward(decoder, tokens[:, first:], positions=POSITIONS[:, first:], cache=begun.cache)
    assert error(np.asarray(plain.hidden), np.asarray(whole[:, first:])) > 0.01


def test_layers_and_positions_are_data(decoder, tokens, data):
    """Whichever layer and position: one compile, whose body calls the edit and the tap once at each site."""
    calls = []

    def counted(site, before, after, data, positions):
        calls.append(site)
        return change(site, before, after, data, positions)

    edit = Edit(counted, STREAM)
    run_it = jax.jit(lambda data: forward(decoder, tokens, edit=edit, edits=data, tap=Tap(keep, STREAM)).taps)
    results = [run_it((jnp.full(LAYERS, -1).at[layer].set(4), data[1]))["block"] for layer in range(LAYERS)]
    assert run_it._cache_size() == 1 and calls == ["embed", "attn", "mlp", "block"]
    for one, other in itertools.pairwise(results):
        assert error(np.asarray(one), np.asarray(other)) > 0.01


def cost(function, *arguments):
    """Operations, and bytes of temporaries."""
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def test_a_site_that_nobody_reads_costs_nothing(decoder, tokens):
    """A pass costs what a scan over blocks without sites costs; a tap of one site, what the scan pays to keep it."""
    config = decoder.config

    def without_sites(decoder, tokens, seen=None):
        positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape)
        context = Context(positions, *config.rope.cos_sin(positions, jnp.full(2, LENGTH)))

        def step(x, at):
            slot, window = at
            block = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False), decoder.blocks)
            middle, after = halves_of(block, x, context, window)
            return after, {"attn": middle, "mlp": after, "block": after}.get(seen)

        return jax.lax.scan(step, embed(decoder, tokens), (jnp.arange(LAYERS), layer_windows(config)))

    def with_sites(decoder, tokens, **options):
        out = forward(decoder, tokens, **options)
        return out.hidden, out.taps

    plain = cost(without_sites, decoder, tokens)
    same = Edit(lambda site, before, after, data, positions: after, SITES)
    for options in ({}, {"edit": same}, {"edit": Edit(change, ())}, {"tap": Tap(read, ())}):
        found = cost(lambda decoder, tokens, options=options: with_sites(decoder, tokens, **options), decoder, tokens)
        assert found == plain, options
    for site in ("attn", "mlp", "block"):
        tap = Tap(keep, (site,))
        found = cost(lambda decoder, tokens, tap=tap: with_sites(decoder, tokens, tap=tap), decoder, tokens)
        assert found == cost(lambda decoder, tokens, site=site: without_sites(decoder, tokens, site), decoder, tokens)


@pytest.mark.parametrize("kind", [Edit, Tap])
def test_sites_that_are_none(kind):
    with pytest.raises(
        UserError, match=r"^sites: expected embed, attn, router, ff, mlp, block, got 'atn' .did you mean 'attn'"
    ):
        kind(keep, ("block", "atn"))
    with pytest.raises(UserError, match=r"^sites='attn': expected a tuple of sites, such as \('attn',\)$"):
        kind(keep, "attn")


def test_halves_come_from_different_slots_adapters_included(decoder, tokens):
    """Attention of one block and MLP of another, each with the adapters beside it."""
    config, rng = decoder.config, np.random.default_rng(1)
    assert set(halves(config)) == {row.path.removeprefix("blocks.") for row in table(config) if row.stacked}
    shapes = {row.path: row.shape(config) for row in table(config)}
    adapters = {}
    for name in ("q", "up"):
        inside = {"q": (WIDTH,), "up": (WIDTH,)}[name]
        out = shapes[f"blocks.{name}"][1:-1]
        adapters[f"{name}_lora_a"] = jnp.asarray(rng.normal(size=(LAYERS, 2, *inside)), jnp.float32)
        adapters[f"{name}_lora_b"] = jnp.asarray(rng.normal(size=(LAYERS, *out, 2)), jnp.float32)
    stack = decoder.blocks.beside(adapters)
    context = Context(POSITIONS, *config.rope.cos_sin(POSITIONS, jnp.full(2, LENGTH)))
    x = embed(decoder, tokens)
    found = run(stack, jnp.array([[0, 2]]), x, context).hidden
    first, second = (jax.tree.map(lambda leaf, slot=slot: leaf[slot], stack) for slot in (0, 2))
    middle, _ = halves_of(first, x, context, None)
    expected = middle + second.mlp(second.norm(middle, "mlp_norm"))
    assert error(np.asarray(found), np.asarray(expected)) < 1e-6
