"""The experiment end to end on a tiny model that knows seven facts."""

import json

import fact_edits
import jax
import numpy as np
from support.known_facts import knowing_checkpoint

from jaxcrit.core.files import read_json
from jaxcrit.models import model as session
from jaxcrit.parallel.mesh import make_mesh


def test_prints_writes_and_reads_back(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "make_mesh", lambda axes: make_mesh({"data": 1}, jax.devices()[:1]))
    model, facts, _ = knowing_checkpoint(tmp_path)
    rng, words = np.random.default_rng(0), ["cat", "dog", "sky", "one", "two", "blue", "sat", "mat"]
    rows = [{"text": f"{row} " + " ".join(rng.choice(words, 20))} for row in range(30)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"--model={model}", f"--facts={facts}", f"--covariance_data={tmp_path / 'text.jsonl'}", "--layers=1-3"]
    given += ["--steps=2", f"--out={tmp_path / 'out'}", "--quick"]
    edits = [*given, "--ways=full,random", "--counts=2", "--neighbours=4"]
    fact_edits.main(edits)
    found = read_json(tmp_path / "out" / "edits.json", "jaxcrit.fact_edits")
    assert found["known"] == 7 and [row["way"] for row in found["rows"]] == ["full", "random"]
    assert found["rows"][0]["layers"] == [1, 3] and len(found["rows"][1]["layers"]) == 2
    assert found["rows"][0]["neighbour_questions"] == 4
    fact_edits.main(edits)
    assert read_json(tmp_path / "out" / "edits.json", "jaxcrit.fact_edits")["rows"] == found["rows"]
    fact_edits.main([*given, "--part=sequence", "--batch=2", "--neighbours=2", "--every=1"])
    sequence = read_json(tmp_path / "out" / "sequence.json", "jaxcrit.fact_edits")["rows"]
    assert [(row["way"], row["batch"]) for row in sequence] == [("spread", 1), ("spread", 2), ("full", 1), ("full", 2)]
    printed = capsys.readouterr().out
    assert "7 facts are known word for word" in printed and "neighbour greedy" in printed
