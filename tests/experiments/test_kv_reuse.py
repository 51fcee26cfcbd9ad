"""The experiment on reused keys and values, on two tiny models and made-up rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from support.tiny_model import tiny_checkpoint

from jaxcrit.core.files import read_json


@pytest.fixture(scope="module")
def experiment():
    path = Path(__file__).parents[2] / "experiments" / "kv_reuse.py"
    spec = importlib.util.spec_from_file_location("kv_reuse_experiment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_kinds_in_one_table(experiment, tmp_path, capsys):
    shape = {"num_hidden_layers": 5, "max_position_embeddings": 128}
    models = [str(tiny_checkpoint(tmp_path / str(seed), seed=seed, **shape)) for seed in (0, 1)]
    boolq = [{"question": "is it", "answer": True, "passage": f"the sky is blue {row}"} for row in range(5)]
    dolly = [{"instruction": "name it", "context": f"the cat {row}" if row else "", "response": ""} for row in range(6)]
    for name, rows in (("boolq", boolq), ("dolly", dolly)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"--receiver={models[0]}", f"--sender={models[1]}", f"--out={tmp_path / 'out'}", "--random=3"]
    given += [f"--{name}={tmp_path / name}" for name in ("boolq", "dolly")]
    assert experiment.main([*given, "--count=4", "--prefix", "2", "40", "--rest=40", "--max_new_tokens=2"]) == 0
    out = capsys.readouterr().out
    assert "boolq: 4 rows" in out and "dolly: 4 rows" in out and "first:n" in out
    found = read_json(tmp_path / "out" / "kv_reuse.json", "jaxcrit.experiment")
    both = [found["reused"][kind]["test"]["kl"] for kind in ("boolq", "dolly")]
    assert found["front"][0]["best"]["kl"] == pytest.approx(sum(both) / 2)
    assert found["correlation"][0]["second"] == "boolq:kv_distance_keys"
