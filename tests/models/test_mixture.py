"""Mixtures of experts: both layouts of their files, routing by hand, and shares put in the place of the router's."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.family_models import error, load_path, one_device, raw_config, sequences, states, tensors, write_model

from jaxcrit.core.errors import UserError
from jaxcrit.models.checkpoint import open_checkpoint
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import forward, logits
from jaxcrit.models.export import export
from jaxcrit.models.mixture import OVERRIDE, ROUTING, Override, by_all, by_blocks, by_groups, kept_shares
from jaxcrit.models.partition import partition, split
from jaxcrit.models.sites import Tap
from jaxcrit.models.weights import halves, to_hf
from jaxcrit.parallel.mesh import make_mesh, parse_mesh
from jaxcrit.training.forward import hidden_states

MIXTURES = ("olmoe", "olmoe-normed-mha", "qwen3_moe", "mixtral")


def split_files(path, raw):
    """The same model with a tensor for each expert, as hubs have it; the names are put together here, by hand."""
    whole, apart = tensors(raw), {}
    mixtral = raw["model_type"] == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, value in whole.items():
        name = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        stem, _, last = name.rpartition(".")
        for expert, matrix in enumerate(value) if value.ndim == 3 else ():
            if last == "down_proj":
                apart[f"{stem}.{expert}.{down}.weight"] = matrix
            else:
                both = np.split(matrix, 2)
                apart |= {f"{stem}.{expert}.{own}.weight": one for own, one in zip((gate, up), both, strict=True)}
        if value.ndim < 3:
            apart[name] = value
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    save_file({name: np.ascontiguousarray(value) for name, value in apart.items()}, path / "model.safetensors")
    return path


def open_config(case):
    return ModelConfig.from_hf(raw_config(case))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return load_path(write_model(tmp_path_factory.mktemp("model"), raw_config("olmoe")))


@pytest.fixture(scope="module")
def rows(decoder):
    return tuple(map(jnp.asarray, sequences(decoder.config.vocab_size)))


@pytest.mark.parametrize("case", MIXTURES)
def test_experts_in_one_tensor_or_in_many(case, tmp_path):
    fused = write_model(tmp_path / "fused", raw_config(case))
    apart = split_files(tmp_path / "apart", raw_config(case))
    one, other = load_path(fused), load_path(apart)
    assert one.config == other.config and one.config.fused_experts and not other.config.fused_experts
    for path, value in one.weights().items():
        np.testing.assert_array_equal(value, other.weights()[path], err_msg=path)
    for source in (fused, apart):
        held, again = (
            load_file(file / "model.safetensors") for file in (source, export(str(source), f"{source}.again"))
        )
        assert held.keys() == again.keys()
        assert all(np.array_equal(held[name].view(np.uint8), again[name].view(np.uint8)) for name in held)
    one_layer = dict(to_hf(other, [1]))
    assert one_layer.keys() == {name for name in load_file(apart / "model.safetensors") if ".layers.1." in name}


def test_router_and_experts_are_of_the_mlp():
    of = halves(open_config("qwen3_moe"))
    assert {name for name, half in of.items() if half == "mlp"} == {"mlp_norm", "router", "gate", "up", "down"}


@pytest.mark.parametrize("case", MIXTURES)
def test_a_block_by_hand(case, tmp_path):
    """One token of one layer, expert by expert in float64."""
    decoder = load_path(write_model(tmp_path, raw_config(case)))
    config, layer, at = decoder.config, 1, (0, 7)
    tokens, lengths = sequences(config.vocab_size)
    tap = Tap(lambda site, before, after, positions: (before, after), ("attn", "router", "mlp"))
    with jax.default_matmul_precision("highest"):
        taps = forward(decoder, jnp.asarray(tokens), lengths=jnp.asarray(lengths), tap=tap).taps
    weights = {
        path.removeprefix("blocks."): np.float64(value[layer])
        for path, value in decoder.weights().items()
        if path.startswith("blocks.")
    }
    stream, after = (np.float64(part[layer][at]) for part in taps["mlp"])
    normed = weights["mlp_norm"] * stream / np.sqrt(np.mean(stream**2) + config.norm_eps)
    scores = weights["router"] @ normed
    shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    kept = np.argsort(-shares)[: config.experts_per_token]
    total = shares[kept].sum() if config.norm_topk else 1.0
    added = np.zeros(config.width)
    for expert in kept:
        gate, up = weights["gate"][expert] @ normed, weights["up"][expert] @ normed
        added += shares[expert] / total * (weights["down"][expert] @ (gate / (1 + np.exp(-gate)) * up))
    assert error(np.asarray(taps["router"][0][layer][at]), scores) < 1e-6
    assert error(np.asarray(taps["router"][1][layer][at]), shares) < 1e-6
    assert error(after, stream + added) < 1e-6


def test_equal_shares_go_to_the_lower_number(decoder):
    chosen, weights = kept_shares(jnp.full((2, 8), 0.125), decoder.config)
    assert chosen.tolist() == [[0, 1, 2]] * 2 and np.allclose(weights, 0.125)
    normed = dataclasses.replace(decoder.config, norm_topk=True)
    assert np.allclose(kept_shares(jnp.full((2, 8), 0.125), normed)[1], 1 / 3)


def override(decoder, rows, layers, shares=None, everywhere=False):
    """Shares from the last token of each row on, or at it alone."""
    count, begin = decoder.config.num_layers, rows[1] - 1
    given = jnp.broadcast_to(begin, (count, len(begin))).astype(jnp.int32)
    on = jnp.zeros(count, bool).at[jnp.asarray(layers, jnp.int32)].set(True)
    return Override(shares, on, given, jnp.full_like(given, 2**30) if everywhere else given + 1)


def at_last(values, lengths):
    """``[L, B, T, E]`` at each row's last token."""
    return jnp.stack([values[:, row, length - 1] for row, length in enumerate(lengths)], axis=1)


