"""GGUF files without torch: any mesh, commands end to end, export, and every refusal in a line."""

import json
import struct
import sys

import jax
import numpy as np
import pytest
from support.family_models import load_path
from support.gguf_files import ARCHITECTURES, tensors_of, write_gguf

from jaxcrit.commands import main as cli
from jaxcrit.core.errors import UserError
from jaxcrit.models import checkpoint as checkpoints
from jaxcrit.models.checkpoint import model_hash, open_checkpoint
from jaxcrit.models.model import open_model
from jaxcrit.models.weights import to_hf
from jaxcrit.parallel.mesh import make_mesh, parse_mesh


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", "llama")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_those_that_were_written(architecture, tmp_path):
    """Rows of q and k in their order, norms without Gemma's offset, fused tensors whole; to 4 bits at the coarsest."""
    held = dict(to_hf(load_path(write_gguf(tmp_path / "tiny.gguf", architecture))))
    written = tensors_of(architecture)
    assert held.keys() == written.keys()
    for name, value in written.items():
        exact = value.ndim == 1
        np.testing.assert_allclose(held[name], value, atol=1e-6 if exact else 0.12 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"])
def test_any_mesh_and_pieces_of_any_size_hold_the_same_bits(mesh, file, monkeypatch):
    expected = load_path(file).weights()
    monkeypatch.setattr(checkpoints, "_READ_BYTES", 1000)
    for path, value in load_path(file, mesh=make_mesh(parse_mesh(mesh))).weights().items():
        np.testing.assert_array_equal(value, expected[path])


def test_the_hash_is_of_what_is_stored(tmp_path, file):
    same = write_gguf(tmp_path / "same.gguf", "llama", general__name="other")
    assert model_hash(open_checkpoint(same)) == model_hash(open_checkpoint(file))
    other = write_gguf(tmp_path / "other.gguf", "llama", llama__rope__freq_base=501.0)
    assert model_hash(open_checkpoint(other)) != model_hash(open_checkpoint(file))
    data = bytearray(file.read_bytes())
    data[-40] ^= 1  # in the last tensor
    (tmp_path / "bit.gguf").write_bytes(data)
    assert model_hash(open_checkpoint(tmp_path / "bit.gguf")) != model_hash(open_checkpoint(file))


def test_a_command_says_what_it_was_dequantised_from(tmp_path, file, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"hello {i} the"}) + "\n" for i in range(12)))
    asked = ["analyze", f"--model={file}", f"--data={rows}", f"--out={tmp_path / 'run'}", "--layers=critical:1"]
    assert cli.main([*asked, "--window=3", "--trim=0"]) == 0, capsys.readouterr().err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    stored = run["model"]["dequantised_from"]
    assert stored == open_checkpoint(file).stored and "Q8_0" in stored and "F32 (7)" in stored
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert all(score["meta"]["dequantised_from"] == stored for score in scores["scores"].values())
    assert f"weights dequantised from {stored}</p>" in (tmp_path / "run" / "report.html").read_text()
    assert cli.main(["inspect", str(file)]) == 0
    assert f"tensors, dequantised from {stored}" in capsys.readouterr().out


def test_an_export_is_a_checkpoint_with_its_tokenizer(tmp_path, file):
    assert cli.main(["export", f"--model={file}", f"--out={tmp_path / 'out'}"]) == 0
    one, other = open_model(str(file)), open_model(str(tmp_path / "out"))
    for path, value in one.decoder().weights().items():
        np.testing.assert_array_equal(value, other.decoder().weights()[path])
    text = [{"role": "user", "content": "hello the"}]
    assert one.tokenizer.apply_chat_template(text) == other.tokenizer.apply_chat_template(text)
    assert (one.short_name, one.config.eos_token_ids) == ("tiny", (2,))


def test_a_run_on_a_file_is_a_model(tmp_path, file):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"hello {i}", "response": "the"}) + "\n" for i in range(8)))
    asked = ["finetune", f"--model={file}", f"--data={rows}", f"--out={tmp_path / 'run'}", "--layers=1", "--steps=1"]
    assert cli.main([*asked, "--batch_size=8"]) == 0
    tuned = open_model(str(tmp_path / "run"))
    assert tuned.describe()["dequantised_from"] == open_checkpoint(file).stored
    assert not np.array_equal(tuned.decoder().weights()["blocks.q"][1], load_path(file).weights()["blocks.q"][1])


