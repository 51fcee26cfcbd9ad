"""An edited model for others: transformers loads the export, peft the adapter, and both say what we say."""

from __future__ import annotations

import json
import os

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


def test_logits_of_an_edited_model(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCRIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "make_mesh", lambda axes: one_device())
    path, facts, _ = knowing_checkpoint(tmp_path / "known", intermediate_size=64)
    rng = np.random.default_rng(0)
    text = [{"text": f"{row} " + " ".join(rng.choice(["cat", "dog", "sky", "one"], 20))} for row in range(40)]
    edit(str(path), new_facts(facts), "1,3", text, out=tmp_path / "run", steps=5)
    tokens = rng.integers(6, 320, (2, 12))
    model = open_model(str(tmp_path / "run"))
    ours = np.asarray(logits(model.decoder(), forward(model.decoder(), jnp.asarray(tokens)).hidden))
    base = open_model(str(path)).decoder()
    assert np.abs(ours - np.asarray(logits(base, forward(base, jnp.asarray(tokens)).hidden))).max() > 0.1
    export_model(str(tmp_path / "run"), str(tmp_path / "whole"))
    export_model(str(tmp_path / "run"), str(tmp_path / "adapter"), adapter=True)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["down_proj"] and settings["layers_to_transform"] == [1, 3]
    whole = reference.read(tmp_path / "whole")
    adapted = peft.PeftModel.from_pretrained(reference.read(path), tmp_path / "adapter")
    for theirs in (whole, adapted):
        with torch.no_grad():
            found = theirs(torch.tensor(tokens)).logits.numpy()
        assert np.abs(found - ours).max() <= BOUND * np.abs(ours).max()
