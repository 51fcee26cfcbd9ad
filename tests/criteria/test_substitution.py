"""The sweep against models with swapped weights, in bits; what it costs, in blocks that ran."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from support.family_models import CASES, raw_config
from support.plain_loss import batch_of, placed, plain
from support.tiny_training import random_weights

from jaxcrit.core.errors import UserError
from jaxcrit.criteria.substitution import host_variant, join, random_sets, variants, windows
from jaxcrit.evidence.variants import compiled_spans, enter, planned_evaluations, span_step, sweep
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Block, Decoder
from jaxcrit.models.weights import halves

DEPTH = 7
MLP = ("blocks.mlp_norm", "blocks.mlp_post_norm", "blocks.gate", "blocks.up", "blocks.down", "blocks.router")


def make(case="llama-gqa", depth=DEPTH):
    config = ModelConfig.from_hf({**raw_config(case), "num_hidden_layers": depth})
    return config, random_weights(config, 0), random_weights(config, 1)


def swapped(config, host, guest, layers, sites):
    """The host with weights of these layers overwritten by the guest's, one by one."""
    weights = {path: value.copy() for path, value in host.items()}
    for path, value in weights.items():
        half = "mlp" if path.startswith(MLP) else "attn"
        if path.startswith("blocks.") and sites in ("blocks", half):
            value[list(layers)] = guest[path][list(layers)]
    return Decoder(config, placed(weights))


def run(config, base, tuned, sets, batch, *, sites="blocks", reverse=False):
    """Losses of the sets, and of the unchanged host."""
    arrays = placed({"base": base, "tuned": tuned})
    blocks = join(config, arrays["base"], arrays["tuned"])
    host = host_variant(config.num_layers, base=reverse)
    made = [*variants(sets, config.num_layers, sites=sites, reverse=reverse), host]
    return sweep(blocks, arrays["base" if reverse else "tuned"], host, made, batch)


@pytest.mark.parametrize(("case", "sites", "reverse"), [
    ("llama-gqa", "blocks", False), ("llama-gqa", "attn", False), ("llama-gqa", "mlp", False),
    ("qwen2-mixed-sliding", "blocks", True), ("qwen3-mqa-bias", "attn", True), ("phi3-longrope", "mlp", True),
    ("gemma2", "mlp", False), ("gemma3", "blocks", True),
])  # fmt: skip
def test_equals_explicit_substitution_bit_for_bit(case, sites, reverse):
    config, base, tuned = make(case, 4)
    sets = [(0, 1, 2), (1, 2, 3), (2,), (0, 3), (0, 1, 2, 3), ()]
    batch = batch_of(config)
    found = run(config, base, tuned, sets, batch, sites=sites, reverse=reverse).losses
    host, guest = (base, tuned) if reverse else (tuned, base)
    for losses, layers in zip(found, [*sets, ()], strict=True):
        expected = plain(swapped(config, host, guest, layers, sites), batch)
        np.testing.assert_array_equal(losses, expected, err_msg=str(layers))


def test_all_layers_and_the_rest_are_the_base():
    config, base, tuned = make()
    batch = batch_of(config)
    arrays = placed(base)
    blocks = join(config, dict(arrays), placed(tuned))
    (everything,) = variants([tuple(range(DEPTH))], DEPTH)
    outside = {path: value for path, value in arrays.items() if not path.startswith("blocks.")}
    found = sweep(blocks, outside, host_variant(DEPTH, base=False), [everything], batch)
    expected = plain(Decoder(config, placed(base)), batch)
    np.testing.assert_array_equal(found.losses[0], expected)


def test_base_into_base_is_identical():
    config, base, _ = make()
    found = run(config, base, base, windows(DEPTH, 3).values(), batch_of(config)).losses
    np.testing.assert_array_equal(found, np.broadcast_to(found[-1], found.shape))


