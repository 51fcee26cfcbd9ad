"""Export: the same bits, the files beside the weights, and a directory that is whole or absent."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.family_models import load_path, raw_config, tensors, write_model

from jaxcrit.core.errors import UserError
from jaxcrit.models import export as exporting
from jaxcrit.models.checkpoint import open_checkpoint
from jaxcrit.models.export import export, write_checkpoint
from jaxcrit.parallel.mesh import make_mesh


def assert_same(path, expected):
    held = {}
    for file in sorted(path.glob("*.safetensors")):
        held |= load_file(file)
    assert held.keys() == expected.keys()
    for name, value in expected.items():
        assert held[name].dtype == value.dtype
        np.testing.assert_array_equal(held[name].view(np.uint8), value.view(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["llama-bias", "qwen2-tied", "phi4-mini", "mixtral"])
def test_same_bits_in_one_file_or_many(case, dtype, tmp_path):
    raw = raw_config(case)
    source = write_model(tmp_path / "in", raw, dtype)
    out = export(str(source), str(tmp_path / "out"))
    assert [file.name for file in out.glob("*.safetensors")] == ["model.safetensors"]
    assert_same(out, tensors(raw, dtype))
    assert json.loads((out / "config.json").read_text()) == raw
    again = write_checkpoint(load_path(out), open_checkpoint(out), tmp_path / "sharded", shard_bytes=8192)
    assert_same(again, tensors(raw, dtype))
    assert_same(export(str(again), str(tmp_path / "back")), tensors(raw, dtype))
    sizes = {file.name: sum(value.nbytes for value in load_file(file).values()) for file in again.glob("*.safetensors")}
    index = json.loads((again / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert set(index["weight_map"].values()) == set(sizes) and len(sizes) > 4
    one = max(value.nbytes for value in tensors(raw, dtype).values())
    assert max(sizes.values()) <= max(8192, one)


def test_weights_on_a_mesh_are_gathered(tmp_path):
    raw = raw_config("phi4-mini")
    source = write_model(tmp_path / "in", raw)
    decoder = load_path(source, mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    assert_same(write_checkpoint(decoder, open_checkpoint(source), tmp_path / "out"), tensors(raw))


def test_each_tensor_keeps_its_own_dtype(tmp_path):
    from safetensors.numpy import save_file

    source = write_model(tmp_path / "in", raw_config("llama-gqa"))
    held = load_file(source / "model.safetensors")
    mixed = {name: value.astype("float16") if "norm" in name else value for name, value in held.items()}
    save_file(mixed, source / "model.safetensors")
    assert_same(export(str(source), str(tmp_path / "out")), mixed)
    out = export(str(source), str(tmp_path / "half"), dtype="bfloat16")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert set(open_checkpoint(out).dtypes.values()) == {"bfloat16"}


def test_tokenizer_and_template_travel_along_and_code_does_not(tmp_path):
    source = write_model(tmp_path / "in", raw_config("llama-gqa"))
    carried = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "merges.txt"}
    for name in carried | {"modeling_llama.py", "optimizer.pt"}:
        (source / name).write_text(name)
    out = export(str(source), str(tmp_path / "out"))
    assert {file.name for file in out.iterdir()} == carried | {"config.json", "model.safetensors"}
    assert (out / "merges.txt").read_text() == "merges.txt"
    umask = os.umask(0)
    os.umask(umask)
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("broken", ["save_file", "write_text", "shutil.copyfile"])
def test_nothing_is_left_of_a_failed_export(broken, tmp_path, monkeypatch):
    source = write_model(tmp_path / "in", raw_config("llama-gqa"))
    (source / "tokenizer.json").write_text("{}")

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(f"{exporting.__name__}.{broken}", fail)
    with pytest.raises(OSError, match="no space"):
        write_checkpoint(load_path(source), open_checkpoint(source), tmp_path / "out", shard_bytes=8192)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_bad_source_leaves_nothing(tmp_path):
    source = write_model(tmp_path / "in", raw_config("llama-gqa"))
    (source / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="truncated or damaged"):
        export(str(source), str(tmp_path / "deep" / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_out_that_is_taken_or_cannot_be_made(tmp_path):
    source = write_model(tmp_path / "in", raw_config("llama-gqa"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "file").touch()
    for out in ("in", "full", "file"):
        with pytest.raises(UserError, match="exists and is not an empty directory"):
            export(str(source), str(tmp_path / out))
    with pytest.raises(UserError, match="cannot be written"):
        export(str(source), str(tmp_path / "file" / "out"))
    with pytest.raises(UserError, match="--dtype=int8"):
        export(str(source), str(tmp_path / "out"), dtype="int8")
    (tmp_path / "empty").mkdir()
    assert export(str(source), str(tmp_path / "empty")) == tmp_path / "empty"
