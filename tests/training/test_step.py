"""One step: what moves and what does not, and that accumulation, remat, form and mesh do not change the numbers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.family_models import MESHES
from support.tiny_training import CONFIG, Trainer, one_device, random_batch, random_weights

from jaxcrit.core.errors import UserError
from jaxcrit.data.templates import Example
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import Decoder, forward
from jaxcrit.models.gains import edit
from jaxcrit.models.lora import Lora, make_lora
from jaxcrit.models.partition import FROZEN, partition, size
from jaxcrit.models.sites import Tap
from jaxcrit.parallel.mesh import make_mesh
from jaxcrit.training.data import micro_batches, training_steps
from jaxcrit.training.forward import hidden_states
from jaxcrit.training.optimizer import OPTIMIZERS, make_optimizer, make_schedule

BATCHES = [random_batch(seed=seed) for seed in range(4)]


def close(found, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), found, expected)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_frozen_weights_stay_bit_identical_and_trained_ones_move(dtype):
    weights = random_weights(dtype=dtype)
    trainer = Trainer((2, 4), dtype=dtype, weights=weights)
    trainer.run(*BATCHES)
    merged = trainer.partition.merge({k: jnp.asarray(v) for k, v in weights.items()}, trainer.state.params)
    for path, before in weights.items():
        after = np.asarray(merged[path])
        moved = after.view(np.uint8) != before.view(np.uint8)
        if not path.startswith("blocks."):
            assert not moved.any(), path
        else:
            by_layer = moved.reshape(7, -1).any(axis=1)
            assert by_layer.tolist() == [layer in (2, 4) for layer in range(7)], path
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(trainer.state.params))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(trainer.frozen))


def test_small_steps_move_masters_that_bfloat16_would_round_away():
    weights = random_weights(dtype=jnp.bfloat16)
    trainer = Trainer((3,), rate=2e-5, dtype=jnp.bfloat16, weights=weights)
    trainer.run(BATCHES[0])
    before, after = weights["blocks.q"][3:4], trainer.params()["train"]["blocks.q"]
    stuck = after.astype(jnp.bfloat16) == before
    assert stuck.mean() > 0.9 and (after != before.astype(np.float32)).mean() > 0.99


def test_optimizer_state():
    trained = 4 * sum(value[:2].size for path, value in random_weights().items() if path.startswith("blocks."))
    held = {}
    for name in OPTIMIZERS:
        trainer = Trainer((2, 4), optimizer=name)
        trainer.run(BATCHES[0])
        held[name] = size(trainer.state.optimizer)
    assert size(trainer.state.params) == trained
    assert 0 <= held["adamw"] - 2 * trained <= 16
    assert 0 <= held["lion"] - trained <= 16
    assert held["sgd"] <= 16 and held["adafactor"] < held["adamw"]


def test_a_frozen_part_in_the_tree_gets_no_update_and_no_state():
    parts = partition(CONFIG, (2,))
    optimizer = make_optimizer("adamw", make_schedule("constant", 1.0, 1), parts, weight_decay=0.1)
    bank = {FROZEN: {"norm": jnp.ones(4)}, "train": {"blocks.q": jnp.ones(4)}}
    state = optimizer.init(bank)
    assert size(state) < 2 * 16 + 16
    updates, _ = optimizer.update(bank, state, bank)
    assert not updates[FROZEN]["norm"].any() and updates["train"]["blocks.q"].all()


def test_clipping_in_front_of_the_labels_would_bring_the_frozen_gradients_back():
    """The trap: XLA drops gradients nobody reads; a norm over all of them reads them."""

    def cost(inside):
        bank = {FROZEN: {"a": jnp.ones((64, 64))}, "train": {"b": jnp.ones((64, 64))}}
        parts, schedule = partition(CONFIG, (2,)), make_schedule("constant", 1.0, 1)
        if inside:
            optimizer = make_optimizer("sgd", schedule, parts, clip=1.0)
        else:
            optimizer = optax.chain(optax.clip_by_global_norm(1.0), make_optimizer("sgd", schedule, parts))

        def step(bank, state, x):
            loss = lambda bank: jnp.sum(jnp.tanh(x @ bank[FROZEN]["a"]) @ bank["train"]["b"])  # noqa: E731
            return optimizer.update(jax.grad(loss)(bank), state, bank)[0]

        compiled = jax.jit(step).lower(bank, optimizer.init(bank), jnp.ones((64, 64))).compile()
        return compiled.cost_analysis()["flops"]

    assert cost(inside=False) > 1.5 * cost(inside=True)


def test_clip_and_norm_are_of_the_trained_parameters_alone():
    plain, clipped = Trainer((2, 4), optimizer="sgd", rate=1.0), Trainer((2, 4), optimizer="sgd", rate=1.0, clip=0.01)
    before = plain.params()
    (metrics,), _ = plain.run(BATCHES[0]), clipped.run(BATCHES[0])
    moves = [jax.tree.map(np.subtract, trainer.params(), before) for trainer in (plain, clipped)]
    norms = [np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(move))) for move in moves]
    np.testing.assert_allclose(norms, [metrics.gradient_norm, 0.01], rtol=1e-4)


def test_decay_leaves_norms_alone():
    trainer = Trainer((2,), optimizer="sgd", rate=1.0, weight_decay=0.5)
    plain = Trainer((2,), optimizer="sgd", rate=1.0)
    before = plain.params()["train"]
    plain.run(BATCHES[0])
    trainer.run(BATCHES[0])
    for path, value in trainer.params()["train"].items():
        expected = plain.params()["train"][path] - (0 if path.endswith("norm") else 0.5) * before[path]
        np.testing.assert_allclose(value, expected, atol=1e-6)


def test_layers_of_a_factor_are_a_group_with_a_rate_of_its_own():
    one, two = (Trainer((1, 2, 5), optimizer="sgd", factors=f) for f in ({}, {2: 0.1}))
    before = one.params()["train"]["blocks.q"]
    assert two.partition.groups == ("frozen", "train", "train_1", "frozen", "frozen", "train", "frozen")
    one.run(BATCHES[0])
    two.run(BATCHES[0])
    moved = one.params()["train"]["blocks.q"] - before
    np.testing.assert_allclose(two.params()["train"]["blocks.q"] - before[[0, 2]], moved[[0, 2]], atol=1e-7)
    np.testing.assert_allclose(two.params()["train_1"]["blocks.q"] - before[1:2], 0.1 * moved[1:2], atol=1e-7)


@pytest.mark.parametrize("layers", [(2, 4), (1, 3, 6)], ids=str)
def test_forms_agree(layers):
    found = []
    for form in ("runs", "gaps"):
        trainer = Trainer(layers, form=form, optimizer="sgd")
        trainer.run(BATCHES[0])
        found.append(trainer.params())
    close(*found, 1e-6)


def test_sliding_windows_in_both_forms():
    raw = {
        "model_type": "qwen3",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "head_dim": 4,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 3,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
    }
    config = ModelConfig.from_hf(raw)
    losses = []
    for layers, form in (((1, 4), "runs"), ((1, 4), "gaps"), (range(5), "runs")):
        trainer = Trainer(layers, config=config, form=form)
        losses.append([float(metrics.sums.loss) for metrics in trainer.run(BATCHES[0])])
    close(losses[0], losses[1])
    close(losses[0], losses[2], 1e-4)
    assert not np.allclose(losses[0], [float(m.sums.loss) for m in Trainer((1,)).run(BATCHES[0])])


@pytest.mark.parametrize("form", ["runs", "gaps"])
def test_each_layer_turns_by_its_own_base_in_both_forms(form):
    """Layers with a window turn by another: each step must be given its own layer's."""
    raw = {**CONFIG.to_hf(), "model_type": "gemma3_text", "head_dim": 4, "num_hidden_layers": 5, "sliding_window": 3}
    config = ModelConfig.from_hf({**raw, "sliding_window_pattern": 3})
    weights = {path: jnp.asarray(value) for path, value in random_weights(config).items()}
    batch, parts = jax.tree.map(lambda leaf: leaf[0], BATCHES[0]), partition(config, (1, 4))
    bank = parts.gather(dict(weights), one_device(), jnp.float32, 0)
    found = hidden_states(parts, bank, batch.tokens, batch.lengths, dtype=jnp.float32, form=form)
    expected = forward(Decoder(config, weights), batch.tokens, lengths=batch.lengths).hidden
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("lora", [None, Lora(2, 4.0, ("up", "down"))])
def test_the_first_layers_alone(lora):
    """Stopped within a run of trained layers, between runs, and before the first layer."""
    weights = {path: jnp.asarray(value) for path, value in random_weights(CONFIG).items()}
    batch, parts = jax.tree.map(lambda leaf: leaf[0], BATCHES[0]), partition(CONFIG, (1, 2, 4), lora=lora)
    bank = parts.gather(dict(weights), one_device(), jnp.float32, 0)
    tap = Tap(lambda site, before, after, positions: after, ("embed", "block"))
    taps = forward(Decoder(CONFIG, weights), batch.tokens, lengths=batch.lengths, tap=tap).taps
    for stop in (0, 2, 4, CONFIG.num_layers):
        found = hidden_states(parts, bank, batch.tokens, batch.lengths, dtype=jnp.float32, stop=stop)
        expected = taps["block"][stop - 1] if stop else taps["embed"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("layers", "form"), [((1, 2, 4), "runs"), ((1, 3, 6), "gaps")], ids=str)
