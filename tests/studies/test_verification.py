"""``jaxcrit verify``, bits that flip, and faults at writes; all of the latter are in ``.ci/full``."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support import flips
from support.sealing import sealed_again

from jaxcrit.commands.main import main
from jaxcrit.core import digests
from jaxcrit.core.errors import UserError
from jaxcrit.core.files import read_json, read_npz, write_json, write_npz
from jaxcrit.core.layers import LayerSet
from jaxcrit.models.model import open_model
from jaxcrit.studies.verification import verify

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return flips.make(tmp_path_factory.mktemp("runs").resolve())


@pytest.fixture
def copy(runs, tmp_path):
    """Copies a run by the name of its command."""
    return lambda name: shutil.copytree(next(run for run in runs if run.name == name), tmp_path / name)


def test_runs_are_what_they_claim_and_what_is_not_is_a_line(runs, copy, capsys):
    capsys.readouterr()
    assert main(["verify", *map(str, runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(runs) and all("is what it claims" in line for line in lines)
    assert "redone from Grams: scores.json, cka.npz, layers.json" in lines[0]
    assert "redone from Grams: scores.json, spectrum.npz" in lines[1]
    assert "arrays of 1 checkpoints have theirs" in lines[3]
    run = copy("analyze")
    whole = (run / "layers.json").stat().st_size
    (run / "cka.png").unlink()
    (run / "notes.txt").write_text("mine")
    (run / "layers.json").write_text("{}")
    assert main(["verify", str(run)]) == 1
    assert capsys.readouterr().out.splitlines()[:3] == [
        f"{run}: missing: cka.png",
        f"{run}: extra: notes.txt: is not among the files of the run",
        f"{run}: changed: layers.json: 2 bytes, expected {whole}",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: edited_score(run, 7, 1e-4), r"differs: scores.json: delta at 7 is .*, its Grams give .*"),
        (lambda run: edited_cka(run, 1e-4), r"differs: cka.npz: debiased at 3, 4 is .*, its Grams give .*"),
        (lambda run: edited_layers(run), r"differs: layers.json: \[0, 1\], its Grams give \["),
    ],
)
def test_statistics_that_their_grams_do_not_give_are_found(change, said, copy):
    """Of a run that is written to deceive: every digest fits."""
    run = copy("analyze")
    change(run)
    sealed_again(run)
    found = verify(run, 1e-5)
    assert len(found.findings) == 1 and re.match(said, found.findings[0]), found.findings


def edited_score(run, layer, by):
    content = read_json(run / "scores.json", "jaxcrit.scores")
    content["scores"]["delta"]["values"][layer] += by
    write_json(run / "scores.json", "jaxcrit.scores", content)


def edited_cka(run, by):
    arrays, meta = read_npz(run / "cka.npz")
    arrays["debiased"][3, 4] += by
    write_npz(run / "cka.npz", arrays, meta)


def edited_layers(run):
    chosen = LayerSet.load(run / "layers.json")
    LayerSet((0, 1), chosen.criterion, chosen.rule, chosen.num_layers, chosen.model_hash).save(run / "layers.json")


def test_rounding_is_no_difference(copy):
    run = copy("analyze")
    edited_score(run, 7, 1e-7)
    sealed_again(run)
    assert verify(run, 1e-5).findings == [] and len(verify(run, 1e-8).findings) == 1


def test_what_is_no_whole_run(copy, tmp_path, capsys):
    nothing = ((tmp_path / "absent", "there is nothing"), (tmp_path, "without run.json"), ("", "expected run dir"))
    for given, said in nothing:
        assert main(["verify", *([str(given)] if given else [])]) == 2
        assert said in capsys.readouterr().err
    run = copy("generate")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text("{")
    assert main(["verify", str(run)]) == 1 and "changed: " in capsys.readouterr().out
    del record["digests"]
    (run / "run.json").write_text(json.dumps(record))
    assert verify(run, 0).findings[0].startswith("unverified: written without digests")
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}))
    assert verify(run, 0).findings[0].startswith("incomplete: run.json says running")


def test_fifty_flipped_bits(runs):
    table = flips.flip(runs, 50)
    assert sum(tries for tries, *_ in table.values()) == 50 and "checkpoints" in table
    for kind, (tries, verified, reader) in table.items():
        assert tries == verified == reader, kind


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax leaves reads that failed
def test_no_flipped_bit_is_read_as_other_weights(copy, monkeypatch):
    """Where files are too large to be listed by their content, the arrays' own digests tell."""
    run = copy("finetune")
    right, rng, refused = params(run), np.random.default_rng(0), 0
    monkeypatch.setattr(digests, "differing", lambda *_, **__: {})
    data = [
        path for path in sorted((run / "checkpoints").rglob("*")) if "params" in path.parts and path.parent.name == "d"
    ]
    for number in range(24):
        file = data[number % len(data)]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            jax.tree.map(np.testing.assert_array_equal, params(run), right)
        except UserError as error:
            assert "cannot be read" in str(error)
            refused += 1
        file.write_bytes(whole)
    gc.collect()  # here and not within another test
    assert refused >= 8


def params(run):
    return jax.device_get(open_model(str(run)).overlays[0].params)


def test_thirty_faults_at_writes(tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    library = tmp_path / "faults.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, HERE / "support/faults.c", "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "support.faults", "analyze:12", "generate:12", "finetune:6"],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": f"{HERE.parent}:{HERE}", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and done.stdout.count("0 went wrong") == 3, done.stdout + done.stderr
