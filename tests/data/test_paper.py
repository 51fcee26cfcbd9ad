"""Every dataset × family × edition against the written-out strings, piece by piece and token by token."""

import json
import os
from pathlib import Path

import make_renderings
import numpy as np
import pytest
from conftest import SHARED
from support.family_tokenizers import family_tokenizer
from support.tiny import tiny_tokenizer_dir

from jaxcrit.core.errors import UserError
from jaxcrit.data import paper
from jaxcrit.data.datasets import load
from jaxcrit.data.published import PUBLISHED
from jaxcrit.data.templates import render, template_hash
from jaxcrit.data.tokenizer import load_tokenizer
from jaxcrit.data.truncation import truncate

CASES = json.loads(make_renderings.FILE.read_text())
TRUE = os.environ.get("JAXCRIT_PAPER_TOKENIZERS")


def names(case):
    return f"{case['dataset']}-{case['family']}-{case['edition']}"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    made = {}

    def get(family, **options):
        key = (family, *options.items())
        if key not in made:
            made[key] = family_tokenizer(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return get


def test_goldens_are_what_their_generator_writes():
    assert make_renderings.FILE.read_text() == make_renderings.file_text()
    families = {(case["dataset"], case["family"], case["edition"]) for case in CASES}
    assert len(families) == len(PUBLISHED) * len(paper.FAMILIES) * 2


def expected_ids(case, tokenizer, strips):
    """Token ids and prompt length from the pieces alone, `strips` being tokens that eat white space to their right."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids, length, run, masked_run = [], 0, "", ""
    previous = None
    for kind, string, masked in [*case["pieces"], ["special", None, False]]:
        if kind == "text":
            string = string.lstrip() if previous in strips and not run else string
            if case["joined"]:
                run += string
                masked_run += string if masked else ""
            else:
                ids += encode(string)
        else:
            if run:
                before = len(ids)
                ids += encode(run)
                length = before + len(encode(masked_run)) if masked_run else length
                run = masked_run = ""
            if string is not None:
                ids.append(tokenizer.convert_tokens_to_ids(string))
        previous = string
        if masked and not run:
            length = len(ids)
    return ids, length


@pytest.mark.parametrize("case", CASES, ids=names)
@pytest.mark.parametrize("strip", [True, False])
def test_token_for_token(case, strip, stand_ins):
    """With special tokens that eat white space to their right, as Phi-3's do, and without."""
    tokenizer = stand_ins(case["family"], strip=strip)
    strips = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>") if strip and case["family"] == "phi3" else ()
    check(case, tokenizer, strips)


def check(case, tokenizer, strips):
    ids, length = expected_ids(case, tokenizer, strips)
    for template in (case["family"], "auto"):
        (example,) = render([case["row"]], tokenizer, template, dataset=case["dataset"], edition=case["edition"])
        assert list(example.token_ids) == ids
        assert example.prompt_length == length


@pytest.mark.parametrize("case", [case for case in CASES if case["edition"] == "paper"], ids=names)
def test_piece_for_piece(case):
    """The strings themselves, whatever a tokenizer makes of them."""
    shown = paper.rendering(case["family"], case["dataset"], PUBLISHED[case["dataset"]].read(case["row"], ""))
    eos = {"llama2": "</s>", "llama3": "<|eot_id|>", "phi3": "<|endoftext|>"}[case["family"]]
    bos = {"llama2": "<s>", "llama3": "<|begin_of_text|>", "phi3": ""}[case["family"]]
    found = {}
    for masked, part in ((True, shown.prompt), (False, shown.target)):
        pieces = [eos if piece == paper.EOS else piece for piece in part]
        if shown.way == "pieces":
            pieces = [
                piece if isinstance(one, paper.Special) else bos + piece
                for one, piece in zip(part, pieces, strict=True)
            ]
        found[masked] = "".join(pieces)
    if shown.way == "joined":
        found[True] = bos + found[True]
    for masked in (True, False):
        assert found[masked] == "".join(string for _, string, hidden in case["pieces"] if hidden is masked)


@pytest.mark.skipif(not TRUE, reason="JAXCRIT_PAPER_TOKENIZERS names no directory with llama2, llama3, phi3 in it")
@pytest.mark.parametrize("case", [case for case in CASES if case["edition"] == "paper"], ids=names)
def test_true_tokenizers(case):
    tokenizer = load_tokenizer(Path(TRUE) / case["family"])
    strips = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>") if case["family"] == "phi3" else ()
    check(case, tokenizer, strips)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared weights")
@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama-tok105-hf"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if (case["family"], case["edition"]) == ("llama2", "paper")], ids=names
)
def test_real_tokenizers(case, name):
    tokenizer = load_tokenizer(SHARED / "weights" / name)
    check(case, tokenizer, ())
    (example,) = render([case["row"]], tokenizer, dataset=case["dataset"], edition="paper")
    prompt = next(string for kind, string, masked in case["pieces"] if masked and kind == "text")
    assert list(example.token_ids[: example.prompt_length]) == tokenizer(prompt)["input_ids"]


