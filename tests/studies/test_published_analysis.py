"""``jaxcrit analyze`` on the paper's datasets: split, edition, order, cut, and what the run says of them."""

import dataclasses
import json

import pytest
from support.tiny_model import tiny_checkpoint

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json
from jaxcrit.core.groups import AnalyzeOptions
from jaxcrit.data.templates import check_same_rendering, template_hash
from jaxcrit.data.tokenizer import load_tokenizer
from jaxcrit.studies.analysis import run_analysis


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


@pytest.fixture
def config(model, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"{n} and {n * n} is", "answer": f"{n}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = f"gsm8k:{tmp_path / 'rows.jsonl'}"
    return AnalyzeOptions(model=str(model), data=spec, out=str(tmp_path / "run"), layers="critical:1", limit=8)


def run_of(config):
    run_analysis(config)
    return read_json(f"{config.out}/run.json", "jaxcrit.run")


def test_editions_are_two_renderings(config, model, tmp_path):
    tokenizer = load_tokenizer(model)
    clean = run_of(config)
    paper = run_of(dataclasses.replace(config, out=str(tmp_path / "paper"), edition="paper"))
    assert clean["data"]["gsm8k"]["hash"] == paper["data"]["gsm8k"]["hash"]
    assert clean["template"] == {"mode": "auto", "edition": "clean", "hash": template_hash(tokenizer)}
    assert paper["template"]["hash"] == template_hash(tokenizer, "llama2", "paper")
    with pytest.raises(UserError, match="--allow_template_mismatch"):
        check_same_rendering(clean["template"]["hash"], paper["template"]["hash"])


def test_split_order_and_cut(config, tmp_path):
    whole = dataclasses.replace(config, split="all", limit=0)
    hashes = {run_of(whole)["data"]["gsm8k"]["hash"]}
    shuffled = dataclasses.replace(whole, shuffle_seed=1, limit=9, out=str(tmp_path / "b"))
    hashes.add(run_of(shuffled)["data"]["gsm8k"]["hash"])
    assert len(hashes) == 2
    with pytest.raises(UserError, match="--split=all"):
        run_analysis(dataclasses.replace(config, split="train", out=str(tmp_path / "c")))
    with pytest.raises(UserError, match="--truncate=paper"):
        run_analysis(dataclasses.replace(config, truncate="paper", out=str(tmp_path / "d")))
    cut = dataclasses.replace(config, truncate="paper", edition="paper", out=str(tmp_path / "e"))
    assert run_of(cut)["data"]["gsm8k"]["longest_prompt"] > 60, "Llama-2's analysis cuts nothing"
