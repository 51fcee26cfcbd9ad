"""A directory of PEFT as a model: its base found, its layers in their places, and one line for what it may be else."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny_model import prompts_file, tiny_checkpoint

import jaxcrit as jc
from jaxcrit.commands.main import main
from jaxcrit.core.errors import UserError
from jaxcrit.models.lora import make_lora, peft_config, peft_tensors

DOWN = "base_model.model.model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, an adapter on it that names it, and what the adapter adds to ``blocks.down`` of layer 1."""
    folder = tmp_path_factory.mktemp("adapters")
    base = tiny_checkpoint(folder / "base", num_hidden_layers=3)
    config = jc.load(base).config
    lora = make_lora(config, 2, 3.0, ["q", "down"])
    entries = {
        name: np.random.default_rng(at).normal(0, 1, shape).astype(np.float32)
        for at, (name, (_, shape)) in enumerate(lora.shapes(config, 2).items())
    }
    tensors = peft_tensors(config, lora, [0, 1], entries)
    write(folder / "adapter", peft_config(config, lora, [0, 1], str(base)), tensors)
    return base, folder / "adapter", 1.5 * tensors[DOWN + ".lora_B.weight"] @ tensors[DOWN + ".lora_A.weight"]


def write(path, settings, tensors):
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, path / "adapter_model.safetensors")


def changed(adapter, to, settings=None, tensors=None, without=()):
    """The adapter with other settings, and with tensors changed (None: left out)."""
    held = {**load_file(adapter / "adapter_model.safetensors"), **(tensors or {})}
    content = json.loads((adapter / "adapter_config.json").read_text())
    content = {key: value for key, value in {**content, **(settings or {})}.items() if key not in without}
    write(to, content, {name: value for name, value in held.items() if value is not None})
    return to


def moved(model, base):
    """What an adapter has added to ``blocks.down`` ``[L, out, in]``."""
    return np.asarray(model.decoder().weights()["blocks.down"]) - np.asarray(base.decoder().weights()["blocks.down"])


def test_the_base_is_named_in_the_adapter_by_the_user_or_lies_beside_it(made, tmp_path, monkeypatch):
    base, adapter, added = made
    plain, named = jc.load(base), jc.load(adapter)
    found = moved(named, plain)
    np.testing.assert_allclose(found[1], added, atol=2e-6)
    assert not found[2].any()
    assert named.describe()["path"] == str(adapter) and named.model_hash != plain.model_hash
    lost = changed(adapter, tmp_path / "lost", {"base_model_name_or_path": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match=r"lost: its base is not there: .*; give .*lost@BASE"):
        jc.load(lost)
    asked = jc.load(f"{lost}@{base}")
    assert asked.describe()["path"] == f"{lost}@{base}" and asked.model_hash == named.model_hash
    both = tmp_path / "both"
    shutil.copytree(base, both)
    for file in lost.iterdir():
        shutil.copy(file, both / file.name)
    assert jc.load(both).model_hash == named.model_hash, "as in transformers, the model beside it is the base"
    monkeypatch.chdir(adapter.parent)
    relative = changed(adapter, tmp_path / "relative", {"base_model_name_or_path": "base"})
    assert jc.load(relative).model_hash == named.model_hash
    unnamed = changed(adapter, tmp_path / "unnamed", without=["base_model_name_or_path"])
    with pytest.raises(UserError, match=r"names no base_model_name_or_path; give .*@BASE"):
        jc.load(unnamed)
    with pytest.raises(UserError, match=r"expected ADAPTER@BASE, but .*base holds no adapter_config.json"):
        jc.load(f"{base}@{base}")
    with pytest.raises(UserError, match=r"its base .* holds an adapter itself; merge that one first"):
        jc.load(f"{adapter}@{both}")
    with pytest.raises(UserError, match=r"step=3: .*adapter is no finetune run, and has no steps"):
        jc.load(adapter, step="3")


def test_ranks_and_scales_of_single_layers(made, tmp_path):
    base, adapter, added = made
    plain = jc.load(base)
    held = load_file(adapter / "adapter_model.safetensors")
    narrow = {
        f"{DOWN}.lora_A.weight": held[f"{DOWN}.lora_A.weight"][:1],
        f"{DOWN}.lora_B.weight": np.ascontiguousarray(held[f"{DOWN}.lora_B.weight"][:, :1]),
    }
    one = narrow[f"{DOWN}.lora_B.weight"] @ narrow[f"{DOWN}.lora_A.weight"]
    patterns = {"rank_pattern": {"layers.1.mlp.down_proj": 1}, "alpha_pattern": {"down_proj": 5.0}}
    found = moved(jc.load(changed(adapter, tmp_path / "patterns", patterns, narrow)), plain)
    np.testing.assert_allclose(found[1], 5 * one, atol=1e-5)
    found = moved(jc.load(changed(adapter, tmp_path / "rslora", {"use_rslora": True})), plain)
    np.testing.assert_allclose(found[1], added * np.sqrt(2), atol=1e-5)
    refused(
        changed(adapter, tmp_path / "rank", {"r": 3}), "has rank 2 in adapter_model.safetensors and 3 in adapter_con"
    )


def test_an_adapter_is_a_model_to_every_command(made, tmp_path, capsys):
    base, adapter, added = made
    rows = prompts_file(tmp_path / "rows.jsonl")
    assert (
        main(["analyze", f"--model={adapter}", f"--data={rows}", "--window=3", "--trim=0", f"--out={tmp_path / 'run'}"])
        == 0
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["model"]["path"] == str(adapter)
    assert main(["data", f"--model={adapter}", f"--data={rows}"]) == 0
    assert main(["export", f"--model={adapter}", f"--out={tmp_path / 'merged'}"]) == 0
    np.testing.assert_array_equal(
        jc.load(tmp_path / "merged").decoder().weights()["blocks.down"],
        jc.load(adapter).decoder().weights()["blocks.down"],
    )
    assert main(["export", f"--model={adapter}", "--adapter", f"--out={tmp_path / 'again'}"]) == 0
    np.testing.assert_allclose(moved(jc.load(tmp_path / "again"), jc.load(base))[1], added, atol=2e-6)
    more = [{"prompt": f"{number} cat", "response": "dog"} for number in range(12)]
    tuned = jc.finetune(jc.load(adapter), more, [2], steps=1, batch_size=8, out=tmp_path / "tuned")
    assert jc.load(tmp_path / "tuned").model_hash == tuned.model_hash and len(tuned.overlays) == 2
    asked = ["plan", f"--model={adapter}", "--topology=v5e:1x1", "--job=analyze", "--length=32"]
    assert main(asked) == 0, "planned as its base"
    capsys.readouterr()


def test_the_tokenizer_of_the_adapter_comes_first_and_is_exported(made, tmp_path):
    _, adapter, _ = made
    own = changed(adapter, tmp_path / "own")
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{base}/{name}", own / name)
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages[0].content }}"}))
    model = jc.load(own)
    assert model.tokenizer.chat_template == "{{ messages[0].content }}" != jc.load(adapter).tokenizer.chat_template
    assert jc.load(jc.export(model, tmp_path / "out")).tokenizer.chat_template == "{{ messages[0].content }}"


