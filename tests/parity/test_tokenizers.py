"""Tokenizers are those that transformers' AutoTokenizer gives: the same class, the same ids, whatever the text."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHARED
from support.family_tokenizers import family_tokenizer
from transformers import AutoTokenizer

import jaxcrit
from jaxcrit.data.tokenizer import load_tokenizer

EMBEDDED = Path(jaxcrit.__file__).parent / "assets" / "demo_model"
FAMILIES = [
    *("", "llama", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "olmo3", "granite"),
    "mistral",
]
NAMES = (
    "",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "LlamaTokenizerFast",
    "GPT2Tokenizer",
    "Qwen2TokenizerFast",
)
NAMES += ("GemmaTokenizer", "CohereTokenizerFast")


def odd_texts(seed=0):
    """Texts in which tokenizers differ: spaces, line breaks, special tokens, other scripts, halves of letters."""
    draw = random.Random(seed)
    parts = [
        "  ",
        " ",
        "\n",
        "\t",
        "\r\n",
        "é",
        "e\u0301",
        "ﬁ",
        "漢字",
        "🙂",
        "👩‍👩‍👧",
        "ÅΩ",
        "\u200b",
        "\u00a0",
        "\x00",
        "½",
    ]
    parts += [
        "<s>",
        "</s>",
        "<|end|>",
        "<|eot_id|>",
        "[INST]",
        "<unk>",
        "the",
        "12345",
        "'ll",
        "ünï",
        "a" * 40,
        "▁",
        "Ġ",
    ]
    return ["", *parts, *("".join(draw.choices([*parts, " the cat", " sat"], k=12)) for _ in range(60))]


def assert_alike(path):
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert type(ours) is type(theirs)
    texts = odd_texts()
    for special in (False, True):
        found, wanted = (one(texts, add_special_tokens=special)["input_ids"] for one in (ours, theirs))
        assert found == wanted
    assert [ours.decode(ids) for ids in found] == [theirs.decode(ids) for ids in wanted]
    assert ours.get_vocab() == theirs.get_vocab() and ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("kind", ["llama2", "llama3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_class_and_ids_are_those_of_transformers(tmp_path, kind, family):
    family_tokenizer(tmp_path, kind)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for name in NAMES:
        file.write_text(json.dumps({**settings, "tokenizer_class": name} if name else {"eos_token": "</s>"}))
        if family:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        try:
            AutoTokenizer.from_pretrained(tmp_path)(odd_texts())
        except Exception:  # of files that fit no such class; what cannot be loaded is refused here too
            continue
        assert_alike(tmp_path)


def test_the_embedded_model_and_shared_ones():
    assert_alike(EMBEDDED)
    for path in (SHARED / "weights").glob("*-hf"):
        assert_alike(path)


def test_torch_is_not_imported_for_a_tokenizer():
    program = """
import sys
from jaxcrit.data.templates import render
from jaxcrit.data.tokenizer import load_tokenizer
(example,) = render([{"prompt": "one", "response": "two"}], load_tokenizer(sys.argv[1]))
assert "torch" not in sys.modules and "transformers.models.auto" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(EMBEDDED)], check=True)


def test_sentencepiece_alone(tmp_path):
    """ids as sentencepiece's own, from a directory that holds tokenizer.model and no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat\nthe dog sat on the cat\none and one is two\n" * 20)
    path = tmp_path / "model"
    path.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(path / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (path / "tokenizer.vocab").unlink()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    ours, theirs = load_tokenizer(path), sentencepiece.SentencePieceProcessor(str(path / "tokenizer.model"))
    for text in ("the cat", "one dog is on the mat", "two é 漢", "the  cat"):
        assert ours(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)
    assert_alike(path)
