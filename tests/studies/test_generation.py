"""The whole of ``jaxcrit generate`` on a tiny random model: files, resuming, stop tokens, fine-tuned runs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from support.family_models import load_path
from support.tiny_model import prompts_file, tiny_checkpoint

from jaxcrit.commands.generate import GenerateOptions, run_generate
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json
from jaxcrit.data.templates import render
from jaxcrit.data.tokenizer import load_tokenizer
from jaxcrit.evidence import answers
from jaxcrit.models.generation import decode, generate
from jaxcrit.models.model import open_model
from jaxcrit.models.stops import stop_tokens
from jaxcrit.parallel.preemption import Preempted


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    data = prompts_file(tmp_path / "prompts.jsonl")
    return GenerateOptions(
        model=str(model),
        data=str(data),
        out=str(tmp_path / "run"),
        max_new_tokens=5,
        batch_size=4,
        mesh="data=4,fsdp=2",
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_the_answers_to_their_prompts(config, model, tmp_path):
    found = run_generate(config)
    rows = lines(tmp_path / "run" / "generations.jsonl")
    assert rows == found.rows["prompts"] and [row["row"] for row in rows] == list(range(12))
    assert read_json(tmp_path / "run" / "run.json", "jaxcrit.run")["status"] == "complete"
    tokenizer, decoder = load_tokenizer(model), load_path(model)
    for example, row in zip(render(lines(tmp_path / "prompts.jsonl"), tokenizer), rows, strict=True):
        prompt = example.token_ids[: example.prompt_length]
        alone = generate(decoder, np.pad(prompt, (0, 40 - len(prompt)))[None], np.array([len(prompt)]), 5, stop=[1])
        assert row["token_ids"] == alone.token_ids[0] and row["stopped"] == alone.stopped[0]
        assert row["text"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert (row["sample_id"], row["prompt"]) == (example.sample_id, example.prompt)


def test_a_dataset_is_answered_the_same_in_company(config, tmp_path, monkeypatch):
    """Datasets share batches; draws follow from a row's place in its own. Interrupted, each has its part."""
    other = prompts_file(tmp_path / "others.jsonl", seed=1)
    both = dataclasses.replace(config, data=f"{config.data},{other}", temperature=1.0)
    shared, calls = [], []

    def watched(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        shared.append(kwargs["samples"].tolist())
        return decode(*args, **kwargs)

    monkeypatch.setattr(answers, "decode", watched)
    with pytest.raises(KeyboardInterrupt):
        run_generate(both)
    parts = [lines(tmp_path / "run" / name / "generations.jsonl.part") for name in ("prompts", "others")]
    assert sum(map(len, parts)) == sum(row >= 0 for rows in shared for row in rows)
    found = run_generate(both)
    assert any(len(rows) > len(set(rows)) for rows in shared), "rows of one place in two datasets, in one batch"
    monkeypatch.undo()
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    for name, file in (("prompts", config.data), ("others", str(other))):
        alone = run_generate(dataclasses.replace(both, data=file, out=str(tmp_path / name)))
        assert found.rows[name] == alone.rows[name] == lines(tmp_path / "run" / name / "generations.jsonl")


def test_an_interrupted_run_goes_on_to_the_same_bytes(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, temperature=1.0, batch_size=8)
    run_generate(dataclasses.replace(config, out=str(tmp_path / "whole")))
    calls = []

    def twice(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*args, **kwargs)

    monkeypatch.setattr(answers, "decode", twice)
    with pytest.raises(KeyboardInterrupt):
        run_generate(config)
    part = tmp_path / "run" / "generations.jsonl.part"
    part.write_text(part.read_text() + '{"sample_id": "cut sho')
    assert not (tmp_path / "run" / "generations.jsonl").exists()
    assert part.read_text().count("\n") >= 4
    run_generate(config)
    assert (tmp_path / "run/generations.jsonl").read_bytes() == (tmp_path / "whole/generations.jsonl").read_bytes()
    assert not part.exists()
    with pytest.raises(UserError, match="holds another run"):
        run_generate(dataclasses.replace(config, seed=1))


def test_told_to_leave_it_saves_and_goes_on_to_the_same_bytes(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, batch_size=8)
    run_generate(dataclasses.replace(config, out=str(tmp_path / "whole")))

    def told(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return decode(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match=r"with \d+ of 12 prompts answered"):
        patch.setattr(answers, "decode", told)
        run_generate(config)
    kept = (tmp_path / "run/generations.jsonl.part").read_text().splitlines()
    assert 4 <= len(kept) <= 8
    run_generate(config)
    assert (tmp_path / "run/generations.jsonl").read_bytes() == (tmp_path / "whole/generations.jsonl").read_bytes()


def test_stop_tokens(config, model):
    session = open_model(str(model))
    assert stop_tokens("", session) == [1, 5], "EOS, and the end of a turn in the chat template"
    assert stop_tokens("", session, "none") == [1]
    assert stop_tokens("<|end|>,17", session) == [1, 5, 17]
    free = run_generate(config).rows["prompts"]
    longest = max(free, key=lambda row: len(row["token_ids"]))
    stop = longest["token_ids"][1]
    cut = run_generate(dataclasses.replace(config, stop=str(stop), out=config.out + "-stop")).rows["prompts"]
    for before, after in zip(free, cut, strict=True):
        ids = before["token_ids"]
        assert after["token_ids"] == (ids[: ids.index(stop)] if stop in ids else ids)
    assert cut[longest["row"]]["stopped"]


def test_prompts_leave_room_for_the_answer(config, tmp_path):
    with pytest.raises(UserError, match=r"60 new tokens take part of the context: expected prompts of at most 4"):
        run_generate(dataclasses.replace(config, max_new_tokens=60))
    assert not (tmp_path / "run").exists()
    rows = run_generate(dataclasses.replace(config, max_new_tokens=60, truncate="left")).rows["prompts"]
    assert len(rows) == 12
