"""A training step against torch's AdamW in float64, and tuned models against transformers."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import reference
from support.family_models import BOUND, load_path, raw_config
from support.tiny_model import tiny_checkpoint
from support.tiny_training import Trainer, random_batch

from jaxcrit.commands.export import export_model
from jaxcrit.commands.finetune import run_finetune
from jaxcrit.core.auxiliaries import Balance
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.models.decoder import Decoder, forward, logits
from jaxcrit.models.model import open_model
from jaxcrit.models.weights import to_hf

torch = reference.torch
RATE = 2e-4


CASES = [
    *itertools.product(["llama-gqa", "llama-tied", "qwen3-tied", "phi3-gqa-sliding"], ["one layer", "everything"]),
    *itertools.product(["gemma2", "gemma3-linear-capped", "olmo3-yarn", "granite", "smollm3"], ["everything"]),
    *itertools.product(["olmoe-normed-mha", "qwen3_moe"], ["one layer"]),
]


@pytest.mark.parametrize(("case", "trains"), CASES)
def test_adamw_steps_agree_with_float64(case, trains, tmp_path):
    steps_agree(case, trains, tmp_path)


def test_steps_with_a_balance_loss_agree_with_float64(tmp_path):
    """Experts and routers of all layers, under transformers' own loss; its tokens are those of the attention mask."""
    steps_agree("mixtral", "everything", tmp_path, router_aux=0.5)


def steps_agree(case, trains, tmp_path, router_aux=0.0):
    model = reference.make(raw_config(case), tmp_path)
    decoder = load_path(tmp_path)
    config, layers = decoder.config, (1,) if trains == "one layer" else range(decoder.config.num_layers)
    outside = () if trains == "one layer" else ("embed", "norm", "head")
    trainer = Trainer(
        layers,
        outside,
        config=config,
        rate=RATE,
        weights=decoder.weights(),
        weight_decay=0.1,
        clip=0.5,
        auxiliaries=[Balance(router_aux)] if router_aux else [],
    )
    batches = [random_batch(seed=seed, vocab=config.vocab_size) for seed in range(3)]
    metrics = trainer.run(*batches)

    wide = model.double().train()
    wide.set_experts_implementation("eager")  # torch has no grouped products of float64
    wide.model.embed_tokens.padding_idx = None  # torch leaves the row of Phi-3's padding token out of training
    trained = {
        name: value
        for name, value in wide.named_parameters()
        if trains == "everything" or name.startswith("model.layers.1.")
    }
    for name, value in wide.named_parameters():
        value.requires_grad_(name in trained)
    decays = [value for name, value in trained.items() if "norm" not in name and "bias" not in name]
    stays = [value for name, value in trained.items() if "norm" in name or "bias" in name]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": stays, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8)
    shares = {name: np.full(value.shape, np.inf) for name, value in trained.items()}
    for batch, found in zip(batches, metrics, strict=True):
        optimizer.zero_grad()
        loss, means = reference.response_loss(wide, batch)
        if router_aux:
            tokens, inside = (torch.from_numpy(part) for part in (batch.tokens[0].astype(np.int64), at_tokens(batch)))
            routed = wide(tokens, attention_mask=inside, output_router_logits=True)
            (loss + router_aux * routed.aux_loss).backward()
            np.testing.assert_allclose(found.auxiliaries[0].per_token, routed.aux_loss.item(), rtol=1e-5)
        else:
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), 0.5)
        optimizer.step()
        for name, value in trained.items():
            size = value.grad.abs() / value.grad.square().mean().sqrt().clamp(min=1e-30)
            shares[name] = np.minimum(shares[name], size.masked_fill(size == 0, np.inf).numpy())
        np.testing.assert_allclose(found.sums.per_token, loss.item(), rtol=1e-6)
        np.testing.assert_allclose(found.sums.per_sample, means.item(), rtol=1e-6)
        np.testing.assert_allclose(found.gradient_norm, norm.item(), rtol=1e-5)

    before = {path: jnp.asarray(value) for path, value in load_path(tmp_path).weights().items()}
    tuned = Decoder(
        dataclasses.replace(config, fused_experts=True), trainer.partition.merge(before, trainer.state.params)
    )
    state = wide.state_dict()
    errors = {name: np.abs(value - state[name].numpy()) for name, value in to_hf(tuned)}
    # Adam divides a gradient by its own size: where one next to vanishes, float32's last digits decide how far it moves
    # its weight. Weights off by more than 1e-6 had a gradient below 3e-5 of its tensor's root mean square.
    for name, error in errors.items():
        vanishing = shares[name] < 1e-4 if name in shares else np.zeros(error.shape, bool)
        assert np.all(error <= np.where(vanishing, 0.1 * RATE, 1e-6)), (name, error[~vanishing].max(initial=0))
    assert np.quantile(np.concatenate([error.ravel() for error in errors.values()]), 0.999) <= 1e-6


