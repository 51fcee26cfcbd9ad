"""The example that stands in each command's help: it asks for nothing but the files it names, and it runs."""

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from support.known_facts import knowing_checkpoint, new_facts
from support.mixtures import WORDS, answering_mixture, rows_to_answer

from jaxcrit.commands.main import COMMANDS, EXAMPLES, main
from jaxcrit.data import demo
from jaxcrit.models.model import EMBEDDED_MODEL

MISSING = r"no such (run )?(directory|file)|there is nothing|expected rows as"
# What each needs that others make, in this order; the rest stand before them.
AFTER = ("score", "finetune", "substitute", "correlate", "select", "verify", "compare", "reuse", "prune", "export")

# Runs that an example names and no other example makes.
MADE_FIRST = {
    "substitute": ["jaxcrit finetune --model=DIR --data=train.jsonl --layers=all --steps=10 --out=all"],
    "compare": ["jaxcrit analyze --model=all --data=train.jsonl --limit=300 --out=an-tuned"],
    "explore": ["jaxcrit analyze --data=test.jsonl --out=runs/one", "jaxcrit score --data=test.jsonl --out=runs/two"],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_only_the_files_of_an_example_are_missing(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    code, error = main(shlex.split(EXAMPLES[name])[1:]), capsys.readouterr().err
    if name == "plan":
        assert code == 0
    else:
        assert code == 2 and re.search(MISSING, error), error
    assert not list(tmp_path.iterdir()) or name == "plan"


def write(file: str, rows: list[dict]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.skipif(not os.environ.get("JAXCRIT_EXPLORE"), reason="takes minutes; run it with JAXCRIT_EXPLORE=1")
def test_examples_run_one_after_the_other(monkeypatch, tmp_path, capsys):
    """On the embedded model; facts on a tiny model that knows some, experts on a mixture that answers."""
    monkeypatch.chdir(tmp_path)
    os.symlink(EMBEDDED_MODEL, "DIR")
    for seed, file in enumerate(("train", "test", "good", "new")):
        family, split = ("choice" if file == "new" else "order"), ("test" if seed else "train")
        write(f"{file}.jsonl", demo.generate(family, 100, seed=seed, split=split))
    os.makedirs("facts")
    os.makedirs("experts")
    model, known, _ = knowing_checkpoint(tmp_path / "facts", intermediate_size=128, num_hidden_layers=10)
    os.symlink(model.name, "facts/DIR")
    text = np.random.default_rng(0)
    write("facts/text.jsonl", [{"text": f"{row} " + " ".join(text.choice(WORDS, 24))} for row in range(130)])
    answering_mixture(Path("experts/DIR"))
    write("experts/train.jsonl", rows_to_answer(40, seed=1))
    write("experts/test.jsonl", rows_to_answer(9, wrong=4, seed=2))
    for name in [*(name for name in COMMANDS if name not in AFTER), *AFTER]:
        monkeypatch.chdir(tmp_path / {"trace": "facts", "edit": "facts", "remix": "experts"}.get(name, "."))
        if name == "edit":
            write("facts.jsonl", new_facts(known))
        for line in [*MADE_FIRST.get(name, []), EXAMPLES[name]]:
            plain = re.sub(r"(gsm8k|dolly):", "", line).replace("--steps=200", "--steps=4")
            assert main(shlex.split(plain)[1:]) == 0, line + "\n" + capsys.readouterr().err
    assert set(EXAMPLES) == set(COMMANDS)
