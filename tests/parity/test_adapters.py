"""Adapters against peft: the same training in float64, and an exported directory that is the tuned model."""

from __future__ import annotations

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.family_models import BOUND, load_path, raw_config
from support.tiny import tiny_tokenizer_dir
from support.tiny_training import Trainer, random_batch

from jaxcrit.commands.finetune import run_finetune
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.models.decoder import forward, logits
from jaxcrit.models.lora import make_lora, peft_config, peft_tensors
from jaxcrit.models.model import open_model
from jaxcrit.studies.exporting import export_model

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