def test_one_compile_for_windows_halves_and_both_directions():
    config, base, tuned = make("llama-mha", 5)
    before = compiled_spans()
    for sites, reverse, width in (("blocks", False, 3), ("attn", True, 1), ("mlp", False, 5)):
        run(
            config, base, tuned, list(windows(5, width).values()), batch_of(config, width), sites=sites, reverse=reverse
        )
    assert compiled_spans() == before + 1


@pytest.mark.parametrize(("depth", "window", "most"), [(16, 5, 0.6), (32, 5, 0.6), (16, 1, 0.6), (32, 1, 0.6)])
def test_cost_in_forward_passes(depth, window, most):
    made = [*variants(list(windows(depth, window).values()), depth), host_variant(depth, base=False)]
    assert planned_evaluations(made, depth) / depth <= most * depth


def test_blocks_that_run_are_those_that_are_counted(monkeypatch):
    ran = []
    call = Block.__call__

    def counted(self, x, *arguments, **options):
        jax.debug.callback(lambda: ran.append(1))
        return call(self, x, *arguments, **options)

    monkeypatch.setattr(Block, "__call__", counted)
    config, base, tuned = make("llama-mqa", 6)  # a shape of its own, so that it compiles with the count
    sets = [*windows(6, 3).values(), (0, 5), (4,)]
    found = run(config, base, tuned, sets, batch_of(config))
    jax.effects_barrier()
    made = [*variants(sets, 6), host_variant(6, base=False)]
    assert len(ran) == found.evaluations == planned_evaluations(made, 6) == (6 + 5 + 4 + 3) + (6 + 2) + 6


def test_memory_is_two_models_and_a_batch():
    """Of the weights, a block at most is copied while blocks run; of the batch, a few states are held."""
    config = ModelConfig.from_hf({**raw_config("llama-gqa"), "hidden_size": 128, "num_hidden_layers": 8})
    blocks = join(config, placed(random_weights(config, 0)), placed(random_weights(config, 1)))
    batch = batch_of(config)
    tokens, lengths = batch.tokens, batch.lengths
    x, context = enter(placed(random_weights(config))["embed"], tokens, lengths, config, None)
    slots, bound = host_variant(8, base=False).slots, np.int32(3)
    memory = span_step.lower(blocks, slots, x, context, bound, bound, None, None).compile().memory_analysis()
    one_block = sum(leaf.nbytes for leaf in jax.tree.leaves(blocks)) / 16
    assert memory.temp_size_in_bytes < 1.5 * one_block + 24 * x.nbytes
    assert memory.output_size_in_bytes <= x.nbytes + 64


@pytest.mark.parametrize("window", [0, 2, 9])
def test_windows_that_do_not_fit(window):
    with pytest.raises(UserError, match=rf"--window={window}: expected an odd number from 1 to the 7 layers"):
        windows(DEPTH, window)


def test_windows_and_random_sets():
    assert windows(4, 3) == {1: (0, 1, 2), 2: (1, 2, 3)}
    drawn = random_sets(16, 5, 200, seed=0)
    assert drawn == random_sets(16, 5, 200, seed=0) != random_sets(16, 5, 200, seed=1)
    assert all(len(set(one)) == 5 and list(one) == sorted(one) for one in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=16)
    assert abs(counts / 200 - 5 / 16).max() < 0.12


def test_every_case_has_a_half_for_each_weight():
    """A weight that is in neither half, or in the wrong one, would be taken from the wrong model."""
    for case in CASES:
        config = ModelConfig.from_hf(raw_config(case))
        names = [path for path in random_weights(config) if path.startswith("blocks.")]
        attention = {"attn_norm", "q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm"}
        attention.add("attn_post_norm")
        assert {name for name in names if not name.startswith(MLP)} <= {f"blocks.{name}" for name in attention}
        half = {f"blocks.{name}": half for name, half in halves(config).items()}
        assert half == {name: "mlp" if name.startswith(MLP) else "attn" for name in names}
