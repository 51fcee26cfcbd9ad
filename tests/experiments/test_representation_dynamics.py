"""The data-obliviousness figure on a tiny model: matrices printed, written, and those of the library."""

import numpy as np
import pytest
import representation_dynamics
from support.tiny_model import prompts_file, tiny_checkpoint

from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json
from jaxcrit.core.layers import LayerSet, read_scores
from jaxcrit.selection import spearman_matrix


def test_matrices(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    model = tiny_checkpoint(tmp_path / "model", num_hidden_layers=9)
    files = [prompts_file(tmp_path / f"{name}.jsonl", seed=seed) for seed, name in enumerate(("one", "two", "three"))]
    out = tmp_path / "run"
    spec = ",".join(map(str, files))
    representation_dynamics.main([f"--model={model}", f"--data={spec}", f"--out={out}", "--layers=critical:2"])
    said = capsys.readouterr().out
    found = read_json(out / "agreement.json", "jaxcrit.agreement")
    assert found["datasets"] == ["one", "two", "three"] and found["criterion"] == "delta_debiased"
    scores = [read_scores(out / name / "scores.json")["delta_debiased"] for name in found["datasets"]]
    np.testing.assert_allclose(found["spearman"], spearman_matrix(scores))
    assert found["consensus"] == list(LayerSet.load(out / "layers.json").layers)
    assert np.array(found["overlap"]).shape == (3, 3)
    assert "Spearman's correlation" in said and "with depth" in said and "Llama-2-7B-chat (mean 0.87)" in said
    assert all((out / name / "cka.png").exists() for name in found["datasets"]) and (out / "report.html").exists()
    with pytest.raises(UserError, match="two datasets or more"):
        representation_dynamics.main([f"--model={model}", f"--data={files[0]}", f"--out={tmp_path / 'alone'}"])


def test_the_printed_matrix_is_symmetric():
    np.testing.assert_array_equal(representation_dynamics.PRINTED, representation_dynamics.PRINTED.T)