def test_own_shares_put_back_change_nothing(decoder, rows):
    tokens, lengths = rows
    plain = forward(decoder, tokens, lengths=lengths, tap=ROUTING)
    data = override(decoder, rows, [0, 1, 2], at_last(plain.taps["router"].shares, lengths))
    same = forward(decoder, tokens, lengths=lengths, tap=ROUTING, edit=OVERRIDE, edits=data)
    np.testing.assert_array_equal(same.hidden, plain.hidden)
    np.testing.assert_array_equal(same.taps["router"].shares, plain.taps["router"].shares)


def test_shares_of_chosen_layers_and_tokens(decoder, rows):
    """Other shares act in their layers, from their position on or at it alone; the logits that are read stay."""
    tokens, lengths = rows
    begin = jnp.array([9, 4])
    shares = jax.nn.softmax(jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 8)), jnp.float32))
    plain = forward(decoder, tokens, lengths=lengths, tap=ROUTING).taps["router"]
    for everywhere in (False, True):
        data = override(decoder, (tokens, begin + 1), [1], shares, everywhere)
        found = forward(decoder, tokens, lengths=lengths, tap=ROUTING, edit=OVERRIDE, edits=data).taps["router"]
        np.testing.assert_array_equal(found.shares[0], plain.shares[0])
        for row, first in enumerate(begin.tolist()):
            inside = slice(first, None if everywhere else first + 1)
            outside = np.delete(np.arange(24), np.arange(24)[inside])
            mine = np.broadcast_to(shares[1, row], found.shares[1, row, inside].shape)
            np.testing.assert_array_equal(found.shares[1, row, inside], mine)
            np.testing.assert_array_equal(found.shares[1, row, outside], plain.shares[1, row, outside])
            np.testing.assert_array_equal(found.logits[2, row, :first], plain.logits[2, row, :first])
            assert np.abs(found.logits[2, row, first:] - plain.logits[2, row, first:]).max() > 1e-3


