"""Model cards, as the hub's own library reads them: what was changed, why, on what; nothing of the machine."""

import json

import pytest
from huggingface_hub import ModelCard
from support.tiny_model import tiny_checkpoint

import jaxcrit as jc
from jaxcrit.commands.export import export_model
from jaxcrit.commands.finetune import run_finetune
from jaxcrit.core.files import read_lines, write_json
from jaxcrit.core.groups import FinetuneOptions
from jaxcrit.reporting.card import card


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    rows = [{"prompt": f"{n} cat", "response": "a|b dog"} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = FinetuneOptions(
        model=str(tiny_checkpoint(folder / "model")),
        data=str(folder / "rows.jsonl"),
        layers="2,4",
        lora_rank=2,
        train_norms=True,
        steps=2,
        out=str(folder / "run"),
    )
    return run_finetune(options)


def test_what_an_export_says_of_itself(run, tmp_path):
    export_model(str(run.out), str(tmp_path / "tuned"))
    found = ModelCard.load(tmp_path / "tuned" / "README.md")
    assert found.data.library_name == "transformers" and found.data.tags == ["jaxcrit"]
    assert found.data.base_model is None  # a directory of this machine, whose path is nobody's concern
    text = found.text
    assert str(run.out.parent) not in text and "`model` with changes on top" in text
    assert "Layers 2, 4 of 7, counted from 0, named by whoever ran it, not chosen by a score." in text
    assert "Changed: adapters of rank 2, alpha 4, on o, down, q, k, v, gate, up of layers 2, 4, norm." in text
    tests = [row for row in read_lines(run.out / "metrics.jsonl") if row["kind"] == "eval"]
    for row in (tests[0], tests[-1]):
        assert f"| test loss, nats per response token, step {row['step']} | {row['loss']:.6g} |" in text
    assert f"| eval | 2 | rows.jsonl | {run.run['data']['eval']['hash'][:16]} |" in text
    assert "--lora_rank=2" in text and "--out" not in text and "@inproceedings{liu2025spectral" in text


def test_a_choice_says_how_sure_it_is(run, tmp_path):
    record = {"command": "finetune", "layers": {**run.run["layers"], "criterion": "delta", "rule": "critical:2"}}
    write_json(tmp_path / "run.json", "jaxcrit.run", record)
    assert "chosen as `critical:2` by `delta`. How sure that choice is was not kept with the run." in card(
        "x", "org/base", [tmp_path]
    )
    sure = {"num_prompts": 300, "draws": 2000, "selection_probability": [0, 0, 0.97, 0, 0.5, 0, 0]}
    content = {"choice": {**sure, "confidence_set": {"level": 0.95, "layers": [2, 3, 4]}}}
    (tmp_path / "analysis").mkdir()
    write_json(tmp_path / "analysis" / "uncertainty.json", "jaxcrit.uncertainty", content)
    text = card("x", "org/base", [tmp_path], adapter=True)
    assert "2,000 resamples of 300 prompts that chose each: 2: 0.97, 4: 0.50; 95 % confidence set: 2, 3, 4." in text
    front = ModelCard(text).data
    assert (front.base_model, front.library_name, front.base_model_relation) == ("org/base", "peft", "adapter")


def test_plain_models_and_trainings_in_memory(run, tmp_path):
    plain = card("y", "org/base", [])
    assert "`org/base` as it is, written by" in plain and "base_model" not in plain and "Citation" not in plain
    tuned = jc.finetune(jc.load(run.run["config"]["model"]), run.run["config"]["data"], layers=[1], steps=1)
    jc.export(tuned, tmp_path / "tuned")
    assert "## Change 1: made in memory" in (tmp_path / "tuned" / "README.md").read_text()


def test_what_names_hold_cannot_draw_on_the_page(tmp_path):
    data = {"a|b\n# c\x1b[2J": {"num_samples": 1, "source": "~/x/y.jsonl", "hash": "0"}}
    write_json(tmp_path / "run.json", "jaxcrit.run", {"command": "edit", "data": data})
    assert "\n# c" not in (text := card("x", "", [tmp_path])) and "\x1b" not in text
    assert "a\\|b" in text and "| y.jsonl |" in text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/home/me/rows.jsonl", "rows.jsonl"),
        ("dolly:/home/me/rows.jsonl", "dolly:rows.jsonl"),
        ("dolly:~/a.jsonl,gsm8k:../b/c.jsonl", "dolly:a.jsonl,gsm8k:c.jsonl"),
        ("/runs/adapter@/models/base/", "adapter@base"),
        ("demo:closed", "demo:closed"),
        ("org/model", "org/model"),
        ("gs://bucket/rows.jsonl", "gs://bucket/rows.jsonl"),
    ],
)
def test_sources_are_told_without_their_folders(tmp_path, given, told):
    record = {"command": "edit", "data": {"rows": {"source": given}}, "config": {"scores": given}}
    write_json(tmp_path / "run.json", "jaxcrit.run", record)
    text = card("x", given if "/" not in told else "", [tmp_path])
    assert f"| rows | None | {told} |" in text and f"--scores={told}\n" in text
