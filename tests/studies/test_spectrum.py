"""``jaxcrit spectrum`` on a tiny random model, from its weights and from the Grams of an earlier run."""

from __future__ import annotations

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.sealing import sealed_again
from support.tiny_model import prompts_file, tiny_checkpoint

from jaxcrit.commands.main import main
from jaxcrit.commands.spectrum import SpectrumOptions, _sentence, parse_components, run_spectrum
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json, read_npz, write_npz
from jaxcrit.core.groups import AnalyzeOptions
from jaxcrit.core.layers import read_scores
from jaxcrit.evidence import captures
from jaxcrit.studies.analysis import run_analysis

DATA_FILES = ("scores.json", "spectrum.json", "spectrum.npz")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=9)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prompts_file(tmp_path_factory.mktemp("data") / "prompts.jsonl", count=30)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def analyzed(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "analyzed"
    run_analysis(AnalyzeOptions(model=str(model), data=str(data), out=str(out), save_activations=True, seed=3))
    return out


def test_numbers_and_files(analyzed, tmp_path, capsys):
    """CCA of the activations themselves, by decomposing them; table and page."""
    out = tmp_path / "spectrum"
    assert main(["spectrum", f"--run={analyzed}", f"--out={out}", "--k=3,1"]) == 0
    said = capsys.readouterr().out
    assert "CCA top 1" in said and "tracks δ best" in said and max(map(len, said.splitlines()[:-1])) <= 100
    hidden = load_file(analyzed / "activations.safetensors")["hidden"].astype(np.float64)
    tops = [np.linalg.svd(x - x.mean(0), full_matrices=False) for x in hidden]
    arrays, meta = read_npz(out / "spectrum.npz")
    assert meta["format"] == "jaxcrit.spectrum" and set(arrays) == {
        "scores",
        "singular_values",
        "sample_ids",
        "cca_1",
        "cca_3",
    }
    assert arrays["scores"].shape == (9, 30, 3) and len(set(arrays["sample_ids"])) == 30
    scores = read_scores(out / "scores.json")
    assert set(scores) == {"delta", "delta_debiased", "step", "step_debiased", "cca_1", "cca_3"}
    for k in (1, 3):
        matrix = np.array(
            [[np.linalg.svd(x[0][:, :k].T @ y[0][:, :k], compute_uv=False).mean() for y in tops] for x in tops]
        )
        np.testing.assert_allclose(arrays[f"cca_{k}"], matrix, atol=1e-5)
        expected = [np.mean([matrix[i, i + d] for d in (-2, -1, 1, 2)]) for i in range(2, 7)]
        np.testing.assert_allclose(scores[f"cca_{k}"].values[2:7], expected, atol=1e-5)
        assert np.isfinite(scores[f"cca_{k}"].stderr[2:7]).all()
    np.testing.assert_array_equal(scores["delta"].values, read_scores(analyzed / "scores.json")["delta"].values)
    found = read_json(out / "spectrum.json", "jaxcrit.spectrum")
    s = tops[4][1]
    assert found["participation_ratio"][4] == pytest.approx((s**2).sum() ** 2 / (s**4).sum(), rel=1e-4)
    assert found["gaps"]["3"][4] == pytest.approx(1 - s[3] ** 2 / s[2] ** 2, abs=1e-4)
    assert set(found["tracking"]["correlations"]) == {"cca_1", "cca_3"}
    assert (out / "spectrum.png").stat().st_size > 10_000
    page = (out / "report.html").read_text()
    assert "jaxcrit spectrum" in page and "data:image/png" in page and "Use these layers" not in page


def test_with_and_without_the_model_the_same(model, data, analyzed, tmp_path, monkeypatch):
    config = SpectrumOptions(model=str(model), data=str(data), out=str(tmp_path / "model"))
    run_spectrum(config)
    before = [(tmp_path / "model" / name).read_bytes() for name in DATA_FILES]
    monkeypatch.setattr(captures, "capture", lambda *_, **__: pytest.fail("ran the model again"))
    run_spectrum(config)  # resumes
    run_spectrum(SpectrumOptions(run=str(analyzed), out=str(tmp_path / "run")))
    run_spectrum(SpectrumOptions(run=str(tmp_path / "model"), out=str(tmp_path / "second")))
    for folder in ("model", "run", "second"):
        assert [(tmp_path / folder / name).read_bytes() for name in DATA_FILES] == before
    with pytest.raises(UserError, match=r"k \[1, 3, 10\] there, \[2\] now"):
        run_spectrum(dataclasses.replace(config, k="2"))


def test_several_datasets_and_tokens_as_samples(model, data, tmp_path, capsys):
    other = prompts_file(tmp_path / "others.jsonl", count=10, seed=1)
    out = tmp_path / "run"
    arguments = [f"--model={model}", f"--data={data},{other}", f"--out={out}", "--k=1,2"]
    assert main(["spectrum", *arguments, "--position=all"]) == 0
    said = capsys.readouterr().out
    assert "prompts: CCA of" in said and "others: CCA of" in said
    for name in ("prompts", "others"):
        scores = read_scores(out / name / "scores.json")
        assert scores["cca_1"].stderr is None and scores["delta"].stderr is None, "tokens are not independent"
        arrays, _ = read_npz(out / name / "spectrum.npz")
        assert arrays["scores"].shape[1] == len(arrays["sample_ids"]) > 30
    assert read_scores(out / "scores.json")["cca_1"].meta["consensus"] == "mean_rank"
    again = run_spectrum(SpectrumOptions(run=str(out), k="1,2", out=str(tmp_path / "again")))
    for name in again.datasets:
        for file in DATA_FILES:
            assert (tmp_path / "again" / name / file).read_bytes() == (out / name / file).read_bytes()


def test_unidentified_components_are_named(analyzed, tmp_path):
    """Two equal variances: a warning with the gap."""
    copy = tmp_path / "run"
    shutil.copytree(analyzed, copy)
    arrays, meta = read_npz(copy / "fingerprint.npz")
    u = np.linalg.qr(np.c_[np.ones(30), np.random.default_rng(0).standard_normal((30, 5))])[0][:, 1:]
    gram = (u * [9.0, 4.0, 4.0, 2.0, 1.0]) @ u.T
    arrays["gram"][5] = gram[np.triu_indices(30)]
    write_npz(copy / "fingerprint.npz", arrays, meta)
    sealed_again(copy)
    result = run_spectrum(SpectrumOptions(run=str(copy), out=str(tmp_path / "out"), k="2,5")).datasets["prompts"]
    warned = [line for line in result.warnings if line.startswith("component 2")]
    assert len(warned) == 1 and "smallest gap 0.0000 in layer 5, sampling error 0.2582" in warned[0]
    with pytest.raises(UserError, match="layers 5: expected at most 5 components, the rank of layer 5, got 6"):
        run_spectrum(SpectrumOptions(run=str(copy), out=str(tmp_path / "more"), k="6"))
    assert not (tmp_path / "more").exists()


def test_too_many_samples_for_errors(analyzed, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxcrit.commands.spectrum.COMPLETE_BYTES", 1000)
    result = run_spectrum(SpectrumOptions(run=str(analyzed), out=str(tmp_path / "out"))).datasets["prompts"]
    assert result.scores["cca_3"].stderr is None and "are not estimated: 30 samples" in result.warnings[0]


def broken(analyzed, tmp_path, change):
    """A copy of the run with its fingerprint changed."""
    copy = tmp_path / "broken"
    shutil.copytree(analyzed, copy)
    file = copy / "fingerprint.npz"
    arrays, meta = read_npz(file)
    change(arrays, meta)
    write_npz(file, arrays, meta)
    sealed_again(copy)
    return copy


def test_a_fingerprint_that_is_not_the_runs(analyzed, tmp_path):
    for place, (change, message) in enumerate(
        {
            "cut": (lambda a, m: a.update(gram=a["gram"][:, :-1]), "expected Grams of"),
            "bare": (lambda a, m: a.pop("gram"), "has no gram"),
            "another's": (lambda a, m: m.update(identity="x"), "is not of the run beside it"),
            "later": (lambda a, m: m.update(format_version=2), "got 2"),
        }.values()
    ):
        (tmp_path / str(place)).mkdir()
        with pytest.raises(UserError, match=message):
            run = broken(analyzed, tmp_path / str(place), change)
            run_spectrum(SpectrumOptions(run=str(run), out=str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()


BAD = {
    "k of words": ({"k": "1,three"}, "expected numbers of components"),
    "k of zero": ({"k": "0,3"}, "expected numbers of components"),
    "empty k": ({"k": ""}, "expected numbers of components"),
    "wider than the model": ({"k": "25"}, "at most 24, the width"),
    "fewer samples than components": ({"k": "10", "limit": 8}, "has 8 samples, so at most 7 components"),
    "window wider than the model": ({"window": 11}, "11"),
    "no run": ({"run": "absent", "model": "", "data": ""}, "no such file"),
    "run and model": ({"run": "absent"}, "leave out --data --model"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_exit_2_and_nothing_written(changes, message, model, data, tmp_path, capsys):
    given = {"model": str(model), "data": str(data), "out": str(tmp_path / "run"), **changes}
    words = [f"--{key}={value}" for key, value in given.items() if value != "" or key == "k"]
    assert main(["spectrum", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxcrit: error: ") and error.count("\n") == 1 and message in error, error
    assert not list(tmp_path.iterdir())


def test_numbers_of_components():
    assert parse_components("10, 1,3,3") == (1, 3, 10)


@pytest.mark.parametrize(
    ("gaps", "told"),
    [
        (
            (0.9, 0.9, 0.9),
            "tracks δ best: Spearman's ρ = +0.88 over 26 layers (circular-shift p = 0.038 for the best of",
        ),
        ((0.9, 0.9, 0.1), "is not told apart from the next in 8 of 8 layers: use the first 3 components (ρ = +0.72)"),
        ((0.1, 0.1, 0.1), "nor is the last of any other number in most"),
    ],
)
def test_what_is_not_told_apart_is_not_recommended(gaps, told):
    whole = np.full((8, 10), np.nan)
    whole[:, [0, 2, 9]] = gaps
    rhos = {"cca_1": 0.70, "cca_3": 0.72, "cca_10": 0.88}
    correlations = {name: SimpleNamespace(rho=rho, partial=0.8, num_layers=26) for name, rho in rhos.items()}
    tracking = SimpleNamespace(correlations=correlations, best="cca_10", p_best=0.038)
    spectrum = SimpleNamespace(gaps=whole, sampling_gap=0.2)
    assert told in _sentence(SimpleNamespace(tracking=tracking, spectrum=spectrum))