CHANGED = {
    "architecture": ({"general__architecture": "lama"}, "got model of 'lama' (did you mean 'llama'?)"),
    "adapter": ({"general__type": "adapter"}, "got adapter of 'llama'"),
    "parts": ({"split__count": 3}, "one of 3 parts; merge them"),
    "no depth": ({"without": ("llama.block_count",)}, "no llama.block_count in its metadata"),
    "no tokens": ({"without": ("tokenizer.ggml.tokens",)}, "no tokenizer.ggml.tokens in its metadata"),
    "vocabulary": ({"llama__vocab_size": 310}, "a vocabulary of 310 tokens, but embeddings of 300"),
    "small vocabulary": ({"llama__vocab_size": 290}, "300 tokens, but llama.vocab_size is 290"),
    "lost tensor": ({"without": ("blk.1.ffn_up.weight",)}, "missing blk.1.ffn_up.weight"),
    "one layer less": ({"llama__block_count": 2}, "unexpected blk.2.attn_k.weight"),
    "other width": (
        {"llama__feed_forward_length": 96},
        "wrong shape blk.0.ffn_down.weight (32, 64) (expected (32, 96))",
    ),
    "rope": (
        {"llama__rope__scaling__type": "linear"},
        "the model has scaled rotary positions, which transformers leaves",
    ),
    "experts": ({"llama__expert_count": 8}, "the model has experts"),
    "both ways": ({"llama__attention__causal": False}, "the model has attention to what follows"),
    "alignment": ({"general__alignment": 0}, "expected general.alignment to be a positive whole number, got 0"),
    "kind": ({"general__architecture": 7}, "expected general.architecture to be text, got 7"),
    "numbers for tokens": ({"tokenizer__ggml__tokens": [1, 2]}, "expected tokenizer.ggml.tokens[0] to be text, got 1"),
    "stop a text": (
        {"tokenizer__ggml__eos_token_id": "x"},
        "ggml.eos_token_id to be a whole number, got 'x'",
    ),
    "depth a text": ({"llama__block_count": "3"}, "expected num_hidden_layers to be a positive whole number, got '3'"),
    "depth beyond": (
        {"llama__block_count": 2**30},
        "num_hidden_layers to be a whole number of at most 10,000",
    ),
    "size a text": ({"llama__vocab_size": "x"}, "expected llama.vocab_size to be a positive whole number, got 'x'"),
    "parts a text": ({"split__count": "x"}, "expected split.count to be a whole number, got 'x'"),
    "list": (
        {"llama__attention__head_count_kv": [2, 2, 1]},
        "expected num_key_value_heads to be a positive whole number",
    ),
}


@pytest.mark.parametrize("mistake", CHANGED)
def test_what_does_not_fit_is_refused_in_a_line(mistake, tmp_path):
    changes, message = CHANGED[mistake]
    path = write_gguf(tmp_path / "bad.gguf", "llama", **changes)
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    assert message in str(caught.value) and "bad.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_what_transformers_leaves_out_of_gemma_is_refused(tmp_path):
    for changes, message in (
        ({"gemma2__block_count": 46}, "the model has another scale of attention, which"),
        ({"gemma2__attn_logit_softcapping": 30.0}, "the model has other soft caps, which"),
        ({"gemma2__rope__dimension_count": 4}, "the model has heads that are rotated in part, which"),
    ):
        with pytest.raises(UserError, match=message):
            open_checkpoint(write_gguf(tmp_path / "bad.gguf", "gemma2", **changes))


def test_a_truncated_file_at_any_length(tmp_path, file):
    data = file.read_bytes()
    for length in (*range(0, 400, 7), *range(400, len(data) - 64, 1009), len(data) - 64):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut\.gguf: (truncated|no )"):
            open_checkpoint(tmp_path / "cut.gguf")


@pytest.mark.parametrize(("number", "named"), [(99, "99"), (9, "9")])  # unknown, and known without a way to dequantise
def test_an_unknown_type_of_tensor(number, named, tmp_path, file):
    data = bytearray(file.read_bytes())
    at = data.index(b"blk.0.attn_v.weight") + len(b"blk.0.attn_v.weight") + 4 + 2 * 8
    data[at : at + 4] = struct.pack("<I", number)
    (tmp_path / "type.gguf").write_bytes(data)
    with pytest.raises(
        UserError, match=rf"blk\.0\.attn_v\.weight is of type {named}, which the gguf package here cannot"
    ):
        open_checkpoint(tmp_path / "type.gguf")


def test_other_content_and_other_versions(tmp_path, file):
    for data, message in (
        (b"not a model at all", "expected a GGUF file, got other content"),
        (
            b"GGUF" + struct.pack("<I", 1) + file.read_bytes()[8:],
            "expected version 2 or 3 of GGUF, little endian, got 1",
        ),
        (b"GGUF" + struct.pack(">I", 3) + file.read_bytes()[8:], "little endian, got 50331648"),
    ):
        (tmp_path / "other.gguf").write_bytes(data)
        with pytest.raises(UserError, match=message):
            open_checkpoint(tmp_path / "other.gguf")


def test_a_tokenizer_that_cannot_be_built(tmp_path):
    for changes, message in (
        ({"tokenizer__ggml__model": "rwkv"}, r"its tokenizer \(rwkv\) cannot be built"),
        ({"tokenizer__ggml__bos_token_id": 300}, "bos_token is 300, but its vocabulary has 300 tokens"),
    ):
        path = write_gguf(tmp_path / "bad.gguf", "llama", **changes)
        with pytest.raises(UserError, match=message):
            open_model(str(path), mesh=make_mesh(None, jax.devices()[:1]))


def test_without_the_package_the_extra_is_named(file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    file.touch()  # what was read of it before is read anew
    assert cli.main(["score", f"--model={file}"]) == 2
    assert "GGUF files need the gguf package: pip install 'jaxcrit[gguf]'" in capsys.readouterr().err
