"""``jaxcrit plan``: Llama-2-7B on sixteen TPUs that are not here."""

from __future__ import annotations

import importlib.util
import json

import pytest

from jaxcrit.core.errors import UserError
from jaxcrit.studies.plan import PlanConfig, run_plan

LLAMA = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
         "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096}  # fmt: skip
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu: pip install -e '.[plan]'"
)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


@needs_libtpu
@pytest.mark.parametrize(("layers", "most"), [("10-14", 3.6), ("all", 10.5)])
def test_memory_of_a_step(model, layers, most):
    plan = run_plan(PlanConfig(model=model, mesh="fsdp=4,tensor=4", layers=layers))
    assert plan.devices == 16 and plan.peak / 2**30 <= most


@needs_libtpu
def test_mistakes_in_the_topology(model):
    with pytest.raises(UserError, match="expected a name such as v5e:4x4"):
        run_plan(PlanConfig(model=model, topology="v5e-16"))
    with pytest.raises(UserError, match="name layers"):
        run_plan(PlanConfig(model=model, layers="critical:5"))


def test_without_libtpu_or_model(model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no config\.json"):
        run_plan(PlanConfig(model=str(tmp_path / "nowhere")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jaxcrit\[plan\]'"):
        run_plan(PlanConfig(model=model))
