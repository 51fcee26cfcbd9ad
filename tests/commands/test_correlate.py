"""``jaxcrit correlate`` on files alone."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxcrit.commands.main import main
from jaxcrit.core.deletions import write_deletions
from jaxcrit.core.files import read_json
from jaxcrit.core.layers import LayerScores, read_scores, write_scores
from jaxcrit.selection.correlation import circular_shift_p

LAYERS = 24


def keep(folder, directions, layers=LAYERS, **values):
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for key, curve in values.items():
        curve = np.array(curve, float)
        made[key] = LayerScores(key, curve, np.isfinite(curve), directions, None, {"window": 5})
    write_scores(folder / "scores.json", made)


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    curve = np.convolve(rng.standard_normal(LAYERS + 4), np.ones(5) / 5, "valid")
    curve[:2] = curve[-2:] = np.nan
    keep(tmp_path / "a", "low", delta=curve, delta_debiased=curve**3)
    keep(tmp_path / "b", "high", substitution=-curve, substitution_per_token=rng.standard_normal(LAYERS))
    return tmp_path


def test_two_scores(runs, capsys):
    samples = np.random.default_rng(1).standard_normal((30, LAYERS)) * 0.01
    write_deletions(runs / "a", {"delta_debiased": samples}, [str(i) for i in range(30)])
    out = runs / "out"
    flags = ["correlate", f"--scores={runs / 'a' / 'scores.json'}", f"--scores={runs / 'b'}:substitution"]
    assert main([*flags, f"--out={out}"]) == 0
    text = capsys.readouterr().out
    assert "A a:delta_debiased against B b:substitution, 20 layers (2 to 21 of 24)" in text
    assert "-1.000" in text and "permuted blocks of 10 layers" in text
    assert max(map(len, text.splitlines())) <= 100
    found = read_json(out / "correlation.json", "jaxcrit.correlation")
    assert found["pair"]["rho"] == pytest.approx(-1)
    assert found["pair"]["p_shift"] == 1 / 20
    assert found["spearman"][0][1] == pytest.approx(1)  # low δ and high loss both say critical
    low, high = found["pair"]["interval"]
    assert -1 <= low < high < 0
    assert json.loads((out / "run.json").read_text())["status"] == "complete"
    page = (out / "report.html").read_text()
    assert "Use these layers" not in page and "circular-shift" in page
    for picture in ("layers.png", "scatter.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    again = (out / "correlation.json").read_bytes()
    assert main([*flags, f"--out={out}"]) == 0
    assert (out / "correlation.json").read_bytes() == again


def test_everything_in_a_folder(runs, capsys):
    """Scores that rank alike are one row; every pair has its p; what is shown is what is written."""
    out = runs / "out"
    assert main(["correlate", f"--all={runs}", f"--out={out}"]) == 0
    text = capsys.readouterr().out
    # a:delta, its cube and the substitution, turned round, rank the layers alike.
    assert "a:delta stands for a:delta_debiased, b:substitution\n" in text
    first = next(line for line in text.splitlines() if line.endswith("  a:delta"))
    found = read_json(out / "correlation.json", "jaxcrit.correlation")
    rho, p = found["spearman"][0][3], found["p_shift"][0][3]
    assert first.split()[:3] == ["1", "1.00", f"{rho:.2f}"]
    assert f"{rho:.2f}    {p:.3f}  a:delta and b:substitution_per_token" in text
    scores = read_scores(runs / "a"), read_scores(runs / "b")
    assert p == circular_shift_p(scores[0]["delta"].values, scores[1]["substitution_per_token"].values)
    assert f"{int(p <= 0.05)} of 1 pairs have p of 0.05 or less; 0.1 would by chance" in text
    assert "The 2 scores that differ" in text and (out / "matrix.png").exists()


def test_a_large_folder_shows_its_strongest_pairs_alone(tmp_path, capsys):
    rng = np.random.default_rng(3)
    keep(tmp_path / "a", "low", **{f"score_{place}": rng.standard_normal(LAYERS) for place in range(20)})
    assert main(["correlate", f"--all={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 25 and "of 190 pairs" in text and "9.5 would by chance" in text


def test_warnings(tmp_path, capsys):
    nan = np.nan
    keep(tmp_path / "a", "low", layers=9, delta=[nan, 1, 2, 3, 5, 4, 6, 7, nan])
    keep(tmp_path / "b", "high", layers=9, loss=[9, 1, 3, 2, 4, 5, 7, 6, 1])
    assert main(["correlate", f"--scores={tmp_path}/a", f"--scores={tmp_path}/b"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "7 layers say little: even if they were independent, only |ρ| of 0.754 and above" in text
    assert "cannot bring the circular-shift p below 0.143" in text
    assert "depth alone predicts b:loss" in text
    assert "95 % interval of ρ over the samples: not available" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected --scores=FILE[:KEY] twice, or --all=DIR"),
        (["--scores={0}/a", "--all={0}"], "one of them"),
        (["--scores={0}/a"], "got it 1 times"),
        (["--scores={0}/a:detla", "--scores={0}/b"], "no score 'detla' (did you mean 'delta'?)"),
        (["--scores={0}/none/scores.json", "--scores={0}/b"], "no such file"),
        (["--all={0}/none"], "expected a directory"),
        (["--scores={0}/a", "--scores={0}/short"], "delta_debiased of 24 layers and delta of 3"),
        (["--all={0}"], "expected scores of one model, got 3 layers in"),
        (["--scores={0}/a", "--scores={0}/flat"], "delta: has the same value 2 in all 20 layers"),
        (["--scores={0}/a", "--scores={0}/edges"], "at least 3 layers that both are valid for, got 0"),
    ],
)
def test_refuses(runs, capsys, flags, message):
    if any("short" in flag or flag == "--all={0}" for flag in flags):
        keep(runs / "short", "low", layers=3, delta=[1, 2, 3])
    keep(runs / "flat", "low", delta=np.full(LAYERS, 2))
    keep(runs / "edges", "low", delta=[1, 2] + [np.nan] * (LAYERS - 4) + [3, 4])
    out = runs / "out"
    assert main(["correlate", *(flag.format(runs) for flag in flags), f"--out={out}"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not out.exists()


def test_loads_no_jax(runs):
    code = (
        "import sys; from jaxcrit.commands.main import main;"
        f" assert main(['correlate', '--scores={runs}/a', '--scores={runs}/b', '--out={runs}/o']) == 0;"
        " assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