def at_tokens(batch):
    """``[B, T]``, 1 at real tokens, of the first micro-batch."""
    return (np.arange(batch.tokens.shape[2]) < batch.lengths[0][:, None]).astype(np.int64)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run on a bfloat16 checkpoint, whose masters have more digits than it."""
    folder = tmp_path_factory.mktemp("tuned")
    patch = pytest.MonkeyPatch()
    patch.setenv("JAXCRIT_CACHE", str(folder / "cache"))
    export_model(str(tiny_checkpoint(folder / "wide")), str(folder / "model"), dtype="bfloat16")
    rows = [{"prompt": f"{i} one", "response": "two " * (1 + i % 3)} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = FinetuneOptions(
        model=str(folder / "model"),
        data=str(folder / "rows.jsonl"),
        layers="2,4",
        steps=3,
        learning_rate=1e-3,
        train_norms=True,
        out=str(folder / "run"),
    )
    run_finetune(config)
    yield folder
    patch.undo()


def test_a_float32_export_gives_torch_the_same_logits(tuned, tmp_path):
    exported = export_model(str(tuned / "run"), str(tmp_path / "out"), dtype="float32")
    assert exported.rounding is None
    tokens = np.arange(3, 20)
    session = dataclasses.replace(open_model(str(tuned / "run")), dtype="float32")
    decoder = session.decoder()
    ours = np.asarray(logits(decoder, forward(decoder, jnp.asarray(tokens)[None]).hidden))[0]
    _, theirs = reference.states(reference.read(exported.out), tokens)
    assert np.abs(ours - theirs).max() <= BOUND * np.abs(theirs).max()
    _, base = reference.states(reference.read(tuned / "model"), tokens)
    assert np.abs(base - theirs).max() > 100 * BOUND * np.abs(theirs).max()


def test_an_export_in_the_source_dtype_says_what_rounding_cost(tuned, tmp_path):
    exported = export_model(str(tuned / "run"), str(tmp_path / "out"))
    before, after = (reference.read(path, "auto").state_dict() for path in (tuned / "model", exported.out))
    wide = reference.read(export_model(str(tuned / "run"), str(tmp_path / "wide"), dtype="float32").out).state_dict()
    errors = moves = fallen = changed = 0
    for name, master in wide.items():
        if name.startswith(("model.layers.2.", "model.layers.4.", "model.norm")):
            errors += (after[name].float() - master).square().sum().item()
            moves += (before[name].float() - master).square().sum().item()
            changed += (before[name].float() != master).sum().item()
            fallen += ((before[name] == after[name]) & (before[name].float() != master)).sum().item()
        else:
            assert torch.equal(before[name], after[name]), name
    assert after["model.norm.weight"].dtype == torch.bfloat16
    np.testing.assert_allclose(exported.rounding.lost, (errors / moves) ** 0.5, rtol=1e-4)
    assert exported.rounding.unmoved == pytest.approx(fallen / changed) and 0 < exported.rounding.unmoved < 1


def test_a_delta_holds_the_trained_tensors_alone(tuned, tmp_path):
    delta = load_file(
        export_model(str(tuned / "run"), str(tmp_path / "delta"), dtype="float32", delta_only=True).out
        / "delta.safetensors"
    )
    wide = reference.read(export_model(str(tuned / "run"), str(tmp_path / "wide"), dtype="float32").out)
    state = dict(wide.named_parameters())
    expected = {name for name in state if name.startswith(("model.layers.2.", "model.layers.4.", "model.norm"))}
    assert delta.keys() == expected
    for name, value in delta.items():
        np.testing.assert_array_equal(value, state[name].detach().numpy())