@pytest.mark.parametrize("lora", [None, make_lora(CONFIG, 2, 3.0)], ids=["whole", "adapters"])
def test_an_edit_acts_in_training_as_it_does_forward(layers, form, lora):
    """At each layer with its own data, in both forms, trained or not; switched off it is no edit to the bit."""
    rng = np.random.default_rng(3)
    data = rng.uniform(0.3, 1.5, (7, 2)).astype(np.float32), rng.random((7, 2)) < 0.7
    weights = {path: jnp.asarray(value) for path, value in random_weights().items()}
    batch, parts = jax.tree.map(lambda leaf: leaf[0], BATCHES[0]), partition(CONFIG, layers, lora=lora)
    bank = parts.gather(dict(weights), one_device(), jnp.float32, 0)

    def states(bank, edit=None):
        return hidden_states(parts, bank, batch.tokens, batch.lengths, dtype=jnp.float32, form=form, edit=edit)

    expected = forward(Decoder(CONFIG, weights), batch.tokens, lengths=batch.lengths, edit=edit, edits=data).hidden
    found = states(bank, (edit, data))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(found - states(bank)).max() > 0.01
    same = jax.jit(lambda bank, data: states(bank, (edit, data)))(bank, (data[0], data[1] & False))
    np.testing.assert_array_equal(same, jax.jit(states)(bank))


