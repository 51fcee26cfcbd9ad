"""Adapters against peft: the same training in float64, and an exported directory that is the tuned model."""

from __future__ import annotations

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED
from support import reference
from support.family_models import BOUND, load_path, raw_config
from support.tiny import tiny_tokenizer_dir
from support.tiny_training import Trainer, random_batch

from jaxcrit.commands.export import export_model
from jaxcrit.commands.finetune import run_finetune
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.models.decoder import forward, logits
from jaxcrit.models.lora import make_lora, peft_config, peft_tensors
from jaxcrit.models.model import open_model

torch = reference.torch
if os.environ.get("JAXCRIT_REQUIRE_PARITY") == "1":
    import peft
else:
    peft = pytest.importorskip("peft", reason="parity of adapters needs peft: pip install -e '.[parity]'")

RATE = 1e-3
# peft asks transformers 5.23 for it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_adamw_steps_agree_with_peft_in_float64(tmp_path):
    model = reference.make(raw_config("llama-gqa"), tmp_path)
    decoder = load_path(tmp_path)
    config, layers = decoder.config, (0, 2)
    lora = make_lora(config, 3, 5.0)
    trainer = Trainer(
        layers, config=config, lora=lora, rate=RATE, weights=decoder.weights(), weight_decay=0.1, clip=0.5
    )
    settings = peft_config(config, lora, layers, "") | {"base_model_name_or_path": None, "inference_mode": False}
    wide = peft.get_peft_model(model, peft.LoraConfig(**settings))
    begin = peft_tensors(config, lora, layers, trainer.params()["train"])
    assert not peft.set_peft_model_state_dict(wide, tensors(begin)).unexpected_keys
    wide = wide.double().train()
    trained = {name: value for name, value in wide.named_parameters() if value.requires_grad}
    assert len(trained) == len(begin)
    optimizer = torch.optim.AdamW(list(trained.values()), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    batches = [random_batch(seed=seed, vocab=config.vocab_size) for seed in range(3)]
    for batch, found in zip(batches, trainer.run(*batches), strict=True):
        optimizer.zero_grad()
        loss, _ = reference.response_loss(wide, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), 0.5)
        optimizer.step()
        np.testing.assert_allclose(found.sums.per_token, loss.item(), rtol=1e-6)
        np.testing.assert_allclose(found.gradient_norm, norm.item(), rtol=1e-5)
    end = peft.get_peft_model_state_dict(wide)
    ours = peft_tensors(config, lora, layers, trainer.params()["train"])
    assert end.keys() == ours.keys()
    # Adam divides the first gradient by its own size, so what B gets of a next to vanishing one is a matter of digits.
    errors = np.concatenate([np.abs(value - end[name].numpy()).ravel() for name, value in ours.items()])
    assert np.quantile(errors, 0.99) <= 1e-6 and errors.max() <= 0.1 * RATE


def tensors(arrays):
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


@pytest.mark.parametrize(
    ("case", "targets"),
    [("llama-tied", ""), ("qwen3-tied", "q,down"), ("phi3-gqa-sliding", ""), ("phi4-mini", "k,v,up"), ("gemma2", "")],
)
def test_peft_loads_the_adapter_and_transformers_the_merged_model(case, targets, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    reference.make({**raw_config(case), "vocab_size": 320}, tmp_path / "model")
    tiny_tokenizer_dir(tmp_path / "model")
    rows = [{"prompt": f"{i} one", "response": "two " * (1 + i % 3)} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, adapter = str(tmp_path / "run"), tmp_path / "adapter"
    config = FinetuneOptions(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "rows.jsonl"),
        layers="0,2",
        steps=3,
        lora_rank=2,
        lora_alpha=3.0,
        lora_targets=targets,
        learning_rate=1e-2,
        layer_rates="2:0.5",
        out=run,
    )
    run_finetune(config)
    tokens = np.arange(3, 20)
    decoder = open_model(run).decoder()
    ours = np.asarray(logits(decoder, forward(decoder, jnp.asarray(tokens)[None]).hidden))[0]

    def differs(model):
        with torch.no_grad():
            theirs = model.eval()(torch.from_numpy(tokens)[None]).logits[0].numpy()
        return np.abs(ours - theirs).max() / np.abs(theirs).max()

    export_model(run, str(adapter), adapter=True)
    assert differs(peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)) <= BOUND
    assert differs(reference.read(export_model(run, str(tmp_path / "merged"), dtype="float32").out)) <= BOUND
    assert differs(reference.read(tmp_path / "model")) > 100 * BOUND


def random_adapter(base, out, **settings):
    """An adapter made by peft, A and B both random, read back by it: it sorts the patterns of its file."""
    torch.manual_seed(1)
    given = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM", **settings}
    peft.get_peft_model(reference.read(base), peft.LoraConfig(**given)).save_pretrained(out)
    return peft.PeftModel.from_pretrained(reference.read(base), out).eval()


def agree(name, theirs, vocab_size):
    """Logits of a model that jaxcrit opens by its name, and of peft's."""
    tokens = np.random.RandomState(0).randint(3, vocab_size, 60)
    decoder = open_model(name).decoder()
    ours = np.asarray(logits(decoder, forward(decoder, jnp.asarray(tokens)[None]).hidden))[0]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)[None]).logits[0].numpy()
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


ADAPTERS = {
    "two": {"target_modules": ["q_proj", "v_proj"]},
    "all": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "down_proj": 2},
        "alpha_pattern": {r"layers\.[02]\..*_proj": 3, "k_proj": 11},
    },
    "rslora": {"target_modules": ["o_proj", "up_proj"], "use_rslora": True, "layers_to_transform": [1, 3]},
}


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="needs ../shared/weights")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_of_a_real_model_is_read_as_peft_reads_it(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    base = SHARED / "weights" / "stories260K-hf"
    theirs = random_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    worst = agree(tmp_path / "adapter", theirs, 512)
    print(f"largest relative error {worst:.1e}")
    assert worst <= BOUND
    assert agree(base, theirs, 512) > 100 * BOUND


@pytest.mark.parametrize("case", ["phi4-mini", "llama-gqa"])
def test_fused_layers_and_a_head_trained_whole(case, tmp_path, monkeypatch):
    """One A and B over queries, keys and values; an adapter beside its model, as transformers applies it."""
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model"
    reference.make({**raw_config(case), "vocab_size": 320}, path)
    tiny_tokenizer_dir(path)
    more = {"modules_to_save": ["lm_head", "model.norm"]} if case == "llama-gqa" else {}
    theirs = random_adapter(path, tmp_path / "adapter", target_modules="all-linear", **more)
    if more:
        with torch.no_grad():
            theirs.lm_head.modules_to_save.default.weight.mul_(1.5)
            theirs.model.model.norm.modules_to_save.default.weight.add_(0.5)
        theirs.save_pretrained(tmp_path / "adapter")
    assert agree(f"{tmp_path / 'adapter'}@{path}", theirs, 320) <= BOUND
    if not more:
        theirs.save_pretrained(path)
        assert agree(path, reference.transformers.AutoModelForCausalLM.from_pretrained(path).eval(), 320) <= BOUND