def test_one_expert_alone_is_the_dense_model_of_it(tmp_path):
    """All shares on one expert, at every token and layer: the function of a model without the others."""
    raw = raw_config("mixtral-tied")
    decoder = load_path(write_model(tmp_path / "mixture", raw))
    config, tokens = decoder.config, jnp.asarray(sequences(96)[0])
    held = tensors(raw)
    dense = {key: value for key, value in raw.items() if "experts" not in key} | {"model_type": "mistral"}
    dense |= {"sliding_window": None, "rope_theta": 1e6}
    for layer in range(3):
        stem = f"model.layers.{layer}.mlp"
        gate_up, down = (held.pop(f"{stem}.experts.{name}_proj")[2] for name in ("gate_up", "down"))
        gate, up = np.split(gate_up, 2)
        held |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up, f"{stem}.down_proj.weight": down}
        del held[f"{stem}.gate.weight"]
    path = tmp_path / "dense"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(dense))
    save_file({name: np.ascontiguousarray(value) for name, value in held.items()}, path / "model.safetensors")
    shares = jnp.zeros((3, 2, config.experts)).at[..., 2].set(1.0)
    data = Override(shares, jnp.ones(3, bool), jnp.zeros((3, 2), jnp.int32), jnp.full((3, 2), 99))
    out = forward(decoder, tokens, edit=OVERRIDE, edits=data)
    expected = states(load_path(path), tokens, np.array([24, 24]))[1]
    assert error(np.asarray(logits(decoder, out.hidden)), expected) < 1e-5


def test_gradient_of_shares(decoder, rows):
    """By the training forward and by the plain one, against differences in float64 of the shares."""
    tokens, lengths = rows
    parts = partition(decoder.config, range(3))
    params, frozen = split(parts.gather(dict(decoder.weights()), one_device(), jnp.float32))
    plain = forward(decoder, tokens, lengths=lengths, tap=ROUTING).taps["router"].shares
    start = jnp.log(at_last(plain, lengths))

    @jax.jit
    def loss(logs):
        data = override(decoder, rows, [0, 2], jax.nn.softmax(logs))
        hidden = hidden_states(
            parts, {**params, "frozen": frozen}, tokens, lengths, dtype=jnp.float32, edit=(OVERRIDE, data)
        )
        return jnp.sum(jnp.sin(hidden[:, :11]))

    @jax.jit
    def again(logs):
        data = override(decoder, rows, [0, 2], jax.nn.softmax(logs))
        hidden = forward(decoder, tokens, lengths=lengths, edit=OVERRIDE, edits=data).hidden
        return jnp.sum(jnp.sin(hidden[:, :11]))

    gradient = jax.grad(loss)(start)
    np.testing.assert_allclose(gradient, jax.grad(again)(start), atol=1e-5)
    assert not gradient[1].any() and not gradient[:, 0].any() and np.abs(gradient[[0, 2], 1]).max() > 1e-2
    rng = np.random.default_rng(1)
    for _ in range(3):
        way = jnp.asarray(rng.normal(size=start.shape), jnp.float32)
        difference = (loss(start + 1e-2 * way) - loss(start - 1e-2 * way)) / 2e-2
        assert abs(difference - jnp.sum(gradient * way)) < 0.02 * jnp.linalg.norm(gradient[:, 1])


def test_model_type_decides_whatever_class_is_named_beside_it():
    """A file of Mixtral that names LLaMA's class is read as Mixtral, as transformers does."""
    assert ModelConfig.from_hf({**raw_config("mixtral"), "architectures": ["LlamaForCausalLM"]}).experts == 4


def test_number_of_experts_under_either_name():
    raw = raw_config("qwen3_moe")
    assert open_config("qwen3_moe").experts == 8 and open_config("qwen3_moe-sliding").experts == 4
    assert ModelConfig.from_hf({**raw, "num_local_experts": 8}).experts == 8
    with pytest.raises(UserError, match="expected num_experts and num_local_experts to agree, got 8, 4"):
        ModelConfig.from_hf({**raw, "num_local_experts": 4})
    with pytest.raises(UserError, match="expected num_experts_per_tok of 1 to 8, the number of experts, got 9"):
        ModelConfig.from_hf({**raw, "num_experts_per_tok": 9})