def test_gradients_under_an_edit_agree_in_both_forms():
    data = np.full((7, 2), 0.6, np.float32), np.ones((7, 2), bool)
    found = []
    for options in ({"form": "runs"}, {"form": "gaps"}, {"form": "runs", "edit": None}):
        trainer = Trainer((1, 3, 6), optimizer="sgd", **{"edit": (edit, data), **options})
        trainer.run(BATCHES[0])
        found.append(trainer.params())
    close(*found[:2], 1e-6)
    assert np.abs(found[0]["train"]["blocks.q"] - found[2]["train"]["blocks.q"]).max() > 1e-5


@functools.cache
def reference(outside=()):
    trainer = Trainer((1, 3, 4), outside)
    metrics = trainer.run(*BATCHES)
    return trainer.params(), [float(m.sums.per_token) for m in metrics], [float(m.sums.per_sample) for m in metrics]


@pytest.mark.parametrize(
    "case",
    ["accumulate", "no remat", "gaps", "outside", *MESHES],
)
def test_loss_curves_agree(case):
    outside = ("embed", "norm", "head") if case == "outside" else ()
    params, losses, means = reference(outside)
    batches, options = BATCHES, {}
    if case == "accumulate":
        batches = [jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[2:]), batch) for batch in BATCHES]
    elif case == "no remat":
        options = {"remat": False}
    elif case == "gaps":
        options = {"form": "gaps"}
    else:
        axes = {"data": 8} if case == "outside" else dict(part.split("=") for part in case.split(","))
        options = {"mesh": make_mesh({axis: int(count) for axis, count in axes.items()})}
    trainer = Trainer((1, 3, 4), outside, **options)
    metrics = trainer.run(*batches)
    np.testing.assert_allclose([float(m.sums.per_token) for m in metrics], losses, rtol=2e-5)
    np.testing.assert_allclose([float(m.sums.per_sample) for m in metrics], means, rtol=2e-5)
    # Adam divides by the gradient's size, so where that is next to nothing a last bit is a visible step.
    differences = np.concatenate(
        [np.abs(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (trainer.params(), params)), strict=True)]
    )
    assert np.quantile(differences, 0.99) < 2e-4 and losses[-1] < losses[0]


