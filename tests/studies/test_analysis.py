"""The whole of ``jaxcrit analyze`` on a tiny random model: files, invariance, resuming, and every kind of bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import oracles
from support.tiny_model import prompts_file, tiny_checkpoint

from jaxcrit.commands.main import main
from jaxcrit.core.deletions import read_deletions
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json, read_npz
from jaxcrit.core.groups import AnalyzeOptions
from jaxcrit.core.layers import LayerSet, read_scores
from jaxcrit.evidence import captures
from jaxcrit.reporting.analysis import analysis_report
from jaxcrit.studies.analysis import run_analysis


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prompts_file(tmp_path_factory.mktemp("data") / "prompts.jsonl")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def config(model, data, tmp_path):
    return AnalyzeOptions(model=str(model), data=str(data), out=str(tmp_path / "run"), layers="critical:2")


def without_times(folder):
    """Every file of a run directory, run.json without what tells the time."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.name == "run.json":
            run = json.loads(path.read_text())
            files[path.name] = {key: value for key, value in run.items() if key not in ("time", "digests", "config")}
        elif path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def test_files_of_one_dataset(config, tmp_path):
    analysis = run_analysis(config)
    out = tmp_path / "run"
    left = read_deletions(out, "delta")
    assert left.values.shape == (12, 7) and len(left.sample_ids) == 12 and read_deletions(out, "step_debiased")
    run = read_json(out / "run.json", "jaxcrit.run")
    assert run["status"] == "complete" and run["model"]["num_layers"] == 7
    assert run["versions"]["jax"] and run["determines"]["model_hash"] == analysis.chosen.model_hash
    scores = read_scores(out / "scores.json")
    assert set(scores) == {"delta", "delta_debiased", "step", "step_debiased"}
    assert scores["delta"].valid.tolist() == [False, False, True, True, True, False, False]
    assert np.isfinite(scores["delta_debiased"].stderr[2:5]).all()
    arrays, meta = read_npz(out / "cka.npz")
    assert set(arrays) == {"biased", "debiased", "null_mean", "null_stddev"} and arrays["biased"].shape == (7, 7)
    assert meta["format"] == "jaxcrit.cka"
    np.testing.assert_allclose(np.diagonal(arrays["debiased"]), 1)
    chosen = LayerSet.load(out / "layers.json")
    assert chosen == analysis.chosen and len(chosen.layers) == 2 and chosen.criterion == "delta_debiased"
    arrays, meta = read_npz(out / "fingerprint.npz")
    assert arrays["gram"].shape == (7, 12 * 13 // 2) and len(set(arrays["sample_ids"])) == 12


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 3}, {"batch_size": 16}, {"mesh": "data=1,fsdp=2,tensor=4"}, {"mesh": "data=4,fsdp=2"}],
    ids=str,
)
def test_scores_do_not_depend_on_how_they_are_computed(config, tmp_path, changes, model):
    wide = tiny_checkpoint(tmp_path / "wide", num_attention_heads=4, num_key_value_heads=4)
    base = dataclasses.replace(config, model=str(wide), mesh="data=8")
    first = run_analysis(base).scores["delta_debiased"].values
    second = run_analysis(dataclasses.replace(base, out=str(tmp_path / "other"), **changes)).scores["delta_debiased"]
    np.testing.assert_allclose(first, second.values, atol=1e-5)


def test_scores_do_not_depend_on_the_order_of_samples(config, data, tmp_path):
    lines = data.read_text().splitlines()
    other = tmp_path / "prompts.jsonl"
    other.write_text("\n".join(lines[::-1]))
    first = run_analysis(config)
    second = run_analysis(dataclasses.replace(config, data=str(other), out=str(tmp_path / "other")))
    for key, score in first.scores.items():
        np.testing.assert_allclose(score.values, second.scores[key].values, atol=1e-5)
        np.testing.assert_allclose(score.stderr, second.scores[key].stderr, atol=1e-5)


def test_same_inputs_same_bytes(config, tmp_path):
    run_analysis(config)
    run_analysis(dataclasses.replace(config, out=str(tmp_path / "again")))
    assert without_times(tmp_path / "run") == without_times(tmp_path / "again")


