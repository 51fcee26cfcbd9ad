"""What we write, transformers loads, with the bits it had."""

import numpy as np
import pytest
from support import reference
from support.family_models import load_path, raw_config

from jaxcrit.models.checkpoint import open_checkpoint
from jaxcrit.models.export import export, write_checkpoint

torch = reference.torch
EXPORTED = (
    *("llama-bias", "llama-tied", "qwen2-mha", "qwen3-tied", "mistral-sliding", "phi3-gqa-sliding", "phi4-mini"),
    *("gemma2", "gemma3", "olmo2", "olmo3-yarn", "granite", "smollm3-sliding"),
    *("olmoe-normed-mha", "qwen3_moe", "mixtral"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("case", EXPORTED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_come_back_bit_for_bit(case, dtype, tmp_path):
    model = reference.make(raw_config(case), tmp_path / "in", DTYPES[dtype])
    again = reference.read(export(str(tmp_path / "in"), str(tmp_path / "out")), DTYPES[dtype])
    assert_same(model, again)
    sharded = write_checkpoint(
        load_path(tmp_path / "in"), open_checkpoint(tmp_path / "in"), tmp_path / "sharded", shard_bytes=8192
    )
    assert len(list(sharded.glob("*.safetensors"))) > 4
    assert_same(model, reference.read(sharded, DTYPES[dtype]))
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}


def test_other_dtype_is_rounded_as_torch_rounds(tmp_path):
    model = reference.make(raw_config("llama-gqa"), tmp_path / "in")
    export(str(tmp_path / "in"), str(tmp_path / "out"), dtype="bfloat16")
    again = reference.read(tmp_path / "out", "auto")
    assert again.dtype == torch.bfloat16
    assert_same(model.to(torch.bfloat16), again)


def test_bfloat16_file_read_without_torch_holds_the_same_numbers(tmp_path):
    model = reference.make(raw_config("llama-gqa"), tmp_path, torch.bfloat16)
    weights = load_path(tmp_path).weights()
    assert all(str(value.dtype) == "bfloat16" for value in weights.values())
    np.testing.assert_array_equal(
        np.asarray(weights["embed"], np.float32), model.model.embed_tokens.weight.detach().float().numpy()
    )


def assert_same(model, other):
    expected, got = model.state_dict(), other.state_dict()
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert value.dtype == got[name].dtype and torch.equal(value, got[name]), name
