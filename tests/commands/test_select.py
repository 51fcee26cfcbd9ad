"""``jaxcrit select`` on a scores.json alone."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxcrit.commands.main import main
from jaxcrit.core.layers import LayerScores, LayerSet, write_scores


@pytest.fixture
def scores(tmp_path):
    values = np.array([np.nan, np.nan, 0.9, 0.5, 0.4, 0.8, 0.7, 0.6, np.nan, np.nan])
    valid = np.isfinite(values)
    meta = {"model_hash": "abc", "model_type": "phi3"}
    both = {
        "delta_debiased": LayerScores("delta_debiased", values, valid, "low", None, meta),
        "delta": LayerScores("delta", 1 - values, valid, "low", None, meta),
    }
    path = tmp_path / "scores.json"
    write_scores(path, both)
    return path


def test_prints_layers_json(scores, capsys, tmp_path):
    assert main(["select", f"--scores={scores}", "--layers=critical:2"]) == 0
    out, err = capsys.readouterr()
    (tmp_path / "layers.json").write_text(out)
    expected = LayerSet((3, 4), "delta_debiased", "critical:2", 10, "abc")
    assert LayerSet.load(tmp_path / "layers.json") == expected
    apart = f"jaxcrit: {scores}: lies apart from its run; its structure alone was checked"
    assert err.splitlines() == [str(expected), apart]


def test_other_criterion_trim_and_rule(scores, capsys):
    def layers(*flags):
        assert main(["select", f"--scores={scores}", *flags]) == 0
        return json.loads(capsys.readouterr().out)["layers"]

    assert layers("--layers=critical:2", "--criterion=delta") == [2, 5]
    assert layers("--layers", "critical:1", "--trim=4") == [4]
    assert layers("--layers=noncritical:2", "--trim=0") == [2, 5]
    assert layers("--layers=2-3,9") == [2, 3, 9]
    assert layers() == [3, 4]
    assert layers("--layers=delta:2") == [2, 5]
    assert layers("--layers=boundary(delta:2)", "--criterion=none") == [2, 5]


def test_writes_a_config_of_the_models_family(scores, capsys, tmp_path):
    out = tmp_path / "peft.json"
    assert main(["select", f"--scores={scores}", "--format=peft", f"--out={out}"]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(out.read_text())["target_modules"] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


MISTAKES = {
    "--layers=critcal:2": "did you mean 'critical'?",
    "--layers=critical:7": "expected at most 6 layers after trimming 2",
    "--layers=8-12": "expected layers 0 to 9",
    "--criterion=detla": "did you mean 'delta'?",
    "--layers=boundary(detla:2)": "no score 'detla' (did you mean 'delta'?); it holds delta_debiased, delta",
    "--format=pefd": "did you mean 'peft'?",
    "--out=/proc/none/file": "cannot be written",
}


@pytest.mark.parametrize(("flag", "message"), MISTAKES.items())
def test_mistakes(flag, message, scores, capsys):
    assert main(["select", f"--scores={scores}", flag]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_needs_no_jax(scores):
    code = "import sys; from jaxcrit.commands.main import main; main(sys.argv[1:]); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "select", f"--scores={scores}"], check=True, capture_output=True)
