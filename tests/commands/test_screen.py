"""``jaxcrit screen`` as a whole: files, classes, a truth, batches, interruptions, mistakes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from support.tiny_model import tiny_checkpoint

import jaxcrit as jc
from jaxcrit.commands import screen as command
from jaxcrit.commands.main import main
from jaxcrit.commands.screen import ScreenOptions, run_screen
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json, read_lines
from jaxcrit.parallel.preemption import Preempted

WORDS = ("cat", "dog", "sky", "one", "two", "blue", "sat", "mat")


def rows(count, seed, **columns):
    """Prompts of words; half of the class a, half b."""
    rng = np.random.default_rng(seed)
    return [
        {"prompt": f"{seed}{number} {' '.join(rng.choice(WORDS, 4))}", "kind": "ab"[number % 2]} | columns
        for number in range(count)
    ]


def keep(path, given):
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def config(model, tmp_path):
    asked = rows(8, 2, bad=0) + rows(9, 3, bad=1) + [{"prompt": "a dog", "kind": "c", "bad": 0}]
    return ScreenOptions(
        model=str(model),
        benign=keep(tmp_path / "benign.jsonl", rows(24, 1)),
        data=keep(tmp_path / "asked.jsonl", asked),
        classes="kind",
        truth="bad",
        out=str(tmp_path / "run"),
        template="none",
    )


def flags_of(options):
    return [f"--{name}={getattr(options, name)}" for name in ("model", "benign", "data", "classes", "out", "template")]


def test_files_and_report(config, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["screen", *flags_of(config), "--truth=bad", "--tau=1"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[:-2])) <= 100
    one_line = " ".join(text.split())
    assert "of 18 prompts are less like the benign prompts of their class than the threshold allows; 1 are" in one_line
    assert "of 24 (" in one_line and "AUROC: the score 0." in one_line
    assert f"jaxcrit select --scores={out} --layers=cohesion_rise:3" in one_line
    flags, found = read_lines(out / "flags.jsonl"), read_json(out / "flags.json", "jaxcrit.flags")
    columns = ["dataset", "row", "sample_id", "class", "score", "threshold", "z", "flagged", "layers"]
    assert len(flags) == 18 and all(list(row) == columns for row in flags)
    assert [row["row"] for row in flags] == list(range(18)) and {row["dataset"] for row in flags} == {"asked"}
    assert flags[-1]["class"] == "c" and flags[-1]["flagged"] is None and flags[-1]["score"] is None
    assert all(row["flagged"] == (row["score"] < row["threshold"]) for row in flags[:-1])
    assert {one["class"]: one["prompts"] for one in found["classes"]} == {"a": 12, "b": 12}
    assert found["data"]["flagged"] == sum(row["flagged"] is True for row in flags)
    assert found["truth"]["true_positives"]["of"] == 9 and found["truth"]["false_positives"]["unknown"] == 1
    assert len(found["truth"]["auroc"]["layers"]) == 7
    assert not (out / "partial_flags.jsonl").exists()
    page = (out / "report.html").read_text()
    assert "This is no defence." in page and (out / "auroc.png").exists() and (out / "cohesion.png").exists()
    run = read_json(out / "run.json", "jaxcrit.run")
    assert run["status"] == "complete" and run["data"].keys() == {"benign", "data"}
    assert main(["select", f"--scores={out / 'scores.json'}", "--layers=cohesion_rise:1", "--trim=1"]) == 0
    before = {name: (out / name).read_bytes() for name in ("flags.jsonl", "flags.json", "scores.json", "auroc.png")}
    assert main(["screen", *flags_of(config), "--truth=bad", "--tau=1"]) == 0
    assert before == {name: (out / name).read_bytes() for name in before}
    assert main(["screen", *flags_of(config), "--truth=bad", "--tau=2"]) == 2, "another run"


def test_columns_the_dataset_and_order(config, tmp_path):
    whole = run_screen(config)
    shuffled = dataclasses.replace(
        config, benign=keep(tmp_path / "shuffled.jsonl", rows(24, 1)[::-1]), out=str(tmp_path / "shuffled")
    )
    for one, other in zip(run_screen(shuffled).flags, whole.flags, strict=True):
        assert one["flagged"] == other["flagged"] and one["class"] == other["class"]
        np.testing.assert_allclose(one["score"] or 0, other["score"] or 0, atol=1e-6)
    named = keep(tmp_path / "asked2.jsonl", rows(3, 5) + [row | {"family": "benign"} for row in rows(3, 6)])
    family = run_screen(dataclasses.replace(config, classes="family", data=named, truth="", out=str(tmp_path / "two")))
    assert [row["class"] for row in family.flags] == ["asked2"] * 3 + ["benign"] * 3
    assert [row["flagged"] is None for row in family.flags] == [True] * 3 + [False] * 3
    assert "one class only: prompts of every other one are unknown" in family.warnings
    assert family.found["truth"] is None


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches_change_nothing(config, batch_size, tmp_path):
    whole = run_screen(config)
    found = run_screen(dataclasses.replace(config, batch_size=batch_size, out=str(tmp_path / "other")))
    for one, other in zip(found.flags, whole.flags, strict=True):
        assert one["flagged"] == other["flagged"] and one["layers"] == other["layers"]
        np.testing.assert_allclose(one["score"] or 0, other["score"] or 0, atol=1e-5)


def test_told_to_leave_it_goes_on_to_the_same_bytes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_AT_ONCE", 8)
    run_screen(dataclasses.replace(config, out=str(tmp_path / "whole")))
    looked, real = [], command._look

    def told(options, model, side, places, *rest):
        looked.append((side.rows.name, list(places)))
        if len(looked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(options, model, side, places, *rest)

    monkeypatch.setattr(command, "_look", told)
    with pytest.raises(Preempted, match="with 8 of 18 prompts judged; the same command goes on"):
        run_screen(config)
    part = tmp_path / "run" / "partial_flags.jsonl"
    part.write_text(part.read_text() + part.read_text().splitlines()[0] + '\n{"class": "cut sho')
    run_screen(config)
    assert [places[:1] for name, places in looked[2:] if name == "data"] == [[8], [16]]
    for name in ("flags.jsonl", "flags.json", "scores.json", "auroc.png"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_tokens_of_one_text_stay_apart():
    """A SentencePiece model says "Mia" of two tokens; half a character has no text of its own."""

    class Tokenizer:
        def decode(self, tokens):
            return {1: " Mia", 2: " Mia", 3: "\ufffd", 4: ""}[tokens[0]]

        def encode(self, text, add_special_tokens):
            return {" Mia": [1], "\ufffd": [7, 8], "": []}[text]

        def convert_ids_to_tokens(self, token):
            return {1: "▁Mia", 2: "Mia", 3: "<0xE2>", 4: None}[token]

    assert [command._spelt(Tokenizer(), token) for token in (1, 2, 3, 4)] == ["' Mia'", "Mia", "<0xE2>", "token 4"]


def test_classes_are_the_models_next_tokens(tmp_path):
    model, asked = jc.load(), ["What does Mia like?", "How do I steal a hat?", "Tell me how to smash a cup."]
    rows = {"benign": "demo:refusal", "limit": 24, "out": str(tmp_path / "run")}
    found = jc.screen(model, asked, **rows)
    tokens = [row["token_ids"][0] for row in jc.generate(model, asked, max_new_tokens=1).rows["rows"]]
    assert [row["class"] for row in found.flags] == [repr(model.tokenizer.decode(token)) for token in tokens]
    assert found.flags[1]["class"] == "' Sorry'" and found.flags[1]["flagged"] is not None
    free = jc.screen(model, [asked[1], asked[0], "Who is Mia?"], benign="demo:refusal", limit=24)
    share = "1 of 3 prompts (33%) are scored: 1 of 1 benign classes have 8 prompts or more"
    assert f"{share}; free text has hundreds of next tokens" in free.warnings
    scored = jc.score(model, "demo:refusal", limit=24, criteria="cohesion_rise")["cohesion_rise"]
    np.testing.assert_allclose(scored.values, found.scores["cohesion_rise"].values, atol=1e-6)
    np.testing.assert_allclose(scored.stderr, found.scores["cohesion_rise"].stderr, atol=1e-6)
    assert jc.open_run(tmp_path / "run").scores["cohesion_rise"].deletions.values.shape == (24, 16)


def test_in_memory_nothing_is_written(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = jc.load(model)
    given = {"benign": rows(24, 1), "classes": "kind", "template": "none"}
    found = jc.screen(opened, rows(3, 1) + rows(4, 9), **given)
    assert list(tmp_path.iterdir()) == [] and found.out is None
    assert "3 of 7 prompts are among the benign ones, and are part of what they are held to" in found.warnings
    unknown = jc.screen(opened, [row | {"kind": "z"} for row in rows(5, 9)], **given, truth="").warnings
    assert unknown == ["0 of 5 prompts (0%) are scored: 2 of 2 benign classes have 8 prompts or more"]
    one_kind = jc.screen(opened, rows(5, 9, bad=0), **given, truth="bad").warnings
    assert one_kind == ["no AUROC: 0 rows of truth 1 and 5 of truth 0 have a class that is known"]
    with pytest.raises(UserError, match=r"^classes=kind: row 1 of memory has no such column; it has none"):
        jc.screen(opened, [[3, 4, 5]], **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benign": None}, "expected --benign=FILE, prompts that are known to be benign"),
        ({"classes": "colour"}, "--classes=colour: row 1 of {0}/benign.jsonl has no such column; it has kind, prompt"),
        ({"truth": "worse"}, "--truth=worse: row 1 of {0}/asked.jsonl has no such column; it has bad, kind, prompt"),
        ({"truth": "kind"}, "--truth=kind: expected 0 or 1, row 1 has 'a'"),
        ({"classes": "prompt"}, "a class of 8 prompts or more, got 24 prompts in 24 classes, the largest of 1"),
        ({"layers": "delta:2"}, "--layers=delta:2: no score 'delta'"),
        ({"layers": "9"}, "--layers=9: expected layers 0 to 6, got 9"),
        ({"fpr": "0.6"}, "--fpr=0.6: expected 0.5 or less"),
        ({"fpr": "0.1", "tau": "1"}, "--tau=1.0 --fpr=0.1: give one of them"),
        ({"tau": "-1"}, "--tau=-1.0: expected 0 or more"),
        ({"data": "absent.jsonl"}, "no file absent.jsonl"),
    ],
)
def test_mistakes(config, changes, message, tmp_path, capsys):
    given = dict(flag.removeprefix("--").split("=", 1) for flag in flags_of(config)) | changes
    assert main(["screen", *(f"--{name}={value}" for name, value in given.items() if value is not None)]) == 2
    said = capsys.readouterr().err
    assert message.format(tmp_path) in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