class TestFamily:
    @pytest.mark.parametrize("family", ["llama2", "llama3", "phi3"])
    def test_auto_goes_by_the_tokenizer(self, family, stand_ins):
        tokenizer = stand_ins(family)
        assert paper.family_of(tokenizer) == family
        assert template_hash(tokenizer, "auto", "paper") == template_hash(tokenizer, family, "paper")

    def test_hash_covers_edition_family_and_strings(self, stand_ins, monkeypatch):
        tokenizer = stand_ins("llama3")
        hashes = [template_hash(tokenizer, template, "paper") for template in ("llama2", "llama3")]
        hashes += [template_hash(tokenizer, template) for template in ("chat", "none")]
        assert template_hash(tokenizer, "llama2") == template_hash(tokenizer, "chat") == template_hash(tokenizer)
        monkeypatch.setitem(paper._LLAMA3_SYSTEM, "gsm8k", "You are.")
        hashes.append(template_hash(tokenizer, "llama3", "paper"))
        monkeypatch.setitem(PUBLISHED, "gsm8k", PUBLISHED["boolq"])
        hashes.append(template_hash(tokenizer))
        assert len(set(hashes)) == len(hashes)

    def test_refuses(self, stand_ins, tmp_path):
        llama2, phi3 = stand_ins("llama2"), stand_ins("phi3")
        row = [make_renderings.ALPACA]

        def message(*args, **options):
            with pytest.raises(UserError) as caught:
                render(*args, **options)
            assert "\n" not in str(caught.value)
            return str(caught.value)

        assert "no token <|begin_of_text|>, <|start" in message(
            row, llama2, "llama3", dataset="alpaca", edition="paper"
        )
        assert "no token <|system|>" in message(row, llama2, "phi3", dataset="alpaca", edition="paper")
        assert "auto, llama2, llama3, phi3" in message(row, phi3, "chat", dataset="alpaca", edition="paper")
        assert "did you mean 'paper'?" in message(row, phi3, dataset="alpaca", edition="papr")
        assert "did you mean 'llama3'?" in message(row, phi3, "lama3", dataset="alpaca")
        assert "--data=dolly:PATH" in message([{"prompt": "a"}], llama2, where="a.jsonl", edition="paper")
        bare = family_tokenizer(tmp_path / "bare", "llama2", chat=False)
        assert "no chat template" in message(row, bare, "llama2", dataset="alpaca")
        bare.eos_token = None
        assert "no <eos> token" in message(row, bare, dataset="alpaca", edition="paper")


def test_a_tokenizer_of_no_family(tmp_path):
    path = tiny_tokenizer_dir(tmp_path)
    for file in path.iterdir():
        file.write_text(file.read_text().replace("</s>", "<stop>"))
    with pytest.raises(UserError, match=r"none of the paper's families .* use --edition=clean"):
        render([make_renderings.ALPACA], load_tokenizer(path), dataset="alpaca", edition="paper")


class TestLengths:
    def test_table(self):
        analysis = {
            name: [paper.longest(family, name, False) for family in ("llama2", "llama3", "phi3")] for name in PUBLISHED
        }
        assert analysis == {
            "alpaca": [None, 256, 512],
            "dolly": [None, 512, 512],
            "gsm8k": [None, 512, 512],
            "boolq": [None, 256, 512],
            "openbookqa": [None, 256, 256],
            "pure_bad": [None, 256, 256],
        }
        assert {name: paper.longest("llama2", name, True) for name in PUBLISHED} == {
            "alpaca": 512, "dolly": 256, "gsm8k": 512, "boolq": 512, "openbookqa": 256, "pure_bad": 480,
        }  # fmt: skip

    def test_truncated_and_untruncated(self, stand_ins):
        """Llama-3's prompt loses its last token where it is too long, Llama-2's stays whole."""
        row = make_renderings.ALPACA | {"instruction": "word " * 400}
        for family, limit in (("llama2", None), ("llama3", 256)):
            examples = render([row], stand_ins(family), dataset="alpaca", edition="paper")
            length = paper.longest(family, "alpaca", False)
            (cut,) = truncate(examples, "paper", 4096, paper_length=length)
            prompt = examples[0].token_ids[: examples[0].prompt_length]
            assert len(prompt) > 256
            np.testing.assert_array_equal(cut.token_ids, prompt[:limit])
            assert cut.prompt_length == len(cut.token_ids)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
def test_dolly_has_context_in_93_of_300_rows(stand_ins):
    (named,) = load(f"dolly:{SHARED / 'data' / 'dolly_test.jsonl'}")
    examples = render(named.rows, stand_ins("llama2"), dataset="dolly", edition="paper")
    assert len(examples) == 300 and sum("\n \nInput: \n" in example.prompt for example in examples) == 93