def refused(path, message):
    with pytest.raises(UserError) as caught:
        jc.load(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


SETTINGS = {
    "IA3": ({"peft_type": "IA3"}, "an adapter of peft_type 'IA3'; expected LORA"),
    "DoRA": ({"use_dora": True}, "use_dora is on (DoRA); expected plain LoRA"),
    "biases": ({"bias": "lora_only"}, "bias='lora_only' is not known here"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not known here"),
    "repeated layers": (
        {"layer_replication": [[0, 2], [1, 3]]},
        "layer_replication=[[0, 2], [1, 3]] is not known here",
    ),
    "a later kind": ({"use_something": 1}, "use_something=1 is not known here"),
    "rank": ({"r": "two"}, "expected r to be a positive number, got 'two'"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_other_adapters_are_refused_by_name(kind, made, tmp_path):
    settings, message = SETTINGS[kind]
    refused(changed(made[1], tmp_path / "adapter", settings), message)


TENSORS = {
    "half": ({f"{DOWN}.lora_B.weight": None}, "model.layers.1.mlp.down_proj: expected A and B of one rank for 24 rows"),
    "shape": ({f"{DOWN}.lora_A.weight": np.ones((2, 5), np.float32)}, "expected A and B of one rank for 24 rows"),
    "magnitudes": ({f"{DOWN}.lora_magnitude_vector": np.ones(24, np.float32)}, "lora_magnitude_vector (24,)"),
    "another layer": (
        {DOWN.replace("1", "7") + ".lora_A.weight": np.ones((2, 32), np.float32)},
        "model.layers.7.mlp.down",
    ),
    "a tied head": ({"base_model.model.lm_head.weight": np.ones((320, 24), np.float32)}, "lm_head.weight (320, 24)"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_fit_the_base(kind, made, tmp_path):
    tensors, message = TENSORS[kind]
    refused(changed(made[1], tmp_path / "adapter", tensors=tensors), message)


def test_files_that_are_none(made, tmp_path):
    path = changed(made[1], tmp_path / "adapter")
    file = path / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:50])
    refused(path, "adapter_model.safetensors: truncated or damaged safetensors")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(path, "a Git LFS pointer")
    file.rename(path / "adapter_model.bin")
    refused(path, "found none (adapter_model.bin can run code and is not read)")


def test_a_base_that_cannot_be_read_says_how_to_name_another(made, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(made[0], base)
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "quantization_config": {"quant_method": "bitsandbytes"}}))
    path = changed(made[1], tmp_path / "adapter", {"base_model_name_or_path": str(base)})
    refused(path, "quantised checkpoint (bitsandbytes, by quantization_config)")
    refused(path, "ADAPTER@BASE names another")


def test_a_final_norm_trained_beside_it(made, tmp_path):
    norm = np.arange(24, dtype=np.float32)
    path = changed(made[1], tmp_path / "adapter", tensors={"base_model.model.model.norm.weight": norm})
    model = jc.load(path)
    np.testing.assert_array_equal(model.decoder().weights()["norm"], norm)
    assert jax.tree.map(np.shape, model.overlays[0].params)["train"]["norm"] == (24,)
