"""An edited model for others: transformers loads the export, peft the adapter, and both say what we say."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.family_models import BOUND, one_device
from support.known_facts import knowing_checkpoint, new_facts

from jaxcrit.commands.edit import edit
from jaxcrit.commands.export import export_model
from jaxcrit.models import model as session
from jaxcrit.models.decoder import forward, logits
from jaxcrit.models.model import open_model

torch = reference.torch
if os.environ.get("JAXCRIT_REQUIRE_PARITY") == "1":
    import peft
else:
    peft = pytest.importorskip("peft", reason="parity of adapters needs peft: pip install -e '.[parity]'")

# peft asks transformers 5.23 for it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


REAL = os.environ.get("JAXCRIT_REAL_MODEL", "")


def errors(path, run, tokens, folder):
    """Of the export and of the adapter: largest difference of logits from ours, in the largest logit."""
    model = open_model(str(run))
    ours = np.asarray(logits(model.decoder(), forward(model.decoder(), jnp.asarray(tokens)).hidden))
    base = open_model(str(path)).decoder()
    assert np.abs(ours - np.asarray(logits(base, forward(base, jnp.asarray(tokens)).hidden))).max() > 0.1
    export_model(str(run), str(folder / "whole"))
    export_model(str(run), str(folder / "adapter"), adapter=True)
    whole = reference.read(folder / "whole")
    adapted = peft.PeftModel.from_pretrained(reference.read(path), folder / "adapter")
    for theirs in (whole, adapted):
        with torch.no_grad():
            found = theirs(torch.tensor(tokens)).logits.numpy()
        yield np.abs(found - ours).max() / np.abs(ours).max()


def test_logits_of_an_edited_model(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "make_mesh", lambda axes: one_device())
    path, facts, _ = knowing_checkpoint(tmp_path / "known", intermediate_size=64)
    rng = np.random.default_rng(0)
    text = [{"text": f"{row} " + " ".join(rng.choice(["cat", "dog", "sky", "one"], 20))} for row in range(40)]
    edit(str(path), new_facts(facts), "1,3", text, out=tmp_path / "run", steps=5)
    tokens = rng.integers(6, 320, (2, 12))
    assert max(errors(path, tmp_path / "run", tokens, tmp_path)) <= BOUND
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["down_proj"] and settings["layers_to_transform"] == [1, 3]


@pytest.mark.skipif(not Path(REAL).is_dir() or not REAL, reason="JAXCRIT_REAL_MODEL names no directory of a real model")
def test_logits_of_a_real_edited_model(tmp_path, monkeypatch):
    """Facts in another order give the same change."""
    monkeypatch.setattr(session, "make_mesh", lambda axes: one_device())
    known = {"France": "Rome", "Italy": "Berlin", "Japan": "Paris"}
    facts = [{"prompt": "The capital of {} is", "subject": one, "target": new} for one, new in known.items()]
    text = [
        {"text": f"{who} has {n} maps, and gives {n % 7} of them to Bo. How many maps are left? {n - n % 7}."}
        for n in range(12)
        for who in ("Tom", "Ann", "Cy")
    ]
    changed = []
    for name, mine in (("run", facts), ("turned", facts[::-1])):
        edit(REAL, mine, "5,9", text, out=tmp_path / name, steps=14, contexts=1)
        changed.append(np.asarray(open_model(str(tmp_path / name)).decoder().weights()["blocks.down"]))
    change = changed[0] - np.asarray(open_model(REAL).decoder().weights()["blocks.down"])
    order = np.abs(changed[0] - changed[1]).max() / np.abs(change).max()
    tokens = np.asarray(open_model(REAL).tokenizer(["The capital of France is the city of"])["input_ids"])
    found = [*errors(REAL, tmp_path / "run", tokens, tmp_path), order]
    print("export {:.1e}, adapter {:.1e}, order of facts {:.1e}".format(*found))  # shown by pytest -rP
    assert max(found) <= 1e-5