def test_tensors_of_another_number_of_experts_are_named(tmp_path):
    path = split_files(tmp_path / "model", raw_config("mixtral"))
    raw = raw_config("mixtral")
    (path / "config.json").write_text(json.dumps({**raw, "num_local_experts": 5}))
    with pytest.raises(UserError, match=r"missing model.layers.0.block_sparse_moe.experts.4.w1.weight.*wrong shape"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("case", "mesh", "shard"),
    [
        ("qwen3_moe", "data=8", (3, 8, 20, 32)),
        ("qwen3_moe", "fsdp=8", (3, 1, 20, 32)),
        ("qwen3_moe", "fsdp=4,tensor=2", (3, 2, 10, 32)),
        ("olmoe-normed-mha", "fsdp=4,tensor=2", (3, 6, 24, 8)),  # six experts do not divide: their width does
    ],
)
def test_experts_on_a_mesh(case, mesh, shard, tmp_path):
    """Experts are split where they divide, each device reads its own; states are those of one device."""
    path = split_files(tmp_path / "model", raw_config(case))
    decoder, one = load_path(path, mesh=make_mesh(parse_mesh(mesh))), load_path(path)
    assert decoder.weights()["blocks.gate"].addressable_shards[0].data.shape == shard
    for name, value in one.weights().items():
        np.testing.assert_array_equal(decoder.weights()[name], value, err_msg=name)
    tokens, lengths = sequences(96, lengths=(24, 11, 9, 24, 7, 20, 3, 12))
    for found, expected in zip(states(decoder, tokens, lengths), states(one, tokens, lengths), strict=True):
        assert error(found, expected) <= 1e-5


@pytest.mark.parametrize("form", [by_blocks, by_groups])
@pytest.mark.parametrize(("rows", "count", "each"), [(40, 6, 2), (300, 4, 4), (3, 16, 2), (1, 5, 1), (64, 1, 1)])
def test_pairs_alone_give_what_all_experts_give(form, rows, count, each):
    """Values and gradients of both forms; experts that nobody goes to, one that all go to, one pair alone."""
    rng = np.random.default_rng(0)
    x, shares = rng.normal(size=(rows, 12)), rng.normal(size=(rows, count))
    shares[:, : count // 3] = -9  # nobody goes there where there are others
    experts = tuple(rng.normal(size=shape) for shape in ((count, 7, 12), (count, 7, 12), (count, 12, 7)))
    experts = tuple(matrix / np.sqrt(matrix.shape[-1]) for matrix in experts)
    x, shares, experts = jax.tree.map(lambda one: jnp.asarray(one, jnp.float32), (x, shares, experts))
    weights, chosen = jax.lax.top_k(shares, each)

    def both(form, *given):
        y, back = jax.vjp(lambda x, weights, experts: form(x, chosen, weights, experts, jax.nn.silu), *given)
        return y, back(jnp.cos(y))

    expected, found = (jax.jit(both, static_argnums=0)(one, x, weights, experts) for one in (by_all, form))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert error(np.asarray(ours), np.asarray(theirs)) < 1e-5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "experts.1.w2",
            lambda one: one[:, :-1],
            r"wrong shape \S+experts.1.w2.weight \(32, 47\) \(expected \(32, 48\)\)",
        ),
        ("gate", lambda one: one[:-1], r"wrong shape \S+block_sparse_moe.gate.weight \(3, 32\) \(expected \(4, 32\)\)"),
        ("experts.3.w1", lambda one: one * np.nan, r"NaN or infinite values in \S+experts.0.w1.weight \(or of another"),
    ],
)
def test_experts_or_a_router_that_differ_are_named(name, change, message, tmp_path):
    path = split_files(tmp_path / "model", raw_config("mixtral"))
    held = load_file(path / "model.safetensors")
    key = f"model.layers.1.block_sparse_moe.{name}.weight"
    save_file({**held, key: np.ascontiguousarray(change(held[key]))}, path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_path(path)
