"""``jaxcrit data``: three rows with their mask, the length table, the hash; examples.jsonl on request."""

import json

import make_renderings as goldens
import numpy as np
import pytest
from support.tiny_model import tiny_checkpoint

from jaxcrit.commands.main import main
from jaxcrit.core.hashing import sample_id
from jaxcrit.data.templates import render, template_hash
from jaxcrit.data.tokenizer import load_tokenizer
from jaxcrit.models.model import EMBEDDED_MODEL


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, dataset in (("dolly", "dolly"), ("boolq", "boolq"), ("gsm8k", "gsm8k")):
        rows = [row for other, row in goldens.CASES if other == dataset]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def lines(capsys):
    out, err = capsys.readouterr()
    assert err.startswith("next, to find the layers:\n  jaxcrit analyze") and err.count("\n") == 2
    return out.splitlines()


def test_shows_rows_lengths_and_hash(model, files, capsys):
    assert main(["data", f"--model={model}", f"--data=dolly:{files}/dolly.jsonl,boolq:{files}/boolq.jsonl"]) == 0
    out = lines(capsys)
    heads = [line for line in out if "tokens masked" in line]
    assert [head.split(":")[0] for head in heads] == ["dolly, row 1", "boolq, row 1", "dolly, row 2"]
    at = out.index(heads[0])
    assert out[at + 1 : at + 6] == [
        "· <s><|user|>",
        "· Who wrote Emma?<|end|>",
        "· <|assistant|>",
        "· ",
        "+ Jane Austen.<|end|>",
    ]
    table = out.index("tokens per row (least, median, most):")
    header = "rows prompt response limit too long truncated dropped no response dataset"
    assert " ".join(out[table + 1].split()) == header
    assert out[table + 2].split()[0] == "2" and out[table + 2].split()[-1] == "dolly"
    assert out[-1] == f"template hash: {template_hash(load_tokenizer(model))}"
    assert max(map(len, out[table : table + 4])) <= 100


@pytest.mark.skipif(not EMBEDDED_MODEL.is_dir(), reason="no embedded model in this checkout")
def test_by_default_the_embedded_model_and_prompts(capsys):
    assert main(["data", "--limit=5"]) == 0
    out = lines(capsys)
    assert sum("tokens masked" in line for line in out) == 3 and out[-1].startswith("template hash: ")


def test_paper_edition(model, files, capsys):
    spec = f"gsm8k:{files}/gsm8k.jsonl"
    assert main(["data", f"--model={model}", f"--data={spec}", "--edition=paper", "--template=llama2"]) == 0
    out = lines(capsys)
    assert out[1] == "· <s>[INST] <<SYS>>" and "·  What is 2 + 3? " in out and "· ### Response: [/INST]" in out
    assert out[out.index("· ### Response: [/INST]") + 1] == "+  2 + 3 = <<2+3=5>>5"
    assert "+ #### 5 </s>" in out
    assert out[-1] == f"template hash: {template_hash(load_tokenizer(model), 'llama2', 'paper')}"


def test_examples_file(model, files, tmp_path, capsys):
    spec = f"dolly:{files}/dolly.jsonl,boolq:{files}/boolq.jsonl"
    assert main(["data", f"--model={model}", f"--data={spec}", f"--out={tmp_path / 'new' / 'x'}"]) == 0
    file = tmp_path / "new" / "x" / "examples.jsonl"
    assert lines(capsys)[-1] == f"examples: {file}"
    written = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [(name, row) for name, row in goldens.CASES if name in ("dolly", "boolq")]
    assert [(one["dataset"], one["sample_id"]) for one in written] == [(name, sample_id(row)) for name, row in rows]
    tokenizer = load_tokenizer(model)
    for one, (name, row) in zip(written, rows, strict=True):
        (example,) = render([row], tokenizer, dataset=name)
        np.testing.assert_array_equal(one["token_ids"], example.token_ids)
        assert one["prompt_length"] == example.prompt_length
        assert one["text"] == tokenizer.decode(example.token_ids) and one["text"].startswith(example.prompt)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--truncate=paper"], ["go with --edition=paper"]),
        (["--truncate=right", "--max_length=9"], ["nothing is left of the response at 9 tokens in row 1, 2"]),
        (["--split=train"], ["--split=all"]),
        (["--edition=paper", "--template=llama3"], ["no token <|begin_of_text|>"]),
    ],
)
def test_mistakes_write_nothing(model, files, tmp_path, capsys, flags, parts):
    out = tmp_path / "out"
    assert main(["data", f"--model={model}", f"--data=dolly:{files}/dolly.jsonl", f"--out={out}", *flags]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and not out.exists()
    for part in parts:
        assert part in said.err


def test_own_rows_have_no_paper_edition(model, tmp_path, capsys):
    (tmp_path / "own.jsonl").write_text('{"prompt": "a"}')
    assert main(["data", f"--model={model}", f"--data={tmp_path / 'own.jsonl'}", "--edition=paper"]) == 2
    assert "--data=dolly:PATH" in capsys.readouterr().err


def test_out_that_cannot_be_written(model, files, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["data", f"--model={model}", f"--data=dolly:{files}/dolly.jsonl", f"--out={tmp_path / 'file'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_shares_in_the_table(model, files, capsys):
    command = ["data", f"--model={model}", f"--data=dolly:{files}/dolly.jsonl", "--truncate=left", "--max_length=31"]
    assert main(command) == 0
    out = lines(capsys)
    row = out[out.index("tokens per row (least, median, most):") + 2].split()
    assert row[-6] == "31" and row[-5] == row[-4] and row[-3] == "0" and row[-2] == "0.0%"


def test_rows_that_are_too_long_are_dropped_on_request(model, files, tmp_path, capsys):
    rows = [row for name, row in goldens.CASES if name == "dolly"]
    short, long = sorted(len(one.token_ids) for one in render(rows, load_tokenizer(model), dataset="dolly"))
    command = ["data", f"--model={model}", f"--data=dolly:{files}/dolly.jsonl", f"--max_length={short}"]
    assert short < long and main([*command, "--long=drop", f"--out={tmp_path}"]) == 0
    out = lines(capsys)
    row = out[out.index("tokens per row (least, median, most):") + 2].split()
    assert row[-6:-1] == [str(short), "50.0%", "0.0%", "1", "0.0%"]
    (written,) = (tmp_path / "examples.jsonl").read_text().splitlines()
    assert len(json.loads(written)["token_ids"]) == short
    assert main([*command, "--long=cut", f"--out={tmp_path}"]) == 0
    assert len((tmp_path / "examples.jsonl").read_text().splitlines()) == 2
