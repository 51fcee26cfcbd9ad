"""The whole of ``jaxcrit compare``: runs of ``jaxcrit analyze`` on tiny random models, and every kind of bad input."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import oracles
from support.tiny_model import prompts_file, tiny_checkpoint

from jaxcrit.commands.compare import CompareOptions, run_compare
from jaxcrit.commands.main import main
from jaxcrit.core.files import read_json, read_npz, write_npz
from jaxcrit.core.groups import AnalyzeOptions
from jaxcrit.core.layers import read_scores
from jaxcrit.evidence import captures
from jaxcrit.similarity import pack_upper
from jaxcrit.studies.analysis import run_analysis


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs a and b of two models on 12 prompts, deep on 9 layers, fewer on half of the prompts in another order."""
    home = tmp_path_factory.mktemp("runs")
    data = prompts_file(home / "prompts.jsonl")
    lines = data.read_text().splitlines(keepends=True)
    (home / "fewer.jsonl").write_text("".join(lines[7:1:-1]))
    models = {
        "a": tiny_checkpoint(home / "model_a"),
        "b": tiny_checkpoint(home / "model_b", seed=1),
        "deep": tiny_checkpoint(home / "model_deep", seed=2, num_hidden_layers=9),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCRIT_CACHE", str(home / "cache"))
        for name, model in models.items():
            run_analysis(AnalyzeOptions(model=str(model), data=str(data), out=str(home / name), save_activations=True))
        b = str(models["b"])
        run_analysis(AnalyzeOptions(model=b, data=str(home / "fewer.jsonl"), out=str(home / "fewer")))
        run_analysis(AnalyzeOptions(model=b, data=str(data), out=str(home / "tokens"), position="all"))
    return home


def crossed(runs, a, b, bias):
    """Float64 oracle from the kept activations: CKA of every layer of a with every layer of b."""
    left, right = (load_file(runs / side / "activations.safetensors")["hidden"] for side in (a, b))
    product = {"biased": oracles.biased_product, "debiased": oracles.song}[bias]
    grams = [oracles.gram(x) for x in (*left, *right)]
    return oracles.ratio(product, grams)[: len(left), len(left) :]


def compare(runs, tmp_path, a="a", b="b", **changes):
    return run_compare(CompareOptions(a=str(runs / a), b=str(runs / b), out=str(tmp_path / "out"), **changes))


def test_numbers_and_files_without_a_forward_pass(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(captures, "capture", lambda *_, **__: pytest.fail("ran a model"))
    out = tmp_path / "out"
    assert main(["compare", str(runs / "a"), str(runs / "b" / "fingerprint.npz"), f"--out={out}"]) == 0
    text = capsys.readouterr().out
    arrays, meta = read_npz(out / "cka.npz")
    for bias in ("biased", "debiased"):
        np.testing.assert_allclose(arrays[bias], crossed(runs, "a", "b", bias), atol=1e-5)
    assert set(arrays) == {"biased", "debiased", "null_mean", "null_stddev", "stderr"} and len(meta["models"]) == 2
    score = read_scores(out / "scores.json")["cross_cka"]
    np.testing.assert_array_equal(score.values, arrays["debiased"].diagonal())
    np.testing.assert_array_equal(score.stderr, arrays["stderr"].diagonal())
    assert score.direction == "low" and score.valid.all()
    run = read_json(out / "run.json", "jaxcrit.run")
    assert run["status"] == "complete" and run["data"]["prompts"]["num_samples"] == 12
    assert max(map(len, text.splitlines()[:-1])) <= 100
    assert f"Changed most: layer {score.values.argmin()} of 7 (1 - CKA " in text and "most alike in b" in text
    page = (out / "report.html").read_text()
    assert (
        page.count("data:image/png;base64,") == 2 * 2 and "jaxcrit compare" in page and "Use these layers" not in page
    )
    before = {file: file.read_bytes() for file in out.iterdir() if file.name != "run.json"}
    assert main(["compare", f"--a={runs / 'a'}", f"--b={runs / 'b' / 'fingerprint.npz'}", f"--out={out}"]) == 0
    assert before == {file: file.read_bytes() for file in out.iterdir() if file.name != "run.json"}
    assert main(["select", f"--scores={out / 'scores.json'}", "--criterion=cross_cka", "--layers=critical:1"]) == 0


def test_errors_are_those_of_leaving_a_prompt_out(runs, tmp_path):
    result = compare(runs, tmp_path)
    left, right = (load_file(runs / side / "activations.safetensors")["hidden"] for side in "ab")
    without = []
    for sample in range(12):
        grams = [oracles.gram(np.delete(x, sample, 0)) for x in (left[3], right[5])]
        without.append(oracles.ratio(oracles.song, grams)[0, 1])
    expected = np.sqrt(11 * np.var(without))
    np.testing.assert_allclose(result.cka["stderr"][3, 5], expected, rtol=1e-3)


def test_other_depth(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", str(runs / "a"), str(runs / "deep"), f"--out={out}"]) == 0
    text = capsys.readouterr().out
    arrays, _ = read_npz(out / "cka.npz")
    np.testing.assert_allclose(arrays["debiased"], crossed(runs, "a", "deep", "debiased"), atol=1e-5)
    assert arrays["stderr"].shape == (7, 9) and not (out / "scores.json").exists()
    assert "Models of 7 and 9 layers" in text
    assert text.splitlines()[1].split()[:2] == ["0", str(arrays["debiased"][0].argmax())]


def test_a_model_with_itself(runs, tmp_path, capsys):
    assert main(["compare", str(runs / "a"), str(runs / "a"), f"--out={tmp_path / 'out'}"]) == 0
    text = capsys.readouterr().out
    assert "No layer differs" in text and "warning: both fingerprints are of the same model" in text


def test_samples_in_common(runs, tmp_path):
    """Whatever their order: the very numbers of two runs on those prompts alone."""
    result = compare(runs, tmp_path, b="fewer", common=True)
    assert result.num_prompts == 6
    left, right = (load_file(runs / side / "activations.safetensors")["hidden"][:, 2:8] for side in "ab")
    grams = [oracles.gram(x) for x in (*left, *right)]
    np.testing.assert_allclose(result.cka["biased"], oracles.ratio(oracles.biased_product, grams)[:7, 7:], atol=1e-5)


def test_tokens_are_resampled_by_prompt(runs, tmp_path):
    result = compare(runs, tmp_path, a="tokens", b="tokens")
    assert result.num_prompts == 12 and "null_stddev" not in result.cka
    np.testing.assert_allclose(result.cka["stderr"].diagonal(), 0, atol=1e-6)


def changed(runs, tmp_path, arrays=None, **meta):
    """A copy of fingerprint b with other arrays or meta."""
    stored, facts = read_npz(runs / "b" / "fingerprint.npz")
    path = tmp_path / "changed.npz"
    write_npz(path, {**stored, **(arrays or (lambda _: {}))(stored)}, {**facts, **meta})
    return str(path)


def cut(runs, tmp_path):
    path = tmp_path / "cut.npz"
    content = (runs / "b" / "fingerprint.npz").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return str(path)


def with_grams(count=6, spoil=lambda hidden: hidden):
    def arrays(_):
        hidden = spoil(np.random.default_rng(0).standard_normal((7, count, 9)))
        ids = np.array([f"{i:064}" for i in range(count)])
        return {
            "gram": pack_upper(np.array([oracles.gram(x) for x in hidden])),
            "sample_ids": ids,
            "units": np.arange(count),
        }

    return arrays


def constant(hidden):
    hidden[3] = 1
    return hidden


def repeated(hidden):
    hidden[:, 4] = hidden[:, 1]
    return hidden


def several(runs, tmp_path):
    for name in ("dolly", "alpaca"):
        shutil.copytree(runs / "b", tmp_path / "two" / name)
    return str(tmp_path / "two")


BAD = {
    "absent": (lambda r, t: str(t / "absent.npz"), "no such file"),
    "no fingerprint": (lambda r, t: str(r / "model_a"), "no fingerprint.npz there"),
    "several datasets": (several, "give one of them, such as"),
    "other file": (lambda r, t: str(r / "b" / "cka.npz"), "expected format jaxcrit.fingerprint, got 'jaxcrit.cka'"),
    "cut short": (cut, "expected an npz written by jaxcrit"),
    "other version": (lambda r, t: changed(r, t, format_version=2), "expected format_version 1, got 2"),
    "no units": (lambda r, t: changed(r, t, lambda a: {"units": a["units"][:3]}), "the file is damaged"),
    "other depth": (lambda r, t: changed(r, t, num_layers=8), "Grams of 8 layers"),
    "other samples": (lambda r, t: str(r / "fewer"), "got 12 in"),
    "no samples in common": (lambda r, t: changed(r, t, with_grams()), "0 in common; analyze both on the same --data"),
    "repeated ids": (
        lambda r, t: changed(r, t, lambda a: {"sample_ids": a["sample_ids"][[0, 0, *range(2, 12)]]}),
        "1 samples are there more than once",
    ),
    "repeated rows": (lambda r, t: changed(r, t, with_grams(6, repeated)), "samples 1 and 4, counted from 0"),
    "constant layer": (lambda r, t: changed(r, t, with_grams(6, constant)), "layers 3 are constant"),
    "NaN": (lambda r, t: changed(r, t, lambda a: {"gram": a["gram"] * np.nan}), "NaN or infinity"),
    "three samples": (lambda r, t: changed(r, t, with_grams(3)), "at least 4 samples, got 3"),
    "other template": (lambda r, t: changed(r, t, template_hash="0" * 64), "--allow_template_mismatch"),
    "other kernel": (lambda r, t: changed(r, t, kernel="rbf"), "two fingerprints of one kernel"),
    "rows of unit length": (lambda r, t: changed(r, t, normalize="row"), "one normalize, got none in"),
    "other position": (lambda r, t: str(r / "tokens"), "two fingerprints of one position"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_exit_2_and_nothing_written(make, message, runs, tmp_path, capsys):
    b = make(runs, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code = main(["compare", str(runs / "a"), b, f"--out={tmp_path / 'out'}"])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("jaxcrit: error: ") and error.count("\n") == 1 and message in error, error
    assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"


def test_other_template_on_request(runs, tmp_path):
    other = changed(runs, tmp_path, template_hash="0" * 64)
    result = compare(runs, tmp_path, b=other, allow_template_mismatch=True)
    assert any("rendered otherwise" in line for line in result.warnings)


@pytest.mark.parametrize("words", ["", "x", "x y z", "x --a=y", "x y --a=z", "a=x"])
def test_two_runs_are_needed(words, capsys):
    assert main(["compare", *words.split()]) == 2
    error = capsys.readouterr().err
    assert "expected" in error and error.count("\n") == 1


def test_run_record_has_no_numbers_that_json_lacks(runs, tmp_path):
    compare(runs, tmp_path)
    json.loads((tmp_path / "out" / "run.json").read_text(), parse_constant=lambda word: pytest.fail(word))