def test_a_second_run_needs_no_forward_pass(config, tmp_path, monkeypatch):
    run_analysis(config)
    before = without_times(tmp_path / "run")
    monkeypatch.setattr(captures, "capture", lambda *_, **__: pytest.fail("ran the model again"))
    run_analysis(config)
    assert without_times(tmp_path / "run") == before


def test_an_interrupted_run_resumes(model, data, tmp_path, monkeypatch):
    other = prompts_file(tmp_path / "others.jsonl", seed=1)
    config = AnalyzeOptions(model=str(model), data=f"{data},{other}", out=str(tmp_path / "run"))
    real, calls = captures.capture, []

    def once(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(captures, "capture", once)
    monkeypatch.setattr(captures, "_TOGETHER", 0)  # datasets large enough to be captured one by one
    with pytest.raises(KeyboardInterrupt):
        run_analysis(config)
    assert read_json(tmp_path / "run" / "run.json", "jaxcrit.run")["status"] == "running"
    run_analysis(config)
    assert len(calls) == 3, "the first dataset was captured once"
    assert read_json(tmp_path / "run" / "run.json", "jaxcrit.run")["status"] == "complete"


def test_a_large_fingerprint_is_kept_on_request(config, tmp_path, monkeypatch, capsys):
    """Without it, a run that goes on says why it sweeps again, and what reads Grams says how to have them."""
    monkeypatch.setattr(captures, "FINGERPRINT_BYTES", 1000)
    first, run = run_analysis(config), tmp_path / "run"
    assert not (run / "fingerprint.npz").exists()
    capsys.readouterr()
    run_analysis(config)
    told = capsys.readouterr().err
    assert told == "prompts: swept again, for its Grams (0 MB) were not kept; a run with --fingerprint keeps them\n"
    for command in (["compare", str(run), str(run)], ["spectrum", f"--run={run}"]):
        assert main([*command, f"--out={tmp_path / 'other'}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "no fingerprint.npz there" in error and "--fingerprint" in error
    kept = run_analysis(dataclasses.replace(config, fingerprint=True, out=str(tmp_path / "kept")))
    assert (tmp_path / "kept" / "fingerprint.npz").exists()
    for key, score in first.scores.items():
        np.testing.assert_allclose(kept.scores[key].values, score.values, atol=1e-6)
        np.testing.assert_allclose(kept.scores[key].stderr, score.stderr, atol=1e-6)


def test_many_prompts_go_by_tiles_with_all_errors(config, tmp_path, monkeypatch):
    """Errors, null and certainty are those of whole Grams; what takes these has them."""
    whole = run_analysis(config)
    monkeypatch.setattr("jaxcrit.similarity._forms.RESIDENT_SAMPLES", 8)
    tiles = run_analysis(dataclasses.replace(config, out=str(tmp_path / "tiles")))
    assert tiles.run["forms"]["prompts"]["name"] == "tiled" and not (tmp_path / "tiles" / "fingerprint.npz").exists()
    for key, score in whole.scores.items():
        np.testing.assert_allclose(tiles.scores[key].values, score.values, atol=1e-6)
        np.testing.assert_allclose(tiles.scores[key].stderr, score.stderr, atol=1e-5)
    ours, theirs = tiles.datasets["prompts"], whole.datasets["prompts"]
    for key in ("null_mean", "null_stddev", "debiased"):
        np.testing.assert_allclose(ours.cka[key], theirs.cka[key], atol=1e-6)
    np.testing.assert_allclose(ours.certainty.probability, theirs.certainty.probability, atol=0.02)
    for changes in ({"measures": "rsa"}, {"position": "all"}, {"fingerprint": True}):
        run = run_analysis(dataclasses.replace(config, **changes, out=str(tmp_path / next(iter(changes)))))
        assert run.run["forms"]["prompts"]["name"] == "resident"


def test_datasets_that_share_batches_resume_each_for_itself(model, data, tmp_path, monkeypatch):
    """Interrupted after the first dataset; the rest comes out as if nothing had happened, from fewer batches."""
    others = [prompts_file(tmp_path / f"{name}.jsonl", seed=seed) for seed, name in enumerate(["b", "c"], 1)]
    sources = ",".join(map(str, (data, *others)))
    config = AnalyzeOptions(model=str(model), data=sources, out=str(tmp_path / "run"), batch_size=4)
    run_analysis(dataclasses.replace(config, out=str(tmp_path / "whole")))
    real, done, batches = captures.centred_grams, [], []

    def once(*arguments, **options):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(captures, "centred_grams", once)
        run_analysis(config)
    captured = captures.capture

    def counted(decoder, given, *arguments, **options):
        batches.append([batch.rows.tolist() for batch in given])
        return captured(decoder, given, *arguments, **options)

    monkeypatch.setattr(captures, "capture", counted)
    run = run_analysis(config).run
    (resumed,) = batches
    assert run["time"]["capture"]["prompts"] == {"reused": True}
    assert run["time"]["capture"]["b"]["together"] == ["prompts", "b", "c"]
    assert all(max(rows) >= 12 for rows in resumed), "no batch of the first dataset alone"
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")


@pytest.mark.parametrize("position", ["last", "all"])
def test_a_dataset_scores_the_same_in_company(model, data, tmp_path, position):
    other = prompts_file(tmp_path / "others.jsonl", seed=1)
    how = {"model": str(model), "position": position, "batch_size": 8, "save_activations": True}
    both = run_analysis(AnalyzeOptions(data=f"{data},{other}", out=str(tmp_path / "both"), **how))
    taken = both.run["time"]["capture"]
    assert taken["prompts"] == taken["others"] and taken["prompts"]["together"] == ["prompts", "others"]
    for name, file in (("prompts", data), ("others", other)):
        alone = run_analysis(AnalyzeOptions(data=str(file), out=str(tmp_path / name), **how)).datasets[name]
        mine = both.datasets[name]
        assert mine.sample_ids == alone.sample_ids
        for key, score in alone.scores.items():
            np.testing.assert_allclose(mine.scores[key].values, score.values, atol=1e-5)
            np.testing.assert_allclose(mine.scores[key].stderr, score.stderr, atol=1e-5)
        files = (tmp_path / "both" / name, tmp_path / name)
        ours, theirs = (load_file(folder / "activations.safetensors")["hidden"] for folder in files)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_several_datasets_have_a_consensus(model, data, tmp_path):
    other = prompts_file(tmp_path / "others.jsonl", seed=1)
    analysis = run_analysis(AnalyzeOptions(model=str(model), data=f"{data},{other}", out=str(tmp_path / "run")))
    assert list(analysis.datasets) == ["prompts", "others"]
    ranks = read_scores(tmp_path / "run" / "scores.json")["delta_debiased"]
    assert ranks.meta["consensus"] == "mean_rank"
    for name, result in analysis.datasets.items():
        assert read_scores(tmp_path / "run" / name / "scores.json").keys() == result.scores.keys()
    assert analysis.consensus is analysis.scores["delta_debiased"]
    assert analysis.certainty.probability.sum() == pytest.approx(len(analysis.chosen.layers))
    assert analysis.certainty.num_prompts == 24
    for folder in ("", "prompts", "others"):
        assert (
            read_json(tmp_path / "run" / folder / "uncertainty.json", "jaxcrit.uncertainty")["choice"]["draws"] == 2000
        )


def test_activations_are_kept_on_request(config, tmp_path):
    run_analysis(dataclasses.replace(config, save_activations=True, embed=True))
    kept = load_file(tmp_path / "run" / "activations.safetensors")
    assert kept["hidden"].shape == (7, 12, 24) and kept["embed"].shape == (12, 24)
    assert kept["hidden"].dtype == np.float32
    assert read_npz(tmp_path / "run" / "cka.npz")[0]["biased"].shape == (7, 7)


@pytest.mark.parametrize("position", ["mean", "all"])
def test_positions(config, position, tmp_path):
    analysis = run_analysis(dataclasses.replace(config, position=position))
    result = analysis.datasets["prompts"]
    assert result.num_samples == 12 if position == "mean" else result.num_samples > 12
    assert result.certainty.num_prompts == len(result.without_each) == 12, "prompts are resampled, never tokens"
    assert np.isfinite(result.scores["delta_debiased"].stderr[2:5]).all()
    assert ("null_p" in result.cka) == (position == "mean"), "tokens of a prompt cannot be permuted"


def test_other_measures(config, tmp_path, capsys):
    """Matrices in measures.npz, δ of each in scores.json, a table; nothing else changes."""
    analysis = run_analysis(config)
    names = "procrustes,rsa,rsa_spearman,svcca"
    out = tmp_path / "more"
    with_more = [f"--model={config.model}", f"--data={config.data}", "--layers=critical:2", f"--out={out}"]
    assert main(["analyze", *with_more, f"--measures={names}"]) == 0
    said = capsys.readouterr().out
    assert "δ by other measures" in said and "rsa_spearman" in said
    assert max(len(line) for line in said.splitlines() if not line.startswith("  jaxcrit ")) <= 100
    arrays, meta = read_npz(out / "measures.npz")
    assert meta["format"] == "jaxcrit.measures" and set(arrays) == set(names.split(","))
    scores = read_scores(out / "scores.json")
    assert set(scores) == set(analysis.scores) | {f"delta_{name}" for name in arrays}
    for name, matrix in arrays.items():
        score = scores[f"delta_{name}"]
        np.testing.assert_allclose(score.values[2:5], [matrix[i - 2 : i + 3, i].mean() for i in (2, 3, 4)])
        assert score.valid.tolist() == [False, False, True, True, True, False, False] and score.stderr is None
    np.testing.assert_array_equal(scores["delta"].values, analysis.scores["delta"].values)


def test_rows_of_unit_length(config, tmp_path):
    plain = run_analysis(dataclasses.replace(config, save_activations=True))
    unit = run_analysis(dataclasses.replace(config, normalize="row", out=str(tmp_path / "unit")))
    hidden = load_file(tmp_path / "run" / "activations.safetensors")["hidden"]
    rows = hidden / np.linalg.norm(hidden, axis=2, keepdims=True)
    np.testing.assert_allclose(unit.datasets["prompts"].cka["biased"], oracles.oracle(rows), atol=1e-6)
    for form in ("tiled", "features", "streamed"):
        same = dataclasses.replace(config, normalize="row", form=form, band="2", out=str(tmp_path / form))
        scores = run_analysis(same).scores
        np.testing.assert_allclose(scores["delta_debiased"].values, unit.scores["delta_debiased"].values, atol=1e-6)
    assert np.abs(unit.scores["delta"].values[2:5] - plain.scores["delta"].values[2:5]).max() > 1e-4


def test_forms_and_bands_give_the_same_scores(config, tmp_path):
    first = run_analysis(config)
    assert first.run["forms"]["prompts"]["name"] == "resident"
    for form, band in (("tiled", "all"), ("features", "2"), ("streamed", "all"), ("streamed", "2"), ("auto", "2")):
        out = tmp_path / f"{form}-{band}"
        analysis = run_analysis(dataclasses.replace(config, form=form, band=band, out=str(out)))
        assert analysis.run["forms"]["prompts"]["name"] == ("resident" if form == "auto" else form)
        assert (out / "fingerprint.npz").exists() is (form == "auto")
        assert np.isnan(analysis.datasets["prompts"].cka["biased"][0, 6]) == (band == "2")
        has_errors = form in ("tiled", "auto")
        assert (analysis.certainty is not None) is has_errors
        said = " ".join(analysis_report(analysis).text().split())
        assert f"Sweep: {'resident' if form == 'auto' else form}" in said
        assert ("no standard errors" in said) is (not has_errors)
        for key, score in first.scores.items():
            other = analysis.scores[key]
            np.testing.assert_allclose(other.values, score.values, atol=1e-5)
            assert (other.stderr is not None) is has_errors
            if has_errors:
                np.testing.assert_allclose(other.stderr, score.stderr, atol=1e-5)
        analysis_report(analysis).write(analysis.out, analysis.run)
    assert read_json(out / "run.json", "jaxcrit.run")["forms"]["prompts"]["band"] == 2


def test_rbf_bandwidths_are_recorded(config, tmp_path):
    first = run_analysis(dataclasses.replace(config, kernel="rbf"))
    tiles = dataclasses.replace(config, kernel="rbf", form="tiled", mesh="data=8", out=str(tmp_path / "tiles"), seed=3)
    analysis = run_analysis(tiles)
    np.testing.assert_allclose(analysis.scores["delta"].values, first.scores["delta"].values, atol=1e-5)
    run = read_json(tmp_path / "tiles" / "run.json", "jaxcrit.run")
    assert len(run["forms"]["prompts"]["bandwidths"]) == 7 and run["forms"]["prompts"]["bandwidth_seed"] == 3


@pytest.mark.parametrize("position", ["mean", "all"])
def test_streamed_positions(config, position, tmp_path):
    """Tokens of ``all`` repeat, and batches are padded."""
    first = run_analysis(dataclasses.replace(config, position=position)).datasets["prompts"]
    streamed = dataclasses.replace(config, position=position, form="streamed", out=str(tmp_path / "streamed"))
    second = run_analysis(streamed).datasets["prompts"]
    assert second.num_samples == first.num_samples
    np.testing.assert_allclose(second.cka["debiased"], first.cka["debiased"], atol=1e-5)


def test_biased_selection(config):
    analysis = run_analysis(dataclasses.replace(config, bias="biased"))
    assert analysis.chosen.criterion == "delta"


def test_a_selection_may_name_its_score(config, model, tmp_path):
    biased = run_analysis(dataclasses.replace(config, bias="biased"))
    named = run_analysis(dataclasses.replace(config, layers="delta:2", out=str(tmp_path / "named")))
    assert named.chosen == dataclasses.replace(biased.chosen, rule="delta:2")
    assert named.certainty.to_json() == biased.certainty.to_json(), "it is as sure as the same choice by --bias"
    demo = {"data": "demo:arithmetic,demo:choice", "limit": 6, "truncate": "left"}
    ends = run_analysis(dataclasses.replace(config, layers="boundary(step:3)", out=str(tmp_path / "ends"), **demo))
    assert len(ends.chosen.layers) == 2 and ends.chosen.criterion == ends.consensus.name == "step"
    assert ends.chosen.rule == "boundary(step:3)" and ends.certainty is None
    asked = [f"--model={model}", f"--data={config.data}", "--layers=delta:2", f"--out={tmp_path / 'x'}"]
    assert main(["analyze", *asked]) == 0


def lines(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count):
    return [{"prompt": f"{i} cats"} for i in range(count)]


def spoil(model, tmp_path, **changes):
    """A copy of the model with files changed: bytes to write, or None to remove."""
    copy = tmp_path / "spoilt"
    shutil.copytree(model, copy)
    for name, content in changes.items():
        file = copy / name.replace("__", ".")
        file.unlink() if content is None else file.write_bytes(content)
    return str(copy)


BAD = {
    "no model": (lambda m, t: {"model": str(t / "absent")}, "no such directory"),
    "no tokenizer": (lambda m, t: {"model": spoil(m, t, tokenizer__json=None)}, "tokenizer"),
    "no weights": (lambda m, t: {"model": spoil(m, t, model__safetensors=None)}, "found neither"),
    "damaged weights": (lambda m, t: {"model": spoil(m, t, model__safetensors=b"\x08" + bytes(20))}, "damaged"),
    "no data": (lambda m, t: {"data": str(t / "absent.jsonl")}, "absent.jsonl"),
    "broken line": (lambda m, t: {"data": lines(t / "d.jsonl", *rows(4), "{oops\n")}, "line 5"),
    "empty file": (lambda m, t: {"data": lines(t / "d.jsonl")}, "empty file"),
    "wrong fields": (lambda m, t: {"data": lines(t / "d.jsonl", {"prmpt": "x"})}, "did you mean 'prompt'"),
    "empty prompt": (lambda m, t: {"data": lines(t / "d.jsonl", {"prompt": " "})}, "line 1"),
    "too long": (lambda m, t: {"data": lines(t / "d.jsonl", *rows(4), {"prompt": "x y " * 90})}, "--truncate=left"),
    "too few": (lambda m, t: {"data": lines(t / "d.jsonl", *rows(3))}, "at least 4 samples"),
    "all identical": (
        # different rows (their ids differ) that render to the same prompt
        lambda m, t: {"data": lines(t / "d.jsonl", *({"prompt": "cats", "id": i} for i in range(6)))},
        "all 6 samples are identical",
    ),
    "repeated": (
        lambda m, t: {"data": lines(t / "d.jsonl", *rows(6), {"prompt": "2 cats", "id": 1})},
        "repeat an earlier one",
    ),
    "file as out": (lambda m, t: {"out": lines(t / "file", {})}, "expected a directory"),
    "foreign out": (lambda m, t: {"out": str(m)}, "no jaxcrit run"),
    "unwritable out": (lambda m, t: {"out": "/proc/jaxcrit"}, "cannot be"),
    "too many layers": (lambda m, t: {"layers": "critical:6"}, "at most 3"),
    "unknown layers": (lambda m, t: {"layers": "critcal:2"}, "did you mean 'critical'"),
    "unknown score": (lambda m, t: {"layers": "stpe:2"}, "no score 'stpe' (did you mean 'step'?); there are delta,"),
    "layer outside": (lambda m, t: {"layers": "3-9"}, "expected layers 0 to 6"),
    "even window": (lambda m, t: {"window": 4}, "odd"),
    "window wider than the model": (lambda m, t: {"window": 9}, "9"),
    "unknown measure": (lambda m, t: {"measures": "rsa,procrusts"}, "did you mean 'procrustes'"),
    "too few samples for a measure": (lambda m, t: {"data": lines(t / "d.jsonl", *rows(8)), "measures": "cca"}, "more"),
    "unknown normalisation": (lambda m, t: {"normalize": "rows"}, "row"),
    "embed alone": (lambda m, t: {"embed": True}, "--save_activations"),
    "mesh": (lambda m, t: {"mesh": "data=3"}, "--mesh=data=3"),
    "unknown form": (lambda m, t: {"form": "sketched"}, "--form=sketched: expected"),
    "no form for the kernel": (lambda m, t: {"form": "streamed", "kernel": "rbf"}, "no feature space"),
    "nothing to save": (lambda m, t: {"form": "streamed", "save_activations": True}, "to be saved"),
    "band wider than the model": (lambda m, t: {"band": "7"}, "band=7: expected 1 to 6"),
    "band narrower than the window": (lambda m, t: {"band": "1"}, "--band=2 or more"),
    "no band": (lambda m, t: {"band": "some"}, "expected all, or a number"),
    "repeated, streamed": (
        lambda m, t: {"form": "streamed", "data": lines(t / "d.jsonl", *rows(6), {"prompt": "2 cats", "id": 1})},
        "samples 2 and 6, counted from 0, are the same prompt",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_exit_2_and_nothing_written(make, message, config, model, tmp_path, capsys):
    changed = {**dataclasses.asdict(config), **make(model, tmp_path)}
    before = sorted(tmp_path.rglob("*"))
    given = {k: v for k, v in changed.items() if v != getattr(AnalyzeOptions(), k)}
    code = main(["analyze", *(f"--{key}={value}" for key, value in given.items())])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("jaxcrit: error: ") and error.count("\n") == 1 and message in error, error
    assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"


def test_another_run_in_the_same_directory_is_refused(config):
    run_analysis(config)
    with pytest.raises(UserError, match="window 5 there, 3 now"):
        run_analysis(dataclasses.replace(config, window=3))


def test_truncation_on_request(config, tmp_path):
    long = lines(tmp_path / "long.jsonl", *({"prompt": f"{i} " + "x y " * 90 + str(i)} for i in range(5)))
    run_analysis(dataclasses.replace(config, data=long, truncate="left"))
