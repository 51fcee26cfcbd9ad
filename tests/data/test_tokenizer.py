"""Loading a tokenizer: offline, quiet, and never running what a checkpoint ships."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import SHARED
from support.tiny import tiny_tokenizer_dir

from jaxcrit.core.errors import UserError
from jaxcrit.data.tokenizer import load_tokenizer


def test_tiny(tmp_path):
    tokenizer = load_tokenizer(tiny_tokenizer_dir(tmp_path))
    assert tokenizer.bos_token_id == 0 and tokenizer.eos_token_id == 1
    text = "the cat: 1 + 2 = ë"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared weights")
@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama-tok105-hf"])
def test_real(name):
    tokenizer = load_tokenizer(str(SHARED / "weights" / name))
    assert tokenizer("Once upon a time")["input_ids"][0] == tokenizer.bos_token_id == 1


def test_refuses_what_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="got no directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match=r"tokenizer\.json, tokenizer\.model, vocab\.json"):
        load_tokenizer(tmp_path)
    for content in ("{", "{}"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="cannot be loaded") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_checkpoint_is_never_run(tmp_path, known):
    tiny_tokenizer_dir(tmp_path)
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit('ran')")
    path = tmp_path / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}
    config = json.loads(path.read_text()) | own | ({} if known else {"tokenizer_class": "Own"})
    path.write_text(json.dumps(config))
    if known:
        assert load_tokenizer(tmp_path).bos_token_id == 0
    else:
        with pytest.raises(UserError, match="never run"):
            load_tokenizer(tmp_path)


def test_quiet_without_torch_and_lazy(tmp_path):
    """A machine without torch prints nothing, and the rooms import without transformers."""
    program = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest)
import jaxcrit, jaxcrit.data.batches, jaxcrit.data.datasets, jaxcrit.data.templates, jaxcrit.data.tokenizer
assert "transformers" not in sys.modules and "jinja2" not in sys.modules
jaxcrit.data.tokenizer.load_tokenizer(sys.argv[1])
import transformers
assert not transformers.is_torch_available()
"""
    command = [sys.executable, "-c", program, str(tiny_tokenizer_dir(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_sentencepiece_that_is_not_installed_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    hidden = ("sentencepiece",)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0f\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(UserError, match=r"tokenizer\.model: .* needs sentencepiece.*; pip install 'jaxcrit\[sente"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("PHVuaz4= 0\n")  # tiktoken's format goes by the same name
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("changes", [{"model_max_length": [1]}, {"chat_template": [{"a": 1}]}, {"tokenizer_class": 3}])
def test_settings_of_other_types_are_one_line(changes, tmp_path):
    path = tiny_tokenizer_dir(tmp_path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
