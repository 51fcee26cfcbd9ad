"""The paper's figure of components on a tiny model: what is printed is what is written, and what the library says."""

import numpy as np
import spectral_dynamics
from scipy.stats import spearmanr
from support.tiny_model import prompts_file, tiny_checkpoint

from jaxcrit.core.files import read_json
from jaxcrit.core.layers import read_scores


def test_correlations(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    model = tiny_checkpoint(tmp_path / "model", num_hidden_layers=9)
    data = prompts_file(tmp_path / "prompts.jsonl", count=20)
    out = tmp_path / "run"
    spectral_dynamics.main([f"--model={model}", f"--data={data}", f"--out={out}", "--k=1,3"])
    said = capsys.readouterr().out
    found = read_json(out / "spectral_dynamics.json", "jaxcrit.spectral_dynamics")
    scores = read_scores(out / "scores.json")
    for key in ("delta", "delta_debiased"):
        inside = scores[key].valid
        for curve in ("cca_1", "cca_3"):
            rho = spearmanr(scores[key].values[inside], scores[curve].values[inside]).statistic
            assert np.isclose(found["datasets"]["prompts"]["correlations"][key][curve]["rho"], rho)
            assert f"{rho:+.2f} (" in said
    assert "-0.32 (0.61)" in said and "p cannot be below 0.200" in said
    assert (out / "spectrum.png").exists() and (out / "report.html").exists()
    assert "path" not in found["model"]
