"""``jaxcrit inspect``: everything that is decided when a model is opened, where a user can look it up."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import load_file, save_file
from support.tiny_model import tiny_checkpoint

import jaxcrit as jc
from jaxcrit.commands.main import main
from jaxcrit.data.tokenizer import load_tokenizer


def sections(text):
    """Lines by title."""
    found, title = {}, ""
    for line in text.splitlines():
        if line.endswith(":") and not line.startswith((" ", "·", "+")):
            title = line.removesuffix(":")
            found[title] = []
        else:
            found[title].append(line.strip())
    return found


def test_what_is_decided_is_said(tmp_path, capsys):
    path = tiny_checkpoint(
        tmp_path / "model",
        model_type="qwen2",
        architectures=["Qwen2Model"],
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=5,
        torch_dtype="float16",
        unknown_mark=3,
        max_length=20,
    )
    held = load_file(path / "model.safetensors")
    save_file({**held, "lm_head.weight": -held["model.embed_tokens.weight"]}, path / "model.safetensors")
    (path / "model.safetensors.index.json").write_text("{}")
    (path / "other.safetensors").write_bytes(b"")
    assert main(["inspect", str(path)]) == 0
    found = sections(capsys.readouterr().out)
    model, size = jc.load(path), (path / "model.safetensors").stat().st_size
    assert found["model"][0] == f"{path} ({model.model_hash[:12]})"
    assert found["model"][1].startswith("qwen2: 7 layers of width 24, MLP 32, 4 heads of 6 (2 of keys and values)")
    assert found["model"][2] == "head: its own"
    assert found["files"] == [
        f"config.json of {path}",
        f"model.safetensors: {len(held) + 1} tensors, float32, {size / 1000:.4g} kB",
        "model.safetensors is read; model.safetensors.index.json beside it is not, as in transformers",
        "not read, as in transformers: other.safetensors",
        "config.json says that the head is the embedding; lm_head.weight in the file is another, and is used",
    ]
    count = sum(np.asarray(value).size for value in model.decoder().weights().values())
    assert found["memory"] == [
        f"{count:,} weights, {4 * count / 1000:.4g} kB as stored",
        f"{4 * count / 1000:.4g} kB in float32, as they are read here",
    ]
    assert found["keys of config.json that play no part"] == ["max_length, unknown_mark"]
    assert found["attention"] == [
        "layers 0-4 see all tokens before",
        "layers 5-6 see 16 tokens, itself included",
        "RoPE: default, 6 of 6 dimensions",
    ]
    assert f"of {path}, " in found["tokenizer"][0] and "chat template" in found["tokenizer"][1]
    token = load_tokenizer(path).convert_ids_to_tokens(1)
    assert f"1 {token!r}, of config.json" in found["answers end at"]
    assert any(line.startswith("+ 4") for line in found["what is trained on (+)"])
    record = model.describe()
    assert record["ignored_keys"] == ["max_length", "unknown_mark"] and len(record["notes"]) == 3


def test_runs_and_adapters_say_what_lies_on_top(tmp_path):
    path = tiny_checkpoint(tmp_path / "model", num_hidden_layers=4)
    rows = [{"prompt": f"{number} cat", "response": "dog"} for number in range(12)]
    quick = {"steps": 1, "batch_size": 8}
    jc.finetune(path, rows, [0, 1, 3], out=tmp_path / "run", train_norms=True, **quick)
    jc.finetune(path, rows, [2], out=tmp_path / "lora", lora_rank=2, lora_targets="q,down", **quick)
    assert main(["export", f"--run={tmp_path / 'lora'}", "--adapter", f"--out={tmp_path / 'adapter'}"]) == 0
    files = {name: sections(jc.inspect(tmp_path / name))["files"][-1] for name in ("run", "lora", "adapter")}
    assert files["run"] == f"on top, from {tmp_path / 'run'}: weights of layers 0-1,3; whole: norm"
    assert files["lora"] == f"on top, from {tmp_path / 'lora'}: adapters of rank 2 on down, q of layers 2"
    assert files["adapter"] == files["lora"].replace("/lora:", "/adapter:")


def test_a_template_that_refuses_the_example_is_quoted(tmp_path):
    path = tiny_checkpoint(tmp_path / "model")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('one turn only') }}"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").unlink(missing_ok=True)
    shown = sections(jc.inspect(path))["what is trained on (+)"]
    assert shown[0].startswith("example, row 1: ") and "one turn only" in shown[0]
    assert "masked" in jc.inspect(path, template="none")
