"""Opening and loading: every kind of bad directory is one line, and a mesh changes no bit."""

import hashlib
import json
import os
import struct
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.family_models import MESHES, load_path, raw_config, tensors, write_model

from jaxcrit.core.errors import UserError
from jaxcrit.models import checkpoint as checkpoints
from jaxcrit.models.checkpoint import locate, model_hash, open_checkpoint
from jaxcrit.models.config import ModelConfig
from jaxcrit.models.decoder import forward
from jaxcrit.models.export import write_checkpoint
from jaxcrit.models.weights import placement, table
from jaxcrit.parallel.mesh import make_mesh, parse_mesh

RAW = raw_config("llama-gqa")
NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", RAW)


def rewrite(path, **changes):
    """Writes the weights anew with some of them changed (None: left out)."""
    held = {
        **load_file(path / "model.safetensors"),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    save_file({name: value for name, value in held.items() if value is not None}, path / "model.safetensors")


def split(path, names=("first.safetensors", "second.safetensors")):
    """Parts the weights over two files and returns the index's weight map, to be written by `index`."""
    held = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    halves = [dict(sorted(held.items())[at::2]) for at in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, path / name)
    return {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}


def index(path, weight_map):
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def refused(path, message, read=open_checkpoint):
    with pytest.raises(UserError) as caught:
        read(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_stacked_weights_are_those_of_the_file(model):
    weights, held = load_path(model).weights(), tensors(RAW)
    for row in table(ModelConfig.from_hf(RAW)):
        layers = [held[row.hf.format(layer)] for layer in range(3)] if row.stacked else held[row.hf]
        np.testing.assert_array_equal(weights[row.path], np.reshape(layers, weights[row.path].shape))


def test_fused_rows_are_parted(tmp_path):
    raw = raw_config("phi3-gqa-sliding")
    weights, held = load_path(write_model(tmp_path, raw)).weights(), tensors(raw)
    fused = held["model.layers.1.self_attn.qkv_proj.weight"]
    np.testing.assert_array_equal(weights["blocks.k"][1], fused[32:48])
    np.testing.assert_array_equal(weights["blocks.up"][1], held["model.layers.1.mlp.gate_up_proj.weight"][48:])


def test_two_shards_and_an_old_files_buffers(model):
    expected = load_path(model).weights()
    rewrite(model, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    index(model, split(model))
    for path, value in load_path(model).weights().items():
        np.testing.assert_array_equal(value, expected[path])


def test_a_tied_head_written_twice_is_read_once(tmp_path):
    path = write_model(tmp_path, raw_config("llama-tied"))
    rewrite(path, **{"lm_head.weight": load_file(path / "model.safetensors")["model.embed_tokens.weight"]})
    assert "head" not in load_path(path).weights()


@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtype(stored, asked, tmp_path):
    path = write_model(tmp_path, RAW, stored)
    weights, held = load_path(path, dtype=asked).weights(), tensors(RAW, stored)
    np.testing.assert_array_equal(weights["blocks.down"][1], held[DOWN].astype(checkpoints.DTYPES[asked]))
    assert {str(value.dtype) for value in load_path(path).weights().values()} == {stored}


def test_files_of_mixed_dtype_load_as_float32(model):
    rewrite(model, **{NORM: np.ones(32, ml_dtypes.bfloat16)})
    assert {str(value.dtype) for value in load_path(model).weights().values()} == {"float32"}
    assert open_checkpoint(model).dtypes[NORM] == "bfloat16"


def test_large_tensors_are_read_in_pieces(model, monkeypatch):
    expected = load_path(model).weights()
    monkeypatch.setattr(checkpoints, "_READ_BYTES", 1000)
    for path, value in load_path(model).weights().items():
        np.testing.assert_array_equal(value, expected[path])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", ["llama-bias", "phi4-mini", "qwen3-mqa-bias", "olmo2", "olmoe-normed-mha"])
def test_any_mesh_holds_the_same_bits_in_shards(case, mesh, tmp_path):
    raw = raw_config(case)
    expected = load_path(write_model(tmp_path, raw)).weights()
    mesh = make_mesh(parse_mesh(mesh))
    weights = load_path(tmp_path, mesh=mesh).weights()
    config = ModelConfig.from_hf(raw)
    for row in table(config):
        value = weights[row.path]
        np.testing.assert_array_equal(value, expected[row.path])
        parts = [mesh.shape[axis] if axis else 1 for axis in placement(row.axes, config, mesh, row.hf)]
        assert value.addressable_shards[0].data.shape == tuple(
            size // part for size, part in zip(value.shape, parts, strict=True)
        )
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    each = (
        (6 // fsdp, 48 // tensor, 32) if fsdp == 2 else (6, 48 // tensor, 32 // fsdp)
    )  # four do not share six experts
    inside = each if config.experts else (48 // tensor, 32 // fsdp)
    assert weights["blocks.gate"].addressable_shards[0].data.shape == (3, *inside)
    if raw["num_key_value_heads"] == 1:  # one head cannot be parted: every device keeps it
        assert weights["blocks.k"].addressable_shards[0].data.shape == (3, 8, 32 // fsdp)


def test_heads_are_never_halved(tmp_path):
    """Three heads of 4 divide over two devices as 12 rows do; they must not."""
    mesh = make_mesh({"data": 4, "tensor": 2})
    raw = {**RAW, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
    decoder = load_path(write_model(tmp_path / "even", raw), mesh=mesh)
    parts = {name: value.addressable_shards[0].data.shape for name, value in decoder.weights().items()}
    assert parts["blocks.q"] == (3, 12, 32) and parts["blocks.o"] == (3, 32, 12)
    assert parts["blocks.k"] == parts["blocks.v"] == (3, 12, 32)  # whole on every device
    tokens = np.arange(24, dtype=np.int32).reshape(4, 6)
    whole = jax.jit(forward)(load_path(tmp_path / "even"), tokens).hidden
    np.testing.assert_allclose(jax.jit(forward)(decoder, tokens).hidden, whole, atol=1e-5)
    path = write_model(tmp_path / "odd", {**raw, "num_attention_heads": 3})
    refused(path, "heads of size 3 does not divide over tensor=2", lambda path: load_path(path, mesh=mesh))


def test_what_does_not_divide_is_refused(tmp_path):
    path = write_model(tmp_path, {**RAW, "vocab_size": 97})
    refused(path, "97", lambda path: load_path(path, mesh=make_mesh({"data": 4, "tensor": 2})))


def test_missing_truncated_or_foreign_file(model):
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-1], content[:100], content[:4], b""):
        weights.write_bytes(damaged)
        refused(model, "truncated or damaged safetensors")
    weights.unlink()
    refused(model, f"expected model.safetensors or {INDEX}, found neither")
    (model / "pytorch_model.bin").touch()
    refused(model, "only pytorch_model.bin; expected safetensors")
    (model / "consolidated.safetensors").write_bytes(content)
    refused(model, "found neither but consolidated.safetensors, which transformers does not look for")
    refused(model.parent, "no config.json; expected a Hugging Face checkpoint directory")


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"a": 1'])
def test_config_that_is_no_json_object(content, model):
    (model / "config.json").write_text(content)
    refused(model, "expected a JSON object")


def test_config_naming_a_key_twice(model):
    (model / "config.json").write_text('{"model_type": "llama", "vocab_size": 1, "vocab_size": 2}')
    refused(model, "vocab_size named twice")


TENSORS = {
    "missing": ({NORM: None, DOWN: None}, f"missing {DOWN}, {NORM}"),
    "extra": ({"model.layers.3.mlp.down_proj.weight": np.ones(2, np.float32)}, "unexpected model.layers.3.mlp.down"),
    "misshapen": ({NORM: np.ones(33, np.float32)}, f"wrong shape {NORM} (33,) (expected (32,))"),
    "transposed": ({DOWN: np.ones((48, 32), np.float32)}, f"{DOWN} (48, 32) (expected (32, 48))"),
    "float8": (
        {DOWN + "_scale": np.ones(1, np.float32)},
        f"quantised weights (fp8, NVFP4 or compressed-tensors, by {DOWN}",
    ),
    "MLX": (
        {DOWN[:-6] + "biases": np.ones(1, np.float16)},
        "quantised weights (MLX, by model.layers.1.mlp.down_proj.biases)",
    ),
    "bitsandbytes": ({DOWN + ".absmax": np.ones(1, np.float32)}, "quantised weights (bitsandbytes"),
    "GPTQ": ({DOWN[:-6] + end: np.ones(1, np.int32) for end in ("qweight", "g_idx")}, "quantised weights (GPTQ, by"),
    "AWQ": ({DOWN[:-6] + end: np.ones(1, np.int32) for end in ("qweight", "qzeros")}, "quantised weights (AWQ or GPTQ"),
    "headless": (
        {"lm_head.weight": None},
        "missing lm_head.weight: a backbone saved without its head; save it with Auto",
    ),
    "integers": ({DOWN: np.ones((32, 48), np.int8)}, f"not float weights {DOWN} I8"),
    "float64": ({NORM: np.ones(32, np.float64)}, f"not float weights {NORM} F64"),
    "untold bias": ({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}, "unexpected model.layers.0"),
}


@pytest.mark.parametrize("mistake", TENSORS)
def test_tensors_that_do_not_match_the_config(mistake, model):
    changes, message = TENSORS[mistake]
    rewrite(model, **changes)
    refused(model, message)


def test_every_mismatch_is_named_at_once(model):
    ones = np.ones(2, np.float32)
    rewrite(model, **{NORM: None, DOWN: ones, "lm_head.weight": np.ones((96, 32), np.int8), "more": ones})
    refused(model, f"missing {NORM}; unexpected more; wrong shape {DOWN} (2,) (expected (32, 48)); not float weights")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_not_finite(dtype, value, tmp_path):
    path = write_model(tmp_path, RAW, dtype)
    held = load_file(path / "model.safetensors")[DOWN]
    held[-1, -1] = value
    rewrite(path, **{DOWN: held, NORM: np.full(32, value, held.dtype)})
    refused(path, f"NaN or infinite values in {DOWN}, {NORM}", load_path)


def test_numbers_too_large_for_the_dtype(model):
    rewrite(model, **{NORM: np.full(32, 1e6, np.float32)})
    refused(model, f"{NORM} (as float16)", lambda path: load_path(path, dtype="float16"))


def test_unknown_dtype(model):
    refused(model, "--dtype=int8: expected float32, bfloat16, float16", lambda path: load_path(path, dtype="int8"))


def test_index_naming_an_absent_shard(model):
    weight_map = split(model)
    (model / "second.safetensors").unlink()
    index(model, weight_map)
    refused(model, "names shards that are not in")


def test_index_naming_a_tensor_its_shard_lacks(model):
    weight_map = split(model)
    index(model, {**weight_map, "model.more.weight": "second.safetensors"})
    refused(model, "the index says it holds model.more.weight, but it does not")


def test_a_tensor_in_another_shard_than_the_index_says_is_found_and_noted(model):
    expected = load_path(model).weights()
    weight_map = split(model)
    index(model, {**weight_map, NORM: "first.safetensors", DOWN: "second.safetensors"})
    checkpoint = open_checkpoint(model)
    assert checkpoint.shards[NORM].name == weight_map[NORM] and checkpoint.shards[DOWN].name == weight_map[DOWN]
    assert f"{INDEX} names another file for " in checkpoint.notes[0]
    np.testing.assert_array_equal(load_path(model).weights()["blocks.down"], expected["blocks.down"])


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "x" * 300])
def test_index_path_that_leaves_the_directory(file, model):
    (model.parent / "x.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    index(model, {**split(model), NORM: file})
    refused(model, "no path")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_index_that_is_none(content, model):
    split(model)
    (model / INDEX).write_text(content)
    refused(model, INDEX)


def in_both(path, first, second):
    """The final norm in both shards, with these values."""
    for name, value in (("first", first), ("second", second)):
        held = load_file(path / f"{name}.safetensors")
        save_file({**held, NORM: np.full(32, value, np.float32)}, path / f"{name}.safetensors")


def test_tensor_in_two_shards(model):
    """The last of the files counts in transformers, whatever the index says; where both agree it is read."""
    weight_map = split(model)
    in_both(model, 2, 2)
    for named in ("first.safetensors", "second.safetensors"):
        index(model, {**weight_map, NORM: named})
        np.testing.assert_array_equal(load_path(model).weights()["norm"], np.full(32, 2, np.float32))
    in_both(model, 2, 3)
    np.testing.assert_array_equal(load_path(model).weights()["norm"], np.full(32, 3, np.float32))
    index(model, {**weight_map, NORM: "first.safetensors"})
    refused(
        model, f"{NORM} is in first.safetensors and in second.safetensors with other values; transformers would read"
    )


def test_a_single_file_comes_before_an_index(model, tmp_path):
    """As transformers looks for them; the index may be left from a checkpoint that is gone, or still there."""
    held = (model / "model.safetensors").read_bytes()
    expected = load_path(model).weights()
    weight_map = split(model)
    index(model, weight_map)
    in_both(model, 5, 5)
    (model / "model.safetensors").write_bytes(held)
    for _ in range(2):
        checkpoint = open_checkpoint(model)
        np.testing.assert_array_equal(load_path(model).weights()["norm"], expected["norm"])
        assert checkpoint.notes[0] == f"model.safetensors is read; {INDEX} beside it is not, as in transformers"
        for file in ("first.safetensors", "second.safetensors"):
            (model / file).unlink(missing_ok=True)
    index(write_model(tmp_path / "other", RAW), weight_map)
    assert len(open_checkpoint(tmp_path / "other").notes) == 1


def test_files_beside_the_ones_read_are_noted(model):
    (model / "consolidated.safetensors").write_bytes(b"whatever")
    assert open_checkpoint(model).notes == ("not read, as in transformers: consolidated.safetensors",)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", INDEX])
def test_a_pointer_of_git_lfs_is_named(file, model):
    if file == INDEX:
        index(model, split(model))
    (model / file).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(model, f"{file}: a Git LFS pointer in the place of the file; fetch the files with git lfs pull")


def renamed(path, name):
    """Writes the weights anew under other names."""
    held = load_file(path / "model.safetensors")
    save_file({name(key): value for key, value in held.items()}, path / "model.safetensors")


def test_names_of_a_backbone_and_of_a_model_in_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    path = write_model(tmp_path / "model", raw_config("llama-tied"))
    expected, identity = load_path(path).weights(), model_hash(open_checkpoint(path))
    for change in (lambda key: key.removeprefix("model."), lambda key: "model.model." + key):
        renamed(path, change)
        checkpoint = open_checkpoint(path)
        assert "taken with and without model. alike" in checkpoint.notes[0] and model_hash(checkpoint) == identity
        for name, value in load_path(path).weights().items():
            np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize(
    ("prefix", "who"),
    [
        ("_orig_mod.", "torch.compile; save model._orig_mod"),
        ("module.", "DistributedDataParallel"),
        ("base_model.model.", "PEFT; save model.merge_and_unload()"),
        ("module._orig_mod.", "torch.compile; save model._orig_mod; DistributedDataParallel"),
        ("student.", "of something that wraps the model"),
    ],
)
def test_a_wrapper_is_named_by_its_prefix(prefix, who, model):
    renamed(model, lambda key: prefix + key)
    refused(model, f"all names of tensors have the prefix '{prefix}' ({who}")


def test_a_tied_config_over_another_head_keeps_the_head(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    path = write_model(tmp_path / "model", raw_config("llama-tied"))
    tied = model_hash(open_checkpoint(path))
    head = -load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(path, **{"lm_head.weight": head})
    checkpoint = open_checkpoint(path)
    assert not checkpoint.config.tied and "lm_head.weight in the file is another, and is used" in checkpoint.notes[0]
    np.testing.assert_array_equal(load_path(path).weights()["head"], head)
    assert model_hash(checkpoint) != tied
    out = write_checkpoint(load_path(path), checkpoint, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_file(out / "model.safetensors")["lm_head.weight"], head)
    assert open_checkpoint(out).notes == () and model_hash(open_checkpoint(out)) == model_hash(checkpoint)


def test_a_tied_model_that_has_its_head_alone(tmp_path):
    path = write_model(tmp_path / "model", raw_config("llama-tied"))
    embed = load_path(path).weights()["embed"]
    renamed(path, lambda key: "lm_head.weight" if "embed" in key else key)
    np.testing.assert_array_equal(load_path(path).weights()["embed"], embed)


def test_an_adapter_is_no_checkpoint(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "an adapter of PEFT (adapter_config.json) without a config.json")


def test_tensor_twice_in_the_index(model):
    weight_map = split(model)
    text = json.dumps({"weight_map": weight_map}).replace('{"weight_map": {', f'{{"weight_map": {{"{NORM}": "x", ')
    (model / INDEX).write_text(text)
    refused(model, f"{NORM} named twice")


def test_tensor_twice_in_a_header(model):
    """No writer makes this; a reader that keeps the last would take the other's bytes."""
    content = (model / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + size].decode()
    entry = json.dumps({NORM: json.loads(header)[NORM]}, separators=(",", ":"))[1:-1]
    header = "{" + entry + "," + header[1:]
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + content[8 + size :])
    refused(model, NORM)


def test_locate(model, monkeypatch):
    assert locate(str(model)) == model
    refused(str(model / "config.json"), "expected a checkpoint directory, got a file", locate)
    refused("nowhere/to/be/found", "no such directory, and not a hub id", locate)


def test_hub_id_when_offline(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused("owner/name", "no such directory, and the hub did not give it", locate)


def test_model_hash_follows_weights_and_config(model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    first = model_hash(open_checkpoint(model))
    assert first == model_hash(open_checkpoint(write_model(tmp_path / "copy", {**RAW, "transformers_version": "9"})))
    assert first != model_hash(open_checkpoint(write_model(tmp_path / "other", {**RAW, "rms_norm_eps": 1e-6})))
    index(model, split(model))
    assert first == model_hash(open_checkpoint(model))  # however it is parted into files
    assert first != model_hash(open_checkpoint(write_model(tmp_path / "half", RAW, "bfloat16")))


def test_digests_are_of_the_bytes_whatever_the_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_READ_BYTES", 64)  # three rows at a time, of the one that has rows
    arrays = {
        "scalar": np.array(2, np.float32),
        "none": np.zeros((0, 3), np.float32),
        "rows": np.ones((7, 2), ml_dtypes.bfloat16),
    }
    save_file(arrays, tmp_path / "model.safetensors")
    for name, array in arrays.items():
        found = checkpoints._digest(tmp_path / "model.safetensors", name)
        assert found == [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]


def test_digests_are_kept_until_the_file_changes(model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    made = []
    sha256 = checkpoints.hashlib.sha256
    monkeypatch.setattr(checkpoints.hashlib, "sha256", lambda *data: made.append(1) or sha256(*data))
    first, count = model_hash(open_checkpoint(model)), len(made)
    assert count > 20
    made.clear()
    assert model_hash(open_checkpoint(model)) == first
    assert len(made) < 5  # of the config, not of the tensors
    times = (model / "model.safetensors").stat()
    rewrite(model, **{NORM: np.full(32, 2, np.float32)})
    assert model_hash(open_checkpoint(model)) != first
    rewrite(model, **{NORM: np.ones(32, np.float32)})
    os.utime(
        model / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns)
    )  # as a copy that keeps times leaves
    assert model_hash(open_checkpoint(model)) != first, "the time of the last change of anything cannot be put back"


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', "[" * 10**5, "empty", "short", "numbers"])
def test_a_damaged_cache_of_digests_is_made_again(content, model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    first = model_hash(open_checkpoint(model))
    (kept,) = (tmp_path / "cache" / "digests").iterdir()
    whole = json.loads(kept.read_text())
    edited = {
        "empty": {},
        "short": {name: entry[:2] for name, entry in whole.items()},
        "numbers": {name: [entry[0], ["x"], entry[2]] for name, entry in whole.items()},
    }
    kept.write_text(json.dumps(edited[content]) if content in edited else content)
    assert model_hash(open_checkpoint(model)) == first
    assert json.loads(kept.read_text()) == whole


def test_rehash_reads_whatever_the_cache_holds(model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    first = model_hash(open_checkpoint(model))
    (kept,) = (tmp_path / "cache" / "digests").iterdir()
    forged = {name: [*entry[:2], "0" * 64] for name, entry in json.loads(kept.read_text()).items()}
    kept.write_text(json.dumps(forged))
    assert model_hash(open_checkpoint(model)) != first, "a cache that somebody forged is believed"
    token = checkpoints.REHASH.set(True)
    try:
        assert model_hash(open_checkpoint(model)) == first
    finally:
        checkpoints.REHASH.reset(token)
    assert model_hash(open_checkpoint(model)) == first


@pytest.mark.parametrize("model_id", ["../x", "a/b.git", "a--b/c", "-a/b", "a/" + "b" * 200, "a..b/c", "a/\0"])
def test_no_hub_id_is_one_line(model_id):
    with pytest.raises(UserError) as caught:
        checkpoints.locate(model_id)
    assert "not a hub id (owner/name)" in str(caught.value) or "expected a path" in str(caught.value)


def test_progress_names_each_weight_and_ends(model):
    seen = []
    load_path(model, progress=lambda *step: seen.append(step))
    assert [step[0] for step in seen] == list(range(len(seen)))
    assert seen[-1] == (12, 12, "") and seen[0][2] == "embed"


def test_equal_tensors_of_two_files_are_read_where_nothing_else_taught_numpy_bfloat16(tmp_path):
    values = np.arange(4).astype(ml_dtypes.bfloat16)
    for number in (1, 2):
        save_file({"a": values, f"b{number}": values}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    files = {f"b{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    code = "import sys; from pathlib import Path; from jaxcrit.models.shards import find_tensors\n"
    code += "print(sorted(find_tensors(Path(sys.argv[1])).files)); print('jax' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == ["['a', 'b1', 'b2']", "False"]
