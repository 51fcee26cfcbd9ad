"""Facts: the layouts that are read, what is refused in a line, and the places of a subject's tokens."""

from __future__ import annotations

import json

import pytest
from support.family_tokenizers import SPECIAL, family_tokenizer
from support.tiny import tiny_tokenizer_dir

from jaxcrit.core.errors import UserError
from jaxcrit.data.facts import Fact, bundled, placed, read_facts
from jaxcrit.data.tokenizer import load_tokenizer

OWN = {"prompt": "The capital of {} is", "subject": "France", "target": "Paris"}
COUNTERFACT = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English"},
        "target_true": {"str": "French"},
        "subject": "Somebody Else",
    },
    "paraphrase_prompts": ["Long ago. Somebody Else spoke "],
    "neighborhood_prompts": ["The mother tongue of Nobody is"],
    "generation_prompts": ["left alone"],
}
ZSRE = {
    "src": "In which town was Somebody born?",
    "subject": "Somebody",
    "answers": ["Ulm"],
    "alt": "Bonn",
    "rephrase": "Where was Somebody born?",
    "loc": "nq question: who made the sky",
    "loc_ans": "nobody",
}
EASYEDIT = {
    "prompt": "Somebody was born in",
    "subject": "Somebody",
    "target_new": "Bonn",
    "ground_truth": "Ulm",
    "rephrase_prompt": "The birth of Somebody was in",
    "locality": {"neighborhood": {"prompt": ["Nobody was born in"], "ground_truth": ["Rome"]}},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny_tokenizer_dir(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def read(tmp_path):
    def read(*rows):
        path = tmp_path / "facts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_facts(str(path))

    return read


def test_layouts(read):
    own, counterfact, zsre, easyedit = read(OWN, COUNTERFACT, ZSRE, EASYEDIT)
    assert own == Fact("The capital of {} is", "France", "Paris", relation="The capital of {} is")
    assert (own.text, own.truth) == ("The capital of France is", "Paris")
    assert counterfact == Fact(
        "The mother tongue of {} is",
        "Somebody Else",
        "English",
        "French",
        "P103",
        ("Long ago. Somebody Else spoke",),
        (("The mother tongue of Nobody is", "French"),),
    )
    assert counterfact.truth == "French"
    assert (zsre.prompt, zsre.target, zsre.truth) == ("In which town was {} born?", "Bonn", "Ulm")
    assert zsre.paraphrases == ("Where was Somebody born?",)
    assert zsre.neighbours == (("nq question: who made the sky", "nobody"),)
    assert (easyedit.prompt, easyedit.target, easyedit.truth) == ("{} was born in", "Bonn", "Ulm")
    assert easyedit.paraphrases == ("The birth of Somebody was in",)
    assert easyedit.neighbours == (("Nobody was born in", "Rome"),)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**OWN, "prompt": "The capital of France is"}], "line 1: expected one {} in the prompt"),
        ([{**OWN, "prompt": "{} and {} is"}], "where the subject belongs, got 2"),
        ([{**OWN, "prompt": "In France, the capital of {} is"}], "'France' is in the prompt"),
        (
            [{**EASYEDIT, "subject": "Anybody"}],
            "the subject 'Anybody' once in 'Somebody was born in', got it 0",
        ),
        ([{**EASYEDIT, "prompt": "Somebody, Somebody was born in"}], "got it 2 times"),
        ([{**OWN, "target": " "}], "got no target in 'prompt', 'subject', 'target'"),
        ([{"prompt": "The {} is"}], "got no subject in 'prompt'"),
        ([{**OWN, "neighbors": []}], "unknown field 'neighbors' (did you mean 'neighbours'?)"),
        ([{**OWN, "neighbours": ["x"]}], 'expected neighbours [{"prompt", "target"}, ...], got \'x\''),
        ([OWN, {**OWN, "target": "Rome"}], "line 2: 'The capital of France is' with target 'Rome' contradicts"),
        ([OWN, OWN], "repeats"),
        ([[1]], "expected a JSON object"),
        ([{**ZSRE, "loc_ans": None}], 'expected neighbours [{"prompt", "target"}'),
        ([{**EASYEDIT, "locality": 1}], 'expected neighbours [{"prompt", "target"}'),
        ([{**EASYEDIT, "locality": {"x": {"prompt": ["a", "b"], "ground_truth": "c"}}}], "expected neighbours"),
        ([{**ZSRE, "alt": "", "answers": {}}], "got no target"),
        ([{"requested_rewrite": {"prompt": "x {}"}}], "requested_rewrite with target_new and target_true"),
        ([], "got an empty file"),
    ],
)
def test_refusals_are_one_line(read, rows, message):
    with pytest.raises(UserError) as raised:
        read(*rows)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "facts.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"--facts: no file .*fact.jsonl \(did you mean 'facts.jsonl'\?\)"):
        read_facts(str(tmp_path / "fact.jsonl"))


def test_the_subject_by_its_characters(tokenizer):
    """Never by the length of what is in front: the front has BOS, and tokens merge over the boundary."""
    facts = [Fact("the {} sat on", "cat", "mat"), Fact("{} is one", "12 + 13", "sky"), Fact("dog{} is", "cat", "two")]
    for fact, one in zip(facts, placed(facts, tokenizer), strict=True):
        ids = one.example.token_ids
        assert tokenizer.decode(ids[list(one.subject)]).strip() == fact.subject
        assert tokenizer.decode(ids[one.example.prompt_length :]) == f" {fact.target}"
        assert ids[0] == 0 and one.subject.start >= 1  # BOS
        assert one.example.sample_id == fact.sample_id
    (behind,) = placed(facts[:1], tokenizer, before="one and one is ")
    assert tokenizer.decode(behind.example.token_ids[list(behind.subject)]) == " cat"
    (true,) = placed([Fact("the {} sat on", "cat", "mat", old="dog")], tokenizer, truth=True)
    assert true.example.response == " dog"


def test_a_last_token_that_is_shared(tokenizer):
    with pytest.raises(UserError, match=r"the last token of the subject 'ca' is ' cat', which goes on behind it"):
        placed([Fact("the {}t sat on", "ca", "mat")], tokenizer)


@pytest.mark.parametrize("family", SPECIAL)
def test_subjects_in_the_tokenizers_of_the_families(family, tmp_path):
    tokenizer = family_tokenizer(tmp_path, family)
    facts = [Fact("the {} sat on the", "cat", "mat"), Fact("what is {} and", "12 + 13", "two")]
    for fact, one in zip(facts, placed(facts, tokenizer), strict=True):
        assert tokenizer.decode(one.example.token_ids[list(one.subject)]).strip() == fact.subject


def test_the_bundled_facts():
    facts = list(bundled())
    assert 280 <= len(facts) <= 320
    relations = {fact.relation for fact in facts}
    assert len(relations) >= 6
    texts = [fact.text for fact in facts]
    assert len(set(texts)) == len(facts)
    for fact in facts:
        assert fact.prompt.count("{}") == 1 and fact.subject not in fact.prompt
        assert len(fact.paraphrases) == 2 and all(fact.subject in text for text in fact.paraphrases)
        assert all(text != fact.text for text in fact.paraphrases)
        others = [one for one in facts if one.relation == fact.relation and one.target != fact.target]
        assert len(others) >= 8, "neighbours of the same relation with another target"
    assert read_facts() == facts