def test_a_micro_batch_with_nothing_to_learn_changes_nothing():
    silent = jax.tree.map(np.zeros_like, BATCHES[0])
    silent.lengths[:] = 1  # as rows that fill up a batch
    pair = jax.tree.map(lambda a, b: np.concatenate([a, b]), BATCHES[0], silent)
    one, two = Trainer((2,), optimizer="sgd"), Trainer((2,), optimizer="sgd")
    (alone,), (beside,) = one.run(BATCHES[0]), two.run(pair)
    close(two.params(), one.params(), 1e-7)
    assert (beside.sums.per_token, beside.sums.per_sample) == (alone.sums.per_token, alone.sums.per_sample)


def test_a_step_without_anything_to_learn_is_refused_by_its_number():
    rows = [Example(str(i), np.arange(6, dtype=np.int32), 6, "", "") for i in range(4)]
    with pytest.raises(UserError, match="step 3: none of its rows has a response token"):
        micro_batches(training_steps(rows, 2, seed=0), 2, 1)


def test_tied_embedding_trains_from_both_ends():
    raw = {**CONFIG.to_hf(), "tie_word_embeddings": True}
    config = ModelConfig.from_hf(raw)
    trainer = Trainer((1,), ("embed", "head"), config=config)
    before = trainer.params()["train"]["embed"]
    trainer.run(BATCHES[0])
    assert (trainer.params()["train"]["embed"] != before).all()  # the head's gradient reaches every row
    with pytest.raises(UserError, match="tied"):
        partition(config, (1,), ("head",))


def test_schedules():
    rates = {
        kind: [float(make_schedule(kind, 1.0, 10, 4)(step)) for step in range(10)]
        for kind in ("constant", "linear", "cosine")
    }
    for values in rates.values():
        np.testing.assert_allclose(values[:5], [0.25, 0.5, 0.75, 1, 1])
    assert rates["constant"][5:] == [1.0] * 5
    np.testing.assert_allclose(rates["linear"][4:], 1 - np.arange(6) / 6, rtol=1e-6)
    np.testing.assert_allclose(rates["cosine"][4:], (1 + np.cos(np.pi * np.arange(6) / 6)) / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_schedule("cosin", 1.0, 1), "did you mean 'cosine'"),
        (lambda: make_schedule("linear", 0.0, 1), "learning_rate"),
        (lambda: make_schedule("linear", -1.0, 1), "learning_rate"),
        (lambda: make_schedule("linear", float("nan"), 1), "learning_rate"),
        (lambda: make_schedule("linear", 1.0, 5, 5), "warmup"),
        (lambda: make_optimizer("adam", make_schedule("linear", 1.0, 5), partition(CONFIG, (1,))), "adamw"),
        (lambda: make_optimizer("sgd", make_schedule("linear", 1.0, 5), partition(CONFIG, (1,)), clip=-1), "clip"),
        (lambda: partition(CONFIG, ()), "nothing is left to train"),
        (lambda: partition(CONFIG, (7,)), "layers 0 to 6"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(UserError, match=message):
        call()
